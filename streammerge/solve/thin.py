"""Merge low-rank changes D_t = B_t A_t without forming them: the systems have as many rows as all ranks together.

Every function here takes the experts' factors and a method's settings and gives the merged change as factors too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streammerge.delta import PerExpert
from streammerge.errors import MergeError, quoted
from streammerge.solve.cost import EPS32
from streammerge.solve.filters import Filter, cut_at, flow, largest
from streammerge.solve.rule import AnchorName, Rule, SolverName
from streammerge.solve.shares import normalized
from streammerge.solve.terms import Terms, weights_by_norm

_EPS64 = 2.0**-52


class Factors(NamedTuple):
    """A change [out, in] as `left` [out, k] by `right` [k, in]."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """k."""
        return len(self.right)


@dataclass(slots=True, kw_only=True)
class ThinDeltas:
    """The experts' changes of one matrix as factors in float64, as `Deltas` are in full.

    name, shape  of the matrix, [out, in]
    experts      one for each, of rank 0 where it changed nothing
    dtype        of the arithmetic that the merged change is added in
    energies     ‖D_t‖² of each, once a method looked
    """

    name: str
    shape: tuple[int, int]
    experts: Sequence[Factors]
    dtype: torch.dtype = torch.float32
    facts: dict[str, float | int | str | bool] = field(default_factory=dict)
    energies: list[float] = field(default_factory=list)

    def nothing(self) -> Factors:
        """No change."""
        rows, columns = self.shape
        return Factors(torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64))


def normal_equations(
    deltas: ThinDeltas, *, solver: SolverName = "ridge", pool: str = "none", adapters: str = "trust", **settings: Any
) -> Factors:
    """What `solve_normal_equations` gives for the changes in full, its settings and its anchors.

    With B_t = Q_t T_t, Q_t orthonormal, D_t is Q_t R_t, R_t = T_t A_t; stacked with √w_t, R = L V₀ = U σ Wᵀ V₀, V₀
    orthonormal. So A = Σ w_t D_tᵀD_t has the eigenvalues σ² and, as rows, the eigenvectors V = Wᵀ V₀, and

        Δ = [Z + (Y - Z R Rᵀ) U f/σ² Uᵀ] R,   Y = [Q_t √w_t R_t R_tᵀ],   Z = [Q_t a_t/√w_t]

    with the filter f of each solver, σ²/(σ² + λ) for ridge, and the anchor Σ a_t D_t = Z R. Orthogonal
    decompositions throughout: nothing is squared before its spectrum is known, so factors may be ill-conditioned,
    deficient or zero.

    Notes solver, form `thin`, certificate (the rounding of float64 times the condition of what was solved) and rank.
    """
    del pool, adapters
    rule = Rule(solver=solver, **settings)
    orthogonal = [_orthogonal(each) for each in deltas.experts]
    deltas.energies = [float(each.right.square().sum()) for each in orthogonal]
    if not all(map(math.isfinite, deltas.energies)):
        bad = next(number for number, energy in enumerate(deltas.energies) if not math.isfinite(energy))
        raise MergeError(
            f"{quoted(deltas.name)}: the change made by expert {bad} is not finite, or too large to square",
            hint="Look at this adapter's weights: its training diverged.",
        )
    used = [number for number, energy in enumerate(deltas.energies) if energy > 0.0]
    if not used or _agreed(rule, [deltas.experts[number] for number in used]):
        deltas.facts.update(solver=rule.solver if used else "none", form="none", certificate=0.0, escalation="none")
        return deltas.experts[used[0]] if used else deltas.nothing()
    return _solved(deltas, rule, [orthogonal[n] for n in used], [deltas.energies[n] for n in used])


def wudi(
    deltas: ThinDeltas,
    *,
    solver: SolverName = "ridge",
    ridge: float = 0.1,
    iterations: int = 0,
    learning_rate: float = 1e-5,
    lambda_: float = 1.0,
    pool: str = "none",
) -> Factors:
    """What the method of that name gives without a descent."""
    del learning_rate, pool
    assert not iterations, "a descent has no thin form"
    anchor: AnchorName = "sum" if solver == "ridge" else "auto"
    return _scaled(normal_equations(deltas, solver=solver, ridge=ridge, anchor=anchor, weight_exponent=1.0), lambda_)


def swudi(
    deltas: ThinDeltas,
    *,
    time: float = 300.0,
    top_k: float = 0.65,
    anchor: AnchorName = "sum",
    lambda_: float = 1.0,
    pool: str = "none",
) -> Factors:
    """What the method of that name gives."""
    del pool
    merged = normal_equations(deltas, solver="flow", anchor=anchor, weight_exponent=1.0, top_k=top_k, time=time)
    return _scaled(merged, lambda_)


def aswudi(
    deltas: ThinDeltas, *, top_k: float = 0.0, anchor: AnchorName = "sum", lambda_: float = 1.0, pool: str = "none"
) -> Factors:
    """What the method of that name gives."""
    del pool
    return _scaled(normal_equations(deltas, solver="top_k", anchor=anchor, weight_exponent=1.0, top_k=top_k), lambda_)


def linear(deltas: ThinDeltas, *, weight: PerExpert = 1.0, normalize: bool = True) -> Factors:
    """The weighted mean of the changes, of weights that leave one base."""
    return _sum(deltas, _weights(deltas, weight, normalize))


def task_arithmetic(
    deltas: ThinDeltas, *, weight: PerExpert = 1.0, normalize: bool = False, lambda_: float = 1.0
) -> Factors:
    """The weighted sum of the changes."""
    return _sum(deltas, [share * lambda_ for share in _weights(deltas, weight, normalize)])


def _weights(deltas: ThinDeltas, weight: PerExpert, normalize: bool) -> list[float]:
    count = len(deltas.experts)
    weights = [float(weight)] * count if isinstance(weight, (int, float)) else [float(each) for each in weight]
    return normalized(weights) if normalize else weights


def _sum(deltas: ThinDeltas, weights: Sequence[float]) -> Factors:
    used = [(each, weight) for each, weight in zip(deltas.experts, weights, strict=True) if each.rank and weight]
    if not used:
        return deltas.nothing()
    left = torch.cat([each.left * weight for each, weight in used], dim=1)
    return Factors(left, torch.cat([each.right for each, _ in used]))


def _scaled(factors: Factors, factor: float) -> Factors:
    return Factors(factors.left * factor, factors.right)


def _solved(deltas: ThinDeltas, rule: Rule, experts: Sequence[Factors], energies: Sequence[float]) -> Factors:
    columns = deltas.shape[1]
    weights = weights_by_norm(energies, rule.weight_exponent)
    terms = Terms(experts=len(experts), anchor=rule.anchors, weights=weights)
    roots = [math.sqrt(terms.weight(number)) for number in range(len(experts))]
    rows = torch.cat([each.right * root for each, root in zip(experts, roots, strict=True)])
    # [columns, k] = V₀ᵀ Lᵀ
    basis, triangle = torch.linalg.qr(rows.mT)
    try:
        u, sigma, w = torch.linalg.svd(triangle.mT, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MergeError(
            f"{quoted(deltas.name)}: the spectrum of the experts' covariance did not converge", hint="Use `linear`."
        ) from error
    eigenvalues = sigma.square()
    trace = math.fsum(energy * terms.weight(number) for number, energy in enumerate(energies))
    divisors, facts = _divisors(rule, eigenvalues, trace, columns, len(experts), deltas.dtype)
    pushed, anchored = torch.zeros_like(u), torch.zeros_like(u)
    start = 0
    for number, (each, root) in enumerate(zip(experts, roots, strict=True)):
        own = slice(start, start + each.rank)
        pushed[own] = root * (each.right @ each.right.mT) @ u[own]
        anchored[own] = terms.share(number) / root * u[own]
        start = own.stop
    kept = torch.isfinite(divisors)
    core = anchored + torch.where(kept, (pushed - anchored * eigenvalues) / divisors, 0.0)
    left = torch.cat([each.left for each in experts], dim=1) @ (core * sigma)
    largest_kept, least_kept = (
        (float(divisors[kept].max()), float(divisors[kept].min())) if bool(kept.any()) else (1.0, 1.0)
    )
    deltas.facts.update(
        solver=rule.solver, form="thin", certificate=_EPS64 * largest_kept / least_kept, escalation="none", **facts
    )
    return Factors(left, w @ basis.mT)


def _divisors(
    rule: Rule, eigenvalues: Tensor, trace: float, columns: int, experts: int, dtype: torch.dtype
) -> tuple[Tensor, dict[str, float | int]]:
    """λ/f for each eigenvalue, descending as they come; infinite where f is 0. And what the report says of it."""
    if rule.solver == "ridge":
        ridge_lambda = rule.ridge * (trace or 1.0) / columns
        return eigenvalues + ridge_lambda, {"ridge_lambda": ridge_lambda}
    # the covariance's own spectrum, ascending: zeros where no expert changed anything
    whole = torch.zeros(columns, dtype=torch.float64)
    whole[columns - len(eigenvalues) :] = eigenvalues.flip(0)
    select: Filter
    if rule.solver == "top_k":
        select = largest(columns, rule.top_k, dtype)
    elif rule.solver == "flow":
        select = flow(columns, rule.top_k, dtype, rule.time * experts / (trace or 1.0))
    else:
        select = cut_at(columns * (_EPS64 if rule.solver == "exact" else EPS32))
    found = select(whole).flip(0)[: len(eigenvalues)]
    divisors = torch.full_like(eigenvalues, math.inf)
    divisors[: len(found)] = found
    return divisors, {"kept_rank": len(found)}


def _orthogonal(factors: Factors) -> Factors:
    """The same change with orthonormal columns on the left: Q R, by Householder's reflections."""
    if factors.rank == 0:
        return factors
    q, triangle = torch.linalg.qr(factors.left)
    return Factors(q, triangle @ factors.right)


