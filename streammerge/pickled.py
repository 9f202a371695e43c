"""Pickled weights as named, shaped, typed byte ranges: what `torch.save` wrote, never unpickled.

The format: an uncompressed zip archive with a pickle, `data.pkl`, and one member for each storage. The pickle is a
program; the few of its instructions that describe tensors are followed here, and any other is refused.
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.errors import CheckpointError, quoted
from streammerge.zipped import DAMAGED, Archive, ReadRange, read_archive

PICKLED_ENDINGS = (".bin", ".pt", ".pth")
PICKLE_LIMIT_BYTES = 64_000_000
# some thirty for each tensor
MOST_INSTRUCTIONS = 4_000_000
# what trainers put a state dict in
_WRAPPINGS = ("state_dict", "model")
_CONVERT = "Convert it to safetensors where you trust it: load with transformers, then `save_pretrained`."


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """One tensor: `nbytes` bytes from byte `offset` of the file, `shape` elements of `dtype`, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_pickled(read: ReadRange, file_bytes: int, label: str) -> tuple[list[PickledTensor], str]:
    """The tensors of a file, in the order of their bytes, and a digest of all that describes them.

    read   gives ranges of the file
    label  what messages call the file

    Tied tensors share a range. Raises CheckpointError unless the file is a dict of names to dense, row-major tensors,
    each inside its storage: also for pickles before torch 1.6 and those of the other byte order.
    """
    archive, root, pickle = _opened(read, file_bytes, label)
    offsets: dict[str, int] = {}
    tensors = [
        _placed(name, tensor, archive, root, offsets)
        for name, tensor in _state_dict(_Machine(pickle, label).run(), label).items()
    ]
    return sorted(tensors, key=lambda t: (t.offset, t.nbytes)), _digest(archive, pickle)


def pickled_digest(read: ReadRange, file_bytes: int, label: str) -> str:
    """The digest alone. Raises CheckpointError when the file is no longer of the kind."""
    archive, _, pickle = _opened(read, file_bytes, label)
    return _digest(archive, pickle)


def _digest(archive: Archive, pickle: bytes) -> str:
    # the directory holds a checksum of each storage
    return hashlib.sha256(archive.directory + pickle).hexdigest()


def _opened(read: ReadRange, file_bytes: int, label: str) -> tuple[Archive, str, bytes]:
    """The archive, the folder in it that all members lie in, and the pickle."""
    start = read(0, 4)
    if start != b"PK\3\4":
        raise CheckpointError(
            f"{label} is no zip archive, which `torch.save` has written since torch 1.6"
            + (": its weights are pickled the older way" if start[:1] == b"\x80" else ""),
            hint=_CONVERT,
        )
    archive = read_archive(read, file_bytes, label)
    found = [name for name in archive.members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(f"{label} has {len(found)} members `data.pkl`, expected one", hint=DAMAGED)
    root = found[0].removesuffix("data.pkl")
    order = archive.members.get(f"{root}byteorder")
    if order is not None and (order.nbytes != 6 or archive.content(order) != b"little"):
        raise CheckpointError(f"{label} was written on a machine of another byte order", hint=_CONVERT)
    member = archive.members[found[0]]
    if member.nbytes > PICKLE_LIMIT_BYTES:
        raise CheckpointError(
            f"{label} has a pickle of {member.nbytes} bytes, more than the limit of {PICKLE_LIMIT_BYTES}", hint=DAMAGED
        )
    pickle = archive.content(member)
    if zlib.crc32(pickle) != member.crc32:
        raise CheckpointError(f"{label} has a pickle whose checksum is another", hint=DAMAGED)
    return archive, root, pickle


# what a pickle of tensors makes, by the names of what would make it: none of these names is ever looked up


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    first_element: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Dtype:
    """A dtype, or the storage of one; None of bytes whose dtype each tensor says."""

    code: str | None


_Function = Callable[[Sequence[Any]], Any]

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 16 or not all(map(_is_size, value)):
        raise ValueError("a shape that is not a short tuple of sizes")
    return value


def _tensor(arguments: Sequence[Any], dtype: str | None) -> _Tensor:
    storage, first_element, shape, strides, _, hooks, *metadata = arguments
    if not isinstance(storage, _Storage) or not _is_size(first_element) or dtype is None:
        raise ValueError("a tensor without a storage, a place in it or a dtype")
    if hooks or any(metadata) or len(metadata) > 1:
        raise ValueError("a tensor with hooks, or whose numbers are to be conjugated or negated")
    if len(_sizes(shape)) != len(_sizes(strides)):
        raise ValueError("a tensor with as many strides as it has not sides")
    return _Tensor(storage, dtype, first_element, shape, strides)


def _typed_tensor(arguments: Sequence[Any]) -> _Tensor:
    return _tensor(arguments, arguments[0].dtype if arguments and isinstance(arguments[0], _Storage) else None)


def _untyped_tensor(arguments: Sequence[Any]) -> _Tensor:
    *first, dtype = arguments[:7]
    return _tensor([*first, *arguments[7:]], dtype.code if isinstance(dtype, _Dtype) else None)


def _parameter(arguments: Sequence[Any]) -> _Tensor:
    tensor, _, hooks, *_ = arguments
    if not isinstance(tensor, _Tensor) or hooks:
        raise ValueError("a parameter that is no tensor, or one with hooks")
    return tensor


def _empty_dict(arguments: Sequence[Any]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("a dict made of arguments")
    return {}


_KNOWN: Mapping[tuple[str, str], _Function | _Dtype] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _typed_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _untyped_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): lambda arguments: _sizes(*arguments),
    ("torch.storage", "UntypedStorage"): _Dtype(None),
    **{
        ("torch", f"{name}Storage"): _Dtype(code)
        for name, code in {
            "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
            "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
        }.items()
    },
    **{
        ("torch", name): _Dtype(code)
        for name, code in {
            "uint16": "U16", "uint32": "U32", "uint64": "U64",
            "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
        }.items()
    },
}  # fmt: skip


