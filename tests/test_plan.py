from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge import methods
from streammerge.budget import parse_bytes
from streammerge.checkpoint import DTYPE_BYTES, ByteFile, FileFacts
from streammerge.errors import CheckpointError, PlanError, StreamMergeError
from streammerge.layout import Layout, lay_out
from streammerge.plan import Plan, check_disk, make_plan
from streammerge.rates import Rates, save_rates
from streammerge.recipe import Recipe
from streammerge.rules import Role, TensorClass
from streammerge.schedule import Schedule
from streammerge.step import COPY
from tests.models import CONFIG, llama_tensors, recipe_of, save_model, tuned

GIB = 1 << 30
# not `streammerge.plan`: that is the function
PLANNING = sys.modules[make_plan.__module__]
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


class Headers:
    """Models of any size of which only the headers exist."""

    def __init__(self, *, shard_bytes: int = 10**15, config: object = None, **models: Tensors) -> None:
        self.layouts = {
            name: lay_out(((n, dtype, shape) for n, (dtype, shape) in tensors.items()), shard_bytes)
            for name, tensors in models.items()
        }
        self.config = json.dumps(config or {"model_type": "llama"}).encode()
        self.modified_ns = dict.fromkeys(models, 1)
        self.beside: dict[str, dict[str, bytes]] = {name: {} for name in models}

    def files(self, location: str) -> dict[str, FileFacts]:
        if location not in self.layouts:
            raise CheckpointError(f"`{location}` does not exist")
        sizes = {shard.file: shard.nbytes for shard in self.layouts[location].shards}
        sizes |= {name: len(data) for name, data in self._small(location).items()}
        return {name: FileFacts(size, self.modified_ns[location]) for name, size in sorted(sizes.items())}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        headers = {shard.file: shard.header for shard in self.layouts[location].shards}
        content = {**headers, **self._small(location)}[name]
        assert offset + nbytes <= len(content), f"{location}/{name}: data was read"
        return content[offset : offset + nbytes]

    def open(self, location: str, name: str) -> ByteFile:
        raise AssertionError("planning opened a data file")

    def _small(self, location: str) -> dict[str, bytes]:
        index = self.layouts[location].index_json()
        return {
            "config.json": self.config,
            **self.beside[location],
            **({} if index is None else {"model.safetensors.index.json": index.encode()}),
        }


