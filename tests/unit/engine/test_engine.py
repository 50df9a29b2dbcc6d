"""The engine: what is written equals the definition, whatever the threads, shards and interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modelweld
from modelweld.checkpoints import loading
from modelweld.config import Recipe, load_recipe
from modelweld.config.recipe import RECIPE_ADAPTER
from modelweld.engine import build, open_inputs
from modelweld.engine.plan.records import Packing
from modelweld.engine.plan.roles import packing_of
from modelweld.engine.run.packing import pack, unpack
from modelweld.errors import CheckpointError, ConfigError, DiskFull, ExternalError, InputError, MergeError
from modelweld.lineage import manifest
from modelweld.methods import drm, ties
from modelweld.methods.method import TensorContext
from modelweld.methods.registry import methods
from modelweld.stages.merge import merge
from modelweld.stages.plan import plan
from tests.support.families import (
    CONFIG,
    LLAMA_SHAPES,
    deltas,
    family,
    recipe,
    tree_bytes,
    weights_of,
    write_family,
)
from tests.support.progress import Stop, Stopper


def test_linear_methods_equal_their_formulae(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    share = [0.5, 1.5, -0.25]
    merge(recipe(root, "average"), tmp_path / "average")
    merge(recipe(root, "linear", weights=share), tmp_path / "linear")
    merge(recipe(root, "task_arithmetic", weights=share, scale=0.5), tmp_path / "ta")
    c = torch.tensor(share, dtype=torch.float64)
    for name in LLAMA_SHAPES:
        base, stack = deltas(root, name)
        spread = c.view(-1, *(1,) * base.ndim)
        expected = {
            "average": base + stack.mean(0),
            "linear": ((base + stack) * spread).sum(0) / c.sum(),
            "ta": base + 0.5 * (stack * spread).sum(0),
        }
        for out, tensor in expected.items():
            assert torch.allclose(weights_of(tmp_path / out)[name].double(), tensor, rtol=1e-5, atol=1e-6), (out, name)


def test_whole_tensor_methods_are_applied_by_tensor(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "ties", density=0.3), tmp_path / "ties")
    merge(recipe(root, "drm", drop_rate=0.5, weights=[1.0, 2.0, 0.5]), tmp_path / "drm")
    for name in LLAMA_SHAPES:
        base, stack = deltas(root, name)
        expected = base + ties.merge(stack.float(), density=0.3).double()
        assert torch.allclose(weights_of(tmp_path / "ties")[name].double(), expected, atol=1e-6)
        linear = len(base.shape) == 2 and "embed" not in name and "lm_head" not in name
        share = [1.0, 2.0, 0.5]
        theirs = (
            drm.merge(stack, drop_rate=0.5, weights=share) if linear else ties.merge(stack, density=1.0, weights=share)
        )
        assert torch.allclose(weights_of(tmp_path / "drm")[name].double(), base + theirs, atol=1e-5), name


# mudsc aligns real architectures first: tests/pipeline/test_align_merge.py.
@pytest.mark.parametrize("name", sorted(methods().keys() - {"mudsc"}))
def test_every_method_runs_and_equals_itself_on_the_stack(tmp_path: Path, name: str) -> None:
    chosen = methods()[name]
    experts = min(3, chosen.models[1] or 3)
    root = write_family(tmp_path, experts=experts)
    merge(recipe(root, name, experts=experts), tmp_path / "out")
    document = manifest.read(tmp_path / "out").data()
    tensor = "model.layers.0.mlp.down_proj.weight"
    base, stack = deltas(root, tensor, experts)
    digests = tuple(document["parents"]["experts"][f"e{i}"]["tensors"][tensor] for i in range(experts))
    context = TensorContext(tensor, digests, digests)
    operand = stack if chosen.needs_base else stack + base
    expected = chosen.merge(operand.float(), chosen.parameters(), [1.0] * experts, context=context).double()
    result = weights_of(tmp_path / "out")[tensor].double() - (base if chosen.needs_base else 0)
    assert float((result - expected).norm() / expected.norm()) < 1e-4
    assert {entry["method"] for entry in document["tensors"].values()} == (
        {name, "ties"} if chosen.whole_matrix else {name}
    )


def test_the_bytes_do_not_depend_on_the_threads(tmp_path: Path) -> None:
    shapes = LLAMA_SHAPES | {"model.layers.2.mlp.down_proj.weight": (700, 900)}
    root = write_family(tmp_path, shapes)
    for method in ("dare", "ties", "drm"):
        merge(recipe(root, method), tmp_path / f"{method}-1", threads=1)
        merge(recipe(root, method), tmp_path / f"{method}-4", threads=4)
        assert tree_bytes(tmp_path / f"{method}-1") == tree_bytes(tmp_path / f"{method}-4")


def test_a_chunked_tensor_equals_the_whole_one(tmp_path: Path) -> None:
    root = write_family(tmp_path, {"model.layers.0.mlp.down_proj.weight": (1000, 1111)})
    merge(recipe(root, "task_arithmetic"), tmp_path / "out")
    base, stack = deltas(root, "model.layers.0.mlp.down_proj.weight")
    merged = weights_of(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(merged.double(), base + stack.sum(0), atol=1e-5)


def test_shards_do_not_change_the_model(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.down_proj.weight": (400, 400) for i in range(6)}
    root = write_family(tmp_path, shapes)
    one = merge(recipe(root, "average"), tmp_path / "one")
    many = merge(recipe(root, "average", output={"shard_bytes": 1_000_000}), tmp_path / "many")
    assert one.model_digest == many.model_digest
    assert one.manifest_digest != many.manifest_digest
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 6
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes.keys()
    assert all(torch.equal(t, weights_of(tmp_path / "one")[n]) for n, t in weights_of(tmp_path / "many").items())


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from modelweld.config import load_recipe
    from modelweld.stages.merge import merge

    class Killer:
        left = int(sys.argv[3])
        def begin(self, size_bytes, tensors): pass
        def advance(self, size_bytes): pass
        def finished(self, tensor):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    merge(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), threads=2, progress=Killer())
"""


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_killed_merge_goes_on_to_the_same_bytes(tmp_path: Path, after: int) -> None:
    root = write_family(tmp_path)
    written = root / "recipe.yaml"
    models = {f"e{i}": {"path": f"e{i}"} for i in range(3)}
    written.write_text(json.dumps({"method": "drm", "base": "base", "models": models}))
    merge(load_recipe(written), tmp_path / "undisturbed")
    script = textwrap.dedent(KILLED)
    run = subprocess.run([sys.executable, "-c", script, str(written), str(tmp_path / "out"), str(after)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    report = merge(load_recipe(written), tmp_path / "out")
    assert report.resumed >= after + 1
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "undisturbed")
    assert not (tmp_path / ".modelweld-staging").exists()


def test_a_journalled_tensor_with_other_bytes_is_done_again(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "average"), tmp_path / "undisturbed")

    with pytest.raises(Stop):
        merge(recipe(root, "average"), tmp_path / "out", threads=1, progress=Stopper("model.norm.weight"))
    (journal,) = (tmp_path / ".modelweld-staging").glob("*/journal")
    lines = journal.read_bytes()
    recorded = [json.loads(line)["tensor"] for line in lines.splitlines()]
    journal.write_bytes(lines + b'{"torn": ')
    weights = journal.parent / "tree" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    with modelweld.checkpoints.Checkpoint.open(weights) as staged:
        data[staged.tensors[recorded[0]].offset] ^= 1
    weights.write_bytes(bytes(data))
    report = merge(recipe(root, "average"), tmp_path / "out")
    assert report.resumed == len(recorded) - 1
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "undisturbed")


