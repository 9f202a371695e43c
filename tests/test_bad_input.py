"""Bad input, one line each: a clear error with a hint, and nothing left that looks like a model."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

import streammerge
from streammerge import memory, methods
from streammerge.errors import CheckpointError, MergeError, OutputError, PlanError, RecipeError, StreamMergeError
from streammerge.storage.local import LocalStorage
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.stored import digests, models_under, streammerge_threads, tensors_of

Spoil = Callable[["Case"], None]
CASES: list[ParameterSet] = []
DAMAGED = "The file is damaged or was not written by safetensors. Fetch it again."
INCOMPLETE = "The download is incomplete. Compare with the size on the hub."


@dataclass
class Case:
    """A merge about to go wrong."""

    folder: Path
    family: dict[str, Path]
    recipe: dict[str, object]
    patch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def shard(self, model: str) -> Path:
        return sorted(self.family[model].glob("*.safetensors"))[0]

    def rewrite(self, model: str, **tensors: torch.Tensor | None) -> None:
        """Change tensors of a model, or drop them; names have `__` for a dot."""
        whole = tensors_of(self.family[model])
        for name, tensor in tensors.items():
            whole.pop(name.replace("__", "."))
            if tensor is not None:
                whole[name.replace("__", ".")] = tensor
        shutil.rmtree(self.family[model])
        save_model(self.family[model], whole)

    def edit_header(self, model: str, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
        file = self.shard(model)
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    def fails(self, call: str, code: int, after: int = 0) -> None:
        real, seen = getattr(os, call), []

        def failing(*arguments: object, **named: object) -> object:
            seen.append(0)
            if len(seen) > after:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **named)

        self.patch.setattr(os, call, failing)


def gives(error: type[StreamMergeError], message: str, hint: str) -> Callable[[Spoil], Spoil]:
    """Add a way to spoil a merge to the table: the error's kind, a regex of its message, how its hint begins."""

    def added(spoil: Spoil) -> Spoil:
        CASES.append(pytest.param(spoil, error, message, hint, id=spoil.__name__))
        return spoil

    return added


@gives(
    CheckpointError,
    r"math/model-00001-of-00002\.safetensors` ends at byte \d+ but its header describes \d+",
    INCOMPLETE,
)
def cut_short(case: Case) -> None:
    file = case.shard("math")
    file.write_bytes(file.read_bytes()[:-10])


@gives(CheckpointError, r"ends at byte 100, inside its header of \d+ bytes", INCOMPLETE)
def cut_in_the_header(case: Case) -> None:
    file = case.shard("math")
    file.write_bytes(file.read_bytes()[:100])


@gives(CheckpointError, r"has 0 bytes, too few for a header", DAMAGED)
def empty_file(case: Case) -> None:
    case.shard("math").write_bytes(b"")


@gives(CheckpointError, r"overlaps the tensor before it: begins at byte \d+, expected \d+", DAMAGED)
def overlapping(case: Case) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        entries = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
        begin, end = entries[1]["data_offsets"]
        entries[1]["data_offsets"] = [begin - 2, end - 2]

    case.edit_header("math", change)


@gives(
    CheckpointError,
    r"`model\.embed_tokens\.weight` in .* spans 2048 bytes but BF16 \[64, 17\] takes 2176",
    DAMAGED,
)
def wrong_size(case: Case) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["model.embed_tokens.weight"]["shape"] = [64, 17]

    case.edit_header("math", change)


@gives(CheckpointError, r"has the unknown dtype `F4`", DAMAGED)
def unknown_dtype(case: Case) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["model.embed_tokens.weight"]["dtype"] = "F4"

    case.edit_header("math", change)


@gives(
    CheckpointError,
    r"names the shard `model-00001-of-00002\.safetensors`, which is not there",
    "The download is incomplete. Fetch the missing shard.",
)
def missing_shard(case: Case) -> None:
    case.shard("math").unlink()


@gives(
    PlanError,
    r"`model\.norm\.weight` is \[16\] in `base` but \[17\] in `math`",
    "The models must share an architecture",
)
def wrong_shape(case: Case) -> None:
    case.rewrite("math", model__norm__weight=torch.ones(17))


@gives(PlanError, r"`model\.norm\.weight` is in `base` but not in `math`", "The models must share an architecture")
def missing_tensor(case: Case) -> None:
    case.rewrite("math", model__norm__weight=None)


