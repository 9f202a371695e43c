"""Solve M A = N, the system of ACTMat and its relatives, tensor by tensor and one expert at a time.

A = Σ C_t, N = Σ D_t C_t, C_t = D_tᵀD_t for the experts' changes D_t = W_t - W_0, [out, in].
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.errors import MergeError, quoted
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import EPS32, form, may_escalate
from streammerge.solve.packed import packed_dual, packed_primal, packed_survey
from streammerge.solve.spectral import Equilibrated, Ridge, Spectral
from streammerge.solve.survey import Survey, survey
from streammerge.solve.systems import System, dual, primal
from streammerge_kernels.delta_pack import Packed
from streammerge_kernels.matmul import fast_matmul

SolverName = Literal["ridge", "pinv", "exact"]

# a certificate is within a factor of two of the true error, and the promise is 1e-3
_TRUSTED = 5e-4


def solve_normal_equations(deltas: Deltas, *, solver: SolverName, ridge: float) -> Tensor:
    """The merged change M of one matrix, always as a change from the base.

    ridge   M = (N + λD̄)(A + λI)⁻¹, λ = ridge·tr(A)/in, D̄ the mean change: Tikhonov towards the mean;
            below ridge = 8·in·2⁻²³ in float64 where float32 fails or its certificate is above 5e-4
    pinv    M = N A⁺ without eigenvalues up to in·2⁻²³ of the largest, as float32 `torch.linalg.pinv`
    exact   M = N A⁺, within 1e-3 of float64 wherever A's rank is clear in float64: an equilibrated
            factor in float32, where its certificate is above 5e-4 in float64, where a pivot vanishes
            there too the spectrum cut at in·2⁻⁵². Where eigenvalues lie at that cut (experts equal up
            to float32 rounding, merged low-rank adapters) A⁺ itself is not determined by the weights

    Experts that did not change the matrix are left out. With one left, or all the same, `ridge` and
    `exact` return its change exactly. Deltas are scaled by a power of two, so small ones do not vanish
    when squared. Works in `deltas.dtype`; notes solver, form, certificate (the estimated relative
    error of the solution, from one refinement step of 32 rows) and what it fell back to.

    Returns [out, in] in `deltas.dtype`, in the step's workspace. Raises MergeError for a NaN or an
    infinity, for ridge ≤ 0, and where A + λI stays indefinite in float64.
    """
    if solver == "ridge" and not ridge > 0.0:
        raise MergeError(f"ridge is {ridge}, expected more than 0", hint="Use `solver: exact` for no ridge at all.")
    with fast_matmul() if deltas.device.type == "cpu" else nullcontext():
        return _Solution(deltas, solver, ridge).merged()


@dataclass(slots=True, kw_only=True)
class _Solved:
    certificate: float
    rank: int | None = None
    spectral: bool = False


class _Solution:
    """One tensor's way through: survey, system, solver, and a second try in float64."""

    def __init__(self, deltas: Deltas, solver: SolverName, ridge: float) -> None:
        self.deltas, self.solver, self.ridge = deltas, solver, ridge
        self.rows, self.columns = deltas.shape
        self.escalates = may_escalate(solver, ridge, self.columns, deltas.dtype.itemsize)
        self.buffers = Buffers(deltas, torch.float64 if self.escalates else deltas.dtype)
        self.anchored = solver != "pinv"
        # the exact solver's form depends on which columns changed, known only after a pass
        self.one_pass = form(deltas.experts, self.rows, self.columns) == "dual" and solver != "exact"

    def merged(self) -> Tensor:
        looked = packed_survey(self.deltas, self.solver)
        packed, seen = looked or (
            None,
            survey(self.deltas, self._slot, self.buffers, count_columns=self.solver == "exact"),
        )
        if not seen.used or (seen.identical and self.anchored):
            self.deltas.note(
                solver=self.solver if seen.used else "none", form="none", certificate=0.0, escalation="none"
            )
            return self._only_change(seen, formed=packed is None)
        is_dual = self.one_pass or form(len(seen.used), self.rows, seen.columns) == "dual"
        if self.solver == "pinv":
            # taken first at the size that the spectrum needs it in
            size = len(seen.used) * self.rows if is_dual else self.columns
            self.buffers.take("spare", torch.float64, size, size)
        system = (
            self._packed_system(packed, seen, is_dual) if packed else self._system(seen, self.deltas.dtype, is_dual)
        )
        solved, escalation = self._solve(system, seen, last=not self.escalates), "none"
        if solved is None and self.escalates:
            system = self._system(seen, torch.float64, is_dual)
            solved, escalation = self._solve(system, seen, last=True), "float64"
        if solved is None:
            raise MergeError(
                f"{quoted(self.deltas.name)}: the experts' covariance with ridge {self.ridge} is not positive definite",
                hint="Raise `ridge`, or use `solver: exact`.",
            )
        self._note(seen, solved, is_dual, escalation)
        merged = system.merged().mul_(1.0 / seen.scale)
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
        if is_dual:
            return packed_dual(packed, seen, self.buffers, anchored=self.anchored, keep_gram=self.solver != "ridge")
        return packed_primal(packed, seen, self.buffers, ridge_lambda=self._lambda(seen) * seen.scale**2)

    def _slot(self, used: int) -> Tensor:
        dtype = self.deltas.dtype
        if not self.one_pass:
            return self.buffers.take("delta" if used else "anchor", dtype, self.rows, self.columns)
        stack = self.buffers.take("stack", dtype, self.deltas.experts * self.rows, self.columns)
        return stack[used * self.rows : (used + 1) * self.rows]

    def _system(self, seen: Survey, dtype: torch.dtype, is_dual: bool) -> System:
        if not is_dual:
            pull = self._lambda(seen) * seen.scale**2
            return primal(self.deltas, seen, dtype, self.buffers, ridge_lambda=pull, anchored=self.anchored)
        stack = self.buffers.take("stack", dtype, len(seen.used) * self.rows, self.columns)
        if self.one_pass and dtype == self.deltas.dtype:
            stack.mul_(seen.scale)
        else:
            for delta in self.deltas:
                if delta.index in seen.used:
                    first = seen.used.index(delta.index) * self.rows
                    delta.dense(out=stack[first : first + self.rows]).mul_(seen.scale)
        keep_gram = self.solver != "ridge"
        return dual(stack, self.rows, self.buffers, anchored=self.anchored, keep_gram=keep_gram)

    def _solve(self, system: System, seen: Survey, *, last: bool) -> _Solved | None:
        """Leave X in `system.right`, or return None where another attempt is needed."""
        before = system.right[system.sample()]
        if self.solver == "ridge":
            ridge_lambda = self._lambda(seen) * seen.scale**2
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
            cut = self.columns * torch.finfo(torch.float64).eps
        else:
            cut = self.columns * EPS32
        spectral = Spectral(system, cut)
        spectral.solve_(system.right)
        certificate = system.certificate(before, spectral, 0.0)
        return _Solved(certificate=certificate, rank=spectral.rank, spectral=True)

    def _lambda(self, seen: Survey) -> float:
        return self.ridge * seen.energy / self.columns if self.solver == "ridge" else 0.0

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
