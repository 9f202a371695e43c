"""The linear system of the covariance methods, X H = Y, in its two forms.

m rows (out), n columns (in), T experts with a change, S = [D_1; …; D_T] their deltas stacked, Θ the anchor:
primal  H = A = Σ D_tᵀD_t  [n, n],  Y = Σ (D_t - Θ)(D_tᵀD_t + λ/T)  [m, n],  Δ = Θ + X,    Θ = D_1
dual    H = S Sᵀ  [T·m, T·m],       Y_t = (D_t - Θ) D_tᵀ  [m, T·m],          Δ = Θ + X S,  Θ = mean D_t
With X = Y (H + λ)⁻¹ both are (N + λ·mean D_t)(A + λ)⁻¹. The primal form saves the product of the expert that
is its anchor; in the dual form, where products cost less, λ drops out of Y. Θ = 0 leaves N itself.

In general A = Σ w_t F_tᵀF_t, F_t being D_t itself or what a covariance is made of instead, and Θ₀ = Σ a_t D_t
is what is kept where A says nothing: `terms` and `covariances`. The primal Y then is Σ w_t (D_t - Θ) F_tᵀF_t +
λ(Θ₀ - Θ), whose second part is added when λ is known: all else serves many λ. Or, with `to_anchor`, Θ itself
becomes Θ₀ afterwards: what a filter other than λ's needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import BLOCK_ROWS, by_left_gram
from streammerge.solve.covariances import OWN, Own
from streammerge.solve.survey import Survey
from streammerge.solve.terms import Terms
from streammerge_kernels.gram import add_gram_, add_lower_, gram_, mirror_
from streammerge_kernels.moment import add_product_


class Solver(Protocol):
    """Replaces rows [r, k] by rows · H⁻¹, in place, or by what it takes for the inverse."""

    def solve_(self, right: Tensor) -> Tensor: ...


@dataclass(slots=True, kw_only=True)
class System:
    """X H = Y and what turns X into the merged delta.

    anchor   [m, n]  Θ, or None for zero
    gram     [k, k]  H, both triangles
    right    [m, k]  Y; a solver leaves X here
    spare    [k, k]  memory for a factor; H's own where H is not needed after it was factored
    stack    [k, n]  S of the dual form, else None; float16 where it comes packed
    buffers  where more memory comes from
    roots    [k]     √w_t of each row of the stack that it does not hold itself; None where all are 1
    way      [m, n]  Θ₀ - Θ, in the spare's memory where it fits; None where λ does not pull

    All others are in one dtype, and all are multiplied by the survey's scale.
    """

    anchor: Tensor | None
    gram: Tensor
    right: Tensor
    spare: Tensor
    stack: Tensor | None
    buffers: Buffers
    roots: Tensor | None = None
    way: Tensor | None = None

    def pull_(self, ridge_lambda: float) -> System:
        """Add λ's part to Y. Before a factor takes the spare's memory."""
        if self.way is not None:
            self.right.add_(self.way, alpha=ridge_lambda)
            self.way = None
        return self

    def weighted_(self, terms: Terms) -> System:
        """Give the dual form its weights: S's rows count √w_t, in H and Y, but stay as they are."""
        if terms.weights is not None:
            roots = torch.tensor(terms.weights, dtype=torch.float64).sqrt_()
            rows = len(self.gram) // len(roots)
            self.roots = roots.repeat_interleave(rows).to(self.gram.device, self.gram.dtype)
            self.gram.mul_(self.roots).mul_(self.roots[:, None])
            self.right.mul_(self.roots)
        return self

    def sample(self) -> Tensor:
        """Indices of at most 32 rows, evenly spread."""
        rows = len(self.right)
        count = min(32, rows)
        return torch.arange(count) * rows // count

    def product(self, x: Tensor) -> Tensor:
        """x [r, k] · H, without H in the dual form: it may have been factored in place."""
        if self.stack is None:
            return x @ self.gram
        product = _times(self.spread(x), self.stack.mT)
        return product if self.roots is None else product.mul_(self.roots)

    def spread(self, x: Tensor) -> Tensor:
        """x [r, k] in terms of the matrix's own columns: [r, n]."""
        if self.stack is None:
            return x
        return _times(x if self.roots is None else x * self.roots, self.stack)

    def covered(self, x: Tensor) -> Tensor:
        """x [r, n] · A, for weights of 1."""
        return x @ self.gram if self.stack is None else _times(_times(x, self.stack.mT), self.stack)

    def effective_rank(self) -> float:
        """tr(A)² / ‖A‖²: over how many directions the changes spread. Before a factor takes H's memory."""
        norm = torch.linalg.vector_norm(self.gram).item()
        return (self.gram.diagonal().sum().item() / norm) ** 2 if norm else 0.0

    def certificate(self, right: Tensor, solver: Solver, ridge_lambda: float) -> float:
        """Relative size of one refinement step on the sampled rows: it estimates the error of X.

        right  [r, k]  the sampled rows of Y, as they were before X replaced it
        """
        rows = self.sample()
        x = self.right[rows]
        residual = right - self.product(x) - ridge_lambda * x
        spread = self.spread(x)
        size = (spread if self.anchor is None else self.anchor[rows] + spread).norm().item()
        step = self.spread(solver.solve_(residual)).norm().item()
        return 0.0 if step == 0.0 else step / size if size > 0.0 else float("inf")

    def merged(self) -> Tensor:
        """Δ [m, n], in the anchor's memory or X's; X must lie in `right`."""
        if self.stack is None:
            return self.right if self.anchor is None else self.anchor.add_(self.right)
        if self.anchor is None:
            return self.spread(self.right)
        if self.roots is not None:
            self.right.mul_(self.roots)
        return add_product_(self.anchor, self.right, self.stack)


