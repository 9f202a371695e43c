"""The Llama-shaped models the benchmarks merge: sizes, tensor names, config.json and a tokenizer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama decoder's sizes, named as in its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, in file order."""
        named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_hidden_layers):
            named |= {f"model.layers.{index}.{part}.weight": shape for part, shape in self.layer().items()}
        return named | {
            "model.norm.weight": (self.hidden_size,),
            "lm_head.weight": (self.vocab_size, self.hidden_size),
        }

    def layer(self) -> dict[str, tuple[int, ...]]:
        """One layer's tensors."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }

    def nbytes(self) -> dict[str, int]:
        """Every tensor's bytes, in bfloat16."""
        return {name: 2 * math.prod(dims) for name, dims in self.tensors().items()}

    def twin(self, name: str) -> str:
        """The tensor whose bytes are this one's, too: itself, where the file holds them."""
        return name

    def shards(self, count: int) -> list[list[str]]:
        """The names in each of `count` files of about the same size."""
        sizes = self.nbytes()
        total = sum(sizes.values())
        groups: list[list[str]] = [[] for _ in range(count)]
        passed = 0
        for name, nbytes in sizes.items():
            groups[min(count * passed // total, count - 1)].append(name)
            passed += nbytes
        assert all(groups), f"{count} shards leave one of them empty"
        return groups

    def config(self) -> dict[str, object]:
        """A config.json that transformers opens as LlamaForCausalLM."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


SIZES = {
    "1.1b": Shape(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
    ),
    "tiny": Shape(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
    ),
}


def tokenizer() -> dict[str, object]:
    """A word-level tokenizer small enough to read: three special tokens, digits and letters."""
    words = ["<unk>", "<s>", "</s>", *"0123456789abcdefghijklmnopqrstuvwxyz"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": w, **special} for i, w in enumerate(words[:3])],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {w: i for i, w in enumerate(words)},
                "unk_token": "<unk>",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
        },
    }
