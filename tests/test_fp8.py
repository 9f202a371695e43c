"""Models in 8-bit floats with scales: merged as what their codes mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge.checkpoint import Checkpoint, load_checkpoint
from streammerge.derived import DerivedEntry
from streammerge.errors import CheckpointError, MergeError, PlanError
from streammerge.fp8 import BlockScales, dequantised, is_fp8
from streammerge.models import open_model
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from streammerge.storage.local import LocalStorage
from tests.models import CONFIG, llama_tensors, recipe_of, save_model, tuned
from tests.stored import MemoryStorage, streamed_tensors, tensors_of

NAME = "model.layers.0.mlp.up_proj.weight"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": WEIGHTS}},
}


def quantised(tensor: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes, and for each block the scale that its largest magnitude gives."""
    down, across = (-(-side // size) for side, size in zip(tensor.shape, (rows, columns), strict=True))
    padded = torch.zeros(down * rows, across * columns)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    blocks = padded.view(down, rows, across, columns)
    scales = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-12)
    codes = (blocks / scales[:, None, :, None]).view(down * rows, -1)[: tensor.shape[0], : tensor.shape[1]]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def meant(codes: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """What codes mean, in float64."""
    spread = scales.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes.double() * spread[: codes.shape[0], : codes.shape[1]]


def stored(models: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Any]) -> MemoryStorage:
    storage = MemoryStorage(models)
    for location, config in configs.items():
        storage.contents[location]["config.json"] = json.dumps({"quantization_config": config}).encode()
    return storage


def opened(tensors: Mapping[str, Tensor], config: Any) -> tuple[Checkpoint, MemoryStorage]:
    storage = stored({"m": tensors}, {"m": config})
    return open_model(storage, "m"), storage


def filled(entry: DerivedEntry, parts: Mapping[str, Tensor], first: int, elements: int) -> Tensor:
    """A run of a derived tensor, as the reading thread computes it, into memory that is not zero before."""
    taken = 0

    def read(part: Any, begin: int, count: int) -> Tensor:
        nonlocal taken
        whole = parts[part.name].reshape(-1)
        assert begin >= 0
        assert begin + count <= whole.numel()
        taken += count * whole.itemsize
        return whole[begin : begin + count]

    out = torch.full((elements,), math.nan)
    entry.derivation.fill(entry, out, first, read)
    assert taken <= entry.scratch_bytes(elements)
    return out


def refused(tensors: Mapping[str, Tensor], config: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        opened(tensors, config)
    assert raised.value.hint
    return raised.value.message


def test_every_code_means_what_its_bits_say():
    bits = torch.arange(256, dtype=torch.uint8)
    codes = bits.view(torch.float8_e4m3fn).view(16, 16)
    scales = torch.tensor([[0.3]])
    model, _ = opened({NAME: codes, NAME + "_scale_inv": scales}, BLOCKS)
    found = filled(model.tensors[NAME], {NAME: codes, NAME + "_scale_inv": scales}, 0, 256)
    for number, value in enumerate(found.tolist()):
        sign, exponent, fraction = number >> 7, number >> 3 & 15, number & 7
        if number & 127 == 127:
            assert math.isnan(value)
            continue
        magnitude = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        # one rounding: of the exact product to float32
        assert value == np.float32((-1) ** sign * magnitude * float(scales)), number


SCHEMES = {
    "blocks of 128": (BLOCKS, (128, 128), "_scale_inv", None),
    "blocks of 7 x 5": ({**BLOCKS, "weight_block_size": [7, 5]}, (7, 5), "_scale_inv", None),
    "one for all": ({"quant_method": "fp8"}, (10**6, 10**6), "_scale", ()),
    "one for all, as a list": ({"quant_method": "fp8"}, (10**6, 10**6), "_scale", (1,)),
    "by row": (COMPRESSED, (1, 10**6), "_scale", (-1, 1)),
    "by row, as a list": ({"quant_method": "fbgemm_fp8"}, (1, 10**6), "_scale", (-1,)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 300)), data=st.data())
def test_any_run_of_any_shape_is_what_it_means(scheme, shape, data):
    config, (rows, columns), ending, scale_shape = SCHEMES[scheme]
    rows, columns = min(rows, shape[0]) if rows > 1000 else rows, min(columns, shape[1]) if columns > 1000 else columns
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes, scales = quantised(torch.randn(shape, generator=generator), rows, columns)
    tensors = {NAME: codes, NAME + ending: scales if scale_shape is None else scales.reshape(scale_shape)}
    model, _ = opened(tensors, config)
    assert model.tensors.keys() == {NAME}
    first = data.draw(st.integers(0, codes.numel() - 1))
    elements = data.draw(st.integers(1, codes.numel() - first))
    found = filled(model.tensors[NAME], tensors, first, elements)
    expected = meant(codes, scales, rows, columns).reshape(-1)[first : first + elements]
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scales_and_codes_may_have_other_dtypes(dtype, code):
    codes, scales = torch.randn(200, 130).to(code), torch.tensor([[1.0, 0.5], [4.0, 0.25]]).to(dtype)
    tensors = {NAME: codes, NAME + "_scale_inv": scales}
    model, _ = opened(tensors, BLOCKS)
    expected = meant(codes, scales.float(), 128, 128).float().reshape(-1)
    assert torch.equal(filled(model.tensors[NAME], tensors, 0, codes.numel()), expected)


# whole models


def family() -> tuple[MemoryStorage, MemoryStorage]:
    """A base in 8 bits, one expert in 8 bits in another way, one in bfloat16; and what they mean, in float32."""
    generator = torch.Generator().manual_seed(1)
    names = {NAME: (200, 130), "model.layers.0.mlp.down_proj.weight": (130, 200)}

    def full() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}

    norm = {"model.norm.weight": torch.ones(130, dtype=torch.bfloat16)}
    base: dict[str, Tensor] = dict(norm)
    one: dict[str, Tensor] = dict(norm)
    plain = {"base": dict(norm), "one": dict(norm), "two": dict(norm)}
    for name, tensor in full().items():
        base[name], base[name + "_scale_inv"] = quantised(tensor, 128, 128)
        plain["base"][name] = meant(base[name], base[name + "_scale_inv"], 128, 128).float()
        one[name], one[name + "_scale"] = quantised(tensor + 0.1 * torch.randn(tensor.shape), 1, tensor.shape[1])
        plain["one"][name] = meant(one[name], one[name + "_scale"], 1, tensor.shape[1]).float()
        plain["two"][name] = (tensor + 0.1 * torch.randn(tensor.shape)).bfloat16()
    one["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor(0.02)
    return stored({"base": base, "one": one, "two": plain["two"]}, {"base": BLOCKS, "one": COMPRESSED}), MemoryStorage(
        plain
    )


def plan_of(storage: MemoryStorage, method: str, **more: object) -> Plan:
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "one"}, {"model": "two"}], **more}
    return make_plan(Recipe.from_dict(recipe), storage, memory_bytes=512 << 20)


