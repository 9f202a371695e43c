"""A tokenizer's files with tokens added, and configs with the ids and the size of another vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from streammerge.checkpoint import parse_json
from streammerge.errors import quoted
from streammerge.tokenizer import ADDED_NAME, FAST_NAME
from streammerge.vocabulary import Vocabulary

CONFIG_NAME, SPECIAL_NAME = "tokenizer_config.json", "special_tokens_map.json"

# lists of ids as well as single ones: `eos_token_id`, `image_token_index`, `suppress_tokens`
_ID_KEYS = re.compile(r"token_(id|ids|index)$|^(begin_)?suppress_tokens$")


def tokenizer_files_with(vocabulary: Vocabulary, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of a tokenizer's files that name added tokens, with the vocabulary's behind their own.

    files  the tokenizer's, by name; a fast one where the vocabulary adds tokens
    """
    if not vocabulary.added:
        return {}
    special = [token for token, (_, flags) in vocabulary.added.items() if flags["special"]]
    changed: dict[str, bytes] = {}
    for name in (FAST_NAME, CONFIG_NAME, SPECIAL_NAME, ADDED_NAME):
        table = parse_json(files[name], quoted(name)) if name in files else None
        if not isinstance(table, dict):
            continue
        if name == FAST_NAME:
            own = table.get("added_tokens") or []
            table["added_tokens"] = own + [
                {"id": number, "content": token, **flags} for token, (number, flags) in vocabulary.added.items()
            ]
        elif name == ADDED_NAME:
            table |= {token: number for token, (number, _) in vocabulary.added.items()}
        elif isinstance(table.get("added_tokens_decoder"), dict):
            table["added_tokens_decoder"] |= {
                str(number): {"content": token, **flags} for token, (number, flags) in vocabulary.added.items()
            }
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if name in (CONFIG_NAME, SPECIAL_NAME) and isinstance(table.get(key), list):
                table[key] += special
        changed[name] = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def config_with(vocabulary: Vocabulary, config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the reference with the vocabulary's size and ids.

    chosen  config.json of the model whose tokenizer the output has: it names what the reference's ids have no token for

    An id of the reference stands for a token, and becomes that token's id. Where the output lacks the token it becomes
    what `chosen` has under the key, or None. A config inside is for the same vocabulary unless its size says otherwise.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        inside = chosen.get(key)
        if isinstance(value, Mapping):
            foreign = type(value.get("vocab_size")) is int and value["vocab_size"] != vocabulary.before
            changed[key] = (
                value if foreign else config_with(vocabulary, value, inside if isinstance(inside, Mapping) else {})
            )
        elif key == "vocab_size" and value == vocabulary.before:
            changed[key] = vocabulary.rows
        elif _ID_KEYS.search(key) and isinstance(value, list):
            ids = [_id(vocabulary, each, None) for each in value]
            changed[key] = [each for each in ids if each is not None] or inside
        elif _ID_KEYS.search(key):
            changed[key] = _id(vocabulary, value, inside)
        else:
            changed[key] = value
    return changed


def _id(vocabulary: Vocabulary, value: Any, otherwise: Any) -> Any:
    if type(value) is not int or value not in vocabulary.renumbered:
        # such as None, or -1 for none
        return value
    number = vocabulary.renumbered[value]
    return otherwise if number is None else number
