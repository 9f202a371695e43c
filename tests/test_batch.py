"""Batches: many merges in one process, each as it would be alone, none lost, only the best kept."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor

import streammerge
from streammerge import api, write
from streammerge.batching import read_night, together
from streammerge.batching.keeping import Folders
from streammerge.batching.ledger import Ledger
from streammerge.cli import cli
from streammerge.delta import Deltas
from streammerge.errors import EvaluationError, MergeError, OutputError, RecipeError
from streammerge.merging import Merging
from streammerge.rates import Rates
from streammerge.report import Report
from streammerge.solve import normal_equations, systems
from streammerge.solve.systems import System
from streammerge.storage.places import Place
from streammerge.storage.shared import CHUNK_BYTES, SharedStorage
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import MemoryStorage, digests

# the score of a model is the length of its folder's name
_PROGRAM = 'import json, os, sys; print(json.dumps({"size": len(os.path.basename(sys.argv[1]))}))'
SCORE = f"{sys.executable} -c '{_PROGRAM}' {{model}}"


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    base = llama_tensors()
    models = {"base": base, "one": tuned(base, 1), "two": tuned(base, 2)}
    return {name: save_model(tmp_path / name, tensors) for name, tensors in models.items()}


def write_night(folder: Path, jobs: list[dict[str, object]], **more: object) -> Path:
    path = folder / "night.yaml"
    path.write_text(yaml.safe_dump({"out": str(folder / "night"), "jobs": jobs, **more}))
    return path


def grid(family: dict[str, Path]) -> dict[str, object]:
    axes = {"merge_method": ["actmat", "wudi"], "parameters.ridge": [0.01, 0.1, 1.0]}
    return {"name": "g", "recipe": recipe_of(family), "grid": axes}


def assert_as_alone(path: Path, folder: Path, *, but: tuple[str, ...] = ()) -> None:
    for job in read_night(path).jobs:
        if job.name not in but:
            streammerge.merge(job.recipe, folder / "alone" / job.name)
            assert digests(folder / "night" / job.name) == digests(folder / "alone" / job.name)


def test_a_grid_is_every_combination_of_its_values(family, tmp_path):
    night = read_night(write_night(tmp_path, [grid(family), {"recipe": recipe_of(family, "ties")}]))
    assert [job.name for job in night.jobs] == [
        "g-merge_method=actmat-ridge=0.01", "g-merge_method=actmat-ridge=0.1", "g-merge_method=actmat-ridge=1.0",
        "g-merge_method=wudi-ridge=0.01", "g-merge_method=wudi-ridge=0.1", "g-merge_method=wudi-ridge=1.0", "ties",
    ]  # fmt: skip
    assert night.jobs[4].recipe.method == "wudi"
    assert night.jobs[4].recipe.to_dict()["parameters"] == {"ridge": 0.1}


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_merge_of_a_batch_is_what_it_is_alone(family, tmp_path, monkeypatch, lanes):
    monkeypatch.setattr(together, "thread_limit", lambda: lanes)
    path = write_night(tmp_path, [grid(family), {"recipe": recipe_of(family, "ties", parameters={"density": 0.3})}])
    outcome = api.batch(path)
    assert not outcome.failed
    assert_as_alone(path, tmp_path)


def test_jobs_that_differ_in_the_ridge_alone_form_one_system_of_each_matrix(family, tmp_path, monkeypatch):
    formed: list[str] = []

    def counted(function: Callable[..., System]) -> Callable[..., System]:
        def call(*arguments: Any, **more: Any) -> System:
            formed.append(function.__name__)
            return function(*arguments, **more)

        return call

    for form in (systems.primal, systems.dual):
        monkeypatch.setattr(normal_equations, form.__name__, counted(form))
    # a lane for each method
    monkeypatch.setattr(together, "thread_limit", lambda: 2)
    path = write_night(tmp_path, [grid(family)])
    assert not api.batch(path).failed
    side_by_side = len(formed)
    for job in read_night(path).jobs:
        streammerge.merge(job.recipe, tmp_path / "alone" / job.name)
    # two methods of three ridges each
    assert len(formed) - side_by_side == 3 * side_by_side
    assert set(formed) == {"primal", "dual"}


def merged_by_element(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every tensor of which a block is averaged."""
    seen: list[str] = []
    before = Deltas.weighted_sum

    def weighted_sum(self: Deltas, *arguments: Any, **more: Any) -> Tensor:
        seen.append(self.name)
        return before(self, *arguments, **more)

    monkeypatch.setattr(Deltas, "weighted_sum", weighted_sum)
    return seen