def _times(x: Tensor, stack: Tensor) -> Tensor:
    if stack.dtype == x.dtype:
        return x @ stack
    return add_product_(x.new_zeros(len(x), stack.shape[1]), x, stack)


def primal(
    deltas: Deltas,
    seen: Survey,
    dtype: torch.dtype,
    buffers: Buffers,
    *,
    anchored: bool,
    pulled: bool = False,
    left: bool | None = None,
    terms: Terms | None = None,
    covariances: Own = OWN,
    to_anchor: bool = False,
    formed: bool = True,
) -> System:
    """Read the experts again and add up A and Y.

    Each product by the cheaper of E (DᵀD) and (E Dᵀ) D unless `left` says. `anchored` takes the first
    used expert's change for Θ, which the survey left in buffer "anchor" if `formed`; else Θ is zero.
    Without `terms` Θ₀ is the mean and all weights are 1. `pulled` leaves Y to be pulled by λ; `to_anchor`
    moves Θ on to Θ₀.
    """
    rows, columns = deltas.shape
    left = (by_left_gram(rows, columns) if left is None else left) and not covariances.given
    terms = terms or Terms(experts=len(seen.used))
    anchor = buffers.take("anchor", dtype, rows, columns)
    if not anchored:
        anchor.zero_()
    change = buffers.take("delta", dtype, rows, columns)
    right = buffers.take("right", dtype, rows, columns)
    gram = buffers.take("gram", dtype, columns, columns)
    if not anchored or covariances.given:
        gram.zero_()
    spare = buffers.take("spare", dtype, columns, columns)
    way: Tensor | None = None
    if pulled or to_anchor:
        # products by the left need no memory for a Gram of their own
        way = buffers.take("spare" if left else "way", dtype, rows, columns).zero_()
    # of what memory held before, nothing; then of the sum
    beta = 0.0
    for delta in deltas:
        if delta.index not in seen.used:
            continue
        number = seen.used.index(delta.index)
        weight, share = terms.weight(number), terms.share(number)
        if anchored and number == 0:
            if dtype != deltas.dtype or not formed:
                delta.dense(out=anchor)
            seen.scaled_(anchor)
            if covariances.given:
                gram.add_(covariances.fill_(spare, anchor, delta.index), alpha=weight)
            else:
                gram_(gram, covariances.factor(anchor))
                if weight != 1.0:
                    gram.mul_(weight)
            continue
        seen.scaled_(delta.dense(out=change))
        if left:
            factor = covariances.factor(change)
            _add_by_left_gram(right, way, change, factor, anchor, weight, share, buffers, beta=beta)
            add_gram_(gram, factor if weight == 1.0 else factor.mul_(math.sqrt(weight)))
        else:
            covariances.fill_(spare, change, delta.index)
            add_lower_(gram, spare if weight == 1.0 else spare.mul_(weight))
            right.addmm_(change.sub_(anchor), spare, beta=beta)
            if way is not None:
                way.add_(change, alpha=share)
        beta = 1.0
    if beta == 0.0:
        right.zero_()
    mirror_(gram)
    if way is not None and anchored and terms.surplus:
        way.add_(anchor, alpha=terms.surplus)
    if way is not None and to_anchor:
        right.addmm_(way, gram, alpha=-1.0)
        anchor.add_(way)
    return System(
        anchor=anchor, gram=gram, right=right, spare=spare, stack=None, buffers=buffers, way=way if pulled else None
    )


