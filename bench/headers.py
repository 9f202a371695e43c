"""Models that are headers alone, of any size: what `on_paper.py` plans merges of."""

from __future__ import annotations

import json
from dataclasses import dataclass

from streammerge.checkpoint import INDEX_NAME, ByteFile, FileFacts
from streammerge.layout import lay_out

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped queries, as Llama has them."""

    hidden: int
    heads: int
    key_value_heads: int

    def tensors(self) -> Shapes:
        size = self.hidden // self.heads
        keys = (size * self.key_value_heads, self.hidden)
        square = (self.hidden, self.hidden)
        return {"q_proj": square, "k_proj": keys, "v_proj": keys, "o_proj": square}


def llama(hidden: int, ffn: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> Shapes:
    """A Llama's tensors."""
    attention = Attention(hidden=hidden, heads=heads, key_value_heads=key_value_heads).tensors()
    named: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        named |= {f"{at}.self_attn.{part}.weight": shape for part, shape in attention.items()}
        named |= _feed_forward(f"{at}.mlp", hidden, ffn) | _norms(at, hidden)
    return named | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def deepseek_v3() -> Shapes:
    """DeepSeek-V3's tensors without the layer that predicts a further token: 256 experts a layer."""
    hidden, heads, query_rank, key_rank, rotary, plain, value = 7168, 128, 1536, 512, 64, 128, 128
    attention: Shapes = {
        "q_a_proj": (query_rank, hidden),
        "q_a_layernorm": (query_rank,),
        "q_b_proj": (heads * (plain + rotary), query_rank),
        "kv_a_proj_with_mqa": (key_rank + rotary, hidden),
        "kv_a_layernorm": (key_rank,),
        "kv_b_proj": (heads * (plain + value), key_rank),
        "o_proj": (hidden, heads * value),
    }
    named: Shapes = {"model.embed_tokens.weight": (129280, hidden)}
    for layer in range(61):
        at = f"model.layers.{layer}"
        named |= {f"{at}.self_attn.{part}.weight": shape for part, shape in attention.items()} | _norms(at, hidden)
        if layer < 3:
            named |= _feed_forward(f"{at}.mlp", hidden, 18432)
            continue
        named |= {f"{at}.mlp.gate.weight": (256, hidden), f"{at}.mlp.gate.e_score_correction_bias": (256,)}
        for expert in range(256):
            named |= _feed_forward(f"{at}.mlp.experts.{expert}", hidden, 2048)
        named |= _feed_forward(f"{at}.mlp.shared_experts", hidden, 2048)
    return named | {"model.norm.weight": (hidden,), "lm_head.weight": (129280, hidden)}


def _feed_forward(at: str, hidden: int, ffn: int) -> Shapes:
    wide = (ffn, hidden)
    return {f"{at}.gate_proj.weight": wide, f"{at}.up_proj.weight": wide, f"{at}.down_proj.weight": (hidden, ffn)}


def _norms(at: str, hidden: int) -> Shapes:
    return {f"{at}.{part}.weight": (hidden,) for part in ("input_layernorm", "post_attention_layernorm")}


class HeaderStorage:
    """Any location is the same bfloat16 model, in files of 5 GB; none of its weights can be read."""

    def __init__(self, shapes: Shapes, model_type: str) -> None:
        layout = lay_out(((name, "BF16", shape) for name, shape in shapes.items()), 5_000_000_000)
        index = layout.index_json()
        config = {"model_type": model_type, "architectures": ["CausalLM"]}
        self._texts = {"config.json": json.dumps(config).encode()} | ({INDEX_NAME: index.encode()} if index else {})
        self._texts |= {shard.file: shard.header for shard in layout.shards}
        self._sizes = {shard.file: shard.nbytes for shard in layout.shards}

    def files(self, location: str) -> dict[str, FileFacts]:
        """Every file's size."""
        del location
        return {name: FileFacts(self._sizes.get(name, len(text)), 0) for name, text in self._texts.items()}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A range of a header, or of JSON."""
        del location
        return self._texts[name][offset : offset + nbytes]

    def open(self, location: str, name: str) -> ByteFile:
        """There are no weights."""
        raise FileNotFoundError(f"{location}/{name} is on paper: it has a header and no weights")
