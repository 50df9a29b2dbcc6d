"""Hostile input to the commands that people run: refused with its code, by name, without an output."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from modelweld.cli import main
from modelweld.lineage import manifest
from tests.conftest import Family
from tests.support.adapters import write_classifier_adapter

QUERY = "layers.0.attn.q_proj.weight"
SHAPES = {
    "embed_tokens.weight": (48, 16),
    QUERY: (16, 16),
    "layers.0.mlp.down_proj.weight": (16, 40),
    "layers.0.input_layernorm.weight": (16,),
}
CONFIG = {"architectures": ["LlamaModel"], "model_type": "llama", "vocab_size": 48, "hidden_size": 16}


class Scene:
    """A base, two whole experts and two adapters of it, and a recipe over some of them."""

    def __init__(self, root: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        self.root = root
        generator = torch.Generator().manual_seed(3)
        base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for model in ("base", "e0", "e1"):
            noise = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            self.write(model, {name: base[name] + (noise[name] if model != "base" else 0.0) for name in shapes})
        for adapter in ("a0", "a1"):
            factors = {}
            for name in [name for name in shapes if name.endswith("proj.weight")]:
                rows, columns = shapes[name]
                module = f"base_model.model.{name.removesuffix('.weight')}"
                factors[f"{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
                factors[f"{module}.lora_B.weight"] = 0.05 * torch.randn(rows, 2, generator=generator)
            (root / adapter).mkdir()
            save_file(factors, root / adapter / "adapter_model.safetensors")
            document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
            (root / adapter / "adapter_config.json").write_text(json.dumps(document))
        self.recipe()

    def write(self, model: str, tensors: dict[str, torch.Tensor]) -> None:
        (self.root / model).mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, self.weights(model), metadata={"format": "pt"})
        (self.root / model / "config.json").write_text(json.dumps(CONFIG))

    def weights(self, model: str) -> Path:
        name = "adapter_model.safetensors" if model.startswith("a") else "model.safetensors"
        return self.root / model / name

    def edit(self, model: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.weights(model))
        change(tensors)
        save_file(tensors, self.weights(model), metadata={"format": "pt"})

    def recipe(self, names: tuple[str, ...] = ("e0", "e1"), **changes: Any) -> None:
        entries = {model: {"path": str(self.root / model)} for model in names}
        document = {"method": "drm", "base": str(self.root / "base"), "models": entries} | changes
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(document))

    def header(self, model: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Rewrite a weight file's header and leave its data as it is."""
        raw = self.weights(model).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        new = json.dumps(entries).encode()
        self.weights(model).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    (tmp_path / "scene").mkdir()
    return Scene(tmp_path / "scene")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--json"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(leaving.value.code or 0), json.loads(captured.out)


