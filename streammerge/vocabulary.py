"""One vocabulary for models that have several: whose tokens it has, and which rows each model gives to them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint import DTYPE_BYTES, Checkpoint, Storage, TensorEntry
from streammerge.derived import DerivedEntry
from streammerge.errors import PlanError, StreamMergeError, quoted
from streammerge.recipe import Recipe
from streammerge.row_maps import MEAN, PADDING, ZERO, MappedRows, Segments
from streammerge.rules import TensorClass, roles
from streammerge.token_rules import UNION, TokenRule
from streammerge.tokenizer import (
    AS_FAST_HINT,
    FAST_NAME,
    FLAGS,
    LARGEST_ID,
    Tokenizer,
    parse_tokenizer,
    tokenizer_bytes,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NOT_OF_TOKENS = re.compile(r"posit|(^|\.)wpe\.|token_type|relative_attention")
_BIASES = re.compile(r"(^|\.)((lm_head|embed_out|cls\.predictions|decoder|vocab_projector)\.bias|final_logits_bias)$")
_FEW = 3
VOCABULARIES_HINT = (
    "Their vocabularies differ in size: `tokenizer_source: union` gives the output the tokens of all of them, "
    "`tokenizer_source: base` or a model's name those of one."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The output's vocabulary, where that is not what all models have.

    rows        of its matrices: one for each id, and those that pad
    before      how many the reference's matrices have
    location    of the model whose tokenizer it is but for `added`
    added       tokens behind that one's own: their ids and what tokenizers say of them
    renumbered  what becomes of the reference's ids: None for a token that the output lacks
    digest      of all that decides which row goes where
    """

    rows: int
    before: int
    location: str
    added: Mapping[str, tuple[int, Mapping[str, bool]]]
    renumbered: Mapping[int, int | None] = field(repr=False)
    digest: str


def vocabulary_tensors(model: Checkpoint) -> tuple[int, tuple[str, ...]]:
    """How many rows the matrices of a model's tokens have, and the names of those matrices and their biases."""
    kinds = roles({n: (e.shape, e.dtype) for n, e in model.tensors.items()}, model.config)
    tables = {
        name: entry.shape[0]
        for name, entry in model.tensors.items()
        if kinds[name].kind is TensorClass.EMBEDDING and len(entry.shape) == 2 and not _NOT_OF_TOKENS.search(name)
    }
    # a model may have tables of other things beside it; the largest that config.json knows is the text's
    rows = max(_configured(model.config) & set(tables.values()), default=max(tables.values(), default=0))
    biases = [n for n, e in model.tensors.items() if _BIASES.search(n) and e.shape in ((rows,), (1, rows))]
    return rows, (*(name for name, count in tables.items() if count == rows), *biases)


def differ_by_vocabulary(models: Sequence[Checkpoint]) -> bool:
    """Whether models differ in nothing but how many rows they have for tokens."""
    found = [vocabulary_tensors(model) for model in models]
    shapes = [
        {name: entry.shape[1:] if name in tables else entry.shape for name, entry in model.tensors.items()}
        for model, (_, tables) in zip(models, found, strict=True)
    ]
    return len({rows for rows, _ in found}) > 1 and all(each == shapes[0] for each in shapes)