def test_changed_inputs_are_not_resumed_from(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    (tmp_path / ".modelweld-staging" / ("out-" + "0" * 16)).mkdir(parents=True)
    (tmp_path / ".modelweld-staging" / ("out-" + "0" * 16) / "lock").touch()
    with open_inputs(recipe(root, "average")) as inputs:
        before = build(recipe(root, "average"), inputs).key
    changed = weights_of(root / "e0")
    changed["model.norm.weight"] += 1
    save_file(changed, root / "e0" / "model.safetensors", metadata={"format": "pt"})
    os.utime(root / "e0" / "model.safetensors", ns=(1, 1))
    with open_inputs(recipe(root, "average")) as inputs:
        assert build(recipe(root, "average"), inputs).key != before
    merge(recipe(root, "average"), tmp_path / "out")
    assert not (tmp_path / ".modelweld-staging").exists()


def test_an_output_with_foreign_files_is_refused_an_own_one_replaced(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "average"), tmp_path / "out")
    merge(recipe(root, "ties"), tmp_path / "out")
    assert manifest.read(tmp_path / "out").data()["recipe"]["method"] == "ties"
    (tmp_path / "out" / "model-00002-of-00002.safetensors").write_bytes(b"stale")
    with pytest.raises(ConfigError, match=r"no merge wrote, first model-00002-of-00002"):
        merge(recipe(root, "average"), tmp_path / "out")
    assert manifest.read(tmp_path / "out").data()["recipe"]["method"] == "ties"
    (tmp_path / "plain").mkdir()
    merge(recipe(root, "average"), tmp_path / "plain")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        merge(recipe(root, "average"), tmp_path / "file")


