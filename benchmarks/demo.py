"""What `make demo` takes on a processor with AVX2 and nothing newer: per training step, per part and per stage.

    python benchmarks/demo.py                       # a clone of HEAD in a temporary folder: experts, then the pipeline
    python benchmarks/demo.py --stages              # the pipeline's stages one by one, with their processor time, too
    python benchmarks/demo.py --json out.json
    python benchmarks/demo.py --keep /tmp/demo      # keep the clone; a folder that is there already is used again

Wall time needs an idle machine. Processor time (user and system, children included) does not: divided by the number of
processors it is what the part takes at the least. The instruction set is capped by the environment, for torch, oneDNN
and MKL, so that a newer processor runs the code of an AVX2 one, if not at its speed: the processor's name is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Spent:
    """What one command took; `processor_s` is user and system time, those of its children included."""

    part: str
    wall_s: float
    processor_s: float


def spend(part: str, command: list[str], clone: Path) -> tuple[Spent, str]:
    """What `command` took in `clone`, and its standard output; ends this script when the command fails."""
    search = os.pathsep.join([str(clone / "src"), str(clone)])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            command, cwd=clone, stdout=output, env={**os.environ, **AVX2, "PYTHONPATH": search, "PATH": path}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"{part} ended with exit code {child.returncode}")
        output.seek(0)
        spent = Spent(part, time.perf_counter() - began, usage.ru_utime + usage.ru_stime)
        print(f"{part:<24} {spent.wall_s:8.1f} {spent.processor_s:10.1f}", flush=True)
        return spent, output.read()


@contextmanager
def checkout(keep: Path | None) -> Iterator[Path]:
    """A clone of HEAD; a run refuses a checkout with changes that are not committed."""
    with tempfile.TemporaryDirectory() as folder:
        clone = keep or Path(folder) / "modelweld"
        if not clone.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        yield clone


def stages(clone: Path) -> list[Spent]:
    """The pipeline by hand, one group of dvc.yaml after the other, in the clone itself."""
    modelweld, dvc = str(Path(sys.executable).with_name("modelweld")), [sys.executable, "-m", "dvc", "repro", "-q"]
    found = [spend("  pin", [modelweld, "pin"], clone)[0]]
    for group in ("fetch", "validate", "merge", "baselines", "evaluate"):
        found.append(spend(f"  {group}", [*dvc, "--single-item", group], clone)[0])
    return found


def processor() -> str:
    """The processor's name and how many of it this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", action="store_true", help="the stages by hand, too, before the run")
    parser.add_argument("--keep", type=Path, help="where the clone goes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    machine = processor()
    print(f"{machine}\n{'part':<24} {'wall, s':>8} {'processor':>10}", flush=True)
    with checkout(arguments.keep) as clone:
        spent = [spend("experts", [sys.executable, "examples/minilm/prepare.py"], clone)[0]]
        experts = [part["facts"] for part in _made(clone).values() if part["facts"]]
        for facts in experts:
            step, seconds = facts["seconds_per_step"], facts["seconds"]
            print(f"  {facts['task']:<22} {'':8} {seconds:10.1f}   {facts['steps']} steps of {step:.3f} s")
        if arguments.stages:
            spent += stages(clone)
        total, output = spend(
            "modelweld run", [str(Path(sys.executable).with_name("modelweld")), "--json", "run"], clone
        )
        run = json.loads(output)
        for stage in run["stages"]:
            print(f"  {stage['stage']:<22} {stage['seconds']:8.1f}")
    if arguments.json:
        document: dict[str, Any] = {
            "processor": machine,
            "parts": [asdict(part) for part in [*spent, total]],
            "experts": experts,
            "stages": run["stages"],
            "scores": run["scores"],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _made(clone: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((clone / "examples" / "minilm" / "made.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