@pytest.mark.parametrize("method", ["linear", "ties", "actmat"])
def test_models_in_8_bits_and_in_16_merge_as_what_they_mean(method):
    codes, plain = family()
    found = streamed_tensors(plan_of(codes, method, out_dtype="float32"), codes)
    expected = streamed_tensors(plan_of(plain, method, out_dtype="float32"), plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_output_is_bfloat16_without_scales():
    codes, plain = family()
    plan = plan_of(codes, "linear")
    assert {step.dtype for step in plan.steps} == {"BF16"}
    assert "quantization_config" not in plan.models[0].config
    found, expected = streamed_tensors(plan, codes), streamed_tensors(plan_of(plain, "linear"), plain)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_a_copied_tensor_is_what_it_means_too():
    codes, plain = family()
    found = streamed_tensors(plan_of(codes, "linear", rules=[{"match": "up_proj", "keep": "base"}]), codes)
    expected = open_tensor(plain, "base", NAME)
    assert torch.equal(found[NAME], expected.bfloat16())


def open_tensor(storage: MemoryStorage, location: str, name: str) -> Tensor:
    entry = load_checkpoint(storage, location).tensors[name]
    data = storage.read(location, entry.file, entry.offset, entry.nbytes)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(entry.shape)


def test_scales_of_activations_are_left_out_with_a_warning():
    codes, _ = family()
    (warning,) = plan_of(codes, "linear").warnings
    assert warning == (
        "1 scale(s) of activations such as `model.layers.0.mlp.up_proj.input_scale` in `one` are left out: "
        "the output is not quantised"
    )


def test_what_is_read_is_counted_as_stored():
    codes, _ = family()
    plan = plan_of(codes, "linear")
    base = 2 * (200 * 130 + 4 * 2 * 2)
    one = 2 * 200 * 130 + (200 + 130) * 4
    two = 2 * 200 * 130 * 2
    norm = 130 * 2
    reads_base = sum(step.base is not None for step in plan.steps) > 0
    assert plan.read_bytes == one + two + 2 * norm + (base + norm if reads_base else 0)


@pytest.mark.parametrize("place", ["code", "scale"])
def test_what_is_no_number_stops_the_merge(place):
    codes, _ = family()
    model = load_checkpoint(codes, "one")
    entry = model.tensors[NAME + ("" if place == "code" else "_scale")]
    data = bytearray(codes.contents["one"]["model.safetensors"])
    data[entry.offset : entry.offset + 4] = b"\x7f" * 4 if place == "code" else b"\x00\x00\xc0\x7f"
    codes.contents["one"]["model.safetensors"] = bytes(data)
    with pytest.raises(MergeError, match=NAME.replace(".", r"\.")):
        streamed_tensors(plan_of(codes, "linear"), codes)


def test_a_merged_folder_is_a_plain_model_that_passes_every_check(tmp_path: Path):
    base = llama_tensors()
    folders = {}
    for number, name in enumerate(("base", "math", "code")):
        tensors: dict[str, Tensor] = {}
        for key, tensor in (tuned(base, number) if number else base).items():
            tensors[key] = tensor
            if name != "code" and "_proj" in key:
                tensors[key], tensors[key + "_scale_inv"] = quantised(tensor.float(), 128, 128)
        folders[name] = save_model(tmp_path / name, tensors, shards=2)
        if name != "code":
            (folders[name] / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": BLOCKS}))
    out = tmp_path / "out"
    streammerge.merge(recipe_of(folders, "actmat"), out)
    assert json.loads((out / "config.json").read_text()) == CONFIG
    merged = tensors_of(out)
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in base.items()
    }
    verified = streammerge.verify(out, inputs=True, recompute=6)
    assert verified.problems == ()
    assert len(verified.recomputed) == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_reads_the_same_numbers(tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, dtype="bfloat16", **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    tensors = tensors_of(tmp_path / "plain")
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name], tensors[name + "_scale_inv"] = quantised(tensors[name].float(), 128, 128)
    folder = save_model(tmp_path / "codes", tensors)
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "quantization_config": BLOCKS}))
    streammerge.merge({"merge_method": "linear", "models": [{"model": str(folder)}]}, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    ours = tensors_of(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


# what does not fit


def test_a_model_without_a_quantization_config_is_left_as_it_is():
    tensors = {NAME: torch.zeros(2, 2).to(torch.float8_e4m3fn), NAME + "_scale_inv": torch.ones(1, 1)}
    model = load_checkpoint(MemoryStorage({"m": tensors}), "m")
    assert dequantised(model) is model


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {**WEIGHTS, "num_bits": 4}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {**WEIGHTS, "type": "int"}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {**WEIGHTS, "symmetric": False}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": WEIGHTS}, "h": None}},
        {"quant_method": ["fp8"]},
        {},
    ],
)
def test_other_ways_to_quantise_are_not_taken_for_8_bit_floats(config):
    assert not is_fp8(config)
    tensors = {NAME: torch.zeros(4, 4)}
    storage = stored({"base": tensors, "one": tensors, "two": tensors}, {"one": {**config, "bits": 4}})
    with pytest.raises(PlanError, match="`one` is quantised"):
        plan_of(storage, "linear")


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ({}, "is F8_E4M3 with 0 tensors of scales"),
        ({"_scale_inv": (2, 2), "_scale": (2, 2)}, "is F8_E4M3 with 2 tensors of scales"),
        ({"_scale_inv": (2, 2), "_zero_point": (2, 2)}, "is F8_E4M3 with 1 tensors of scales"),
        ({"_scale_inv": (1, 2)}, r"is F32 [1, 2], expected a number for each block of [128, 128]"),
        ({"_scale_inv": (2, 3)}, r"is F32 [2, 3], expected"),
        ({"_scale_inv": (4,)}, r"is F32 [4], expected"),
        ({"_scale_inv": ()}, r"is F32 [], expected"),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_are_refused(scales, reason):
    tensors = {NAME: torch.zeros(200, 130).to(torch.float8_e4m3fn)}
    tensors |= {NAME + ending: torch.ones(shape) for ending, shape in scales.items()}
    assert reason in refused(tensors, BLOCKS)


