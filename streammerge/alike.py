"""Models made alike before they are compared: heads that some of them tie to their embeddings, buffers that some store.

A tied head is stored once, as the embedding; a buffer that every model computes when it is loaded is stored by old
versions of transformers alone. Neither is a difference in what the models are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streammerge.checkpoint import Checkpoint, TensorEntry
from streammerge.errors import PlanError, quoted
from streammerge.rules import is_made_at_load

_KEY = "tie_word_embeddings"
# (head, embedding): tied where config.json says so
_HEADS = (
    ("lm_head.weight", "model.embed_tokens.weight"),  # Llama and its kin
    ("lm_head.weight", "model.language_model.embed_tokens.weight"),  # vision-language models
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),  # the same before transformers 4.52
    ("lm_head.weight", "transformer.wte.weight"),  # GPT-2
    ("lm_head.weight", "transformer.word_embeddings.weight"),  # BLOOM, Falcon
    ("lm_head.weight", "gpt_neox.embed_in.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ("lm_head.weight", "backbone.embeddings.weight"),  # Mamba
    ("lm_head.weight", "model.shared.weight"),  # BART
    ("lm_head.weight", "model.decoder.embed_tokens.weight"),  # OPT
    ("proj_out.weight", "model.decoder.embed_tokens.weight"),  # Whisper
    ("lm_head.weight", "shared.weight"),  # T5
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
)
# T5 scales what goes into a tied head, and only that
_SCALED = ("lm_head.weight", "shared.weight")
# one parameter under two names, whatever config.json says
_TWINS = (
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
    ("model.encoder.embed_tokens.weight", "model.shared.weight"),
    ("model.decoder.embed_tokens.weight", "model.shared.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("lm_head.decoder.bias", "lm_head.bias"),
)
# `model_type`s that tie unless config.json says otherwise: transformers 4 leaves out what is its default
_TIED_UNLESS_SAID = frozenset({
    "bart", "bert", "bloom", "camembert", "cohere", "cohere2", "distilbert", "falcon", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "mamba", "mbart", "mt5", "opt", "paligemma", "roberta",
    "starcoder2", "t5", "whisper", "xlm-roberta",
})  # fmt: skip


def made_alike(models: Sequence[Checkpoint], names: Sequence[str]) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """The models, each with a head of its own where any has one, and with the first one's computed buffers; and notes.

    models   the first is the reference: its config.json becomes the output's, untied where a head is
    names    what messages call them

    Where all are tied, a head that is stored as the very bytes of its embedding is left out. A head that only some
    store is for the others their embedding, if their config.json ties it. Buffers that the reference lacks are left
    out; those that it has stand in for the missing ones.

    Raises PlanError where config.json leaves open whether a model is tied.
    """
    notes: list[str] = []
    for head, embedding in _HEADS:
        models = _with_head(models, names, head, embedding, notes)
    for name, twin in _TWINS:
        models = _with_twin(models, name, twin)
    return _with_buffers(models, names, notes), tuple(notes)


def _with_head(
    models: Sequence[Checkpoint], names: Sequence[str], head: str, embedding: str, notes: list[str]
) -> Sequence[Checkpoint]:
    stored = [head in model.tensors for model in models]
    if not any(stored) or not all(embedding in model.tensors for model in models):
        return models
    tied = [_is_tied(model.config) for model in models]
    shared = [_is_same(model, head, embedding) for model in models]
    if all(ties and (same or not there) for ties, same, there in zip(tied, shared, stored, strict=True)):
        return [_without(model, {head}) for model in models]
    if all(stored):
        return models
    own, without = names[stored.index(True)], names[stored.index(False)]
    for name, ties, same, there in zip(names, tied, shared, stored, strict=True):
        if (there and ties and not same) or not (there or ties):
            says = "does not say" if ties is None else f"says {str(ties).lower()}"
            raise PlanError(
                f"{quoted(head)} is in {quoted(own)} but not in {quoted(without)}, "
                f"and the config.json of {quoted(name)} {says} to `{_KEY}`",
                hint=f"Set `{_KEY}` there to what is true: true where the head is the embedding "
                "(and then delete a copy of it), false where it is a matrix of its own.",
            )
    if (head, embedding) == _SCALED:
        raise PlanError(
            f"{quoted(head)} is in {quoted(own)}, but {quoted(without)} ties it to its embedding",
            hint="A tied head of this architecture works on scaled inputs, so no head of its own says the same.",
        )
    notes.append(
        f"{quoted(without)} ties its head to its embedding and {quoted(own)} does not: "
        f"the output has {quoted(head)}, and `{_KEY}: false`"
    )
    return [
        _untied(model if there else _with(model, head, model.tensors[embedding]))
        for model, there in zip(models, stored, strict=True)
    ]


def _with_twin(models: Sequence[Checkpoint], name: str, twin: str) -> Sequence[Checkpoint]:
    stored = [name in model.tensors for model in models]
    if not any(stored) or not all(twin in model.tensors for model in models):
        return models
    if all(_is_same(model, name, twin) or not there for model, there in zip(models, stored, strict=True)):
        return [_without(model, {name}) for model in models]
    return [
        model if there else _with(model, name, model.tensors[twin]) for model, there in zip(models, stored, strict=True)
    ]


def _with_buffers(models: Sequence[Checkpoint], names: Sequence[str], notes: list[str]) -> tuple[Checkpoint, ...]:
    computed = [{n for n, e in model.tensors.items() if is_made_at_load(n, e.shape)} for model in models]
    partial = {name for each in computed for name in each if not all(name in other for other in computed)}
    kept, dropped = sorted(partial & computed[0]), sorted(partial - computed[0])
    for those, what in ((kept, f"those of {quoted(names[0])} are copied"), (dropped, "they are left out")):
        if those:
            notes.append(
                f"{len(those)} buffer(s) such as {quoted(those[0])}, which a model computes when it is loaded, "
                f"are not in all models: {what}"
            )
    if not partial:
        return tuple(models)
    place, first = models[0].location, models[0].tensors
    lent = {name: replace(first[name], location=first[name].location or place) for name in kept}
    return tuple(_without(replace(model, tensors={**lent, **model.tensors}), dropped) for model in models)


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a model's head is its embedding; None where its config.json leaves that open."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get(_KEY), bool):
            return bool(part[_KEY])
    kind = config.get("model_type")
    return True if isinstance(kind, str) and kind in _TIED_UNLESS_SAID else None


def _is_same(model: Checkpoint, name: str, other: str) -> bool:
    entry = model.tensors.get(name)
    return entry is not None and replace(entry, name=other) == model.tensors[other]


def _with(model: Checkpoint, name: str, entry: TensorEntry) -> Checkpoint:
    return replace(model, tensors={**model.tensors, name: replace(entry, name=name)})


def _without(model: Checkpoint, names: Sequence[str] | set[str]) -> Checkpoint:
    return replace(model, tensors={name: entry for name, entry in model.tensors.items() if name not in names})


def _untied(model: Checkpoint) -> Checkpoint:
    config = {**model.config, _KEY: False}
    text = config.get("text_config")
    if isinstance(text, Mapping) and _KEY in text:
        config["text_config"] = {**text, _KEY: False}
    return replace(model, config=config)
