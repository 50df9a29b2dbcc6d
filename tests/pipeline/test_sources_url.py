"""s3:// against a moto server and http:// against a plain web server, both on loopback."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from modelweld.config import Params
from modelweld.errors import SourceError, SourceUnavailable
from modelweld.sources import changes, fetch, pin, resolve


def weights(seed: int = 0, rows: int = 64) -> bytes:
    return save({"w": np.random.default_rng(seed).standard_normal((rows, 64), dtype=np.float32)})


def params(base: str, data: str) -> Params:
    return Params.model_validate(
        {
            "name": "demo",
            "models": {"base": {"uri": base}},
            "datasets": {"d": {"uri": data}},
            "tasks": {},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        }
    )


def read(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    import botocore.session

    for key, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="weld-models")
    client.put_object(Bucket="weld-models", Key="base/config.json", Body=b"{}")
    client.put_object(Bucket="weld-models", Key="base/README.md", Body=b"---\nlicense: mit\n---\n")
    client.put_object(Bucket="weld-models", Key="base/model.safetensors", Body=weights())
    client.put_object(Bucket="weld-models", Key="base-other/config.json", Body=b"other")
    client.put_object(Bucket="weld-models", Key="data/test.csv", Body=b"text,label\na,0\n")
    yield client
    versions = client.list_object_versions(Bucket="weld-models")
    for item in [*versions.get("Versions", []), *versions.get("DeleteMarkers", [])]:
        client.delete_object(Bucket="weld-models", Key=item["Key"], VersionId=item["VersionId"])
    client.delete_bucket(Bucket="weld-models")


BUCKET = params("s3://weld-models/base", "s3://weld-models/data/test.csv")


def test_a_prefix_and_an_object_are_pinned_and_fetched(s3: Any, tmp_path: Path) -> None:
    lock = pin(BUCKET, tmp_path)
    base, data = lock.pinned["model-base"], lock.pinned["dataset-d"]
    assert sorted(base.files) == ["README.md", "config.json", "model.safetensors"]
    assert base.licence == "mit"
    assert base.revision is not None
    assert base.revision.startswith("tree:")
    assert list(data.files) == ["test.csv"]
    for entry in (base, data):
        fetch(entry, tmp_path / entry.path, tmp_path)
    assert read(tmp_path / "models/base") == {
        "config.json": b"{}",
        "README.md": b"---\nlicense: mit\n---\n",
        "model.safetensors": weights(),
    }
    assert read(tmp_path / "datasets/d") == {"test.csv": b"text,label\na,0\n"}


def test_unchanged_etags_are_not_read_again(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = pin(BUCKET, tmp_path)
    from modelweld.sources import pinning

    def unread(*arguments: object) -> None:
        raise AssertionError("an unchanged source was read")

    with monkeypatch.context() as patch:
        patch.setattr(pinning, "_digest", unread)
        assert resolve(BUCKET, tmp_path, lock) == lock
    s3.put_object(Bucket="weld-models", Key="base/model.safetensors", Body=weights(seed=1))
    moved = {change.key: change for change in changes(lock, resolve(BUCKET, tmp_path, lock))}
    assert (moved["model-base"].what, moved["model-base"].files_changed) == ("moved", 1)
    assert moved["dataset-d"].what == "same"


def test_an_overwritten_object_is_refused(s3: Any, tmp_path: Path) -> None:
    entry = pin(BUCKET, tmp_path).pinned["model-base"]
    s3.put_object(Bucket="weld-models", Key="base/model.safetensors", Body=weights(seed=1))
    with pytest.raises(SourceError, match="not what was pinned"):
        fetch(entry, tmp_path / "models/base", tmp_path)
    assert not (tmp_path / "models/base").exists()
    s3.delete_object(Bucket="weld-models", Key="base/model.safetensors")
    with pytest.raises(SourceError, match="nothing is at"):
        fetch(entry, tmp_path / "models/base", tmp_path)


def test_a_versioned_bucket_gives_the_pinned_version_after_an_overwrite(s3: Any, tmp_path: Path) -> None:
    s3.put_bucket_versioning(Bucket="weld-models", VersioningConfiguration={"Status": "Enabled"})
    for key, body in (("config.json", b"{}"), ("model.safetensors", weights(seed=2)), ("README.md", b"hi")):
        s3.put_object(Bucket="weld-models", Key=f"base/{key}", Body=body)
    entry = pin(BUCKET, tmp_path).pinned["model-base"]
    assert all(file.version for file in entry.files.values())
    s3.put_object(Bucket="weld-models", Key="base/model.safetensors", Body=weights(seed=3))
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert (tmp_path / "models/base/model.safetensors").read_bytes() == weights(seed=2)


def test_a_large_object_comes_in_ranges(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="weld-models", Key="base/model.safetensors", Body=weights(rows=80_000))  # 20 MB
    entry = pin(BUCKET, tmp_path).pinned["model-base"]
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert (tmp_path / "models/base/model.safetensors").read_bytes() == weights(rows=80_000)


@pytest.mark.parametrize("uri", ["s3://weld-models/nothing", "s3://weld-nothing/base"])
def test_nothing_there(s3: Any, tmp_path: Path, uri: str) -> None:
    with pytest.raises(SourceError, match="nothing is"):
        resolve(params(uri, "s3://weld-models/data"), tmp_path)


def test_no_credentials(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(SourceError) as caught:
        resolve(BUCKET, tmp_path)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


def test_a_dead_endpoint(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SourceUnavailable):
        resolve(BUCKET, tmp_path)


class Web(SimpleHTTPRequestHandler):
    """The standard library's file server, with etags, and with trouble on demand."""

    etags = True
    ranges = True
    break_after: list[int]
    asked: list[str | None]

    def log_message(self, *args: object) -> None:
        pass

    def end_headers(self) -> None:
        if self.etags:
            path = Path(self.translate_path(self.path))
            if path.is_file():
                self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        super().end_headers()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if not path.name.endswith(".safetensors"):
            return super().do_GET()
        self.asked.append(asked)
        data = path.read_bytes()
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = start + self.break_after.pop(0) if self.break_after else len(data)
        self.wfile.write(data[start:end])
        return None


