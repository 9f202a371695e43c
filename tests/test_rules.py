from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.rules import (
    NAME_RULES,
    Role,
    TensorClass,
    is_made_at_load,
    layer_count,
    layer_position,
    role_by_name,
    roles,
)

MATRIX, EMBEDDING, VECTOR, CONVOLUTION, STACK, ROUTER, BUFFER = (
    TensorClass.MATRIX,
    TensorClass.EMBEDDING,
    TensorClass.VECTOR,
    TensorClass.CONVOLUTION,
    TensorClass.STACK,
    TensorClass.ROUTER,
    TensorClass.BUFFER,
)

# model type, name, shape, what it is
NAMED = [
    ("olmo3", "model.embed_tokens.weight", (100278, 4096), EMBEDDING),
    ("olmo3", "model.layers.31.self_attn.q_proj.weight", (4096, 4096), MATRIX),
    ("olmo3", "model.layers.0.self_attn.q_norm.weight", (4096,), VECTOR),
    ("olmo3", "model.layers.0.post_feedforward_layernorm.weight", (4096,), VECTOR),
    ("olmo3", "model.layers.0.mlp.down_proj.weight", (4096, 11008), MATRIX),
    ("olmo3", "lm_head.weight", (100278, 4096), EMBEDDING),
    ("llama", "model.layers.0.self_attn.k_proj.weight", (192, 576), MATRIX),
    ("llama", "model.norm.weight", (576,), VECTOR),
    ("llama", "score.weight", (2, 576), MATRIX),
    ("qwen2", "model.layers.3.self_attn.q_proj.bias", (896,), VECTOR),
    ("gemma3", "language_model.model.layers.0.mlp.gate_proj.weight", (6912, 1152), MATRIX),
    ("phi", "model.layers.0.self_attn.dense.weight", (64, 64), MATRIX),
    ("phi", "model.layers.0.mlp.fc1.weight", (256, 64), MATRIX),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (192, 64), MATRIX),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight", (512, 64), MATRIX),
    ("gpt2", "wte.weight", (50257, 768), EMBEDDING),
    ("gpt2", "transformer.wpe.weight", (1024, 768), EMBEDDING),
    ("gpt2", "h.0.attn.bias", (1, 1, 1024, 1024), BUFFER),
    ("gpt_bigcode", "transformer.h.0.attn.c_attn.weight", (2304, 2048), MATRIX),
    ("gpt_neox", "gpt_neox.embed_in.weight", (50432, 512), EMBEDDING),
    ("gpt_neox", "embed_out.weight", (50432, 512), EMBEDDING),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", (1536, 512), MATRIX),
    ("gpt_neox", "gpt_neox.layers.0.attention.dense.weight", (512, 512), MATRIX),
    ("gpt_neox", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight", (512, 2048), MATRIX),
    ("t5", "shared.weight", (32128, 768), EMBEDDING),
    ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight", (768, 768), MATRIX),
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 12), EMBEDDING),
    ("t5", "decoder.block.11.layer.1.EncDecAttention.o.weight", (768, 768), MATRIX),
    ("t5", "decoder.block.11.layer.2.DenseReluDense.wi_0.weight", (2048, 768), MATRIX),
    ("bert", "bert.embeddings.token_type_embeddings.weight", (2, 384), EMBEDDING),
    ("bert", "embeddings.word_embeddings.weight", (30522, 384), EMBEDDING),
    ("bert", "bert.embeddings.position_ids", (1, 512), BUFFER),
    ("bert", "encoder.layer.0.attention.self.query.weight", (384, 384), MATRIX),
    ("bert", "bert.encoder.layer.5.output.dense.weight", (384, 1536), MATRIX),
    ("bert", "bert.pooler.dense.weight", (384, 384), MATRIX),
    ("bert", "classifier.weight", (9, 384), MATRIX),
    ("bert", "cls.predictions.transform.dense.weight", (384, 384), MATRIX),
    ("bert", "cls.predictions.decoder.weight", (30522, 384), EMBEDDING),
    ("bert", "cls.predictions.bias", (30522,), VECTOR),
    ("roberta", "lm_head.decoder.weight", (50265, 768), EMBEDDING),
    ("roberta", "lm_head.dense.weight", (768, 768), MATRIX),
    ("distilbert", "distilbert.transformer.layer.0.attention.q_lin.weight", (768, 768), MATRIX),
    ("distilbert", "vocab_projector.weight", (30522, 768), EMBEDDING),
    ("whisper", "model.decoder.embed_positions.weight", (448, 384), EMBEDDING),
    ("whisper", "model.encoder.conv1.weight", (384, 80, 3), CONVOLUTION),
    ("qwen2_5_vl", "visual.patch_embed.proj.weight", (1280, 3, 2, 14, 14), CONVOLUTION),
    ("vit", "vit.embeddings.patch_embeddings.projection.weight", (768, 3, 16, 16), CONVOLUTION),
    ("vit", "vit.embeddings.position_embeddings", (1, 197, 768), EMBEDDING),
    ("vit", "vit.embeddings.cls_token", (1, 1, 768), VECTOR),
    ("vit", "vit.encoder.layer.0.attention.attention.query.weight", (768, 768), MATRIX),
    ("clip", "vision_model.embeddings.patch_embedding.weight", (768, 3, 32, 32), CONVOLUTION),
    ("clip", "vision_model.embeddings.position_embedding.weight", (50, 768), EMBEDDING),
    ("clip", "vision_model.embeddings.class_embedding", (768,), VECTOR),
    ("clip", "text_model.encoder.layers.0.self_attn.out_proj.weight", (512, 512), MATRIX),
    ("clip", "visual_projection.weight", (512, 768), MATRIX),
    ("clip", "text_projection.weight", (512, 512), MATRIX),
    ("clip", "logit_scale", (), VECTOR),
    (None, "visual.conv1.weight", (768, 3, 32, 32), CONVOLUTION),
    (None, "visual.positional_embedding", (50, 768), EMBEDDING),
    (None, "token_embedding.weight", (49408, 512), EMBEDDING),
    (None, "visual.transformer.resblocks.0.attn.in_proj_weight", (2304, 768), MATRIX),
    (None, "visual.transformer.resblocks.0.attn.out_proj.weight", (768, 768), MATRIX),
    (None, "visual.transformer.resblocks.0.mlp.c_fc.weight", (3072, 768), MATRIX),
    (None, "transformer.resblocks.0.mlp.c_proj.weight", (512, 2048), MATRIX),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight", (64, 128), MATRIX),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", (8, 64), ROUTER),
    ("qwen3_moe", "model.layers.0.mlp.experts.127.gate_proj.weight", (768, 2048), MATRIX),
    ("qwen3_moe", "model.layers.0.mlp.gate.weight", (128, 2048), ROUTER),
    ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj", (128, 1536, 2048), STACK),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", (1, 2048), ROUTER),
    ("deepseek_v3", "model.layers.3.self_attn.kv_a_proj_with_mqa.weight", (576, 7168), MATRIX),
    ("deepseek_v3", "model.layers.3.self_attn.q_b_proj.weight", (24576, 1536), MATRIX),
    ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", (256,), VECTOR),
    ("deepseek_v3", "model.layers.3.mlp.shared_experts.up_proj.weight", (2048, 7168), MATRIX),
    ("deepseek_v3", "model.layers.3.self_attn.o_proj.weight_scale_inv", (56, 128), VECTOR),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", (32, 5760), VECTOR),
    ("gpt_oss", "model.layers.0.self_attn.sinks", (64,), VECTOR),
    ("gpt_oss", "model.layers.0.mlp.router.weight", (32, 2880), ROUTER),
    ("gpt_oss", "model.layers.0.mlp.router.bias", (32,), VECTOR),
]

