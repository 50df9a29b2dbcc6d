"""Tables, plots and pages show the numbers they were given, legibly at any width."""

from __future__ import annotations

import struct
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from modelweld.errors import InputError
from modelweld.formats.manifest import MergedTensor
from modelweld.formats.scores import Cell, Interval, PairedTest, Summary, SystemSummary, TaskSummary
from modelweld.reporting import plot_layers, plot_scores, score_table, write_report
from modelweld.reporting.behaviour import behaviour
from modelweld.reporting.layers import layer_series
from modelweld.reporting.plots import colours
from modelweld.reporting.tables import task_table
from tests.support.manifests import expert, manifest_of, tensor
from tests.support.scores import system_scores, task_scores

ORDER = ["base", "expert", "average", "merged"]


class Board:
    """A scoreboard with round numbers."""

    def __init__(self, *, intervals: bool = True, tasks: int = 2, order: list[str] = ORDER) -> None:
        self.intervals, self.tasks, self.order = intervals, [f"task{index}" for index in range(tasks)], order

    def interval(self, value: float) -> Interval:
        low, high = (value - 0.02, value + 0.01) if self.intervals else (None, None)
        return Interval(value=value, low=low, high=high)

    def summary(self) -> Summary:
        scores = {"base": 0.2, "expert": 0.8, "average": 0.6, "merged": 0.84}
        systems = {}
        for system in self.order:
            value = scores.get(system, 0.5)
            test = PairedTest(only_this=9, only_expert=1, p_value=0.021)
            if value < 0.8:
                test = PairedTest(only_this=1, only_expert=30, p_value=3e-8)
            if system == "expert":
                test = PairedTest(only_this=0, only_expert=0, p_value=1.0)
            cell = Cell(
                score=self.interval(value),
                accuracy=self.interval(value),
                macro_f1=self.interval(value),
                normalised=self.interval(value / 0.8),
                versus_expert=test,
                model_digest="d",
            )
            systems[system] = SystemSummary(
                mean_normalised=value / 0.8,
                worst_task=self.tasks[0],
                worst_normalised=value / 0.8 - 0.1,
                tasks=dict.fromkeys(self.tasks, cell),
            )
        about = TaskSummary(rows=1234, dataset_digest="d", confidence=0.95)
        tasks = dict.fromkeys(self.tasks, about)
        return Summary(metric="macro_f1", order=tuple(self.order), tasks=tasks, systems=systems)


def shown(renderable: Any, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_table_holds_scores_shares_and_marks() -> None:
    lines = shown(score_table(Board())).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip() and line.split()[0] in ORDER}
    assert list(rows) == ORDER
    assert rows["merged"] == ["84.0", "1.05▴", "84.0", "1.05▴", "1.050", "0.950"]
    assert rows["average"] == ["60.0", "0.75▾", "60.0", "0.75▾", "0.750", "0.650"]
    assert rows["expert"] == ["80.0", "1.00", "80.0", "1.00", "1.000", "0.900"]
    assert any("macro-F1" in line for line in lines)


