"""What a process of the pool does: one thread, one expert at a time; it imports torch, the others need not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recipe import Expert, Training

# Set once in each process of the pool: a queue can only be handed to a process when it starts.
_reports: Any = None


def start(reports: Any) -> None:
    """Keep the queue that progress goes to, and import what every expert needs, for one thread and no network."""
    global _reports
    _reports = reports
    # Before torch and transformers are imported: they read these once.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    from transformers.utils import logging

    logging.disable_progress_bar()


def seconds_per_work(how: Training) -> float:
    """Seconds of one unit of work on one thread of this processor."""
    import finetune

    return finetune.seconds_per_work(how)


def base(package: Path, out: Path) -> None:
    """The base model as a Hugging Face directory."""
    import finetune

    finetune.save_base(package, out)


def expert(task: str, root: Path, own: Expert, how: Training) -> dict[str, Any]:
    """One expert in `root`/models/<task>, and the facts about it."""
    import finetune

    return finetune.make_expert(task, root, own, how, lambda work: _reports.put((task, work)))
