"""Reading ahead: in order, in bounded memory, and never the reason that a merge hangs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.checkpoint import Checkpoint, Storage, load_checkpoint
from streammerge.errors import CheckpointError
from streammerge.readahead import ReadAhead, Request, Slot, cut
from streammerge.storage.local import LocalStorage
from tests.models import recipe_of, save_model
from tests.stored import MemoryStorage, digests, streammerge_threads, tensors_of

BLOCK, COUNT = 16, 12


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage({"model": {"w": torch.arange(BLOCK * COUNT, dtype=torch.float32)}})


@pytest.fixture
def reading(storage: MemoryStorage) -> Iterator[Callable[..., ReadAhead]]:
    """Begin to read the model's one tensor in blocks; whatever happens, end it."""
    begun: list[ReadAhead] = []

    def begin(slots: int = 3, passes: int = 1) -> ReadAhead:
        model = load_checkpoint(storage, "model")
        requests = [r for i in range(passes) for r in runs(model, last=i == passes - 1)]
        begun.append(ReadAhead(storage, [model], requests, slots=slots, slot_bytes=BLOCK * 4))
        return begun[-1]

    yield begin
    for ahead in begun:
        ahead.close()


def runs(model: Checkpoint, *, last: bool = True) -> list[Request]:
    return list(cut(0, model.tensors["w"], BLOCK, last=last))


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def test_runs_come_in_the_order_they_were_asked_for(reading):
    ahead = reading()
    for number in range(COUNT):
        slot = ahead.take()
        assert slot.data.view(torch.float32).tolist() == list(range(number * BLOCK, (number + 1) * BLOCK))
        ahead.give_back(slot)
    assert ahead.read_bytes == BLOCK * COUNT * 4


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_reading_runs_ahead_by_the_slots_there_are_and_no_further(reading, storage, slots):
    ahead = reading(slots)
    assert eventually(lambda: len(storage.noted("fetch")) == slots)
    time.sleep(0.05)
    assert len(storage.noted("fetch")) == slots
    ahead.give_back(ahead.take())
    assert eventually(lambda: len(storage.noted("fetch")) == slots + 1)
    time.sleep(0.05)
    assert len(storage.noted("fetch")) == slots + 1


@pytest.mark.parametrize("held", [1, 33, 63])
def test_slots_that_are_given_back_several_at_a_time_are_read_into_when_nothing_else_is_left(reading, held):
    ahead = reading(64, passes=9)
    kept = [ahead.take() for _ in range(held)]
    for number in range(held, 9 * COUNT):
        slot = ahead.take()
        assert slot.data.view(torch.float32)[0] == number % COUNT * BLOCK
        ahead.give_back(slot)
    assert [slot.data.view(torch.float32)[0] for slot in kept] == [n % COUNT * BLOCK for n in range(held)]


def test_closing_lets_go_of_slots_in_every_place(reading, storage):
    ahead = reading(64)
    assert eventually(lambda: len(storage.noted("fetch")) == COUNT)
    for _ in range(3):
        ahead.give_back(ahead.take())
    ahead.close()
    assert len(storage.noted("release")) == COUNT


def test_slots_lie_in_one_piece_of_memory_and_do_not_overlap(reading):
    ahead = reading(3)
    held = [ahead.take() for _ in range(3)]
    starts = sorted(slot.data.data_ptr() for slot in held)
    assert starts == [starts[0] + i * BLOCK * 4 for i in range(3)]


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), CheckpointError("cut short"), MemoryError()])
def test_an_error_of_the_reading_thread_reaches_the_taker(reading, storage, failure):
    storage.fail_at, storage.failure = 2, failure
    ahead = reading()
    for _ in range(2):
        ahead.give_back(ahead.take())
    with pytest.raises(type(failure)) as caught:
        ahead.take()
    assert caught.value is failure


def test_a_request_that_cannot_be_made_reaches_the_taker_too(storage):
    model = load_checkpoint(storage, "model")

    def requests() -> Iterator[Request]:
        yield runs(model)[0]
        raise KeyError("no such step")

    ahead = ReadAhead(storage, [model], requests(), slots=2, slot_bytes=64)
    ahead.take()
    with pytest.raises(KeyError, match="no such step"):
        ahead.take()
    ahead.close()


@pytest.mark.parametrize("held", [0, 1, 3])
def test_closing_in_the_middle_never_hangs(reading, storage, held):
    ahead = reading(3)
    for _ in range(held):
        ahead.take()
    started = time.monotonic()
    ahead.close()
    assert time.monotonic() - started < 2
    assert streammerge_threads() == []
    assert len(storage.noted("close")) == 1


def test_closing_after_an_error_ends_the_thread(reading, storage):
    storage.fail_at = 0
    ahead = reading()
    ahead.close()
    assert streammerge_threads() == []


def test_closing_gives_back_what_was_read_but_never_taken(reading, storage):
    ahead = reading(4)
    assert eventually(lambda: len(storage.noted("fetch")) == 4)
    ahead.close()
    assert sorted(storage.noted("release")) == [("release", *rest) for _, *rest in sorted(storage.noted("fetch"))]