@pytest.mark.parametrize("lanes", [1, 3])
def test_what_all_methods_average_is_averaged_once(family, tmp_path, monkeypatch, lanes):
    monkeypatch.setattr(together, "thread_limit", lambda: lanes)
    seen = merged_by_element(monkeypatch)
    path = write_night(tmp_path, [grid(family)])
    assert not api.batch(path).failed
    side_by_side = Counter(seen)
    seen.clear()
    streammerge.merge(read_night(path).jobs[0].recipe, tmp_path / "alone")
    assert side_by_side == Counter(seen)
    assert "model.embed_tokens.weight" in side_by_side


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"rounding": "stochastic"}),
        ({"rounding": "stochastic"}, {"rounding": "stochastic", "seed": 7}),
        ({}, {"out_dtype": "float32"}),
    ],
    ids=["rounding", "seed", "dtype"],
)
def test_what_another_merge_makes_otherwise_is_not_taken_from_it(family, tmp_path, one, other):
    jobs = [{"name": name, "recipe": recipe_of(family, **more)} for name, more in (("one", one), ("other", other))]
    path = write_night(tmp_path, jobs)
    assert not api.batch(path).failed
    assert_as_alone(path, tmp_path)
    assert digests(tmp_path / "night" / "one") != digests(tmp_path / "night" / "other")


def test_a_report_does_not_tell_whether_another_merge_had_formed_the_system(family, tmp_path):
    path = write_night(tmp_path, [grid(family)])
    api.batch(path)
    for job in read_night(path).jobs:
        streammerge.merge(job.recipe, tmp_path / "alone" / job.name)
        beside, alone = (
            json.loads((tmp_path / folder / job.name / "streammerge.json").read_text())["tensors"]
            for folder in ("night", "alone")
        )
        for tensor in (*beside, *alone):
            del tensor["seconds"]
        assert beside == alone


def test_jobs_of_the_same_models_read_them_once(family, tmp_path, monkeypatch):
    read: list[SharedStorage] = []
    before = SharedStorage.__init__

    def noted(self: SharedStorage, *arguments: object) -> None:
        before(self, *arguments)  # type: ignore[arg-type]
        read.append(self)

    monkeypatch.setattr(SharedStorage, "__init__", noted)
    api.batch(write_night(tmp_path, [grid(family)]))
    stored = sum(path.stat().st_size for name in family for path in family[name].glob("*.safetensors"))
    assert len(read) == 1
    assert read[0].read_bytes <= stored


def test_a_failing_job_keeps_no_other_from_running_and_is_tried_again(family, tmp_path):
    missing = {**recipe_of(family), "models": [{"model": str(tmp_path / "later")}]}
    path = write_night(tmp_path, [{"name": "late", "recipe": missing}, {"recipe": recipe_of(family, "linear")}])
    outcome = api.batch(path)
    assert outcome.done == ["linear"]
    assert "does not exist" in outcome.failed["late"].message
    save_model(tmp_path / "later", tuned(llama_tensors(), 3))
    outcome = api.batch(path)
    assert outcome.done == ["linear", "late"]
    statuses = [json.loads(line)["status"] for line in (tmp_path / "night" / "results.jsonl").read_text().splitlines()]
    assert statuses == ["failed", "merged", "merged"]


def test_a_job_that_fails_while_others_of_its_group_run_leaves_them_alone(family, tmp_path):
    poisoned = tuned(llama_tensors(), 4)
    name = max(poisoned, key=lambda each: poisoned[each].numel())
    poisoned[name].view(-1)[7] = float("nan")
    family = {**family, "two": save_model(tmp_path / "poisoned", poisoned)}
    passing = {**recipe_of(family, "linear"), "non_finite": "pass", "name": "passing"}
    outcome = api.batch(write_night(tmp_path, [{"recipe": recipe_of(family)}, {"recipe": passing}]))
    assert outcome.done == ["passing"]
    assert name in outcome.failed["actmat"].message
    assert streammerge.verify(tmp_path / "night" / "passing").tensors


