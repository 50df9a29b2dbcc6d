"""Base model and experts, made on this machine: download, split, finetune; nothing when up to date.

    python examples/minilm/prepare.py             # what the demo merges: minutes
    python examples/minilm/prepare.py showcase    # the longer training of showcase/settings.yaml

Experts are finetuned side by side, one process and one thread each, so that the number of processors changes the time
and not a byte. What is complete when it is interrupted is not made again.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import packages
import texts
import worker
from problems import Problem, WorkerLost
from progress import Experts
from recipe import Recipe, duration, evaluation_work, read_yaml, seconds_of
from rich.console import Console
from uptodate import Made, key_of

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "packages"
POLL_S = 0.2
PIPELINE_S = 120.0  # starting, fetching, validating, merging, recording: assumed for two cores with AVX2


@dataclass(frozen=True)
class Keys:
    """The key of every product; see uptodate.py."""

    packages: str
    texts: str
    base: str
    experts: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe) -> Keys:
        """The keys that the products would have if they were made now."""
        fetched = key_of(HERE / "packages.py", _archives())
        split = key_of(HERE / "texts.py", recipe.split, fetched)
        base = key_of(HERE / "finetune.py", None, fetched)
        experts = {
            task: key_of(HERE / "finetune.py", [task, asdict(recipe.training), asdict(own)], split, base)
            for task, own in recipe.experts.items()
        }
        return cls(fetched, split, base, experts)


@dataclass(frozen=True)
class Todo:
    """What is not up to date."""

    packages: bool
    texts: bool
    base: bool
    experts: list[str]

    @classmethod
    def find(cls, recipe: Recipe, keys: Keys) -> Todo:
        """Archives are only fetched for what is read from them."""
        made = Made(recipe.out)
        split, base = not made.has("texts", keys.texts), not made.has("models/base", keys.base)
        return cls(
            packages=(split or base) and not Made(HERE).has("packages", keys.packages),
            texts=split,
            base=base,
            experts=[task for task, key in keys.experts.items() if not made.has(f"models/{task}", key)],
        )

    @property
    def anything(self) -> bool:
        """Whether anything is to be made."""
        return bool(self.packages or self.texts or self.base or self.experts)

    def lines(self, recipe: Recipe) -> list[str]:
        """What is about to be done, a line for each part."""
        found = []
        if self.packages:
            archives = _archives().values()
            size = sum(entry["megabytes"] for entry in archives)
            found.append(f"download {len(archives)} archives, {size:.0f} MB: the base model and the texts")
        if self.texts:
            found.append(f"split the texts of {len(recipe.experts)} tasks into train, validation and test")
        if self.experts:
            steps = ", ".join(f"{task} ({recipe.experts[task].steps} steps)" for task in self.experts)
            found.append(f"finetune {len(self.experts)} experts on {workers(len(self.experts))} processors: {steps}")
        return found


def _archives() -> dict[str, dict[str, Any]]:
    archives: dict[str, dict[str, Any]] = read_yaml(HERE / "settings.yaml")["packages"]
    return archives


def workers(experts: int) -> int:
    """Processes that finetune at a time: one per processor that this process may use."""
    return max(1, min(len(os.sched_getaffinity(0)), experts))


def prepare(recipe: Recipe, console: Console, params: Path | None = None) -> Todo:
    """Make what is not up to date, and return what that was; Problem where it cannot be made.

    With `params`, the time of the pipeline that follows is estimated as well.
    """
    keys = Keys.of(recipe)
    todo = Todo.find(recipe, keys)
    recipe.out.mkdir(parents=True, exist_ok=True)
    for part in todo.lines(recipe):
        console.print(f"  - {part}", highlight=False, soft_wrap=True)
    with pool(workers(len(todo.experts))) as (processes, reports):
        if todo.experts:
            for line in estimate(recipe, todo.experts, processes, params):
                console.print(f"  {line}", highlight=False, soft_wrap=True)
        if todo.packages:
            packages.fetch(_archives(), PACKAGES, console)
            Made(HERE).note("packages", keys.packages)
        if todo.texts:
            texts.write(PACKAGES, recipe.out / "texts", texts.Bounds(**recipe.split), console)
            Made(recipe.out).note("texts", keys.texts)
        if todo.base:
            processes.submit(worker.base, PACKAGES / "minilm", recipe.out / "models" / "base").result()
            Made(recipe.out).note("models/base", keys.base)
        if todo.experts:
            _finetune(recipe, todo.experts, keys, processes, Experts(console, reports, _work(recipe, todo.experts)))
    return todo


@contextmanager
def pool(size: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes that start when they are first needed, and the queue of their progress."""
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    processes = ProcessPoolExecutor(size, context, initializer=worker.start, initargs=(reports,))
    try:
        yield processes, reports
    except BrokenProcessPool as problem:
        raise WorkerLost("a process that finetunes was ended\n  hint: is there too little memory?") from problem
    finally:
        processes.shutdown(cancel_futures=True)


def estimate(recipe: Recipe, experts: list[str], processes: ProcessPoolExecutor, params: Path | None) -> list[str]:
    """How long everything will take, from a few steps on every processor at once."""
    size = workers(len(experts))
    timed = [processes.submit(worker.seconds_per_work, recipe.training) for _ in range(size)]
    seconds = max(future.result() for future in timed)
    costs = [seconds * work for work in _work(recipe, experts).values()]
    lines = [
        f"one step takes {seconds * recipe.training.step_work:.2f} s here on one thread: "
        f"about {duration(seconds_of(costs, size))} for {len(experts)} experts on {size} processors"
    ]
    if params:
        evaluation = seconds * evaluation_work(params, recipe) / size
        lines.append(
            f"then about {duration(evaluation + PIPELINE_S)} for the pipeline: {duration(evaluation)} to evaluate, and "
            f"{duration(PIPELINE_S)} assumed for all else"
        )
    return lines


def _work(recipe: Recipe, experts: list[str]) -> dict[str, float]:
    return {task: recipe.work(task) for task in experts}


def _finetune(
    recipe: Recipe, experts: list[str], keys: Keys, processes: ProcessPoolExecutor, progress: Experts
) -> None:
    jobs = {
        processes.submit(worker.expert, task, recipe.out, recipe.experts[task], recipe.training): task
        for task in experts
    }
    waiting = set(jobs)
    with progress:
        while waiting:
            done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
            progress.read()
            for job in done:
                task, facts = jobs[job], job.result()
                Made(recipe.out).note(f"models/{task}", keys.experts[task], facts)
                progress.finished(task, describe(facts))


def describe(facts: dict[str, Any]) -> str:
    """What an expert is worth, on validation rows, and what it took."""
    found = facts["accuracy"]
    return (
        f"{facts['task']}: accuracy {found['expert']:.3f} on validation rows, probe on the frozen base "
        f"{found['probe']:.3f}; {facts['steps']} steps of {facts['seconds_per_step']:.2f} s, "
        f"{facts['seconds']:.0f} s in all (processor time)"
    )


def main(name: str = "demo") -> int:
    """The exit code."""
    console = Console(stderr=True)
    try:
        todo = prepare(Recipe.read(name), console)
    except Problem as problem:
        print(f"examples/minilm: {problem}", file=sys.stderr)
        return 1
    if not todo.anything:
        console.print("  base model and experts are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