def _agreed(rule: Rule, used: Sequence[Factors]) -> bool:
    """Whether the merged change is that of the first expert, whatever A is; see `solve.normal_equations`."""
    same = all(
        one.left.shape == used[0].left.shape
        and torch.equal(one.left, used[0].left)
        and torch.equal(one.right, used[0].right)
        for one in used[1:]
    )
    keeps_one = rule.anchors == "sum" and len(used) == 1
    return same and (rule.solver == "exact" or rule.anchors == "mean" or keeps_one)


def shortened(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest change of that rank, or the change itself where it has no more, filled up with zeros to the rank.

    Returns it and how far it is from what came: the norm of the difference over the norm, both Frobenius.
    """
    left, right = factors
    if factors.rank <= rank:
        missing = rank - factors.rank
        more = Factors(left.new_zeros(len(left), missing), right.new_zeros(missing, right.shape[1]))
        return Factors(torch.cat([left, more.left], dim=1), torch.cat([right, more.right])), 0.0
    (one, upper), (other, lower) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, sigma, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    total = torch.linalg.vector_norm(sigma).item()
    error = torch.linalg.vector_norm(sigma[rank:]).item() / total if total else 0.0
    # both factors of one size, as a trained adapter's are after a while
    root = sigma[:rank].sqrt()
    short = Factors(one @ (u[:, :rank] * root), root[:, None] * v[:rank] @ other.mT)
    # fewer rows or columns than the rank
    return shortened(short, rank)[0] if short.rank < rank else short, error
