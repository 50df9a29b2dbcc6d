"""The engine beside plain reading and writing, and beside a peer, on one synthetic Llama-like model.

    python benchmarks/engine.py --methods linear ties
    python benchmarks/engine.py --methods linear ties --mergekit /path/to/venv/bin/mergekit-yaml
    python benchmarks/engine.py --methods dare --set combine=ties --mergekit … --shard-size 250M
    python benchmarks/engine.py --methods linear ties drm --growth

Makes a base and three experts from a seed (0.85 B parameters, bf16, four shards each, 7 GB) in --work, runs the command
in a process of its own for each method, and prints seconds, peak memory and ratios. With --growth the model has 1, 2, 4
and 8 times as many layers, of smaller dimensions, and what counts is the time by parameter. Without --keep all is
removed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

POOL = 1 << 24
EXPERTS = 3
BLOCK = 1 << 22


@dataclass(frozen=True)
class Size:
    """The model's dimensions."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int = 32
    groups: int = 8

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of an untied Llama."""
        width = self.hidden * self.groups // self.heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.k_proj.weight": (width, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (width, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
            }
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def generate(work: Path, size: Size, shard_bytes: int) -> None:
    """Base and experts; an expert is the base plus noise of a tenth of its scale."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(POOL, generator=generator).mul_(0.02)
    noise = torch.randn(POOL, generator=generator).mul_(0.002)
    for number, name in enumerate(["base", *(f"e{i}" for i in range(EXPERTS))]):
        directory = work / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(size.config()))
        pending: dict[str, torch.Tensor] = {}
        shards: list[dict[str, torch.Tensor]] = []
        weight_map: dict[str, int] = {}
        filled = 0
        for position, (tensor, shape) in enumerate(size.shapes().items()):
            count = math.prod(shape)
            weight = cut(values, 977 * position, count)
            if number:
                weight = weight + cut(noise, 7919 * position + 104729 * number, count)
            pending[tensor] = (weight + 1.0 if len(shape) == 1 else weight).to(torch.bfloat16).reshape(shape)
            weight_map[tensor] = len(shards)
            filled += count * 2
            if filled >= shard_bytes:
                shards.append({})
                save_file(pending, directory / f"part-{len(shards)}", metadata={"format": "pt"})
                pending, filled = {}, 0
        if pending:
            shards.append({})
            save_file(pending, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        names = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
        for k, file in enumerate(names):
            (directory / f"part-{k + 1}").rename(directory / file)
        index = {"metadata": {}, "weight_map": {tensor: names[k] for tensor, k in weight_map.items()}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(pool: Any, offset: int, count: int) -> Any:
    """`count` numbers of the pool from `offset` on, going round."""
    rounds = (offset % POOL + count) // POOL + 1
    return pool.repeat(rounds)[offset % POOL : offset % POOL + count]


def measured(command: list[str], **environment: str) -> tuple[float, float, int, str]:
    """Seconds, CPU seconds, peak resident bytes and output of a command that must succeed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        spent = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {child.returncode}:\n{text}")
    return spent, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text


def plain(work: Path, models: list[str]) -> float:
    """Seconds to read the models' weights and to write and sync one model's worth: what no merge can undercut."""
    started = time.perf_counter()
    buffer = bytearray(BLOCK)
    target = work / "plain.bin"
    with target.open("wb") as out:
        for number, name in enumerate(models):
            for file in sorted((work / name).glob("*.safetensors")):
                with file.open("rb", buffering=0) as stream:
                    while count := stream.readinto(buffer):
                        if not number:
                            out.write(memoryview(buffer)[:count])
        out.flush()
        os.fsync(out.fileno())
    spent = time.perf_counter() - started
    target.unlink()
    return spent


def main() -> None:
    """Generate, run, compare, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic", "ties"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="parameters of the method")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="an existing directory with room for five models")
    parser.add_argument("--keep", action="store_true", help="leave the models for the next run")
    parser.add_argument("--mergekit", help="the mergekit-yaml of another environment, as peer")
    parser.add_argument("--shard-size", help="the peer's --out-shard-size; its own default without")
    parser.add_argument("--growth", action="store_true", help="1, 2, 4, 8 times the layers of a smaller model")
    chosen = parser.parse_args()
    if chosen.growth:
        grow(chosen)
        return
    size = Size(chosen.hidden, chosen.layers, chosen.intermediate, chosen.vocabulary)
    work = Path(chosen.work or tempfile.mkdtemp(prefix="modelweld-bench-"))
    try:
        if not (work / f"e{EXPERTS - 1}").is_dir():
            make(work, size, chosen.shard_bytes)
        elements = sum(math.prod(shape) for shape in size.shapes().values())
        print(f"{elements / 1e9:.2f} B parameters, {EXPERTS} experts, in {work}")
        for method in chosen.methods:
            report(work, method, chosen)
    finally:
        if not chosen.keep:
            shutil.rmtree(work)


def make(work: Path, size: Size, shard_bytes: int) -> None:
    """The models, by a process of its own: a child's peak memory would begin at this one's."""
    maker = multiprocessing.get_context("spawn").Process(target=generate, args=(work, size, shard_bytes))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the models could not be made")


def grow(chosen: argparse.Namespace) -> None:
    """Seconds by parameter and peak memory as a model of the same width gets deeper."""
    for factor in (1, 2, 4, 8):
        size = Size(1024, 4 * factor, 2816, 8000, heads=16, groups=4)
        elements = sum(math.prod(shape) for shape in size.shapes().values())
        work = Path(tempfile.mkdtemp(prefix="modelweld-bench-", dir=chosen.work))
        try:
            make(work, size, chosen.shard_bytes)
            for method in chosen.methods:
                merge(work, method, chosen)  # compiled loops and the page cache are there afterwards
                _, _, peak, phases = merge(work, method, chosen)
                spent = phases["merge"] + phases["sync"]
                print(
                    f"{method}: {factor}x, {elements / 1e6:.0f} M parameters: {spent:.2f} s, "
                    f"{spent / elements * 1e9:.2f} s a billion, {peak / 1e6:.0f} MB"
                )
        finally:
            shutil.rmtree(work)


def merge(work: Path, method: str, chosen: argparse.Namespace) -> tuple[float, float, int, dict[str, float]]:
    """Seconds, CPU seconds, peak bytes and seconds by phase of one merge by the command."""
    recipe = {
        "method": method,
        "base": "base",
        "models": {f"e{i}": {"path": f"e{i}"} for i in range(EXPERTS)},
        "output": {"shard_bytes": chosen.shard_bytes, "dtype": "bfloat16"},
        **settings_of(chosen),
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "modelweld", "--json", "merge", str(work / "recipe.yaml"), str(work / "out")]
    spent, busy, peak, text = measured(command)
    shutil.rmtree(work / "out")
    phases: dict[str, float] = json.loads(text)["seconds"]
    return spent, busy, peak, phases


def settings_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """The method's parameters as they were given."""
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in chosen.set)}


