"""hf:// against a server on loopback that speaks the part of the Hub's API that a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save

from modelweld.checkpoints import Checkpoint
from modelweld.config import Params
from modelweld.errors import SourceError, SourceUnavailable
from modelweld.sources import Lock, PinnedFile, changes, fetch, pin, resolve
from modelweld.sources.remote_headers import read_remote_headers
from modelweld.sources.schemes import open_source

LFS = (".safetensors", ".bin", ".parquet", ".h5")


@dataclass
class Hub:
    """Repositories by `models/org/name` or `datasets/org/name`: branch to commit, commit to files."""

    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)
    busy: int = 0
    ignore_ranges: bool = False
    token: str | None = None
    url: str = ""

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        content = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
        commit = hashlib.sha1(f"{repository}{content}".encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for path, _, _ in self.requests if "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if hub.busy:
            hub.busy -= 1
            return self.answer(503, b"busy")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            return self.describe(path.removeprefix("/api/"))
        repository, _, rest = path.strip("/").partition("/resolve/")
        commit, _, name = rest.partition("/")
        kind = "" if repository.startswith("datasets/") else "models/"
        if f"{kind}{repository}" not in hub.branches or name not in hub.commits.get(commit, {}):
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.send_file(hub.commits[commit][name])

    def describe(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        branches = self.hub.branches.get(repository)
        if branches is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = branches.get(revision or "main", revision if revision in branches.values() else None)
        if commit is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, data in self.hub.commits[commit].items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith(LFS):
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        repo_id = repository.partition("/")[2]
        document: dict[str, object] = {"id": repo_id, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        if repository in self.hub.licences:
            document["cardData"] = {"license": self.hub.licences[repository]}
        return self.answer(200, json.dumps(document).encode())

    def send_file(self, data: bytes) -> None:
        start, status, headers = 0, 200, {}
        asked = self.headers.get("Range")
        if asked and not self.hub.ignore_ranges:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        if self.hub.break_after and len(body) > 2**20:
            sent = self.hub.break_after.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])
            self.close_connection = True
            return
        self.answer(status, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The suite runs with the Hub switched off; here it is on, and on loopback.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def weights(seed: int = 0, rows: int = 64) -> bytes:
    return save({"w": np.random.default_rng(seed).standard_normal((rows, 64), dtype=np.float32)})


def repository(seed: int = 0, rows: int = 64) -> dict[str, bytes]:
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"---\nlicense: mit\n---\n",
        "config.json": b"{}",
        "model.safetensors": weights(seed, rows),
        "pytorch_model.bin": b"pickle",
        "tf_model.h5": b"h5",
        "onnx/model.onnx": b"onnx",
        "modeling_custom.py": b"print('boo')",
        "1_Pooling/config.json": b"{}",
    }


def params(uri: str = "hf://org/base@main") -> Params:
    return Params.model_validate(
        {
            "name": "demo",
            "models": {"base": {"uri": uri}},
            "datasets": {"d": {"uri": "hf://datasets/org/data@main/csv"}},
            "tasks": {},
            "validate": {},
            "merge": {"method": "average"},
            "baselines": {},
            "evaluate": {},
        }
    )


@pytest.fixture
def filled(hub: Hub) -> Hub:
    hub.push("models/org/base", repository())
    hub.licences["models/org/base"] = "apache-2.0"
    hub.push("datasets/org/data", {"csv/test.csv": b"text,label\na,0\n", "other/test.csv": b"no", "README.md": b"hi"})
    return hub


def read(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_branch_is_pinned_to_its_commit_and_fetched(filled: Hub, tmp_path: Path) -> None:
    lock = pin(params(), tmp_path)
    base, data = lock.pinned["model-base"], lock.pinned["dataset-d"]
    commit = filled.branches["models/org/base"]["main"]
    assert (base.resolved, base.revision, base.licence) == (f"hf://org/base@{commit}", commit, "apache-2.0")
    assert sorted(base.files) == ["1_Pooling/config.json", "README.md", "config.json", "model.safetensors"]
    assert sorted(base.skipped) == ["modeling_custom.py", "onnx/model.onnx", "pytorch_model.bin", "tf_model.h5"]
    assert list(data.files) == ["test.csv"]
    assert "model.safetensors" not in filled.downloads()  # the Hub's own SHA-256 is taken
    for entry in (base, data):
        fetch(entry, tmp_path / entry.path, tmp_path)
    files = repository()
    assert read(tmp_path / "models/base") == {name: files[name] for name in base.files}
    assert read(tmp_path / "datasets/d") == {"test.csv": b"text,label\na,0\n"}
    assert not {"pytorch_model.bin", "modeling_custom.py", "tf_model.h5"} & set(filled.downloads())


def test_a_commit_that_stands_is_not_read_again_and_one_that_moved_is_seen(filled: Hub, tmp_path: Path) -> None:
    lock = pin(params(), tmp_path)
    filled.requests.clear()
    assert resolve(params(), tmp_path, lock) == lock
    assert filled.downloads() == []
    filled.push("models/org/base", repository(seed=1))
    moved = {change.key: change for change in changes(lock, resolve(params(), tmp_path, lock))}
    assert (moved["model-base"].what, moved["model-base"].files_changed) == ("moved", 1)
    assert moved["dataset-d"].what == "same"
    # What is locked is still what is fetched.
    fetch(lock.pinned["model-base"], tmp_path / "models/base", tmp_path)
    assert (tmp_path / "models/base/model.safetensors").read_bytes() == weights(0)


@pytest.mark.parametrize("ignore_ranges", [False, True])
def test_a_connection_that_breaks_goes_on_where_it_broke(hub: Hub, tmp_path: Path, ignore_ranges: bool) -> None:
    hub.push("models/org/base", repository(rows=40_000))  # 10 MB
    hub.push("datasets/org/data", {"csv/test.csv": b"text,label\n"})
    lock = pin(params(), tmp_path)
    hub.break_after = [8 * 2**20, 2**19]
    hub.busy = 1
    hub.ignore_ranges = ignore_ranges
    hub.requests.clear()
    fetch(lock.pinned["model-base"], tmp_path / "models/base", tmp_path)
    assert (tmp_path / "models/base/model.safetensors").read_bytes() == weights(rows=40_000)
    ranges = [asked for path, asked, _ in hub.requests if path.endswith("model.safetensors")]
    assert len(ranges) == 3
    assert all(asked is not None for asked in ranges[1:])


def test_a_fetch_that_gave_up_is_resumed_by_the_next(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("models/org/base", repository(rows=80_000))  # 20 MB
    hub.push("datasets/org/data", {"csv/test.csv": b"text,label\n"})
    lock = pin(params(), tmp_path)
    monkeypatch.setattr("modelweld.sources.retrying.ATTEMPTS", 1)
    hub.break_after = [17 * 2**20, 0]
    with pytest.raises(SourceUnavailable, match="did not answer"):
        fetch(lock.pinned["model-base"], tmp_path / "models/base", tmp_path)
    assert not (tmp_path / "models/base").exists()
    hub.break_after = []
    hub.requests.clear()
    done = fetch(lock.pinned["model-base"], tmp_path / "models/base", tmp_path)
    assert done.kept_bytes >= 16 * 2**20
    assert hub.downloads() == ["model.safetensors"]
    assert (tmp_path / "models/base/model.safetensors").read_bytes() == weights(rows=80_000)


def test_bytes_that_differ_from_the_lock_are_not_kept(filled: Hub, tmp_path: Path) -> None:
    lock = pin(params(), tmp_path)
    commit = filled.branches["models/org/base"]["main"]
    filled.commits[commit] = {**filled.commits[commit], "model.safetensors": weights(seed=9)}
    with pytest.raises(SourceError, match="not what was pinned"):
        fetch(lock.pinned["model-base"], tmp_path / "models/base", tmp_path)
    assert not (tmp_path / "models/base").exists()
    assert not list(tmp_path.rglob("model.safetensors"))


def test_the_token_comes_from_the_environment_and_from_nowhere_else(
    filled: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "token"
    stored.write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stored))
    lock = pin(params(), tmp_path)
    assert {sent for _, _, sent in filled.requests} == {None}
    filled.token = "hf_fromenvironment"
    with pytest.raises(SourceError, match="no model org/base") as caught:
        resolve(params(), tmp_path)
    assert "HF_TOKEN" in str(caught.value.hint)
    monkeypatch.setenv("HF_TOKEN", "hf_fromenvironment")
    assert resolve(params(), tmp_path) == lock
    fetch(lock.pinned["model-base"], tmp_path / "models/base", tmp_path)
    assert "fromenvironment" not in lock.to_json()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("hf://org/nothing@main", "no model org/nothing"),
        ("hf://org/base@v9", "no revision 'v9'"),
        ("hf://base", "namespace/name"),
        ("hf://spaces/org/base", "space"),
        ("hf://org/base@main/nowhere", "nowhere holds no files"),
    ],
)
def test_what_is_not_there_is_named(filled: Hub, tmp_path: Path, uri: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        resolve(params(uri), tmp_path)


def test_only_pickles_are_refused(filled: Hub, tmp_path: Path) -> None:
    filled.push("models/org/base", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(SourceError, match="pickled"):
        resolve(params(), tmp_path)


def test_a_name_that_leaves_its_directory_is_refused(filled: Hub, tmp_path: Path) -> None:
    filled.push("models/org/base", {**repository(), "../../evil.json": b"{}"})
    with pytest.raises(SourceError, match="unsafe file name"):
        resolve(params(), tmp_path)


def test_nobody_answers(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable) as caught:
        resolve(params(), tmp_path)
    assert caught.value.exit_code == 3
    assert "HF_ENDPOINT" in str(caught.value.hint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="switched off"):
        resolve(params(), tmp_path)


def test_a_single_file_of_a_repository(filled: Hub, tmp_path: Path) -> None:
    one = params().model_copy(
        update={
            "datasets": {"d": params().datasets["d"].model_copy(update={"uri": "hf://datasets/org/data/csv/test.csv"})}
        }
    )
    lock: Lock = pin(one, tmp_path)
    assert list(lock.pinned["dataset-d"].files) == ["test.csv"]
    fetch(lock.pinned["dataset-d"], tmp_path / "datasets/d", tmp_path)
    assert read(tmp_path / "datasets/d") == {"test.csv": b"text,label\na,0\n"}


def test_a_file_longer_than_pinned_ends_the_connection(hub: Hub, tmp_path: Path) -> None:
    hub.push("models/org/base", repository(rows=40_000))  # 10 MB
    hub.push("datasets/org/data", {"csv/test.csv": b"text,label\n"})
    entry = pin(params(), tmp_path).pinned["model-base"]
    short = {"model.safetensors": PinnedFile(sha256="0" * 64, size_bytes=3)}
    hub.requests.clear()
    with pytest.raises(SourceError, match="not what was pinned"):
        fetch(entry.model_copy(update={"files": short}), tmp_path / "models/base", tmp_path)
    assert hub.downloads() == ["model.safetensors"]


def test_shards_come_side_by_side_and_one_bad_shard_fails_the_fetch(hub: Hub, tmp_path: Path) -> None:
    shards = {f"model-{i:05}-of-00006.safetensors": weights(seed=i, rows=8_000) for i in range(1, 7)}
    commit = hub.push("models/org/base", {"config.json": b"{}", **shards})
    hub.push("datasets/org/data", {"csv/test.csv": b"text,label\n"})
    entry = pin(params(), tmp_path).pinned["model-base"]
    hub.commits[commit]["model-00004-of-00006.safetensors"] = weights(seed=9, rows=8_000)
    with pytest.raises(SourceError, match="model-00004-of-00006"):
        fetch(entry, tmp_path / "models/base", tmp_path)
    assert not (tmp_path / "models/base").exists()
    hub.commits[commit].update(shards)
    fetch(entry, tmp_path / "models/base", tmp_path)
    assert read(tmp_path / "models/base") == {"config.json": b"{}", **shards}


def test_headers_are_read_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    commit = hub.push("models/org/base", repository(rows=400_000))  # 100 MB
    upstream = open_source("hf://org/base@main", tmp_path, "models.base.uri")
    files = upstream.resolve().files
    read = read_remote_headers(
        upstream, {name: files[name] for name in ("config.json", "model.safetensors")}, tmp_path / "seen"
    )
    assert read < 1 << 17
    path, asked, _ = hub.requests[-1]
    assert path.endswith(f"/resolve/{commit}/model.safetensors")
    assert asked == "bytes=0-65535"
    with Checkpoint.open(tmp_path / "seen") as seen:
        assert seen.tensors["w"].shape == (400_000, 64)
    whole = (tmp_path / "seen" / "model.safetensors").stat()
    assert whole.st_size == files["model.safetensors"].size_bytes
    assert whole.st_blocks * 512 < 1 << 20, "a hole, not zeros"
