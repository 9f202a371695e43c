"""Reinforced Agent Merging: average what several experts changed, keep what one did. https://arxiv.org/abs/2601.13572"""

from __future__ import annotations

from torch import Tensor

from streammerge.delta import Deltas
from streammerge.methods import merge_method
from streammerge.solve.sharing import merge_by_sharing


@merge_method(
    paper="arXiv:2601.13572",
    needs_base=True,
    streams_by="element",
    ranges={"epsilon": "[0, inf)"},
)
def ram(deltas: Deltas, *, epsilon: float = 1e-5) -> Tensor:
    """Average entries that several experts changed, keep those that one did.

    epsilon  an entry counts as changed where it moved by more than this

    Δ = Σ D_t / n over the n experts that changed the entry, 0 where none did: changes of up to `epsilon` are dropped.
    As in mergekit. Returns the merged delta, [*shape].
    """
    return merge_by_sharing(deltas, epsilon, [1.0] * deltas.experts)
