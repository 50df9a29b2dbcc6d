"""The validate stage: models/ and datasets/ in, validation/gate.json out, before any compute is spent on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from modelweld.checkpoints import Checkpoint
from modelweld.checkpoints.adapter import Adapter, is_adapter
from modelweld.checkpoints.names import diff_names
from modelweld.checkpoints.rounding import folded_rank
from modelweld.config import Params, SourceEntry, load_params
from modelweld.errors import CheckpointError, InputError, ModelweldError
from modelweld.formats.gate import Gate
from modelweld.formats.lock import LOCK_NAME, Kind, Lock, Pinned
from modelweld.stages.fetch import project_root
from modelweld.validation.adapters import other_base
from modelweld.validation.checkpoints import Subject, checkpoint_tables, identical_models
from modelweld.validation.expectations import check
from modelweld.validation.fingerprint import Tokenizing, label_names, tokenizing
from modelweld.validation.gate import refuse
from modelweld.validation.inventory import Inventory, take_inventory
from modelweld.validation.row_table import row_table
from modelweld.validation.sources import changed_files, source_table, unexpected
from modelweld.validation.suites import load_suites
from modelweld.validation.tables import Table

GATE = Path("validation/gate.json")
DATA_DOCS = Path(".modelweld/data-docs")
INVENTORIES = Path(".modelweld/inventory")
BASE = "base"


def validate(params_file: Path, root: Path) -> dict[str, Any]:
    """A summary of what was checked in `root`/models and `root`/datasets; gate.json, Data Docs and inventories written.

    Raises GateRefused, after writing all three, when a critical expectation failed. Data Docs and inventories are for
    people and go to the project's .modelweld/, which outlives the worktree that a flow runs in.
    """
    params = load_params(params_file)
    project = project_root(root)
    lifting = params.merge.method_name if params.merge.alignment is None else "mudsc"
    suites = load_suites(root, lifting=lifting)
    inspection = _Inspection(params, root, Lock.read_if_present(root / LOCK_NAME))
    with ExitStack() as opened:
        inspection.open_models(opened)
        inspection.measure(project / INVENTORIES)
    inspection.read_tasks()
    inspection.account_for_sources()
    gate = Gate.of(check(inspection.tables, suites, data_docs=project / DATA_DOCS))
    gate.write(root / GATE)
    refuse(gate, GATE)
    return {
        "verdict": gate.verdict,
        "gate": GATE.as_posix(),
        "checks": len(gate.results),
        "warnings": [f"{item.subject}: {item.expectation} ({item.where})" for item in gate.warnings],
        "data_docs": str(project / DATA_DOCS / "index.html"),
    }


@dataclass
class _Inspection:
    """The tables of one run, as they come, and what could not be read on the way."""

    params: Params
    root: Path
    lock: Lock | None
    tables: list[Table] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    models: dict[str, Checkpoint | Adapter] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, Tokenizing] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def open_models(self, opened: ExitStack) -> None:
        """Open what can be opened, whether or not it belongs together; the base first, for adapters of it."""
        with_tasks = {task.model for task in self.params.tasks.values()}
        for name in sorted(self.params.models, key=lambda name: name != BASE):
            folder = self.root / "models" / name
            try:
                if name != BASE and is_adapter(folder):
                    self._open_adapter(name, folder, opened)
                else:
                    # Pickles were rewritten when they were fetched: one that is there now was put there afterwards.
                    checkpoint = opened.enter_context(Checkpoint.open(folder))
                    self._keep(name, checkpoint, checkpoint.config, tokenizing(folder))
                if name in with_tasks and name in self.models:
                    self.labels[name] = label_names(self.configs[name], str(folder / "config.json"))
            except CheckpointError as error:
                self._note(f"model:{name}", error)
                self.models.pop(name, None)

    def _open_adapter(self, name: str, folder: Path, opened: ExitStack) -> None:
        base = self.models.get(BASE)
        if not isinstance(base, Checkpoint):
            return
        adapter = Adapter.open(folder, base, name)
        opened.enter_context(adapter.checkpoint)
        own = tokenizing(folder)
        config = adapter.config_on(base) if adapter.name_map.head else adapter.checkpoint.config or base.config
        self._keep(name, adapter, config, own if own.vocabulary is not None else self.tokenizers[BASE])

    def _keep(self, name: str, model: Checkpoint | Adapter, config: dict[str, Any], tokens: Tokenizing) -> None:
        self.models[name], self.configs[name], self.tokenizers[name] = model, config, tokens

    def measure(self, folder: Path) -> None:
        """Make the tables of every model that can be compared with the base; none without a base."""
        base = self.models.get(BASE)
        if not isinstance(base, Checkpoint):
            return
        experts = {name: model for name, model in self.models.items() if name != BASE}
        while True:
            try:
                with _progress(sum(info.nbytes for info in base.tensors.values())) as advance:
                    own, others = take_inventory(base, experts, advance)
                break
            except CheckpointError as error:
                # A file that cannot be read to its end fails its own model only: the others are still measured.
                failed = [name for name in self.models if f"models/{name}/" in f"{error.where}"]
                for name in failed:
                    self._note(f"model:{name}", error)
                    self.models.pop(name)
                    experts.pop(name, None)
                if not failed or BASE in failed:
                    return
        identical = identical_models(others)
        base_subject = self._subject(BASE, own)
        self.tables += checkpoint_tables(base_subject, None)
        for name, inventory in others.items():
            limit = self.params.validate_.max_relative_delta
            self.tables += checkpoint_tables(self._subject(name, inventory), base_subject, identical.get(name), limit)
        folder.mkdir(parents=True, exist_ok=True)
        for name, inventory in {BASE: own, **others}.items():
            inventory.frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")

    def read_tasks(self) -> None:
        """Make the evaluation table of every task whose data can be read and whose head's labels are known."""
        for name, task in self.params.tasks.items():
            path = f"datasets/{task.dataset}"
            if not (self.root / path).is_dir():
                self.problems[f"dataset:{task.dataset}"] = ["no such directory"]
            elif task.model in self.labels:
                labels = self.labels[task.model]
                try:
                    table = row_table(name, task, self.root / path, path, labels, self.params.validate_)
                except InputError as error:
                    self._note(f"dataset:{task.dataset}", error, f"task {name}: ")
                else:
                    self.tables.append(table)

    def account_for_sources(self) -> None:
        """Make one row for every directory that should be in models/ and datasets/, and for every one that is."""
        declared: dict[Kind, dict[str, SourceEntry]] = {"model": self.params.models, "dataset": self.params.datasets}
        for kind, known in declared.items():
            pinned = self.lock.entries(kind) if self.lock is not None else {}
            for name in known:
                self._account(kind, name, pinned.get(name), known[name].licence)
            for name in unexpected(self.root / f"{kind}s", {*known, *pinned}):
                path, subject = f"{kind}s/{name}", f"{kind}:{name}"
                self.tables.append(
                    source_table(subject, path, pinned=False, licence="unknown", changed=None, problem=None)
                )

    def _account(self, kind: Kind, name: str, pin: Pinned | None, licence: str | None) -> None:
        path, subject = f"{kind}s/{name}", f"{kind}:{name}"
        problems = self.problems.get(subject, [])
        directory = self.root / path
        changed = None
        if not directory.is_dir():
            problems = problems or ["no such directory"]
        elif pin is not None:
            changed = changed_files(directory, pin, verify=self.params.validate_.verify_digests)
        self.tables.append(
            source_table(
                subject,
                path,
                # Without any lock the directories were put there by hand, and params.yaml is what names them.
                pinned=pin is not None or self.lock is None,
                licence=licence if pin is None else pin.licence,
                changed=changed,
                problem="; ".join(problems) or None,
            )
        )

    def _subject(self, name: str, inventory: Inventory) -> Subject:
        model = self.models[name]
        return Subject(
            name=name,
            path=f"models/{name}",
            config=self.configs[name],
            tokenizing=self.tokenizers[name],
            inventory=inventory,
            labels=self.labels.get(name),
            other_base=self._other_base(model) if isinstance(model, Adapter) else None,
            folded_rank=self._folded_rank(name, model) if isinstance(model, Checkpoint) else None,
        )

    def _other_base(self, adapter: Adapter) -> str | None:
        pin = self.lock.pinned.get(f"model-{BASE}") if self.lock is not None else None
        addresses = [self.params.models[BASE].uri, *([pin.uri, pin.resolved] if pin is not None else [])]
        return other_base(adapter.config.get("base_model_name_or_path"), addresses)

    def _folded_rank(self, name: str, model: Checkpoint) -> int | None:
        base = self.models[BASE]
        if name == BASE or not isinstance(base, Checkpoint):
            return None
        return folded_rank(base, model, diff_names(base, model).names)

    def _note(self, subject: str, error: ModelweldError, prefix: str = "") -> None:
        """Keep an error as a finding. Paths inside the root only: the gate file is the same wherever the run stood."""
        where = f"{error.where}: " if error.where else ""
        text = f"{prefix}{where}{error.what}".replace(f"{self.root}/", "")
        self.problems.setdefault(subject, []).append(text)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Any]:
    """Progress on standard error where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("measuring tensors"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=total_bytes)
        yield lambda count: bar.advance(task, count)