def test_the_table_loses_no_figure_in_eighty_columns() -> None:
    text = shown(score_table(Board(tasks=6)), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for figure in ("84.0", "1.05▴", "0.75▾", "0.950"):
        assert figure in text


@pytest.mark.parametrize("compared", [True, False])
def test_the_table_of_one_task(compared: bool) -> None:
    test = PairedTest(only_this=1, only_expert=9, p_value=0.00012)
    entry = system_scores(0.5, 0.625, test=test).model_copy(update={"macro_f1": Interval(value=0.25)})
    systems = {"expert": entry, "model": entry} if compared else {"model": entry}
    text = shown(task_table(task_scores("mails", systems)))
    assert "50.0  45.0–55.0" in text
    assert "25.0" in text
    assert ("0.00012" in text) is compared


def size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    return int(width), int(height)


def test_plots_grow_with_what_they_show_and_are_reproducible(tmp_path: Path) -> None:
    small = plot_scores(Board(tasks=1), tmp_path / "deep" / "small.png")
    systems = [*ORDER[:-1], *(f"baseline{index}" for index in range(9)), "merged"]
    large = plot_scores(Board(tasks=8, order=systems), tmp_path / "large.png")
    assert size(large)[0] > size(small)[0]
    assert size(large)[1] > size(small)[1]
    again = plot_scores(Board(tasks=1), tmp_path / "again.png")
    assert again.read_bytes() == small.read_bytes()
    plot_scores(Board(intervals=False), tmp_path / "plain.png")
    assert size(tmp_path / "plain.png")[0] > 500


def test_base_expert_and_merged_keep_their_colours() -> None:
    few, many = colours(ORDER), colours([*ORDER, "ties", "dare"])
    assert all(few[name] == many[name] for name in ("base", "expert", "merged"))
    assert len(set(many.values())) == 6


def tensors(**figures: float) -> dict[str, MergedTensor]:
    found = {
        f"encoder.layer.{layer}.{part}.weight": tensor(delta_survival=0.9 + layer / 1000 + offset)
        for layer in (0, 2, 10)
        for part, offset in (("query", 0.0), ("key", 0.02))
    }
    found["embeddings.word_embeddings.weight"] = tensor()
    found["embeddings.LayerNorm.weight"] = tensor(delta_survival=0.5)
    found["pooler.dense.weight"] = tensor(delta_survival=1.0, **figures)
    return manifest_of(tensors=found).tensors


def test_layers_are_gathered_in_their_order(tmp_path: Path) -> None:
    (series,) = layer_series(tensors())
    assert series.groups == ("embeddings", "0", "2", "10", "pooler")
    assert series.mean == pytest.approx((0.5, 0.91, 0.912, 0.92, 1.0))
    assert series.low[1:4] == pytest.approx((0.9, 0.902, 0.91))
    assert series.high[1:4] == pytest.approx((0.92, 0.922, 0.93))
    assert len(layer_series(tensors(sign_conflicts=0.3))) == 2
    assert layer_series(manifest_of(tensors={"a": tensor()}).tensors) == []
    assert (
        size(plot_layers([series, series], tmp_path / "two.png"))[1]
        > size(plot_layers([series], tmp_path / "1.png"))[1]
    )


def test_behaviour_finds_the_classes_that_the_merge_loses(tmp_path: Path) -> None:
    label = ["a"] * 4 + ["b"] * 4
    table = {
        "label": label,
        "expert": label,
        "expert.confidence": [0.9] * 8,
        "merged": ["a", "b", "b", "b"] + ["b"] * 4,
        "merged.confidence": [0.5] * 8,
    }
    pq.write_table(pa.table(table), tmp_path / "mails.parquet")
    found = behaviour(tmp_path / "mails.parquet")
    assert (found.task, found.agreement) == ("mails", 5 / 8)
    assert [(change.name, change.rows, change.change) for change in found.classes] == [("a", 4, -0.75), ("b", 4, 0.0)]
    assert found.confusions == (("a", "b", 3),)
    assert (found.expert_confidence, found.merged_confidence) == pytest.approx((0.9, 0.5))


def test_the_page_names_parents_as_they_were_pinned_and_escapes_them(tmp_path: Path) -> None:
    source = {
        "uri": "hf://org/mails<script>",
        "resolved": "hf://org/mails@abc123",
        "revision": "abc123",
        "licence": "mit",
        "files": {"model.safetensors": {"sha256": "f" * 64, "size_bytes": 1}},
    }
    document = manifest_of(
        parents={"base": {"source": None, "tensors": {}}, "experts": {"mails": expert(source=source)}},
        tensors={"a": tensor(), "b": tensor(action="copy", role="buffer", method=None)},
        delta_survival={"whole_model": 0.8712, "worst_tensor": 0.0},
        notes=["one note"],
    )
    page = write_report(tmp_path, Board(), name="weld", manifest=document).read_text(encoding="utf-8")
    assert "hf://org/mails&lt;script&gt;" in page
    assert "<script>" not in page
    for expected in ("abc123", "mit", "f" * 64, "87.12 %", "one note", "0123abcd", "unknown", "copied", "method: drm"):
        assert expected in page
    assert page.count("data:image/png;base64,") == 1, "no figure by layer, no plot of layers"


def test_files_that_are_no_predictions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"label": ["a"]}), tmp_path / "foreign.parquet")
    for name in ("damaged", "foreign", "missing"):
        with pytest.raises(InputError, match="not a predictions file"):
            behaviour(tmp_path / f"{name}.parquet")
