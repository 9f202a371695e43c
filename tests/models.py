"""Small models for tests: built, tuned and written to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, HIDDEN, WIDE, VOCABULARY = 2, 16, 40, 64


def llama_tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A Llama-shaped model of about 14 000 parameters, with an integer buffer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (WIDE, HIDDEN),
            "mlp.up_proj": (WIDE, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDE),
        }.items():
            tensors[f"{prefix}{name}.weight"] = normal(*shape)
        tensors[f"{prefix}input_layernorm.weight"] = (1 + normal(HIDDEN).float()).to(dtype)
    tensors["model.norm.weight"] = (1 + normal(HIDDEN).float()).to(dtype)
    tensors["model.position_ids"] = torch.arange(8)
    tensors["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    return tensors


def tuned(tensors: Mapping[str, Tensor], seed: int, scale: float = 0.002) -> dict[str, Tensor]:
    """The model after a little training: every float entry moved."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.double() + torch.randn(t.shape, generator=generator, dtype=torch.double) * scale).to(t.dtype)
        if t.is_floating_point()
        else t.clone()
        for name, t in tensors.items()
    }


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def save_model(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """Write a Hugging Face folder, in one file or in several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    whole = {name: t.contiguous() for name, t in tensors.items()}
    if shards == 1:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(whole)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: whole[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def recipe_of(family: Mapping[str, Path], method: str = "actmat", **more: object) -> dict[str, object]:
    """A recipe that merges the family's experts onto its base."""
    return {
        "merge_method": method,
        "base_model": str(family["base"]),
        "models": [{"model": str(folder)} for name, folder in family.items() if name != "base"],
        **more,
    }