def united(
    recipe: Recipe, models: Sequence[Checkpoint], names: Sequence[str], storage: Storage
) -> tuple[tuple[Checkpoint, ...], Vocabulary | None, tuple[str, ...]]:
    """The models with rows for the recipe's vocabulary, that vocabulary, and warnings.

    models  the base, if the recipe has one, then the experts

    Without `tokenizer_source`, and where all models have one vocabulary already, they come back as they are, with None;
    without it a warning tells of rows that are not of one token in all models.
    A token's row is the model's own, else the base's, else the only other model's that has one, else the mean of those
    that have one, unless a rule of the recipe says otherwise. A model without a tokenizer is taken to have the first
    model's. Raises PlanError for vocabularies that cannot be united, CheckpointError for unsound tokenizers.
    """
    unchanged = tuple(models), None, ()
    if recipe.tokenizer_source is None:
        return tuple(models), None, _disagreement(models, names, storage)
    contents = [tokenizer_bytes(storage, model) for model in models]
    chosen = _chosen(recipe, models)
    found = [vocabulary_tensors(model) for model in models]
    sizes = [rows for rows, _ in found]
    asked = bool(recipe.tokens or recipe.pad_to_multiple_of)
    if not asked and len(set(contents)) == 1 and len(set(sizes)) == 1:
        return unchanged
    if not contents[chosen]:
        raise PlanError(
            f"{quoted(f'tokenizer_source: {recipe.tokenizer_source}')} finds no tokenizer",
            hint="Name a model that has one, or leave it out.",
        )
    tables = [name for name in found[0][1] if all(name in names for _, names in found)]
    if not tables and (asked or recipe.tokenizer_source == UNION):
        raise PlanError(
            f"{quoted(names[0])} has no matrix with a row for each token, and the vocabulary is to be another",
            hint="Leave `tokenizer_source` out to keep its tokenizer.",
        )
    if not tables or _differ_elsewhere(models, tables):
        return unchanged
    parsed: dict[tuple[bytes, ...], Tokenizer] = {}
    for model, content in zip(models, contents, strict=True):
        if content and content not in parsed:
            parsed[content] = parse_tokenizer(model, content)
    tokenizers = [parsed[content or contents[0] or contents[chosen]] for content in contents]
    if not asked and len(set(sizes)) == 1 and all(each.ids == tokenizers[0].ids for each in tokenizers):
        return unchanged
    union = _Union(recipe, models, names, tokenizers, sizes, chosen)
    if not asked and union.changes_nothing:
        return unchanged
    _refuse_unknown_format(union, models[chosen])
    united_models, digest = union.models(tables)
    return united_models, union.vocabulary(digest), union.warnings()


def _disagreement(models: Sequence[Checkpoint], names: Sequence[str], storage: Storage) -> tuple[str, ...]:
    """A warning where a row that is to be merged is one token's in one model and another's in the next."""
    distinct: dict[tuple[bytes, ...], int] = {}
    for number, model in enumerate(models):
        # nobody asked for what tokenizers say: what cannot be read tells nothing
        with suppress(StreamMergeError):
            distinct.setdefault(tokenizer_bytes(storage, model), number)
    distinct.pop((), None)
    owners: dict[int, tuple[str, str]] = {}
    for content, number in distinct.items() if len(distinct) > 1 else ():
        with suppress(StreamMergeError):
            for token, row in parse_tokenizer(models[number], content).ids.items():
                owner, first = owners.setdefault(row, (token, names[number]))
                if owner != token:
                    return (
                        f"row {row} is {quoted(owner)} in {quoted(first)} and {quoted(token)} in "
                        f"{quoted(names[number])}: set `tokenizer_source` to merge tokens by their text",
                    )
    return ()


def _chosen(recipe: Recipe, models: Sequence[Checkpoint]) -> int:
    """Which model's tokenizer the output's begins with."""
    if recipe.tokenizer_source in ("base", UNION):
        return 0
    return [model.location for model in models].index(str(recipe.tokenizer_source))


def _configured(config: Mapping[str, Any]) -> set[int]:
    """Every `vocab_size` in a config and the configs inside it."""
    inside = (_configured(part) for part in config.values() if isinstance(part, Mapping))
    own = config.get("vocab_size")
    return set().union({own} if type(own) is int else set(), *inside)


def _differ_elsewhere(models: Sequence[Checkpoint], tables: Sequence[str]) -> bool:
    """Whether tables differ in more than rows, so that comparing all tensors will tell how."""
    entries = [[model.tensors[name] for model in models] for name in tables]
    columns = [{each.shape[1:] if each.shape[0] > 1 else () for each in alike} for alike in entries]
    return any(len(each) > 1 for each in columns) or not all(e.is_float for alike in entries for e in alike)


