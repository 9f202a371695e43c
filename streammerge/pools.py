"""Which linear layers read the same input, so that their covariances may be pooled: told by their names."""

from __future__ import annotations

import re

# families; what the names share; what sets them apart
_TOGETHER = (
    ("Llama, Mistral, OLMo, Qwen, Gemma, Phi, CLIP, OPT, BART, DeepSeek",
     r"self_attn\.", r"[qkv]_proj|q_a_proj|kv_a_proj_with_mqa"),
    ("GPT-J, GPT-Neo", r"attn\.(?:attention\.)?", r"[qkv]_proj"),
    ("BART, Whisper: what the encoder gives", r"encoder_attn\.", r"[kv]_proj"),
    ("Llama, Mistral, OLMo, Qwen, Gemma and their MoE kin", r"", r"gate_proj|up_proj"),
    ("Mixtral", r"experts\.\d+\.", r"w1|w3"),
    ("T5", r"SelfAttention\.", r"[qkv]"),
    ("T5: what the encoder gives", r"EncDecAttention\.", r"[kv]"),
    ("T5", r"DenseReluDense\.", r"wi_0|wi_1"),
    ("BERT, RoBERTa, ViT", r"(?<!cross)attention\.(?:self|attention)\.", r"query|key|value"),
    ("BERT: what the encoder gives", r"crossattention\.self\.", r"key|value"),
    ("DistilBERT", r"attention\.", r"[qkv]_lin"),
)  # fmt: skip
_PATTERNS = tuple(
    re.compile(rf"(?P<place>.*(?:^|\.|(?<=cross)){shared})(?:{own})\.weight") for _, shared, own in _TOGETHER
)


def input_of(name: str) -> str | None:
    """A key that the weights of one input share; None for a matrix that shares with none.

    Fused weights, such as `qkv_proj` or GPT-2's `c_attn`, are pooled as they are.
    """
    for number, pattern in enumerate(_PATTERNS):
        found = pattern.fullmatch(name)
        if found:
            return f"{number}:{found['place']}"
    return None
