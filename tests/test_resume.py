"""A merge that was stopped, however and whenever, resumes to the bytes of one that was not."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import streammerge
from streammerge import memory, write
from streammerge.errors import OutputError
from streammerge.write import JOURNAL
from tests import crashing
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import digests, models_under, tensors_of

METHODS = ("task_arithmetic", "actmat")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGEST_SLOT_BYTES", memory.LARGEST_SLOT_BYTES)
    monkeypatch.setattr(write, "GROUP_BYTES", write.GROUP_BYTES)
    crashing.small_pieces()


@pytest.fixture
def recipe(family: dict[str, Path]) -> dict[str, object]:
    return recipe_of(family, "task_arithmetic")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(recipe: dict[str, object], tmp_path: Path) -> dict[str, str]:
    """What an uninterrupted merge writes."""
    merge(recipe, tmp_path / "whole")
    return digests(tmp_path / "whole")


def merge(recipe: Mapping[str, object], out: Path, *, resume: bool = False, **more: object) -> streammerge.Report:
    return streammerge.merge(recipe, out, resume=resume, **{"max_shard_size": crashing.SHARD_BYTES, **more})


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def stopped(recipe: Mapping[str, object], out: Path, after: int = 20) -> Path:
    """A merge whose machine went away; its partial folder."""
    assert crashing.dies(recipe, out, after)
    return partial_of(out)


def finish(recipe: Mapping[str, object], out: Path, whole: dict[str, str]) -> streammerge.Report | None:
    """Resume, unless the merge had been published; check every byte."""
    report = None
    if not out.exists():
        for model in models_under(out.parent):
            if model == partial_of(out):
                assert digests_but_journal(model) == whole, "what looks like a model is not one"
        report = merge(recipe, out, resume=True)
    assert digests_but_journal(out) == whole
    assert not partial_of(out).exists()
    return report


def digests_but_journal(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(folder).items() if name != JOURNAL}


@pytest.mark.parametrize("power_cut", [False, True])
def test_a_merge_killed_at_any_moment_resumes_to_the_same_bytes(recipe, tmp_path, whole, power_cut):
    moments = random.Random(power_cut).sample(range(120), 6)
    for moment in moments:
        out = tmp_path / f"at{moment}"
        crashing.dies(recipe, out, moment, power_cut=power_cut)
        finish(recipe, out, whole)
        shutil.rmtree(out)


def test_a_power_cut_right_after_a_merge_loses_nothing(recipe, out, whole):
    assert crashing.dies(recipe, out, crashing.AFTER_THE_LAST, power_cut=True)
    assert digests(out) == whole


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power_cut", [False, True])
def test_a_merge_killed_at_every_moment_resumes_to_the_same_bytes(family, tmp_path, power_cut, method):
    recipe = recipe_of(family, method)
    merge(recipe, tmp_path / "whole")
    for moment in itertools.count():
        out = tmp_path / f"at{moment}"
        died = crashing.dies(recipe, out, moment, power_cut=power_cut)
        finish(recipe, out, digests(tmp_path / "whole"))
        shutil.rmtree(out)
        if moment % 20 == 0:
            print(f"killed at call {moment}", flush=True)  # noqa: T201 - the test takes long
        if not died:
            break
    assert moment > 100


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_a_merge_killed_again_and_again_gets_there(recipe, out, whole, seed):
    chance = random.Random(seed)
    for life in range(200):
        died = crashing.dies(recipe, out, chance.randrange(5, 60), power_cut=chance.random() < 0.5, resume=life > 0)
        if not died or out.exists():
            break
    assert digests_but_journal(out) == whole


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.long] if s > 3 else []) for s in range(60)])
def test_a_merge_killed_from_outside_resumes_to_the_same_bytes(recipe, out, whole, seed):
    process = crashing.start(recipe, out)
    deadline = time.monotonic() + 20
    while not partial_of(out).exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    process.kill()
    process.join()
    finish(recipe, out, whole)


def test_what_was_durable_is_not_read_again(recipe, out, whole):
    partial = stopped(recipe, out, 40)
    cited = (partial / JOURNAL).read_bytes().count(b"\n") - 1
    assert cited > 0
    report = finish(recipe, out, whole)
    assert report is not None
    assert report.resumed_tensors == cited
    plan = streammerge.plan(recipe)
    assert 0 < report.read_bytes < plan.read_bytes
    assert len(report.tensors) == len(plan.steps)


def test_resuming_what_was_never_begun_begins_it(recipe, out, whole):
    merge(recipe, out, resume=True)
    assert digests(out) == whole


@pytest.mark.parametrize("moment", range(8))
def test_a_merge_stopped_while_its_files_are_laid_out_resumes(recipe, out, whole, moment):
    stopped(recipe, out, moment)
    finish(recipe, out, whole)


def test_a_merge_stopped_while_it_is_published_resumes(recipe, out, whole, monkeypatch):
    real = os.rename
    for stop in range(100):
        renamed = []

        def rename(source: Path, target: Path, renamed=renamed, stop=stop) -> None:
            if len(renamed) == stop:
                raise KeyboardInterrupt
            renamed.append(target)
            real(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", rename)
            try:
                merge(recipe, out, resume=stop > 0)
            except KeyboardInterrupt:
                for model in models_under(out.parent):
                    assert model != partial_of(out) or digests_but_journal(model) == whole
                continue
        break
    assert stop > len(whole)
    assert digests(out) == whole


@pytest.mark.parametrize(
    "torn", [b"", b'{"name": "model.no', b'{"name": "lm_head.weight", "sha256": "00"}', b"\0" * 900]
)
def test_a_torn_line_of_the_journal_is_cut_off(recipe, out, whole, torn):
    partial = stopped(recipe, out, 40)
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    (partial / JOURNAL).write_bytes(b"".join(lines[:-1]) + torn)
    report = finish(recipe, out, whole)
    assert report is not None
    assert report.resumed_tensors == len(lines) - 2


def test_lines_after_one_that_cannot_be_read_do_not_count(recipe, out, whole):
    # one append may reach the disk page by page, the later page first
    partial = stopped(recipe, out, 60)
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    (partial / JOURNAL).write_bytes(b"".join(lines))
    report = finish(recipe, out, whole)
    assert report is not None
    assert report.resumed_tensors == 1


def test_a_journal_torn_in_its_first_line_begins_anew(recipe, out, whole):
    partial = stopped(recipe, out, 40)
    (partial / JOURNAL).write_bytes((partial / JOURNAL).read_bytes()[:50])
    report = finish(recipe, out, whole)
    assert report is not None
    assert report.resumed_tensors == 0


def test_a_finished_tensor_that_was_damaged_since_is_merged_again(recipe, out, whole):
    partial = stopped(recipe, out, 60)
    cited = [json.loads(line) for line in (partial / JOURNAL).read_bytes().splitlines()[1:]]
    placement = streammerge.plan(recipe, max_shard_size=crashing.SHARD_BYTES).layout.placements[cited[0]["name"]]
    shards = sorted(partial.glob("*.safetensors.partial"))
    with shards[placement.shard].open("r+b") as file:
        file.seek(placement.offset + placement.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    report = finish(recipe, out, whole)
    assert report is not None
    assert report.resumed_tensors == len(cited) - 1


def test_a_shard_that_was_cut_short_since_is_filled_again(recipe, out, whole):
    partial = stopped(recipe, out, 60)
    for staged in partial.glob("*.safetensors.partial"):
        os.truncate(staged, 100)
    finish(recipe, out, whole)


def test_a_shard_that_is_gone_is_named(recipe, out):
    partial = stopped(recipe, out, 40)
    gone = sorted(partial.glob("*.safetensors.partial"))[0]
    gone.unlink()
    with pytest.raises(OutputError, match=rf"`{gone}` is gone") as caught:
        merge(recipe, out, resume=True)
    assert caught.value.hint == "Delete that folder and merge again."


Change = Callable[[dict[str, object], Path], "tuple[dict[str, object], dict[str, object]]"]


def other_weight(recipe: dict[str, object], folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    return {**recipe, "parameters": {"weight": 0.5}}, {}


def other_order(recipe: dict[str, object], folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    models = recipe["models"]
    assert isinstance(models, list)
    return {**recipe, "models": models[::-1]}, {}


def other_shards(recipe: dict[str, object], folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    return recipe, {"max_shard_size": "1MB"}


def other_dtype(recipe: dict[str, object], folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    return {**recipe, "out_dtype": "float32"}, {}


def other_file(recipe: dict[str, object], folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    file = sorted((folder / "math").glob("*.safetensors"))[0]
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    return recipe, {}


def other_size(recipe: dict[str, object], folder: Path) -> tuple[dict[str, object], dict[str, object]]:
    shutil.rmtree(folder / "math")
    save_model(folder / "math", tuned(llama_tensors(), 9), shards=1)
    return recipe, {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weight, '`recipe.parameters` was `null` and is `{"weight": 0.5}`'),
        (other_order, "`recipe.models` was"),
        (other_shards, "`shards.model.safetensors` was `null` and is"),
        (other_dtype, '`recipe.out_dtype` was `null` and is `"float32"`'),
        (other_file, "`models.math.model-00001-of-00002.safetensors.modified_ns` was"),
        (other_size, "`models.math.model.safetensors` was `null` and is"),
    ],
)
def test_a_merge_of_something_else_is_not_resumed_and_the_difference_is_named(recipe, out, whole, change, named):
    partial = stopped(recipe, out, 40)
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    changed, more = change(recipe, out.parent)
    with pytest.raises(OutputError) as caught:
        merge(changed, out, resume=True, **more)
    assert caught.value.message.startswith(f"`{partial}` was begun with other inputs:\n  ")
    assert named in caught.value.message
    assert caught.value.hint == "Restore them to resume, or delete that folder and merge again."
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before
    if change not in (other_file, other_size):
        finish(recipe, out, whole)


def test_another_memory_budget_does_not_keep_a_merge_from_resuming(recipe, out, whole):
    stopped(recipe, out, 40)
    merge(recipe, out, resume=True, memory="2GiB")
    assert digests(out) == whole


SLOW_MERGE = """
import sys, time
sys.path[:0] = {path!r}
from tests import crashing
from streammerge import write
from streammerge.storage.output import OutputFile
crashing.small_pieces()
slowly, now = OutputFile.write, OutputFile.write
def slow(self, offset, data):
    time.sleep(0.02)
    now(self, offset, data)
OutputFile.write = slow
from streammerge.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_is_told_to_stop_says_so_and_can_be_resumed(recipe, out, whole, tmp_path, number):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = SLOW_MERGE.format(path=[path for path in sys.path if path])
    arguments = ["merge", str(tmp_path / "recipe.yaml"), str(out), "--max-shard-size", str(crashing.SHARD_BYTES)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        journal = partial_of(out) / JOURNAL
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.strip() == f"interrupted\n\nhint: Pass `--resume` to continue: `{out}.partial` holds what is done."
    report = finish(recipe, out, whole)
    assert report is not None
    assert report.resumed_tensors >= 3


def test_the_report_of_a_resumed_merge_speaks_of_every_tensor(recipe, out, whole):
    stopped(recipe, out, 60)
    finish(recipe, out, whole)
    report = json.loads((out / "streammerge.json").read_text())
    names = [tensor["name"] for tensor in report["tensors"]]
    assert sorted(names) == sorted(tensors_of(out))
    assert report["totals"]["resumed_tensors"] > 0
    assert all(tensor["sha256"] for tensor in report["tensors"])
    assert streammerge.verify(out).problems == ()