def _refuse_unknown_format(union: _Union, model: Checkpoint) -> None:
    if union.added and FAST_NAME not in model.files:
        token = next(iter(union.added))
        raise PlanError(
            f"{quoted(token)} and {len(union.added) - 1} more tokens are to be added to the tokenizer of "
            f"{quoted(model.location)}, which has no {quoted(FAST_NAME)}",
            hint=AS_FAST_HINT,
        )


class _Union:
    """The vocabulary while it is made: everything by the number of a model and the row of the output."""

    def __init__(
        self,
        recipe: Recipe,
        models: Sequence[Checkpoint],
        names: Sequence[str],
        tokenizers: Sequence[Tokenizer],
        sizes: Sequence[int],
        chosen: int,
    ) -> None:
        self._recipe, self._models, self._names = recipe, models, names
        self._tokenizers, self._sizes, self._chosen = tokenizers, sizes, chosen
        self.added: dict[str, tuple[int, Mapping[str, bool]]] = {}
        self.ids = dict(tokenizers[chosen].ids)
        self._next = 1 + max(self.ids.values(), default=-1)
        if recipe.tokenizer_source == UNION:
            self._add_tokens()
        for rule in recipe.tokens:
            if rule.token not in self.ids:
                self._add(rule.token, self._flags(rule.token))
        multiple = recipe.pad_to_multiple_of or 1
        self.rows = -(-self._next // multiple) * multiple
        self._own = [self._rows_of(number) for number in range(len(models))]

    @property
    def changes_nothing(self) -> bool:
        """Whether every model has a row of its own for each token, where the output has it, and as many rows."""
        import numpy as np

        tokens = self._own[self._chosen] >= 0
        place = np.arange(self.rows)
        alike = all(((own == place) | ~tokens).all() for own in self._own)
        return alike and len(set(self._sizes)) == 1 and not self.added and len(self.ids) == int(tokens.sum())

    def models(self, tables: Sequence[str]) -> tuple[tuple[Checkpoint, ...], str]:
        """The models with as many rows as the output, and a digest of what decides which row goes where."""
        import numpy as np

        sources, rows, distinct = self._given()
        digest = hashlib.sha256()
        changed = []
        for number, model in enumerate(self._models):
            keeps = (self._own[number] >= 0) & ~self._forced()
            own_sources = np.where(keeps, number, sources)
            own_rows = np.where(keeps, self._own[number], rows)
            digest.update(own_sources.tobytes() + own_rows.tobytes())
            entries = self._entries(number, own_sources, own_rows, distinct, tables)
            changed.append(replace(model, tensors={**model.tensors, **entries}))
        return tuple(changed), digest.hexdigest()

    def vocabulary(self, digest: str) -> Vocabulary:
        """What the output's files must say."""
        before = self._tokenizers[0].ids
        return Vocabulary(
            rows=self.rows,
            before=self._sizes[0],
            location=self._models[self._chosen].location,
            added=self.added,
            renumbered={number: self.ids.get(token) for token, number in before.items()},
            digest=digest,
        )

    def warnings(self) -> tuple[str, ...]:
        """What a person should know of the models' tokenizers."""
        found = []
        reference = self._tokenizers[self._chosen]
        for number, (name, tokenizer) in enumerate(zip(self._names, self._tokenizers, strict=True)):
            if tokenizer.merges != reference.merges:
                found.append(
                    f"{quoted(name)} cuts text into tokens otherwise than {quoted(self._names[self._chosen])}, "
                    "whose way the output has"
                )
            beyond = [token for token, row in tokenizer.ids.items() if row >= self._sizes[number]]
            if beyond:
                found.append(
                    f"{quoted(name)} has no rows for {len(beyond)} token(s) of its tokenizer, "
                    f"such as {quoted(beyond[0])}: it is taken not to have them"
                )
        return tuple(found)

    def _add(self, token: str, flags: Mapping[str, bool]) -> None:
        self.ids[token] = self._next
        self.added[token] = self._next, flags
        self._next += 1

    def _flags(self, token: str) -> Mapping[str, bool]:
        return next((t.added[token] for t in self._tokenizers if token in t.added), FLAGS)

    def _add_tokens(self) -> None:
        """Every model's added tokens, model after model in the order of their ids."""
        for number, tokenizer in enumerate(self._tokenizers):
            missing = [token for token in tokenizer.ids if token not in self.ids]
            core = [token for token in missing if not any(token in each.added for each in self._tokenizers)]
            if core:
                few = ", ".join(map(quoted, core[:_FEW])) + (", …" if len(core) > _FEW else "")
                raise PlanError(
                    f"{quoted(self._names[number])} cuts text by a vocabulary of its own: {len(core)} of its tokens "
                    f"are not in {quoted(self._names[0])}: {few}",
                    hint="Only added tokens can be united: no tokenizer cuts text in two ways. Set `tokenizer_source` "
                    "to `base` or to one of the models, whose vocabulary the output then has.",
                )
            for token in sorted(missing, key=tokenizer.ids.__getitem__):
                self._add(token, self._flags(token))

    def _rows_of(self, number: int) -> NDArray[np.int64]:
        """Which row a model has for each of the output's, -1 for none."""
        import numpy as np

        ids, size = self._tokenizers[number].ids, self._sizes[number]
        own = np.full(self.rows, -1, dtype=np.int64)
        places = np.fromiter(self.ids.values(), dtype=np.int64, count=len(self.ids))
        own[places] = np.fromiter((ids.get(token, -1) for token in self.ids), dtype=np.int64, count=len(self.ids))
        own[own >= size] = -1
        return own

    def _given(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """The source and row that each row has in models without one of their own; the models that means are of."""
        import numpy as np

        locations = [model.location for model in self._models]
        distinct = [number for number, location in enumerate(locations) if locations.index(location) == number]
        owned = np.stack([self._own[number] >= 0 for number in distinct])
        counts = owned.sum(0)
        sources = np.full(self.rows, PADDING, dtype=np.int64)
        rows = np.zeros(self.rows, dtype=np.int64)
        for number in reversed(distinct):
            sources[self._own[number] >= 0] = number
            rows = np.where(self._own[number] >= 0, self._own[number], rows)
        shared = counts > 1
        if self._recipe.base:
            shared &= self._own[0] < 0
        sources[shared], rows[shared] = MEAN, counts[shared]
        for rule in self._recipe.tokens:
            place = self.ids[rule.token]
            sources[place], rows[place] = self._ruled(rule)
        rowless = [token for token, place in self.ids.items() if sources[place] == PADDING]
        if rowless:
            raise PlanError(
                f"no model has a row for {len(rowless)} token(s) such as {quoted(rowless[0])}",
                hint="Say where each comes from under `tokenizer`: `tokens`, for example "
                f"`{quoted(rowless[0])[1:-1]}: {{source: {{kind: zero}}}}`.",
            )
        return sources, rows, distinct

    def _forced(self) -> NDArray[np.bool_]:
        import numpy as np

        forced = np.zeros(self.rows, dtype=np.bool_)
        forced[[self.ids[rule.token] for rule in self._recipe.tokens if rule.force]] = True
        return forced

    def _ruled(self, rule: TokenRule) -> tuple[int, int]:
        if rule.model is None:
            return ZERO, 0
        number = next(n for n, model in enumerate(self._models) if model.location == rule.model)
        token = rule.token if rule.source is None else rule.source
        row = token if isinstance(token, int) else self._tokenizers[number].ids.get(token, LARGEST_ID)
        if row >= self._sizes[number]:
            found = f"row {row}" if isinstance(token, int) else f"row for {quoted(token)}"
            raise PlanError(
                f"the row of {quoted(rule.token)} is to come from {quoted(self._names[number])}, which has no {found}",
                hint="`tokens` may name another `token`, or another model.",
            )
        return number, row

    def _entries(
        self,
        number: int,
        sources: NDArray[np.int64],
        rows: NDArray[np.int64],
        distinct: Sequence[int],
        tables: Sequence[str],
    ) -> dict[str, TensorEntry]:
        """A model's tables with the output's rows: cut short where that is all, else made of several models' rows."""
        import numpy as np

        means = sources == MEAN
        layers = [(each, np.where(means, self._own[each], -1)) for each in distinct]
        layers = [(each, its) for each, its in layers if (its >= 0).any()]
        others = {*np.unique(sources[sources >= 0]).tolist(), *(each for each, _ in layers)} - {number}
        used = [number, *sorted(others)]
        spans = []
        for each in used:
            taken = np.concatenate([rows[sources == each], *(its[its >= 0] for n, its in layers if n == each)])
            spans.append((int(taken.min()), int(taken.max()) + 1) if len(taken) else (0, 1))
        whole = [any(isinstance(self._models[n].tensors[t], DerivedEntry) for t in tables) for n in used]
        spans = [(0, self._sizes[n]) if w else span for n, w, span in zip(used, whole, spans, strict=True)]
        single = _renumbered(sources, rows, used, spans)
        summed = tuple(
            _renumbered(np.where(its >= 0, n, ZERO), np.where(its >= 0, its, 0), used, spans) for n, its in layers
        )
        is_cut = len(single.starts) == 1 and int(single.sources[0]) == 0 and not whole[0]
        entries: dict[str, TensorEntry] = {}
        for name in tables:
            parts = [
                _part(self._models[n].tensors[name], self._models[n].location, span, self._sizes[n], own=n == number)
                for n, span in zip(used, spans, strict=True)
            ]
            own = self._models[number].tensors[name]
            shape = (1, self.rows) if own.shape[0] == 1 else (self.rows, *own.shape[1:])
            if is_cut:
                entries[name] = replace(parts[0], shape=shape)
                continue
            entries[name] = DerivedEntry(
                name=name,
                dtype=own.dtype,
                shape=shape,
                file=own.file,
                offset=own.offset,
                nbytes=math.prod(shape) * DTYPE_BYTES[own.dtype],
                parts=tuple(parts),
                derivation=MappedRows(rows=single, summed=summed),
            )
        return entries


def _renumbered(
    sources: NDArray[np.int64], rows: NDArray[np.int64], used: Sequence[int], spans: Sequence[tuple[int, int]]
) -> Segments:
    """Segments whose sources are places among the parts, and whose rows count from each part's first."""
    parts, inside = sources.copy(), rows.copy()
    for place, (number, (first, _)) in enumerate(zip(used, spans, strict=True)):
        mine = sources == number
        parts[mine], inside[mine] = place, rows[mine] - first
    return Segments.of(parts, inside)


def _part(entry: TensorEntry, location: str, span: tuple[int, int], rows: int, *, own: bool) -> TensorEntry:
    """Rows of a model's table, [span, …]: a stored one's as a tensor of their own, a derived one's all."""
    if isinstance(entry, DerivedEntry):
        return entry if own else _located(entry, location)
    first, last = span
    row_bytes = entry.nbytes // rows
    shape = (1, last - first) if entry.shape[0] == 1 else (last - first, *entry.shape[1:])
    place = entry.location if own else entry.location or location
    return replace(
        entry, shape=shape, offset=entry.offset + first * row_bytes, nbytes=(last - first) * row_bytes, location=place
    )


def _located(entry: TensorEntry, location: str) -> TensorEntry:
    """An entry that is read from its own model's folder wherever it is a part."""
    if isinstance(entry, DerivedEntry):
        return replace(entry, parts=tuple(_located(part, location) for part in entry.parts))
    return replace(entry, location=entry.location or location)
