"""The experts of one model in the layout of another: what fits is turned, what does not is told of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammerge import memory
from streammerge.checkpoint import load_checkpoint
from streammerge.errors import PlanError
from streammerge.mixtures import in_layout_of
from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe
from tests.stored import MemoryStorage, streamed_tensors

NAMINGS = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}
LAYER = "model.layers.0."


def apart(naming: str, experts: int, hidden: int, wide: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = NAMINGS[naming]
    tensors = {f"{LAYER}{naming}.gate.weight": torch.randn((experts, hidden), generator=generator)}
    for number in range(experts):
        for part, shape in ((gate, (wide, hidden)), (up, (wide, hidden)), (down, (hidden, wide))):
            name = f"{LAYER}{naming}.experts.{number}.{part}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def stacked(tensors: dict[str, Tensor], naming: str) -> dict[str, Tensor]:
    gate, up, down = (
        torch.stack(
            [tensor for name, tensor in tensors.items() if name.endswith(f".{part}.weight") and "experts" in name]
        )
        for part in NAMINGS[naming]
    )
    return {
        f"{LAYER}mlp.gate.weight": tensors[f"{LAYER}{naming}.gate.weight"],
        f"{LAYER}mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1),
        f"{LAYER}mlp.experts.down_proj": down,
    }


def storage_of(model_type: str = "qwen3_moe", **models: dict[str, Tensor]) -> MemoryStorage:
    return MemoryStorage(models, {"model_type": model_type})


def planned(storage: MemoryStorage, method: str = "linear", **more: Any) -> Plan:
    """The base, and one expert, which comes back whole."""
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "expert"}]}
    return make_plan(Recipe.from_dict(recipe), storage, memory_bytes=1 << 30, **more)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(list(NAMINGS)),
    st.booleans(),
    st.sampled_from([64, 256, 1 << 20]),
    st.booleans(),
)
def test_every_tensor_is_found_in_either_layout(experts, hidden, wide, naming, base_stacked, slot_bytes, device):
    base, expert = (apart(naming, experts, hidden, wide, seed) for seed in (1, 2))
    layouts = [stacked(base, naming), expert] if base_stacked else [base, stacked(expert, naming)]
    storage = storage_of(base=layouts[0], expert=layouts[1])
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("LARGEST_SLOT_BYTES", "STAGED_SLOT_BYTES"):
            patch.setattr(memory, limit, slot_bytes)
        plan = planned(storage, "linear", device_memory_bytes=1 << 30 if device else None)
    found = streamed_tensors(plan, storage)
    expected = stacked(expert, naming) if base_stacked else expert
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_model_in_the_references_layout_is_left_alone():
    tensors = apart("mlp", 3, 4, 6)
    storage = storage_of(base=tensors, expert=tensors)
    reference, model = (load_checkpoint(storage, name) for name in ("base", "expert"))
    assert in_layout_of(reference, model) is model


@pytest.mark.parametrize("base_stacked", [True, False])
@pytest.mark.parametrize("experts", [2, 4])
def test_another_number_of_experts_is_refused(base_stacked, experts):
    base, expert = apart("mlp", 3, 4, 6), apart("mlp", experts, 4, 6)
    layouts = [stacked(base, "mlp"), expert] if base_stacked else [base, stacked(expert, "mlp")]
    with pytest.raises(PlanError, match="do not fit together"):
        planned(storage_of(base=layouts[0], expert=layouts[1]), "linear")


def test_a_missing_matrix_and_one_of_another_shape_are_refused():
    base, expert = stacked(apart("mlp", 3, 4, 6), "mlp"), apart("mlp", 3, 4, 6)
    name = f"{LAYER}mlp.experts.1.up_proj.weight"
    for change in ({}, {name: torch.zeros(5, 4)}, {name: torch.zeros(6, 4).half()}):
        damaged = {key: tensor for key, tensor in expert.items() if key != name} | change
        with pytest.raises(PlanError, match=r"`model\.layers\.0\.mlp\.experts\.gate_up_proj` is in `base` but not in"):
            planned(storage_of(base=base, expert=damaged), "linear")


def test_stacks_of_transposed_matrices_are_not_cut():
    """gpt-oss stores [E, in, out]: no rows of those are a matrix of the hub's."""
    base = apart("mlp", 3, 4, 4)
    storage = storage_of(base=base, expert=stacked(base, "mlp"))
    storage.contents["expert"]["config.json"] = json.dumps({"model_type": "gpt_oss"}).encode()
    with pytest.raises(PlanError, match="do not fit together"):
        planned(storage, "linear")


def test_a_half_precision_expert_is_turned_in_its_own_dtype():
    base, expert = apart("mlp", 2, 4, 6), {n: t.bfloat16() for n, t in apart("mlp", 2, 4, 6, seed=3).items()}
    storage = storage_of(base=stacked(base, "mlp"), expert=expert)
    found = streamed_tensors(planned(storage, "linear"), storage)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in stacked(expert, "mlp").items())
