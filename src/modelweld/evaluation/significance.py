"""Is the difference between two systems on the same rows more than chance?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from modelweld.formats.scores import PairedTest


def mcnemar(this_right: NDArray[np.bool_], expert_right: NDArray[np.bool_]) -> PairedTest:
    """The exact McNemar test: rows that both get right or wrong say nothing, the others are a fair coin under H0.

    Source: McNemar 1947; the exact form is a two-sided binomial test of the discordant rows.
    """
    only_this = int(np.sum(this_right & ~expert_right))
    only_expert = int(np.sum(~this_right & expert_right))
    discordant = only_this + only_expert
    p_value = float(binomtest(only_this, discordant, 0.5).pvalue) if discordant else 1.0
    # Six significant digits: the rest is scipy's business, and would only make equal scores look different.
    return PairedTest(only_this=only_this, only_expert=only_expert, p_value=float(f"{p_value:.6g}"))
