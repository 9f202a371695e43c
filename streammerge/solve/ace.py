"""ACE-Merging's system: centred deltas, an adaptive ridge, a rank-one prior, a spectral refinement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from streammerge.delta import Delta, Deltas
from streammerge.errors import MergeError, quoted
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import BLOCK_ROWS, by_left_gram, form
from streammerge.solve.covariances import OWN, Shaped, centered_
from streammerge.solve.polar import eigen_
from streammerge.solve.spectral import Ridge
from streammerge.solve.survey import Survey, survey
from streammerge.solve.systems import System, factored_dual, primal
from streammerge.solve.terms import Terms
from streammerge_kernels.gram import gram_, mirror_
from streammerge_kernels.matmul import fast_matmul

Compat = Literal["none", "paper"]

# what the paper adds to traces, under a logarithm or a fraction
_TINY = 1e-12
# what centring leaves of equal rows, relative to their squares: its own rounding in float64
_CENTERED_AWAY = 1e-24
# singular values up to this much of the largest have no directions worth the name in float64's Gram
_NO_DIRECTION = 1e-7


def solve_ace(deltas: Deltas, *, epsilon: float, threshold: float, k_frac: float, compat: Compat) -> Tensor:
    """The merged change of one matrix by `methods.ace`, whose words these are; [out, in] in `deltas.dtype`."""
    with fast_matmul() if deltas.device.type == "cpu" else nullcontext():
        return _Ace(deltas, epsilon, threshold, k_frac, compat).merged()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapted:
    """How the ridge and the covariances adapt.

    spread   γ
    alike    γ is not above the threshold
    weights  of each used expert's D̃ᵀD̃, up to the factor `unit`: Σ̃_t = w_t/unit · D̃ᵀD̃
    ridges   ε_t of each used expert
    total    Σ ε_t, of unchanged experts, too, where they count
    prior    what c is divided by
    """

    spread: float
    alike: bool
    weights: tuple[float, ...] | None
    unit: float
    ridges: tuple[float, ...]
    total: float
    prior: float


class _Ace:
    """One tensor's way through."""

    def __init__(self, deltas: Deltas, epsilon: float, threshold: float, k_frac: float, compat: Compat) -> None:
        self.deltas, self.epsilon, self.threshold, self.k_frac = deltas, epsilon, threshold, k_frac
        self.paper = compat == "paper"
        self.rows, self.columns = deltas.shape
        self.buffers = Buffers(deltas, torch.float64)

    def merged(self) -> Tensor:
        seen = self._survey()
        if not seen.used:
            self.deltas.note(solver="none", form="none")
            return self._averaged()
        adapted = self._adapted(seen)
        count = self.deltas.experts if self.paper else len(seen.used)
        is_dual = form(len(seen.used), self.rows, self.columns) == "dual"
        self.deltas.note(
            solver="ace",
            form="dual" if is_dual else "primal",
            spread=adapted.spread,
            refined=not adapted.alike,
            experts=len(seen.used),
        )
        terms = Terms(
            experts=len(seen.used),
            shares=tuple(ridge / adapted.total for ridge in adapted.ridges),
            weights=adapted.weights,
        )
        gram_unit = seen.scale**2 * adapted.unit
        ridge_lambda = adapted.total * gram_unit
        system = self._system(seen, terms, ridge_lambda, is_dual=is_dual)
        merged = self._before_refinement(system, ridge_lambda, adapted.prior)
        if not adapted.alike:
            self._refine_(merged, system, seen, terms, ridge_lambda, gram_unit, count)
        seen.unscaled_(merged)
        if self.deltas.dtype == merged.dtype:
            return merged
        return self.buffers.take("delta", self.deltas.dtype, self.rows, self.columns).copy_(merged)

    def _survey(self) -> Survey:
        """The experts that count, their ‖D_t‖² as energies and q_t as traces."""

        def slot(used: int) -> Tensor:
            return self.buffers.take("delta", torch.float64, self.rows, self.columns)

        seen = survey(self.deltas, slot, self.buffers, covariances=Shaped(self.buffers, density=1.0, center=True))
        left = [number for number, q in enumerate(seen.traces) if q > _CENTERED_AWAY * seen.energies[number]]
        seen.used = [seen.used[number] for number in left]
        seen.energies, seen.traces = ([values[number] for number in left] for values in (seen.energies, seen.traces))
        return seen

    def _averaged(self) -> Tensor:
        """The mean change, of a matrix that centring leaves nothing of: zero in the paper."""
        share = 0.0 if self.paper else 1.0 / self.deltas.experts
        return self.deltas.weighted_sum([share] * self.deltas.experts)

    def _adapted(self, seen: Survey) -> _Adapted:
        idle = self.deltas.experts - len(seen.used) if self.paper else 0
        norms = seen.energies + [0.0] * idle
        mean = math.fsum(norms) / len(norms)
        measured = [math.log(norm + _TINY) for norm in norms] if self.paper else norms
        tiny = _TINY if self.paper else 0.0
        spread = 0.0
        if len(norms) > 1:
            spread = statistics.variance(measured) / (statistics.fmean(measured) ** 2 + tiny)
        # in the paper's mode all is in the weights' own units, else in those of the mean square
        unit, tiny = (1.0, _TINY) if self.paper else (mean, 0.0)
        if not spread > self.threshold:
            ridges = (self.epsilon,) * len(seen.used)
            total = self.epsilon * len(norms)
            return _Adapted(spread=spread, alike=True, weights=None, unit=unit, ridges=ridges, total=total, prior=1.0)
        traces = [trace / unit + tiny for trace in seen.traces]
        most = math.inf if self.paper else 1.0 / self.columns
        ridges = tuple(min(self.epsilon / trace, most) for trace in traces)
        middle = math.fsum(traces) / len(traces)
        return _Adapted(
            spread=spread,
            alike=False,
            weights=tuple(middle / trace for trace in traces),
            unit=middle * unit,
            ridges=ridges,
            total=math.fsum(ridges) + idle * self.epsilon / _TINY,
            prior=mean + _TINY if self.paper else 1.0,
        )

    def _system(self, seen: Survey, terms: Terms, ridge_lambda: float, *, is_dual: bool) -> System:
        centered = _Centered(self.deltas)
        if is_dual:
            return factored_dual(centered, seen, torch.float64, self.buffers, terms=terms, covariances=OWN)
        return primal(
            centered,
            seen,
            torch.float64,
            self.buffers,
            anchored=True,
            pulled=True,
            terms=terms,
            formed=False,
        ).pull_(ridge_lambda)

    def _before_refinement(self, system: System, ridge_lambda: float, prior: float) -> Tensor:
        """N (P + 1c)⁻¹, P = Σ(Σ̃_t + ε_t): by Sherman and Morrison N P⁻¹ - (N P⁻¹ 1) u / (1 + u 1), u = c P⁻¹."""
        factor = Ridge(system, ridge_lambda)
        if not factor.usable:
            raise MergeError(
                f"{quoted(self.deltas.name)}: the experts' covariance with epsilon {self.epsilon} is not positive "
                "definite",
                hint="Raise `epsilon`.",
            )
        if system.stack is None:
            row = factor.solve_(system.gram.mean(0, keepdim=True))
        else:
            sums = system.stack.sum(1)[None]
            sums = sums if system.roots is None else sums * system.roots
            row = system.spread(factor.solve_(sums.div_(self.columns)))
        row = row / prior
        factor.solve_(system.right)
        merged = system.merged()
        return merged.addmm_(merged.sum(1, keepdim=True), row, alpha=-1.0 / (1.0 + row.sum().item()))

    def _refine_(
        self,
        merged: Tensor,
        system: System,
        seen: Survey,
        terms: Terms,
        ridge_lambda: float,
        gram_unit: float,
        count: int,
    ) -> None:
        """Add σ̄ U_k V_kᵀ of the top directions of Δ + R, R = Σ D_t(Σ̃_t - Σ̄) with whole D_t."""
        size = min(self.rows, self.columns)
        top = int(size * self.k_frac)
        take, shape = self.buffers.take, (self.rows, self.columns)
        change, factor = take("delta", torch.float64, *shape), take("factor", torch.float64, *shape)
        total, rest = take("sum", torch.float64, *shape).zero_(), take("right", torch.float64, *shape).zero_()
        for delta in self.deltas:
            if delta.index not in seen.used:
                continue
            weight = terms.weight(seen.used.index(delta.index))
            total.add_(seen.scaled_(delta.dense(out=change)))
            centered_(factor.copy_(change))
            if system.stack is None and not by_left_gram(*shape):
                rest.addmm_(change, mirror_(gram_(system.spare, factor)), alpha=weight)
                continue
            for row in range(0, self.rows, BLOCK_ROWS):
                part = slice(row, row + BLOCK_ROWS)
                rest[part].addmm_(change[part] @ factor.mT, factor, alpha=weight)
        if system.stack is None:
            rest.addmm_(total, system.gram, alpha=-1.0 / count)
        else:
            along = total @ system.stack.mT
            along = along if system.roots is None else along.mul_(system.roots).mul_(system.roots)
            rest.addmm_(along, system.stack, alpha=-1.0 / count)
        rest.add_(total, alpha=-ridge_lambda / count).mul_(1.0 / gram_unit).add_(merged)
        self._add_top_directions_(merged, rest, max(1, top))

    def _add_top_directions_(self, merged: Tensor, matrix: Tensor, top: int) -> None:
        wide = matrix if self.rows <= self.columns else matrix.mT
        size = len(wide)
        gram = torch.mm(wide, wide.mT, out=self.buffers.take("small", torch.float64, size, size))
        values, vectors = eigen_(gram)
        singular = values.clamp_(min=0.0).sqrt_()[-top:]
        mean = singular.mean()
        kept = int((singular > _NO_DIRECTION * singular[-1]).sum())
        if not kept:
            return
        vectors = vectors[size - kept :]
        along = torch.mm(vectors, wide, out=self.buffers.take("delta", torch.float64, kept, wide.shape[1]))
        along.mul_((mean / singular[-kept:])[:, None])
        target = merged if self.rows <= self.columns else merged.mT
        target.addmm_(vectors.mT, along)


class _CenteredDelta(Delta):
    def __init__(self, delta: Delta) -> None:
        self.index = delta.index
        self._delta = delta

    def dense(self, out: Tensor | None = None) -> Tensor:
        return centered_(self._delta.dense(out))


class _Centered(Deltas):
    """Every expert's change, less its columns' means."""

    def __init__(self, outer: Deltas) -> None:
        self.name, self.shape, self.whole = outer.name, outer.shape, outer.whole
        self.dtype, self.device, self.experts = outer.dtype, outer.device, outer.experts
        self.facts, self._outer = outer.facts, outer

    def __iter__(self) -> Iterator[Delta]:
        return map(_CenteredDelta, self._outer)

    def base(self) -> Tensor:
        return self._outer.base()

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._outer.empty(*shape, dtype=dtype)
