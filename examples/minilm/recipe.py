"""How a set of experts is made, as settings.yaml says it, and how much work that is.

Work is counted in tokens × layers, forward: a training step counts three times, since each of its products has two
gradients. One such unit takes the same time wherever it is spent, so a few timed steps give the time of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
LAYERS = 6  # of MiniLM-L6
FILLED = 0.85  # of the longest texts allowed: how long texts are on average, measured on the five tasks at 32 tokens


@dataclass(frozen=True)
class Head:
    """Which linear probe on pooled outputs an expert's head starts from, and how fast the head learns.

    A probe on standardised outputs predicts best, but it leans on directions in which outputs differ little, and these
    are the first that a merge disturbs. Without `learning_rate` the head learns as fast as the layers below it.
    """

    standardised: bool
    strengths: list[float]
    learning_rate: float | None = None


@dataclass(frozen=True)
class Training:
    """How every expert is finetuned. With `frozen_layers: 0` only the word embeddings stay as they are."""

    seed: int
    max_length: int
    batch_size: int
    frozen_layers: int
    weight_decay: float
    warmup: float
    probe_strengths: list[float]
    head: Head

    @property
    def step_work(self) -> int:
        """The work of one step whose texts are all as long as is allowed."""
        return 3 * self.batch_size * self.max_length * (LAYERS - self.frozen_layers)


@dataclass(frozen=True)
class Expert:
    """What one task's expert has of its own."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """One set of experts, and the folder that holds them."""

    out: Path
    split: dict[str, int]
    training: Training
    experts: dict[str, Expert]

    @classmethod
    def read(cls, name: str) -> Recipe:
        """The experts of the `demo` or of the `showcase`."""
        out, file = PLACES[name]
        settings = read_yaml(file)
        experts = {task: Expert(**own) for task, own in settings["experts"].items()}
        how = settings["training"] | {"head": Head(**settings["training"]["head"])}
        return cls(out, settings["split"], Training(**how), experts)

    def work(self, task: str) -> float:
        """The work of one expert: what its frozen base computes for every row, its steps, and its validation."""
        how, rows = self.training, self.split
        base = (rows["train"] + rows["validation"]) * how.max_length * LAYERS
        validation = rows["validation"] * how.max_length * (LAYERS - how.frozen_layers)
        return FILLED * (base + self.experts[task].steps * how.step_work + validation)


def evaluation_work(params: Path, recipe: Recipe) -> float:
    """The work of evaluating base, expert, every baseline and the merge on every task's test rows."""
    systems = 3 + len(read_yaml(params).get("baselines", {}))
    return FILLED * systems * len(recipe.experts) * recipe.split["test"] * recipe.training.max_length * LAYERS


PLACES = {
    "demo": (HERE, HERE / "settings.yaml"),
    "showcase": (HERE / "showcase" / "inputs", HERE / "showcase" / "settings.yaml"),
}


def read_yaml(path: Path) -> Any:
    """The document in a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def seconds_of(costs: list[float], processes: int) -> float:
    """How long it takes when each process takes the next of `costs` as soon as it is free."""
    busy = [0.0] * processes
    for cost in costs:
        busy[busy.index(min(busy))] += cost
    return max(busy)


def duration(seconds: float) -> str:
    """`seconds` as people say it.

    >>> duration(44.2), duration(200)
    ('44 s', '3.3 min')
    """
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
