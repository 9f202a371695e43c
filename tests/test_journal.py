"""What is read back of a journal: all that was appended, what a crash leaves of it, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.entries import OUTCOME, Entry, entry_of
from streammerge.errors import OutputError
from streammerge.journal import JOURNAL, MOST_LINE_BYTES, Journal
from streammerge.outcome import Outcome
from tests.fuzzing import JOURNAL_LINE as LINE
from tests.fuzzing import JOURNAL_NAMES as NAMES
from tests.models import recipe_of
from tests.stored import digests
from tests.test_resume import merge, partial_of, stopped

ROOT = Path(__file__).parent.parent
BEGUN = {"format": 2, "recipe": {"merge_method": "linear"}}


def line(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {**LINE, "name": name, "outcome": {**LINE["outcome"], "name": name, **changes}}


def entries(path: Path) -> dict[str, Entry]:
    journal = Journal(path)
    try:
        journal.begun()
        return journal.entries(NAMES)
    finally:
        journal.close()


def test_what_a_line_says_of_an_outcome_is_every_field_of_it() -> None:
    assert list(OUTCOME) == [field.name for field in dataclasses.fields(Outcome)]
    outcome = dataclasses.asdict(Outcome("a", "actmat", {"certificate": float("inf"), "solver": "exact"}, growth=1.5))
    said = json.loads(json.dumps({**line(), "outcome": outcome}))
    assert Outcome(**entry_of(said).outcome) == Outcome(**outcome)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a number": (b"3", "is `3`, expected a name, a sha256 and an outcome"),
    "a list": (b'["a"]', r'is `\["a"\]`, expected a name, a sha256 and an outcome'),
    "nothing": (b"", "does not hold readable JSON"),
    "half a line": (b'{"name": "a", "sha', "does not hold readable JSON"),
    "no UTF-8": (b'"\xff"', "does not hold readable JSON"),
    "a key twice": (b'{"name": "a", "name": "b"}', "has the key `name` twice"),
    "an unknown tensor": (json.dumps(line("z")).encode(), "is about `z`, which is no tensor of this merge"),
    "a name that is none": (json.dumps({**line(), "name": ["a"]}).encode(), r'has the name `\["a"\]`, expected text'),
    "a checksum that is NaN": (json.dumps({**line(), "sha256": float("nan")}).encode(), "has the sha256 `NaN` of `a`"),
    "half a checksum": (json.dumps({**line(), "sha256": "00"}).encode(), 'has the sha256 `"00"` of `a`, expected 64'),
    "another's outcome": (json.dumps({**line(), "name": "b"}).encode(), "has the outcome of `a` for `b`"),
    "no outcome": (json.dumps({**line(), "outcome": None}).encode(), "has the outcome `null` of `a`"),
    "a field too many": (
        json.dumps(line(odd=1)).encode(),
        "has the outcome `{.*` of `a`, expected name, method, facts",
    ),
    "a method with an escape": (json.dumps(line(method="\x1b[2J")).encode(), "has the method .*, expected a method's"),
    "facts in a list": (json.dumps(line(facts=[1])).encode(), r"has the facts `\[1\]` of `a`"),
    "facts that nest": (json.dumps(line(facts={"x": {}})).encode(), "has the facts .* of `a`"),
    "a number beyond floats": (json.dumps(line(facts={"x": 10**400})).encode(), "has the facts .* of `a`"),
    "a ratio of NaN": (json.dumps(line(norm_ratio=float("nan"))).encode(), "has the norm_ratio `NaN` of `a`"),
    "a count below zero": (
        json.dumps(line(non_finite=-1)).encode(),
        "has the non_finite `-1` of `a`, expected a count",
    ),
    "a count that is true": (json.dumps(line(non_finite=True)).encode(), "has the non_finite `true` of `a`"),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000, "readable JSON|deeper than 64 levels"),
    "too many values": (b"[" + b"1," * 5_000_000 + b"1]", "holds more than 4000000 JSON values"),
    "a line without end": (b"x" * (MOST_LINE_BYTES + (1 << 20)), f"has more than {MOST_LINE_BYTES} bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("last", [True, False])
def test_a_line_that_no_crash_leaves_is_refused_by_its_number(case: str, last: bool, tmp_path: Path) -> None:
    hostile, told = HOSTILE[case]
    path = tmp_path / "out.partial" / JOURNAL
    path.parent.mkdir()
    after = b"" if last else json.dumps(line("b")).encode() + b"\n"
    text = json.dumps(BEGUN).encode() + b"\n" + json.dumps(line("b")).encode() + b"\n" + hostile + b"\n" + after
    path.write_bytes(text)
    with pytest.raises(OutputError, match=told) as caught:
        entries(path)
    assert caught.value.message.startswith(f"line 3 of `{path}` ")
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()
    assert caught.value.hint == f"No crash leaves that. Delete `{path.parent}` and merge again."
    assert path.read_bytes() == text


@pytest.mark.parametrize("hostile", [b"3", b"[1]", b'"x"', b"null", b"nonsense"])
def test_a_first_line_that_no_crash_leaves_is_refused(hostile: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(hostile + b"\n")
    with pytest.raises(OutputError, match=r"line 1 of `.*journal\.jsonl` (is `.*`, expected what is being|does not)"):
        entries(tmp_path / JOURNAL)


@pytest.mark.parametrize("case", HOSTILE)
def test_resuming_with_a_hostile_line_is_an_error_that_changes_nothing(
    case: str, family: dict[str, Path], tmp_path: Path
) -> None:
    recipe, out = recipe_of(family, "task_arithmetic"), tmp_path / "out"
    partial = stopped(recipe, out, 60)
    sound = (partial / JOURNAL).read_bytes()
    before = digests(partial) | {JOURNAL: ""}
    (partial / JOURNAL).write_bytes(sound + HOSTILE[case][0] + b"\n")
    with pytest.raises(OutputError, match=r"^line \d+ of `.*out\.partial/journal\.jsonl` ") as caught:
        merge(recipe, out, resume=True)
    assert caught.value.hint == f"No crash leaves that. Delete `{partial}` and merge again."
    assert digests(partial) | {JOURNAL: ""} == before
    (partial / JOURNAL).write_bytes(sound)
    assert merge(recipe, out, resume=True).resumed_tensors > 0


def test_the_command_line_says_what_is_wrong_without_a_traceback(family: dict[str, Path], tmp_path: Path) -> None:
    recipe, out = recipe_of(family, "task_arithmetic"), tmp_path / "out"
    with (stopped(recipe, out, 60) / JOURNAL).open("ab") as file:
        file.write(b'["a"]\n')
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ran = subprocess.run(
        [sys.executable, "-m", "streammerge", "merge", str(tmp_path / "recipe.yaml"), str(out), "--resume",
         "--max-shard-size", "6000"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: line ")
    assert "Traceback" not in ran.stderr
    assert f"hint: No crash leaves that. Delete `{partial_of(out)}` and merge again." in ran.stderr


def test_of_a_tensor_that_is_told_of_twice_the_last_counts(tmp_path: Path) -> None:
    lines = [BEGUN, line("a", seconds=1.0), line("b"), line("a", seconds=2.0)]
    (tmp_path / JOURNAL).write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = entries(tmp_path / JOURNAL)
    assert list(found) == ["a", "b"]
    assert found["a"].outcome["seconds"] == 2.0


def test_memory_does_not_grow_with_the_journal(tmp_path: Path) -> None:
    text = json.dumps(line("a")).encode() + b"\n"
    with (tmp_path / JOURNAL).open("wb") as file:
        file.write(json.dumps(BEGUN).encode() + b"\n")
        for _ in range(20):
            file.write(text * 1000)
    assert (tmp_path / JOURNAL).stat().st_size > 4 << 20
    tracemalloc.start()
    try:
        assert list(entries(tmp_path / JOURNAL)) == ["a"]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_journal_of_a_tebibyte_of_zeros_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text(json.dumps(BEGUN) + "\n")
    os.truncate(tmp_path / JOURNAL, 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OutputError, match=f"line 2 of .* has more than {MOST_LINE_BYTES} bytes"):
        entries(tmp_path / JOURNAL)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10


# what a crash leaves


def torn_at(cut: int, chance: random.Random, whole: bytes) -> bytes:
    return whole[:cut]


def zeroed_from(cut: int, chance: random.Random, whole: bytes) -> bytes:
    return whole[:cut] + bytes(len(whole) - cut)


def with_a_hole(cut: int, chance: random.Random, whole: bytes) -> bytes:
    end = chance.randrange(cut, len(whole)) + 1
    return whole[:cut] + bytes(end - cut) + whole[end:]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(NAMES), max_size=6),
    last=st.lists(st.sampled_from(NAMES), min_size=1, max_size=6),
    share=st.floats(0, 1),
    tear=st.sampled_from([torn_at, zeroed_from, with_a_hole]),
    seed=st.integers(0, 2**32),
)
def test_of_an_append_that_a_crash_tore_whole_lines_are_kept_and_the_rest_is_cut_off(
    tmp_path: Path,
    names: list[str],
    last: list[str],
    share: float,
    tear: Callable[[int, random.Random, bytes], bytes],
    seed: int,
) -> None:
    path = tmp_path / JOURNAL
    path.unlink(missing_ok=True)
    journal = Journal(path)
    journal.append([BEGUN])
    journal.append([line(name, seconds=float(place)) for place, name in enumerate(names)])
    durable = path.read_bytes()
    journal.append([line(name, seconds=100.0 + place) for place, name in enumerate(last)])
    journal.close()
    appended = path.read_bytes()[len(durable) :]
    path.write_bytes(durable + tear(int(share * (len(appended) - 1)), random.Random(seed), appended))
    journal = Journal(path)
    try:
        assert journal.begun() == BEGUN
        found = journal.entries(NAMES)
        kept = {entry.outcome["seconds"] for entry in found.values()}
        assert {s for s in kept if s < 100} <= set(map(float, range(len(names))))
        # a prefix of the last append, and not all of it
        reached = int(max((s for s in kept if s >= 100), default=99.0)) - 99
        assert reached < len(last)
        told = dict(zip(names, map(float, range(len(names))), strict=False))
        told |= dict(zip(last[:reached], (100.0 + place for place in range(reached)), strict=False))
        assert {name: entry.outcome["seconds"] for name, entry in found.items()} == told
        journal.append([line("a", seconds=7.0)])
    finally:
        journal.close()
    again = entries(path)
    assert {name: entry.outcome["seconds"] for name, entry in again.items()} == {**told, "a": 7.0}


# a merge that was complete


@pytest.mark.parametrize("case", ["a list", "half a line", "an unknown tensor"])
def test_a_complete_folder_keeps_its_name_whatever_its_journal_says(
    case: str, family: dict[str, Path], tmp_path: Path
) -> None:
    recipe, out = recipe_of(family, "task_arithmetic"), tmp_path / "out"
    sound = (stopped(recipe, out, 60) / JOURNAL).read_bytes()
    merge(recipe, out, resume=True)
    whole = digests(out)
    (out / JOURNAL).write_bytes(sound + HOSTILE[case][0] + b"\n")
    with pytest.raises(OutputError, match=r"^line \d+ of `.*out/journal\.jsonl` ") as caught:
        merge(recipe, out, resume=True)
    assert caught.value.hint is not None
    assert "delete `journal.jsonl` and verify the folder" in caught.value.hint
    assert not partial_of(out).exists()
    (out / JOURNAL).unlink()
    assert digests(out) == whole
    assert streammerge.verify(out).problems == ()
