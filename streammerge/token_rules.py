"""mergekit's `tokenizer`: whose vocabulary the output has, and where the rows of single tokens come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streammerge.located_yaml import Located
from streammerge.settings import required

UNION = "union"
MOST_MULTIPLE = 1 << 20

_KINDS = ("zero", "model_token")
_SOURCE = "a model of this recipe, `zero`, or a mapping with `kind`"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRule:
    """What the row of one token is in models that have none for it; with `force` in all models.

    model   whose row; None for zeros
    source  another token of that model, by its text or its id; None for the same token
    """

    token: str
    model: str | None = None
    source: str | int | None = None
    force: bool = False

    def to_plain(self) -> dict[str, object]:
        """The rule as a recipe has it."""
        place: object = self.model
        if self.model is None:
            place = {"kind": "zero"}
        elif self.source is not None:
            key = "token" if isinstance(self.source, str) else "token_id"
            place = {"kind": "model_token", "model": self.model, key: self.source}
        return {"source": place, **({"force": True} if self.force else {})}


def read_token_rules(node: Located, model: Callable[[Located], str]) -> tuple[TokenRule, ...]:
    """The rules under `tokens`; `model` finds one of the recipe's, or raises RecipeError."""
    return tuple(_rule(token, entry, model) for token, entry in node.mapping("a mapping by token").items())


def read_multiple(node: Located) -> int:
    """`pad_to_multiple_of`: rows of the output's matrices are a multiple of it."""
    multiple = node.whole()
    if not 1 <= multiple <= MOST_MULTIPLE:
        raise node.wrong(f"a whole number from 1 to {MOST_MULTIPLE}")
    return multiple


def _rule(token: str, node: Located, model: Callable[[Located], str]) -> TokenRule:
    fields = node.fields(("source", "force"))
    source = required(fields, "source", node)
    force = fields["force"].truth() if "force" in fields else False
    if isinstance(source.value, Mapping):
        return _long_form(token, source, force, model)
    if source.value == "zero":
        return TokenRule(token=token, force=force)
    source.text(_SOURCE)
    return TokenRule(token=token, model=model(source), force=force)


def _long_form(token: str, node: Located, force: bool, model: Callable[[Located], str]) -> TokenRule:
    fields = node.fields(("kind", "model", "token", "token_id"))
    kind = required(fields, "kind", node).choice(_KINDS)
    given = [key for key in ("token", "token_id") if key in fields]
    if kind == "zero":
        if len(fields) > 1:
            raise node.error("`kind: zero` has no model and no token", "Remove them.")
        return TokenRule(token=token, force=force)
    location = model(required(fields, "model", node))
    if len(given) != 1:
        raise node.error(f"`model_token` has `token` or `token_id`, found {'both' if given else 'neither'}")
    if given == ["token"]:
        return TokenRule(token=token, model=location, source=fields["token"].text(), force=force)
    number = fields["token_id"].whole()
    if number < 0:
        raise fields["token_id"].wrong("a row of the model's embedding, from 0 on")
    return TokenRule(token=token, model=location, source=number, force=force)
