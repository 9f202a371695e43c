"""Kills, signals, power cuts and failing calls: no output, or a right one; what is left can be resumed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import streammerge
from streammerge import memory, methods, write
from streammerge.errors import CheckpointError, OutputError, StreamMergeError
from streammerge.journal import JOURNAL, Journal
from streammerge.write import FORMAT
from tests import crashing, faults, odd_methods
from tests.models import recipe_of
from tests.stored import digests, models_under, streammerge_threads
from tests.test_resume import digests_but_journal, merge, partial_of
from tests.test_write import same_files, write_all

# kinds of merge that pass over their inputs, or over their state, in different ways
KINDS: dict[str, dict[str, object]] = {
    "task_arithmetic": {},
    "ties": {"parameters": {"density": 0.5}},
    "ties of the whole model": {"parameters": {"density": 0.5, "trim": "model"}},
    "actmat": {},
    "centres_rows of pools": {"parameters": {"pool": "inputs"}},
    "stochastic rounding": {"merge_method": "task_arithmetic", "rounding": "stochastic"},
}
long = pytest.mark.long


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in odd_methods.NAMES:
        monkeypatch.setitem(methods.METHODS, name, "tests.odd_methods")
    monkeypatch.setattr(memory, "LARGEST_SLOT_BYTES", memory.LARGEST_SLOT_BYTES)
    monkeypatch.setattr(write, "GROUP_BYTES", write.GROUP_BYTES)
    crashing.small_pieces()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder of its own, so that whatever is left over shows."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def recipe(family: dict[str, Path]) -> dict[str, object]:
    return recipe_of(family, "task_arithmetic")


@pytest.fixture
def whole(recipe: dict[str, object], tmp_path: Path) -> dict[str, str]:
    merge(recipe, tmp_path / "whole")
    return digests(tmp_path / "whole")


def of_kind(family: Mapping[str, Path], kind: str) -> dict[str, object]:
    return recipe_of(family, kind.split()[0]) | KINDS[kind]


def settle(recipe: Mapping[str, object], out: Path, whole: Mapping[str, str]) -> None:
    """Whatever happened to a merge: there is no output or a right one, and resuming ends with the same bytes."""
    assert {path.name for path in out.parent.iterdir() if path.is_dir()} <= {out.name, partial_of(out).name}
    for model in models_under(out.parent):
        assert digests_but_journal(model) == whole, f"{model} looks like a model and is not one"
    if not out.exists() or (out / JOURNAL).exists():
        merge(recipe, out, resume=True)
    assert digests(out) == whole
    assert not partial_of(out).exists()
    assert streammerge_threads() == []


@dataclass(frozen=True)
class Unstopped:
    """A merge that nothing stopped: its bytes and the phase of each of its calls."""

    digests: dict[str, str]
    phases: list[str]

    @property
    def calls(self) -> Counter[str]:
        """How many calls each phase has, in the merge's order."""
        return Counter(self.phases)


def unstopped(recipe: Mapping[str, object], folder: Path) -> Unstopped:
    whole = folder / "whole"
    code, _, phases = crashing.stopped(recipe, whole, 1 << 30)
    assert code == 0, whole.with_name("whole.stderr").read_text()
    return Unstopped(digests(whole), phases)


def stopped_once(
    recipe: Mapping[str, object], folder: Path, moment: int | tuple[str, int], after: float, wanted: Unstopped,
    number: int = signal.SIGKILL,
) -> crashing.Stopped:  # fmt: skip
    """Stop a merge, look at what it left and resume it."""
    out = folder / "stopped" / "out"
    out.parent.mkdir()
    found = crashing.stopped(recipe, out, moment, after, number=number)
    assert found.code is not None, "the merge hangs"
    said = out.with_name("out.stderr").read_text() if out.with_name("out.stderr").exists() else ""
    assert "Traceback" not in said, said
    settle(recipe, out, wanted.digests)
    shutil.rmtree(out.parent)
    return found


def random_moments(wanted: Unstopped, times: int, chance: random.Random) -> list[tuple[int, float]]:
    """Moments spread over a merge's length, and how long after each."""
    length = len(wanted.phases)
    # not before the first call: until then the command line has not begun
    moments = [max(int((turn + chance.random()) / times * (length + 2)), 1) for turn in range(times)]
    return [(moment, chance.uniform(0, 3 * crashing.PAUSE_SECONDS)) for moment in moments]


