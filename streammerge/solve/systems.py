"""The linear system of the covariance methods, X H = Y, in its two forms.

m rows (out), n columns (in), T experts with a change, S = [D_1; …; D_T] their deltas stacked, Θ the anchor:
primal  H = A = Σ D_tᵀD_t  [n, n],  Y = Σ (D_t - Θ)(D_tᵀD_t + λ/T)  [m, n],  Δ = Θ + X,    Θ = D_1
dual    H = S Sᵀ  [T·m, T·m],       Y_t = (D_t - Θ) D_tᵀ  [m, T·m],          Δ = Θ + X S,  Θ = mean D_t
With X = Y (H + λ)⁻¹ both are (N + λ·mean D_t)(A + λ)⁻¹. The primal form saves the product of the expert that
is its anchor; in the dual form, where products cost less, λ drops out of Y. Θ = 0 leaves N itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streammerge.delta import Deltas
from streammerge.solve.buffers import Buffers
from streammerge.solve.cost import BLOCK_ROWS, by_left_gram
from streammerge.solve.survey import Survey
from streammerge_kernels.gram import add_gram_, mirror_
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

    All others are in one dtype, and all are multiplied by the survey's scale.
    """

    anchor: Tensor | None
    gram: Tensor
    right: Tensor
    spare: Tensor
    stack: Tensor | None
    buffers: Buffers

    def sample(self) -> Tensor:
        """Indices of at most 32 rows, evenly spread."""
        rows = len(self.right)
        count = min(32, rows)
        return torch.arange(count) * rows // count

    def product(self, x: Tensor) -> Tensor:
        """x [r, k] · H, without H in the dual form: it may have been factored in place."""
        return x @ self.gram if self.stack is None else _times(self.spread(x), self.stack.mT)

    def spread(self, x: Tensor) -> Tensor:
        """x [r, k] in terms of the matrix's own columns: [r, n]."""
        return x if self.stack is None else _times(x, self.stack)

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
    ridge_lambda: float,
    anchored: bool,
    left: bool | None = None,
) -> System:
    """Read the experts again and add up A and Y.

    Each product by the cheaper of E (DᵀD) and (E Dᵀ) D unless `left` says. `anchored` takes the first
    used expert's change for Θ, which the survey left in buffer "anchor"; else Θ is zero, and λ has to be.
    """
    rows, columns = deltas.shape
    left = by_left_gram(rows, columns) if left is None else left
    anchor = buffers.take("anchor", dtype, rows, columns)
    if not anchored:
        anchor.zero_()
    change = buffers.take("delta", dtype, rows, columns)
    right = buffers.take("right", dtype, rows, columns).zero_()
    gram = buffers.take("gram", dtype, columns, columns).zero_()
    spare = buffers.take("spare", dtype, columns, columns)
    pull = ridge_lambda / len(seen.used)
    for delta in deltas:
        if delta.index not in seen.used:
            continue
        if anchored and delta.index == seen.used[0]:
            if dtype != deltas.dtype:
                delta.dense(out=anchor)
            add_gram_(gram, anchor.mul_(seen.scale))
            continue
        delta.dense(out=change).mul_(seen.scale)
        if left:
            add_gram_(gram, change)
            _add_by_left_gram(right, change, anchor, pull, buffers)
        else:
            gram.add_(mirror_(add_gram_(spare.zero_(), change)))
            spare.diagonal().add_(pull)
            right.addmm_(change.sub_(anchor), spare)
    mirror_(gram)
    return System(anchor=anchor, gram=gram, right=right, spare=spare, stack=None, buffers=buffers)


def _add_by_left_gram(right: Tensor, change: Tensor, anchor: Tensor, pull: float, buffers: Buffers) -> None:
    rows, columns = change.shape
    height = min(BLOCK_ROWS, rows)
    block = buffers.take("block", change.dtype, height, columns)
    products = buffers.take("products", change.dtype, height, rows)
    for row in range(0, rows, BLOCK_ROWS):
        part = slice(row, min(row + BLOCK_ROWS, rows))
        off_anchor = torch.sub(change[part], anchor[part], out=block[: part.stop - row])
        across = torch.mm(off_anchor, change.mT, out=products[: part.stop - row])
        right[part].add_(off_anchor, alpha=pull).addmm_(across, change)


def dual(stack: Tensor, rows: int, buffers: Buffers, *, anchored: bool, keep_gram: bool) -> System:
    """Form K = S Sᵀ and Y from the stacked, scaled deltas.

    stack      [T·rows, n]
    anchored   Θ is the deltas' mean, else zero
    keep_gram  the factor gets memory of its own
    """
    dtype, (size, columns) = stack.dtype, stack.shape
    gram = mirror_(add_gram_(buffers.take("gram", dtype, size, size).zero_(), stack.mT))
    spare = buffers.take("spare", dtype, size, size) if keep_gram else gram
    right = buffers.take("right", dtype, rows, size)
    block = buffers.take("block", dtype, min(BLOCK_ROWS, rows), columns)
    anchor = buffers.take("anchor", dtype, rows, columns).zero_()
    changes = stack.view(-1, rows, columns)
    for row in range(0, rows, BLOCK_ROWS):
        part = slice(row, min(row + BLOCK_ROWS, rows))
        off_anchor = block[: part.stop - row]
        for count, change in enumerate(changes if anchored else (), start=1):
            anchor[part].add_(torch.sub(change[part], anchor[part], out=off_anchor), alpha=1.0 / count)
        for number, change in enumerate(changes):
            torch.sub(change[part], anchor[part], out=off_anchor)
            torch.mm(off_anchor, change.mT, out=right[part, number * rows : (number + 1) * rows])
    return System(anchor=anchor, gram=gram, right=right, spare=spare, stack=stack, buffers=buffers)
