"""Iso-C: sum the changes and flatten the sum's spectrum. https://arxiv.org/abs/2502.04959"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.buffers import Buffers
from streammerge.solve.polar import gram, inverse_root, relative_cut


@merge_method(
    paper="arXiv:2502.04959",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_spectral:iso_c",
)
def iso_c(deltas: Deltas, *, lambda_: float = 1.0) -> Tensor:
    """Add the experts' changes and give the sum's directions equal strength.

    lambda  factor of the merged change

    Σ D_t = U Σ Vᵀ; Δ = λ · σ̄ · U Vᵀ, σ̄ the mean of all min(out, in) singular values, zeros included.
    The paper tunes λ on held-out data. Different from its code: U Vᵀ is formed of the directions that the
    sum has, those whose singular value exceeds √max(out, in)·2⁻²³ of the largest, since an SVD completes
    the others arbitrarily; the arithmetic is float64. As there, one expert does not come back, several
    equal ones count several times, and low-rank changes shrink, as zeros take part in σ̄.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    rows, columns = deltas.shape
    buffers = Buffers(deltas, torch.float64)
    total = buffers.take("total", torch.float64, rows, columns).zero_()
    for delta in deltas:
        total.add_(delta.dense())
    size = min(rows, columns)
    root = buffers.take("root", torch.float64, size, size)
    singular = inverse_root(gram(total, buffers), relative_cut(rows, columns), root)
    deltas.note(rank=int(torch.count_nonzero(singular)))
    root.mul_(singular.sum() * (lambda_ / size))
    flat = buffers.take("flat", torch.float64, rows, columns)
    if rows <= columns:
        torch.mm(root, total, out=flat)
    else:
        torch.mm(total, root, out=flat)
    return deltas.empty(rows, columns).copy_(flat)
