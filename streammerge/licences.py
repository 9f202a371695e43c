"""Which licence each model's card names: the head of its README.md, read and distrusted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streammerge import located_yaml
from streammerge.checkpoint import Checkpoint, Storage
from streammerge.errors import CheckpointError, RecipeError, quoted

CARD_NAME = "README.md"
# cards that hold results of many evaluations have heads of some hundred kilobytes
_MOST_BYTES, _MOST_HEAD = 1 << 20, 64 << 10
# of a model on the hub the whole card is fetched
_LARGEST_CARD_BYTES = 16 << 20
_HEAD = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_KEYS = ("license", "license_name", "license_link")
_OURS = re.compile(rf"(?:{'|'.join(_KEYS)})[ \t]*:")
# a licence as the hub writes it
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What a model's card says of its licence.

    location  the model's
    terms     `license`, `license_name` and `license_link`, as far as the card has them
    missing   why `license` is not among them; empty where it is
    """

    location: str
    terms: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""

    @property
    def told(self) -> str:
        """In words, the card's own among them."""
        if self.missing:
            return f"unknown: {self.missing}"
        more = [self.terms[key] for key in _KEYS[1:] if key in self.terms]
        return self.terms["license"] + (f" ({', '.join(more)})" if more else "")

    @property
    def is_identifier(self) -> bool:
        """Whether it could be one that the hub knows."""
        return _IDENTIFIER.fullmatch(self.terms.get("license", "")) is not None

    def agrees_with(self, other: Licence) -> bool:
        """Whether both are known to be under the same one; where a name says which, its address does not count."""
        keys = _KEYS[:2] if "license_name" in self.terms else _KEYS
        return not (self.missing or other.missing) and all(self.terms.get(k) == other.terms.get(k) for k in keys)


def licence_of(storage: Storage, model: Checkpoint) -> Licence:
    """What the model's card says; one that is not there, or cannot be read, is no error."""
    facts = model.files.get(CARD_NAME)
    if facts is None:
        return Licence(location=model.location, missing="no card lies beside the weights")
    if facts.size > _LARGEST_CARD_BYTES:
        return Licence(location=model.location, missing=f"the card has {facts.size} bytes")
    try:
        text = storage.read(model.location, CARD_NAME, 0, min(facts.size, _MOST_BYTES)).decode("utf-8", "replace")
        terms = _terms(text)
    except (CheckpointError, RecipeError):
        return Licence(location=model.location, missing="the card cannot be read")
    missing = "" if "license" in terms else "the card names none"
    return Licence(location=model.location, terms=terms, missing=missing)


def licences_of(storage: Storage, models: Sequence[Checkpoint]) -> tuple[Licence, ...]:
    """That of each model, and of each adapter that makes one, once."""
    folders = {each.location: each for model in models for each in (model, *model.besides)}
    return tuple(licence_of(storage, each) for each in folders.values())


def agreed(licences: Sequence[Licence]) -> Licence | None:
    """The licence that all models are known to be under."""
    same = licences and all(each.agrees_with(licences[0]) for each in licences)
    return licences[0] if same else None


def differing(licences: Sequence[Licence]) -> bool:
    """Whether two models are known to be under different ones."""
    known = [each for each in licences if not each.missing]
    return any(not each.agrees_with(known[0]) for each in known)


def licence_warnings(licences: Sequence[Licence]) -> tuple[str, ...]:
    """A conflict, told before anything is merged."""
    if not differing(licences):
        return ()
    each = "; ".join(f"{quoted(licence.location)} {quoted(licence.told)}" for licence in licences)
    return (f"the models' licences differ, check what they allow together: {each}",)


def _terms(text: str) -> dict[str, str]:
    head = _HEAD.match(text)
    if head is None:
        return {}
    # what else a head holds may be long: only what is asked for becomes YAML
    kept: list[str] = []
    inside = False
    for line in head[1].splitlines():
        if not line.startswith((" ", "\t", "-", "#")) and line.strip():
            inside = _OURS.match(line) is not None
        kept += [line] if inside else []
    told = located_yaml.parse("\n".join(kept)[:_MOST_HEAD], CARD_NAME).plain() if kept else {}
    values = {key: _text(told[key]) for key in _KEYS if key in told} if isinstance(told, dict) else {}
    found = {key: value for key, value in values.items() if value}
    return {**found, "license": found["license"].lower()} if "license" in found else found


def _text(value: object) -> str:
    """Several licences are one text, in any order."""
    parts = value if isinstance(value, list) else [value]
    return ", ".join(sorted(part.strip() for part in parts if isinstance(part, str) and part.strip()))