def killed_in(recipe: Mapping[str, object], folder: Path, phase: str, wanted: Unstopped, chance: random.Random) -> None:
    """Kill a merge in one of a phase's calls."""
    drawn = 1 + int(chance.random() * wanted.calls[phase] / 2)
    # threads run beside each other, so one phase may have fewer calls in another run
    for call in (drawn, 1):
        found = stopped_once(recipe, folder, (phase, call), chance.uniform(0, 3 * crashing.PAUSE_SECONDS), wanted)
        if found.code != 0:
            break
    assert found.code == -signal.SIGKILL
    assert found.hit == phase


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_in_each_phase_of_each_kind_of_merge_leaves_one_to_resume(family, disk, kind):
    recipe, chance = of_kind(family, kind), random.Random(kind)
    wanted = unstopped(recipe, disk)
    looking = {"looking"} if kind == "ties of the whole model" else set()
    assert set(wanted.calls) == set(crashing.PHASES) - {"looking"} | looking
    for phase in wanted.calls:
        killed_in(recipe, disk, phase, wanted, chance)


@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_kills_at_random_moments_leave_a_merge_to_resume(family, disk, kind):
    recipe = of_kind(family, kind)
    wanted = unstopped(recipe, disk)
    codes = {
        stopped_once(recipe, disk, moment, after, wanted).code
        for moment, after in random_moments(wanted, 2, random.Random(kind))
    }
    assert codes <= {0, -signal.SIGKILL}


@long
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_seventeen_kills_of_each_kind_of_merge_hit_each_of_its_phases(family, disk, kind, seed):
    recipe, chance = of_kind(family, kind), random.Random(1 + seed)
    wanted = unstopped(recipe, disk)
    for phase in wanted.calls:
        killed_in(recipe, disk, phase, wanted, chance)
        print(f"killed while {phase}", flush=True)  # noqa: T201 - the test takes long
    hit: Counter[str] = Counter()
    for moment, after in random_moments(wanted, 17 - len(wanted.calls), chance):
        found = stopped_once(recipe, disk, moment, after, wanted)
        assert found.code in (0, -signal.SIGKILL)
        hit[found.hit] += 1
        print(f"killed at call {moment} of {len(wanted.phases)}, while {found.hit}", flush=True)  # noqa: T201
    # what takes most of a merge's calls is hit by chance, too
    assert hit.keys() & {"reading", "writing", "committing"}


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=long)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_a_random_moment_ends_a_merge_that_can_be_resumed(recipe, disk, number, times):
    wanted = unstopped(recipe, disk)
    for moment, after in random_moments(wanted, times, random.Random(number)):
        code = stopped_once(recipe, disk, moment, after, wanted, number).code
        # interrupted, or over before
        assert code in (130, 0), code


def noted(disk: Path, act: Callable[[], object]) -> faults.Disk:
    notes = faults.Disk(disk)
    with notes.noting():
        act()
    return notes


def settle_power_cuts(
    recipe: Mapping[str, object], notes: faults.Disk, folder: Path, whole: Mapping[str, str],
    moments: list[int], seed: int,
) -> None:  # fmt: skip
    for moment in moments:
        target = folder / f"cut{moment}"
        notes.power_cut(moment, random.Random(1000 * seed + moment), target)
        if moment == len(notes.changes):
            assert digests_but_journal(target / "out") == whole, "a merge that had ended was lost"
        settle(recipe, target / "out", whole)
        shutil.rmtree(target)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=long) for n in range(1, 4))])
def test_a_power_cut_that_loses_and_reorders_what_was_not_synced_leaves_a_merge_to_resume(
    recipe, disk, tmp_path, whole, seed
):
    notes = noted(disk, lambda: merge(recipe, disk / "out"))
    last = len(notes.changes)
    assert last > 100
    moments = (
        range(last + 1) if seed else [*random.Random(0).sample(range(last), 10), last - 8, last - 5, last - 2, last]
    )
    settle_power_cuts(recipe, notes, tmp_path, whole, list(moments), seed)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=long) for n in range(1, 4))])