def report(work: Path, method: str, chosen: argparse.Namespace) -> None:
    """One method: plain copying, modelweld, the peer."""
    based = method not in ("average", "linear")
    read = [f"e{i}" for i in range(EXPERTS)] + (["base"] if based else [])
    for _ in range(chosen.rounds):
        floor = plain(work, read)
        spent, busy, peak, phases = merge(work, method, chosen)
        inside = sum(phases.values())
        detail = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
        print(f"{method}: plain read and write {floor:.2f} s")
        ratio = inside / floor
        print(
            f"  modelweld {spent:.2f} s, {busy:.2f} s of CPU, {peak / 1e6:.0f} MB; inside {ratio:.2f}x plain: {detail}"
        )
        if chosen.mergekit:
            peer, peer_peak = run_mergekit(work, method, chosen)
            print(
                f"  mergekit  {peer:.2f} s, {peer_peak / 1e6:.0f} MB: "
                f"{peer / spent:.1f}x the time, {peer_peak / peak:.1f}x the memory"
            )


def run_mergekit(work: Path, method: str, chosen: argparse.Namespace) -> tuple[float, int]:
    """The same merge by the peer, at its defaults but for --shard-size."""
    settings = settings_of(chosen)
    density = 1 - settings.get("drop_rate", 0.9) if method == "dare" else settings.get("density", 0.2)
    names = {"average": "linear", "dare": f"dare_{settings.get('combine', 'linear')}"}
    config = {
        "merge_method": names.get(method, method),
        "dtype": "bfloat16",
        "models": [
            {"model": str(work / f"e{i}"), "parameters": {"weight": 1.0, "density": density}} for i in range(EXPERTS)
        ],
    }
    if method not in ("average", "linear"):
        config["base_model"] = str(work / "base")
    (work / "mergekit.yml").write_text(yaml.safe_dump(config))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [chosen.mergekit, str(work / "mergekit.yml"), str(work / "peer")]
    command += ["--out-shard-size", chosen.shard_size] if chosen.shard_size else []
    spent, _, peak, _ = measured(command, **offline)
    shutil.rmtree(work / "peer")
    return spent, peak


if __name__ == "__main__":
    main()
