"""LoRA adapters in PEFT's format, read as models: their base's tensors with W0 + s·B·A in place of the adapted ones.

https://arxiv.org/abs/2106.09685, with rsLoRA's scale (arXiv:2312.03732) and DoRA's magnitudes (arXiv:2402.09353).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint import DTYPE_BYTES, Checkpoint, FileFacts, Storage, TensorEntry, load_single
from streammerge.derived import DerivedEntry, ReadPart, scratch_bytes
from streammerge.errors import CheckpointError, quoted
from streammerge.patterns import PatternError, compiled

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# whole rows are computed in groups that begin at multiples of this, so that no bit depends on where a run begins
TILE_ROWS = 16
MOST_RANK = 1 << 20

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?"
)
PREFIX = "base_model.model."
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.[^.]+$)|\.base_layer(?=\.[^.]+$)")
_PLAIN_KEY = re.compile(r"[\w.\-]+")
_MERGE_FIRST = "Merge the adapter into its base with PEFT's `merge_and_unload` and name the result."
# training that leaves the base's weights as they are
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# what makes an adapter more than W0 + s·B·A of the base's own tensors
_MORE_THAN_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """W = W0 + s·B·A, or with magnitudes m of DoRA m·W/‖W‖ for each row of W: rounded once, from float64.

    The entry's parts: W0 [out, …in], A [r, …in], B [out, r] and, with `magnitude`, m [out].

    scale       s
    transposed  W0 is stored [in, out], as GPT-2's linear layers and embeddings are
    """

    scale: float
    transposed: bool = False
    magnitude: bool = False

    def rank(self, entry: DerivedEntry) -> int:
        """r."""
        return entry.parts[1].shape[0]

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        """The run's rows of W0 and of one factor, all of the other factor, and a few tiles."""
        origin, right, left, *_ = entry.parts
        if self.transposed:
            right, left = left, right
        rank, columns = self.rank(entry), math.prod(entry.shape[1:])
        rows = min(elements // columns + 2 * TILE_ROWS + 1, entry.shape[0])
        tiled = rows * columns if self.magnitude else elements
        return (
            tiled * DTYPE_BYTES[origin.dtype]
            + scratch_bytes(origin, tiled)
            + rank * columns * (DTYPE_BYTES[right.dtype] + 8)
            + rows * rank * (DTYPE_BYTES[left.dtype] + 2 * 8)
            + 3 * TILE_ROWS * columns * 8
        )

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        """See `Derivation.fill`. Tile by tile, each whole whatever part of it the run holds."""
        rows, columns = entry.shape[0], math.prod(entry.shape[1:])
        last_element = first_element + out.numel()
        top = first_element // columns // TILE_ROWS * TILE_ROWS
        bottom = min(((last_element - 1) // columns // TILE_ROWS + 1) * TILE_ROWS, rows)
        left, right = self._factors(entry, top, bottom, read)
        # a norm takes whole rows
        begin, end = (top * columns, bottom * columns) if self.magnitude else (first_element, last_element)
        weights = read(entry.parts[0], begin, end - begin)
        magnitudes = read(entry.parts[3], top, bottom - top).double() if self.magnitude else None
        for row in range(top, bottom, TILE_ROWS):
            tile = left[row - top : row - top + TILE_ROWS] @ right
            start = row * columns
            low, high = max(first_element, start), min(last_element, start + tile.numel())
            if magnitudes is None:
                part = tile.view(-1)[low - start : high - start]
                part += weights[low - begin : high - begin]
            else:
                tile += weights[start - begin : start - begin + tile.numel()].view_as(tile)
                tile *= (magnitudes[row - top : row - top + TILE_ROWS] / tile.norm(dim=1))[:, None]
                part = tile.view(-1)[low - start : high - start]
            out[low - first_element : high - first_element] = part

    def _factors(self, entry: DerivedEntry, top: int, bottom: int, read: ReadPart) -> tuple[Tensor, Tensor]:
        """Rows `top` to `bottom` of the stored matrix as a product [rows, r] by [r, columns] in float64, s included."""
        import torch

        _, a, b, *_ = entry.parts
        rank = self.rank(entry)
        if not self.transposed:
            left = read(b, top * rank, (bottom - top) * rank).view(-1, rank).double()
            return left.mul_(self.scale), read(a, 0, a.elements).view(rank, -1).double()
        # of A only these columns
        columns = [read(a, k * entry.shape[0] + top, bottom - top).double() for k in range(rank)]
        return torch.stack(columns, dim=1).mul_(self.scale), read(b, 0, b.elements).view(-1, rank).double().mT


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says of the arithmetic.

    rank_pattern, alpha_pattern  exceptions: the first whose key matches the end of a module's name counts
    base                         the model that it was trained on, as its trainer called it
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    fan_in_fan_out: bool
    dora: bool
    base: str | None

    def rank_of(self, module: str) -> int:
        """r of a module."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """s = alpha / r, or alpha / √r for rsLoRA."""
        rank = self.rank_of(module)
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def is_adapter(files: Mapping[str, FileFacts]) -> bool:
    """Whether a folder's files are those of an adapter alone."""
    whole = (name for name in files if not name.startswith("adapter_"))
    return CONFIG_NAME in files and not any(
        name.startswith("pytorch_model") or name.endswith((".safetensors", ".safetensors.index.json")) for name in whole
    )


def load_adapter(storage: Storage, location: str) -> tuple[Checkpoint, AdapterConfig]:
    """Read an adapter's header and config. Raises CheckpointError for what is not a LoRA adapter in safetensors."""
    files = storage.files(location)
    for name in (CONFIG_NAME, ADAPTER_NAME):
        if name not in files:
            pickled = name == ADAPTER_NAME and "adapter_model.bin" in files
            raise CheckpointError(
                f"{quoted(location)} has no {quoted(name)}" + (": its weights are pickled" if pickled else ""),
                hint="Load the adapter with PEFT and `save_pretrained` it as safetensors."
                if pickled
                else "Name an adapter's folder as PEFT writes it.",
            )
    adapter = load_single(storage, location, ADAPTER_NAME, CONFIG_NAME)
    if not adapter.tensors:
        raise CheckpointError(
            f"{quoted(location)} holds no tensors", hint="Name an adapter's folder as PEFT writes it."
        )
    return adapter, parse_config(adapter.config, quoted(f"{location.rstrip('/')}/{CONFIG_NAME}"))


def parse_config(table: Mapping[str, Any], label: str) -> AdapterConfig:
    """Check adapter_config.json. Raises CheckpointError, naming the key, for what is unsound or is not plain LoRA."""

    def refuse(key: str, expected: str, hint: str | None = None) -> CheckpointError:
        found = f"{label} has `{key}: {_shown(table.get(key))}`, expected {expected}"
        return CheckpointError(found, hint=hint or "The file is damaged or was not written by PEFT. Fetch it again.")

    def read(key: str, default: object, sound: Callable[[object], bool], expected: str) -> Any:
        value = table.get(key, default)
        value = default if value is None else value
        if not sound(value):
            raise refuse(key, expected)
        return value

    if table.get("peft_type") != "LORA":
        raise refuse("peft_type", "`LORA`", f"Only LoRA adapters are read. {_MERGE_FIRST}")
    for key in _MORE_THAN_LORA:
        if table.get(key):
            raise refuse(key, "none", _MERGE_FIRST)
    start = table.get("init_lora_weights")
    if not any(start is each for each in (None, True, False)) and start not in _HARMLESS_STARTS[3:]:
        raise refuse(
            "init_lora_weights",
            "a start that leaves the base's weights as they are",
            "Save it as a plain LoRA adapter: `save_pretrained` with `path_initial_model_for_weight_conversion`.",
        )
    rank, alpha = "a whole number from 1", "a finite number"
    return AdapterConfig(
        rank=read("r", 8, _is_rank, rank),
        alpha=float(read("lora_alpha", 8, _is_number, alpha)),
        rank_pattern=read("rank_pattern", {}, _table_of(_is_rank), f"a table of {rank[2:]}s"),
        alpha_pattern=read("alpha_pattern", {}, _table_of(_is_number), f"a table of {alpha[2:]}s"),
        rank_stabilised=read("use_rslora", False, _is_bool, "true or false"),
        fan_in_fan_out=read("fan_in_fan_out", False, _is_bool, "true or false"),
        dora=read("use_dora", False, _is_bool, "true or false"),
        base=read("base_model_name_or_path", "", lambda value: isinstance(value, str), "text") or None,
    )


def adapted(base: Checkpoint, adapter: Checkpoint, config: AdapterConfig) -> Checkpoint:
    """The base with the adapter in it. The adapter's folder is among its `besides`.

    Tensors that the adapter holds whole (`modules_to_save`, biases) are its own. Raises CheckpointError with the list
    of what fits no tensor of the base.
    """
    tensors = dict(base.tensors)
    problems: list[str] = []
    factors: dict[str, dict[str, TensorEntry]] = {}
    for entry in adapter.tensors.values():
        key = entry.name.removeprefix(PREFIX)
        own = replace(entry, location=adapter.location)
        if found := _KEY.fullmatch(key):
            parts = factors.setdefault(found["module"], {})
            if found["part"] in parts:
                problems.append(f"{quoted(entry.name)}: another adapter in the same file has it too")
            parts[found["part"]] = own
            continue
        name = _named(_SAVED.sub("", key), base.tensors)
        if name is None:
            problems.append(f"{quoted(entry.name)}: no such tensor in the base")
        elif entry.shape != base.tensors[name].shape or entry.is_float != base.tensors[name].is_float:
            expected = f"{base.tensors[name].dtype} {list(base.tensors[name].shape)}"
            problems.append(f"{quoted(entry.name)} is {entry.dtype} {list(entry.shape)}, the base's is {expected}")
        else:
            tensors[name] = replace(own, name=name)
    for module, parts in factors.items():
        name = _named(f"{module}.weight", base.tensors)
        found_problems = list(_problems(module, parts, config, None if name is None else tensors[name]))
        problems += found_problems
        if name is not None and not found_problems:
            # what the base's files hold decides the default of what is written
            tensors[name] = replace(
                _entry(module, parts, config, tensors[name]), written_dtype=base.tensors[name].output_dtype
            )
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"the adapter {quoted(adapter.location)} does not fit {quoted(base.location)}:\n  "
            + "\n  ".join(problems[:20])
            + more,
            hint="Name the model that the adapter was trained on: `model: BASE+ADAPTER`, or as `base_model`.",
        )
    return replace(base, tensors=tensors, besides=(*base.besides, adapter))


def low_rank(entry: TensorEntry, base: TensorEntry) -> tuple[LowRank, DerivedEntry] | None:
    """How an expert's tensor is a low-rank change of the base's; None where it is not, or not of that base's."""
    if isinstance(entry, DerivedEntry) and isinstance(entry.derivation, LowRank):
        derivation = entry.derivation
        if not derivation.magnitude and len(entry.shape) == 2 and entry.parts[0] == base:
            return derivation, entry
    return None


def module_of(entry: DerivedEntry) -> tuple[str, bool]:
    """The module that a low-rank tensor's factors are of, as the adapter calls it, and whether it is an embedding."""
    found = _KEY.fullmatch(entry.parts[1].name.removeprefix(PREFIX))
    assert found is not None, f"{entry.parts[1].name} is no adapter's"
    return found["module"], found["part"] == "lora_embedding_A"


def _entry(module: str, parts: Mapping[str, TensorEntry], config: AdapterConfig, origin: TensorEntry) -> DerivedEntry:
    embedding = "lora_embedding_A" in parts
    a, b = (parts["lora_embedding_A"], parts["lora_embedding_B"]) if embedding else (parts["lora_A"], parts["lora_B"])
    used = (origin, a, b, *([parts["lora_magnitude_vector"]] if config.dora else []))
    dtype = "F64" if any(part.dtype == "F64" for part in used) else "F32"
    return DerivedEntry(
        name=origin.name,
        dtype=dtype,
        shape=origin.shape,
        file=origin.file,
        offset=origin.offset,
        nbytes=origin.elements * DTYPE_BYTES[dtype],
        location=origin.location,
        parts=used,
        derivation=LowRank(
            scale=config.scale_of(module), transposed=_is_transposed(a, b, config, origin), magnitude=config.dora
        ),
    )


def _problems(
    module: str, parts: Mapping[str, TensorEntry], config: AdapterConfig, origin: TensorEntry | None
) -> Iterator[str]:
    """What keeps a module's factors from being added to its weight."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
    names += ["lora_magnitude_vector"] if config.dora else []
    if missing := [name for name in names if name not in parts]:
        yield f"{quoted(module)} has no {', no '.join(f'`{name}`' for name in missing)}"
        return
    if extra := sorted(parts.keys() - set(names)):
        yield f"{quoted(module)} has {quoted(extra[0])}, which its config does not speak of"
        return
    if origin is None:
        yield f"{quoted(module)}: no such tensor in the base"
        return
    a, b = parts[names[0]], parts[names[1]]
    rank = config.rank_of(module)
    shapes = f"A {list(a.shape)} and B {list(b.shape)}"
    floats = [part for part in (origin, *parts.values()) if not part.is_float]
    if floats:
        yield f"{quoted(floats[0].name)} is {floats[0].dtype}, which is not added to"
    elif not a.shape or a.shape[0] != rank:
        yield f"{quoted(module)} has {shapes}, of another rank than {rank}, which its config says"
    elif not _fits(a, b, origin) and not _fits_transposed(a, b, origin):
        yield f"{quoted(module)} has {shapes}, the base's weight is {list(origin.shape)}"
    elif not math.isfinite(config.scale_of(module)):
        yield f"{quoted(module)} has a scale that is not finite"
    elif config.dora:
        if _is_transposed(a, b, config, origin):
            yield f"{quoted(module)} has DoRA's magnitudes on a weight stored [in, out], which are not read"
        elif parts["lora_magnitude_vector"].elements != origin.shape[0]:
            found = list(parts["lora_magnitude_vector"].shape)
            yield f"{quoted(module)} has {found} magnitudes for the base's weight {list(origin.shape)}"


def _fits(a: TensorEntry, b: TensorEntry, origin: TensorEntry) -> bool:
    # a convolution's B is [out, r, 1, 1]
    flat_b = b.shape[:2] if set(b.shape[2:]) <= {1} else b.shape
    return len(origin.shape) > 1 and a.shape[1:] == origin.shape[1:] and flat_b == (origin.shape[0], a.shape[0])


def _fits_transposed(a: TensorEntry, b: TensorEntry, origin: TensorEntry) -> bool:
    return len(origin.shape) == 2 and (a.shape, b.shape) == (
        (a.shape[0], origin.shape[0]),
        (origin.shape[1], a.shape[0]),
    )


def _is_transposed(a: TensorEntry, b: TensorEntry, config: AdapterConfig, origin: TensorEntry) -> bool:
    # the config has one word for all layers, which cannot hold for all of them; a square matrix has only that
    fits = _fits(a, b, origin), _fits_transposed(a, b, origin)
    return config.fan_in_fan_out or ".lora_embedding_A" in a.name if fits == (True, True) else fits[1]


def _named(name: str, tensors: Mapping[str, TensorEntry]) -> str | None:
    """A tensor as the base calls it: checkpoints are stored with the name of the model's inner part, or without."""
    if name in tensors:
        return name
    shorter = name.partition(".")[2]
    if shorter in tensors:
        return shorter
    for prefix in ("model", "transformer"):
        if f"{prefix}.{name}" in tensors:
            return f"{prefix}.{name}"
    return None


def _by_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT matches `(.*\.)?(KEY)$` against the name
    for key, value in table.items():
        if _PLAIN_KEY.fullmatch(key):
            found = re.fullmatch(rf"(.*\.)?({key})", module) is not None
        else:
            try:
                found = compiled(rf"^(.*\.)?({key})$").is_in(module)
            except PatternError as error:
                raise CheckpointError(f"an adapter's pattern {error}", hint=_MERGE_FIRST) from error
        if found:
            return value
    return default


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MOST_RANK


def _is_number(value: object) -> bool:
    # NaN is not less either
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _table_of(sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(sound, value.values()))


def _shown(value: object) -> str:
    text = "true" if value is True else "false" if value is False else "null" if value is None else str(value)
    return quoted(text[:60])[1:-1]


def same_folder(model: Checkpoint, other: Checkpoint) -> bool:
    """Whether entries without a location of their own lie in the same files."""
    return model.location == other.location or os.path.abspath(model.location) == os.path.abspath(other.location)


def expert_factors(entries: Sequence[TensorEntry], base: TensorEntry) -> list[DerivedEntry | None] | None:
    """Of each expert the low-rank change that it is, None where it is the base's own; None where one is neither."""
    found: list[DerivedEntry | None] = []
    for entry in entries:
        change = low_rank(entry, base)
        if change is None and entry != base:
            return None
        found.append(None if change is None else change[1])
    return found
