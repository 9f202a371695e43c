"""What merges of the same tensor leave to each other: bounded, and never of another tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.remembered import Remembered


def keep(remembered: Remembered, subject: object, key: str, tensor: Tensor) -> bool:
    return remembered.keep(subject, key, tensor.nbytes, lambda copy: copy(tensor))


def test_what_was_kept_is_a_copy():
    remembered, tensor = Remembered(1 << 12), torch.ones(8)
    assert keep(remembered, "q_proj", "ridge", tensor)
    tensor.zero_()
    assert torch.equal(remembered.recall("q_proj", "ridge"), torch.ones(8))
    assert remembered.recall("q_proj", "exact") is None


def test_another_tensor_makes_the_last_one_forgotten():
    remembered = Remembered(1 << 12)
    keep(remembered, "q_proj", "ridge", torch.ones(8))
    assert remembered.recall("k_proj", "ridge") is None
    assert remembered.recall("q_proj", "ridge") is not None
    keep(remembered, "k_proj", "ridge", torch.zeros(8))
    assert remembered.recall("q_proj", "ridge") is None
    assert torch.equal(remembered.recall("k_proj", "ridge"), torch.zeros(8))


def test_what_has_no_room_is_not_kept_until_the_next_tensor():
    remembered = Remembered(1 << 12)
    assert keep(remembered, "q_proj", "first", torch.ones(1 << 9))
    assert not keep(remembered, "q_proj", "second", torch.ones((1 << 9) + 1))
    assert remembered.recall("q_proj", "second") is None
    assert keep(remembered, "k_proj", "second", torch.ones((1 << 9) + 1))