LLAMA: Tensors = {
    "model.embed_tokens.weight": ("BF16", (64, 16)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (16, 16)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", (16, 40)),
    "model.layers.0.input_layernorm.weight": ("BF16", (16,)),
    "model.layers.0.block_sparse_moe.gate.weight": ("BF16", (4, 16)),
    "model.layers.1.self_attn.q_proj.weight": ("BF16", (16, 16)),
    "model.position_ids": ("I64", (8,)),
    "model.empty": ("BF16", (0, 16)),
    "logit_scale": ("F32", ()),
    "lm_head.weight": ("BF16", (64, 16)),
}


def recipe(method: str = "linear", experts: str = "ab", base: str | None = "base", **more: object) -> Recipe:
    return Recipe.from_dict(
        {
            "merge_method": method,
            **({"base_model": base} if base else {}),
            "models": [{"model": name} for name in experts],
            **more,
        }
    )


def family(tensors: Tensors = LLAMA, names: str = "ab", **more: Any) -> Headers:
    return Headers(base=tensors, **dict.fromkeys(names, tensors), **more)


def planned(recipe: Recipe, storage: Headers | None = None, memory: int = GIB, **more: int) -> Plan:
    return make_plan(recipe, storage or family(), memory_bytes=memory, **more)


def methods_of(plan: Plan) -> dict[str, str]:
    return {step.name: step.method for step in plan.steps}


def refused(recipe: Recipe, storage: Headers | None = None, memory: int = GIB) -> tuple[str, str]:
    with pytest.raises(PlanError) as raised:
        planned(recipe, storage, memory)
    assert raised.value.hint
    return raised.value.message, raised.value.hint


# which method each tensor gets


def test_a_method_of_matrices_gets_the_linear_weights_and_the_rest_is_averaged_or_copied() -> None:
    found = methods_of(planned(recipe("actmat")))
    assert found == {
        "model.embed_tokens.weight": "linear",
        "model.layers.0.self_attn.q_proj.weight": "actmat",
        "model.layers.0.mlp.down_proj.weight": "actmat",
        "model.layers.0.input_layernorm.weight": "linear",
        "model.layers.0.block_sparse_moe.gate.weight": "actmat",
        "model.layers.1.self_attn.q_proj.weight": "actmat",
        "model.position_ids": COPY,
        "model.empty": COPY,
        "logit_scale": "linear",
        "lm_head.weight": "linear",
    }


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_an_elementwise_method_gets_every_tensor_of_floats(method: str) -> None:
    for name, found in methods_of(planned(recipe(method))).items():
        assert found == (COPY if name in ("model.position_ids", "model.empty") else method)


def test_a_rule_sends_what_it_matches_to_another_method_or_keeps_the_base() -> None:
    rules = [
        {"match": r"layers\.1\.", "merge_method": "linear"},
        {"match": "embed_tokens", "merge_method": "actmat"},
        {"match": "lm_head|layernorm", "keep": "base"},
        {"match": "lm_head", "merge_method": "task_arithmetic"},
    ]
    plan = planned(recipe("actmat", rules=rules))
    found = methods_of(plan)
    assert found["model.layers.0.self_attn.q_proj.weight"] == "actmat"
    assert found["model.layers.1.self_attn.q_proj.weight"] == "linear"
    assert found["model.embed_tokens.weight"] == "actmat"
    # the first rule that matches counts
    assert found["lm_head.weight"] == found["model.layers.0.input_layernorm.weight"] == COPY
    kept = next(step for step in plan.steps if step.name == "lm_head.weight")
    assert (kept.models, kept.base, len(kept.experts)) == ((0,), None, 1)


def test_a_rule_that_sends_a_vector_to_a_method_of_matrices_is_refused() -> None:
    message, hint = refused(recipe("linear", rules=[{"match": "norm", "merge_method": "actmat"}]))
    assert message == (
        "rule `norm` sends `model.layers.0.input_layernorm.weight` to `actmat`, but its shape [16] is not a matrix"
    )
    assert hint == "Narrow the rule's `match`."


def test_a_rule_for_everything_still_copies_what_cannot_be_merged() -> None:
    found = methods_of(planned(recipe("actmat", rules=[{"match": ".", "merge_method": "linear"}])))
    assert Counter(found.values()) == {"linear": 8, COPY: 2}


def test_stacked_experts_are_merged_matrix_by_matrix() -> None:
    stacks: Tensors = {f"model.layers.{i}.mlp.experts.down_proj": ("BF16", (4, 8, 8)) for i in range(3)}
    plan = planned(recipe("actmat"), family(stacks, config={"model_type": "qwen3_moe"}))
    assert {(step.method, step.matrices) for step in plan.steps} == {("actmat", 4)}
    assert plan.warnings == ()


def test_a_class_taken_from_the_shape_is_said() -> None:
    storage = family({"mystery": ("F32", (8, 8)), "riddle": ("F32", (8, 8)), "model.norm.weight": ("F32", (8,))})
    plan = planned(recipe("actmat"), storage)
    assert plan.warnings == (
        "2 tensor(s) such as `mystery` of unknown name have the class that their shape suggests: "
        "a rule can say otherwise",
    )
    assert methods_of(plan) == {"mystery": "actmat", "riddle": "actmat", "model.norm.weight": "linear"}
    # where all tensors are treated alike there is nothing to act on
    assert planned(recipe("linear"), storage).warnings == ()


def test_a_linear_weight_that_is_no_matrix_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"odd": Role(TensorClass.ROUTER, source="owner"), "even": Role(TensorClass.MATRIX, source="owner")}
    monkeypatch.setattr(PLANNING, "roles_from_model", lambda config: stored)
    plan = planned(recipe("actmat"), family({"odd": ("BF16", (2, 3, 4)), "even": ("BF16", (3, 4, 1))}))
    assert set(methods_of(plan).values()) == {"linear"}