def test_stopping_leaves_what_running_again_finishes(family, tmp_path):
    path = write_night(tmp_path, [grid(family)])
    asked = iter([False] * 5 + [True] * 1000)
    outcome = api.batch(path, stopped=lambda: next(asked))
    assert outcome.stopped
    assert not outcome.done
    outcome = api.batch(path)
    assert len(outcome.done) == 6
    assert_as_alone(path, tmp_path)


def test_running_a_finished_batch_again_does_nothing(family, tmp_path):
    path = write_night(tmp_path, [grid(family)], evaluate={"command": SCORE})
    api.batch(path)
    told: list[str] = []
    before = (tmp_path / "night" / "results.jsonl").read_bytes()
    outcome = api.batch(path, tell=lambda name, text: told.append(text))
    assert len(outcome.done) == 6
    assert not told
    assert (tmp_path / "night" / "results.jsonl").read_bytes() == before


def test_only_the_best_are_kept_and_the_others_metrics_stay(family, tmp_path):
    # the score is the length of the name
    path = write_night(
        tmp_path, [grid(family)], evaluate={"command": SCORE}, keep={"best": 2, "by": "command.size", "order": "min"}
    )
    outcome = api.batch(path)
    assert len(outcome.done) == 6
    left = sorted(each.name for each in (tmp_path / "night").iterdir() if each.is_dir())
    assert left == ["g-merge_method=wudi-ridge=0.1", "g-merge_method=wudi-ridge=1.0"]
    with Ledger(str(tmp_path / "night")) as ledger:
        entries = [ledger.last(job) for job in read_night(path).jobs]
    assert [entry.status for entry in entries if entry].count("deleted") == 4
    assert all(entry is not None and entry.metrics for entry in entries)
    assert api.batch(path).done
    assert sorted(each.name for each in (tmp_path / "night").iterdir() if each.is_dir()) == left


def test_nothing_is_deleted_by_a_metric_that_is_not_there(family, tmp_path):
    path = write_night(tmp_path, [grid(family)], evaluate={"command": SCORE}, keep={"best": 1, "by": "acc"})
    with pytest.raises(EvaluationError, match="has no metric `acc`"):
        api.batch(path)
    assert not list((tmp_path / "night").glob(".*deleted"))


def test_a_deletion_that_a_crash_cut_short_is_finished(family, tmp_path):
    path = write_night(tmp_path, [{"recipe": recipe_of(family, "linear")}], evaluate={"command": SCORE}, keep="none")
    (job,) = read_night(path).jobs
    streammerge.merge(job.recipe, tmp_path / "night" / "linear")
    with Ledger(str(tmp_path / "night")) as ledger:
        ledger.note(job, "deleted")
    api.batch(path)
    assert not (tmp_path / "night" / "linear").exists()


def test_what_is_not_a_merge_of_the_batch_is_neither_taken_nor_deleted(family, tmp_path):
    path = write_night(tmp_path, [{"recipe": recipe_of(family, "linear")}])
    for stranger in ("notes", "another"):
        folder = tmp_path / "night" / "linear"
        if stranger == "notes":
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("mine")
        else:
            (folder / "notes.txt").unlink()
            streammerge.merge(recipe_of(family, "ties"), folder)
        with pytest.raises(OutputError, match="no merge" if stranger == "notes" else "another recipe"):
            api.batch(path)
    with Ledger(str(tmp_path / "night")) as ledger, pytest.raises(OutputError):
        Folders(read_night(path), ledger).delete(read_night(path).jobs[0])


def test_two_batches_never_share_a_folder(family, tmp_path):
    path = write_night(tmp_path, [{"recipe": recipe_of(family, "linear")}])
    with Ledger(str(tmp_path / "night")), pytest.raises(OutputError, match="another process"):
        api.batch(path)