def test_a_slot_shows_runs_of_every_size_and_dtype_that_follow_each_other():
    slot = Slot(torch.arange(64, dtype=torch.uint8))
    for nbytes, dtype in (
        (64, torch.uint8),
        (8, torch.float32),
        (8, torch.bfloat16),
        (0, torch.float32),
        (64, torch.float64),
    ):
        run = slot.view(nbytes, dtype)
        assert (run.nbytes, run.dtype, run.shape) == (nbytes, dtype, (nbytes // dtype.itemsize,))
        assert bytes(run.view(torch.uint8).numpy()) == bytes(slot.bytes[:nbytes])
        assert slot.view(nbytes, dtype) is run


def test_a_run_read_out_of_turn_leaves_the_order_as_it_was(reading, storage):
    ahead = reading()
    request = runs(load_checkpoint(storage, "model"))[7]
    first = ahead.take()
    late = ahead.read_now(request)
    assert late.view(torch.float32)[0] == 7 * BLOCK
    assert first.data.view(torch.float32)[0] == 0, "a run out of turn has memory of its own"
    ahead.give_back(first)
    assert ahead.take().data.view(torch.float32)[0] == BLOCK


def test_reading_out_of_turn_raises_at_once(reading, storage):
    ahead = reading(3)
    assert eventually(lambda: len(storage.noted("fetch")) == 3)
    storage.fail_at = 3
    with pytest.raises(OSError, match="Input/output error"):
        ahead.read_now(runs(load_checkpoint(storage, "model"))[5])


def test_a_range_is_released_after_its_last_planned_read_and_not_before(reading, storage):
    ahead = reading(2, passes=2)
    for number in range(2 * COUNT):
        assert number >= COUNT or not storage.noted("release")
        ahead.give_back(ahead.take())
    ahead.close()
    assert [rest for _, *rest in storage.noted("release")] == [rest for _, *rest in storage.noted("fetch")[COUNT:]]
    for number, event in enumerate(storage.events):
        if event[0] == "release":
            assert storage.events[:number].count(("fetch", *event[1:])) == 2


def test_waiting_and_reading_are_counted_apart(reading, storage):
    ahead = reading()
    slept = 0.2
    time.sleep(slept)
    ahead.take()
    assert ahead.waited_seconds < slept
    assert ahead.busy_seconds < slept


@pytest.mark.parametrize("mapped", [False, True])
def test_both_ways_read_any_range_whatever_its_alignment(tmp_path, mapped):
    content = bytes(range(256)) * 64
    (tmp_path / "file").write_bytes(content)
    file = LocalStorage(mapped=mapped).open(str(tmp_path), "file")
    buffer = memoryview(bytearray(5000))
    for offset, nbytes in [(0, 1), (1, 7), (4095, 2), (4096, 4096), (3, 5000), (len(content) - 9, 9)]:
        assert bytes(file.fetch(offset, nbytes, buffer)) == content[offset : offset + nbytes]
        file.release(offset, nbytes)
        assert bytes(file.fetch(offset, nbytes, buffer)) == content[offset : offset + nbytes]
    file.close()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_short_since_planning_is_named_with_a_hint(tmp_path, mapped):
    (tmp_path / "file").write_bytes(b"x" * 100)
    file = LocalStorage(mapped=mapped).open(str(tmp_path), "file")
    with pytest.raises(CheckpointError, match=r"file` ends at byte 100, inside a tensor") as caught:
        file.fetch(90, 20, memoryview(bytearray(20)))
    assert caught.value.hint == "The file was cut short during the merge. Fetch it again."
    file.close()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_gone_since_planning_is_named_with_a_hint(tmp_path, mapped):
    with pytest.raises(CheckpointError, match=r"gone` cannot be read: no such file or directory") as caught:
        LocalStorage(mapped=mapped).open(str(tmp_path), "gone")
    assert caught.value.hint == "Check that it is there and that you may read it."


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is not a plain file"):
        LocalStorage().open(str(tmp_path), "folder")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_both_ways_of_reading_give_the_same_merge(family, tmp_path, method):
    ways: dict[str, Storage] = {"mapped": LocalStorage(mapped=True), "positioned": LocalStorage(mapped=False)}
    for name, storage in ways.items():
        streammerge.merge(recipe_of(family, method), tmp_path / name, storage=storage)
    assert digests(tmp_path / "mapped") == digests(tmp_path / "positioned")
    assert streammerge_threads() == []


def test_mapped_tensors_that_are_not_aligned_are_merged_all_the_same(tmp_path, monkeypatch):
    # three bytes before them put the floats at odd addresses
    base = {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "w": torch.randn(37, generator=torch.manual_seed(0))}
    expert = {"odd": base["odd"], "w": base["w"] + 1}
    folders = {"base": tmp_path / "base", "expert": tmp_path / "expert"}
    for name, tensors in (("base", base), ("expert", expert)):
        save_model(folders[name], tensors)
        misalign(folders[name] / "model.safetensors", tensors)
    for mapped in (False, True):
        streammerge.merge(
            recipe_of(folders, "task_arithmetic"), tmp_path / f"out{mapped}", storage=LocalStorage(mapped=mapped)
        )
    assert torch.equal(tensors_of(tmp_path / "outTrue")["w"], expert["w"])
    assert digests(tmp_path / "outTrue") == digests(tmp_path / "outFalse")


def misalign(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Rewrite a file with its uint8 tensor before the others, which no rule forbids."""
    header: dict[str, object] = {}
    data = b""
    for name in sorted(tensors):
        piece = tensors[name].numpy().tobytes()
        dtype = "U8" if tensors[name].dtype == torch.uint8 else "F32"
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_no_thread_of_ours_is_left():
    assert [t.name for t in threading.enumerate() if t.name.startswith("streammerge")] == []
