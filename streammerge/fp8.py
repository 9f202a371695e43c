"""Models stored in 8-bit floats with scales: each weight read as what it means, in float32.

DeepSeek-V3's blocks, https://arxiv.org/abs/2412.19437 §3.3, and one scale for a tensor or for each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint import DTYPE_BYTES, Checkpoint, TensorEntry
from streammerge.derived import DerivedEntry, ReadPart
from streammerge.errors import CheckpointError, quoted

if TYPE_CHECKING:
    from torch import Tensor

CODES = ("F8_E4M3", "F8_E5M2")
# how `quant_method` in config.json calls it: DeepSeek and transformers, vLLM's llm-compressor, Meta
METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8")

# one is written while the next is filled
CODE_BUFFERS = 2
_ROWS_AT_A_TIME = 128
_WEIGHT_SCALES = ("_scale_inv", "_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
# of what flows between the layers: a model that is not run in 8 bits has no use for them
_ACTIVATION_SCALES = (".input_scale", ".input_scale_ub", ".output_scale", ".q_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Each block of so many rows and columns of codes, times its own scale. What no block fills ends with the tensor.

    The product is rounded once, to float32. A code that is no number stays none.
    """

    rows: int
    columns: int

    def across(self, codes: TensorEntry) -> int:
        """How many blocks stand side by side."""
        return -(-_columns(codes) // self.columns)

    def scratch_bytes(self, entry: DerivedEntry, elements: int) -> int:
        """The codes of a run, and the scales of its rows."""
        codes, scales = entry.parts
        width, across = _columns(codes), self.across(codes)
        bands = (elements // max(width, 1) + 2) // self.rows + 2
        spread = across * self.columns if across > 1 else 0
        return elements + bands * (across * (DTYPE_BYTES[scales.dtype] + 4) + spread * 4)

    def fill(self, entry: DerivedEntry, out: Tensor, first_element: int, read: ReadPart) -> None:
        """Write a run of the weight in float32."""
        codes, scales = entry.parts
        width, across = _columns(codes), self.across(codes)
        out.copy_(read(codes, first_element, out.numel()))
        for begin, end in _by_rows(first_element, first_element + out.numel(), width):
            top, bottom = begin // width, (end - 1) // width + 1
            bands = range(top // self.rows, (bottom - 1) // self.rows + 1)
            factors = read(scales, bands.start * across, len(bands) * across).float().view(len(bands), across)
            span = out[begin - first_element : end - first_element].view(bottom - top, -1)
            if across > 1:
                left = begin % width
                factors = factors.repeat_interleave(self.columns, dim=1)[:, left : left + span.shape[1]]
            if self.rows == 1:
                span.mul_(factors)
                continue
            for band, factor in zip(bands, factors, strict=True):
                span[max(band * self.rows - top, 0) : (band + 1) * self.rows - top].mul_(factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a tensor is stored in 8 bits: its `codes`, and a tensor `scales` with a number for each block of them.

    power_of_two  scales are those of whole exponents
    """

    codes: TensorEntry
    scales: TensorEntry
    rows: int
    columns: int
    power_of_two: bool

    @property
    def band_rows(self) -> int:
        """Rows that are quantised at a time: those of a block, or many that have a scale each."""
        return self.rows if self.rows > 1 else _ROWS_AT_A_TIME

    @property
    def band_elements(self) -> int:
        """The most elements that are quantised at a time."""
        return min(self.band_rows * _columns(self.codes), self.codes.elements)

    @property
    def quantising_bytes(self) -> int:
        """The memory that quantising takes: a band in float32 thrice over, the codes of two, and all scales."""
        return self.band_elements * (3 * 4 + CODE_BUFFERS) + self.scales.elements * 4 + self.scales.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantisedEntry(DerivedEntry):
    """A weight in float32 that is stored in 8 bits; written in bfloat16 unless the recipe says otherwise."""

    scheme: Scheme

    @property
    def output_dtype(self) -> str:
        """The dtype of the output where the recipe names none: what such models are in before they are quantised."""
        return "BF16"


def dequantised(model: Checkpoint) -> Checkpoint:
    """The model with its 8-bit weights as they are meant, without their scales and its `quantization_config`.

    A model quantised in any other way, or not at all, is unchanged. Raises CheckpointError where a weight has no
    scales, or such as do not fit it.
    """
    config = model.config.get("quantization_config")
    if not isinstance(config, Mapping) or not is_fp8(config):
        return model
    block = _block(config, model.location)
    power_of_two = config.get("scale_fmt") == "ue8m0"
    dropped: set[str] = set()
    tensors: dict[str, TensorEntry] = {}
    for name, entry in model.tensors.items():
        if entry.dtype in CODES:
            scales = _scales_of(entry, model)
            tensors[name] = _meant(entry, scales, block, power_of_two, model.location)
            dropped.add(scales.name)
        else:
            tensors[name] = entry
    activation = [n for n, e in tensors.items() if n.endswith(_ACTIVATION_SCALES) and e.is_float and e.elements <= 1]
    notes = model.notes
    if activation:
        notes += (
            f"{len(activation)} scale(s) of activations such as {quoted(activation[0])} in {quoted(model.location)} "
            "are left out: the output is not quantised",
        )
    return replace(
        model,
        tensors={name: entry for name, entry in tensors.items() if name not in dropped.union(activation)},
        config={key: value for key, value in model.config.items() if key != "quantization_config"},
        notes=notes,
        # scales of activations were measured on the model as it was
        quantization=None if activation else config,
    )


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` speaks of nothing but 8-bit floats with scales."""
    method = config.get("quant_method")
    if method != "compressed-tensors":
        return method in METHODS
    weights = list(_compressed_weights(config))
    return bool(weights) and all(
        each.get("type") == "float" and each.get("num_bits") == 8 and each.get("symmetric") is not False
        for each in weights
    )


def _compressed_weights(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What compressed-tensors says of the weights of each group of modules."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        yield weights if isinstance(weights, Mapping) else {}


def _block(config: Mapping[str, Any], location: str) -> tuple[int, int] | None:
    """Rows and columns of a block; None where a scale is a whole row's, or the tensor's."""
    found = [config.get("weight_block_size"), *(each.get("block_structure") for each in _compressed_weights(config))]
    sizes = [size for size in found if size is not None]
    if not sizes:
        return None
    size = sizes[0]
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**31 for side in size)
    if not is_pair or any(each != size for each in sizes):
        raise CheckpointError(
            f"{quoted(location)} has blocks of {quoted(sizes)} in its `quantization_config`, expected two sizes",
            hint="Compare its config.json with the model's original.",
        )
    return size[0], size[1]


def _scales_of(entry: TensorEntry, model: Checkpoint) -> TensorEntry:
    found = [model.tensors[entry.name + end] for end in _WEIGHT_SCALES if entry.name + end in model.tensors]
    if len(found) != 1 or f"{entry.name}_zero_point" in model.tensors:
        raise CheckpointError(
            f"{quoted(entry.name)} in {quoted(model.location)} is {entry.dtype} with {len(found)} tensors of scales, "
            f"expected one, {quoted(entry.name + _WEIGHT_SCALES[0])} or {quoted(entry.name + _WEIGHT_SCALES[1])}",
            hint="Fetch the model again, or dequantise it to bfloat16 with the tool that quantised it.",
        )
    return found[0]


def _meant(
    entry: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None, power_of_two: bool, location: str
) -> DequantisedEntry:
    rows, columns = math.prod(entry.shape[:-1]), _columns(entry)
    derivation = None
    if scales.dtype not in _SCALE_DTYPES:
        pass
    elif block is not None:
        if len(entry.shape) == 2 and scales.shape == (-(-rows // block[0]), -(-columns // block[1])):
            derivation = BlockScales(*block)
    elif scales.elements == 1:
        derivation = BlockScales(max(rows, 1), max(columns, 1))
    elif len(entry.shape) == 2 and scales.shape in ((rows,), (rows, 1)):
        derivation = BlockScales(1, max(columns, 1))
    if derivation is None:
        wanted = f"for each block of {list(block)}" if block else "for each row, or for all"
        raise CheckpointError(
            f"{quoted(scales.name)} in {quoted(location)} is {scales.dtype} {list(scales.shape)}, "
            f"expected a number {wanted} of {quoted(entry.name)} {list(entry.shape)}",
            hint="Fetch the model again, or dequantise it to bfloat16 with the tool that quantised it.",
        )
    return DequantisedEntry(
        name=entry.name,
        dtype="F32",
        shape=entry.shape,
        file=entry.file,
        offset=entry.offset,
        nbytes=entry.elements * DTYPE_BYTES["F32"],
        location=entry.location,
        parts=(entry, scales),
        derivation=derivation,
        scheme=Scheme(
            codes=entry,
            scales=scales,
            rows=derivation.rows,
            columns=derivation.columns,
            power_of_two=power_of_two or scales.dtype == "F8_E8M0",
        ),
    )


def _columns(entry: TensorEntry) -> int:
    return entry.shape[-1] if entry.shape else 1


def _by_rows(begin: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """A run cut where it must be so that each piece is a part of one row, or whole rows."""
    head = min(-(-begin // width) * width, end)
    tail = max(end // width * width, head)
    for first, last in ((begin, head), (head, tail), (tail, end)):
        if first < last:
            yield first, last
