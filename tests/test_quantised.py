"""Outputs in the base's 8-bit floats: codes and scales of their own, band by band."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge.api import run
from streammerge.errors import PlanError, RecipeError
from streammerge.outcome import Block, Outcome
from streammerge.plan import Plan, make_plan
from streammerge.quantised import quantised as quantised_blocks
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage
from tests.models import CONFIG, llama_tensors, recipe_of, save_model, tuned
from tests.stored import MemoryStorage, digests, tensor_of, tensors_of
from tests.test_fp8 import BLOCKS, COMPRESSED, NAME, meant, quantised, stored

E4M3 = torch.float8_e4m3fn
# every number that a code means, in order
VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
VALUES = VALUES[torch.isfinite(VALUES)].unique()

SCHEMES: dict[str, tuple[dict[str, Any], str, torch.dtype]] = {
    "blocks": (BLOCKS, "_scale_inv", torch.float32),
    "small blocks": ({**BLOCKS, "weight_block_size": [7, 5]}, "_scale_inv", torch.float32),
    "powers of two": ({**BLOCKS, "scale_fmt": "ue8m0"}, "_scale_inv", torch.float32),
    "exponents": (BLOCKS, "_scale_inv", torch.float8_e8m0fnu),
    "by row": (COMPRESSED, "_scale", torch.bfloat16),
    "one for all": ({"quant_method": "fp8"}, "_scale", torch.float32),
}


def sizes(scheme: str, shape: tuple[int, int]) -> tuple[int, int]:
    config = SCHEMES[scheme][0]
    if scheme == "by row":
        return 1, shape[1]
    return tuple(config["weight_block_size"]) if "weight_block_size" in config else shape


def base_in(scheme: str, shape: tuple[int, int], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, ending, dtype = SCHEMES[scheme]
    generator = torch.Generator().manual_seed(seed)
    codes, scales = quantised(torch.randn(shape, generator=generator), *sizes(scheme, shape))
    scales = scales.to(dtype).view(scales.shape if scheme != "one for all" else ())
    return {NAME: codes, NAME + ending: scales}, config


def plan_of(storage: MemoryStorage, **more: object) -> Plan:
    recipe = {"merge_method": "linear", "models": [{"model": "base"}], "quantize": "base", **more}
    wanted = {key: value for key, value in recipe.items() if value is not None}
    return make_plan(Recipe.from_dict(wanted), storage)


def in_blocks(values: Tensor, name: str, elements: int) -> list[Block]:
    data = values.contiguous().reshape(-1)
    cut = [data[i : i + elements].clone() for i in range(0, data.numel(), elements)]
    return [
        Block(name, i * elements * 4, memoryview(run.view(torch.uint8).numpy()), lambda: None,
              Outcome(name, "linear") if i == len(cut) - 1 else None)
        for i, run in enumerate(cut)
    ]  # fmt: skip


def written(plan: Plan, blocks: list[Block]) -> tuple[dict[str, bytes], dict[str, Outcome], list[str]]:
    """Every tensor's bytes and outcome, and the order in which they were finished."""
    data: dict[str, bytearray] = {}
    outcomes: dict[str, Outcome] = {}
    for block in quantised_blocks(plan, blocks):
        found = data.setdefault(block.name, bytearray())
        assert block.offset == len(found)
        found += block.data
        block.release()
        if block.outcome is not None:
            outcomes[block.name] = block.outcome
    return {name: bytes(found) for name, found in data.items()}, outcomes, list(outcomes)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    elements=st.sampled_from([1 << 20, 4096, 999, 130]),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_each_code_is_the_nearest_to_its_weight_over_its_scale(scheme, shape, elements, seed, size):
    base, config = base_in(scheme, shape)
    plan = plan_of(stored({"base": base}, {"base": config}))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    values[0, 0] = 0.0
    data, outcomes, order = written(plan, in_blocks(values, NAME, elements))
    ending, dtype = SCHEMES[scheme][1:]
    assert order == [NAME + ending, NAME]
    codes = tensor_of(data[NAME], "F8_E4M3", shape)
    rows, columns = sizes(scheme, shape)
    blocks = [-(-shape[0] // rows), -(-shape[1] // columns)]
    scales = torch.frombuffer(bytearray(data[NAME + ending]), dtype=dtype).double().view(blocks)
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
    assert torch.isfinite(codes.float()).all()
    # no code is nearer, up to the float32 division
    ratio = (values.double() / spread).clamp(-448, 448)
    nearest = (VALUES[None] - ratio.reshape(-1, 1)).abs().amin(1)
    error = (codes.double() - ratio).abs().reshape(-1)
    assert (error <= nearest * (1 + 1e-5) + ratio.abs().reshape(-1) * 1e-6).all()
    largest = quantised(values, rows, columns)[1].double()
    if "two" in scheme or "exponents" in scheme:
        assert torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5))
        assert (scales >= largest * (1 - 1e-6)).all()
        assert (scales < 2 * largest * (1 + 1e-6) + (largest <= 1e-12)).all()
    else:
        given_size = largest > 1e-11
        unit = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
        assert ((scales - largest).abs() <= unit * largest)[given_size].all()
    loss = (meant(codes, scales, rows, columns) - values.double()).norm() / values.double().norm().clamp(min=1e-300)
    assert outcomes[NAME].facts["quantization_loss"] == pytest.approx(float(loss), rel=1e-3, abs=1e-6)