@pytest.mark.parametrize(
    "line", ["3", "[1]", '{"job": 1}', '{"job": "a", "status": "x"}', '{"job": "a", "status": "merged", "metrics": 3}']
)
def test_a_ledger_that_no_batch_wrote_is_refused(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(OutputError, match=r"results\.jsonl"):
        Ledger(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": []}, "no job"),
        ({"jobs": [{"name": "a"}]}, "`recipe` is missing"),
        ({"jobs": [{"recipe": "nowhere.yaml"}]}, "does not exist"),
        ({"keep": {"best": 1, "by": "x"}}, "nothing evaluates"),
        ({"keep": "some"}, "`all` or `none`"),
        ({"evaluate": {"command": "run it"}}, "says nowhere what"),
        ({"evaluate": {}}, "names no harness"),
        ({"grid": 3}, "unknown"),
    ],
)
def test_a_wrong_batch_is_refused_by_its_line(family, tmp_path, change, message):
    path = write_night(tmp_path, **{"jobs": [{"recipe": recipe_of(family, "linear")}], **change})
    with pytest.raises(RecipeError, match=message):
        read_night(path)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"parameters.rigde": [1.0]}, "unknown parameter"),
        ({"parameters.ridge": []}, "none of them empty"),
        ({"models.7.model": ["x"]}, "no number from 0 to 1"),
        ({"merge_method.x": [1]}, "no parts"),
        ({"parameters.ridge": [0.1, 0.1]}, "2 jobs are called"),
    ],
)
def test_a_wrong_grid_is_refused_by_its_line(family, tmp_path, axes, message):
    with pytest.raises(RecipeError, match=message):
        read_night(write_night(tmp_path, [{**grid(family), "grid": axes}]))


def test_names_of_folders_hold_nothing_that_leads_elsewhere(family, tmp_path):
    night = read_night(write_night(tmp_path, [{"name": "../../etc/x y", "recipe": recipe_of(family)}]))
    assert night.jobs[0].name == "etc-x-y"


def test_the_outline_plans_and_merges_nothing(family, tmp_path):
    path = write_night(tmp_path, [grid(family)])
    found = api.outline(path)
    assert not found.failed
    assert [len(each.group.jobs) for each in found.groups] == [6]
    assert not (tmp_path / "night").exists()


def test_the_outline_counts_what_is_shared_once(family, tmp_path):
    path = write_night(tmp_path, [grid(family), {"name": "one", "recipe": {**recipe_of(family, "linear"), "models": [
        {"model": str(family["one"])}]}}])  # fmt: skip
    together, alone = api.outline(path, memory="4GiB").groups
    plans = together.group.plans
    assert together.read_bytes == plans[0].read_bytes
    assert together.write_bytes == sum(plan.layout.total_bytes for plan in plans)
    found = api.outline(path, memory="4GiB")
    assert found.read_bytes == together.read_bytes + alone.read_bytes
    assert found.alone_bytes == 6 * together.read_bytes + alone.read_bytes
    assert found.most_bytes == together.write_bytes + alone.write_bytes
    assert found.fetch_bytes == 0


def test_the_outlines_time_shares_the_reading_and_adds_up_the_rest(family, tmp_path, monkeypatch):
    path = write_night(tmp_path, [grid(family)])
    monkeypatch.setattr("streammerge.batching.forecast.load_rates", lambda *kinds: None)
    assert api.outline(path).seconds is None
    for rates in (Rates(1.0, 1e9, 1e15, 1e15), Rates(1e9, 1.0, 1e15, 1e15), Rates(1e9, 1e9, 1.0, 1e15)):
        monkeypatch.setattr("streammerge.batching.forecast.load_rates", lambda *kinds, rates=rates: rates)
        (each,) = api.outline(path).groups
        plans = each.group.plans
        expected = (plans[0].work.read_bytes, each.write_bytes, sum(plan.work.matrix_flops for plan in plans))
        assert each.seconds == pytest.approx(
            max(expected[0] / rates.read_bytes_per_second, expected[1] / rates.write_bytes_per_second,
                expected[2] / rates.flops_per_second)
        )  # fmt: skip


def test_the_outline_needs_the_disk_of_what_stays_and_what_is_made(family, tmp_path):
    path = write_night(tmp_path, [grid(family)], evaluate={"command": SCORE}, keep={"best": 1, "by": "command.size"})
    found = api.outline(path, memory="640MiB")
    first, *others = [each.write_bytes for each in found.groups]
    one = found.groups[0].group.plans[0].layout.total_bytes
    assert others
    assert found.most_bytes == max(first, *(one + each for each in others)) < first + sum(others)


def test_the_outline_leaves_out_what_is_done(family, tmp_path):
    path = write_night(tmp_path, [grid(family)], evaluate={"command": SCORE}, keep={"best": 2, "by": "command.size"})
    api.batch(path)
    more = write_night(tmp_path, [grid(family), {"recipe": recipe_of(family, "linear")}])
    done = CliRunner().invoke(cli, ["batch", str(more), "--dry-run"], catch_exceptions=False)
    assert done.output.count(" is done\n") == 6
    assert done.output.startswith("1 job: read ")
    assert json.loads(CliRunner().invoke(cli, ["batch", str(more), "--dry-run", "--json"]).output)["done"] == [
        job.name for job in read_night(more).jobs[:6]
    ]