@pytest.fixture
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, type[Web]]]:
    root = tmp_path_factory.mktemp("web")
    (root / "base").mkdir()
    (root / "base/config.json").write_text("{}")
    (root / "base/model.safetensors").write_bytes(weights(rows=40_000))  # 10 MB
    (root / "test.csv").write_text("text,label\na,0\n")
    kind = type("Bound", (Web,), {"break_after": [], "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", root, kind
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_folder_and_a_web_file(web: tuple[str, Path, type[Web]], tmp_path: Path, ranges: bool) -> None:
    url, root, kind = web
    wanted = params(f"{url}/base/", f"{url}/test.csv?download=true")
    lock = pin(wanted, tmp_path)
    base, data = lock.pinned["model-base"], lock.pinned["dataset-d"]
    assert sorted(base.files) == ["config.json", "model.safetensors"]
    assert list(data.files) == ["test.csv"]
    kind.asked.clear()
    assert resolve(wanted, tmp_path, lock) == lock
    assert kind.asked == []
    kind.ranges = ranges
    kind.break_after = [5 * 2**20, 2**20 + 1]
    for entry in (base, data):
        fetch(entry, tmp_path / entry.path, tmp_path)
    assert read(tmp_path / "models/base") == read(root / "base")
    assert read(tmp_path / "datasets/d") == {"test.csv": (root / "test.csv").read_bytes()}
    assert len(kind.asked) >= 3
    (root / "test.csv").write_text("text,label\nb,1\n")
    assert [change.what for change in changes(lock, resolve(wanted, tmp_path, lock))] == ["moved", "same"]


def test_a_web_file_without_etag_is_read_at_every_pin(web: tuple[str, Path, type[Web]], tmp_path: Path) -> None:
    url, root, kind = web
    kind.etags = False
    wanted = params(f"{url}/base/", f"{url}/test.csv")
    lock = pin(wanted, tmp_path)
    assert lock.pinned["dataset-d"].revision is None
    (root / "test.csv").write_text("text,label\nb,1\n")
    assert [change.what for change in changes(lock, resolve(wanted, tmp_path, lock))] == ["moved", "same"]


def test_missing_and_unreachable_web_addresses(web: tuple[str, Path, type[Web]], tmp_path: Path) -> None:
    url, _, _ = web
    with pytest.raises(SourceError, match="nothing is at"):
        resolve(params(f"{url}/base/", f"{url}/none.csv"), tmp_path)
    with pytest.raises(SourceUnavailable, match="no answer"):
        resolve(params("http://127.0.0.1:9/base/", f"{url}/test.csv"), tmp_path)


@pytest.mark.parametrize(
    ("uri", "said"), [("nonsense://x/y", "is no kind of source"), ("zip://a::s3://weld/x", "chained")]
)
def test_addresses_nothing_understands(tmp_path: Path, uri: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        resolve(params(uri, uri), tmp_path)