def test_a_transposed_matrix_is_priced_as_out_by_in() -> None:
    name = "h.0.mlp.c_fc.weight"
    priced = {}
    for model_type, shape in (("gpt2", (64, 256)), ("gpt_bigcode", (256, 64))):
        plan = planned(recipe("actmat"), family({name: ("F32", shape)}, config={"model_type": model_type}))
        assert plan.steps[0].method == "actmat"
        priced[model_type] = (plan.steps[0].flops, plan.steps[0].workspace_bytes)
    assert priced["gpt2"] == priced["gpt_bigcode"]


# what each step reads and writes


def test_steps_come_in_the_order_of_the_bases_bytes() -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (7, 3, 9, 1, 0, 5)]
    base: Tensors = dict.fromkeys(names, ("BF16", (8, 8)))
    storage = Headers(base=base, a=dict(sorted(base.items())), b=dict(reversed(base.items())), shard_bytes=300)
    plan = planned(recipe("actmat"), storage)
    assert [step.name for step in plan.steps] == names
    places = [plan.layout.placements[step.name] for step in plan.steps]
    assert places == sorted(places, key=lambda place: (place.shard, place.offset))
    for step in plan.steps:
        assert step.base
        for model, entry in zip(step.models, (step.base, *step.experts), strict=True):
            assert entry == plan.models[model].tensors[step.name]


def test_a_method_of_changes_reads_the_base_and_a_mean_of_models_does_not() -> None:
    with_base = planned(recipe("task_arithmetic"))
    assert {step.models for step in with_base.steps if step.method != COPY} == {(0, 1, 2)}
    mean = planned(recipe("linear"))
    assert {step.models for step in mean.steps if step.method != COPY} == {(1, 2)}
    assert all(step.base is None for step in mean.steps)
    without = planned(recipe("linear", base=None))
    assert {step.models for step in without.steps if step.method != COPY} == {(0, 1)}
    assert without.names == ("a", "b")


def test_a_rule_whose_method_needs_the_base_brings_it_in() -> None:
    plan = planned(recipe("linear", rules=[{"match": "q_proj", "merge_method": "task_arithmetic"}]))
    assert all(step.base is not None for step in plan.steps if step.method != COPY)


def test_bytes_are_those_of_the_tensors_each_counted_once() -> None:
    plan = planned(recipe("actmat"))
    size = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, (dtype, shape) in LLAMA.items()}
    copied = {"model.position_ids", "model.empty"}
    assert plan.read_bytes == sum(n * (1 if name in copied else 3) for name, n in size.items())
    assert {step.name: step.write_bytes for step in plan.steps} == size
    assert plan.flops == sum(step.flops for step in plan.steps) > 0
    assert plan.layout.total_bytes == sum(size.values()) + sum(len(shard.header) for shard in plan.layout.shards)


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_floats_are_written_in_the_dtype_asked_for_and_integers_as_they_are(key: str) -> None:
    plan = planned(recipe("linear", **{key: "float32"}))
    assert {step.name: step.dtype for step in plan.steps} == {
        name: "I64" if dtype == "I64" else "F32" for name, (dtype, _) in LLAMA.items()
    }


def test_without_a_dtype_each_tensor_keeps_the_bases() -> None:
    float16 = {name: ("F16" if dtype == "BF16" else dtype, shape) for name, (dtype, shape) in LLAMA.items()}
    plan = planned(recipe("linear"), Headers(base=LLAMA, a=float16, b=float16))
    assert {step.name: step.dtype for step in plan.steps} == {name: dtype for name, (dtype, _) in LLAMA.items()}