def test_a_dry_run_loads_no_torch(family, tmp_path):
    code = f"import sys; from streammerge import api; api.outline({str(write_night(tmp_path, [grid(family)]))!r}); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_small_budget_runs_fewer_jobs_side_by_side(family, tmp_path):
    path = write_night(tmp_path, [grid(family)])
    groups = [each.group for each in api.outline(path, memory="640MiB").groups]
    assert 1 < len(groups) < 6
    for group in groups:
        slots = sum(p.memory.peak_bytes - p.memory.workspace_bytes - p.memory.reserve_bytes for p in group.plans)
        steps = max(p.memory.workspace_bytes + p.memory.reserve_bytes for p in group.plans)
        assert slots + group.lanes * steps + group.kept_bytes <= 640 << 20


def test_an_error_of_one_lane_ends_all_when_their_steps_are_over(family, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "thread_limit", lambda: 3)
    seen: list[str] = []
    before = Merging.steps

    def steps(self: Merging) -> Iterator[str]:
        for number, name in enumerate(before(self)):
            if number == 2 and self._planned.recipe.method == "wudi":
                raise ZeroDivisionError
            seen.append(name)
            yield name

    monkeypatch.setattr(Merging, "steps", steps)
    path = write_night(tmp_path, [grid(family)])
    with pytest.raises(ZeroDivisionError):
        api.batch(path)
    assert seen
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("streammerge-")]
    monkeypatch.setattr(Merging, "steps", before)
    assert len(api.batch(path).done) == 6


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_step_that_fails_while_another_lane_waits_for_what_it_finds_ends_one_merge_alone(
    family, tmp_path, monkeypatch, lanes
):
    monkeypatch.setattr(together, "thread_limit", lambda: lanes)
    before, begun = normal_equations.primal, threading.Lock()

    def failing_once(*arguments: Any, **more: Any) -> System:
        if begun.acquire(blocking=False):
            time.sleep(0.3)
            raise MergeError("this one fails")
        return before(*arguments, **more)

    monkeypatch.setattr(normal_equations, "primal", failing_once)
    # a merge for each lane: nobody else would find it afterwards
    ridges = [0.01, 0.1, 0.3][: max(lanes, 2)]
    axes = {"parameters.ridge": ridges}
    path = write_night(tmp_path, [{"name": "g", "recipe": recipe_of(family), "grid": axes}])
    outcome = api.batch(path)
    assert len(outcome.failed) == 1
    assert len(outcome.done) == len(ridges) - 1
    assert_as_alone(path, tmp_path, but=tuple(outcome.failed))
    assert len(api.batch(path).done) == len(ridges)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_merges_that_are_resumed_at_different_tensors_end_as_alone(family, tmp_path, monkeypatch, lanes):
    monkeypatch.setattr(together, "thread_limit", lambda: lanes)
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    path = write_night(tmp_path, [grid(family)])
    asked = iter([False] * 60 + [True] * 1000)
    assert api.batch(path, stopped=lambda: next(asked)).stopped
    for number, job in enumerate(read_night(path).jobs):
        partial = tmp_path / "night" / f"{job.name}.partial"
        assert len((partial / "journal.jsonl").read_text().splitlines()) > 5
        if number % 2:
            shutil.rmtree(partial)
    assert not api.batch(path).failed
    assert_as_alone(path, tmp_path)


def test_a_merge_that_cannot_be_published_keeps_no_other_from_it(family, tmp_path, monkeypatch):
    monkeypatch.setattr(together, "thread_limit", lambda: 2)
    before = Merging.publish

    def publish(self: Merging) -> Report:
        if self._planned.recipe.to_dict()["parameters"] == {"ridge": 0.1}:
            raise OutputError("this one stays")
        return before(self)

    monkeypatch.setattr(Merging, "publish", publish)
    path = write_night(tmp_path, [grid(family)])
    outcome = api.batch(path)
    names = [job.name for job in read_night(path).jobs]
    assert list(outcome.failed) == [name for name in names if name.endswith("=0.1")]
    # whichever lane was first
    assert outcome.done == [name for name in names if not name.endswith("=0.1")]
    monkeypatch.setattr(Merging, "publish", before)
    assert len(api.batch(path).done) == 6
    assert_as_alone(path, tmp_path)


