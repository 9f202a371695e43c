"""Which rule each tensor gets: its name decides, else the module that owns it, else its shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Literal


class TensorClass(str, Enum):
    """What a tensor is to a merge method."""

    MATRIX = "matrix"
    """The weight of a linear map."""
    EMBEDDING = "embedding"
    """A table looked up by row (tokens, positions, T5's relative positions), or the output head."""
    VECTOR = "vector"
    """Norms, biases, scalars, single tokens, router corrections: nothing with an input side."""
    CONVOLUTION = "convolution"
    """A convolution's kernel."""
    STACK = "stack"
    """The matrices of all experts of a layer in one tensor, expert first."""
    ROUTER = "router"
    """The gate that chooses experts."""
    BUFFER = "buffer"
    """What training does not move: integers, booleans, stored masks."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a tensor is, and who said so.

    transposed   a matrix, or each matrix of a stack, is stored [in, out] instead of [out, in]
    source       `name`: the name, the dtype or a shape of at most one side left no doubt;
                 `owner`: the module that owns it in transformers; `shape`: a guess
    """

    kind: TensorClass
    transposed: bool = False
    source: Literal["name", "owner", "shape"] = "name"


@dataclass(frozen=True, slots=True)
class NameRule:
    """One line of the table.

    families      the architectures the line was written for
    ending        regex for the last components of a name; digits of list indices are read as 0
    dims          the numbers of dimensions it speaks for; others fall to the next line
    model_types   where not empty, one of these must be a `model_type` of config.json
    """

    kind: TensorClass
    families: str
    ending: str
    dims: tuple[int, ...] = (2,)
    transposed: bool = False
    model_types: frozenset[str] = frozenset()


_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_STACKED_IN_OUT = frozenset({"gpt_oss", "llama4", "llama4_text"})
_STACKED_OUT_IN = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"})

NAME_RULES = (
    NameRule(
        TensorClass.EMBEDDING,
        "Llama, Mistral, OLMo, Qwen, Gemma, Phi and their MoE kin; T5 and BART decoders",
        r"(embed_tokens|lm_head)\.weight",
    ),
    NameRule(TensorClass.EMBEDDING, "GPT-2", r"(wte|wpe)\.weight"),
    NameRule(TensorClass.EMBEDDING, "GPT-NeoX", r"(embed_in|embed_out)\.weight"),
    NameRule(TensorClass.EMBEDDING, "T5", r"(shared|relative_attention_bias)\.weight"),
    NameRule(
        TensorClass.EMBEDDING,
        "BERT, RoBERTa, DistilBERT",
        r"((word|position|token_type)_embeddings|(cls\.predictions|lm_head)\.decoder|vocab_projector)\.weight",
    ),
    NameRule(TensorClass.EMBEDDING, "CLIP", r"(token|position)_embedding\.weight"),
    NameRule(TensorClass.EMBEDDING, "BART, OPT, Whisper", r"embed_positions\.weight"),
    NameRule(TensorClass.EMBEDDING, "OpenCLIP", r"positional_embedding"),
    NameRule(TensorClass.EMBEDDING, "ViT", r"position_embeddings|pos_embed", dims=(2, 3)),
    NameRule(TensorClass.VECTOR, "ViT", r"cls_token|mask_token|distillation_token", dims=(2, 3)),
    NameRule(TensorClass.CONVOLUTION, "CLIP, SigLIP", r"patch_embedding\.weight", dims=(4,)),
    NameRule(TensorClass.CONVOLUTION, "ViT", r"patch_embeddings\.projection\.weight", dims=(4,)),
    NameRule(TensorClass.CONVOLUTION, "timm, Qwen-VL", r"patch_embed\.proj\.weight", dims=(4, 5)),
    NameRule(TensorClass.CONVOLUTION, "OpenCLIP, Whisper, Mamba", r"conv(\d|1d|2d)?\.weight", dims=(3, 4)),
    NameRule(TensorClass.ROUTER, "Mixtral", r"block_sparse_moe\.gate\.weight"),
    NameRule(TensorClass.ROUTER, "Qwen-MoE, DeepSeek, OLMoE", r"mlp\.(gate|shared_expert_gate)\.weight"),
    NameRule(TensorClass.ROUTER, "gpt-oss, Llama 4", r"(mlp|feed_forward)\.router\.weight"),
    NameRule(
        TensorClass.STACK,
        "gpt-oss, Llama 4",
        r"experts\.(gate_up_proj|down_proj)",
        dims=(3,),
        transposed=True,
        model_types=_STACKED_IN_OUT,
    ),
    NameRule(
        TensorClass.STACK,
        "Mixtral, Qwen-MoE, DeepSeek, OLMoE saved as transformers 5 holds them",
        r"experts\.(gate_up_proj|down_proj)",
        dims=(3,),
        model_types=_STACKED_OUT_IN,
    ),
    NameRule(TensorClass.VECTOR, "gpt-oss", r"experts\.(gate_up_proj|down_proj)_bias"),
    NameRule(TensorClass.VECTOR, "DeepSeek-V3 in fp8: scales of blocks", r"weight_scale(_inv)?"),
    NameRule(
        TensorClass.BUFFER,
        "GPT-2 and GPT-NeoX of old: the causal mask",
        r"(attn|attention)\.bias",
        dims=(4,),
    ),
    NameRule(
        TensorClass.MATRIX,
        "Llama, Mistral, OLMo, Qwen, Gemma, Phi, CLIP, BART; experts of Qwen-MoE and DeepSeek",
        r"([qkvo]|out|gate|up|down)_proj\.weight",
    ),
    NameRule(TensorClass.MATRIX, "Phi-3: fused rows", r"(qkv|gate_up)_proj\.weight"),
    NameRule(TensorClass.MATRIX, "DeepSeek", r"(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.weight"),
    NameRule(TensorClass.MATRIX, "Mixtral", r"experts\.\d+\.w[123]\.weight"),
    NameRule(TensorClass.MATRIX, "Phi, CLIP, BART, Whisper", r"(fc1|fc2)\.weight"),
    NameRule(
        TensorClass.MATRIX,
        "GPT-2: Conv1D",
        r"h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)\.weight",
        transposed=True,
        model_types=_CONV1D,
    ),
    NameRule(
        TensorClass.MATRIX,
        "GPT-BigCode",
        r"h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)\.weight",
        model_types=frozenset({"gpt_bigcode"}),
    ),
    NameRule(
        TensorClass.MATRIX,
        "GPT-NeoX, BLOOM, Falcon",
        r"(query_key_value|dense_h_to_4h|dense_4h_to_h)\.weight",
    ),
    NameRule(TensorClass.MATRIX, "T5", r"(SelfAttention|EncDecAttention)\.[qkvo]\.weight"),
    NameRule(TensorClass.MATRIX, "T5", r"DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight"),
    NameRule(TensorClass.MATRIX, "BERT, RoBERTa, ViT; Phi and GPT-NeoX", r"(query|key|value|dense)\.weight"),
    NameRule(TensorClass.MATRIX, "DistilBERT", r"([qkv]_lin|out_lin|lin1|lin2|vocab_transform)\.weight"),
    NameRule(
        TensorClass.MATRIX,
        "heads of classifiers",
        r"(classifier|pre_classifier|score|qa_outputs|seq_relationship)\.weight",
    ),
    NameRule(TensorClass.MATRIX, "CLIP", r"(visual|text)_projection\.weight"),
    NameRule(TensorClass.MATRIX, "OpenCLIP", r"attn\.in_proj_weight|resblocks\.\d+\.mlp\.(c_fc|c_proj)\.weight"),
    NameRule(TensorClass.MATRIX, "OpenCLIP", r"visual\.proj|text_projection", transposed=True),
)

_ENDINGS = tuple((rule, re.compile(rf"(?:^|\.)(?:{rule.ending})$")) for rule in NAME_RULES)
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_INTEGERS = frozenset({"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"})
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SMALLEST_VOCABULARY = 1000

_MADE_AT_LOAD = (
    # Llama and GPT-NeoX of old
    (re.compile(r"(?:^|\.)rotary_emb\.inv_freq$"), (1,)),
    (re.compile(r"(?:^|\.)rotary_emb\.(?:cos|sin)_cached$"), (2, 4)),
    # GPT-2, GPT-Neo and GPT-NeoX of old: the causal mask, and what it puts in
    (re.compile(r"(?:^|\.)(?:attn|attention)\.bias$"), (4,)),
    (re.compile(r"(?:^|\.)(?:attn|attention)\.masked_bias$"), (0, 1)),
    # BERT and its kin, CLIP, ViT-like towers
    (re.compile(r"(?:^|\.)position_ids$"), (1, 2)),
)
# almost no name ends so, and a plan asks about every one
_MADE_ENDINGS = ("inv_freq", "_cached", "bias", "position_ids")


def is_made_at_load(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer that a model computes from its config, whether or not it is stored."""
    return name.endswith(_MADE_ENDINGS) and any(
        len(shape) in dims and ending.search(name) for ending, dims in _MADE_AT_LOAD
    )


Owners = Callable[[Mapping[str, Any]], Mapping[str, Role]]
"""Answers, for the content of config.json, what each of the model's tensors is."""


def role_by_name(name: str, shape: tuple[int, ...], dtype_code: str, config: Mapping[str, Any]) -> Role | None:
    """What a tensor's name says it is; None for two dimensions or more under an unknown name.

    dtype_code   as in a safetensors header: F32, BF16, I64, …
    config       the content of config.json; of it, the `model_type`s are read
    """
    return _role_by_name(name, shape, dtype_code, _model_types(config))


def roles(
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    config: Mapping[str, Any],
    owners: Owners | None = None,
) -> dict[str, Role]:
    """What each tensor is, in the order given.

    tensors   name -> (shape, safetensors dtype code)
    owners    asked once, and only if a name is not recognised; None leaves those to their shape
    """
    model_types = _model_types(config)
    by_name = {
        name: _role_by_name(name, shape, dtype_code, model_types) for name, (shape, dtype_code) in tensors.items()
    }
    if None not in by_name.values():
        return {name: role for name, role in by_name.items() if role is not None}
    owned = {} if owners is None else owners(config)
    return {name: role or owned.get(name) or _role_by_shape(tensors[name][0], config) for name, role in by_name.items()}


def _role_by_name(name: str, shape: tuple[int, ...], dtype_code: str, model_types: frozenset[str]) -> Role | None:
    if dtype_code in _INTEGERS:
        return Role(TensorClass.BUFFER)
    if len(shape) < 2:
        return Role(TensorClass.BUFFER if is_made_at_load(name, shape) else TensorClass.VECTOR)
    # layers and experts share their lines: a name is looked up once, not once per layer and expert
    return _role_by_ending(_INDEX.sub("0", name), len(shape), model_types)


@lru_cache(maxsize=4096)
def _role_by_ending(name: str, dims: int, model_types: frozenset[str]) -> Role | None:
    for rule, ending in _ENDINGS:
        applies = dims in rule.dims and (not rule.model_types or rule.model_types & model_types)
        if applies and ending.search(name):
            return Role(rule.kind, rule.transposed)
    return None


def _role_by_shape(shape: tuple[int, ...], config: Mapping[str, Any]) -> Role:
    def given(*keys: str) -> set[int]:
        return {part[key] for part in _parts(config) for key in keys if isinstance(part.get(key), int)}

    if len(shape) == 2:
        vocabulary = {size for size in given("vocab_size") if size >= _SMALLEST_VOCABULARY}
        kind = TensorClass.EMBEDDING if vocabulary & set(shape) else TensorClass.MATRIX
    elif sum(side > 1 for side in shape) < 2:
        kind = TensorClass.VECTOR
    elif len(shape) == 3 and shape[0] in given(*_EXPERT_COUNTS):
        kind = TensorClass.STACK
    else:
        kind = TensorClass.CONVOLUTION
    return Role(kind, source="shape")


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and the configs inside it, such as CLIP's `text_config`."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _model_types(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(part["model_type"] for part in _parts(config) if isinstance(part.get("model_type"), str))


# no more digits than a model could count to: text from outside may have more than `int` takes
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d{1,9})\.")


def layer_count(names: Iterable[str]) -> int:
    """How many layers the names count; of an encoder and a decoder, the deeper."""
    return max((parts[1] + 1 for name in names if (parts := layer_parts(name))), default=0)


def layer_position(name: str, layers: int) -> float:
    """Where on a curve over the depth of a model of `layers` layers a tensor lies, as in mergekit 0.1.5.

    Layer i lies at i / (layers - 1), an only layer at 1. What is outside of the layers lies at 0: the embeddings, and
    also the final norm and the head.
    """
    parts = layer_parts(name)
    return 0.0 if parts is None else position_of(parts[1], layers)


def split_at_layer(name: str) -> tuple[str, int | None, str]:
    """What a name says before its layer's number, that number, and what it says after it: all of it, without one."""
    found = _LAYER.search(name)
    return (name[: found.start(1)], int(found[1]), name[found.end(1) + 1 :]) if found else ("", None, name)


def position_of(layer: int, layers: int) -> float:
    """Where on a curve over the depth of `layers` layers one of them lies."""
    return min(layer / (layers - 1), 1.0) if layers > 1 else 1.0


def layer_parts(name: str) -> tuple[str, int, str] | None:
    """What stands before a layer's number, the number, and what follows: `model.layers.`, 3, `.mlp.up_proj.weight`.

    None outside of layers. The first number counts: in T5's `block.3.layer.0.` the second is a part of the layer.
    """
    found = _LAYER.search(name)
    return (name[: found.start(1)], int(found[1]), name[found.end(1) :]) if found else None
