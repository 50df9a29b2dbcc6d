"""Accuracy and macro-F1 with bootstrap intervals, each system paired with the expert on the same resampled rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score, f1_score

from modelweld.errors import InputError
from modelweld.evaluation.labels import Classes
from modelweld.evaluation.significance import mcnemar
from modelweld.formats.scores import EXPERT, Bounds, Interval, Metric, SystemScores

DIGITS = 6  # beyond what any set resolves, within what every numpy agrees on
_CELLS = 4_000_000  # resampled rows at a time: 32 MB of counts

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Resampling:
    """How often rows are drawn again, from which seed, for intervals of which confidence."""

    resamples: int
    confidence: float
    seed: int


def accuracy(truth: Classes, predicted: Classes) -> float:
    """Share of rows that are right."""
    return float(accuracy_score(truth, predicted))


def macro_f1(truth: Classes, predicted: Classes) -> float:
    """Mean F1 over the classes that occur in the truth, so that every system is averaged over the same classes."""
    return float(f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0.0))


def score_systems(
    truth: Classes,
    predicted: Mapping[str, Classes],
    digests: Mapping[str, str],
    metric: Metric,
    resampling: Resampling,
    where: str,
    reference: str = EXPERT,
) -> dict[str, SystemScores]:
    """Every system's scores, normalised by those of `reference`, which is one of the systems.

    InputError when the reference scores zero: nothing can be divided by it, and its labels are surely mapped wrongly.
    """
    values = {
        name: {"accuracy": accuracy(truth, classes), "macro_f1": macro_f1(truth, classes)}
        for name, classes in predicted.items()
    }
    if values[reference][metric] == 0.0:
        raise InputError(
            f"the {metric} of the {reference} is 0",
            where=where,
            hint="look at the order of id2label in its config.json, and at the task's dataset and split",
        )
    draws = _resampled(truth, predicted, resampling)
    scored = {}
    for name, classes in predicted.items():
        reference_draws = draws[reference][metric]
        ratios = np.divide(
            draws[name][metric], reference_draws, out=np.full_like(reference_draws, np.nan), where=reference_draws > 0
        )
        normalised = _interval(values[name][metric] / values[reference][metric], ratios, resampling.confidence)
        scored[name] = SystemScores(
            accuracy=_interval(values[name]["accuracy"], draws[name]["accuracy"], resampling.confidence),
            macro_f1=_interval(values[name]["macro_f1"], draws[name]["macro_f1"], resampling.confidence),
            normalised=normalised.value,
            normalised_interval=Bounds(low=normalised.low, high=normalised.high),
            versus_expert=mcnemar(classes == truth, predicted[reference] == truth),
            model_digest=digests[name],
        )
    return scored


def _resampled(
    truth: Classes, predicted: Mapping[str, Classes], resampling: Resampling
) -> dict[str, dict[Metric, Floats]]:
    """Each metric on each bootstrap sample (B,); sample b is the same rows for every system."""
    rows = len(truth)
    present, truth = np.unique(truth, return_inverse=True)  # classes that occur, renumbered 0…C-1
    size = len(present)
    one_hot = _one_hot(truth, size)
    hits, guesses = {}, {}
    for name, classes in predicted.items():
        column = np.searchsorted(present, classes).clip(max=size - 1)
        known = present[column] == classes
        hits[name] = _one_hot(np.where(known & (column == truth), truth, -1), size)
        guesses[name] = _one_hot(np.where(known, column, -1), size)

    draws: dict[str, dict[Metric, Floats]] = {
        name: {"accuracy": np.empty(resampling.resamples), "macro_f1": np.empty(resampling.resamples)}
        for name in predicted
    }
    generator = np.random.default_rng(resampling.seed)
    step = max(1, _CELLS // rows)
    for start in range(0, resampling.resamples, step):
        count = min(step, resampling.resamples - start)
        chosen = generator.integers(0, rows, size=(count, rows))
        chosen += np.arange(count)[:, None] * rows
        times = np.bincount(chosen.ravel(), minlength=count * rows).reshape(count, rows)  # (b, n) how often each row
        support = times @ one_hot  # (b, C)
        for name, series in draws.items():
            true_positives = times @ hits[name]  # (b, C)
            series["accuracy"][start : start + count] = true_positives.sum(axis=1) / rows
            # F1 = 2 TP / (2 TP + FP + FN) = 2 TP / (predicted + support), over the classes that the sample holds
            f1 = 2 * true_positives / np.maximum(support + times @ guesses[name], 1)
            held = support > 0
            series["macro_f1"][start : start + count] = (f1 * held).sum(axis=1) / held.sum(axis=1)
    return draws


def _one_hot(classes: Classes, size: int) -> csr_array:
    """Rows × classes, an empty row where the class is -1."""
    (rows,) = np.nonzero(classes >= 0)
    return csr_array((np.ones(len(rows), dtype=np.int64), (rows, classes[rows])), shape=(len(classes), size))


def _interval(value: float, draws: Floats, confidence: float) -> Interval:
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(value=round(value, DIGITS))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value=round(value, DIGITS), low=round(float(low), DIGITS), high=round(float(high), DIGITS))
