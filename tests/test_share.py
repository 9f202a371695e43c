"""Shares of one output, written by several writers into the same files: what is kept, what is noticed, what is left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from streammerge.errors import OutputError
from streammerge.journal import JOURNAL, Journal
from streammerge.ranks.share import Ground, ShareWriter
from streammerge.share_journals import adopt, share_journal
from streammerge.write import Writer
from tests.stored import digests
from tests.test_write import FINGERPRINT, TENSORS, blocks, layout, write_all

OWNERS = [frozenset(("a", "c", "d")), frozenset(("b", "e"))]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def share(out: Path, ground: Ground, rank: int, names: frozenset[str]) -> ShareWriter:
    """Write a share of the tensors, but for what earlier runs finished of it."""
    cited = {name: entry for name, entry in ground.cited.items() if name in names}
    writer = ShareWriter(str(out), layout(), FINGERPRINT, rank=rank, cited=cited)
    with writer:
        writer.check()
        for block in blocks({n: t for n, t in TENSORS.items() if n in names and n not in writer.checksums}):
            writer.write(block)
        writer.flush()
    return writer


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def place_of(out: Path, name: str) -> tuple[Path, int]:
    placement = layout().placements[name]
    return out.with_name("out.partial") / "model.safetensors.partial", placement.offset


def test_shares_make_the_files_of_one_writer(out):
    write_all(out.with_name("whole"))
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        for rank, names in enumerate(OWNERS):
            share(out, ground, rank, names)
        ground.settle(OWNERS)
        ground.publish({"config.json": b"{}"})
    assert digests(out) == digests(out.with_name("whole"))


def test_a_share_that_is_missing_is_never_published(out):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 0, OWNERS[0])
        with pytest.raises(OutputError, match="2 tensors were never written, such as `b`"):
            ground.settle(OWNERS)
    assert not out.exists()


def test_bytes_beside_anothers_that_changed_since_are_noticed_and_merged_again(out):
    write_all(out.with_name("whole"))
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        for rank, names in enumerate(OWNERS):
            share(out, ground, rank, names)
        flip(*place_of(out, "b"))
        with pytest.raises(OutputError, match="`b` was written beside another process's tensor") as caught:
            ground.settle(OWNERS)
    assert "pass `--resume` with one process" in str(caught.value.hint)
    assert not out.exists()
    with Writer(str(out), layout(), FINGERPRINT, resume=True) as writer:
        assert sorted(writer.checksums) == ["a", "c", "d", "e"]
    write_all(out, resume=True)
    assert digests(out) == digests(out.with_name("whole"))


def test_what_others_finished_is_compared_by_whose_share_it_is_and_cited_again(out):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 0, OWNERS[0])
    flip(*place_of(out, "a"))
    ground = Ground(str(out), layout(), FINGERPRINT, resume=True)
    with ground:
        assert sorted(ground.cited) == ["a", "c", "d"]
        assert ground.checksums == {}
        writer = share(out, ground, 1, frozenset(TENSORS))
        assert sorted(writer.checksums) == sorted(TENSORS)
        lines = (ground.partial / share_journal(1)).read_bytes().splitlines()[1:]
        # what is as it was, then what was written
        assert [json.loads(line)["name"] for line in lines] == ["c", "d", "a", "b", "e"]
        ground.settle([frozenset(), frozenset(TENSORS)])
        ground.publish({"config.json": b"{}"})
    write_all(out.with_name("whole"))
    assert digests(out) == digests(out.with_name("whole"))


def test_one_writer_takes_over_what_shares_left(out):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 3, OWNERS[1])
        (ground.partial / "processes-0123").mkdir()
        (ground.partial / "processes-0123" / "00000.json").write_text("{}")
    with Writer(str(out), layout(), FINGERPRINT, resume=True) as writer:
        assert sorted(writer.checksums) == ["b", "e"]
        assert sorted(path.name for path in writer.partial.iterdir()) == [JOURNAL, "model.safetensors.partial"]


def test_shares_of_another_merge_are_refused_and_kept(out):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 1, OWNERS[1])
    journal = ground.partial / share_journal(1)
    text = journal.read_bytes().replace(b'"linear"', b'"ties"', 1)
    journal.write_bytes(text)
    with pytest.raises(OutputError, match=r'`recipe\.merge_method` was `"ties"` and is `"linear"`'):
        Writer(str(out), layout(), FINGERPRINT, resume=True)
    assert journal.read_bytes() == text


@pytest.mark.parametrize("line", [b'["a"]', b'{"name": "z", "sha256": "00"}', b"nonsense"])
def test_a_hostile_line_of_a_share_is_refused_by_its_number_and_nothing_changes(out, line):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 0, OWNERS[0])
        share(out, ground, 1, OWNERS[1])
    journal = ground.partial / share_journal(1)
    with journal.open("ab") as file:
        file.write(line + b"\n")
    before = {path.name: path.read_bytes() for path in ground.partial.iterdir()}
    with pytest.raises(OutputError, match=r"line 4 of `.*journal-00001\.jsonl` "):
        Writer(str(out), layout(), FINGERPRINT, resume=True)
    assert {path.name: path.read_bytes() for path in ground.partial.iterdir()} == before


def test_a_share_that_is_a_link_is_refused(out, tmp_path):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 0, OWNERS[0])
        (tmp_path / "mine").write_text("mine")
        (ground.partial / share_journal(1)).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="cannot be written"):
        Writer(str(out), layout(), FINGERPRINT, resume=True)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_share_that_is_still_written_keeps_others_from_resuming(out):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 0, OWNERS[0])
    holder = Journal(ground.partial / share_journal(1))
    try:
        with pytest.raises(OutputError, match=r"`.*out\.partial` is being written by another process"):
            Writer(str(out), layout(), FINGERPRINT, resume=True)
    finally:
        holder.close()
    assert (ground.partial / share_journal(0)).exists()
    with Writer(str(out), layout(), FINGERPRINT, resume=True) as writer:
        assert sorted(writer.checksums) == ["a", "c", "d"]


def test_shares_stay_where_a_crash_comes_before_they_are_taken_over(out, monkeypatch):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 1, OWNERS[1])
    monkeypatch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    journal = Journal(ground.partial / JOURNAL)
    with pytest.raises(KeyboardInterrupt):
        adopt(ground.partial, journal, TENSORS, lambda begun: None)
    monkeypatch.undo()
    journal.close()
    # cited twice now, which is once
    with Writer(str(out), layout(), FINGERPRINT, resume=True) as writer:
        assert sorted(writer.checksums) == ["b", "e"]
        assert not (writer.partial / share_journal(1)).exists()


def test_a_journal_that_lost_its_beginning_takes_shares_along(out):
    ground = Ground(str(out), layout(), FINGERPRINT, resume=False)
    with ground:
        share(out, ground, 1, OWNERS[1])
    os.truncate(ground.partial / JOURNAL, 5)
    with Writer(str(out), layout(), FINGERPRINT, resume=True) as writer:
        assert writer.checksums == {}
        assert not (writer.partial / share_journal(1)).exists()
