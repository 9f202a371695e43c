"""Verifying: anything that is not as it was written is found and named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge import verification
from streammerge.errors import CheckpointError, OutputError
from streammerge.storage.local import LocalStorage
from tests.models import recipe_of, save_model
from tests.stored import tensors_of


@pytest.fixture
def out(family: dict[str, Path], tmp_path: Path) -> Path:
    streammerge.merge(recipe_of(family, "task_arithmetic"), tmp_path / "out", max_shard_size="12KB")
    return tmp_path / "out"


def change(out: Path, name: str, position: int, content: bytes) -> None:
    """Overwrite bytes of a tensor in place."""
    entry = streammerge.inspect(out).models[0].tensors[name]
    with (out / entry.file).open("r+b") as file:
        file.seek(entry.offset + position)
        file.write(content)


def test_a_folder_as_it_was_written_has_no_problems(out):
    found = streammerge.verify(out)
    assert found.problems == ()
    assert found.tensors == len(tensors_of(out))
    assert found.read_bytes == sum(t.numel() * t.element_size() for t in tensors_of(out).values())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.position_ids", "model.norm.weight"])
def test_one_flipped_bit_is_found(out, name):
    before = tensors_of(out)[name].view(-1).view(torch.uint8)
    last = before.numel() - 1
    change(out, name, last, bytes([int(before[last]) ^ 1]))
    assert streammerge.verify(out).problems == (f"`{name}` has other bytes than the report's checksum says",)


def test_bytes_are_checked_across_blocks(out, monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK_BYTES", 6)
    assert streammerge.verify(out).problems == ()
    change(out, "lm_head.weight", 7, b"\x42")
    assert len(streammerge.verify(out).problems) == 1


@pytest.mark.parametrize("mapped", [False, True])
def test_both_ways_of_reading_find_the_same(out, mapped):
    change(out, "lm_head.weight", 0, b"\x42\x42")
    assert len(streammerge.verify(out, storage=LocalStorage(mapped=mapped)).problems) == 1


def test_numbers_that_are_not_finite_are_counted(out):
    change(out, "lm_head.weight", 0, struct.pack("<HH", 0x7F80, 0x7FC0))
    assert streammerge.verify(out).problems == (
        "`lm_head.weight` has other bytes than the report's checksum says",
        "`lm_head.weight` holds 2 non-finite values",
    )


def test_infinities_that_the_base_has_and_a_copy_keeps_are_no_problem(tmp_path):
    mask = {"w": torch.ones(3), "h.0.attn.bias": torch.ones(1, 1, 3, 3).tril().log()}
    folders = {name: save_model(tmp_path / name, mask) for name in ("base", "expert")}
    streammerge.merge(recipe_of(folders, "task_arithmetic"), tmp_path / "out")
    assert streammerge.verify(tmp_path / "out").problems == ()


def test_a_missing_and_an_added_tensor_are_named(family, tmp_path):
    streammerge.merge(recipe_of(family, "linear"), tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    tensors["added"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    assert streammerge.verify(tmp_path / "out").problems == (
        "`added` is in the files but not in the report",
        "`model.norm.weight` is in the report but not in the files",
    )


def test_a_file_that_was_cut_short_is_refused(out):
    file = out / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends at byte") as caught:
        streammerge.verify(out)
    assert caught.value.hint is not None


def test_a_folder_without_a_report_is_refused(family):
    with pytest.raises(OutputError, match=r"base/streammerge\.json` does not exist") as caught:
        streammerge.verify(family["base"])
    assert caught.value.hint == "Only folders that streammerge wrote can be verified."


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"format": 2}', '{"format": 1}', '{"format": 1, "tensors": 3}',
        '{"format": 1, "tensors": [{"name": "a"}]}', '{"format": 1, "tensors": [{"name": 1, "sha256": "x"}]}',
        "[" * 100_000, "\udcff",
    ],
)  # fmt: skip
def test_what_is_not_a_report_is_refused(out, text):
    (out / "streammerge.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(OutputError, match=r"streammerge\.json` is not a report of streammerge") as caught:
        streammerge.verify(out)
    assert caught.value.hint == "Only folders that streammerge wrote can be verified."


def test_a_report_is_plain_json(out):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((out / "streammerge.json").read_text(), parse_constant=refuse)
