"""Model Stock: average the experts and go back towards the base by the angle between them. https://arxiv.org/abs/2403.19522"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.panels import gram_rows, per_row, stacked_changes, symmetric

# mergekit's least product of two norms, and the divisor below which its share is 0
_LEAST_NORMS, _POLE = 1e-6, 1e-6


@merge_method(
    paper="arXiv:2403.19522",
    needs_base=True,
    streams_by="row",
    experts=(2, None),
    cost="streammerge.solve.cost_geometry:model_stock",
    look="streammerge.solve.geometry:ChangeGram",
)
def model_stock(deltas: Deltas, *, filter_wise: bool = False, compat: Literal["none", "mergekit"] = "none") -> Tensor:
    """Average the experts and go back towards the base by the angle between them.

    filter_wise  take the angle of each row by itself, not of the whole tensor
    compat       mergekit: norms have an absolute floor and the share no bounds

    Δ = t mean(D_t) with t = N c / (1 + (N - 1) c), c the mean cosine between two of the N changes: equation (4) of the
    paper for N experts, per flattened tensor or per row (of the last dimension). Changes of length zero have cosine 0
    to all others. Ours keeps t in [0, 1], where mergekit goes below 0 for c < 0 and has a pole at -1/(N - 1); and
    mergekit divides by no less than 1e-6, which takes small changes, as of norms in RL, back to the base.

    Returns the merged delta, [*shape].
    """
    as_mergekit = compat == "mergekit"
    if filter_wise:
        pairs = gram_rows(list(stacked_changes(deltas)))
        share = _share(symmetric(pairs), as_mergekit).view(per_row(deltas.shape))
        return deltas.weighted_sum([1 / deltas.experts] * deltas.experts).mul_(share.to(deltas.dtype))
    share = _share(deltas.seen.gram, as_mergekit)
    deltas.note(t=share.item())
    return deltas.weighted_sum([share.item() / deltas.experts] * deltas.experts)


def _share(gram: Tensor, as_mergekit: bool) -> Tensor:
    """t of Gram matrices [..., N, N]: [...] float64."""
    count = gram.shape[-1]
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = lengths[..., :, None] * lengths[..., None, :]
    cosines = gram / products.clamp(min=_LEAST_NORMS) if as_mergekit else torch.where(products > 0, gram / products, 0)
    above = torch.ones(count, count, dtype=torch.bool, device=gram.device).triu(1)
    cosine = cosines.clamp(-1.0, 1.0)[..., above].mean(-1)
    if not as_mergekit:
        cosine = cosine.clamp(min=0.0)
    divisor = 1 + (count - 1) * cosine
    return torch.where(divisor.abs() < _POLE, 0.0, count * cosine / divisor)
