"""Gram and moment of one expert straight from stored weights, whose bytes are read by one kernel only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streammerge_kernels.choice import twin
from streammerge_kernels.delta_pack import SCALE, delta_pack
from streammerge_kernels.gram import add_gram_, mirror_
from streammerge_kernels.moment import add_moment_

_STORED = (torch.bfloat16, torch.float16, torch.float32)


def add_gram_and_moment_(
    gram: Tensor,
    moment: Tensor,
    base: Tensor,
    expert: Tensor,
    *,
    of: Literal["change", "weights"] = "change",
    scratch: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add DᵀD to `gram` and D DᵀD to `moment`, where D = expert - base; returns both.

    gram     [n, n]  float32, gains 2²⁴ DᵀD on and below the diagonal; what lies above is left in no particular state
    moment   [m, n]  float32, gains 2³⁶ D DᵀD; of="weights": 2³⁶ expert · DᵀD
    base     [m, n]  bfloat16, float16 or float32, any strides
    expert   [m, n]  one of these dtypes, not necessarily the base's, any strides
    scratch  [n, n]  float32 with adjacent columns: becomes 2²⁴ DᵀD, both triangles; None for a new tensor
    packed   [m, n]  float16 with adjacent columns: becomes D · 2¹² to nearest; None for a new tensor

    D enters both products as packed, so |D| of 16 or more makes them infinite or NaN; nothing is counted
    here. of="weights" adds two moments, (packed D) DᵀD and base · DᵀD: the base is the larger by far, so
    the sum carries float32's error relative to the weights, not to the change. The reference takes the
    base as float32. The twin takes base · 2¹² as float16, which is exact for bfloat16 and float16 where
    2⁻²⁶ ≤ |base| < 16 (below, off by 2⁻³⁷ at most; above, infinite), and for a float32 base as the sum of two
    float16 numbers, in one more moment: off by 2⁻²³ of an entry or 2⁻³⁷.

    `delta_pack`, `add_gram_`, `add_moment_` is the default path, this one is not: subtracting inside
    the matrix loop makes a GPU wait for each product before it prepares the next (the compiled loop
    keeps none in flight), subtracts each entry again in every tile of n, and gains no accuracy, as the
    operands are rounded to 16 bits either way. The packed differences cost one pass over memory.
    """
    _check(gram, moment, base, expert, scratch, packed)
    if (faster := twin("fused", expert, expert.shape[1])) is not None:
        added: tuple[Tensor, Tensor] = faster.add_gram_and_moment_(
            gram, moment, base, expert, of=of, scratch=scratch, packed=packed
        )
        return added
    if expert.numel() == 0:
        return gram, moment
    values = None if packed is None else packed[None]
    delta = delta_pack(base, expert[None], out=values).values[0]
    own = torch.zeros_like(gram) if scratch is None else scratch.zero_()
    mirror_(add_gram_(own, delta))
    gram += own
    add_moment_(moment, delta, own)
    if of == "weights":
        add_moment_(moment, base.float() * SCALE, own)
    return gram, moment


def _check(
    gram: Tensor, moment: Tensor, base: Tensor, expert: Tensor, scratch: Tensor | None, packed: Tensor | None
) -> None:
    rows, columns = expert.shape
    assert base.shape == (rows, columns), f"base is {tuple(base.shape)} for expert {tuple(expert.shape)}"
    assert base.dtype in _STORED, f"base is {base.dtype}"
    assert expert.dtype in _STORED, f"expert is {expert.dtype}"
    for name, tensor, shape, dtype in (
        ("gram", gram, (columns, columns), torch.float32),
        ("moment", moment, (rows, columns), torch.float32),
        ("scratch", scratch, (columns, columns), torch.float32),
        ("packed", packed, (rows, columns), torch.float16),
    ):
        if tensor is None:
            continue
        assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)} for expert {tuple(expert.shape)}"
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}"
    for name, given in (("scratch", scratch), ("packed", packed)):
        assert given is None or given.stride(1) == 1 or columns <= 1, f"{name} must have adjacent columns"