def test_float64_is_merged_in_float64() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    wide = {**LLAMA, name: ("F64", (16, 16))}
    plan = planned(recipe("actmat"), Headers(base=LLAMA, a=LLAMA, b=wide))
    by_name = {step.name: step for step in plan.steps}
    assert by_name[name].compute_bytes == 8
    assert by_name["model.layers.1.self_attn.q_proj.weight"].compute_bytes == 4
    assert by_name[name].workspace_bytes > by_name["model.layers.1.self_attn.q_proj.weight"].workspace_bytes


def test_a_curve_over_depth_is_read_at_each_tensors_layer() -> None:
    tensors: Tensors = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (4, 4)) for i in range(5)}
    tensors |= {"model.norm.weight": ("BF16", (4,)), "lm_head.weight": ("BF16", (8, 4))}
    plan = planned(recipe("task_arithmetic", parameters={"lambda": [0.0, 1.0]}), family(tensors))
    assert [step.arguments["lambda_"] for step in plan.steps] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.0]


def test_the_last_shard_size_wins_over_the_inputs_own() -> None:
    assert len(planned(recipe(), family(shard_bytes=500)).layout.shards) == 1
    assert len(planned(recipe(), max_shard_bytes=2500).layout.shards) > 1


# models that do not fit together


def test_every_difference_between_models_is_listed() -> None:
    down, gate = "model.layers.0.mlp.down_proj.weight", "model.layers.0.block_sparse_moe.gate.weight"
    a = {**LLAMA, down: ("BF16", (16, 44)), "extra": ("BF16", (1,)), "model.position_ids": ("I32", (8,))}
    del a[gate]
    b = {**LLAMA, "lm_head.weight": ("BF16", (65, 16)), "logit_scale": ("I32", ())}
    message, hint = refused(recipe(), Headers(base=LLAMA, a=a, b=b))
    assert message == (
        "the models do not fit together: 6 differences\n"
        "  `extra` is in `a` but not in `base`\n"
        f"  `{gate}` is in `base` but not in `a`\n"
        f"  `{down}` is [16, 40] in `base` but [16, 44] in `a`\n"
        "  `model.position_ids` is I64 in `base` but I32 in `a`\n"
        "  `lm_head.weight` is [64, 16] in `base` but [65, 16] in `b`\n"
        "  `logit_scale` is F32 in `base` but I32 in `b`"
    )
    assert hint == (
        "The models must share an architecture and a vocabulary. "
        "`streammerge inspect base a b` shows them side by side; `key_map` under a model renames its tensors."
    )


def test_of_many_differences_the_first_are_listed() -> None:
    extra: Tensors = {f"extra_{number:02}": ("F32", ()) for number in range(30)}
    message, _ = refused(recipe(), Headers(base=LLAMA, a={**LLAMA, **extra}, b=LLAMA))
    first, *listed = message.split("\n  ")
    assert first == "the models do not fit together: 30 differences"
    assert listed[0] == "`extra_00` is in `a` but not in `base`"
    assert listed[20:] == ["and 10 more"]


def test_one_difference_is_not_called_differences() -> None:
    message, _ = refused(recipe(), Headers(base=LLAMA, a={**LLAMA, "extra": ("F32", ())}, b=LLAMA))
    assert message.startswith("the models do not fit together: 1 difference\n")


def test_of_many_differences_the_first_are_listed_and_the_rest_counted() -> None:
    many = {f"extra.{number:04}": ("F32", (1,)) for number in range(1000)}
    message, _ = refused(recipe(experts=("a",)), Headers(base=LLAMA, a={**LLAMA, **many}))
    first, *listed, last = message.split("\n")
    assert first == "the models do not fit together: 1000 differences"
    assert listed == [f"  `extra.{number:04}` is in `a` but not in `base`" for number in range(20)]
    assert last == "  and 980 more"


