"""What merges of the same tensor leave to each other: bounded, never of another tensor, found by one of them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from streammerge.remembered import Remembered


def keep(remembered: Remembered, subject: object, key: str, tensor: Tensor) -> bool:
    assert remembered.recall(subject, key) is None
    return remembered.keep(subject, key, tensor.nbytes, lambda copy: copy(tensor))


def test_what_was_kept_is_a_copy():
    remembered, tensor = Remembered(1 << 12), torch.ones(8)
    assert keep(remembered, "q_proj", "ridge", tensor)
    tensor.zero_()
    assert torch.equal(remembered.recall("q_proj", "ridge"), torch.ones(8))
    assert remembered.recall("q_proj", "exact") is None


def test_findings_of_several_tensors_are_told_apart():
    # what says all about a tensor need not be hashable
    q_proj, k_proj = ["q_proj"], ["k_proj"]
    remembered = Remembered(1 << 12)
    keep(remembered, q_proj, "ridge", torch.ones(8))
    keep(remembered, k_proj, "ridge", torch.zeros(8))
    assert torch.equal(remembered.recall(["q_proj"], "ridge"), torch.ones(8))
    assert torch.equal(remembered.recall(["k_proj"], "ridge"), torch.zeros(8))


def test_what_has_no_room_is_not_kept_until_all_is_forgotten():
    remembered = Remembered(1 << 12)
    assert keep(remembered, "q_proj", "first", torch.ones(1 << 9))
    assert not keep(remembered, "q_proj", "second", torch.ones((1 << 9) + 1))
    assert remembered.recall("q_proj", "second") is None
    remembered.forget()
    assert remembered.recall("q_proj", "first") is None
    assert keep(remembered, "k_proj", "second", torch.ones((1 << 9) + 1))


def test_one_thread_finds_what_others_wait_for():
    remembered, found = Remembered(1 << 12), Counter[int]()

    def look(number: int) -> Tensor:
        if (known := remembered.recall("q_proj", "ridge")) is not None:
            return known
        found[number] += 1
        time.sleep(0.05)
        remembered.keep("q_proj", "ridge", 32, lambda copy: copy(torch.ones(8)))
        return torch.ones(8)

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(each, torch.ones(8)) for each in threads.map(look, range(8)))
    assert found.total() == 1


@pytest.mark.parametrize("end", ["it fails", "there is no room", "copying fails"])
def test_nobody_waits_for_what_will_not_be_kept(end):
    remembered, is_looking = Remembered(16), threading.Event()

    def copy(_: object) -> Tensor:
        raise MemoryError

    def find() -> None:
        assert remembered.recall("q_proj", "ridge") is None
        is_looking.set()
        time.sleep(0.05)
        try:
            if end == "there is no room":
                assert not remembered.keep("q_proj", "ridge", 32, lambda copy: copy(torch.ones(8)))
            elif end == "copying fails":
                with pytest.raises(MemoryError):
                    remembered.keep("q_proj", "ridge", 16, copy)
        finally:
            if end != "there is no room":
                remembered.end_turn()

    with ThreadPoolExecutor(3) as threads:
        finder = threads.submit(find)
        assert is_looking.wait(10)
        others = [threads.submit(remembered.recall, "q_proj", "ridge") for _ in range(2)]
        assert [each.result(10) for each in others] == [None, None]
        finder.result(10)


def test_two_that_want_what_the_other_is_to_find_do_not_wait_for_each_other():
    remembered, both = Remembered(1 << 12), threading.Barrier(2)

    def look(first: str, second: str) -> object:
        assert remembered.recall("q_proj", first) is None
        both.wait(10)
        try:
            return remembered.recall("q_proj", second)
        finally:
            remembered.end_turn()

    with ThreadPoolExecutor(2) as threads:
        assert [each.result(10) for each in (threads.submit(look, "a", "b"), threads.submit(look, "b", "a"))] == [
            None,
            None,
        ]


def test_many_threads_are_told_what_they_asked_for_and_no_more_is_kept_than_there_is_room():
    remembered, kept = Remembered(20 * 64), Counter[int]()

    def look(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            number = chance.randrange(40)
            known = remembered.recall(["w", number % 5], number)
            if known is not None:
                assert torch.equal(known, torch.full((16,), float(number)))
            elif chance.random() < 0.7:
                fresh = torch.full((16,), float(number))
                kept[seed] += remembered.keep(["w", number % 5], number, 64, lambda copy, fresh=fresh: copy(fresh))
            remembered.end_turn()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(look, range(4)))
    assert 0 < kept.total() <= 20


def test_who_kept_what_others_can_use_is_told_so_once():
    remembered = Remembered(64)
    assert keep(remembered, "q_proj", "ridge", torch.ones(16))
    assert remembered.end_turn()
    assert not remembered.end_turn()
    assert not keep(remembered, "k_proj", "ridge", torch.ones(1))
    assert not remembered.end_turn()