def spoilt(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(value)


def lora(side: str, module: str = "layers.0.attn.q_proj") -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def overlap(entries: dict[str, Any]) -> None:
    first, second = sorted(name for name in entries if name != "__metadata__")[:2]
    entries[first]["data_offsets"] = [n + 4 for n in entries[second]["data_offsets"]]
    entries[first] |= {"shape": entries[second]["shape"]}


def beyond(entries: dict[str, Any]) -> None:
    last = max((entry for name, entry in entries.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    begin, end = last["data_offsets"]
    last |= {"data_offsets": [begin, 2 * end - begin], "shape": [2 * last["shape"][0], *last["shape"][1:]]}


def lying(entries: dict[str, Any]) -> None:
    next(entry for name, entry in entries.items() if name != "__metadata__")["shape"] = [7, 3]


def linked_out(scene: Scene, file: Path) -> None:
    target = scene.root.parent / f"secret-{file.name}"
    file.rename(target)
    file.symlink_to(target)


def linked_tokenizer(scene: Scene) -> None:
    (scene.root.parent / "secret").write_text("{}")
    (scene.root / "base" / "tokenizer.json").symlink_to(scene.root.parent / "secret")


def absurd(scene: Scene, model: str) -> None:
    file = scene.weights(model)
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.attn.z_proj.weight"] = tensors.pop(QUERY)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors[QUERY] = torch.zeros(16, 20)


def resized(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed_tokens.weight"] = torch.zeros(50, 16)


def with_factors(scene: Scene) -> None:
    scene.recipe(("a0", "a1"))


def mixed(scene: Scene) -> None:
    scene.recipe(("a0", "e1"), method="ties")


# How the scene is spoilt, and what the refusal must name.
ATTACKS: dict[str, tuple[Callable[[Scene], object], tuple[str, ...]]] = {
    "nan in the base": (lambda s: s.edit("base", spoilt(QUERY, torch.nan)), ("base", QUERY)),
    "inf in an expert": (lambda s: s.edit("e1", spoilt(QUERY, torch.inf)), ("e1", QUERY)),
    "nan in a norm": (
        lambda s: s.edit("e0", spoilt("layers.0.input_layernorm.weight", torch.nan)),
        ("e0", "layers.0.input_layernorm.weight"),
    ),
    "nan in a factor": (lambda s: (with_factors(s), s.edit("a1", spoilt(lora("A"), torch.nan))), ("a1", QUERY)),
    "inf in a factor made dense": (lambda s: (mixed(s), s.edit("a0", spoilt(lora("B"), torch.inf))), ("a0", QUERY)),
    "nan in what no adapter changes": (
        lambda s: (with_factors(s), s.edit("base", spoilt("embed_tokens.weight", torch.nan))),
        ("base", "embed_tokens.weight"),
    ),
    "another shape": (lambda s: s.edit("e1", reshaped), ("e1", QUERY, "[16, 20]", "[16, 16]")),
    "another vocabulary": (lambda s: s.edit("e1", resized), ("e1", "vocabulary of 50", "48")),
    "another name": (lambda s: s.edit("e1", renamed), ("e1", QUERY)),
    "a factor of another shape": (
        lambda s: (with_factors(s), s.edit("a1", lambda t: t.update({lora("B"): torch.zeros(18, 2)}))),
        ("a1", "layers.0.attn.q_proj", "[18, 16]", "[16, 16]"),
    ),
    "factors that do not meet": (
        lambda s: (with_factors(s), s.edit("a1", lambda t: t.update({lora("B"): torch.zeros(16, 3)}))),
        ("a1", "layers.0.attn.q_proj", "[16, 3]"),
    ),
    "a factor of no weight": (
        lambda s: (with_factors(s), s.edit("a1", lambda t: t.update({lora("B", "x"): t.pop(lora("B"))}))),
        ("a1",),
    ),
    "overlapping tensors": (lambda s: s.header("e0", overlap), ("e0",)),
    "overlapping factors": (lambda s: (with_factors(s), s.header("a0", overlap)), ("a0",)),
    "offsets behind the end": (lambda s: s.header("e0", beyond), ("e0",)),
    "offsets of factors behind the end": (lambda s: (with_factors(s), s.header("a0", beyond)), ("a0",)),
    "offsets against the shape": (lambda s: s.header("base", lying), ("base",)),
    "an absurd header": (lambda s: absurd(s, "e1"), ("e1", "more than the format allows")),
    "an absurd header of an adapter": (lambda s: (with_factors(s), absurd(s, "a1")), ("a1", "than the format allows")),
    "weights behind a link": (lambda s: linked_out(s, s.weights("e0")), ("e0", "link out of its directory")),
    "factors behind a link": (
        lambda s: (with_factors(s), linked_out(s, s.weights("a0"))),
        ("a0", "link out of its directory"),
    ),
    "a tokenizer behind a link": (linked_tokenizer, ("base", "tokenizer.json", "link out of its directory")),
    "a config behind a link": (lambda s: linked_out(s, s.root / "base" / "config.json"), ("base", "config.json")),
    "weights that sum to zero": (
        lambda s: s.recipe(
            method="linear",
            models={m: {"path": str(s.root / m), "weight": w} for m, w in (("e0", 1.0), ("e1", -1.0))},
        ),
        ("sum to zero",),
    ),
    "weights of adapters that sum to zero": (
        lambda s: s.recipe(
            method="linear",
            models={m: {"path": str(s.root / m), "weight": w} for m, w in (("a0", 1.0), ("a1", -1.0))},
        ),
        ("sum to zero",),
    ),
    "an unknown key": (lambda s: s.recipe(drop_raet=0.5), ("drop_raet",)),
    "an unknown key of a model": (
        lambda s: s.recipe(models={"e0": {"path": str(s.root / "e0"), "wieght": 2}}),
        ("e0", "wieght"),
    ),
    "an unknown method": (lambda s: s.recipe(method="drn"), ("drn",)),
    "one name twice": (
        lambda s: (s.root / "recipe.yaml").write_text(
            f"method: ties\nbase: {s.root}/base\nmodels:\n"
            f"  e0: {{path: {s.root}/e0}}\n  e0: {{path: {s.root}/e1}}\n"
        ),
        ("e0", "twice"),
    ),
    "a model that is not there": (lambda s: s.recipe(("e0", "e7")), ("e7",)),
    "an adapter config that is no JSON": (
        lambda s: (with_factors(s), (s.root / "a0" / "adapter_config.json").write_text("{")),
        ("a0", "adapter_config.json"),
    ),
    "a rank that is no number": (
        lambda s: (with_factors(s), adapter(s, rank_pattern={"q_proj": "many"})),
        ("a0", "rank_pattern"),
    ),
    "a scaling that is not finite": (
        lambda s: (with_factors(s), (s.root / "a0" / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'
        )),
        ("a0", "lora_alpha"),
    ),
    "a rank of zero": (lambda s: (with_factors(s), adapter(s, r=0)), ("a0",)),
}  # fmt: skip


def adapter(scene: Scene, **changes: Any) -> None:
    file = scene.root / "a0" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_merge_of_hostile_input_is_refused(scene: Scene, attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, named = ATTACKS[attack]
    spoil(scene)
    before = {file for file in scene.root.iterdir() if file.name != ".modelweld-staging"}
    code, document = run(capsys, "merge", str(scene.root / "recipe.yaml"), str(scene.root / "out"))
    assert code == 2, document
    told = f"{document['what']} {document['where']}"
    for words in named:
        assert words in told, told
    assert {file for file in scene.root.iterdir() if file.name != ".modelweld-staging"} == before
    if not attack.startswith(("nan", "inf")):  # values come to light when they are read, all else in the plan
        code, document = run(capsys, "plan", str(scene.root / "recipe.yaml"), "--out", str(scene.root / "out"))
        assert code == 2, document


@pytest.mark.parametrize("models", [("e0", "e1"), ("a0", "a1"), ("a0", "e1")])
def test_the_scene_itself_is_sound(scene: Scene, models: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    scene.recipe(models)
    assert run(capsys, "merge", str(scene.root / "recipe.yaml"), str(scene.root / "out"))[0] == 0
    assert manifest.verify(scene.root / "out") == []


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_head_that_is_not_finite_is_refused(
    tiny_bert_family: Family, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expert, file = tmp_path / "expert", "model.safetensors"
    if kind == "adapter":
        write_classifier_adapter(tiny_bert_family, expert, "animal")
        file = "adapter_model.safetensors"
    else:
        shutil.copytree(tiny_bert_family.expert("animal"), expert)
    tensors = load_file(expert / file)
    stored = next(name for name in tensors if name.endswith("classifier.weight"))
    tensors[stored][0, 3] = torch.nan
    save_file(tensors, expert / file, metadata={"format": "pt"})
    document = {"method": "drm", "base": str(tiny_bert_family.base), "models": {"e": {"path": str(expert)}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    code, told = run(capsys, "merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))
    assert (code, told["what"]) == (2, "e holds NaN or infinite values in its head (classifier.weight)")
    assert str(expert / file) in told["where"]
    assert not (tmp_path / "out").exists()


LARGE = {f"layers.{n}.mlp.down_proj.weight": (256, 512) for n in range(8)}


def weld(scene: Scene, out: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = [sys.executable, "-m", "modelweld", "--json", "merge", str(scene.root / "recipe.yaml"), str(out)]
    return subprocess.run(
        [*words, "--threads", "1"], capture_output=True, text=True, preexec_fn=limited, timeout=120, check=False
    )


@pytest.mark.parametrize("models", [("e0", "e1"), ("a0", "a1")])
def test_a_file_that_may_not_grow_leaves_no_output(tmp_path: Path, models: tuple[str, ...]) -> None:
    scene = Scene(tmp_path, LARGE)
    scene.recipe(models)
    done = weld(scene, tmp_path / "out", limit=1 << 20)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert weld(scene, tmp_path / "out").returncode == 0
    assert manifest.verify(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("models", [("e0", "e1"), ("a0", "a1")])
def test_a_disk_that_fills_up_leaves_no_output_and_goes_on_later(tmp_path: Path, models: tuple[str, ...]) -> None:
    (tmp_path / "scene").mkdir()
    scene, small = Scene(tmp_path / "scene", LARGE), tmp_path / "small"
    scene.recipe(models, output={"shard_bytes": 1_000_000})
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let the tests mount a file system")
    try:
        done = weld(scene, small / "out")
        assert done.returncode == 3, done.stdout + done.stderr
        assert json.loads(done.stdout)["error"] == "DiskFull"
        assert [path.name for path in small.iterdir()] == [".modelweld-staging"]
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        again = weld(scene, small / "out")
        assert again.returncode == 0, again.stderr
        assert manifest.verify(small / "out") == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"merge": {"method": "ties", "dencity": 0.5}}, "dencity"),
        ({"validate": {"max_relative_dleta": 0.5}}, "max_relative_dleta"),
        ({"models": {"base": {"uri": "x", "licence": "mit", "alow_pickle": True}}}, "alow_pickle"),
        ({"evaluete": {}}, "evaluete"),
    ],
)
def test_a_params_file_with_unknown_keys_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"name": "x", "models": {"base": {"uri": "b"}}, "datasets": {}, "tasks": {}}
    sections |= {"validate": {}, "merge": {"method": "ties"}, "baselines": {}, "evaluate": {}} | change
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(sections))
    code, document = run(capsys, "plan", str(tmp_path / "params.yaml"))
    assert code == 2
    assert named in f"{document['what']} {document['where']}"