@pytest.mark.parametrize("begun", ["merging", "publishing", "untidied"])
def test_a_power_cut_during_a_resumption_leaves_one_to_resume(recipe, disk, tmp_path, whole, begun, seed):
    first = noted(disk, lambda: merge(recipe, disk / "out"))
    renames = [place for place, (_, kind, _) in enumerate(first.changes) if kind == "rename"]
    moment = {"merging": renames[0] // 2, "publishing": renames[3], "untidied": renames[-1] + 2}[begun]
    # nothing of it is lost, so that there is something to resume
    again = tmp_path / "again"
    for number in itertools.count():
        first.power_cut(moment, random.Random(number), again)
        if (again / "out" / JOURNAL).exists() if begun == "untidied" else (again / "out.partial" / JOURNAL).exists():
            break
        shutil.rmtree(again)
    notes = noted(again, lambda: merge(recipe, again / "out", resume=True))
    last = len(notes.changes)
    moments = range(last + 1) if seed else [*random.Random(0).sample(range(last), 4), 1, 2, 3, last]
    settle_power_cuts(recipe, notes, tmp_path, whole, list(moments), seed)


def test_parents_that_a_merge_made_outlast_a_power_cut(recipe, disk, tmp_path, whole):
    notes = noted(disk, lambda: merge(recipe, disk / "a" / "b" / "out"))
    for seed in range(4):
        notes.power_cut(len(notes.changes), random.Random(seed), tmp_path / f"cut{seed}")
        assert digests_but_journal(tmp_path / f"cut{seed}" / "a" / "b" / "out") == whole


FAULTS = {
    "EIO once": (errno.EIO, False),
    "ENOSPC once": (errno.ENOSPC, False),
    "ENOSPC from then on": (errno.ENOSPC, True),
    "short": (None, True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_call_of_the_writer_may_fail(disk, fault, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    code, forever = FAULTS[fault]
    whole = disk / "whole"
    whole.mkdir()
    write_all(whole / "out", max_shard_bytes=64)
    failed: Counter[str | None] = Counter()
    for k in itertools.count():
        out = disk / f"at{k}" / "out"
        out.parent.mkdir()
        failing = faults.Failing(k, code, forever=forever)
        told = None
        with faults.intercepted(faults.WRITING, out.parent, failing), faults.within(30):
            try:
                write_all(out, max_shard_bytes=64)
            except OutputError as error:
                told = error
        failed[failing.failed] += 1
        assert streammerge_threads() == []
        assert set(os.listdir(out.parent)) <= {"out", "out.partial"}
        assert all(same_files(model, whole / "out") for model in models_under(out.parent))
        assert told is None or failing.failed is not None
        assert told is None or told.hint is not None or code == errno.EIO
        if not out.exists() or (out / JOURNAL).exists():
            assert told is not None
            write_all(out, resume=True, max_shard_bytes=64)
        assert same_files(out, whole / "out")
        assert os.listdir(out.parent) == ["out"]
        if failing.calls <= k:
            break
    assert k > 100
    if code is not None:
        assert set(faults.WRITING) - {"rmdir", "preadv", "pread", "ftruncate", "lstat", "listdir"} <= failed.keys()


def merge_with_failing(
    calls: tuple[str, ...], root: Path, recipe: Mapping[str, object], out: Path, k: int, fault: str
) -> faults.Failing:
    code, forever = FAULTS[fault]
    failing = faults.Failing(k, code, forever=forever)
    with faults.intercepted(calls, root, failing), faults.within(30), suppress(StreamMergeError):
        merge(recipe, out)
    assert failing.failed is not None or out.exists()
    return failing


@pytest.mark.parametrize("side", ["reading", "writing"])
@pytest.mark.parametrize("fault", FAULTS)
def test_some_call_of_a_merge_fails(recipe, family, tmp_path, disk, whole, fault, side):
    calls, root = (faults.READING, family["math"]) if side == "reading" else (faults.WRITING, disk)
    last = merge_with_failing(calls, root, recipe, disk / "out", 1 << 30, fault).calls
    shutil.rmtree(disk / "out")
    for k in random.Random(fault).sample(range(last), 3):
        merge_with_failing(calls, root, recipe, disk / "out", k, fault)
        settle(recipe, disk / "out", whole)
        shutil.rmtree(disk / "out")


@long
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("side", ["reading", "writing"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_call_of_a_merge_may_fail(recipe, family, disk, whole, fault, side, part):
    calls, root = (faults.READING, family["math"]) if side == "reading" else (faults.WRITING, disk)
    for k in itertools.count(part, 4):
        failing = merge_with_failing(calls, root, recipe, disk / "out", k, fault)
        settle(recipe, disk / "out", whole)
        shutil.rmtree(disk / "out")
        if k % 40 < 4:
            print(f"call {k} failed", flush=True)  # noqa: T201 - the test takes long
        if failing.calls <= k:
            break
    assert k > 50


Change = Callable[[Path], None]


def touched(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def longer(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0" * 8)


def replaced(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy(file, other)
    os.replace(other, file)


def with_another_header(file: Path) -> None:
    facts, content = file.stat(), file.read_bytes()
    file.write_bytes(content.replace(b'"format":"pt"', b'"format":"pq"'))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (touched, "was written to: its modification time is another"),
        (longer, r"had \d+ bytes and has \d+"),
        (replaced, "was written to: its modification time is another"),
        (with_another_header, "was written to: its header is another"),
        (gone, "is gone"),
    ],
)
def test_an_input_that_changes_during_the_merge_is_named_and_nothing_is_published(
    recipe, family, tmp_path, disk, whole, change, named
):
    file = sorted(family["math"].glob("*.safetensors"))[0]
    before = tmp_path / "before"
    shutil.copy2(file, before)
    todo = [change]

    def progress(done: int, total: int) -> None:
        # at the end, when the file has been read
        if done == total and todo:
            todo.pop()(file)

    out = disk / "out"
    with pytest.raises(CheckpointError, match=rf"inputs changed during the merge:\n  `{file}` {named}") as caught:
        merge(recipe, out, progress=progress)
    assert not todo
    assert caught.value.hint is not None
    assert f"or delete `{out}.partial` and begin anew" in caught.value.hint
    assert models_under(disk) == []
    assert not out.exists()
    with pytest.raises(StreamMergeError, match="math"):
        merge(recipe, out, resume=True)
    shutil.copy2(before, file)
    report = merge(recipe, out, resume=True)
    # nothing that was read of a changing file is trusted
    assert report.resumed_tensors == 0
    assert digests(out) == whole


def test_a_tokenizer_that_changed_is_not_put_beside_weights_of_before(recipe, family, disk, whole):
    out = disk / "out"
    assert crashing.dies(recipe, out, 60)
    tokenizer = family["base"] / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text('{"version": "2.0"}')
    with pytest.raises(OutputError, match=r"`side_files\.tokenizer\.json` was `\"\w+\"` and is `\"\w+\"`"):
        merge(recipe, out, resume=True)
    tokenizer.write_text(text)
    settle(recipe, out, whole)


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1, None])
def test_a_journal_of_another_format_is_refused_and_both_are_named(recipe, disk, whole, other):
    out = disk / "out"
    assert crashing.dies(recipe, out, 60)
    journal = partial_of(out) / JOURNAL
    text = journal.read_bytes()
    first, rest = text.split(b"\n", 1)
    begun = json.loads(first)
    assert begun.pop("format") == FORMAT
    journal.write_bytes(json.dumps(begun if other is None else {"format": other, **begun}).encode() + b"\n" + rest)
    with pytest.raises(OutputError) as caught:
        merge(recipe, out, resume=True)
    found = "null" if other is None else other
    assert caught.value.message == f"`{journal}` has the format `{found}`, expected `{FORMAT}`"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Finish it with the version of streammerge that began it")
    journal.write_bytes(text)
    settle(recipe, out, whole)


@pytest.fixture
def untidied(recipe: dict[str, object], disk: Path) -> Path:
    """A merge stopped between its last rename and the removal of its journal."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with faults.intercepted(("unlink",), disk, stop), pytest.raises(KeyboardInterrupt):
        merge(recipe, disk / "out")
    assert (disk / "out" / JOURNAL).exists()
    return disk / "out"


def test_a_merge_killed_before_it_removed_its_journal_is_tidied_by_resuming(recipe, whole, untidied):
    assert digests_but_journal(untidied) == whole
    with pytest.raises(OutputError, match="holds a merge that was stopped just after it was complete") as caught:
        merge(recipe, untidied)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Pass `--resume` to check it and to remove its journal")
    report = merge(recipe, untidied, resume=True)
    assert report.read_bytes == 0
    assert digests(untidied) == whole
    assert streammerge.verify(untidied).problems == ()


def test_verify_reads_what_is_complete_but_for_its_journal_and_says_that_it_is_there(recipe, whole, untidied):
    found = streammerge.verify(untidied, inputs=True, recompute=3)
    assert found.problems == ()
    (note,) = found.notes
    assert note.startswith("`journal.jsonl` is in the folder, which says where the inputs lay: a merge was stopped")
    assert digests_but_journal(untidied) == whole
    merge(recipe, untidied, resume=True)
    assert streammerge.verify(untidied).notes == ()


def test_what_is_complete_but_for_its_journal_is_merged_again_where_its_bytes_changed(recipe, whole, untidied):
    weights = sorted(untidied.glob("*.safetensors"))[0]
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert len(streammerge.verify(untidied).problems) == 1
    report = merge(recipe, untidied, resume=True)
    assert report.resumed_tensors == len(report.tensors) - 1
    assert digests_but_journal(untidied).keys() == whole.keys()
    assert streammerge.verify(untidied).problems == ()


def test_what_is_complete_but_for_its_journal_is_not_touched_for_another_merge(recipe, whole, untidied):
    text = (untidied / JOURNAL).read_bytes()
    with pytest.raises(OutputError, match=r"out` was begun with other inputs:\n  `recipe\.parameters` was"):
        merge({**recipe, "parameters": {"weight": 0.5}}, untidied, resume=True)
    holder = Journal(untidied / JOURNAL)
    with pytest.raises(OutputError, match="out` is being written by another process"):
        merge(recipe, untidied, resume=True)
    holder.close()
    assert digests_but_journal(untidied) == whole
    assert (untidied / JOURNAL).read_bytes() == text


def test_a_folder_with_a_journal_of_someone_elses_is_left_alone(recipe, disk):
    (disk / "out").mkdir()
    (disk / "out" / JOURNAL).write_bytes(b'{"mine": 1}\n{"torn": ')
    with pytest.raises(OutputError, match=rf"journal\.jsonl` has the format `null`, expected `{FORMAT}`"):
        merge(recipe, disk / "out", resume=True)
    assert (disk / "out" / JOURNAL).read_bytes() == b'{"mine": 1}\n{"torn": '
    assert os.listdir(disk) == ["out"]


@pytest.mark.parametrize("power_cut", [False, True])
def test_a_merge_killed_while_it_tidies_up_can_be_resumed(recipe, disk, whole, untidied, tmp_path, power_cut):
    for moment in range(0, 40, 10):
        again = tmp_path / f"at{moment}"
        shutil.copytree(disk, again)
        crashing.dies(recipe, again / "out", moment, resume=True, power_cut=power_cut)
        settle(recipe, again / "out", whole)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_merge_into_the_same_folder_is_refused_and_a_dead_ones_lock_is_not_in_the_way(
    recipe, disk, whole, resume
):
    out = disk / "out"
    first = crashing.start(recipe, out, rests_after=60)
    deadline = time.monotonic() + 60
    while not ((partial_of(out) / JOURNAL).exists() and (partial_of(out) / JOURNAL).stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(OutputError, match=r"out\.partial` is being written by another process"):
        merge(recipe, out, resume=resume)
    first.kill()
    first.join()
    settle(recipe, out, whole)


def test_a_lock_on_a_journal_that_lost_its_name_is_no_lock(disk, monkeypatch):
    # its holder published, or gave up, between our opening it and our lock
    path = disk / JOURNAL
    real = fcntl.flock

    def published(descriptor: int, how: int) -> None:
        real(descriptor, how)
        path.unlink()

    monkeypatch.setattr(fcntl, "flock", published)
    with pytest.raises(OutputError, match="is being written by another process"):
        Journal(path)
