"""`modelweld plan` before anything is fetched: headers alone cross the wire, and what cannot fit is said."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelweld.cli import main
from modelweld.config import load_params
from modelweld.errors import CheckpointError, ConfigError, DiskFull, SourceError, SourceUnavailable
from modelweld.sources import fetch, pin
from modelweld.stages.plan import plan
from tests.conftest import Family, build_family, pipeline_params

WIDE = 256  # wide enough for weights to be much larger than their headers


@pytest.fixture(scope="module")
def wide_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("wide"), hidden=WIDE, layers=2)


class Counting(SimpleHTTPRequestHandler):
    """A file server that gives ranges, and counts the bytes that it was asked for."""

    sent: list[int]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        asked, path = self.headers.get("Range"), Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            return super().do_GET()
        first, last = asked.removeprefix("bytes=").split("-")
        body = path.read_bytes()[int(first) : int(last) + 1]
        self.sent.append(len(body))
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(body)
        return None

    def copyfile(self, source: Any, outputfile: Any) -> None:
        block = source.read()
        self.sent.append(len(block))
        outputfile.write(block)


@pytest.fixture
def web(wide_family: Family) -> Iterator[tuple[str, list[int]]]:
    kind = type("Bound", (Counting,), {"sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(wide_family.root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kind.sent
    server.shutdown()
    server.server_close()
    thread.join()


def written(family: Family, project: Path, where: str, **changes: Any) -> Path:
    """params.yaml whose models are at `where`/models/<name>/."""
    document = json.loads(pipeline_params(family))
    for name, source in document["models"].items():
        source["uri"] = f"{where}/models/{name}/"
    (project / "params.yaml").write_text(json.dumps(document | changes))
    return project / "params.yaml"


def without_reading(estimate: Any) -> dict[str, Any]:
    document = estimate.data()
    return {key: document[key] for key in ("tensors", "heads", "left_out", "shards", "read_bytes")}


def test_a_plan_of_local_sources_is_that_of_fetched_ones(wide_family: Family, tmp_path: Path) -> None:
    params = written(wide_family, tmp_path, str(wide_family.root))
    before = plan(params, tmp_path / "merged")
    assert sorted(before.fetch) == ["dataset-animal", "dataset-colour", "model-animal", "model-base", "model-colour"]
    assert before.seen["base"] == str(wide_family.base)
    assert not (tmp_path / "models").exists()
    for entry in pin(load_params(params), tmp_path).pinned.values():
        fetch(entry, tmp_path / entry.path, tmp_path)
    after = plan(params, tmp_path / "merged")
    assert without_reading(after) == without_reading(before)
    assert after.fetch == {}
    assert after.seen == {}
    assert before.disk_bytes - after.disk_bytes >= sum(before.fetch.values())
    assert after.baseline_bytes == pytest.approx(after.plan.write_bytes, rel=0.01)
    document = json.loads(params.read_text())
    document["models"]["animal"]["uri"] = str(wide_family.expert("colour"))
    params.write_text(json.dumps(document))
    changed = plan(params, tmp_path / "merged")
    assert changed.seen == {"animal": str(wide_family.expert("colour"))}, "what was fetched before is another model"


def test_of_models_on_the_web_only_headers_are_read(
    wide_family: Family, tmp_path: Path, web: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sent = web
    params = written(wide_family, tmp_path, url)
    remote = plan(params, tmp_path / "merged")
    assert remote.seen["animal"] == f"{url}/models/animal/"
    assert max(sent) <= 1 << 16
    local = plan(written(wide_family, tmp_path, str(wide_family.root)), tmp_path / "merged")
    assert without_reading(remote) == without_reading(local)


def test_of_models_in_a_bucket_only_headers_are_read(
    s3: Any, wide_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    for file in wide_family.root.glob("models/*/*"):
        s3.put_object(Bucket="weld-wide", Key=str(file.relative_to(wide_family.root)), Body=file.read_bytes())
    ranges: list[int] = []
    original = S3FileSystem._cat_file

    async def counted(self: Any, path: str, **how: Any) -> bytes:
        block: bytes = await original(self, path, **how)
        ranges.append(len(block))
        return block

    monkeypatch.setattr(S3FileSystem, "_cat_file", counted)
    params = written(wide_family, tmp_path, "s3://weld-wide")
    remote = plan(params, tmp_path / "merged")
    assert 0 < max(ranges) <= 1 << 16
    assert remote.fetch["model-base"] == sum(file.stat().st_size for file in wide_family.base.iterdir())
    local = plan(written(wide_family, tmp_path, str(wide_family.root)), tmp_path / "merged")
    assert without_reading(remote) == without_reading(local)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import botocore.session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="weld-wide")
    yield client
    server.stop()


def test_what_is_pinned_is_looked_at_as_it_is_pinned(
    wide_family: Family, tmp_path: Path, web: tuple[str, list[int]]
) -> None:
    url, _ = web
    params = written(wide_family, tmp_path, url)
    lock = pin(load_params(params), tmp_path)
    remote = plan(params, tmp_path / "merged")
    assert remote.fetch["model-base"] == lock.pinned["model-base"].size_bytes


def test_headers_are_checked_where_they_are(wide_family: Family, tmp_path: Path, web: tuple[str, list[int]]) -> None:
    url, _ = web
    file = wide_family.expert("animal") / "model.safetensors"
    whole = file.read_bytes()
    params = written(wide_family, tmp_path, url)
    try:
        file.write_bytes((1 << 40).to_bytes(8, "little") + whole[8:])
        with pytest.raises(CheckpointError, match="more than the format allows"):
            plan(params, tmp_path / "merged")
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="cut short"):
            plan(params, tmp_path / "merged")
        tensors = load_file_of(whole, tmp_path)
        # The base's other matrices have the same shape: a tensor that lacks must not pass for one tied to them.
        del tensors["bert.encoder.layer.0.attention.self.query.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"animal lacks tensor 'encoder.layer.0.attention.self.query.weight'"):
            plan(params, tmp_path / "merged")
    finally:
        file.write_bytes(whole)


def load_file_of(raw: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "copy.safetensors").write_bytes(raw)
    tensors: dict[str, torch.Tensor] = load_file(folder / "copy.safetensors")
    return tensors


def test_what_cannot_be_looked_at_is_named(wide_family: Family, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(wide_family.expert("animal"), pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    params = written(wide_family, tmp_path, str(wide_family.root))
    document = json.loads(params.read_text())
    document["models"]["animal"] = {"uri": str(pickled), "allow_pickle": True}
    params.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"animal \(pytorch_model.bin is pickled\)") as caught:
        plan(params, tmp_path / "merged")
    assert caught.value.hint == "`modelweld pin`, then `dvc repro fetch@model-animal`"
    for uri, kind in (("nowhere", SourceError), ("http://127.0.0.1:9/x/", SourceUnavailable)):
        document["models"]["animal"] = {"uri": uri}
        params.write_text(json.dumps(document))
        with pytest.raises(kind):
            plan(params, tmp_path / "merged")


def test_a_disk_that_holds_the_merge_but_not_the_models_is_refused(
    wide_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = written(wide_family, tmp_path, str(wide_family.root))
    estimate = plan(params, tmp_path / "merged")
    free = estimate.plan.write_bytes * 3
    assert free < estimate.disk_bytes
    usage = shutil._ntuple_diskusage(free, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match="to fetch"):
        plan(params, tmp_path / "merged").require_fit()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["plan", "params.yaml"])
    assert leaving.value.code == 3
    shown = capsys.readouterr()
    assert "until DVC has linked its cache" in shown.err
    assert "animal is not fetched: its headers were read at" in shown.out
    assert not (tmp_path / "models").exists()
