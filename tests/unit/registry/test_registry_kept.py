"""What is no model by itself is not registered."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from modelweld.errors import InputError
from modelweld.formats.address import DvcAddress
from modelweld.registry.registration import Registration, register
from tests.support.manifests import manifest_of


def test_a_merge_kept_as_an_adapter_is_refused_before_mlflow_is_asked(tmp_path: Path) -> None:
    registration = Registration(
        name="tiny",
        record="merge-run/tiny/1",
        recorded_at=datetime(2026, 1, 1, tzinfo=UTC),
        commit="0" * 40,
        source_commit=None,
        address=DvcAddress(repo=str(tmp_path), rev="0" * 40, path="merged", md5="0" * 32, manifest_sha256="0" * 64),
        manifest=manifest_of(recipe={"method": "drm", "models": {}, "order": [], "output": {"adapter": "keep"}}),
        scores={},
        parents=(),
        params={},
        tasks={},
        lock_digest="0" * 64,
        sources_digest="0" * 64,
    )
    with pytest.raises(InputError, match="kept as an adapter") as caught:
        register(registration, "http://127.0.0.1:9")
    assert caught.value.where == "merge-run/tiny/1"
    assert "adapter: fold" in str(caught.value.hint)