TRANSPOSED = [
    ("gpt2", "h.0.attn.c_attn.weight", (768, 2304), MATRIX),
    ("gpt2", "transformer.h.11.mlp.c_proj.weight", (3072, 768), MATRIX),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (32, 2880, 5760), STACK),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (32, 2880, 2880), STACK),
    ("llama4", "language_model.model.layers.0.feed_forward.experts.down_proj", (16, 8192, 5120), STACK),
    (None, "visual.proj", (768, 512), MATRIX),
    (None, "text_projection", (512, 512), MATRIX),
    (None, "text.text_projection", (512, 512), MATRIX),
]

INTEGERS = ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"]
FLOATS = ["F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"]
shapes = st.lists(st.integers(1, 9000), max_size=5).map(tuple)
names = st.sampled_from([name for _, name, _, _ in NAMED + TRANSPOSED]) | st.text(max_size=30)


def config_of(model_type: str | None) -> dict[str, Any]:
    return {} if model_type is None else {"model_type": model_type}


def unasked(config: Mapping[str, Any]) -> dict[str, Role]:
    pytest.fail("the owners were asked though every name is known")


@pytest.mark.parametrize(("model_type", "name", "shape", "kind"), NAMED)
def test_a_known_name_says_what_its_tensor_is(model_type, name, shape, kind):
    dtype_code = "I64" if name.endswith("position_ids") else "BF16"
    assert role_by_name(name, shape, dtype_code, config_of(model_type)) == Role(kind)