@gives(
    MergeError,
    r"`model\.norm\.weight` in `math` holds NaN at \[3\]",
    "The checkpoint is damaged or its training diverged.",
)
def nan_in_an_expert(case: Case) -> None:
    bad = torch.ones(16)
    bad[3] = math.nan
    case.rewrite("math", model__norm__weight=bad)


@gives(
    MergeError,
    r"`lm_head\.weight` in `base` holds an infinity at \[0, 0\]",
    "The checkpoint is damaged or its training diverged.",
)
def infinity_in_the_base(case: Case) -> None:
    case.rewrite("base", lm_head__weight=torch.full((64, 16), -math.inf))


@gives(
    PlanError,
    r"`math` is quantised: its config\.json",
    "Dequantise it to bfloat16 first, with the tool that quantised it",
)
def quantised(case: Case) -> None:
    config = case.family["math"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))


@gives(CheckpointError, r"math/config\.json` does not hold readable JSON", "The file is damaged.")
def broken_config(case: Case) -> None:
    (case.family["math"] / "config.json").write_text('{"model_type": ')


@gives(CheckpointError, r"math` does not exist", "Name a model folder.")
def missing_model(case: Case) -> None:
    shutil.rmtree(case.family["math"])


@gives(
    CheckpointError,
    r"math` has no `model\.safetensors` and no `model\.safetensors\.index\.json`",
    "Name a Hugging Face model folder.",
)
def no_weights(case: Case) -> None:
    for file in case.family["math"].glob("model*"):
        file.unlink()


@gives(RecipeError, r"unknown key `merge_methd`", "Did you mean `merge_method`?")
def unknown_key(case: Case) -> None:
    case.recipe["merge_methd"] = case.recipe.pop("merge_method")


@gives(RecipeError, r"unknown method `task_aritmetic`", "Did you mean `task_arithmetic`?")
def unknown_method(case: Case) -> None:
    case.recipe["merge_method"] = "task_aritmetic"


@gives(RecipeError, r"unknown parameter `wieght` for method `task_arithmetic`", "Did you mean `weight`?")
def unknown_parameter(case: Case) -> None:
    case.recipe["parameters"] = {"wieght": 1.0}


@gives(RecipeError, r"method `task_arithmetic` needs a base model", "Add `base_model`")
def no_base(case: Case) -> None:
    del case.recipe["base_model"]


@gives(PlanError, r"out` needs [\d.]+ KiB of disk but 1000 B are free", "Free some space")
def full_disk_seen_ahead(case: Case) -> None:
    usage = shutil.disk_usage(case.folder)
    case.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


@gives(OutputError, r"out\.partial` cannot be written: no space left on device", "The disk is full. Free some space")
def full_disk_at_allocation(case: Case) -> None:
    case.fails("posix_fallocate", errno.ENOSPC)


@gives(OutputError, r"out\.partial` cannot be written: no space left on device", "The disk is full. Free some space")
def full_disk_in_the_middle(case: Case) -> None:
    case.fails("pwrite", errno.ENOSPC, after=9)


@gives(OutputError, r"out\.partial` cannot be written: no space left on device", "The disk is full. Free some space")
def full_disk_at_the_end(case: Case) -> None:
    case.fails("fdatasync", errno.ENOSPC, after=1)


@gives(OutputError, r"out\.partial` cannot be written: read-only file system", "The file system is read-only.")
def read_only(case: Case) -> None:
    case.fails("mkdir", errno.EROFS)


@gives(OutputError, r"out\.partial` cannot be written: permission denied", "Choose a folder that you may write to.")
def no_permission(case: Case) -> None:
    case.fails("mkdir", errno.EACCES)


@gives(OutputError, r"deeper\.partial` cannot be written: not a directory", "A part of the path is a file.")
def parent_is_a_file(case: Case) -> None:
    case.out.write_text("mine")
    case.patch.setattr(Case, "out", property(lambda self: self.folder / "out" / "deeper"))


@gives(OutputError, r"out` is not empty", "Choose another folder")
def out_exists(case: Case) -> None:
    case.out.mkdir()
    (case.out / "notes.txt").write_text("mine")


@gives(OutputError, r"out` is a file", "Choose another name")
def out_is_a_file(case: Case) -> None:
    case.out.write_text("mine")


