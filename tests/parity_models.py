"""The models of the mergekit parity test: whole Llamas in float32, tuned far and near."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tests import models
from tests.models import tuned

LAYERS, HIDDEN, WIDE, VOCABULARY = 4, 16, 40, 64
CONFIG = {
    **models.CONFIG,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
}
# how far an entry of about 0.02 moves: as far as it is long, and as little as reinforcement learning moves it
FAR, NEAR = 0.015, 0.0001


def llama(seed: int) -> dict[str, Tensor]:
    """Every tensor that mergekit knows of a Llama."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

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
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + normal(HIDDEN)
    tensors["model.norm.weight"] = 1 + normal(HIDDEN)
    tensors["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    return tensors


def save_family(folder: Path) -> dict[str, Path]:
    """Ten models on disk, by the names that recipes have for them.

    base          what all were trained from
    a, b, c       far from it; b and c went half the way of a
    against       far from it, the other way than a
    near_a, …     the same, as little as reinforcement learning moves a model
    frozen        far from it, but its last layer is the base's
    hollow        far from it, but one matrix is all zero
    """
    base = llama(0)
    family = {"base": base}
    for prefix, scale in (("", FAR), ("near_", NEAR)):
        first, second, third = (tuned(base, seed, scale) for seed in (1, 2, 3))
        family |= {f"{prefix}a": first, f"{prefix}b": halfway(second, first), f"{prefix}c": halfway(third, first)}
    other_way = {name: 2 * base[name] - tensor for name, tensor in family["a"].items()}
    family["against"] = halfway(tuned(base, 4, FAR), other_way)
    last, matrix = f"layers.{LAYERS - 1}.", "model.layers.1.self_attn.v_proj.weight"
    family["frozen"] = {name: base[name] if last in name else t for name, t in tuned(base, 5, FAR).items()}
    family["hollow"] = {name: t * 0 if name == matrix else t for name, t in tuned(base, 6, FAR).items()}
    folders = {}
    for name, tensors in family.items():
        folders[name] = models.save_model(folder / name, tensors)
        (folders[name] / "config.json").write_text(json.dumps(CONFIG))
    return folders


def halfway(tensors: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.lerp(tensor, other[name], 0.5) for name, tensor in tensors.items()}