@pytest.mark.parametrize(("model_type", "name", "shape", "kind"), TRANSPOSED)
def test_a_tensor_stored_input_first_is_transposed(model_type, name, shape, kind):
    assert role_by_name(name, shape, "BF16", config_of(model_type)) == Role(kind, transposed=True)


def test_a_decoder_inside_another_model_keeps_its_orientation():
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    role = role_by_name("decoder.transformer.h.0.mlp.c_fc.weight", (768, 3072), "F32", config)
    assert role == Role(MATRIX, transposed=True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mixer.A_map", (64, 16)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 64)),
        ("lm_head.weight", (8, 64, 3)),
        ("model.layers.0.mlp.down_proj.weight", (4, 64, 64)),
        ("not_lm_head.weight", (8, 64)),
        ("transformer.h.0.attn.c_attn.weight", (64, 192)),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 64)),
    ],
)
def test_a_name_that_leaves_doubt_is_not_recognised(name, shape):
    assert role_by_name(name, shape, "F32", {"model_type": "newest_model"}) is None


@given(names, shapes, st.sampled_from(INTEGERS))
def test_integers_are_buffers_under_any_name_and_shape(name, shape, dtype_code):
    assert role_by_name(name, shape, dtype_code, {}) == Role(BUFFER)


@given(names, st.lists(st.integers(0, 9000), max_size=1).map(tuple), st.sampled_from(FLOATS))
def test_floats_of_at_most_one_dimension_are_vectors_unless_a_model_computes_them(name, shape, dtype_code):
    assert role_by_name(name, shape, dtype_code, {}) == Role(BUFFER if is_made_at_load(name, shape) else VECTOR)


@given(st.sampled_from(NAMED + TRANSPOSED), st.integers(0, 999), st.sampled_from(["", "model.", "module.a_b."]))
def test_neither_layer_number_nor_prefix_changes_a_role(case, number, prefix):
    model_type, name, shape, _ = case
    renumbered = prefix + re.sub(r"(?<=\.)\d+(?=\.)", str(number), name)
    config = config_of(model_type)
    assert role_by_name(renumbered, shape, "F32", config) == role_by_name(name, shape, "F32", config)


@pytest.mark.parametrize("rule", NAME_RULES, ids=lambda rule: rule.ending)
def test_each_line_of_the_table_has_a_name_here(rule):
    assert any(
        re.search(rf"(^|\.)({rule.ending})$", name)
        and len(shape) in rule.dims
        and kind is rule.kind
        and (not rule.model_types or model_type in rule.model_types)
        for model_type, name, shape, kind in NAMED + TRANSPOSED
    )


def test_known_names_never_ask_the_owners():
    tensors = {name: (shape, "BF16") for model_type, name, shape, _ in NAMED if model_type == "olmo3"}
    found = roles(tensors, {"model_type": "olmo3"}, owners=unasked)
    assert list(found) == list(tensors)
    assert {role.source for role in found.values()} == {"name"}


def test_owners_decide_what_names_do_not_and_only_that():
    tensors = {
        "x.q_proj.weight": ((8, 8), "F32"),
        "x.novel.weight": ((8, 8), "F32"),
        "x.other.weight": ((8, 8), "F32"),
    }
    owned = {
        "x.q_proj.weight": Role(ROUTER, source="owner"),
        "x.novel.weight": Role(EMBEDDING, source="owner"),
    }
    assert roles(tensors, {}, owners=lambda config: owned) == {
        "x.q_proj.weight": Role(MATRIX, source="name"),
        "x.novel.weight": Role(EMBEDDING, source="owner"),
        "x.other.weight": Role(MATRIX, source="shape"),
    }


