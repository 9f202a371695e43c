"""Solve M A = N, the system of ACTMat and its relatives, tensor by tensor and one expert at a time.

A = Σ w_t C_t, N = Σ w_t D_t C_t, for the experts' changes D_t = W_t - W_0, [out, in]; C_t = D_tᵀD_t and w_t = 1
unless a method says otherwise.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.errors import MergeError, quoted
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import EPS32, form, may_escalate
from streammerge.solve.covariances import OWN, Measured, Own, Shaped
from streammerge.solve.filters import Filter, cut_at, flow, largest
from streammerge.solve.kept import KeptSystem, kept_bytes
from streammerge.solve.packed import packed_dual, packed_primal, packed_survey
from streammerge.solve.rule import AnchorName, Rule, SolverName
from streammerge.solve.spectral import Equilibrated, Ridge, Spectral
from streammerge.solve.survey import Survey, survey
from streammerge.solve.systems import System, dual, factored_dual, primal
from streammerge.solve.terms import Terms, weights_by_norm
from streammerge_kernels.delta_pack import Packed
from streammerge_kernels.matmul import fast_matmul

# a certificate is within a factor of two of the true error, and the promise is 1e-3
_TRUSTED = 5e-4


def solve_normal_equations(
    deltas: Deltas,
    *,
    solver: SolverName,
    ridge: float = 0.1,
    anchor: AnchorName = "auto",
    weight_exponent: float = 0.0,
    top_k: float = 0.0,
    time: float = 300.0,
    density: float = 1.0,
    center: bool = False,
) -> Tensor:
    """The merged change M of one matrix, always as a change from the base: Θ + (N - ΘA) V diag(f/λ) Vᵀ.

    A = V diag(λ) Vᵀ; by `solver`, with the mean change for Θ but for pinv, which has Θ = 0:
    ridge   M = (N + λD̄)(A + λI)⁻¹, λ = ridge·tr(A)/in, D̄ the mean change: Tikhonov towards the mean;
            below ridge = 8·in·2⁻²³ in float64 where float32 fails or its certificate is above 5e-4. Above it
            in float32 whatever the certificate: 3e-3 was the worst seen, at ridge 0.1 and in = 11008
    pinv    M = N A⁺ without eigenvalues up to in·2⁻²³ of the largest, as float32 `torch.linalg.pinv`
    exact   M = N A⁺, within 1e-3 of float64 wherever A's rank is clear in float64: an equilibrated
            factor in float32, where its certificate is above 5e-4 in float64, where a pivot vanishes
            there too the spectrum cut at in·2⁻⁵². Where eigenvalues lie at that cut (experts equal up
            to float32 rounding, merged low-rank adapters) A⁺ itself is not determined by the weights
    top_k   f = 1 for the ⌈in·top_k⌉ largest eigenvalues, or for top_k 0 as many as the participation ratio
            (Σ√λ)²/Σλ says, else 0; eigenvalues within rounding of zero never count
    flow    f = 1 - exp(-λ·time) for the same eigenvalues, λ of A divided by its trace and times T:
            gradient flow from Θ, ended at `time`

    anchor           Θ = mean D_t, 0 or Σ D_t instead
    weight_exponent  w_t = ‖D_t‖^(-2·weight_exponent)
    density, center  C_t of the largest entries of D_t only, and of those less each column's mean

    Experts that did not change the matrix are left out. With one left, or all the same, what keeps D̄ (all
    solvers but pinv; of one expert also anchor sum) returns its change exactly, unless C_t is of other entries.
    Very small and large deltas are scaled by a power of two, so that none vanish when squared. Works in `deltas.dtype`;
    notes solver, form, certificate (the estimated relative error of the solution, from one refinement step of
    32 rows), what it fell back to, effective_rank (tr(A)²/‖A‖²) and, where all weights are 1 and C_t is of the whole
    D_t, interference: Σ ‖(M - D_t)D_tᵀ‖² over Σ ‖D_tD_tᵀ‖² on 8 rows.

    Returns [out, in] in `deltas.dtype`, in the step's workspace. Raises MergeError for a NaN or an
    infinity, for ridge ≤ 0, and where A + λI stays indefinite in float64.
    """
    rule = Rule(
        solver=solver,
        ridge=ridge,
        anchor=anchor,
        weight_exponent=weight_exponent,
        top_k=top_k,
        time=time,
        density=density,
        center=center,
    )
    return solve_by(deltas, rule)


def solve_by(deltas: Deltas, rule: Rule, measured: Measured | None = None) -> Tensor:
    """The same, with the w_t C_t that were `measured` where they are given; then every expert counts."""
    with fast_matmul() if deltas.device.type == "cpu" else nullcontext():
        return _Solution(deltas, rule, measured).merged()


@dataclass(slots=True, kw_only=True)
class _Solved:
    certificate: float
    rank: int | None = None
    spectral: bool = False


class _Solution:
    """One tensor's way through: survey, system, solver, and a second try in float64."""

    def __init__(self, deltas: Deltas, rule: Rule, measured: Measured | None) -> None:
        self.deltas, self.rule, self.solver, self.measured = deltas, rule, rule.solver, measured
        self.rows, self.columns = deltas.shape
        self.escalates = may_escalate(self.solver, rule.ridge, self.columns, deltas.dtype.itemsize)
        self.buffers = Buffers(deltas, torch.float64 if self.escalates else deltas.dtype)
        shaped = rule.density < 1.0 or rule.center
        shape = Shaped(self.buffers, density=rule.density, center=rule.center) if shaped else OWN
        self.covariances: Own = measured or shape
        # what A does not see is the anchor's: with ridge that is Y's business, else Θ has to be the anchor itself;
        # where nothing is cut and the changes lie in A's range, any Θ does
        self.to_anchor = self.solver in ("pinv", "top_k", "flow") or (
            self.solver == "exact" and self.covariances.factored
        )
        self.anchored = not (self.to_anchor and rule.anchors == "base")
        # the exact solver's form depends on which columns changed, known only after a pass
        is_dual = form(deltas.experts, self.rows, self.columns) == "dual"
        self.one_pass = is_dual and self.solver != "exact" and not self.covariances.factored

    def merged(self) -> Tensor:
        kept = self._recalled()
        if kept is not None:
            return self._finished(kept.system(self.buffers), kept.seen, kept.is_dual)
        looked = None if self.covariances.factored else packed_survey(self.deltas, self.solver)
        packed, seen = looked or (None, self._survey())
        if not seen.used or self._agreed(seen):
            self.deltas.note(
                solver=self.solver if seen.used else "none", form="none", certificate=0.0, escalation="none"
            )
            if seen.rows and seen.used:
                self.deltas.note(interference=0.0)
            return self._only_change(seen, formed=packed is None)
        is_dual = self.one_pass or form(len(seen.used), self.rows, seen.columns) == "dual"
        is_dual = is_dual and self.measured is None
        if self.solver in ("pinv", "top_k", "flow"):
            # taken first at the size that the spectrum needs it in
            size = len(seen.used) * self.rows if is_dual else self.columns
            self.buffers.take("spare", torch.float64, size, size)
        system = (
            self._packed_system(packed, seen, is_dual) if packed else self._system(seen, self.deltas.dtype, is_dual)
        )
        if packed is None:
            self._keep(system, seen, is_dual)
        return self._finished(system, seen, is_dual)

    def _finished(self, system: System, seen: Survey, is_dual: bool) -> Tensor:
        self.deltas.note(effective_rank=system.effective_rank())
        solved, escalation = self._solve(system, seen, last=not self.escalates), "none"
        if solved is None and self.escalates:
            system = self._system(seen, torch.float64, is_dual)
            solved, escalation = self._solve(system, seen, last=True), "float64"
        if solved is None:
            raise MergeError(
                f"{quoted(self.deltas.name)}: the experts' covariance with ridge {self.rule.ridge} is not positive "
                "definite",
                hint="Raise `ridge`, or use `solver: exact`.",
            )
        self._note(seen, solved, is_dual, escalation)
        merged = seen.unscaled_(system.merged())
        self._note_interference(system, seen, merged)
        return self._narrowed(merged, is_dual)

    @property
    def _key(self) -> Rule | None:
        """What a system depends on beside the experts: all but the ridge. None where it is for one merge alone."""
        return None if self.solver != "ridge" or self.measured is not None else replace(self.rule, ridge=1.0)

    def _recalled(self) -> KeptSystem | None:
        found: KeptSystem | None = None if self._key is None else self.deltas.recall(self._key)
        return found

    def _keep(self, system: System, seen: Survey, is_dual: bool) -> None:
        if self._key is not None:
            self.deltas.keep(
                self._key,
                kept_bytes(system),
                lambda copy: KeptSystem.of(system, seen, is_dual=is_dual, copy=copy),
            )

    def _survey(self) -> Survey:
        measured = self.measured
        count_columns = self.solver == "exact" and measured is None
        plain = measured is None and not self.covariances.factored and self.rule.weight_exponent == 0.0
        seen = survey(
            self.deltas,
            self._slot,
            self.buffers,
            count_columns=count_columns,
            covariances=self.covariances,
            sample_rows=plain and self.deltas.device.type == "cpu",
        )
        if measured is not None and seen.used:
            # to have changed nothing counts too, on the inputs that an expert saw
            seen.identical = seen.identical and len(seen.used) == self.deltas.experts
            seen.used = list(range(self.deltas.experts))
            seen.traces, seen.columns = measured.look()
            seen.measured_scale = measured.scale
        return seen

    def _agreed(self, seen: Survey) -> bool:
        """Whether the merged change is that of the first expert, whatever A is."""
        if not seen.identical or (self.covariances.factored and self.measured is None):
            return False
        keeps_one = self.rule.anchors == "sum" and len(seen.used) == 1
        return self.solver == "exact" or self.rule.anchors == "mean" or keeps_one

    def _terms(self, seen: Survey) -> Terms:
        if self.measured is not None:
            total = math.fsum(self.measured.weights)
            shares = tuple(weight / total for weight in self.measured.weights)
            return Terms(experts=len(seen.used), shares=shares if self.rule.anchors == "mean" else None, anchor="base")
        weights = weights_by_norm(seen.energies, self.rule.weight_exponent)
        return Terms(experts=len(seen.used), anchor=self.rule.anchors, weights=weights)

    def _narrowed(self, merged: Tensor, is_dual: bool) -> Tensor:
        if merged.dtype == self.deltas.dtype:
            return merged
        idle = "stack" if is_dual else "delta"
        return self.buffers.take(idle, self.deltas.dtype, self.rows, self.columns).copy_(merged)

    def _only_change(self, seen: Survey, *, formed: bool) -> Tensor:
        """What the used experts agree on; `formed` by the survey, in its first slot."""
        only = self._slot(0) if formed else self.buffers.take("anchor", self.deltas.dtype, self.rows, self.columns)
        if not seen.used:
            return only.zero_()
        for delta in self.deltas if not formed else ():
            if delta.index == seen.used[0]:
                return delta.dense(out=only)
        return only

    def _packed_system(self, packed: Packed, seen: Survey, is_dual: bool) -> System:
        terms = self._terms(seen)
        if is_dual:
            anchored = terms.anchor != "base"
            keep_gram = self.solver != "ridge"
            return packed_dual(packed, seen, self.buffers, anchored=anchored, keep_gram=keep_gram, terms=terms)
        return packed_primal(
            packed,
            seen,
            self.buffers,
            ridge_lambda=self._lambda(seen) * seen.gram_scale,
            terms=terms,
            to_anchor=self.to_anchor and self.anchored,
        )

    def _slot(self, used: int) -> Tensor:
        dtype = self.deltas.dtype
        if not self.one_pass:
            return self.buffers.take("delta" if used else "anchor", dtype, self.rows, self.columns)
        stack = self.buffers.take("stack", dtype, self.deltas.experts * self.rows, self.columns)
        return stack[used * self.rows : (used + 1) * self.rows]

    def _system(self, seen: Survey, dtype: torch.dtype, is_dual: bool) -> System:
        terms = self._terms(seen)
        if not is_dual:
            return primal(
                self.deltas,
                seen,
                dtype,
                self.buffers,
                anchored=self.anchored,
                pulled=self.solver == "ridge",
                terms=terms,
                covariances=self.covariances,
                to_anchor=self.to_anchor and self.anchored,
                formed=self.measured is None,
            )
        if self.covariances.factored:
            return factored_dual(self.deltas, seen, dtype, self.buffers, terms=terms, covariances=self.covariances)
        stack = self.buffers.take("stack", dtype, len(seen.used) * self.rows, self.columns)
        if self.one_pass and dtype == self.deltas.dtype:
            seen.scaled_(stack)
        else:
            for delta in self.deltas:
                if delta.index in seen.used:
                    first = seen.used.index(delta.index) * self.rows
                    seen.scaled_(delta.dense(out=stack[first : first + self.rows]))
        keep_gram = self.solver != "ridge"
        anchored = terms.anchor != "base"
        return dual(stack, self.rows, self.buffers, anchored=anchored, keep_gram=keep_gram, terms=terms)

    def _solve(self, system: System, seen: Survey, *, last: bool) -> _Solved | None:
        """Leave X in `system.right`, or return None where another attempt is needed."""
        ridge_lambda = self._lambda(seen) * seen.gram_scale
        before = system.pull_(ridge_lambda).right[system.sample()]
        if self.solver == "ridge":
            factor = Ridge(system, ridge_lambda)
            if not factor.usable:
                return None
            factor.solve_(system.right)
            certificate = system.certificate(before, factor, ridge_lambda)
            return _Solved(certificate=certificate) if last or certificate <= _TRUSTED else None
        if self.solver == "exact":
            equilibrated = Equilibrated(system)
            if equilibrated.usable:
                equilibrated.solve_(system.right)
                certificate = system.certificate(before, equilibrated, 0.0)
                if last or certificate <= _TRUSTED:
                    return _Solved(certificate=certificate, rank=min(len(system.gram), seen.columns))
            if not last:
                return None
        spectral = Spectral(system, self._filter(system, seen))
        spectral.solve_(system.right)
        certificate = system.certificate(spectral.filtered(before), spectral, 0.0)
        return _Solved(certificate=certificate, rank=spectral.rank, spectral=True)

    def _filter(self, system: System, seen: Survey) -> Filter:
        dtype, top_k = system.gram.dtype, self.rule.top_k
        if self.solver == "top_k":
            return largest(self.columns, top_k, dtype)
        if self.solver == "flow":
            unit = self._trace(seen) * seen.gram_scale / len(seen.used)
            return flow(self.columns, top_k, dtype, self.rule.time / (unit or 1.0))
        return cut_at(self.columns * (torch.finfo(torch.float64).eps if self.solver == "exact" else EPS32))

    def _trace(self, seen: Survey) -> float:
        """tr(A)."""
        weights = weights_by_norm(seen.energies, self.rule.weight_exponent)
        if weights is None and not self.covariances.factored:
            return seen.energy
        return math.fsum(map(math.prod, zip(seen.traces, weights or [1.0] * len(seen.traces), strict=True)))

    def _lambda(self, seen: Survey) -> float:
        # where no C_t has an entry any λ leaves the anchor
        return self.rule.ridge * (self._trace(seen) or 1.0) / self.columns if self.solver == "ridge" else 0.0

    def _note_interference(self, system: System, seen: Survey, merged: Tensor) -> None:
        if seen.rows is None:
            return
        found = seen.rows.interference(merged, lambda change: system.covered(change).div_(seen.gram_scale))
        if found is not None:
            self.deltas.note(interference=found)

    def _note(self, seen: Survey, solved: _Solved, is_dual: bool, escalation: str) -> None:
        if solved.spectral and self.solver == "exact":
            escalation = "float64, spectrum cut"
        self.deltas.note(
            solver=self.solver,
            form="dual" if is_dual else "primal",
            certificate=solved.certificate,
            escalation=escalation,
        )
        if solved.rank is not None:
            self.deltas.note(kept_rank=solved.rank)
        if self.solver == "ridge":
            self.deltas.note(ridge_lambda=self._lambda(seen))