def test_two_processes_do_not_do_one_merge(tmp_path: Path) -> None:
    from modelweld.engine import staged

    with staged(tmp_path / "out", "a" * 64), pytest.raises(ExternalError, match="another process"):  # noqa: SIM117
        with staged(tmp_path / "out", "a" * 64):
            pytest.fail("the lock was given twice")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_staging_and_leaves_no_output(tmp_path: Path) -> None:
    root, small = write_family(tmp_path, {"model.layers.0.mlp.down_proj.weight": (1000, 1000)}), tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let the tests mount a file system")
    try:
        with pytest.raises(DiskFull, match="no space left") as caught:
            merge(recipe(root, "average"), small / "out")
        assert caught.value.exit_code == 3
        assert not (small / "out").exists()
        assert list(small.glob(".modelweld-staging/*/tree"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        merge(recipe(root, "average"), small / "out")
        assert manifest.verify(small / "out") == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "where"),
    [("average", "e1"), ("task_arithmetic", "base"), ("ties", "base"), ("ties", "e1"), ("drm", "base"), ("drm", "e1")],
)
def test_values_that_are_not_finite_are_refused_by_model_and_tensor(
    tmp_path: Path, method: str, value: float, where: str
) -> None:
    root = write_family(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    broken = weights_of(root / where)
    broken[name][3, 5] = value
    save_file(broken, root / where / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{where} holds (NaN|infinite values) in tensor '{re.escape(name)}'"):
        merge(recipe(root, method), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals_before_a_weight_is_read(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    cases: list[tuple[Recipe, type[InputError], str]] = [
        (recipe(root, "linear", weights=[1.0, -1.0, 0.0]), MergeError, "sum to zero"),
        (recipe(root, "average", weights=[1.0, 2.0, 1.0]), MergeError, "takes no weights"),
        (recipe(root, "ties", base=None), ConfigError, "needs the model"),
        (
            recipe(root, "ties", rules=[{"match": {"name": "*norm*"}, "use": {"method": "drm"}}]),
            ConfigError,
            "takes matrices, not shape",
        ),
        (recipe(root, "ties", rules=[{"match": {}, "use": "skip"}]), ConfigError, "nothing is left"),
    ]
    for asked, kind, words in cases:
        with pytest.raises(kind, match=words):
            merge(asked, tmp_path / "out")
    with pytest.raises(MergeError, match="no cuda:7"):
        merge(recipe(root, "average"), tmp_path / "out", device="cuda:7")
    with pytest.raises(MergeError, match="no device is called"):
        merge(recipe(root, "average"), tmp_path / "out", device="tpu9000")
    with pytest.raises(MergeError, match="the limit is"):
        merge(recipe(root, "drm"), tmp_path / "out", memory_limit=1000)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []


def test_rules_decide_in_order(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    rules = [
        {"match": {"name": "*.q_proj.weight", "layers": [1, 9]}, "use": "base"},
        {"match": {"name": "*.q_proj.weight"}, "use": {"method": "average"}},
        {"match": {"name": "lm_head*"}, "use": "skip"},
    ]
    merge(recipe(root, "task_arithmetic", rules=rules), tmp_path / "out")
    merged, base = weights_of(tmp_path / "out"), weights_of(root / "base")
    assert torch.equal(merged["model.layers.1.self_attn.q_proj.weight"], base["model.layers.1.self_attn.q_proj.weight"])
    origin, stack = deltas(root, "model.layers.0.self_attn.q_proj.weight")
    assert torch.allclose(merged["model.layers.0.self_attn.q_proj.weight"].double(), origin + stack.mean(0), atol=1e-6)
    assert "lm_head.weight" not in merged
    document = manifest.read(tmp_path / "out").data()
    assert document["left_out"] == {"lm_head.weight": "skipped by a rule"}
    assert document["tensors"]["model.layers.1.self_attn.q_proj.weight"]["reason"] == "rule 1"


def test_integers_and_buffers_come_from_the_base(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    for number, where in enumerate(["base", "e0", "e1", "e2"]):
        extra = {"ids": torch.arange(4) + number, "bn.running_mean": torch.full((4,), float(number))}
        save_file(weights_of(root / where) | extra, root / where / "model.safetensors")
    merge(recipe(root, "task_arithmetic"), tmp_path / "out")
    merged = weights_of(tmp_path / "out")
    assert torch.equal(merged["ids"], torch.arange(4))
    assert torch.equal(merged["bn.running_mean"], torch.zeros(4))
    assert manifest.read(tmp_path / "out").data()["tensors"]["ids"]["action"] == "copy"
    use = [{"match": {"name": "ids"}, "use": {"method": "average"}}]
    with pytest.raises(ConfigError, match=r"int64 cannot be merged"):
        merge(recipe(root, "task_arithmetic", rules=use), tmp_path / "other")


def test_rounding_is_reported_and_norms_are_kept_where_halves_would_lose_them(tmp_path: Path) -> None:
    root = write_family(tmp_path, dtype=torch.bfloat16)
    report = merge(recipe(root, "task_arithmetic", weights=[0.3, 0.3, 0.3]), tmp_path / "auto")
    merged, tensors = weights_of(tmp_path / "auto"), manifest.read(tmp_path / "auto").data()["tensors"]
    assert merged["model.norm.weight"].dtype == torch.float32
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"]["delta_survival"] == 1.0
    base, stack = deltas(root, "lm_head.weight")
    delta = 0.3 * stack.sum(0)
    lost = ((base + delta).to(torch.bfloat16).double() - (base + delta)).norm() / delta.norm()
    assert tensors["lm_head.weight"]["delta_survival"] == pytest.approx(1 - float(lost), abs=1e-3)
    assert report.delta_survival is not None
    assert 0.5 < report.delta_survival["whole_model"] < 1
    wide = merge(recipe(root, "task_arithmetic", output={"dtype": "float32"}), tmp_path / "wide")
    assert wide.delta_survival == {"whole_model": 1.0, "worst_tensor": 1.0}
    assert {tensor.dtype for tensor in weights_of(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(MergeError, match="overflows float16"):
        merge(recipe(root, "task_arithmetic", scale=1e6, output={"dtype": "float16"}), tmp_path / "small")


def test_tied_weights_are_merged_once_and_stay_tied(tmp_path: Path) -> None:
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate(["base", "e0", "e1"]):
        torch.manual_seed(seed)
        t.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    # An older writer stored the tied output beside its input.
    stored = weights_of(tmp_path / "e1")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "e1" / "model.safetensors", metadata={"format": "pt"})
    merge(recipe(tmp_path, "ties", experts=2), tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    assert manifest.read(tmp_path / "out").data()["left_out"] == {
        "e1:lm_head.weight": "tied to model.embed_tokens.weight"
    }
    model = modelweld.load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    stored["lm_head.weight"] += 1
    save_file(stored, tmp_path / "e1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"e1 has tensor 'lm_head.weight', which is not present in the base"):
        merge(recipe(tmp_path, "ties", experts=2), tmp_path / "again")


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_conv1d_is_merged_by_meaning_and_packed_projections_part_by_part(tmp_path: Path, direction: str) -> None:
    import transformers as t

    config = t.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    for seed, name in enumerate(["base", "e0", "e1", "e2"]):
        torch.manual_seed(seed)
        t.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    merge(recipe(tmp_path, "drm", direction=direction), tmp_path / "out")
    merged = weights_of(tmp_path / "out")
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_proj.weight"):
        base, stack = deltas(tmp_path, name)
        expected = base + drm.merge(stack.mT.contiguous(), direction=direction).mT
        assert torch.allclose(merged[name].double(), expected, atol=1e-6)
    base, stack = deltas(tmp_path, "transformer.h.0.attn.c_attn.weight")
    parts = [drm.merge(part.mT.contiguous(), direction=direction).mT for part in stack.split(16, dim=2)]
    assert torch.allclose(merged["transformer.h.0.attn.c_attn.weight"].double(), base + torch.cat(parts, 1), atol=1e-6)
    recorded = manifest.read(tmp_path / "out").data()["tensors"]["transformer.h.0.attn.c_attn.weight"]
    assert recorded["stored_transposed"]
    assert recorded["packed"] == {"groups": 1, "sizes": [16, 16, 16]}


@pytest.mark.parametrize("packing", [Packing(1, (4, 2, 2)), Packing(2, (2, 1, 1)), Packing(4, (1, 1))])
def test_unpacking_and_packing_are_inverse(packing: Packing) -> None:
    stack = torch.randn(3, 8, 5)
    parts = unpack(stack, packing)
    assert torch.equal(pack([part[1] for part in parts], packing), stack[1])
    assert sum(part.shape[1] for part in parts) == 8


def test_packings_are_known_by_config() -> None:
    phi = {"model_type": "phi3", "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    assert packing_of("model.layers.0.self_attn.qkv_proj.weight", 96, phi) == Packing(1, (64, 16, 16))
    assert packing_of("model.layers.0.mlp.gate_up_proj.weight", 256, phi) == Packing(1, (128, 128))
    neox = {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_size": 64}
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert packing_of(name, 192, neox) == Packing(4, (16, 16, 16))
    falcon = {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 64, "multi_query": True}
    assert packing_of(name, 96, falcon) == Packing(1, (64, 16, 16))
    assert packing_of("encoder.layer.0.attention.self.query.weight", 64, neox) is None
    assert packing_of("blocks.0.attn.in_proj_weight", 192, {}) == Packing(1, (64, 64, 64))


@pytest.mark.parametrize(
    "kind", ["bert", "bert-mlm", "roberta", "distilbert", "deberta-v2", "vit", "t5", "llama", "gpt2"]
)
def test_a_head_comes_back_with_its_expert(tmp_path: Path, kind: str) -> None:
    base, expert, _, _ = family(kind)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "e0")
    merge(recipe(tmp_path, "average", experts=1), tmp_path / "out")
    assert loading.tasks(tmp_path / "out") == ["e0"]
    loading.export(tmp_path / "out", "e0", tmp_path / "plain")
    mine = modelweld.load(tmp_path / "out", task="e0").state_dict()
    theirs = type(expert).from_pretrained(tmp_path / "plain").state_dict()
    for name, tensor in expert.state_dict().items():
        assert torch.equal(mine[name], tensor), name
        assert torch.equal(theirs[name], tensor), name
    backbone = modelweld.load(tmp_path / "out")
    assert type(backbone) is type(base)
    with pytest.raises(ConfigError, match="no head for task 'other'; it has heads for e0"):
        modelweld.load(tmp_path / "out", task="other")
    with pytest.raises(ConfigError, match="not empty"):
        loading.export(tmp_path / "out", "e0", tmp_path / "plain")


def test_without_a_base_the_experts_must_agree_on_the_config(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    merge(recipe(root, "average", base=None), tmp_path / "out")
    merge(recipe(root, "average"), tmp_path / "based")
    assert {n: t.tolist() for n, t in weights_of(tmp_path / "out").items()} == {
        n: t.tolist() for n, t in weights_of(tmp_path / "based").items()
    }
    (root / "e2" / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5.0}))
    with pytest.raises(ConfigError, match="different configs \\(rope_theta\\)"):
        merge(recipe(root, "average", base=None), tmp_path / "more")


def test_without_a_base_nothing_is_taken_from_whoever_is_first(tmp_path: Path) -> None:
    root = write_family(tmp_path, experts=2)
    for number in range(2):
        directory = root / f"e{number}"
        save_file(weights_of(directory) | {"ids": torch.arange(4)}, directory / "model.safetensors")
    merge(recipe(root, "average", experts=2, base=None), tmp_path / "out")
    assert torch.equal(weights_of(tmp_path / "out")["ids"], torch.arange(4))
    use = [{"match": {"name": "ids"}, "use": "base"}]
    with pytest.raises(ConfigError, match="the recipe names none"):
        merge(recipe(root, "average", experts=2, base=None, rules=use), tmp_path / "other")
    save_file(weights_of(root / "e1") | {"ids": torch.ones(4, dtype=torch.int64)}, root / "e1" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"ids .* differs between e0, e1"):
        merge(recipe(root, "average", experts=2, base=None), tmp_path / "other")
    for number in range(2):
        (root / f"e{number}" / "tokenizer.json").write_text(json.dumps({"model": number}))
    with pytest.raises(ConfigError, match="different tokenizers"):
        merge(recipe(root, "average", experts=2, base=None), tmp_path / "other")


def test_an_interrupt_keeps_what_was_done(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.down_proj.weight": (500, 500) for i in range(60)}
    root = write_family(tmp_path, shapes)
    models = {f"e{i}": {"path": f"e{i}"} for i in range(3)}
    (root / "recipe.yaml").write_text(json.dumps({"method": "drm", "base": "base", "models": models}))
    command = [sys.executable, "-m", "modelweld", "merge", "recipe.yaml", "out"]
    child = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size for f in root.glob(".modelweld-staging/*/journal")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, words = child.communicate(timeout=60)
    assert child.returncode == 130, words
    assert "goes on from there" in words
    assert not (root / "out").exists()
    assert merge(load_recipe(root / "recipe.yaml"), root / "out").resumed > 0


def test_two_heads_for_one_task_are_refused(tmp_path: Path) -> None:
    base, expert, _, _ = family("bert")
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "e0")
    expert.save_pretrained(tmp_path / "e1")
    models = {name: {"path": str(tmp_path / name), "task": "same"} for name in ("e0", "e1")}
    asked = RECIPE_ADAPTER.validate_python({"method": "average", "base": str(tmp_path / "base"), "models": models})
    with pytest.raises(ConfigError, match="both bring a head for task 'same'"):
        merge(asked, tmp_path / "out")


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    save_file(
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights_of(root / "e0").items()},
        root / "e0" / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"e0 is quantised .*float8_e4m3fn"):
        merge(recipe(root, "average"), tmp_path / "out")


def test_a_plan_says_what_a_merge_then_does(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    estimate = plan(recipe(root, "drm"), tmp_path / "out", threads=2)
    document = estimate.data()
    merge(recipe(root, "drm"), tmp_path / "out")
    written = manifest.read(tmp_path / "out").data()["tensors"]
    assert {t["name"]: (t["method"], t["dtype"], t["reason"]) for t in document["tensors"]} == {
        name: (entry["method"], entry["dtype"], entry["reason"]) for name, entry in written.items()
    }
    assert document["shards"] == {"model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size}
    assert document["fits"]
    assert document["needs"]["seconds"] > 0
    estimate.require_fit()


def test_a_plan_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    import dataclasses

    root = write_family(tmp_path)
    estimate = plan(recipe(root, "average"), tmp_path / "out")
    with pytest.raises(DiskFull, match="are free"):
        dataclasses.replace(estimate, disk_free=1).require_fit()
    with pytest.raises(MergeError, match="of memory"):
        dataclasses.replace(estimate, memory_available=1).require_fit()


def test_the_command_reports_and_refuses_with_the_designed_codes(tmp_path: Path) -> None:
    root = write_family(tmp_path)
    models = {f"e{i}": {"path": f"e{i}"} for i in range(3)}
    (root / "recipe.yaml").write_text(json.dumps({"method": "ties", "base": "base", "models": models}))

    def weld(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "modelweld", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)

    done = weld("merge", "recipe.yaml", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_digest"] == manifest.read(root / "out").data()["output"]["model_digest"]
    planned = weld("plan", "recipe.yaml", "--json")
    assert planned.returncode == 0, planned.stderr
    assert len(json.loads(planned.stdout)["tensors"]) == len(LLAMA_SHAPES)
    (root / "out" / "notes.txt").write_text("mine")
    refused = weld("merge", "recipe.yaml", "out")
    assert refused.returncode == 2
    assert "notes.txt" in refused.stderr


def test_two_models_under_one_name_are_refused(tmp_path: Path) -> None:
    text = "method: average\nmodels:\n  a: {path: x}\n  a: {path: y}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="the key 'a' stands twice"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("density", [1.0, 0.2, 0.001])
@pytest.mark.parametrize("spread", ["even", "by row", "coarse"])
def test_streamed_ties_equals_ties_of_the_whole_tensor(tmp_path: Path, density: float, spread: str) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    root = write_family(tmp_path, {name: (500, 700)})
    for number in range(3):
        weights = weights_of(root / f"e{number}")
        base = weights_of(root / "base")[name]
        delta = weights[name] - base
        if spread == "by row":
            # Sampled blocks see few of the rows, so the first bracket misses.
            delta *= torch.logspace(-6, 0, 500)[torch.randperm(500, generator=torch.Generator().manual_seed(number))][
                :, None
            ]
        if spread == "coarse":
            # Many entries tie at the threshold, and the models cancel exactly in many places.
            delta = (delta * 20).round() / 16
        weights[name] = (base if spread != "coarse" else base.round()) + delta
        save_file(weights, root / f"e{number}" / "model.safetensors", metadata={"format": "pt"})
    if spread == "coarse":
        save_file({name: weights_of(root / "base")[name].round()}, root / "base" / "model.safetensors")
    share = [1.0, 0.5, 2.0]
    merge(recipe(root, "ties", density=density, weights=share, scale=0.5), tmp_path / "out")
    base = weights_of(root / "base")[name]
    stack = torch.stack([weights_of(root / f"e{i}")[name] - base for i in range(3)])
    expected = base + 0.5 * ties.merge(stack, density=density, weights=share)
    assert torch.equal(weights_of(tmp_path / "out")[name], expected)
