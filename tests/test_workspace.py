"""The workspace: one piece of memory, handed out again for every step."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streammerge.workspace import LaneWorkspace, Workspace


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
            st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]),
        ),
        max_size=8,
    )
)
def test_what_is_taken_is_aligned_and_never_overlaps(wanted):
    workspace = Workspace(4096)
    taken = [workspace.empty(shape, dtype) for shape, dtype in wanted]
    for number, tensor in enumerate(taken):
        assert (tuple(tensor.shape), tensor.dtype) == wanted[number]
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    for number, tensor in enumerate(taken):
        assert (tensor == number).all()


def test_after_a_reset_the_same_memory_is_given_again():
    workspace = Workspace(1024)
    before = workspace.empty((4, 4), torch.float32).data_ptr()
    workspace.empty((4, 4), torch.float32)
    workspace.reset()
    assert workspace.empty((2, 8), torch.float32).data_ptr() == before
    assert workspace.overdraft_bytes == 0


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 400)), max_size=4), max_size=12), st.integers(1, 3)
)
def test_steps_of_any_shapes_take_memory_of_their_own_however_few_tensors_are_kept(steps, kept):
    workspace = Workspace(1 << 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streammerge.workspace._MOST_KEPT", kept)
        for shapes in steps:
            taken = [workspace.empty(shape, torch.float32).fill_(number) for number, shape in enumerate(shapes)]
            assert [(tuple(tensor.shape), set(tensor.view(-1).tolist())) for tensor in taken] == [
                (shape, {float(number)}) for number, shape in enumerate(shapes)
            ]
            workspace.reset()
    assert workspace.overdraft_bytes == 0


def test_a_shape_that_is_taken_again_at_its_place_is_the_same_tensor():
    workspace = Workspace(1024)
    first = workspace.empty((4, 4), torch.float32)
    second = workspace.empty((4, 4), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    workspace.reset()
    assert workspace.empty((4, 4), torch.float32) is first
    assert workspace.empty((4, 4), torch.bfloat16).dtype is torch.bfloat16
    assert workspace.peak_bytes == 128


def test_more_than_was_planned_is_still_given_and_counted():
    workspace = Workspace(128)
    workspace.empty((32,), torch.float32)
    for _ in range(2):
        workspace.empty((10,), torch.float32).fill_(1)
        workspace.empty((20,), torch.float32).fill_(1)
        assert workspace.overdraft_bytes == 120
        workspace.reset()
        workspace.empty((32,), torch.float32)


@pytest.mark.parametrize(("sizes", "peak"), [((1,), 64), ((64, 64), 128), ((65, 1), 192), ((), 0)])
def test_the_peak_is_what_was_held_at_once(sizes, peak):
    workspace = Workspace(1024)
    for size in sizes:
        workspace.empty((size,), torch.uint8)
    workspace.reset()
    assert workspace.peak_bytes == peak


def test_a_workspace_of_nothing_gives_nothing_away():
    workspace = Workspace(0)
    assert workspace.empty((0, 5), torch.float32).shape == (0, 5)
    assert workspace.empty((3,), torch.uint8).numel() == 3
    assert workspace.overdraft_bytes == 3


def test_each_thread_takes_from_a_workspace_of_its_own():
    lanes, both = LaneWorkspace(1024), threading.Barrier(2)

    def take(value: float) -> tuple[Tensor, int]:
        taken = lanes.empty((16,), torch.float32).fill_(value)
        both.wait(10)
        return taken, lanes.peak_bytes

    with ThreadPoolExecutor(2) as threads:
        for value, (taken, peak) in zip((1.0, 2.0), threads.map(take, (1.0, 2.0)), strict=True):
            assert torch.equal(taken, torch.full((16,), value))
            assert peak == 64
    assert lanes.peak_bytes == 0


def test_parts_share_its_memory_without_touching_each_other():
    whole = Workspace(4096)
    parts = whole.parts(3)
    taken = [part.empty((4096 // 3 // 64 * 64,), torch.uint8).fill_(number) for number, part in enumerate(parts)]
    assert [set(tensor.tolist()) for tensor in taken] == [{0}, {1}, {2}]
    memory = whole.empty((4096,), torch.uint8)
    assert set(memory[: 3 * len(taken[0])].tolist()) == {0, 1, 2}
    assert all(part.overdraft_bytes == 0 for part in parts)