def test_what_is_kept_of_files_is_bounded_and_read_again_when_gone():
    storage = MemoryStorage({"m": {"w": torch.arange(4 * CHUNK_BYTES // 4, dtype=torch.float32)}})
    shared = SharedStorage(storage, 2 * CHUNK_BYTES)
    file, data = shared.open("m", "model.safetensors"), storage.contents["m"]["model.safetensors"]
    for offset, nbytes in ((0, 100), (50, CHUNK_BYTES), (0, len(data)), (len(data) - 3, 3), (7, 2 * CHUNK_BYTES)):
        buffer = memoryview(bytearray(nbytes))
        assert bytes(file.fetch(offset, nbytes, buffer)) == data[offset : offset + nbytes]
    assert shared.read_bytes > len(data)
    file.close()


def test_the_readers_of_a_chunk_that_cannot_be_read_all_hear_of_it():
    storage = MemoryStorage({"m": {"w": torch.zeros(4)}})
    storage.fail_at = 0
    file = SharedStorage(storage, CHUNK_BYTES).open("m", "model.safetensors")
    with pytest.raises(OSError, match="Input/output error"):
        file.fetch(0, 8, memoryview(bytearray(8)))
    storage.fail_at = None
    assert len(file.fetch(0, 8, memoryview(bytearray(8)))) == 8


class Fetched(MemoryStorage):
    """Fetches while it `goes_on`."""

    def __init__(self) -> None:
        super().__init__({"m": {"w": torch.zeros(4)}})
        self.goes_on = False
        self.expected, self.stopping = threading.Event(), threading.Event()

    def pinned(self, location: str) -> str:
        return location

    def to_fetch(self, location: str, name: str) -> int:
        return 0

    def cache_folder(self, location: str) -> str:
        return location

    def downloaded(self, location: str) -> str:
        return location

    def expect(self, places: Sequence[Place], ahead: int) -> None:
        self.goes_on = True
        self.expected.set()

    def discard(self, location: str, name: str) -> None:
        pass

    def stop(self) -> None:
        self.stopping.set()
        # long enough for who does not wait for its end
        self.expected.wait(0.2)
        self.goes_on = False


def test_a_merge_that_ends_does_not_stop_what_another_has_begun_to_fetch():
    storage = Fetched()
    shared = SharedStorage(storage)
    shared.expect([], 1)
    storage.expected.clear()
    ends = threading.Thread(target=shared.stop)
    ends.start()
    assert storage.stopping.wait(10)
    shared.expect([], 1)
    ends.join(10)
    assert storage.goes_on


def run_until(path: Path, seconds: float, stop: signal.Signals) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "streammerge", "batch", str(path), "--quiet"], stderr=subprocess.DEVNULL
    )
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    process.send_signal(stop)
    return process.wait(120)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_batch_killed_again_and_again_ends_as_one_that_was_not(family, tmp_path, kills):
    options = {"evaluate": {"command": SCORE}, "keep": {"best": 3, "by": "command.size"}}
    path = write_night(tmp_path, [grid(family)], **options)
    chance = random.Random(kills)
    for _ in range(kills):
        run_until(path, chance.uniform(1.0, 5.0), signal.SIGKILL)
    assert api.batch(path).failed == {}
    (tmp_path / "whole").mkdir()
    whole = write_night(tmp_path / "whole", [grid(family)], **options)
    api.batch(whole)
    found, expected = tmp_path / "night", tmp_path / "whole" / "night"
    assert sorted(each.name for each in found.iterdir()) == sorted(each.name for each in expected.iterdir())
    for folder in (each for each in expected.iterdir() if each.is_dir()):
        assert digests(found / folder.name) == digests(folder)


def test_an_interrupted_command_says_how_to_go_on(family, tmp_path):
    path = write_night(tmp_path, [grid(family)])
    command = [sys.executable, "-m", "streammerge", "batch", str(path), "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "night" / "results.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 130)
    if process.returncode:
        assert f"streammerge batch {path}" in said
    assert run_until(path, 120, signal.SIGINT) == 0
    assert len(list((tmp_path / "night").glob("g-*"))) == 6
