"""FR-Merging: keep the high frequencies of the changes. https://arxiv.org/abs/2411.16815"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.methods import merge_method
from streammerge.solve.shares import normalized


@merge_method(
    paper="arXiv:2411.16815",
    needs_base=True,
    streams_by="matrix",
    cost="streammerge.solve.cost_spectral:frequencies",
    ranges={"radius": "[0, inf)"},
    checks={"weight": "streammerge.solve.limits:normalizable"},
)
def fr(
    deltas: Deltas,
    *,
    weight: PerExpert = 1.0,
    normalize: bool = False,
    radius: float = 0.7,
    lambda_: float = 0.7,
) -> Tensor:
    """Add the experts' changes without their low frequencies.

    weight     factor of each expert's change
    normalize  divide by the sum of the weights
    radius     how far from the highest frequency is kept, as a share of the shorter side;
               0.7072 keeps all of a square matrix
    lambda     factor of the merged change

    Each change's two-dimensional Fourier transform F[i, j], as the FFT orders it, is kept where
    (i - out/2)² + (j - in/2)² ≤ (radius · min(out, in))², and transformed back; Δ = λ Σ w_t D̃_t. The
    lowest frequencies lie in the corners, so this is a high-pass. The filter is linear: it is applied
    once, to the weighted sum. Defaults are the paper's for vision transformers; its code for language
    models uses radius 0.9, which filters only matrices that are not square.
    This is the part of FREE-Merging that needs no data; its experts and router are not merged weights.

    Returns the merged delta, [out, in] in the stream's dtype.
    """
    weights = deltas.per_expert(weight)
    if normalize:
        weights = normalized(weights)
    merged = deltas.weighted_sum([share * lambda_ for share in weights])
    rows, columns = deltas.shape
    # twice the distance from the centre, in whole numbers; a real matrix needs only half of its spectrum
    down = 2 * torch.arange(rows, dtype=torch.float64, device=merged.device) - rows
    across = 2 * torch.arange(columns // 2 + 1, dtype=torch.float64, device=merged.device) - columns
    removed = down[:, None] ** 2 + across**2 > (2 * radius * min(rows, columns)) ** 2
    deltas.note(filtered=bool(removed.any()))
    if not removed.any():
        return merged
    spectrum = torch.fft.rfft2(merged).masked_fill_(removed, 0.0)
    return merged.copy_(torch.fft.irfft2(spectrum, s=(rows, columns)))
