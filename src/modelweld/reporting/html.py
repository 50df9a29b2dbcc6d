"""One self-contained HTML page about a merge: scores, behaviour, layers, lineage, recipe."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from modelweld.formats import AlignmentRecord, Manifest, Part
from modelweld.formats.manifest import ExpertParent
from modelweld.formats.scores import Scoreboard
from modelweld.reporting.alignment import alignment_plots
from modelweld.reporting.behaviour import behaviour
from modelweld.reporting.landscape import plot_landscape
from modelweld.reporting.layers import layer_series
from modelweld.reporting.plots import colours, plot_layers, plot_scores
from modelweld.reporting.wording import SIGNIFICANT, mark, metric_name

TEMPLATE = "report.html.j2"


def write_report(
    out: Path,
    scoreboard: Scoreboard,
    *,
    name: str,
    predictions: Path | None = None,
    manifest: Manifest | None = None,
    alignment: AlignmentRecord | None = None,
    landscape: Mapping[str, Any] | None = None,
) -> Path:
    """Write `out`/index.html with its plots beside and inside it; returns the page's path.

    `predictions` is the folder of <task>.parquet files; tasks without one have no section on behaviour. Without a
    manifest there are neither layers nor lineage. `alignment` is alignment.json of the merge, `landscape` the plane
    through its experts. Equal input gives an equal page: no clock, no host.
    """
    board = scoreboard.summary()
    out.mkdir(parents=True, exist_ok=True)
    images = {"scores": plot_scores(scoreboard, out / "scores.png")}
    if series := layer_series(manifest.tensors if manifest else {}):
        images["layers"] = plot_layers(series, out / "layers.png")
    if alignment is not None:
        images |= alignment_plots(alignment, out)
    if landscape is not None:
        plane = {**landscape, "tasks": list(landscape["tasks"].values())}
        images["landscape"] = plot_landscape(plane, list(landscape["tasks"]), out / "landscape.png")
    shown = [
        behaviour(predictions / f"{task}.parquet")
        for task in board.tasks
        if predictions is not None and (predictions / f"{task}.parquet").is_file()
    ]
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: files("modelweld.reporting").joinpath(file).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    page = environment.get_template(TEMPLATE).render(
        name=name,
        scores=board,
        metric=metric_name(board.metric),
        significant=SIGNIFICANT,
        mark=mark,
        shade=_shade,
        colours=colours(board.order),
        images={key: _embedded(path) for key, path in images.items()},
        behaviours=shown,
        manifest=manifest,
        alignment=alignment,
        landscape=landscape,
        parents=parents(manifest) if manifest else [],
        treatment=treatment(manifest) if manifest else [],
        recipe=_yaml(manifest.recipe) if manifest else "",
        environment=_yaml(manifest.environment) if manifest else "",
    )
    target = out / "index.html"
    target.write_text(page, encoding="utf-8")
    return target


def parents(manifest: Manifest) -> list[dict[str, Any]]:
    """The models that were merged, the base first, as rows: where from, which revision, licence, and file digests."""
    found = manifest.parents
    labelled = [("base", found.base)] if found.base is not None else []
    labelled += [(label, found.experts[label]) for label in manifest.recipe.order]
    rows: list[dict[str, Any]] = []
    for label, parent in labelled:
        source, expert = parent.source, parent if isinstance(parent, ExpertParent) else None
        rows.append(
            {
                "name": label,
                "head": expert.head if expert else None,
                "weight": expert.weight if expert else None,
                "source": source.uri if source else None,
                "revision": source.revision if source else None,
                "licence": source.licence if source else None,
                "files": {file: about.sha256 for file, about in source.files.items()} if source else {},
                "tensors": len(parent.tensors),
            }
        )
    return rows


def treatment(manifest: Manifest) -> list[tuple[str, str, int]]:
    """How many tensors of which role were merged by which method."""
    counts = Counter((entry.role, entry.method or "copied") for entry in manifest.tensors.values())
    return sorted((role, method, tensors) for (role, method), tensors in counts.items())


def _embedded(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode("ascii")


def _yaml(part: Part) -> str:
    return yaml.safe_dump(part.data(), sort_keys=True, allow_unicode=True, width=100)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _shade(share: float) -> str:
    """A background for a share of the expert's score: white at 1 and above, warmer the further below."""
    missing = min(1.0, max(0.0, 1.0 - share) / 0.5)
    return f"rgba(217, 72, 15, {0.42 * missing:.3f})"
