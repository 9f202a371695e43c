"""Models of one family stored in several dtypes: each is read as the numbers it holds."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammerge
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from tests.models import CONFIG, llama_tensors, recipe_of, save_model, tuned
from tests.stored import MemoryStorage, streamed_tensors, tensors_of

DTYPES = torch.float32, torch.bfloat16, torch.float16
METHODS = "linear", "task_arithmetic", "ties", "multislerp", "model_stock", "actmat", "tsv"


def family(*dtypes: torch.dtype) -> tuple[MemoryStorage, MemoryStorage]:
    """A base and two experts in these dtypes, and the same numbers in float32."""
    base = llama_tensors(dtype=torch.float32)
    models: dict[str, dict[str, Tensor]] = {}
    for number, (name, dtype) in enumerate(zip(("base", "one", "two"), dtypes, strict=True)):
        models[name] = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tuned(base, number).items()}
    wide = {name: {k: t.float() if t.is_floating_point() else t for k, t in m.items()} for name, m in models.items()}
    return MemoryStorage(models), MemoryStorage(wide)


def plan_of(storage: MemoryStorage, method: str, **more: object) -> Plan:
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "one"}, {"model": "two"}], **more}
    return make_plan(Recipe.from_dict(recipe), storage, memory_bytes=512 << 20)


@pytest.mark.parametrize("dtypes", list(permutations(DTYPES)), ids=lambda d: "-".join(str(e)[6:] for e in d))
@pytest.mark.parametrize("method", METHODS)
def test_models_in_several_dtypes_merge_as_their_numbers_in_float32(method, dtypes):
    mixed, wide = family(*dtypes)
    found = streamed_tensors(plan_of(mixed, method, out_dtype="float32"), mixed)
    expected = streamed_tensors(plan_of(wide, method, out_dtype="float32"), wide)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_has_the_bases_dtype(dtype):
    mixed, wide = family(dtype, *(other for other in DTYPES if other != dtype))
    found = streamed_tensors(plan_of(mixed, "linear"), mixed)
    expected = streamed_tensors(plan_of(wide, "linear"), wide)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(dtype) if tensor.is_floating_point() else tensor), name


def test_a_mean_is_that_of_the_numbers_in_float64():
    mixed, wide = family(*DTYPES)
    found = streamed_tensors(plan_of(mixed, "linear"), mixed)
    name = "model.layers.1.mlp.down_proj.weight"
    one, two = (
        streamed_tensors(plan_of(wide, "passthrough", models=[{"model": m}]), wide)[name] for m in ("one", "two")
    )
    torch.testing.assert_close(found[name].double(), (one.double() + two.double()) / 2, rtol=0, atol=1e-8)


def test_a_device_stream_takes_several_dtypes_too():
    mixed, wide = family(*DTYPES)
    for method in ("linear", "ties"):
        recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
        found, expected = (
            streamed_tensors(make_plan(Recipe.from_dict(recipe), s, device="cpu", device_memory_bytes=1 << 30), s)
            for s in (mixed, wide)
        )
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("out_dtype", [None, "float16"])
def test_a_merged_folder_says_which_dtype_it_has(out_dtype, tmp_path: Path):
    base = llama_tensors(dtype=torch.float32)
    folders = {}
    for number, (name, dtype) in enumerate(zip(("base", "one", "two"), DTYPES, strict=True)):
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tuned(base, number).items()}
        folders[name] = save_model(tmp_path / name, tensors, shards=1 + number)
        (folders[name] / "config.json").write_text(json.dumps({**CONFIG, "dtype": str(dtype)[6:]}))
    more = {} if out_dtype is None else {"out_dtype": out_dtype}
    streammerge.merge(recipe_of(folders, "actmat", **more), tmp_path / "out")
    expected = out_dtype or "float32"
    assert {str(t.dtype)[6:] for t in tensors_of(tmp_path / "out").values() if t.is_floating_point()} == {expected}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == expected
    assert streammerge.verify(tmp_path / "out", inputs=True, recompute=5).problems == ()
