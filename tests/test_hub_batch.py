"""Batches over models on the hub: fetched once for all jobs, ahead of them, and deleted when no job needs them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

import streammerge
from streammerge import api, write
from streammerge.storage.places import Place
from streammerge.storage.shared import SharedStorage
from tests.hub_server import Hub, places_of
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import MemoryStorage
from tests.test_hub_merge import cached, remote, run, weights_of

METHODS = ("linear", "task_arithmetic", "ties")


def write_night(folder: Path, jobs: Sequence[dict[str, object]], **more: object) -> Path:
    path = folder / "night.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "night"), "jobs": list(jobs), **more}))
    return path


def alike(tmp_path: Path, **more: object) -> Path:
    return write_night(tmp_path, [{"recipe": remote(method)} for method in METHODS], **more)


def onto_base(expert: str, method: str = "linear") -> dict[str, object]:
    recipe = {"merge_method": method, "base_model": "org/base", "models": [{"model": f"org/{expert}"}]}
    return {"name": expert, "recipe": recipe}


def fetched_whole(hub: Hub) -> Counter[str]:
    """How often each weight file was fetched whole."""
    return Counter(seen.path for seen in hub.got(".safetensors") if seen.range is None)


def test_a_batch_fetches_each_file_once_and_ahead_of_the_merges(family, hub, places, tmp_path):
    held = threading.Event()
    hub.gates["model-00002-of-00002.safetensors"] = held
    events: list[str] = []

    def progress(done: int, total: int) -> None:
        if done and not held.is_set():
            assert any(seen.path.endswith("00002-of-00002.safetensors") for seen in hub.seen)
            events.append("merged while a later file was on its way")
            held.set()

    outcome = api.batch(alike(tmp_path), storage=places, progress=progress)
    assert len(outcome.done) == 3
    assert events
    fetched = fetched_whole(hub)
    assert len(fetched) == 9
    assert set(fetched.values()) == {1}
    for method in METHODS:
        streammerge.merge(recipe_of(family, method), tmp_path / "local" / method)
        assert weights_of(tmp_path / "night" / method) == weights_of(tmp_path / "local" / method)


def test_a_job_that_fails_does_not_end_the_fetching_for_others(hub, places, tmp_path):
    poisoned = tuned(llama_tensors(), 4)
    poisoned["model.embed_tokens.weight"].view(-1)[7] = float("nan")
    hub.push("org/math", save_model(tmp_path / "poisoned", poisoned, shards=2))
    hub.gates["model-00002-of-00002.safetensors"] = held = threading.Event()
    refusing = {**remote("linear"), "name": "refusing"}
    passing = {**remote("linear"), "name": "passing", "non_finite": "pass"}
    # the first has failed by then, and both wait for what is on its way
    threading.Timer(3, held.set).start()
    outcome = api.batch(write_night(tmp_path, [{"recipe": refusing}, {"recipe": passing}]), storage=places)
    assert outcome.done == ["passing"]
    assert "model.embed_tokens.weight" in outcome.failed["refusing"].message


@pytest.mark.parametrize("memory", [None, "80MiB"], ids=["side by side", "one by one"])
def test_a_file_goes_when_no_later_job_needs_it_and_not_before(family, hub, places, tmp_path, memory, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    experts = ("math", "code", "math")
    jobs = [{**onto_base(name, method), "name": f"{name}-{method}"}
            for name, method in zip(experts, ("linear", "linear", "task_arithmetic"), strict=True)]  # fmt: skip
    there: dict[str, set[str]] = {}

    def tell(name: str, text: str) -> None:
        there[name] = {each.partition("/")[0] for each in cached(tmp_path)}

    outcome = api.batch(write_night(tmp_path, jobs), storage=places, delete_consumed=True, tell=tell, memory=memory)
    assert not outcome.failed
    # both jobs of `math` go first, side by side or not: they read the same models
    assert list(there) == ["math-linear", "math-task_arithmetic", "code-linear"]
    if memory:
        assert there["math-linear"] == {"base", "math"}
    assert there["math-task_arithmetic"] == {"base"}
    assert there["code-linear"] == set()
    assert set(fetched_whole(hub).values()) == {1}
    for job in jobs:
        name = str(job["name"])
        expert, _, method = name.partition("-")
        local = {"base": family["base"], expert: family[expert]}
        streammerge.merge(recipe_of(local, method), tmp_path / "local" / name)
        assert weights_of(tmp_path / "night" / name) == weights_of(tmp_path / "local" / name)


def test_what_a_failed_job_would_read_again_stays(hub, places, tmp_path):
    poisoned = tuned(llama_tensors(), 4)
    poisoned["lm_head.weight"].view(-1)[7] = float("nan")
    hub.push("org/code", save_model(tmp_path / "poisoned", poisoned, shards=2))
    path = write_night(tmp_path, [onto_base("math"), onto_base("code")])
    outcome = api.batch(path, storage=places, delete_consumed=True)
    assert list(outcome.failed) == ["code"]
    assert {name.partition("/")[0] for name in cached(tmp_path)} == {"base", "code"}


def test_what_was_in_the_cache_before_a_batch_stays(hub, tmp_path):
    streammerge.merge(remote("task_arithmetic"), tmp_path / "before", storage=places_of(hub, tmp_path))
    outcome = api.batch(alike(tmp_path), storage=places_of(hub, tmp_path), delete_consumed=True)
    assert len(outcome.done) == 3
    assert len(cached(tmp_path)) == 9


def test_an_interrupted_batch_waits_for_no_download_and_goes_on_later(family, hub, tmp_path):
    hub.gates["model-00002-of-00002.safetensors"] = threading.Event()
    path = alike(tmp_path)
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            # by now every job's reader waits for what does not come
            time.sleep(0.5)
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        api.batch(path, storage=places_of(hub, tmp_path), progress=progress)
    assert time.monotonic() - started < 15
    hub.gates["model-00002-of-00002.safetensors"].set()
    assert len(api.batch(path, storage=places_of(hub, tmp_path)).done) == 3
    for method in METHODS:
        streammerge.merge(recipe_of(family, method), tmp_path / "local" / method)
        assert weights_of(tmp_path / "night" / method) == weights_of(tmp_path / "local" / method)


class Fetcher(MemoryStorage):
    """Notes what it is asked to fetch, to delete and to end."""

    def __init__(self) -> None:
        super().__init__({"m": {"w": torch.zeros(4)}})
        self.noted: list[object] = []

    def pinned(self, location: str) -> str:
        return f"{location}@1"

    def to_fetch(self, location: str, name: str) -> int:
        return 7

    def cache_folder(self, location: str) -> str:
        return "/cache"

    def downloaded(self, location: str) -> str:
        return f"/cache/{location}"

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        self.noted.append(list(places))

    def discard(self, location: str, name: str) -> None:
        self.noted.append((location, name))

    def stop(self) -> None:
        self.noted.append("stop")


def test_sharing_passes_fetching_through_and_ends_it_with_the_last():
    below = Fetcher()
    shared = SharedStorage(below)
    assert (shared.pinned("m"), shared.to_fetch("m", "a"), shared.cache_folder("m")) == ("m@1", 7, "/cache")
    assert shared.downloaded("m") == "/cache/m"
    steps: list[tuple[Callable[[], None], list[object]]] = [
        (lambda: shared.expect([("m", "a")], 2), [[("m", "a")]]),
        (lambda: shared.expect([("m", "a")], 2), [[("m", "a")]]),
        (shared.stop, []),
        (shared.stop, ["stop"]),
        (lambda: shared.expect([], 2), [[]]),
        (shared.end, ["stop"]),
    ]
    for step, expected in steps:
        below.noted.clear()
        step()
        assert below.noted == expected
    below.noted.clear()
    for _ in range(3):
        shared.claim([("m", "a"), ("m", "a")])
    for left in (2, 1, 0):
        assert below.noted == []
        shared.discard("m", "a")
        assert bool(below.noted) == (left == 0)


def test_a_storage_that_fetches_nothing_is_shared_too():
    shared = SharedStorage(MemoryStorage({"m": {"w": torch.zeros(4)}}))
    assert (shared.pinned("m"), shared.to_fetch("m", "a"), shared.cache_folder("m")) == ("m", 0, "m")
    shared.expect([("m", "a")], 2)
    shared.discard("m", "a")
    shared.stop()


def test_the_command_deletes_what_it_fetched(hub, tmp_path):
    path = alike(tmp_path)
    done = run(hub, tmp_path, "batch", str(path), "--delete-consumed", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == list(METHODS)
    assert not cached(tmp_path)
