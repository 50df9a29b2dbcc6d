"""How scores are put into words and signs."""

from __future__ import annotations

from modelweld.formats.scores import Metric, PairedTest

SIGNIFICANT = 0.05


def metric_name(metric: Metric) -> str:
    """The metric as people write it."""
    return metric.replace("_", "-").replace("f1", "F1")


def mark(test: PairedTest) -> str:
    """▾ or ▴ where the system differs from the expert beyond chance, else nothing."""
    if test.p_value >= SIGNIFICANT:
        return ""
    return "▾" if test.only_this < test.only_expert else "▴"
