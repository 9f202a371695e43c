"""Trims by magnitude: what TIES and Model Breadcrumbs must know of a tensor or a model, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from streammerge.delta import Delta, Deltas, PerExpert
from streammerge.solve.cost_trim import CRUMBS_LOOKS, ties_looks
from streammerge.solve.cuts import CutSearch
from streammerge.solve.election import Thin, balance, thinned
from streammerge.solve.rescale import NormRatios

_UNSEEN = "trimming takes a look: `Method.merge` sees to it"


class TiesLook:
    """Where each expert's trim ends, what the rest is multiplied by, and which sign has the majority of the votes.

    The arguments are those of `ties`.

    majority  1, -1 or, as long as no votes were counted, 0
    """

    def __init__(
        self,
        deltas: Deltas,
        *,
        weight: PerExpert = 1.0,
        density: PerExpert = 1.0,
        normalize: bool = True,
        lambda_: float = 1.0,
        trim: str = "tensor",
        keep: str = "count",
        cancelled: str = "plus",
        rescale: bool = False,
    ) -> None:
        self._densities = deltas.per_expert(density)
        self._weights = deltas.per_expert(weight)
        self._searches = [_ties_search(deltas, share, keep) for share in self._densities]
        self._cut_looks = ties_looks(self._densities, keep, "plus", rescale=False)
        self._rescales, self._ratios = rescale, _ratios(self._searches) if rescale else None
        self._balance: Tensor | None = None
        self.majority = 0.0

    def look(self, number: int, deltas: Deltas) -> None:
        if number < self._cut_looks:
            _look(self._searches, number, deltas)
            return
        if self._ratios and number == self._cut_looks:
            self._ratios.look(deltas, self._trim(deltas))
            return
        votes = balance(thinned(deltas, self.trim(deltas)), self._weights)
        self._balance = votes if self._balance is None else self._balance + votes

    def finish(self, number: int) -> None:
        if number < self._cut_looks:
            _finish(self._searches, number)
        elif self._ratios and number == self._cut_looks:
            self._ratios.finish()
        elif self._balance is not None:
            self.majority = float(self._balance.sign())

    def trim(self, deltas: Deltas) -> Thin:
        """What trims a change."""
        trim = self._trim(deltas)
        return self._ratios.rescaled(deltas.name, trim) if self._ratios else trim

    def _trim(self, deltas: Deltas) -> Thin:
        def trim(delta: Delta, change: Tensor) -> Tensor:
            for search in self._searches[delta.index]:
                search.cut.keep_(change, deltas.name, delta.first_element)
            return change

        return trim


class BreadcrumbsLook:
    """Where each expert's outliers end and its small entries begin, and what the rest is multiplied by.

    The arguments are those of `breadcrumbs`.
    """

    def __init__(
        self,
        deltas: Deltas,
        *,
        weight: PerExpert = 1.0,
        density: PerExpert = 1.0,
        gamma: PerExpert = 0.01,
        normalize: bool = False,
        lambda_: float = 1.0,
        rescale: bool = False,
    ) -> None:
        gammas = deltas.per_expert(gamma)
        self._searches = [
            _crumb_searches(deltas, share, top) for share, top in zip(deltas.per_expert(density), gammas, strict=True)
        ]
        self._ratios = _ratios(self._searches) if rescale else None

    def look(self, number: int, deltas: Deltas) -> None:
        if self._ratios and number == CRUMBS_LOOKS:
            self._ratios.look(deltas, self._trim(deltas))
        else:
            _look(self._searches, number, deltas)

    def finish(self, number: int) -> None:
        if self._ratios and number == CRUMBS_LOOKS:
            self._ratios.finish()
        else:
            _finish(self._searches, number)

    def trim(self, deltas: Deltas) -> Thin:
        """What sets the outliers and the small entries of a change to zero, and rescales the rest."""
        trim = self._trim(deltas)
        return self._ratios.rescaled(deltas.name, trim) if self._ratios else trim

    def _trim(self, deltas: Deltas) -> Thin:
        def trim(delta: Delta, change: Tensor) -> Tensor:
            if not self._searches[delta.index]:
                return change
            outer, inner = (search.cut for search in self._searches[delta.index])
            copy = change.clone()
            outer.keep_(change, deltas.name, delta.first_element)
            return change.sub_(inner.keep_(copy, deltas.name, delta.first_element))

        return trim


def untrimmed(delta: Delta, change: Tensor) -> Tensor:
    """A change as it is."""
    return change


def ties_trim(deltas: Deltas, density: PerExpert, cancelled: str) -> tuple[Thin, float]:
    """What trims a change as TIES does, and the majority of the votes."""
    if deltas.seen is None:
        assert min(deltas.per_expert(density)) == 1.0, _UNSEEN
        assert cancelled != "majority", _UNSEEN
        return untrimmed, 0.0
    seen: TiesLook = deltas.seen
    return seen.trim(deltas), seen.majority


def crumbs_trim(deltas: Deltas, density: PerExpert) -> Thin:
    """What leaves of a change what Model Breadcrumbs keeps."""
    if deltas.seen is None:
        assert min(deltas.per_expert(density)) == 1.0, _UNSEEN
        return untrimmed
    seen: BreadcrumbsLook = deltas.seen
    return seen.trim(deltas)


def crumbs(elements: int, density: float, gamma: float) -> tuple[int, int]:
    """Of so many entries, largest first: how many are outliers, and how many are outliers or kept."""
    kept = int(density * elements)
    outliers = min(int(gamma * elements), elements - kept)
    return outliers, outliers + kept


def _ties_search(deltas: Deltas, density: float, keep: str) -> list[CutSearch]:
    if density == 1.0:
        return []
    # nothing where density is 0, else one entry at least
    least = int(density > 0.0)
    if keep == "threshold":
        # Yadav et al. keep all from the (n - ⌊density · n⌋)-th smallest on: one more
        return [CutSearch(lambda n: int(density * n) + least, equals="all", device=deltas.device)]
    return [CutSearch(lambda n: max(int(density * n), least), equals="first", device=deltas.device)]


def _crumb_searches(deltas: Deltas, density: float, gamma: float) -> list[CutSearch]:
    if density == 1.0:
        return []
    return [
        CutSearch(lambda n: crumbs(n, density, gamma)[1], equals="first", device=deltas.device),
        CutSearch(lambda n: crumbs(n, density, gamma)[0], equals="first", device=deltas.device),
    ]


def _ratios(searches: Sequence[Sequence[CutSearch]]) -> NormRatios | None:
    thinned = [index for index, found in enumerate(searches) if found]
    return NormRatios(thinned) if thinned else None


def _look(searches: Sequence[Sequence[CutSearch]], number: int, deltas: Deltas) -> None:
    for delta in deltas:
        if searches[delta.index]:
            values = delta.dense().float()
            for search in searches[delta.index]:
                search.look(number, values, deltas.name, deltas.first_element)


def _finish(searches: Sequence[Sequence[CutSearch]], number: int) -> None:
    for search in (search for found in searches for search in found):
        search.finish(number)
