"""Verifying: anything that is not as it was written is found and named."""

from __future__ import annotations

import json
import math
import os
import shutil
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


# folders that other tools wrote


def test_a_folder_without_a_report_is_checked_as_far_as_it_goes(family):
    found = streammerge.verify(family["base"])
    assert (found.problems, found.notes, found.tensors) == ((), (), 20)
    assert found.unchecked == (
        "there is no `streammerge.json`: bytes cannot be compared with checksums, nor values with a recipe",
        "without `--base DIR` names and shapes are compared with nothing",
    )


def test_beside_a_base_only_the_values_of_such_a_folder_are_unchecked(family):
    found = streammerge.verify(family["math"], base=family["base"])
    assert found.problems == ()
    assert [line[:34] for line in found.unchecked] == ["there is no `streammerge.json`: by"]


def test_names_and_shapes_that_are_not_the_bases_are_problems(family, tmp_path):
    tensors = tensors_of(family["base"])
    tensors["added"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    other, base = save_model(tmp_path / "other", tensors), family["base"]
    expected = (
        f"`added` is in `{other}` but not in `{base}`",
        f"`lm_head.weight` is [64, 16] in `{base}` but [63, 16] in `{other}`",
        f"`model.norm.weight` is in `{base}` but not in `{other}`",
    )
    assert streammerge.verify(other, base=base).problems == expected


def test_a_base_is_compared_with_a_folder_of_ours_too(out, family, tmp_path):
    assert streammerge.verify(out, base=family["base"]).problems == ()
    other = save_model(tmp_path / "other", {"w": torch.ones(1)})
    assert len(streammerge.verify(out, base=other).problems) == 21


@pytest.mark.parametrize("mapped", [False, True])
def test_numbers_that_are_not_finite_are_found_without_a_report(family, tmp_path, mapped):
    tensors = tensors_of(family["base"])
    tensors["lm_head.weight"][3, 4] = math.nan
    other = save_model(tmp_path / "other", tensors)
    storage = LocalStorage(mapped=mapped)
    assert streammerge.verify(other, storage=storage).problems == ("`lm_head.weight` holds 1 non-finite values",)


def test_infinities_of_a_buffer_or_of_the_base_are_told_and_not_judged(tmp_path):
    tensors = {"w": torch.ones(3), "x": torch.tensor([1.0, math.inf]), "h.0.attn.bias": torch.zeros(1, 1, 3, 3).log()}
    base, other = (save_model(tmp_path / name, tensors) for name in ("base", "other"))
    assert streammerge.verify(other).problems == ("`x` holds 1 non-finite values",)
    found = streammerge.verify(other, base=base)
    assert found.problems == ()
    assert found.notes == (
        "`h.0.attn.bias` holds 9 non-finite values; it is a buffer, which may",
        f"`x` holds 1 non-finite values, as it does in `{base}`",
    )


def test_what_cannot_be_looked_through_for_infinities_is_said(tmp_path):
    other = save_model(tmp_path / "other", {"w": torch.ones(2), "q": torch.ones(2).to(torch.float8_e4m3fn)})
    assert streammerge.verify(other).unchecked[2] == (
        "1 tensors such as `q` are F8_E4M3: they were not looked through for non-finite values"
    )


@pytest.mark.parametrize("asked", [{"inputs": True}, {"recompute": 1}])
def test_inputs_of_a_folder_without_a_report_are_not_known(family, asked):
    with pytest.raises(
        OutputError, match=r"base/streammerge\.json` does not exist, and only it names the inputs"
    ) as caught:
        streammerge.verify(family["base"], **asked)
    assert caught.value.hint == "Only folders that streammerge wrote can be compared with their inputs."


# inputs


def test_inputs_that_are_as_they_were_have_no_problems(out):
    found = streammerge.verify(out, inputs=True)
    assert (found.problems, found.notes, found.unchecked) == ((), (), ())


def test_a_time_of_change_is_told_and_not_judged(out, family):
    os.utime(family["math"] / "model-00001-of-00002.safetensors", ns=(1, 1))
    found = streammerge.verify(out, inputs=True)
    assert found.problems == ()
    assert found.notes == (
        f"`model-00001-of-00002.safetensors` in `{family['math']}` was written again since the merge; "
        "size and header are the same",
    )


def test_another_size_or_header_of_an_input_is_a_problem(out, family):
    save_file({"model.embed_tokens.weight": torch.ones(3)}, family["code"] / "model.safetensors")
    found = streammerge.verify(out, inputs=True, recompute=3)
    label = f"`{family['code']}`"
    assert found.problems == (
        f"`model-00001-of-00002.safetensors` is gone from {label}",
        f"`model-00002-of-00002.safetensors` is gone from {label}",
        f"`model.safetensors` in {label} is new since the merge",
    )
    assert found.recomputed == ()
    assert found.unchecked == ("no tensor was merged again: the inputs are not those of the report",)


def test_another_header_of_the_same_size_is_a_problem(out, family):
    file = family["code"] / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes().replace(b"k_proj", b"K_proj", 1))
    index = family["code"] / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.0.self_attn.k_proj", "layers.0.self_attn.K_proj"))
    assert streammerge.verify(out, inputs=True).problems == (
        f"`{file.name}` in `{family['code']}` has another header than when it was merged",
    )


def test_an_input_that_is_gone_or_cut_short_is_a_problem(out, family):
    shutil.rmtree(family["math"])
    file = family["code"] / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = streammerge.verify(out, inputs=True).problems
    assert len(found) == 2
    assert all(line.startswith("an input is no sound model any more: ") for line in found)


def test_a_report_from_before_fingerprints_says_so(out):
    table = json.loads((out / "streammerge.json").read_text())
    del table["inputs"], table["max_shard_bytes"]
    (out / "streammerge.json").write_text(json.dumps(table))
    found = streammerge.verify(out, inputs=True)
    assert found.problems == ()
    assert found.unchecked == ("the report has no fingerprints of its inputs: it was written before there were any",)


# reports


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
