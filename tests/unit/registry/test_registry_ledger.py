"""The ledger appends, chains, travels with git, and notices tampering, races and parted histories."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from modelweld.errors import WorkspaceError
from modelweld.registry.ledger import FILE, Ledger

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def git(root: Path, *words: str, stdin: str | None = None) -> str:
    done = subprocess.run(["git", *words], cwd=root, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "here"
    root.mkdir()
    git(root, "init", "--quiet")
    return root


def add(ledger: Ledger, version: int, actor: str = "ada") -> str:
    event = {"event": "promoted", "model_version": version, "before": {}, "aliases": {"champion": version}}
    evidence = {"record": "merge-run/demo/1", "manifest_sha256": "0" * 64, "gate": "passed"}
    return ledger.append(event | evidence, at=NOW, actor=actor).digest


def rewrite(ledger: Ledger, change: Callable[[str], str]) -> None:
    """What someone with the repository in their hands could do: another file on the same branch."""
    text = change(git(ledger.root, "show", f"{ledger.ref}:{FILE}") + "\n")
    blob = git(ledger.root, "hash-object", "-w", "--stdin", stdin=text)
    tree = git(ledger.root, "mktree", stdin=f"100644 blob {blob}\t{FILE}\n")
    identity = ("-c", "user.name=eve", "-c", "user.email=eve@example.org")
    commit = git(ledger.root, *identity, "commit-tree", tree, "-p", f"{ledger.ref}~1", "-m", "quiet")
    git(ledger.root, "update-ref", ledger.ref, commit)


def test_events_are_numbered_chained_and_readable_without_modelweld(repository: Path) -> None:
    ledger = Ledger(repository, "demo")
    assert ledger.events() == []
    first, second = add(ledger, 1), add(ledger, 2, actor="grace")
    events = ledger.events()
    assert [event.version for event in events] == [1, 2]
    assert [event.digest for event in events] == [first, second]
    lines = git(repository, "show", "modelweld/ledger/demo:events.jsonl").splitlines()
    assert json.loads(lines[1])["previous"] == hashlib.sha256(lines[0].encode()).hexdigest()
    assert json.loads(lines[1]) | {"previous": None} == {
        "schema": "modelweld.ledger/1",
        "model": "demo",
        "event": "promoted",
        "model_version": 2,
        "record": "merge-run/demo/1",
        "manifest_sha256": "0" * 64,
        "gate": "passed",
        "before": {},
        "aliases": {"champion": 2},
        "sequence": 2,
        "previous": None,
        "at": "2026-01-02T03:04:05+00:00",
        "actor": "grace",
    }


def test_the_work_tree_and_other_models_are_not_touched(repository: Path) -> None:
    add(Ledger(repository, "demo"), 1)
    assert Ledger(repository, "other").events() == []
    assert git(repository, "status", "--porcelain") == ""
    assert [path.name for path in repository.iterdir()] == [".git"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"model_version":1', '"model_version":9'),
        lambda text: text.splitlines(keepends=True)[0],
        lambda text: "".join(text.splitlines(keepends=True)[1:]),
        lambda text: "".join(reversed(text.splitlines(keepends=True))),
        lambda text: text + text.splitlines(keepends=True)[-1],
        lambda text: text + "not json\n",
    ],
    ids=["edited", "last-dropped", "first-dropped", "reordered", "repeated", "garbage"],
)
def test_tampering_is_noticed(repository: Path, change: Callable[[str], str]) -> None:
    ledger = Ledger(repository, "demo")
    add(ledger, 1)
    add(ledger, 2)
    rewrite(ledger, change)
    with pytest.raises(WorkspaceError, match="tampered with or damaged"):
        ledger.events()


def test_it_travels_with_clone_and_grows_there(repository: Path, tmp_path: Path) -> None:
    add(Ledger(repository, "demo"), 1)
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "hub.git")
    git(tmp_path, "clone", "--quiet", "hub.git", "there")
    there = Ledger(tmp_path / "there", "demo")
    assert [event.version for event in there.events()] == [1]
    add(there, 2)
    there.push("origin")
    git(tmp_path, "clone", "--quiet", "hub.git", "third")
    assert [event.version for event in Ledger(tmp_path / "third", "demo").events()] == [1, 2]


def test_two_machines_that_append_at_once_do_not_overwrite_each_other(repository: Path, tmp_path: Path) -> None:
    add(Ledger(repository, "demo"), 1)
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "hub.git")
    ledgers = []
    for name in ("one", "two"):
        git(tmp_path, "clone", "--quiet", "hub.git", name)
        ledgers.append(Ledger(tmp_path / name, "demo"))
    for number, ledger in enumerate(ledgers, start=2):
        add(ledger, number)
    ledgers[0].push("origin")
    with pytest.raises(WorkspaceError, match="was not pushed"):
        ledgers[1].push("origin")
    git(ledgers[1].root, "fetch", "--quiet", "origin")
    with pytest.raises(WorkspaceError, match="have parted"):
        add(ledgers[1], 3)


def test_a_faster_process_on_the_same_machine_wins(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Ledger(repository, "demo"), Ledger(repository, "demo")
    add(slow, 1)
    old = slow._tip()
    add(fast, 2)
    monkeypatch.setattr(slow, "_tip", lambda: old)
    with pytest.raises(WorkspaceError, match="another process appended"):
        add(slow, 3)
    assert [event.version for event in fast.events()] == [1, 2]


def test_a_fetched_ledger_that_is_ahead_is_taken_up(repository: Path, tmp_path: Path) -> None:
    add(Ledger(repository, "demo"), 1)
    git(tmp_path, "clone", "--quiet", str(repository), "there")
    there = Ledger(tmp_path / "there", "demo")
    add(there, 2)
    git(repository, "remote", "add", "there", str(tmp_path / "there"))
    git(repository, "fetch", "--quiet", "there")
    here = Ledger(repository, "demo")
    add(here, 3)
    assert [event.version for event in here.events()] == [1, 2, 3]


def test_without_a_repository_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="not a git repository"):
        Ledger(tmp_path, "demo").events()