def test_names_and_locations_from_outside_are_never_printed_raw() -> None:
    escape = "\x1b[2J"
    storage = Headers(**{"base": LLAMA, f"dir {escape}": {**LLAMA, escape: ("F32", ())}})
    with pytest.raises(PlanError) as raised:
        planned(recipe(experts=(f"dir {escape}",)), storage)  # type: ignore[arg-type]
    assert r"`\x1b[2J` is in `dir \x1b[2J` but not in `base`" in raised.value.message
    assert raised.value.hint
    assert r"`streammerge inspect base 'dir \x1b[2J'`" in raised.value.hint
    for text in (raised.value.message.replace("\n", ""), raised.value.hint):
        assert text.isprintable()


def sliced(layers: int, base: str | None = "base") -> Recipe:
    sources = [{"model": name, "layer_range": [0, layers]} for name in "ab"]
    mapping = {"merge_method": "linear", "slices": [{"sources": sources}]}
    return Recipe.from_dict(mapping | ({"base_model": base} if base else {}))


def test_a_slice_over_all_layers_is_planned_as_models_are() -> None:
    assert planned(sliced(2, None)).steps == planned(recipe(base=None)).steps


def test_a_base_that_no_method_works_with_does_not_enter_a_slice() -> None:
    whole, stacked = planned(recipe(base="base")).steps, planned(sliced(2)).steps
    assert {step.name for step in stacked} == {step.name for step in whole}
    assert all(0 not in step.models for step in stacked)


@pytest.mark.parametrize("base", ["base", None])
def test_layers_that_a_model_does_not_have_are_refused(base: str | None) -> None:
    assert refused(sliced(3, base)) == (
        "recipe.slices[0].sources[0]: `layer_range: [0, 3]` goes beyond the 2 layers of `a`",
        "Its last layer is 1; `[0, 2]` takes all of them.",
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "quark"])
def test_a_quantised_model_is_refused(method: str) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    message, hint = refused(recipe(), family(config=config))
    assert message == f"`base` is quantised by `{method}`: its config.json has a `quantization_config`"
    assert hint.startswith("Dequantise it to bfloat16 first, with the tool that quantised it")


def test_an_empty_quantization_config_is_none() -> None:
    assert planned(recipe(), family(config={"model_type": "llama", "quantization_config": None})).steps


