"""A model as named, shaped, typed byte ranges: safetensors headers and indexes, read and distrusted.

The format: 8 bytes little-endian header length N, N bytes of JSON, then the data without holes.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

from streammerge.errors import CheckpointError, listed, quoted
from streammerge.pickled import PICKLED_ENDINGS, pickled_digest, read_pickled

HEADER_LIMIT_BYTES = 100_000_000
JSON_LIMIT_BYTES = 100_000_000
DEEPEST_JSON = 64
# half a million tensors, of which no file has a tenth: values take some 30 times the bytes of their text
MOST_JSON_VALUES = 4_000_000
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAMES = tuple(f"{stem}{ending}" for stem in ("pytorch_model", "model") for ending in PICKLED_ENDINGS)
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
INTEGER_DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Size in bytes and time of last change in nanoseconds."""

    size: int
    modified_ns: int


class ByteFile(Protocol):
    """An open file of tensor data, read in ranges."""

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """The bytes [offset, offset + nbytes): read into `buffer`, or a view that needs no copy."""

    def release(self, offset: int, nbytes: int) -> None:
        """The range is done with: give back the memory and the page cache that reading it took."""

    def close(self) -> None:
        """No more reads."""


class Storage(Protocol):
    """Where models live. Locations are `str`: a `Path` would collapse the slashes of a URL."""

    def files(self, location: str) -> dict[str, FileFacts]:
        """The plain files of a model. Raises CheckpointError when the location is not a model folder."""

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        """A small range of a file; fewer bytes only at the file's end."""

    def open(self, location: str, name: str) -> ByteFile:
        """Open a file for reading tensor data."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `nbytes` bytes from byte `offset` of `file`, `shape` elements of `dtype`.

    location  the folder that the file lies in; None for that of the checkpoint that lists the tensor
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    location: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads, each once."""
        return self.nbytes

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def output_dtype(self) -> str:
        """The dtype that it has in the output where the recipe names none."""
        return self.dtype

    @property
    def is_float(self) -> bool:
        """Whether it can be merged; anything else passes through."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model: its tensors by name, in file order, and what its folder's other files say.

    location  the folder
    files, header_sha256  of that folder: all plain files; those of weights, by the digest of their headers
    besides   other folders that some of the tensors are made of, such as an adapter's
    notes     what of the folder's content is not in `tensors`, for the plan to warn of
    quantization  the `quantization_config` that `tensors` are read through, and that an output may have again
    """

    location: str
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any]
    files: Mapping[str, FileFacts]
    header_sha256: Mapping[str, str]
    besides: tuple[Checkpoint, ...] = ()
    notes: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.tensors.values())


def load_checkpoint(storage: Storage, location: str) -> Checkpoint:
    """Read a model's headers. No tensor data is touched.

    A folder with safetensors is read from those, whatever pickled weights lie beside them. Raises CheckpointError,
    naming the file, for anything that is not a sound model.
    """
    files = storage.files(location)
    tensors: dict[str, TensorEntry] = {}
    hashes: dict[str, str] = {}
    whole, index = _weights(location, files)
    weight_map = _read_index(storage, location, index, files) if index else None
    promised: dict[str, set[str]] = {whole: set()} if whole else {}
    for tensor, shard in (weight_map or {}).items():
        promised.setdefault(shard, set()).add(tensor)
    for shard in sorted(promised):
        read = _read_pickled if shard.endswith(PICKLED_ENDINGS) else _read_header
        entries, hashes[shard] = read(storage, location, shard, files[shard].size)
        if index is not None:
            _match_index(location, shard, index, entries.keys(), promised[shard])
        tensors.update(entries)
    if not tensors:
        raise CheckpointError(f"{quoted(location)} holds no tensors", hint=_UNREADABLE)
    return Checkpoint(
        location=location,
        tensors=tensors,
        config=_read_config(storage, location, files),
        files=files,
        header_sha256=hashes,
    )


