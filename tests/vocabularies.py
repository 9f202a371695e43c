"""Tiny Llamas whose tokenizers differ by added tokens, on disk: for tests of vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.stored import tensors_of

HIDDEN, LAYERS = 8, 1
WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran")
SPECIAL = ("<unk>", "<s>", "</s>")


def tokenizer_files(
    folder: Path,
    added: Sequence[str | Mapping[str, object]] = (),
    words: Sequence[str] = WORDS,
    special: Sequence[str] = SPECIAL,
) -> dict[str, int]:
    """Write a byte-pair tokenizer of these words and added tokens; the ids of its tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for word in words for letter in word} | {"Ġ"})
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    for token in added:
        flags = {"content": token} if isinstance(token, str) else dict(token)
        is_special = bool(flags.pop("special", False))
        made = AddedToken(**flags, special=is_special)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([made])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def llama(rows: int, seed: int, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a Llama with so many rows of its embedding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(rows, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}self_attn.{name}.weight"] = normal(HIDDEN, HIDDEN)
        for name, shape in {"gate": (16, HIDDEN), "up": (16, HIDDEN), "down": (HIDDEN, 16)}.items():
            tensors[f"{prefix}mlp.{name}_proj.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + normal(HIDDEN)
    tensors["model.norm.weight"] = 1 + normal(HIDDEN)
    if not tied:
        tensors["lm_head.weight"] = normal(rows, HIDDEN)
    return tensors


def save(
    folder: Path,
    seed: int,
    added: Sequence[str | Mapping[str, object]] = (),
    *,
    padding: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    words: Sequence[str] = WORDS,
    special: Sequence[str] = SPECIAL,
) -> dict[str, int]:
    """Write a whole model folder; `padding` rows of its matrices have no token. The ids of its tokens."""
    folder.mkdir(parents=True)
    ids = tokenizer_files(folder, added, words, special)
    rows = max(ids.values()) + 1 + padding
    save_file(llama(rows, seed, tied=tied, dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["</s>"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids["</s>"]], "bos_token_id": ids["<s>"]})
    )
    return ids


class Family:
    """Models on disk and the ids of their tokens: a base, three experts that add tokens, and one that lacks some."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.ids = {
            "base": save(folder / "base", 0, **options),
            "a": save(folder / "a", 1, ["<A>", "<S>", "<T>"], **options),
            "b": save(folder / "b", 2, ["<T>", "<B>", "<S>"], **options),
            "c": save(folder / "c", 3, ["<C>", "<S>", {"content": "<T>", "special": True}], padding=5, **options),
        }

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return tensors_of(self.folder / name)

    def recipe(self, method: str = "task_arithmetic", experts: str = "abc", **more: object) -> dict[str, object]:
        models = [{"model": self[name], "parameters": {"weight": 1.0}} for name in experts]
        if method in ("actmat", "model_stock"):
            models = [{"model": self[name]} for name in experts]
        return {"merge_method": method, "base_model": self["base"], "models": models, **more}


def ids_of(folder: Path) -> dict[str, int]:
    """Every token's id in a folder's tokenizer.json."""
    table = json.loads((folder / "tokenizer.json").read_text())
    added = {each["content"]: each["id"] for each in table["added_tokens"]}
    return {**table["model"]["vocab"], **added}
