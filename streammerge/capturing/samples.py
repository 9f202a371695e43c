"""Texts for a capture: a JSON Lines file, read and distrusted, as token ids in batches of one length."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streammerge.budget import format_bytes
from streammerge.checkpoint import parse_json
from streammerge.errors import CheckpointError, StreamMergeError, escaped, quoted

LINE_LIMIT_BYTES = 64 << 20
_LINE_HINT = (
    'Each line is a JSON object: {"text": …}, {"prompt": …, "completion": …}, '
    'or {"messages": [{"role": …, "content": …}, …]}.'
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One text: its token ids, [n] int64, and the first of them whose likelihood counts for the Fisher."""

    ids: Tensor
    scored_from: int


def load_tokenizer(location: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.path.abspath(location), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # the library of tokenizers raises no narrower class
        raise CheckpointError(
            f"{quoted(location)} has no tokenizer that transformers reads: {escaped(error)}",
            hint="Copy the tokenizer's files into the model's folder.",
        ) from error


def read_samples(path: str, tokenizer: Any, max_tokens: int, limit: int | None, fisher: bool) -> list[Sample]:
    """The samples of a JSON Lines file, in its order. Lines of white space hold none."""
    found: list[Sample] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT_BYTES + 1), b""), 1):
                if len(found) == limit:
                    break
                if line.strip():
                    found.append(_sample(line, quoted(f"{path}:{number}"), tokenizer, max_tokens, fisher))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StreamMergeError(f"{quoted(path)} cannot be read: {reason}", hint="Name a JSON Lines file.") from error
    if not found:
        raise StreamMergeError(f"{quoted(path)} holds no samples", hint=_LINE_HINT)
    return found


def _sample(line: bytes, label: str, tokenizer: Any, max_tokens: int, fisher: bool) -> Sample:
    if len(line) > LINE_LIMIT_BYTES:
        raise StreamMergeError(
            f"{label} is longer than {format_bytes(LINE_LIMIT_BYTES)}", hint="Split it into samples."
        )
    try:
        entry = parse_json(line, label)
    except CheckpointError as error:
        raise StreamMergeError(error.message, hint=_LINE_HINT) from error
    prompt, text, special = _prompt_and_text(entry, label, tokenizer)
    ids = _ids(tokenizer, text, special)[:max_tokens]
    if not text.strip() or not ids:
        raise StreamMergeError(f"{label} is empty", hint="Remove the line.")
    # what both begin with: a token across the border belongs to the completion
    pairs = zip(ids, _ids(tokenizer, prompt, special), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    # the first token follows nothing that could predict it
    sample = Sample(torch.tensor(ids), max(shared, 1))
    if fisher and sample.scored_from >= len(ids):
        raise StreamMergeError(
            f"{label} leaves nothing to predict in its first {len(ids)} tokens",
            hint="Raise `--max-tokens`, or remove the line.",
        )
    return sample


def _prompt_and_text(entry: Any, label: str, tokenizer: Any) -> tuple[str, str, bool]:
    """What is only read, the whole text, and whether the tokenizer's own special tokens go around it."""
    fields = entry if isinstance(entry, dict) else {}
    if isinstance(fields.get("text"), str):
        return "", fields["text"], True
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, prompt + completion, True
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise StreamMergeError(f"{label} is no sample", hint=_LINE_HINT)
    if not getattr(tokenizer, "chat_template", None):
        raise StreamMergeError(
            f"{label} holds messages, but the model's tokenizer has no chat template",
            hint='Write the text as the model is to read it: {"prompt": …, "completion": …}.',
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        if len(messages) == 1 or messages[-1]["role"] != "assistant":
            return "", text, False
        return tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True), text, False
    except Exception as error:
        # a template's own code may raise anything
        raise StreamMergeError(
            f"{label} does not fit the tokenizer's chat template: {escaped(error)}", hint="Mend the line's roles."
        ) from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def batches_of(samples: Sequence[Sample], size: int) -> list[Tensor]:
    """Token ids [count, length] of samples of one length each, the longest first, else in the file's order."""
    by_length: dict[int, list[Tensor]] = {}
    for sample in samples:
        by_length.setdefault(len(sample.ids), []).append(sample.ids)
    return [
        torch.stack(by_length[length][start : start + size])
        for length in sorted(by_length, reverse=True)
        for start in range(0, len(by_length[length]), size)
    ]


def digest_of(samples: Sequence[Sample]) -> str:
    """What tells one set of samples from another, after the tokenizer has had its say."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample.ids)} {sample.scored_from}\n".encode())
        digest.update(sample.ids.numpy().tobytes())
    return digest.hexdigest()
