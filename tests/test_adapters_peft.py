"""Adapters that PEFT wrote give the weights that PEFT's own merge gives."""

from __future__ import annotations

import warnings

import pytest
import torch

import streammerge
from tests.stored import tensors_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# what PEFT still calls of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LLAMA = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
GPT2 = {"vocab_size": 48, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def trained(model, folder, *, with_embeddings="auto", **config):
    """Write a base and an adapter with random factors; what PEFT merges them to."""
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = peft.get_peft_model(model, peft.LoraConfig(**config))
        torch.manual_seed(1)
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                factor = 1.1 if "magnitude" in name else 1.0
                parameter.data = parameter.data * factor + torch.randn_like(parameter) * 0.05
        adapter.save_pretrained(folder / "adapter", save_embedding_layers=with_embeddings)
        return adapter.merge_and_unload().state_dict()


CASES = {
    "plain": (llama, {"r": 4, "lora_alpha": 12, "target_modules": ALL}),
    "rank-stabilised": (llama, {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"]}),
    "patterns": (
        llama,
        {
            "r": 2, "lora_alpha": 4, "target_modules": ALL,
            "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.(up|down)_proj": 3, "model.layers.0.self_attn.v_proj": 1},
            "alpha_pattern": {"k_proj": 16, "layers.0.mlp.gate_proj": 1, "proj": 5},
        },
    ),
    "dora": (llama, {"r": 4, "use_dora": True, "target_modules": ALL}),
    "embedding": (llama, {"r": 4, "target_modules": ["embed_tokens", "v_proj"]}),
    "head": (llama, {"r": 4, "target_modules": ["lm_head", "up_proj"]}),
    "modules-to-save": (llama, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "biases": (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "own-biases": (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "transposed": (gpt2, {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_pefts_merges_to_what_peft_merges_it_to(tmp_path, case):
    make, config = CASES[case]
    expected = trained(make(), tmp_path, **config)
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tmp_path}/base+{tmp_path}/adapter"}],
        "out_dtype": "float32",
    }
    streammerge.merge(recipe, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found
    before = tensors_of(tmp_path / "base")
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", ["actmat", "task_arithmetic"])
def test_peft_loads_a_merged_adapter_and_computes_what_the_merged_model_does(tmp_path, make, method):
    targets = ["c_attn", "c_proj", "c_fc"] if make is gpt2 else [*ALL, "embed_tokens"]
    for number in (1, 2):
        config = {"r": 2 + number, "target_modules": targets[:-1] if number == 2 else targets}
        trained(make(), tmp_path / f"{number}", fan_in_fan_out=make is gpt2, with_embeddings=False, **config)
    recipe = {
        "merge_method": method, "base_model": f"{tmp_path}/1/base", "parameters": {},
        "models": [{"model": f"{tmp_path}/{number}/adapter"} for number in (1, 2)],
    }  # fmt: skip
    streammerge.merge(recipe, tmp_path / "merged")
    streammerge.merge(recipe, tmp_path / "adapter", as_adapter=True)
    kind = type(make())
    expected = logits(kind.from_pretrained(tmp_path / "merged"))
    model = kind.from_pretrained(tmp_path / "1" / "base")
    before = logits(model)
    found = logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    assert (expected - before).norm() > 1e-3 * before.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_peft_loads_what_was_extracted_of_a_full_expert(tmp_path, make):
    base = make()
    base.save_pretrained(tmp_path / "base")
    expert = make()
    torch.manual_seed(2)
    for name, parameter in expert.named_parameters():
        if name not in ("lm_head.weight", "transformer.wte.weight"):
            parameter.data += torch.randn_like(parameter) * 0.02
    expert.save_pretrained(tmp_path / "expert")
    # of full rank: nothing is lost
    streammerge.extract(tmp_path / "expert", tmp_path / "base", tmp_path / "adapter", rank=64)
    found = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(expert), rtol=1e-4, atol=1e-4)