def test_weights_of_zero_have_codes_of_zero():
    base, config = base_in("blocks", (130, 130))
    data, outcomes, _ = written(
        plan_of(stored({"base": base}, {"base": config})), in_blocks(torch.zeros(130, 130), NAME, 99)
    )
    assert data[NAME] == bytes(130 * 130)
    assert torch.frombuffer(bytearray(data[NAME + "_scale_inv"]), dtype=torch.float32).tolist() == [1.0] * 4
    assert outcomes[NAME].facts["quantization_loss"] == 0.0


def test_what_quantising_takes_is_planned():
    base, config = base_in("blocks", (1000, 500))
    storage = stored({"base": base}, {"base": config})
    eight, plain = plan_of(storage), plan_of(storage, quantize=None)
    scheme = next(step.scheme for step in eight.steps if step.scheme)
    assert scheme.band_elements == 128 * 500
    assert eight.memory.reserve_bytes - plain.memory.reserve_bytes == scheme.quantising_bytes
    assert scheme.quantising_bytes >= 128 * 500 * (4 + 4 + 2)


# whole models


def family(tmp_path: Path, config: Mapping[str, Any] = BLOCKS) -> tuple[dict[str, Path], dict[str, dict[str, Tensor]]]:
    """A base in 8 bits and two experts in bfloat16; and the numbers that each holds."""
    base = llama_tensors()
    folders, numbers = {}, {}
    for seed, name in enumerate(("base", "math", "code")):
        held = tuned(base, seed) if seed else dict(base)
        tensors = dict(held)
        for key in [key for key in held if "_proj" in key and name == "base"]:
            tensors[key], tensors[key + "_scale_inv"] = quantised(held[key].float(), 8, 8)
            held[key] = meant(tensors[key], tensors[key + "_scale_inv"], 8, 8).float()
        folders[name], numbers[name] = save_model(tmp_path / name, tensors, shards=2), held
    config = {**config, "weight_block_size": [8, 8]}
    (folders["base"] / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": config}))
    return folders, numbers


@pytest.mark.parametrize("method", ["linear", "actmat", "ties"])
def test_a_merge_has_the_bases_codes_and_scales(method, tmp_path):
    folders, _ = family(tmp_path)
    out, plain = tmp_path / "out", tmp_path / "plain"
    report = streammerge.merge(recipe_of(folders, method, quantize="base"), out)
    streammerge.merge(recipe_of(folders, method, out_dtype="float32"), plain)
    merged, expected, base = tensors_of(out), tensors_of(plain), tensors_of(folders["base"])
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    assert json.loads((out / "config.json").read_text()) == json.loads((folders["base"] / "config.json").read_text())
    for name, tensor in expected.items():
        if "_proj" not in name:
            continue
        codes, scales = quantised(tensor, 8, 8)
        assert torch.equal(merged[name].view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(merged[name + "_scale_inv"], scales)
        found = meant(merged[name], merged[name + "_scale_inv"], 8, 8)
        assert (found - tensor).norm() / tensor.norm() < 0.04
    losses = [outcome.facts["quantization_loss"] for outcome in report.tensors if "quantization_loss" in outcome.facts]
    assert len(losses) == 14
    assert all(0.01 < float(loss) < 0.04 for loss in losses)
    verified = streammerge.verify(out, inputs=True, recompute=30)
    assert verified.problems == ()
    assert any("is stored in 8 bits: it was not merged again" in line for line in verified.unchecked)
    # and the output is an input
    again = streammerge.plan(recipe_of({"base": out, "math": folders["math"]}, method))
    assert {step.dtype for step in again.steps if "_proj" in step.name} == {"BF16"}


def test_what_is_kept_of_the_base_keeps_its_codes(tmp_path):
    folders, _ = family(tmp_path)
    rules = [{"match": "gate_proj|k_proj", "keep": "base"}]
    streammerge.merge(recipe_of(folders, "linear", quantize="base", rules=rules), tmp_path / "out")
    merged, base = tensors_of(tmp_path / "out"), tensors_of(folders["base"])
    for name, tensor in base.items():
        if "gate_proj" in name or "k_proj" in name:
            assert torch.equal(merged[name].float(), tensor.float()), name


def test_the_report_merges_to_the_same_bytes_again(tmp_path):
    folders, _ = family(tmp_path)
    streammerge.merge(recipe_of(folders, "linear", quantize="base"), tmp_path / "out")
    streammerge.merge(tmp_path / "out" / "streammerge.json", tmp_path / "again")
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


@pytest.mark.parametrize("blocks", [1, 5, 12])
def test_an_interrupted_merge_into_8_bits_goes_on_to_the_same_bytes(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr("streammerge.write.GROUP_BYTES", 1)
    folders, _ = family(tmp_path)
    recipe = recipe_of(folders, "linear", quantize="base")
    streammerge.merge(recipe, tmp_path / "whole")
    seen = 0

    def stop(read_bytes: int, to_read_bytes: int) -> None:
        nonlocal seen
        seen += 1
        if seen > blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(recipe, tmp_path / "out", progress=stop)
    streammerge.merge(recipe, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_engine_for_devices_gives_codes_too(tmp_path):
    folders, _ = family(tmp_path)
    recipe = recipe_of(folders, "linear", quantize="base")
    streammerge.merge(recipe, tmp_path / "host")
    planned = make_plan(Recipe.from_dict(recipe), LocalStorage(), device="cpu", device_memory_bytes=1 << 30)
    run(planned, str(tmp_path / "device"), LocalStorage())
    host, device = tensors_of(tmp_path / "host"), tensors_of(tmp_path / "device")
    assert host.keys() == device.keys()
    for name, tensor in host.items():
        assert torch.equal(device[name].float(), tensor.float()), name


# what cannot be


def test_a_base_that_is_not_in_8_bits_cannot_be_asked_for():
    storage = MemoryStorage({"base": {NAME: torch.ones(4, 4)}})
    with pytest.raises(PlanError, match="asks for the 8-bit floats of `base`, which has none"):
        plan_of(storage)


def test_scales_of_activations_would_be_wrong_for_the_output():
    base, config = base_in("by row", (8, 8))
    base[NAME.removesuffix("weight") + "input_scale"] = torch.tensor(0.1)
    with pytest.raises(PlanError, match="or also scales of activations"):
        plan_of(stored({"base": base}, {"base": config}))


def test_blocks_with_infinities_have_no_scales():
    base, config = base_in("blocks", (8, 8))
    with pytest.raises(PlanError, match="`non_finite: pass` exclude each other"):
        plan_of(stored({"base": base}, {"base": config}), non_finite="pass")


def test_only_the_bases_scheme_can_be_asked_for():
    with pytest.raises(RecipeError, match="quantize"):
        Recipe.from_dict({"merge_method": "linear", "models": [{"model": "a"}], "quantize": "int4"})


def test_a_recipe_with_it_is_read_as_it_is_written():
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": "a"}], "quantize": "base"})
    assert recipe.to_dict()["quantize"] == "base"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