def _add_by_left_gram(
    right: Tensor,
    way: Tensor | None,
    change: Tensor,
    factor: Tensor,
    anchor: Tensor,
    weight: float,
    share: float,
    buffers: Buffers,
    *,
    beta: float,
) -> None:
    rows, columns = change.shape
    height = min(BLOCK_ROWS, rows)
    block = buffers.take("block", change.dtype, height, columns)
    products = buffers.take("products", change.dtype, height, rows)
    for row in range(0, rows, BLOCK_ROWS):
        part = slice(row, min(row + BLOCK_ROWS, rows))
        off_anchor = torch.sub(change[part], anchor[part], out=block[: part.stop - row])
        if way is not None:
            way[part].add_(off_anchor, alpha=share)
        across = torch.mm(off_anchor, factor.mT, out=products[: part.stop - row])
        right[part].addmm_(across, factor, alpha=weight, beta=beta)


def dual(
    stack: Tensor, rows: int, buffers: Buffers, *, anchored: bool, keep_gram: bool, terms: Terms | None = None
) -> System:
    """Form K = S Sᵀ and Y from the stacked, scaled deltas.

    stack      [T·rows, n]
    anchored   Θ is the deltas' mean, or `terms`' anchor; else zero
    keep_gram  the factor gets memory of its own
    """
    dtype, (size, columns) = stack.dtype, stack.shape
    gram = mirror_(gram_(buffers.take("gram", dtype, size, size), stack.mT))
    spare = buffers.take("spare", dtype, size, size) if keep_gram else gram
    right = buffers.take("right", dtype, rows, size)
    block = buffers.take("block", dtype, min(BLOCK_ROWS, rows), columns)
    anchor = buffers.take("anchor", dtype, rows, columns).zero_()
    changes = stack.view(-1, rows, columns)
    for row in range(0, rows, BLOCK_ROWS):
        part = slice(row, min(row + BLOCK_ROWS, rows))
        off_anchor = block[: part.stop - row]
        for count, change in enumerate(changes if anchored else (), start=1):
            if terms is None or (terms.anchor == "mean" and terms.shares is None):
                anchor[part].add_(torch.sub(change[part], anchor[part], out=off_anchor), alpha=1.0 / count)
            else:
                anchor[part].add_(change[part], alpha=terms.share(count - 1))
        for number, change in enumerate(changes):
            torch.sub(change[part], anchor[part], out=off_anchor)
            torch.mm(off_anchor, change.mT, out=right[part, number * rows : (number + 1) * rows])
    system = System(anchor=anchor, gram=gram, right=right, spare=spare, stack=stack, buffers=buffers)
    return system if terms is None else system.weighted_(terms)


def factored_dual(
    deltas: Deltas, seen: Survey, dtype: torch.dtype, buffers: Buffers, *, terms: Terms, covariances: Own
) -> System:
    """The dual form where S is not of the deltas themselves: S_t = F_t, Y_t = (D_t - Θ₀) F_tᵀ. Reads the experts."""
    (rows, columns), size = deltas.shape, len(seen.used) * deltas.shape[0]
    stack = buffers.take("stack", dtype, size, columns)
    change = buffers.take("delta", dtype, rows, columns)
    anchor = buffers.take("anchor", dtype, rows, columns).zero_()
    right = buffers.take("right", dtype, rows, size)
    for delta in deltas:
        if delta.index not in seen.used:
            continue
        number = seen.used.index(delta.index)
        part = slice(number * rows, (number + 1) * rows)
        seen.scaled_(delta.dense(out=change))
        stack[part] = covariances.factor(change)
        torch.mm(change, stack[part].mT, out=right[:, part])
        anchor.add_(change, alpha=terms.share(number))
    right.addmm_(anchor, stack.mT, alpha=-1.0)
    gram = mirror_(gram_(buffers.take("gram", dtype, size, size), stack.mT))
    spare = buffers.take("spare", dtype, size, size)
    system = System(anchor=anchor, gram=gram, right=right, spare=spare, stack=stack, buffers=buffers)
    return system.weighted_(terms)
