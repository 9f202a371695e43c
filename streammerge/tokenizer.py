"""A model's tokenizer, read as data: its tokens and their ids. Nothing in it is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streammerge.checkpoint import JSON_LIMIT_BYTES, Checkpoint, Storage, parse_json
from streammerge.errors import CheckpointError, PlanError, quoted

# no tokenizer has a tenth of it, and every id is a row of the output
LARGEST_ID = (1 << 22) - 1
FAST_NAME, WORDS_NAME, ADDED_NAME = "tokenizer.json", "vocab.json", "added_tokens.json"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""What tokenizers assume of an added token of which nothing is said."""

_UNREADABLE = "The file is damaged. Fetch it again."
AS_FAST_HINT = "Save it as `tokenizer.json`: load it with transformers' `AutoTokenizer`, then `save_pretrained`."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """What of a tokenizer says which row of a matrix is whose.

    ids     of every token, by its text; those of the vocabulary that cuts text, and added ones
    added   the added tokens, with what the tokenizer says of them: FLAGS
    merges  how byte pairs are joined, in order; empty for other kinds
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]
    merges: tuple[str, ...] = field(default=(), repr=False)


def tokenizer_bytes(storage: Storage, model: Checkpoint) -> tuple[bytes, ...]:
    """What tells one model's tokenizer from another's: its files as they are; none for a model without one."""
    if FAST_NAME in model.files:
        return (_read(storage, model, FAST_NAME),)
    if WORDS_NAME in model.files:
        return tuple(_read(storage, model, name) for name in (WORDS_NAME, ADDED_NAME) if name in model.files)
    return tuple(_read(storage, model, name) for name in _others(model))


def parse_tokenizer(model: Checkpoint, contents: tuple[bytes, ...]) -> Tokenizer:
    """A tokenizer from its files.

    Raises CheckpointError unless every token has one id and every id one token, PlanError for another format.
    """
    if FAST_NAME in model.files:
        return _fast(parse_json(contents[0], _label(model, FAST_NAME)), _label(model, FAST_NAME))
    if WORDS_NAME not in model.files:
        raise PlanError(
            f"{quoted(model.location)} has its tokenizer in {quoted(_others(model)[0])} only, "
            f"and tokens are matched by {quoted(FAST_NAME)}",
            hint=AS_FAST_HINT,
        )
    label = _label(model, WORDS_NAME)
    ids = _checked_ids(parse_json(contents[0], label), label)
    added: dict[str, int] = {}
    if len(contents) > 1:
        added = _checked_ids(parse_json(contents[1], _label(model, ADDED_NAME)), _label(model, ADDED_NAME))
    return Tokenizer(ids=_joined(ids, added.items(), label), added=dict.fromkeys(added, FLAGS))


def _others(model: Checkpoint) -> list[str]:
    return [name for name in model.files if name == "vocab.txt" or name.endswith((".model", ".tiktoken"))]


def _fast(table: Any, label: str) -> Tokenizer:
    core = table.get("model") if isinstance(table, dict) else None
    if not isinstance(core, dict) or not isinstance(core.get("vocab"), (dict, list)):
        raise CheckpointError(f"{label} has no `vocab` in its `model`", hint=_UNREADABLE)
    ids = _checked_ids(_numbered(core["vocab"], label), label)
    listed, pairs, added = table.get("added_tokens") or [], [], {}
    if not isinstance(listed, list):
        raise CheckpointError(f"{label} has `added_tokens` that are not a list", hint=_UNREADABLE)
    for each in listed:
        token = each.get("content") if isinstance(each, dict) else None
        if not isinstance(token, str):
            raise CheckpointError(f"{label} has an added token without `content`", hint=_UNREADABLE)
        pairs.append((token, each.get("id")))
        added[token] = {name: bool(each.get(name, assumed)) for name, assumed in FLAGS.items()}
    return Tokenizer(ids=_joined(ids, pairs, label), added=added, merges=_merges(core.get("merges")))


def _numbered(vocabulary: dict[str, Any] | list[Any], label: str) -> dict[str, Any]:
    """A vocabulary as ids by token; a unigram model's is a list of pieces with scores."""
    if isinstance(vocabulary, dict):
        return vocabulary
    pieces = [each[0] if isinstance(each, list) and each else None for each in vocabulary]
    if not all(isinstance(piece, str) for piece in pieces):
        raise CheckpointError(f"{label} lists a piece that is not text", hint=_UNREADABLE)
    found = {str(piece): number for number, piece in enumerate(pieces)}
    if len(found) != len(pieces):
        raise CheckpointError(f"{label} lists a piece twice", hint=_UNREADABLE)
    return found


def _checked_ids(ids: Any, label: str) -> dict[str, int]:
    if not isinstance(ids, dict):
        raise CheckpointError(f"{label} holds no ids by token", hint=_UNREADABLE)
    for token, number in ids.items():
        _check_id(token, number, label)
    if len(set(ids.values())) != len(ids):
        _refuse_shared(ids, label)
    return ids


def _check_id(token: str, number: Any, label: str) -> None:
    if type(number) is not int or not 0 <= number <= LARGEST_ID:
        raise CheckpointError(
            f"{quoted(token)} has the id {quoted(number)} in {label}, expected a number from 0 to {LARGEST_ID}",
            hint=_UNREADABLE,
        )


def _joined(ids: dict[str, int], added: Iterable[tuple[str, Any]], label: str) -> dict[str, int]:
    joined = dict(ids)
    for token, number in added:
        _check_id(token, number, label)
        if joined.setdefault(token, number) != number:
            raise CheckpointError(
                f"{quoted(token)} has two ids in {label}: {joined[token]} and {number}", hint=_UNREADABLE
            )
    if len(set(joined.values())) != len(joined):
        _refuse_shared(joined, label)
    return joined


def _refuse_shared(ids: Mapping[str, int], label: str) -> None:
    owners: dict[int, str] = {}
    for token, number in ids.items():
        if number in owners:
            raise CheckpointError(
                f"{quoted(owners[number])} and {quoted(token)} have one id in {label}: {number}", hint=_UNREADABLE
            )
        owners[number] = token


def _merges(listed: Any) -> tuple[str, ...]:
    """Older files have pairs as text, newer ones as lists; what is neither joins nothing."""
    if not isinstance(listed, list):
        return ()
    return tuple(" ".join(map(str, each)) if isinstance(each, list) else str(each) for each in listed)


def _read(storage: Storage, model: Checkpoint, name: str) -> bytes:
    nbytes = model.files[name].size
    if nbytes > JSON_LIMIT_BYTES:
        raise CheckpointError(
            f"{_label(model, name)} has {nbytes} bytes, over the limit of {JSON_LIMIT_BYTES}", hint=_UNREADABLE
        )
    return storage.read(model.location, name, 0, nbytes)


def _label(model: Checkpoint, name: str) -> str:
    return quoted(f"{model.location}/{name}")
