"""Iso-CTS: Iso-C with the weakest common directions replaced by task-specific ones (arXiv 2502.04959, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from modelweld.config import methods as config
from modelweld.errors import MergeError
from modelweld.methods.iso_c import mean_singular_value
from modelweld.methods.method import Method
from modelweld.methods.numerics.election import summed
from modelweld.methods.numerics.operands import Weights, coefficients, require_finite, stacked
from modelweld.methods.numerics.spectrum import orthogonalised, thin_svd


def merge(deltas: Tensor, *, common_share: float = 0.8, weights: Weights | None = None) -> Tensor:
    """The merged task vector `(n, m)` of `(N, n, m)`, in float64: σ̄ U* V*ᵀ (algorithm 2).

    The common subspace is the k leading left singular vectors of Σ c_i D_i; each task adds the s leading triples of
    what of c_i D_i lies outside it; both sides are made orthonormal, and σ̄ is the mean over all that were kept. Of
    r = min(n, m), s = round((r - floor(common_share · r)) / N) and k = r - N s. Raises MergeError for another shape
    and values that are not finite.
    """
    deltas = stacked(deltas, dtype=torch.float64, matrices=True)
    require_finite(deltas)
    if not 0 <= common_share <= 1:
        raise MergeError(f"common_share is {common_share}", hint="give a share from 0 to 1")
    count, full = deltas.shape[0], min(deltas.shape[1:])
    specific = min(round((full - int(full * common_share)) / count), full // count)
    common = full - count * specific
    scaled = deltas * coefficients(weights, deltas)[:, None, None]
    left, sigma, right = thin_svd(summed(scaled))
    lefts, sigmas, rights = [left[:, :common]], [sigma[:common]], [right[:common].mT]
    for delta in scaled:
        outside = delta - lefts[0] @ (lefts[0].mT @ delta)
        u, s, vt = thin_svd(outside)
        lefts.append(u[:, :specific])
        sigmas.append(s[:specific])
        rights.append(vt[:specific].mT)
    flat = mean_singular_value(torch.cat(sigmas))
    return (orthogonalised(torch.cat(lefts, dim=1)) * flat) @ orthogonalised(torch.cat(rights, dim=1)).mT


METHOD = Method(
    config.IsoCts,
    merge,
    summary="`iso_c` whose weakest directions are replaced by task-specific ones",
    source="2502.04959",
    shape="matrix",
)
