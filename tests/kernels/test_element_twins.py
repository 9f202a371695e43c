from importlib import import_module

import pytest
import torch

from streammerge_kernels import apply, drop, elect, magnitude, weighted_sum
from streammerge_kernels.choice import FASTER_FROM
from tests.kernels.devices import DEVICE

KEY = {"seed": 1, "name": "w", "first_index": 0}


def applied():
    base, out = torch.ones(9, device=DEVICE), torch.empty(9, dtype=torch.bfloat16, device=DEVICE)
    facts = apply.apply_(base, base * 0.1234, out, rounding="stochastic", **KEY)
    return [out.tolist(), facts.changed.item(), facts.non_finite.item()]


def summed():
    base = torch.ones(9, device=DEVICE)
    return weighted_sum.weighted_sum(base, base * 3 + torch.zeros(2, 9, device=DEVICE), [1.0, 0.5]).tolist()


def elected():
    deltas = torch.tensor([[1.0, -2.0], [-1.0, -4.0]], device=DEVICE)
    return [elect.elect(deltas, [1.0, 1.0]).tolist(), elect.vote_balance(deltas, [1.0, 1.0]).item()]


def trimmed():
    values = torch.tensor([1.0, -2.0, 2.0, 4.0], device=DEVICE)
    select = magnitude.MagnitudeSelect(2, DEVICE)
    select.count(values)
    select.narrow()
    select.count(values)
    return magnitude.trim_(values, select.cut).tolist()


def dropped():
    return drop.keep_mask((99,), density=0.3, expert="math", device=DEVICE, **KEY).tolist()


@pytest.mark.parametrize(
    ("module", "result"),
    [(apply, applied), (weighted_sum, summed), (elect, elected), (magnitude, trimmed), (drop, dropped)],
    ids=["apply", "weighted_sum", "elect", "magnitude", "drop"],
)
def test_an_op_whose_twin_is_chosen_hands_over_to_it(module, result, monkeypatch):
    asked = []

    def twin(op, tensor, size):
        asked.append(op)
        assert op in FASTER_FROM
        assert tensor.device.type == DEVICE
        assert size == tensor.numel()
        return import_module(f"streammerge_kernels.{op}_triton")

    monkeypatch.setattr(module, "twin", lambda op, tensor, size: None)
    expected = result()
    monkeypatch.setattr(module, "twin", twin)
    assert result() == expected
    assert set(asked) == {module.__name__.rpartition(".")[2]}