class _Machine:
    """Follows a pickle's instructions: dicts, lists, tuples, texts, numbers and what `_KNOWN` lists, nothing else."""

    def __init__(self, pickle: bytes, label: str) -> None:
        self._pickle, self._label = pickle, label
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle makes. Raises CheckpointError for a pickle of anything but tensors."""
        for _ in range(MOST_INSTRUCTIONS):
            began, code = self._at, self._pickle[self._at : self._at + 1]
            self._at += 1
            if code == b"." and len(self._stack) == 1 and self._at == len(self._pickle):
                return self._stack[0]
            if code not in _INSTRUCTIONS:
                raise self._refusal(f"has {quoted(code.hex())} at byte {began} of its pickle, which no tensor needs")
            try:
                _INSTRUCTIONS[code](self)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                reason = f"has a pickle that makes no sense at byte {began}: {quoted(error)}"
                raise self._refusal(reason) from error
        raise self._refusal(f"has a pickle of more than {MOST_INSTRUCTIONS} instructions")

    def _refusal(self, reason: str, hint: str = DAMAGED) -> CheckpointError:
        return CheckpointError(f"{self._label} {reason}", hint=hint)

    def _take(self, nbytes: int) -> bytes:
        taken = self._pickle[self._at : self._at + nbytes]
        if len(taken) < nbytes:
            raise ValueError("it ends here")
        self._at += nbytes
        return taken

    def _skip(self, nbytes: int) -> None:
        self._take(nbytes)

    def _number(self, nbytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(nbytes), "little", signed=signed)

    def _line(self) -> str:
        end = self._pickle.index(b"\n", self._at)
        return self._take(end + 1 - self._at)[:-1].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _marked(self) -> list[Any]:
        found, self._stack = self._stack, self._marks.pop()
        return found

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, length: int) -> None:
        values = self._stack[-length:]
        if len(values) < length:
            raise ValueError("too few values for a tuple")
        self._stack[-length:] = [tuple(values)]

    def _keep(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _set(self, pairs: Sequence[Any]) -> None:
        table = self._stack[-1]
        if not isinstance(table, dict) or len(pairs) % 2:
            raise ValueError("pairs for what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError("a key that is no text")
            if key in table:
                raise ValueError(f"the key {key[:100]} twice")
            table[key] = value

    def _append(self, values: Sequence[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("items for what is no list")
        self._stack[-1].extend(values)

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set((key, value))

    def _append_one(self) -> None:
        self._append((self._stack.pop(),))

    def _known(self, module: str, name: str) -> None:
        known = _KNOWN.get((module, name))
        if known is None:
            raise self._refusal(
                f"holds more than tensors: its pickle asks for {quoted(f'{module}.{name}')}, which was not run",
                hint="Do not load it with tools that unpickle unless you trust its source. "
                "Of your own: save the `state_dict()` alone.",
            )
        self._push(known)

    def _stacked_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self._known(module, name)

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple) or not callable(function):
            raise ValueError("a call of what is no function")
        self._push(function(arguments))

    def _storage(self) -> None:
        kind, dtype, key, _, elements = self._stack.pop()
        if kind != "storage" or not isinstance(dtype, _Dtype) or not isinstance(key, str) or not _is_size(elements):
            raise ValueError("a reference to something other than a storage")
        self._push(_Storage(dtype.code, key, elements))

    def _drop_state(self) -> None:
        # of a state dict: the versions of its modules
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise ValueError("a state for what is no dict")


_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m._skip(1),  # the protocol
    b"\x95": lambda m: m._skip(8),  # a frame, whose length readers of streams need
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number(4, signed=True)),
    b"K": lambda m: m._push(m._number(1)),
    b"M": lambda m: m._push(m._number(2)),
    b"\x8a": lambda m: m._push(m._number(m._number(1), signed=True)),
    b"G": lambda m: m._push(m._take(8)),  # a float, which no tensor needs: its bytes stand for it
    b"X": lambda m: m._push(m._take(m._number(4)).decode()),
    b"\x8c": lambda m: m._push(m._take(m._number(1)).decode()),
    b"\x8d": lambda m: m._push(m._take(m._number(8)).decode()),
    b"(": _Machine._mark,
    b"t": lambda m: m._push(tuple(m._marked())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"q": lambda m: m._keep(m._number(1)),
    b"r": lambda m: m._keep(m._number(4)),
    b"\x94": lambda m: m._keep(len(m._memo)),
    b"h": lambda m: m._push(m._memo[m._number(1)]),
    b"j": lambda m: m._push(m._memo[m._number(4)]),
    b"s": _Machine._set_one,
    b"u": lambda m: m._set(m._marked()),
    b"a": _Machine._append_one,
    b"e": lambda m: m._append(m._marked()),
    b"c": lambda m: m._known(m._line(), m._line()),
    b"\x93": _Machine._stacked_name,
    b"R": _Machine._call,
    b"Q": _Machine._storage,
    b"b": _Machine._drop_state,
}


def _state_dict(value: Any, label: str) -> dict[str, _Tensor]:
    wrapped = isinstance(value, dict) and not any(isinstance(each, _Tensor) for each in value.values())
    if wrapped:
        value = next((value[key] for key in _WRAPPINGS if isinstance(value.get(key), dict)), value)
    if not isinstance(value, dict):
        raise CheckpointError(f"{label} is no dict of names to tensors", hint=_CONVERT)
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise CheckpointError(
                f"{quoted(name)} in {label} is no tensor", hint="Save the model's `state_dict()` alone."
            )
    return value


def _placed(name: str, tensor: _Tensor, archive: Archive, root: str, offsets: dict[str, int]) -> PickledTensor:
    label, item_bytes = archive.label, _ITEM_BYTES[tensor.dtype]
    key = tensor.storage.key
    member = archive.members.get(f"{root}data/{key}")
    stored_bytes = tensor.storage.elements * (_ITEM_BYTES[tensor.storage.dtype] if tensor.storage.dtype else 1)
    if member is None or member.nbytes != stored_bytes:
        found = "is not there" if member is None else f"has {member.nbytes} bytes"
        raise CheckpointError(
            f"{quoted(name)} in {label} lies in a storage of {stored_bytes} bytes that {found}", hint=DAMAGED
        )
    elements = math.prod(tensor.shape)
    begin, nbytes = tensor.first_element * item_bytes, elements * item_bytes
    if elements and not _is_row_major(tensor.shape, tensor.strides):
        raise CheckpointError(
            f"{quoted(name)} in {label} is a view with the strides {list(tensor.strides)}, "
            f"expected its {list(tensor.shape)} row by row",
            hint="Save it again, each tensor with `.contiguous()`, or convert it to safetensors.",
        )
    if begin + nbytes > stored_bytes or math.prod(filter(None, tensor.shape)) * item_bytes >= 2**63:
        raise CheckpointError(
            f"{quoted(name)} in {label} takes the bytes [{begin}, {begin + nbytes}) of a storage of {stored_bytes}",
            hint=DAMAGED,
        )
    if key not in offsets:
        offsets[key] = archive.data_offset(member)
    return PickledTensor(name, tensor.dtype, tensor.shape, offsets[key] + begin, nbytes)


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side > 1 and stride != expected:
            return False
        expected *= side
    return True
