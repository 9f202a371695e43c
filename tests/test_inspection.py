from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.checkpoint import load_checkpoint
from streammerge.compare import differences
from streammerge.errors import CheckpointError
from streammerge.inspection import inspect_models
from streammerge.storage.local import LocalStorage
from tests.models import llama_tensors, save_model, tuned


def test_a_model_is_its_tensors_with_their_classes(family: dict[str, Path]) -> None:
    found = inspect_models(LocalStorage(), str(family["base"]))
    (model,) = found.to_dict()["models"]
    tensors = llama_tensors()
    assert model["location"] == str(family["base"])
    assert model["tensor_bytes"] == sum(value.nbytes for value in tensors.values())
    assert model["parameters"] == sum(value.numel() for value in tensors.values() if value.is_floating_point())
    assert model["dtypes"] == {"BF16": len(tensors) - 1, "I64": 1}
    assert model["classes"] == {"embedding": 2, "matrix": 14, "vector": 3, "buffer": 1}
    assert found.differences == ()

    by_name = {tensor["name"]: tensor for tensor in model["tensors"]}
    assert by_name.keys() == tensors.keys()
    down = by_name["model.layers.1.mlp.down_proj.weight"]
    assert (down["dtype"], down["shape"], down["class"]) == ("BF16", [16, 40], "matrix")
    assert (down["transposed"], down["class_from"]) == (False, "name")
    data = (family["base"] / down["file"]).read_bytes()[down["offset"] :][: 16 * 40 * 2]
    assert data == tensors[down["name"]].view(torch.uint8).numpy().tobytes()


def test_what_is_found_is_plain_data(family: dict[str, Path]) -> None:
    found = streammerge.inspect(*family.values()).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert len(found["models"]) == 4
    assert found["differences"] == []


def test_each_model_is_compared_with_the_first(tmp_path: Path) -> None:
    base = llama_tensors()
    cut = {name: value for name, value in base.items() if "layers.1" not in name}
    wide = {**base, "lm_head.weight": torch.zeros(65, 16, dtype=torch.bfloat16)}
    a, b, c = (str(save_model(tmp_path / name, m)) for name, m in (("a", base), ("b", cut), ("c", wide)))
    found = streammerge.inspect(a, b, c).differences
    assert found == (
        *(f"`{name}` is in `{a}` but not in `{b}`" for name in sorted(base.keys() - cut.keys())),
        f"`lm_head.weight` is [64, 16] in `{a}` but [65, 16] in `{c}`",
    )
    assert streammerge.inspect(b, a).differences == tuple(
        f"`{name}` is in `{a}` but not in `{b}`" for name in sorted(base.keys() - cut.keys())
    )


def test_floats_of_another_dtype_are_no_difference_but_other_kinds_are(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(2), "n": torch.zeros(2, dtype=torch.int64), "m": torch.zeros(2)}
    others = {"w": torch.zeros(2).bfloat16(), "n": torch.zeros(2, dtype=torch.int32), "m": torch.zeros(2).char()}
    models = [
        load_checkpoint(LocalStorage(), str(save_model(tmp_path / name, model)))
        for name, model in (("a", tensors), ("b", others))
    ]
    assert differences(models[0], models[1], "one", "two") == [
        "`m` is F32 in `one` but I8 in `two`",
        "`n` is I64 in `one` but I32 in `two`",
    ]


def test_a_model_does_not_differ_from_itself(family: dict[str, Path]) -> None:
    for first, second in (("base", "math"), ("base", "chat"), ("chat", "code")):
        assert streammerge.inspect(family[first], family[second]).differences == ()


def test_an_unsound_model_is_refused(family: dict[str, Path]) -> None:
    shard = next(family["math"].glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends at byte"):
        streammerge.inspect(family["base"], family["math"])


def test_a_dtype_that_cannot_be_merged_can_be_looked_at(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", {"a.q_proj.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)})
    (found,) = streammerge.inspect(model).to_dict()["models"]
    assert found["dtypes"] == {"F8_E4M3": 1}
    assert found["parameters"] == 0


def test_looking_needs_no_torch(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", tuned(llama_tensors(), 1), shards=2)
    code = f"import sys, streammerge; streammerge.inspect({str(model)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
