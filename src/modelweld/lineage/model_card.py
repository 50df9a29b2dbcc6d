"""README.md of a merged directory: a Hugging Face model card, derived from the manifest and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from modelweld.config.addresses import hub_repository, scheme_of
from modelweld.formats.manifest import ExpertParent, Manifest, MergedTensor, Parent

_TEMPLATE = """\
---
{{ front_matter }}---

# {{ title }}

{{ experts | length }} finetuned models merged by **{{ method }}**{% if based %} into their base{% endif %} with \
modelweld {{ modelweld }}. Which bytes came from where stands in [manifest.json](manifest.json).

| parent | role | weight | task | source | revision | licence |
| --- | --- | --- | --- | --- | --- | --- |
{% for row in parents -%}
| {{ row | join(" | ") }} |
{% endfor %}
## How it was merged

{{ settings }}

{% for line in treatment -%}
- {{ line }}
{% endfor -%}
{% if survival %}- {{ survival }}
{% endif %}
## How to load it

```python
{% if tasks -%}
import modelweld

model = modelweld.load("{{ folder }}", task="{{ tasks[0] }}"{{ on_base }})  # one of: {{ tasks | join(", ") }}
{% elif on_base -%}
import modelweld

model = modelweld.load("{{ folder }}"{{ on_base }})  # or PEFT's PeftModel.from_pretrained(base, "{{ folder }}")
{% else -%}
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ folder }}")
{% endif -%}
```
{% if tasks %}
`modelweld export DIR --model {{ folder }} --task {{ tasks[0] }}{% if on_base %} --base BASE{% endif %}` writes a \
plain Hugging Face directory that needs no modelweld.
{% endif %}
Model digest (BLAKE3 over all tensors): `{{ digest }}`
"""


def render(manifest: Manifest, *, title: str = "Merged model", folder: str = "merged") -> str:
    """The card's text for a manifest; equal manifests have equal cards."""
    recipe = manifest.recipe
    parents = _parents(manifest)
    licences = sorted({row[6] for row in parents if row[6] != "unknown"})
    names = [_public_name(label, row) for label, row in _labelled(manifest)]
    kept = (recipe.output or {}).get("adapter") == "keep"
    front: dict[str, Any] = {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "peft" if kept else "transformers",
        "tags": ["merge", "modelweld", recipe.method],
    }
    if len(licences) == 1:
        front["license"] = licences[0]
    elif licences:
        front |= {"license": "other", "license_name": " and ".join(licences)}
    own = {
        key: value
        for key, value in recipe.data().items()
        if key not in ("method", "models", "order", "rules", "output", "others", "align")
    }
    survival = manifest.delta_survival
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)  # noqa: S701
    return environment.from_string(_TEMPLATE).render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=title,
        folder=folder,
        method=recipe.method,
        modelweld=manifest.environment.packages["modelweld"],
        experts=manifest.parents.experts,
        based=manifest.parents.base is not None,
        parents=parents,
        settings=", ".join(f"`{key}: {value}`" for key, value in sorted(own.items())),
        treatment=_treatment(manifest),
        survival=f"after rounding, {survival.whole_model:.1%} of the merged delta is left" if survival else "",
        tasks=sorted(manifest.heads),
        on_base=', base="path/to/base"' if kept else "",
        digest=manifest.output.model_digest,
    )


def _labelled(manifest: Manifest) -> list[tuple[str, Parent]]:
    parents = manifest.parents
    base: list[tuple[str, Parent]] = [("base", parents.base)] if parents.base is not None else []
    return base + [(label, parents.experts[label]) for label in manifest.recipe.order]


def _parents(manifest: Manifest) -> list[list[str]]:
    rows = []
    for label, entry in _labelled(manifest):
        expert = entry if isinstance(entry, ExpertParent) else None
        role = "expert" if expert else "base"
        weight = str(expert.weight) if expert else "–"
        # A local path says where one machine kept the model: not for a published card.
        uri = entry.source.uri if entry.source else ""
        shown = uri if scheme_of(uri) else "local"
        revision = (entry.source.revision if entry.source else None) or "–"
        licence = (entry.source.licence if entry.source else None) or "unknown"
        cells = [label, role, weight, (expert.head if expert else None) or "–", shown, revision, licence]
        rows.append([str(cell).replace("|", "\\|") for cell in cells])
    return rows


def _public_name(label: str, entry: Parent) -> str:
    found = hub_repository(entry.source.uri if entry.source else "")
    return found[0] if found else label


def _treatment(manifest: Manifest) -> list[str]:
    groups: dict[tuple[str, str], list[MergedTensor]] = defaultdict(list)
    for entry in manifest.tensors.values():
        groups[entry.method or "copied from the base", entry.role].append(entry)
    lines = [f"{len(own)} {role} tensors: {how}{_figures(own)}" for (how, role), own in sorted(groups.items())]
    lines += [f"head of {task}: kept from {head.model}" for task, head in sorted(manifest.heads.items())]
    return lines + _alignment(manifest) + [f"note: {note}" for note in manifest.notes]


def _figures(tensors: Sequence[MergedTensor]) -> str:
    """What the method says of these tensors: ranks, shares (their means), directions."""
    told = []
    if ranks := _numbers(tensors, "rank"):
        told.append(f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}")
    for key, words in (
        ("kept_share", "of the entries kept"),
        ("sign_conflicts", "of these outvoted"),
        ("interference", "interference"),
    ):
        if shares := _numbers(tensors, key):
            told.append(f"{sum(shares) / len(shares):.1%} {words}")
    told += sorted({str(value) for entry in tensors if (value := entry.figure("direction")) is not None})
    return f" ({', '.join(told)})" if told else ""


def _numbers(tensors: Sequence[MergedTensor], figure: str) -> list[float]:
    found = (entry.figure(figure) for entry in tensors)
    return [value for value in found if isinstance(value, int | float)]


def _alignment(manifest: Manifest) -> list[str]:
    """What was done to the order of units and to batch statistics, where anything was."""
    found, repair = manifest.alignment, manifest.repair
    lines = []
    if found is not None and found.alpha is not None:
        lines.append(
            f"units matched by {found.mode} with alpha {found.alpha:g}, in the order of {found.order_of}: "
            f"{found.identity_share:.1%} stay in place (alignment.json)"
        )
    if found is not None and found.folded:
        lines.append(f"adapters folded into the base before they were aligned: {', '.join(found.folded)}")
    if repair is not None:
        lines.append(f"batch statistics of {repair.layers} layers computed anew on {repair.rows} rows")
    return lines
