"""Models of which only headers were brought: they are planned as the whole ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from modelweld.checkpoints import Checkpoint
from modelweld.engine import build, open_inputs
from modelweld.sources.local import LocalPath
from modelweld.sources.remote_headers import read_remote_headers
from tests.support.families import recipe
from tests.support.lora import llama, write_adapter

pytest.importorskip("peft")


def peeked(root: Path, folder: Path, names: tuple[str, ...]) -> int:
    total = 0
    for name in names:
        upstream = LocalPath(str(root / name), root, name)
        total += read_remote_headers(upstream, upstream.resolve().files, folder / name)
    return total


def documents(root: Path, **asked: Any) -> list[dict[str, Any]]:
    wanted = recipe(root, "drm", experts=2, others={"method": "average"}, **asked)
    with open_inputs(wanted) as inputs:
        return [tensor.data() for tensor in build(wanted, inputs).tensors]


@pytest.mark.parametrize("output", [{}, {"adapter": "keep"}])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_planned_from_their_headers(tmp_path: Path, output: dict[str, str], tied: bool) -> None:
    root = llama(tmp_path / "whole", tie_word_embeddings=tied)
    # PEFT stores a copy of an embedding that it adapts, whose values are not there to be compared.
    asked = {} if tied else {"target_modules": ["q_proj", "embed_tokens"]}
    for number in range(2):
        write_adapter(root / "base", root / f"e{number}", number + 1, **asked)
    stored = load_file(root / "e0" / "adapter_model.safetensors")
    assert tied or any(name.endswith("embed_tokens.base_layer.weight") for name in stored), sorted(stored)
    read = peeked(root, tmp_path / "seen", ("base", "e0", "e1"))
    assert read < sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    assert documents(tmp_path / "seen", output=output) == documents(root, output=output)
    with Checkpoint.open(tmp_path / "seen" / "base") as seen, Checkpoint.open(root / "base") as whole:
        assert seen.headers_only
        assert not whole.headers_only
