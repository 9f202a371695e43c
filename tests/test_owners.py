from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from streammerge.owners import roles_from_model
from streammerge.rules import Role, TensorClass, role_by_name, roles

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {**DECODER, "max_position_embeddings": 16}
DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
CLIP = {
    "projection_dim": 20,
    "text_config": ENCODER,
    "vision_config": {**ENCODER, "image_size": 16, "patch_size": 8},
}
ARCHITECTURES = {
    "Olmo3ForCausalLM": ("olmo3", DECODER),
    "LlamaForCausalLM": ("llama", {**DECODER, "tie_word_embeddings": True}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**DECODER, **MOE}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {**DECODER, **MOE, "shared_expert_intermediate_size": 24}),
    "MixtralForCausalLM": ("mixtral", {**DECODER, "num_local_experts": 4}),
    "GptOssForCausalLM": ("gpt_oss", {**DECODER, "num_local_experts": 4, "head_dim": 8}),
    "Llama4ForCausalLM": (
        "llama4_text",
        {**DECODER, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
    ),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {**DECODER, **DEEPSEEK}),
    "Phi3ForCausalLM": ("phi3", DECODER),
    "PhiForCausalLM": ("phi", DECODER),
    "GPT2LMHeadModel": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    ),
    "GPTNeoXForCausalLM": ("gpt_neox", DECODER),
    "T5ForConditionalGeneration": (
        "t5",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "CLIPModel": ("clip", CLIP),
    "BertForMaskedLM": ("bert", {**ENCODER, "tie_word_embeddings": False}),
    "BertForSequenceClassification": ("bert", ENCODER),
    "ViTForImageClassification": ("vit", {**ENCODER, "image_size": 16, "patch_size": 8}),
}


def saved(architecture: str, folder: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, Any]]:
    """A small random model's tensors, name -> (shape, dtype code), and its config.json, both from disk."""
    model_type, settings = ARCHITECTURES[architecture]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                piece = file.get_slice(name)
                tensors[name] = (tuple(piece.get_shape()), piece.get_dtype())
    return tensors, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_owners_agree_on_every_tensor_of(architecture, tmp_path):
    tensors, config = saved(architecture, tmp_path)
    named = {name: role_by_name(name, shape, dtype_code, config) for name, (shape, dtype_code) in tensors.items()}
    owned = roles_from_model(config)
    assert [name for name, role in named.items() if role is None] == []
    assert [name for name in tensors if name not in owned] == []
    assert {name: (role.kind, role.transposed) for name, role in named.items()} == {
        name: (owned[name].kind, owned[name].transposed) for name in tensors
    }


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    model_type, settings = ARCHITECTURES[architecture]
    return {"architectures": [architecture], "model_type": model_type, **settings, **changes}


def test_a_body_saved_without_its_head_and_prefix_is_known_too():
    owned = roles_from_model(config_of("BertForMaskedLM"))
    for name in ("encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"):
        assert owned[name] == Role(TensorClass.MATRIX, source="owner")


def test_a_tensor_that_no_name_rule_knows_is_decided_by_its_owner():
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 1,
    }
    tensors = {
        "backbone.layers.0.mixer.in_proj.weight": ((128, 32), "F32"),
        "backbone.embeddings.weight": ((96, 32), "F32"),
    }
    assert roles(tensors, config, roles_from_model) == {
        "backbone.layers.0.mixer.in_proj.weight": Role(TensorClass.MATRIX, source="owner"),
        "backbone.embeddings.weight": Role(TensorClass.EMBEDDING, source="owner"),
    }


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "llama", "architectures": None},
        {"model_type": "llama", "architectures": []},
        {"model_type": "never_heard_of", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "architectures": ["NeverHeardOfForCausalLM"]},
        {"model_type": "llama", "architectures": ["AutoConfig"]},
        {"model_type": "llama", "architectures": ["pipeline"]},
        {"model_type": ["llama"], "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 0},
        {"model_type": "bert", "architectures": ["LlamaForCausalLM"]},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "model_type": "x", "architectures": ["X"]},
    ],
)
def test_a_config_that_transformers_cannot_build_has_no_owners(config, caplog):
    with caplog.at_level(logging.DEBUG, logger="streammerge.owners"):
        assert roles_from_model(config) == {}
    assert "no owners for model type" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
)
def test_code_and_packing_named_in_a_config_are_ignored(changes):
    assert roles_from_model(config_of("Olmo3ForCausalLM", **changes)) == roles_from_model(config_of("Olmo3ForCausalLM"))


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_means_no_owners(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert roles_from_model(config_of("Olmo3ForCausalLM")) == {}
    name = "model.layers.0.novel.weight"
    tensors = {name: ((8, 8), "F32")}
    assert roles(tensors, config_of("Olmo3ForCausalLM"), roles_from_model) == {
        name: Role(TensorClass.MATRIX, source="shape")
    }


def test_without_the_conversion_mapping_names_on_disk_are_those_in_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    owned = roles_from_model(config_of("MixtralForCausalLM"))
    assert owned["model.layers.0.mlp.experts.gate_up_proj"] == Role(TensorClass.STACK, source="owner")
    assert not any("block_sparse_moe" in name for name in owned)