@gives(OutputError, r"out\.partial` holds an interrupted merge", "Pass `--resume` to continue it")
def out_is_being_resumed(case: Case) -> None:
    partial = case.out.with_name("out.partial")
    partial.mkdir()
    (partial / "journal.jsonl").write_text("")


@gives(PlanError, r"the largest step needs a budget of [\d.]+ MiB, more than 1\.0 MiB", "Pass `--memory")
def too_little_memory(case: Case) -> None:
    case.patch.setattr(streammerge.api, "plan", lambda recipe, **more: PLAN(recipe, **{**more, "memory": "1MiB"}))


PLAN = streammerge.plan


@pytest.mark.parametrize(("spoil", "error", "message", "hint"), CASES)
@pytest.mark.parametrize("shards", ["one", "many"])
def test_bad_input_is_named_with_a_hint_and_leaves_no_model(
    family, tmp_path, monkeypatch, spoil, error, message, hint, shards
):
    case = Case(tmp_path, family, recipe_of(family, "task_arithmetic"), monkeypatch)
    spoil(case)
    before = {path for path in tmp_path.rglob("*") if "out.partial" not in str(path)}
    with pytest.raises(StreamMergeError) as caught:
        streammerge.merge(case.recipe, case.out, max_shard_size="6KB" if shards == "many" else "5GB")
    assert type(caught.value) is error
    monkeypatch.undo()
    assert re.search(message, caught.value.message), caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint), caught.value.hint
    assert models_under(tmp_path / "out") == []
    assert models_under(tmp_path / "out.partial") == []
    assert {path for path in tmp_path.rglob("*") if "out.partial" not in str(path)} == before
    assert streammerge_threads() == []


@pytest.mark.parametrize("spoil", [full_disk_in_the_middle, full_disk_at_the_end])
def test_a_merge_that_filled_the_disk_resumes_to_the_same_bytes(family, tmp_path, spoil):
    recipe = recipe_of(family, "task_arithmetic")
    streammerge.merge(recipe, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        spoil(Case(tmp_path, family, recipe, patch))
        with pytest.raises(OutputError):
            streammerge.merge(recipe, tmp_path / "out")
    streammerge.merge(recipe, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_short_while_it_is_merged_is_named(family, tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(memory, "LARGEST_SLOT_BYTES", 64)
    monkeypatch.setattr(memory, "MOST_INPUT_SLOTS", 16)
    file = sorted(family["math"].glob("*.safetensors"))[1]

    def cut(done: int, total: int) -> None:
        with file.open("r+b") as opened:
            opened.truncate(700)

    with pytest.raises(CheckpointError, match=rf"`{file}` ends at byte 700, inside a tensor") as caught:
        streammerge.merge(
            recipe_of(family, "task_arithmetic"), tmp_path / "out", progress=cut, storage=LocalStorage(mapped=mapped)
        )
    assert caught.value.hint == "The file was cut short during the merge. Fetch it again."
    assert models_under(tmp_path / "out.partial") == []


def test_models_of_other_sizes_are_told_apart_before_anything_is_written(family, tmp_path):
    save_model(tmp_path / "small", {"lm_head.weight": torch.zeros(4, 4)})
    # all tensors but the buffer of positions, which a model computes
    with pytest.raises(PlanError, match="the models do not fit together: 19 differences"):
        streammerge.merge(recipe_of({**family, "small": tmp_path / "small"}, "linear"), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_healthy_model_is_not_refused(tmp_path):
    base = llama_tensors()
    folders = {"base": save_model(tmp_path / "base", base), "math": save_model(tmp_path / "math", tuned(base, 1))}
    streammerge.merge(recipe_of(folders, "task_arithmetic"), tmp_path / "out")
    assert models_under(tmp_path / "out") == [tmp_path / "out"]


@pytest.mark.parametrize("method", [name for name in methods.names() if methods.describe(name).experts != (1, None)])
def test_a_number_of_experts_that_a_method_does_not_take_is_refused_before_anything_is_read(method, family):
    fewest, most = methods.describe(method).experts
    experts = [{"model": str(family[name])} for name in ("math", "code")]
    for count in {fewest - 1, (most or fewest) + 1} - {0} - ({fewest + 1} if most is None else set()):
        listed = (experts * 2)[:count]
        recipe = {"merge_method": method, "base_model": str(family["base"]), "models": listed}
        with pytest.raises(PlanError, match=f"`{method}` merges {fewest} model") as caught:
            streammerge.plan(recipe)
        assert "List" in str(caught.value.hint)
