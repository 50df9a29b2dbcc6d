"""Seconds to derive the symmetries of an architecture, its module imported: tiny instances, and some of real depth.

To run: OMP_NUM_THREADS=1 python benchmarks/derive.py [--rounds 3]   (in the repository: the instances are the tests')
No weights are needed: a model is exported on the meta device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from modelweld.symmetry import Spec, derive_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.architectures import ARCHITECTURES, build, resnet

# class, config, options: the depth and width of the published models
REAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("BertForSequenceClassification", "BertConfig", {}),
    "vit-b-16": ("ViTForImageClassification", "ViTConfig", {}),
    "gpt2-small": ("GPT2LMHeadModel", "GPT2Config", {}),
    "modernbert-base": ("ModernBertForSequenceClassification", "ModernBertConfig", {}),
    "t5-base": ("T5ForConditionalGeneration", "T5Config", {"num_layers": 12, "d_model": 768, "d_ff": 3072}),
    "llama-8b": ("LlamaForCausalLM", "LlamaConfig", {"num_hidden_layers": 32, "num_key_value_heads": 8}),
    "mixtral-8x7b": ("MixtralForCausalLM", "MixtralConfig", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cases: dict[str, Callable[[], Spec]] = {name: partial(derive_spec, build(name)[1]) for name in ARCHITECTURES}
    norms: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 4)}
    for name, norm in norms.items():
        cases[f"resnet with {name} norm"] = partial(derive_spec, resnet(norm), (torch.zeros(2, 3, 6, 6),))
    for name, (model, config, options) in REAL.items():
        cases[name] = partial(derive_spec, getattr(hf, config)(**options, architectures=[model]))
    for name, derive in cases.items():
        times, spec = [], derive()
        for _ in range(asked.rounds):
            started = time.perf_counter()
            spec = derive()
            times.append(time.perf_counter() - started)
        row = {"architecture": name, "seconds": round(statistics.median(times), 2), "groups": len(spec.groups)}
        print(json.dumps(row | {"unknown_operations": sum(spec.unknown.values())}), flush=True)


if __name__ == "__main__":
    main()
