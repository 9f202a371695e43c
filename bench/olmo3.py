"""OLMo-3-7B's exact names, shapes and files, as a set of models that fits a disk smaller than four of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from generate import Settings
from llama import Shape

# of a layer's tensors in a file
_ORDER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm",
    "post_feedforward_layernorm",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Olmo3(Shape):
    """An OLMo-3 decoder: norms after attention and feed-forward, and of all queries and all keys.

    distinct_layers  layers with weights of their own; a later layer's are those of an earlier one
    shard_bytes      the most data that a file holds
    """

    distinct_layers: int
    shard_bytes: int = 5_000_000_000

    def layer(self) -> dict[str, tuple[int, ...]]:
        llama = Shape.layer(self)
        norms = {
            "self_attn.q_norm": llama["self_attn.q_proj"][:1],
            "self_attn.k_norm": llama["self_attn.k_proj"][:1],
            "post_attention_layernorm": (self.hidden_size,),
            "post_feedforward_layernorm": (self.hidden_size,),
        }
        return {part: (llama | norms)[part] for part in _ORDER}

    def twin(self, name: str) -> str:
        if name == "lm_head.weight" and self.distinct_layers < self.num_hidden_layers:
            return "model.embed_tokens.weight"
        first, dot, rest = name.removeprefix("model.layers.").partition(".")
        return f"model.layers.{int(first) % self.distinct_layers}{dot}{rest}" if first.isdecimal() else name

    def shards(self, count: int) -> list[list[str]]:
        """Files fill in order up to `shard_bytes`, whatever the `count`."""
        groups: list[list[str]] = [[]]
        filled = 0
        for name, nbytes in self.nbytes().items():
            if groups[-1] and filled + nbytes > self.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += nbytes
        return groups

    def config(self) -> dict[str, object]:
        layers = range(1, self.num_hidden_layers + 1)
        own = {field.name for field in fields(Olmo3)} - {field.name for field in fields(Shape)}
        return {key: value for key, value in Shape.config(self).items() if key not in own} | {
            "architectures": ["Olmo3ForCausalLM"],
            "model_type": "olmo3",
            "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
            "sliding_window": 4096,
            "layer_types": ["full_attention" if layer % 4 == 0 else "sliding_attention" for layer in layers],
        }


SIZES = {
    "7b": Olmo3(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=100278,
        distinct_layers=4,
    ),
    "tiny": Olmo3(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=256,
        distinct_layers=2,
        shard_bytes=200_000,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Olmo3Settings(Settings):
    """A set of these models: two experts with dense changes, as of SFT, around one with sparse ones, as of RL."""

    size: str = "7b"
    kind: str = "mixed"
    distinct_layers: int

    def shape(self) -> Olmo3:
        return replace(SIZES[self.size], distinct_layers=self.distinct_layers)