@pytest.mark.parametrize(
    ("dtype", "reason", "advice"),
    [
        ("F8_E4M3", "needs its scales to be merged", "Convert the models to bfloat16 first."),
        ("F8_E5M2", "needs its scales to be merged", "Convert the models to bfloat16 first."),
        ("C64", "no method merges", "Convert the models to float32 first."),
    ],
)
def test_numbers_that_cannot_be_merged_are_refused_unless_the_base_is_kept(
    dtype: str, reason: str, advice: str
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    storage = family({**LLAMA, name: (dtype, (16, 16))})
    message, hint = refused(recipe(), storage)
    assert message == f"`{name}` is {dtype}, which {reason}"
    assert hint == advice
    kept = planned(recipe("linear", rules=[{"match": "q_proj", "keep": "base"}]), storage)
    assert methods_of(kept)[name] == COPY


def test_a_model_that_is_not_there_is_refused_before_anything_else() -> None:
    with pytest.raises(CheckpointError, match="`absent` does not exist"):
        planned(recipe(base="absent"))


# memory


shapes = st.lists(st.integers(0, 3000), max_size=3).map(tuple)
tensor_names = st.sampled_from(
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.position_ids"]
    + [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj", "norm")]
)


def _weights_are_floats(tensors: Tensors) -> Tensors:
    return {name: ("F32" if name.endswith("weight") and dtype == "I64" else dtype, shape)
            for name, (dtype, shape) in tensors.items()}  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(
    tensors=st.dictionaries(
        tensor_names, st.tuples(st.sampled_from(["BF16", "F32", "F64", "I64"]), shapes), min_size=1
    ).map(_weights_are_floats),
    method=st.sampled_from(["linear", "task_arithmetic", "actmat"]),
    experts=st.integers(1, 40),
    budget=st.integers(1 << 20, 1 << 33),
    out=st.sampled_from([{}, {"out_dtype": "float64"}]),
)
def test_a_plan_keeps_its_budget_or_says_which_would_do(
    tensors: Tensors, method: str, experts: int, budget: int, out: dict[str, str]
) -> None:
    names = [f"e{i}" for i in range(experts)]
    storage = Headers(base=tensors, config={"model_type": "none"}, **dict.fromkeys(names, tensors))
    wanted = recipe(method, experts=names, **out)  # type: ignore[arg-type]
    try:
        plan = planned(wanted, storage, budget)
    except PlanError as error:
        named = re.search(r"`([^`]+)` \((\w+), (\d+) experts\)$", error.message)
        enough = re.fullmatch(r"Pass `--memory (\d+MiB)` or more\.", error.hint or "")
        assert named
        assert enough
        assert named[1] in tensors
        plan = planned(wanted, storage, parse_bytes(enough[1]))
    memory = plan.memory
    assert memory.peak_bytes <= memory.budget_bytes
    for step in plan.steps:
        assert plan.workspace_bytes(step) <= memory.workspace_bytes
        assert 2 * len(step.models) <= memory.input_slots
        if step.by_matrix:
            assert step.shape[1] * step.element_bytes <= memory.slot_bytes


def test_a_budget_too_small_names_the_tensor_and_an_amount_that_works(family: dict[str, Path]) -> None:
    with pytest.raises(StreamMergeError) as raised:
        streammerge.plan(recipe_of(family), memory="1MiB")
    assert re.fullmatch(
        r"the largest step needs a budget of [\d.]+ MiB, more than 1\.0 MiB: "
        r"`model\.layers\.\d\.mlp\.\w+\.weight` \(actmat, 3 experts\)",
        raised.value.message,
    )
    found = re.fullmatch(r"Pass `--memory (\d+MiB)` or more\.", raised.value.hint or "")
    assert found
    assert streammerge.plan(recipe_of(family), memory=found[1]).memory.peak_bytes <= parse_bytes(found[1])


def test_without_a_budget_half_of_what_is_available_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLANNING, "available_memory_bytes", lambda: 6 * GIB)
    assert make_plan(recipe(), family()).memory.budget_bytes == 3 * GIB


# disk, time, identity


def test_a_full_disk_is_noticed_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(recipe("linear", out_dtype="float32"))
    asked = []

    def usage(folder: Path) -> shutil._ntuple_diskusage:
        asked.append(folder)
        return shutil._ntuple_diskusage(10**9, 0, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(PlanError) as raised:
        check_disk(plan, str(tmp_path / "not/yet/there"))
    needed = plan.layout.total_bytes / 1024
    assert raised.value.message == (f"`{tmp_path}/not/yet/there` needs {needed:.1f} KiB of disk but 1000 B are free")
    assert raised.value.hint == "Free some space, choose another folder, or set a narrower `out_dtype`."
    assert asked == [tmp_path]


def test_a_disk_with_room_says_how_much(tmp_path: Path) -> None:
    plan = planned(recipe())
    needed, free = check_disk(plan, str(tmp_path / "out"))
    assert needed == plan.layout.total_bytes
    assert free > needed


def test_time_is_predicted_once_a_merge_of_the_kind_was_measured() -> None:
    by_matrix, by_element = planned(recipe("actmat")), planned(recipe("linear"))
    assert (by_matrix.rates_keys, by_element.rates_keys) == (("actmat", "matrix"), ("linear", "element"))
    assert by_matrix.predicted_seconds is None
    save_rates("element", Rates(by_element.work.read_bytes / 7, 1e12, 1e12, 1e12))
    assert by_element.predicted_seconds == pytest.approx(7.0)
    assert by_matrix.predicted_seconds is None
    save_rates("matrix", Rates(1e12, 1e12, by_matrix.work.matrix_flops / 9, 1e12))
    assert by_matrix.predicted_seconds == pytest.approx(9.0)
    # its own method's merges say more than others
    save_rates("actmat", Rates(1e12, 1e12, 1e12, by_matrix.work.element_bytes / 3))
    assert by_matrix.predicted_seconds == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("method", ["linear", "ties", "actmat", "model_stock", "della", "larv"])
@pytest.mark.parametrize("memory", [256 << 20, GIB])
def test_the_work_to_read_is_what_the_stream_will_ask_for(method: str, memory: int) -> None:
    plan = planned(recipe(method, experts="ab"), memory=memory)
    assert plan.work.read_bytes == Schedule(plan, ()).read_bytes


def test_on_a_device_that_keeps_its_inputs_each_byte_is_read_once() -> None:
    storage, wanted = family(), recipe("actmat")
    plan = make_plan(wanted, storage, memory_bytes=GIB, device="cuda", device_memory_bytes=GIB)
    assert plan.work.read_bytes == Schedule(plan, (), resident=True).read_bytes == plan.read_bytes


def test_the_fingerprint_is_plain_data_and_knows_nothing_of_the_budget() -> None:
    poor, rich = (planned(recipe("actmat"), memory=memory).fingerprint() for memory in (GIB, 8 * GIB))
    assert poor == rich == json.loads(json.dumps(poor))
    assert poor["models"].keys() == {"base", "a", "b"}


def test_the_fingerprint_changes_with_whatever_would_change_the_bytes() -> None:
    renamed = {name.replace("lm_head", "head"): facts for name, facts in LLAMA.items()}
    touched = family()
    touched.modified_ns["b"] = 2
    plans = [
        planned(recipe()),
        planned(recipe(seed=1)),
        planned(recipe(experts="ba")),
        planned(recipe(parameters={"weight": 0.3})),
        planned(recipe(out_dtype="float32")),
        planned(recipe(rounding="stochastic")),
        planned(recipe("task_arithmetic")),
        planned(recipe(rules=[{"match": "lm_head", "keep": "base"}])),
        planned(recipe(), touched),
        planned(recipe(), family(shard_bytes=500)),
        planned(recipe(), family(renamed)),
        planned(recipe(), max_shard_bytes=3000),
    ]
    prints = [json.dumps(plan.fingerprint(), sort_keys=True) for plan in plans]
    assert len(set(prints)) == len(prints)


# warnings


def test_a_chat_template_that_only_an_expert_has_is_pointed_out() -> None:
    storage = family()
    storage.beside["b"]["chat_template.jinja"] = b"{{ messages }}"
    assert planned(recipe(), storage).warnings == (
        "`base` has no chat template but `b` has: set `chat_template` to say which the output gets",
    )
    for settled in ({"chat_template": "b"}, {"chat_template": "auto"}, {"tokenizer_source": "b"}):
        assert planned(recipe(**settled), storage).warnings == ()
    storage.beside["base"]["chat_template.jinja"] = b"{{ messages }}"
    assert planned(recipe(), storage).warnings == ()


def test_warnings_of_the_recipe_are_the_plans() -> None:
    wanted = recipe(parameters={"int8_mask": True})
    assert wanted.warnings
    assert planned(wanted).warnings == wanted.warnings


def test_real_folders_are_planned_as_they_lie(tmp_path: Path) -> None:
    base = llama_tensors()
    folders = {
        "base": save_model(tmp_path / "base", base, shards=2),
        "math": save_model(tmp_path / "math", tuned(base, 1)),
    }
    plan = streammerge.plan(recipe_of(folders, "task_arithmetic"), memory="1GiB", max_shard_size="10KB")
    assert {step.name for step in plan.steps} == base.keys()
    assert len(plan.layout.shards) > 1
    assert plan.warnings == ()


# a large model, without torch


def olmo_tensors() -> Tensors:
    """OLMo-3-7B: 355 tensors, 7 298 011 136 parameters."""
    hidden, wide, vocabulary = 4096, 11008, 100278
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (vocabulary, hidden))}
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{n}_proj.weight": ("BF16", (hidden, hidden)) for n in "qkvo"}
        tensors |= {f"{prefix}mlp.{n}_proj.weight": ("BF16", (wide, hidden)) for n in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = ("BF16", (hidden, wide))
        for norm in ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ("BF16", (hidden,))
    tensors["model.norm.weight"] = ("BF16", (hidden,))
    tensors["lm_head.weight"] = ("BF16", (vocabulary, hidden))
    return tensors


def write_headers(folder: Path, layout: Layout, config: Mapping[str, object]) -> None:
    """A model whose data are holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for shard in layout.shards:
        (folder / shard.file).write_bytes(shard.header)
        os.truncate(folder / shard.file, shard.nbytes)
    index = layout.index_json()
    assert index
    (folder / "model.safetensors.index.json").write_text(index)


PLAN = """
import sys, time
started = time.perf_counter()
import streammerge
imported = time.perf_counter()
plan = streammerge.plan(sys.argv[1], memory="8GiB")
print(f"import {imported - started:.2f} s, plan {time.perf_counter() - imported:.2f} s")
heavy = {"torch", "numpy", "transformers", "accelerate"} & sys.modules.keys()
assert not heavy, heavy
print(len(plan.steps), plan.layout.total_bytes, sum(step.method == "actmat" for step in plan.steps))
print(plan.read_bytes, plan.memory.peak_bytes, plan.predicted_seconds)
"""


def test_four_models_of_7b_are_planned_without_torch(tmp_path: Path) -> None:
    tensors = olmo_tensors()
    layout = lay_out(((name, dtype, shape) for name, (dtype, shape) in tensors.items()), 5_000_000_000)
    assert (len(tensors), len(layout.shards)) == (355, 3)
    config = {**CONFIG, "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]}
    folders = {name: tmp_path / name for name in ("base", "math", "code", "if")}
    for folder in folders.values():
        write_headers(folder, layout, config)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(folders)) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(tmp_path / "recipe.yaml")],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    times, counts, sizes = done.stdout.splitlines()
    print(times)  # noqa: T201 - for the reader: a busy machine is no reason to fail
    data = 2 * 7_298_011_136
    assert counts.split() == ["355", str(layout.total_bytes), "224"]
    assert sizes.split()[0] == str(4 * data)
    assert data < layout.total_bytes < data + 100_000
    assert int(sizes.split()[1]) <= 8 * GIB
    assert sizes.split()[2] == "None"


@pytest.mark.parametrize("name", methods.names())
def test_every_method_of_the_table_can_be_planned(name: str) -> None:
    beside = methods.describe(name).beside
    matrix = next(name for name in LLAMA if "q_proj" in name)
    rows, columns = LLAMA[matrix][1]
    data = {matrix: ("F32", (columns, columns) if beside == "covariance" else (rows, columns))}
    _, most = methods.describe(name).experts
    models = [{"model": expert, **({beside: "data"} if beside else {})} for expert in "ab"[:most]]
    # what lies beside the experts is of one matrix alone
    parameters = {"missing": "mean"} if beside else {}
    plan = planned(recipe(name, models=models, parameters=parameters), family(data=data), memory=4 * GIB)
    assert name in methods_of(plan).values()
    assert [s.name for s in plan.steps if any(s.beside)] == ([matrix] if beside else [])