def load_single(storage: Storage, location: str, name: str, config_name: str) -> Checkpoint:
    """A folder's one file of tensors and its config, a JSON object, that have names of their own.

    Changes of the config count as changes of the tensors: it is among `header_sha256`, whole.
    """
    files = storage.files(location)
    tensors, digest = _read_header(storage, location, name, files[name].size)
    config = _read_json_file(storage, location, config_name, files)
    if not isinstance(config, dict):
        raise CheckpointError(f"{_label(location, config_name)} is not a JSON object", hint=_UNREADABLE)
    return Checkpoint(
        location=location,
        tensors=tensors,
        config=config,
        files=files,
        header_sha256={name: digest, config_name: _json_digest(storage, location, config_name)},
    )


def parse_header(header: bytes, data_bytes: int, file: str, label: str) -> dict[str, TensorEntry]:
    """Parse and check a safetensors header.

    header      the JSON text; the data begins 8 bytes after its length field plus its own length
    data_bytes  how many bytes of data follow it in the file
    label       what messages call the file

    Returns the entries in the order of their bytes. Raises CheckpointError unless every range has the
    size of its shape and dtype and the ranges tile the data exactly.
    """
    data_start = 8 + len(header)
    table = parse_json(header, label)
    if not isinstance(table, dict):
        raise CheckpointError(f"{label} has a header that is not a JSON object", hint=_DAMAGED)
    table.pop("__metadata__", None)
    entries = sorted(
        (_entry(name, facts, file, data_start, label) for name, facts in table.items()),
        key=attrgetter("offset", "nbytes"),
    )
    expected = data_start
    for entry in entries:
        if entry.offset != expected:
            kind = "overlaps the tensor before it" if entry.offset < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{quoted(entry.name)} in {label} {kind}: begins at byte {entry.offset}, expected {expected}",
                hint=_DAMAGED,
            )
        expected += entry.nbytes
    found = data_start + data_bytes
    if found != expected:
        raise CheckpointError(
            f"{label} ends at byte {found} but its header describes {expected}",
            hint="The download is incomplete. Compare with the size on the hub." if found < expected else _DAMAGED,
        )
    return {entry.name: entry for entry in entries}


def changed_files(storage: Storage, model: Checkpoint) -> list[str]:
    """Files of tensors that are no longer what they were when `model` was loaded, each with what changed."""
    files = storage.files(model.location)
    found = [line for beside in model.besides for line in changed_files(storage, beside)]
    for name, digest in model.header_sha256.items():
        label, before, now = _label(model.location, name), model.files[name], files.get(name)
        if now is None:
            found.append(f"{label} is gone")
        elif now.size != before.size:
            found.append(f"{label} had {before.size} bytes and has {now.size}")
        elif now.modified_ns != before.modified_ns:
            found.append(f"{label} was written to: its modification time is another")
        elif _header_digest(storage, model.location, name, now.size) != digest:
            found.append(f"{label} was written to: its header is another")
    return found


def _header_digest(storage: Storage, location: str, name: str, file_bytes: int) -> str | None:
    """SHA-256 of what says where a file's tensors lie, or of all of a JSON file."""
    if name.endswith(PICKLED_ENDINGS):
        try:
            return pickled_digest(partial(storage.read, location, name), file_bytes, _label(location, name))
        except CheckpointError:
            return None
    if name.endswith(".json"):
        return _json_digest(storage, location, name)
    length = int.from_bytes(storage.read(location, name, 0, 8), "little")
    header = storage.read(location, name, 8, min(length, HEADER_LIMIT_BYTES))
    return hashlib.sha256(header).hexdigest()


def _json_digest(storage: Storage, location: str, name: str) -> str:
    return hashlib.sha256(storage.read(location, name, 0, JSON_LIMIT_BYTES)).hexdigest()


_DAMAGED = "The file is damaged or was not written by safetensors. Fetch it again."
_UNREADABLE = "The file is damaged. Fetch it again."