@pytest.mark.parametrize("shape", [(130,), (1, 200), (200, 2), (2, 2), (200, 1, 1), (0,)])
def test_scales_by_row_are_as_many_as_rows(shape):
    tensors = {NAME: torch.zeros(200, 130).to(torch.float8_e4m3fn), NAME + "_scale": torch.ones(shape)}
    assert "expected a number for each row, or for all" in refused(tensors, COMPRESSED)


def test_scales_that_are_no_floats_are_refused():
    tensors = {NAME: torch.zeros(4, 4).to(torch.float8_e4m3fn), NAME + "_scale": torch.ones(4, 1, dtype=torch.int32)}
    assert "is I32 [4, 1], expected" in refused(tensors, COMPRESSED)


@pytest.mark.parametrize("block", [[128], 128, [0, 128], [128, -1], [128, 1.5], [True, True], "128", [[1], [2]], {}])
def test_blocks_of_no_size_are_refused(block):
    tensors = {NAME: torch.zeros(4, 4).to(torch.float8_e4m3fn), NAME + "_scale_inv": torch.ones(1, 1)}
    assert "expected two sizes" in refused(tensors, {**BLOCKS, "weight_block_size": block})


def test_a_block_larger_than_memory_takes_none():
    codes = torch.ones(4, 6).to(torch.float8_e4m3fn)
    tensors = {NAME: codes, NAME + "_scale_inv": torch.full((1, 1), 0.5)}
    model, _ = opened(tensors, {**BLOCKS, "weight_block_size": [2**31 - 1, 2**31 - 1]})
    assert model.tensors[NAME].scratch_bytes(24) < 1000
    assert torch.equal(filled(model.tensors[NAME], tensors, 5, 10), torch.full((10,), 0.5))


def test_blocks_are_small_and_comparable():
    assert BlockScales(128, 128) == BlockScales(128, 128)


def test_an_8_bit_model_on_disk_is_planned_without_torch(tmp_path: Path):
    import subprocess
    import sys

    codes, scales = quantised(torch.randn(16, 16), 128, 128)
    folder = save_model(tmp_path / "m", {NAME: codes, NAME + "_scale_inv": scales})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": BLOCKS}))
    code = f"import sys, streammerge; print(streammerge.inspect({str(folder)!r}).to_dict()['models'][0]['dtypes'])"
    ran = subprocess.run(
        [sys.executable, "-c", code + "; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == ["{'F32': 1}", "False"], ran.stderr
    assert load_checkpoint(LocalStorage(), str(folder)).tensors.keys() == {NAME, NAME + "_scale_inv"}
