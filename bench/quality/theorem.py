"""What stands between D_tᵀD_t and an expert's inputs, angle by angle: the error terms of ACTMat's Theorem 3.1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .analysis import cosine
from .encoder import Batch

# of so many steps one is looked at token by token
EVERY = 4


class Terms:
    """Watches an expert's training, and tells the angles afterwards.

    For a matrix with inputs x_i [in] and gradients g_i [out] of its outputs, over all tokens i of all steps,
    plain gradient descent moves it by D ∝ Σ g_i x_iᵀ, and DᵀD ∝ Σ_ij (g_i·g_j) x_i x_jᵀ. The theorem leaves out
    what is between different tokens, and how long a gradient is beside which input, and where the inputs went
    while the model was trained. Our experts are trained by AdamW, so that there is one term more.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._weighed: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._last: Callable[[str], Tensor] | None = None
        self._inputs: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def before(self, model: Any, batch: Batch, step: int) -> None:
        """Hang hooks on the matrices, in the steps that are looked at."""
        matrices = _matrices(model)
        if step == 0:
            self._first = {name: module.weight.detach().clone() for name, module in matrices.items()}
            self._last = lambda name: matrices[name].weight.detach()
        if step % EVERY:
            return
        seen = batch.mask.bool().flatten()
        for name, module in matrices.items():
            self._hooks += [
                module.register_forward_pre_hook(self._keeping(name, seen)),
                module.register_full_backward_hook(self._adding(name, seen)),
            ]

    def after(self, model: Any, batch: Batch, step: int) -> None:
        """Add this step's gradients, and take the hooks down."""
        for name, module in _matrices(model).items():
            _add(self._gradients, name, module.weight.grad)
        while self._hooks:
            self._hooks.pop().remove()

    def _keeping(self, name: str, seen: Tensor) -> Callable[[nn.Module, Any], None]:
        def keep(module: nn.Module, given: Any) -> None:
            self._inputs[name] = given[0].detach().float().flatten(0, -2)[seen]

        return keep

    def _adding(self, name: str, seen: Tensor) -> Callable[[nn.Module, Any, Any], None]:
        def add(module: nn.Module, _: Any, gradients: Any) -> None:
            inputs = self._inputs.pop(name)
            lengths = gradients[0].float().flatten(0, -2)[seen].square().sum(1, keepdim=True)
            _add(self._weighed, name, inputs.T @ (lengths * inputs))
            _add(self._moments, name, inputs.T @ inputs)

        return add

    def angles(self, moments: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """By matrix of the encoder's layers, in degrees; `moments` are Σ xxᵀ [in, in] of the trained expert's inputs.

        total        from DᵀD to the expert's moment
        optimizer    from DᵀD to GᵀG, G = Σ g_i x_iᵀ: what AdamW made of the gradients
        cross        from GᵀG to Σ ‖g_i‖² x_i x_iᵀ: different tokens, with each other
        correlation  from there to Σ x_i x_iᵀ: long gradients beside some inputs more than others
        drift        from there to the expert's moment: what the inputs were while it was trained
        """
        assert self._last is not None
        found = {}
        for name in sorted(moments.keys() & self._first.keys()):
            moment = moments[name]
            change = (self._last(name) - self._first[name]).double()
            gradient = self._gradients[name].double()
            weighed, seen = self._weighed[name].double(), self._moments[name].double()
            gram = gradient.T @ gradient
            own = change.T @ change
            found[name] = {
                "total": angle(own, moment),
                "optimizer": angle(own, gram),
                "cross": angle(gram, weighed),
                "correlation": angle(weighed, seen),
                "drift": angle(seen, moment),
            }
        return found


def _matrices(model: Any) -> dict[str, nn.Linear]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.clone()


def angle(a: Tensor, b: Tensor) -> float:
    """Between two matrices, as vectors, in degrees."""
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine(a, b)))))
