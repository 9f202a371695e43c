"""Fisher averaging: weigh each element by how surely each expert knows it. https://arxiv.org/abs/2111.09832"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from streammerge.delta import Deltas, PerExpert
from streammerge.errors import MergeError, quoted
from streammerge.methods import merge_method


@merge_method(
    paper="arXiv:2111.09832",
    needs_base=False,
    streams_by="element",
    beside="fisher",
    ranges={"weight": "[0, inf)"},
    checks={"weight": "streammerge.solve.limits:some_weight"},
)
def fisher(deltas: Deltas, *, weight: PerExpert = 1.0, missing: Literal["error", "mean"] = "error") -> Tensor:
    """Average the experts, each element weighted by its Fisher information.

    weight   factor of each expert's information; only ratios matter
    missing  error: every expert must have its information; mean: without it, average the tensor

    W = Σ w_t F_t∘W_t / Σ w_t F_t, F_t the diagonal of expert t's Fisher information: the
    recipe names a folder of tensors beside each expert, shaped as its weights. An element of which no
    expert has information gets the weighted mean. RegMean's code reaches that by adding 1e-10 to
    every F_t; nothing is added here, so that smaller F_t count by their ratios too. The mean is kept while
    experts are added, which neither overflows nor vanishes for F_t of any size.

    Returns the merged delta, [*shape]. Raises MergeError for information that is negative or not
    finite.
    """
    weights = deltas.per_expert(weight)
    if missing == "mean" and any(deltas.beside(index) is None for index in range(deltas.experts)):
        total = math.fsum(weights)
        return deltas.weighted_sum([each / total for each in weights])
    merged, known = deltas.zeros(*deltas.shape), deltas.zeros(*deltas.shape)
    counted = 0.0
    for delta, factor in zip(deltas, weights, strict=True):
        information = _information(deltas, delta.index)
        if factor == 0.0:
            continue
        counted += factor
        known.add_(information, alpha=factor)
        # an expert's share of what is known so far; where nothing is, of the weights
        share = torch.where(known > 0, information * factor / known, factor / counted)
        merged.add_(delta.dense().sub_(merged).mul_(share))
    return merged


def _information(deltas: Deltas, index: int) -> Tensor:
    found = deltas.beside(index)
    assert found is not None, f"expert {index} has no Fisher information beside it"
    information = found.to(deltas.device, deltas.dtype)
    if information.numel() and not (information.min().item() >= 0.0 and information.max().item() < math.inf):
        raise MergeError(
            f"{quoted(deltas.name)}: the Fisher information beside expert {index} has an entry that is negative or "
            "not finite",
            hint="It is a mean of squares. Collect it again, in float32.",
        )
    return information