def parse_json(text: bytes, label: str) -> Any:
    """JSON from outside: repeated keys, absurd nesting and text that UTF-8 cannot hold are errors like any other."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{label} has the key {quoted(repeated)} twice", hint=_UNREADABLE)
        return table

    # counted before anything is built; the commas and brackets inside texts count too
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_JSON_VALUES:
        raise CheckpointError(f"{label} holds more than {MOST_JSON_VALUES} JSON values", hint=_UNREADABLE)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_repeats)
        if b"\\u" in text:
            # an escaped half of a surrogate pair parses, but no file or terminal takes it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label} does not hold readable JSON: {error}", hint=_UNREADABLE) from error
    if _is_deeper_than(DEEPEST_JSON, value):
        raise CheckpointError(f"{label} nests JSON deeper than {DEEPEST_JSON} levels", hint=_UNREADABLE)
    return value


def _is_deeper_than(levels: int, value: Any) -> bool:
    # level by level: recursion is what absurd nesting would exhaust
    level = [value]
    for _ in range(levels + 1):
        if not level:
            return False
        # most values are the numbers of shapes and offsets: of those no more is asked than their class
        inside = [list(each.values()) for each in level if each.__class__ is dict]
        inside += [each for each in level if each.__class__ is list]
        level = list(chain.from_iterable(inside))
    return bool(level)


def _entry(name: str, facts: Any, file: str, data_start: int, label: str) -> TensorEntry:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{quoted(name)} in {label} {reason}", hint=_DAMAGED)

    if not isinstance(facts, dict) or not ("dtype" in facts and "shape" in facts and "data_offsets" in facts):
        raise refuse("lacks a dtype, shape or data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refuse(f"has the unknown dtype {quoted(dtype)}")
    if not isinstance(shape, list) or len(shape) > 16 or not _are_sizes(shape):
        raise refuse("has a shape that is not a short list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_sizes(offsets):
        raise refuse("has data_offsets that are not two byte positions")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise refuse(f"spans {end - begin} bytes but {dtype} {shape} takes {nbytes}")
    # beside a zero: other readers multiply in 64 bits, and in the order of the sides
    if not nbytes and math.prod(filter(None, shape)) * DTYPE_BYTES[dtype] >= 2**63:
        raise refuse(f"has the shape {shape}, whose bytes no 64-bit number counts")
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _are_sizes(numbers: list[Any]) -> bool:
    # not by a function for each: there are four numbers for each tensor of each model
    return not [n for n in numbers if type(n) is not int or not 0 <= n < 2**63]


def _read_header(storage: Storage, location: str, name: str, file_bytes: int) -> tuple[dict[str, TensorEntry], str]:
    label = _label(location, name)
    length_field = storage.read(location, name, 0, 8)
    if len(length_field) < 8:
        raise CheckpointError(f"{label} has {file_bytes} bytes, too few for a header", hint=_DAMAGED)
    length = int.from_bytes(length_field, "little")
    if length > HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"{label} announces a header of {length} bytes, more than the limit of {HEADER_LIMIT_BYTES}",
            hint=_DAMAGED,
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{label} ends at byte {file_bytes}, inside its header of {length} bytes",
            hint="The download is incomplete. Compare with the size on the hub.",
        )
    header = storage.read(location, name, 8, length)
    if len(header) < length:
        raise CheckpointError(f"{label} became shorter while it was read", hint=_UNREADABLE)
    entries = parse_header(header, file_bytes - 8 - length, name, label)
    return entries, hashlib.sha256(header).hexdigest()


def _read_pickled(storage: Storage, location: str, name: str, file_bytes: int) -> tuple[dict[str, TensorEntry], str]:
    found, digest = read_pickled(partial(storage.read, location, name), file_bytes, _label(location, name))
    return {t.name: TensorEntry(t.name, t.dtype, t.shape, name, t.offset, t.nbytes) for t in found}, digest


def _weights(location: str, files: Mapping[str, FileFacts]) -> tuple[str | None, str | None]:
    """The one file that holds all weights, or else the index of several."""
    if SINGLE_NAME in files:
        return SINGLE_NAME, None
    if INDEX_NAME in files:
        return None, INDEX_NAME
    pickled = [name for name in PICKLED_NAMES if name in files]
    if PICKLED_INDEX_NAME in files and not pickled:
        return None, PICKLED_INDEX_NAME
    if len(pickled) == 1 and PICKLED_INDEX_NAME not in files:
        return pickled[0], None
    raise _no_weights(location, files)


def _read_index(storage: Storage, location: str, name: str, files: Mapping[str, FileFacts]) -> dict[str, str]:
    label = _label(location, name)
    index = _read_json_file(storage, location, name, files)
    kind, ending = ("pickled", ".bin") if name == PICKLED_INDEX_NAME else ("safetensors", ".safetensors")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label} has no `weight_map`", hint=_UNREADABLE)
    for tensor, shard in weight_map.items():
        # only names of files in the model's own folder: never a path that leads elsewhere
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(ending):
            raise CheckpointError(
                f"{label} places {quoted(tensor)} in {quoted(shard)}, which is not a {kind} file name",
                hint="Shards lie beside the index. Do not use models from sources you do not trust.",
            )
        if shard not in files:
            raise CheckpointError(
                f"{label} names the shard {quoted(shard)}, which is not there",
                hint="The download is incomplete. Fetch the missing shard.",
            )
    return weight_map


def _match_index(location: str, shard: str, index: str, found: Set[str], promised: Set[str]) -> None:
    problems = [f"{quoted(n)} is in the index but not in the file" for n in sorted(promised - found)]
    problems += [f"{quoted(n)} is in the file but not in the index" for n in sorted(found - promised)]
    if problems:
        raise CheckpointError(
            f"{_label(location, shard)} does not match {quoted(index)}:{listed(problems)}",
            hint="The folder mixes files of two models or two downloads. Fetch it again.",
        )


def _no_weights(location: str, files: Mapping[str, FileFacts]) -> CheckpointError:
    found = f"no {quoted(SINGLE_NAME)} and no {quoted(INDEX_NAME)}"
    if "adapter_model.safetensors" in files:
        return CheckpointError(
            f"{quoted(location)} has {found}: it holds an adapter",
            hint="Name it beside its base, as BASE+ADAPTER, with its `adapter_config.json`.",
        )
    pickled = [name for name in files if name.endswith(PICKLED_ENDINGS)]
    if pickled:
        return CheckpointError(
            f"{quoted(location)} has {found}: of {len(pickled)} pickled file{'s' if len(pickled) > 1 else ''} "
            f"such as {quoted(pickled[0])} none is known to be all of its weights",
            hint=f"Pickled weights are read from {quoted(PICKLED_NAMES[0])}, from the shards of "
            f"{quoted(PICKLED_INDEX_NAME)}, or from one file {quoted('model')} with such an ending. "
            "Or convert them to safetensors: load with transformers, then `save_pretrained`.",
        )
    return CheckpointError(f"{quoted(location)} has {found}", hint="Name a Hugging Face model folder.")


def _read_config(storage: Storage, location: str, files: Mapping[str, FileFacts]) -> dict[str, Any]:
    if "config.json" not in files:
        return {}
    config = _read_json_file(storage, location, "config.json", files)
    if not isinstance(config, dict):
        raise CheckpointError(f"{_label(location, 'config.json')} is not a JSON object", hint=_UNREADABLE)
    return config


def _read_json_file(storage: Storage, location: str, name: str, files: Mapping[str, FileFacts]) -> Any:
    if files[name].size > JSON_LIMIT_BYTES:
        raise CheckpointError(
            f"{_label(location, name)} has {files[name].size} bytes, over the limit of {JSON_LIMIT_BYTES}",
            hint=_UNREADABLE,
        )
    return parse_json(storage.read(location, name, 0, files[name].size), _label(location, name))


def _label(location: str, name: str) -> str:
    return quoted(f"{location.rstrip('/')}/{name}")
