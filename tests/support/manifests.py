"""A whole manifest of one small merge, for tests of what reads manifests."""

from __future__ import annotations

from typing import Any

from modelweld.formats.manifest import Manifest


def manifest_of(**changes: Any) -> Manifest:
    """The manifest of a merge of one expert into its base; `changes` replace whole sections, as plain JSON values."""
    document = {
        "schema": "modelweld.manifest/1",
        "recipe": {"method": "drm", "models": {"mails": {"weight": 0.5, "task": "mails"}}, "order": ["mails"]},
        "methods": {"drm": {"version": "1"}},
        "parents": {"base": {"source": None, "tensors": {}}, "experts": {"mails": expert()}},
        "tensors": {},
        "heads": {},
        "left_out": {},
        "side_files": {"from": "base", "files": [], "config_dtype": None},
        "notes": [],
        "environment": {
            "packages": {"modelweld": "0.1.0"},
            "device": "cpu",
            "arithmetic": "float32",
            "torch_threads": 1,
        },
        "delta_survival": None,
        "output": {"model_digest": "0123abcd", "files": {}},
    }
    return Manifest.from_data(document | changes, "here")


def expert(**changes: Any) -> dict[str, Any]:
    """An expert among the parents."""
    return {
        "source": None,
        "tensors": {"a": "d"},
        "weight": 0.5,
        "task": "mails",
        "prefix": "",
        "head": "mails",
    } | changes


def tensor(**changes: Any) -> dict[str, Any]:
    """A merged tensor without figures."""
    document = {"action": "merge", "role": "linear", "method": "drm", "reason": "by default", "shape": [2, 2]}
    document |= {"dtype": "float32", "source_dtype": "float32", "parameters": None, "digest": "d"}
    return document | {"delta_survival": None, "delta_norm": None} | changes
