"""The tables in the documents are what `modelweld methods --markdown` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelweld.config.methods import METHODS
from modelweld.methods import table
from tests.support.command import modelweld

ROOT = Path(__file__).parents[3]
BEGIN, END = "<!-- modelweld methods --markdown -->\n", "<!-- end of the table -->"


@pytest.mark.parametrize("file", ["README.md", "docs/merging.md"])
def test_the_table_of_a_document_is_the_commands(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    held = text.partition(BEGIN)[2].partition(END)[0]
    assert held == table.markdown(), f"paste the output of `modelweld methods --markdown` into {file}"


def test_the_command_prints_the_table_and_the_document(tmp_path: Path) -> None:
    assert modelweld(tmp_path, "methods", "--markdown").stdout == table.markdown()
    assert set(table.document()) == {kind.model_fields["method"].default for kind in METHODS}
    assert table.document()["slerp"]["models"] == {"least": 2, "most": 2}
    assert table.document()["dare"]["seeded"]
