"""Mixtures of experts of transformers, small and random: saved, merged and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge import api
from streammerge.rules import TensorClass
from tests.models import recipe_of
from tests.stored import tensors_of

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.4,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 12,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1,
    },
}  # fmt: skip
WITHOUT_HEAD_DIM = ("olmoe", "deepseek_v3")
# what transformers writes in one layout only
STACKED_ONLY = ("gpt_oss", "llama4_text")
LAYOUTS = [(kind, hub) for kind in CONFIGS for hub in (True, False) if not (hub and kind in STACKED_ONLY)]
LAYOUTS_OF_MODELS = pytest.mark.parametrize(
    ("kind", "hub"), LAYOUTS, ids=[f"{kind}-{'hub' if hub else 'stacked'}" for kind, hub in LAYOUTS]
)


def built(kind: str) -> Any:
    torch.manual_seed(0)
    settings = {key: value for key, value in SIZES.items() if key != "head_dim" or kind not in WITHOUT_HEAD_DIM}
    config = transformers.AutoConfig.for_model(kind, **{**settings, **CONFIGS[kind]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def saved(model: Any, folder: Path, *, hub: bool) -> Path:
    model.save_pretrained(folder, save_original_format=hub)
    return folder


@torch.no_grad()
def trained(model: Any, seed: int) -> Any:
    """The model with every weight moved a little."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight += torch.randn_like(weight) * 0.02
    return model


def loaded(folder: Path) -> Any:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: list(value) for key, value in found.items()} == {key: [] for key in found}
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 35).view(2, 16)).logits


@LAYOUTS_OF_MODELS
def test_every_tensor_of_a_mixture_is_known_by_its_name(kind, hub, tmp_path):
    found = api.inspect(saved(built(kind), tmp_path / "model", hub=hub))
    roles = found.roles[0]
    assert {role.source for role in roles.values()} == {"name"}
    routers = [name for name, role in roles.items() if role.kind is TensorClass.ROUTER]
    assert len(routers) == 2
    assert all(name.endswith((".gate.weight", ".router.weight")) for name in routers)
    experts = {name: role for name, role in roles.items() if ".experts." in name and not name.endswith("bias")}
    assert {role.kind for role in experts.values()} == {TensorClass.MATRIX if hub else TensorClass.STACK}
    assert len(experts) == 2 * (3 * 4 if hub else 2)
    assert {role.transposed for role in experts.values()} == {kind in STACKED_ONLY}


@LAYOUTS_OF_MODELS
def test_a_mixture_is_merged_and_loaded_again(kind, hub, tmp_path):
    family = {"base": saved(built(kind), tmp_path / "base", hub=hub)}
    family |= {f"e{i}": saved(trained(built(kind), i + 1), tmp_path / f"e{i}", hub=hub) for i in range(2)}
    report = streammerge.merge(recipe_of(family, "actmat"), tmp_path / "out")
    outcomes = {outcome.name: outcome for outcome in report.tensors}
    roles = api.inspect(family["base"]).roles[0]
    solved = (TensorClass.MATRIX, TensorClass.STACK, TensorClass.ROUTER)
    assert all((outcomes[name].method == "actmat") == (role.kind in solved) for name, role in roles.items())
    assert all("certificate" in outcomes[name].facts for name, role in roles.items() if role.kind in solved)
    stored, merged = tensors_of(family["base"]), tensors_of(tmp_path / "out")
    assert {name: t.shape for name, t in merged.items()} == {name: t.shape for name, t in stored.items()}
    assert logits(loaded(tmp_path / "out")).isfinite().all()


@LAYOUTS_OF_MODELS
@pytest.mark.parametrize("method", ["actmat", "tsv"])
def test_one_expert_alone_comes_back(kind, hub, method, tmp_path):
    expert = trained(built(kind), 7)
    family = {"base": saved(built(kind), tmp_path / "base", hub=hub), "e": saved(expert, tmp_path / "e", hub=hub)}
    streammerge.merge(recipe_of(family, method), tmp_path / "out")
    found = loaded(tmp_path / "out")
    changed = logits(expert) - logits(built(kind))
    assert float(changed.norm()) > 0.1
    assert float((logits(found) - logits(expert)).norm() / changed.norm()) < 1e-3


TWO_LAYOUTS = [kind for kind in CONFIGS if kind not in STACKED_ONLY]


def mixed(kind: str, folder: Path, *, base_hub: bool) -> tuple[dict[str, Path], dict[str, Path]]:
    """A base and two experts, one of which is stored in the other layout, and the same all in the base's."""
    models = {"base": built(kind), "one": trained(built(kind), 1), "two": trained(built(kind), 2)}
    alike = {name: saved(model, folder / f"alike-{name}", hub=base_hub) for name, model in models.items()}
    other = saved(models["two"], folder / "other", hub=not base_hub)
    return alike, {**alike, "two": other}


@pytest.mark.parametrize("kind", TWO_LAYOUTS)
@pytest.mark.parametrize("base_hub", [True, False], ids=["base apart", "base stacked"])
@pytest.mark.parametrize("method", ["ties", "actmat"])
def test_experts_in_another_layout_are_merged_in_the_bases(kind, base_hub, method, tmp_path):
    alike, other = mixed(kind, tmp_path, base_hub=base_hub)
    streammerge.merge(recipe_of(alike, method), tmp_path / "expected")
    streammerge.merge(recipe_of(other, method), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    checked = streammerge.verify(tmp_path / "out", inputs=True, recompute=1000)
    assert (checked.problems, checked.unchecked, len(checked.recomputed)) == ((), (), len(found))


@pytest.mark.parametrize("base_hub", [True, False], ids=["base apart", "base stacked"])
def test_nothing_of_another_layout_is_read_twice(base_hub, tmp_path):
    alike, other = mixed("qwen3_moe", tmp_path, base_hub=base_hub)
    plans = [streammerge.plan(recipe_of(family, "actmat")) for family in (alike, other)]
    assert plans[0].read_bytes == plans[1].read_bytes
    assert plans[0].layout == plans[1].layout