@pytest.mark.parametrize(
    ("shape", "config", "kind"),
    [
        ((64, 32), {"vocab_size": 32000}, MATRIX),
        ((32000, 32), {"vocab_size": 32000}, EMBEDDING),
        ((32, 32000), {"text_config": {"vocab_size": 32000}}, EMBEDDING),
        ((64, 32), {"vocab_size": 64}, MATRIX),
        ((64, 32), {"vocab_size": None}, MATRIX),
        ((8, 64, 32), {"num_local_experts": 8}, STACK),
        ((8, 64, 32), {"text_config": {"n_routed_experts": 8}}, STACK),
        ((64, 8, 3), {"num_experts": 8}, CONVOLUTION),
        ((64, 8, 3), {}, CONVOLUTION),
        ((64, 3, 2, 2), {}, CONVOLUTION),
        ((1, 1, 64), {}, VECTOR),
    ],
)
def test_without_owners_the_shape_decides(shape, config, kind):
    assert roles({"novel": (shape, "F32")}, config, owners=None) == {"novel": Role(kind, source="shape")}


@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(INTEGERS + FLOATS))))
def test_every_tensor_gets_a_role_in_the_order_given(tensors):
    found = roles(tensors, {"model_type": "gpt2"}, owners=None)
    assert list(found) == list(tensors)


@pytest.mark.parametrize(
    ("name", "layers", "position"),
    [
        ("model.embed_tokens.weight", 5, 0.0),
        ("model.layers.0.mlp.up_proj.weight", 5, 0.0),
        ("model.layers.1.mlp.up_proj.weight", 5, 0.25),
        ("model.layers.4.mlp.experts.3.up_proj.weight", 5, 1.0),
        ("model.norm.weight", 5, 0.0),
        ("lm_head.weight", 5, 0.0),
        ("transformer.wpe.weight", 12, 0.0),
        ("transformer.h.11.ln_1.weight", 12, 1.0),
        ("transformer.ln_f.weight", 12, 0.0),
        ("gpt_neox.embed_in.weight", 6, 0.0),
        ("embed_out.weight", 6, 0.0),
        ("shared.weight", 3, 0.0),
        ("decoder.block.1.layer.2.DenseReluDense.wo.weight", 3, 0.5),
        ("decoder.final_layer_norm.weight", 3, 0.0),
        ("bert.embeddings.LayerNorm.weight", 3, 0.0),
        ("bert.encoder.layer.1.output.dense.weight", 3, 0.5),
        ("cls.predictions.transform.dense.weight", 3, 0.0),
        ("vision_model.pre_layrnorm.weight", 3, 0.0),
        ("visual.conv1.weight", 3, 0.0),
        ("visual.transformer.resblocks.1.ln_1.weight", 3, 0.5),
        ("visual.blocks.1.norm1.weight", 3, 0.5),
        ("visual_projection.weight", 3, 0.0),
        ("logit_scale", 3, 0.0),
        ("model.layers.0.mlp.up_proj.weight", 1, 1.0),
        ("model.layers.9.mlp.up_proj.weight", 5, 1.0),
    ],
)
def test_layers_lie_between_0_and_1_and_all_else_at_0(name, layers, position):
    assert layer_position(name, layers) == position


@given(st.integers(2, 200), st.data())
def test_layer_positions_rise_evenly_from_0_to_1(layers, data):
    index = data.draw(st.integers(0, layers - 2))
    here, there = (layer_position(f"model.layers.{i}.norm.weight", layers) for i in (index, index + 1))
    assert 0 <= here < there <= 1
    assert there - here == pytest.approx(1 / (layers - 1))


@pytest.mark.parametrize(
    ("tensor_names", "layers"),
    [
        ([], 0),
        (["lm_head.weight"], 0),
        (["model.layers.0.a", "model.layers.31.a", "model.norm.weight"], 32),
        (["h.0.ln_1.weight", "h.11.ln_1.weight"], 12),
        (["encoder.block.5.layer.0.a", "decoder.block.3.layer.1.a"], 6),
        (["encoder.layer.2.a.b"], 3),
        (["visual.transformer.resblocks.3.a", "transformer.resblocks.1.a"], 4),
        (["model.layers.1.mlp.experts.63.up_proj.weight"], 2),
    ],
)
def test_layers_are_counted_from_names_and_the_deeper_stack_counts(tensor_names, layers):
    assert layer_count(tensor_names) == layers


def test_importing_the_rules_loads_neither_torch_nor_transformers():
    code = (
        "import sys; import streammerge.rules as rules;"
        "rules.roles({'lm_head.weight': ((8, 8), 'F32')}, {});"
        "print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
