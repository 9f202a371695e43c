"""Hostile bytes for every reader of text from outside: targets, seeds, mutations, and a run that counts.

A target takes bytes and returns when they were read or refused; whatever else it raises is a finding. It needs no
torch, so that `tests/fuzz_atheris.py` can drive it from an environment of its own. By hand:

    python -m tests.fuzzing 100000 --seed 1
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from streammerge.checkpoint import (
    DTYPE_BYTES,
    INDEX_NAME,
    PICKLED_NAMES,
    SINGLE_NAME,
    ByteFile,
    Checkpoint,
    FileFacts,
    load_checkpoint,
)
from streammerge.errors import CheckpointError, OutputError, RecipeError, StreamMergeError
from streammerge.folder import template_of
from streammerge.inspection import Inspection
from streammerge.journal import JOURNAL, Journal
from streammerge.patterns import Pattern, PatternError
from streammerge.recipe import Recipe
from streammerge.rules import layer_count, layer_position, roles

CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 64 << 20
MOST_SECONDS = 5
LARGEST_INPUT = 64 << 10
PROGRESS_SECONDS = 10
# where there is one, a folder that no disk is behind
_IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


class InMemory:
    """Models in memory, whose reads must stay inside their files."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.contents = contents

    def files(self, location: str) -> dict[str, FileFacts]:
        return {name: FileFacts(len(data), 1) for name, data in self.contents.items()}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        # 8 bytes are asked of any file, to see its length field
        if offset < 0 or nbytes > max(8, len(self.contents[name]) - offset):
            raise AssertionError(f"read of [{offset}, {offset + nbytes}) outside of {name}")
        return self.contents[name][offset : offset + nbytes]

    def open(self, location: str, name: str) -> ByteFile:
        raise AssertionError("headers are all that is read")


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any JSON, or any bytes, for a header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: list[int], begin: int) -> dict[str, object]:
    nbytes = DTYPE_BYTES[dtype]
    for side in shape:
        nbytes *= side
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}


def archive_of(members: Mapping[str, bytes]) -> bytes:
    """A zip archive of these members, uncompressed."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return written.getvalue()


def pickled_file(pickle: bytes) -> bytes:
    """What `torch.save` writes, with any pickle in it, around a storage of 12 float32 and one of 5 int64."""
    storages = {"m/data/0": bytes(48), "m/byteorder": b"little", "m/data/1": bytes(40)}
    return archive_of({"m/data.pkl": pickle, **storages})


def _is_shown_safely(error: StreamMergeError) -> None:
    for text in (error.message, error.hint or ""):
        if not text.replace("\n  ", " ").isprintable():
            raise AssertionError(f"printed raw: {text!r}")


def _loaded(contents: Mapping[str, bytes]) -> Checkpoint | None:
    try:
        model = load_checkpoint(InMemory(contents), "m")
    except CheckpointError as error:
        _is_shown_safely(error)
        if not error.hint:
            raise AssertionError(f"no hint: {error.message}") from error
        return None
    ends: dict[str, int] = {}
    for entry in model.tensors.values():
        size = len(contents[entry.file])
        if not 8 <= entry.offset <= entry.offset + entry.nbytes <= size:
            raise AssertionError(f"{entry} leads out of its file of {size} bytes")
        # tied tensors share what they lie in
        if entry.offset < ends.get(entry.file, 0) and entry.file not in PICKLED_NAMES:
            raise AssertionError(f"{entry} overlaps")
        ends[entry.file] = entry.offset + entry.nbytes
        if entry.nbytes != entry.elements * DTYPE_BYTES[entry.dtype]:
            raise AssertionError(f"{entry} has another size than its shape")
    return model


def header(data: bytes) -> None:
    """A safetensors file: ranges inside it, or refused. What it holds can be looked at."""
    model = _loaded({SINGLE_NAME: data})
    if model is None:
        return
    kinds = roles({n: (e.shape, e.dtype) for n, e in model.tensors.items()}, model.config)
    layers = layer_count(model.tensors)
    for name in model.tensors:
        if not 0 <= layer_position(name, layers) <= 1:
            raise AssertionError(f"{name!r} lies outside of the depth")
    json.dumps(Inspection(models=(model,), roles=(kinds,), differences=()).to_dict())


_SHARDS = {
    "a.safetensors": file_of({"a": tensor("F32", [2], 0)}, bytes(8)),
    "b.safetensors": file_of({"b": tensor("BF16", [2, 3], 0), "c": tensor("I64", [], 12)}, bytes(20)),
}


def index(data: bytes) -> None:
    """An index over two sound shards, with a file of another kind beside them."""
    _loaded({INDEX_NAME: data, **_SHARDS, "pytorch_model.bin": b"x"})


def pickled(data: bytes) -> None:
    """Pickled weights, or the pickle of some."""
    _loaded({PICKLED_NAMES[0]: data if data[:2] == b"PK" else pickled_file(data)})


def config(data: bytes) -> None:
    """config.json and tokenizer_config.json of a sound model with names that no rule knows."""
    sound = file_of({"odd.weight": tensor("F32", [2, 2], 0), "layers.1.x": tensor("F32", [1, 1, 2], 16)}, bytes(24))
    model = _loaded({SINGLE_NAME: sound, "config.json": data, "tokenizer_config.json": data})
    if model is None:
        return
    roles({n: (e.shape, e.dtype) for n, e in model.tensors.items()}, model.config)
    # written into the output as UTF-8
    json.dumps(model.config, ensure_ascii=False).encode()
    (template_of(InMemory({"tokenizer_config.json": data}), model) or "").encode()


def recipe(data: bytes) -> None:
    """A recipe: read, written in its normal form and read again."""
    try:
        read = Recipe.from_yaml(data.decode("utf-8", "replace"))
    except RecipeError as error:
        _is_shown_safely(error)
        return
    for rule in read.rules:
        _matches(rule.match, "model.layers.0.self_attn.q_proj.weight")
    for warning in read.warnings:
        if not warning.isprintable():
            raise AssertionError(f"printed raw: {warning!r}")
    if Recipe.from_dict(read.to_dict()) != read:
        raise AssertionError("the normal form is another recipe")
    read.text.encode()


def _matches(pattern: str, name: str) -> bool | None:
    try:
        return Pattern(pattern).is_in(name)
    except PatternError:
        return None


def pattern(data: bytes) -> None:
    """A rule's regular expression and a tensor's name, a line each: an answer, or refused, in bounded time."""
    text = data.decode("utf-8", "replace")
    regex, _, name = text.partition("\n")
    _matches(regex, name[:2000])


def report(data: bytes) -> None:
    """A merge's report, as `verify` reads it back."""
    # whose module loads torch
    from streammerge.report import parse_report

    try:
        table = parse_report(data.decode("utf-8", "replace"), "`streammerge.json`")
    except OutputError as error:
        _is_shown_safely(error)
        return
    for each in table["tensors"]:
        if not isinstance(each["name"], str) or not isinstance(each["sha256"], str):
            raise AssertionError(f"not a tensor's line: {each!r}")


def journal(data: bytes) -> None:
    """The journal of an interrupted merge: read, or refused; what it is read as outlasts what is appended."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_IN_MEMORY) as folder:
        path = Path(folder) / "out.partial" / JOURNAL
        path.parent.mkdir()
        path.write_bytes(data)
        opened = Journal(path)
        try:
            _resumed(opened)
        except OutputError as error:
            _is_shown_safely(error)
            if not error.hint:
                raise AssertionError(f"no hint: {error.message}") from error
        finally:
            opened.close()


def _resumed(opened: Journal) -> None:
    begun = opened.begun()
    if begun is None:
        return
    found = opened.entries(JOURNAL_NAMES)
    if not found.keys() <= set(JOURNAL_NAMES):
        raise AssertionError(f"not of this merge: {found.keys()}")
    opened.append([JOURNAL_LINE])
    name = JOURNAL_LINE["name"]
    # NaN, which is what a method may note, equals nothing
    if repr(opened.entries(JOURNAL_NAMES) | {name: None}) != repr({**found, name: None}):
        raise AssertionError("what is appended changes what was there")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "pickled": pickled,
    "config": config,
    "recipe": recipe,
    "pattern": pattern,
    "journal": journal,
    **({"report": report} if importlib.util.find_spec("torch") else {}),
}

# sound inputs, from which mutation starts

JOURNAL_NAMES = ("a", "b", "model.norm.weight")
JOURNAL_LINE: dict[str, Any] = {
    "name": "a",
    "sha256": "0123456789abcdef" * 4,
    "outcome": {
        "name": "a", "method": "actmat", "facts": {"certificate": 1e-7, "solver": "exact", "rank": 3, "dual": True},
        "norm_ratio": 0.5, "rounding_loss": None, "changed": 1.0, "growth": 0.9, "non_finite": 0,
        "non_finite_inputs": 0, "seconds": 0.25, "kind": "matrix", "shape": [8, 8], "base_norm": 2.0,
        "expert_norms": [0.5, None],
    },
}  # fmt: skip
_JOURNAL = (
    {"format": 2, "recipe": {"merge_method": "actmat"}, "shards": {"model.safetensors": "00"}},
    JOURNAL_LINE,
    {**JOURNAL_LINE, "name": "b", "outcome": {**JOURNAL_LINE["outcome"], "name": "b"}},
)

_TENSORS = {
    "model.embed_tokens.weight": tensor("BF16", [4, 2], 0),
    "model.layers.0.self_attn.q_proj.weight": tensor("F32", [2, 2], 16),
    "model.layers.1.mlp.experts.3.w1.weight": tensor("F16", [2, 2], 32),
    "h.1.attn.c_attn.weight": tensor("F64", [1, 3], 40),
    "empty": tensor("F32", [0, 7], 64),
    "position_ids": tensor("I64", [2], 64),
    "scalar": tensor("BOOL", [], 80),
}
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "num_experts": 2,
    "auto_map": {"AutoModel": "own.Own"},
    "text_config": {"model_type": "gpt2", "rope_theta": 1e6},
    "quantization_config": None,
    "chat_template": "{% for m in messages %}{{ m }}{% endfor %}",
}
_RECIPES = (
    "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 0.5}\n- model: b\n"
    "  parameters: {weight: 1e-1}\n",
    "merge_method: ties\nbase_model: base\nmodels:\n  - model: {model: {path: a, revision: r}}\n    parameters:\n"
    "      density: [{filter: mlp, value: [0, 0.5, 1]}, {value: 1}]\n  - model: b\nparameters: {normalize: true}\n"
    "rules:\n- {match: 'norm|bias$', keep: base}\n- {match: '(^|\\.)layers\\.\\d+\\.', merge_method: linear}\n"
    "dtype: bfloat16\nout_dtype: float32\nrounding: stochastic\nseed: 7\ntokenizer_source: base\nchat_template: auto\n",
    "slices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 2]}\n"
    'merge_method: slerp\nbase_model: a\nparameters: &p {t: 0.5}\nname: "x\\u00e9"\n',
    "merge_method: ties\nbase_model: a\nslices:\n- base_model: b\n  parameters: {density: [0, 1]}\n  sources:\n"
    "  - {model: b, layer_range: [4, 6]}\n  - {model: c, layer_range: [0, 2], key_map: {'^h\\.(\\d+)': 'x.\\1'}}\n"
    "- sources: [{model: a, layer_range: [0, 1]}, {model: c, layer_range: [9, 10], parameters: {weight: 2}}]\n",
)
# {"a": a float32 [3, 4], "tied": the same, "b": a parameter of int64 [5]} with a `_metadata`, by `torch.save`
_PICKLE = (
    b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aq\x02ctorch._utils\n_rebuild_tensor_v2\nq\x03("
    b"(X\x07\x00\x00\x00storageq\x04ctorch\nFloatStorage\nq\x05X\x01\x00\x00\x000q\x06X\x03\x00\x00\x00cpuq\x07K\x0ctq\x08Q"
    b"K\x00K\x03K\x04\x86q\tK\x04K\x01\x86q\n\x89h\x00)Rq\x0btq\x0cRq\rX\x04\x00\x00\x00tiedq\x0eh\rX\x01\x00\x00\x00bq\x0f"
    b"ctorch._utils\n_rebuild_parameter\nq\x10h\x03((h\x04ctorch\nLongStorage\nq\x11X\x01\x00\x00\x001q\x12h\x07K\x05tq\x13Q"
    b"K\x00K\x05\x85q\x14K\x01\x85q\x15\x89h\x00)Rq\x16tq\x17Rq\x18\x88h\x00)Rq\x19\x87q\x1aRq\x1bu"
    b"}q\x1cX\t\x00\x00\x00_metadataq\x1d}q\x1eX\x00\x00\x00\x00q\x1f}q X\x07\x00\x00\x00versionq!K\x01sssb."
)
SEEDS: dict[str, tuple[bytes, ...]] = {
    "pickled": (_PICKLE, pickled_file(_PICKLE)),
    "header": (
        file_of({"__metadata__": {"format": "pt"}, **_TENSORS}, bytes(81)),
        file_of({"a": tensor("F32", [2], 0), "b": tensor("U8", [3, 1], 8)}, bytes(11)),
    ),
    "index": (
        json.dumps(
            {
                "metadata": {"total_size": 28},
                "weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors"},
            }
        ).encode(),
    ),
    "config": (json.dumps(_CONFIG).encode(),),
    "recipe": tuple(text.encode() for text in _RECIPES),
    "pattern": (
        b"(^|\\.)(norm|bias)$\nmodel.norm",
        b"^(a+)+$\naaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
        b"(?i:LAYERS)\\.(\\d+|x{2,3}?)(?=\\.)(?<!q)[^k-m]*+\nmodel.layers.12.mlp",
    ),
    "journal": (b"".join(json.dumps(line).encode() + b"\n" for line in _JOURNAL),),
    "report": (json.dumps({"format": 1, "tensors": [{"name": "a", "sha256": "00", "method": "linear"}]}).encode(),),
}

# mutation

_NUMBERS = (0, 1, -1, 2, 7, 8, 255, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
_TEXTS = (
    "", "../a.safetensors", "/etc/passwd", "a.safetensors", "..\\a.safetensors", "a.bin", "\x1b[2J\x1b]0;x\x07", "\n",
    "\r\n- model: x", "\u202e", "\ud800", "\x00", "\u2028", "F32", "BF16", "F4", "__metadata__", "weight_map",
    "data_offsets", "shape", "dtype", "é", "\U0001f600", "9" * 5000, "layers." + "9" * 5000 + ".x", "x" * 3000,
)  # fmt: skip
_TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"\\u0000", b"null", b"true", b"NaN", b"-Infinity",
    b"1e999", b"1.0", b"-0", b"9" * 400, b"[" * 200, b'{"a":' * 200, b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\x00" * 8, b"\n", b"\t", b"- ", b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system ", b"|\n", b"? ", b"%",
    b"---\n", b"@", b"1:2:3", b"0x", b"(a*)*", b"(?=", b"(?:", b"\\1", b"{2,}", b"+", b"\\b", b"(?P<n>x)",
)  # fmt: skip


def _any_json(chance: random.Random, depth: int = 0) -> object:
    kind = chance.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return chance.choice((None, True, False, 1.0, -0.0, 1e300, float("nan"), float("inf")))
    if kind in (1, 2):
        return chance.choice(_NUMBERS)
    if kind in (3, 4, 5):
        return chance.choice(_TEXTS)
    if kind == 6:
        return [_any_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(_TEXTS): _any_json(chance, depth + 1) for _ in range(chance.randrange(4))}


def _places(value: object) -> Iterator[tuple[dict[object, object] | list[object], object]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield value, key
            yield from _places(child)
    elif isinstance(value, list):
        for position, child in enumerate(value):
            yield value, position
            yield from _places(child)


def _changed_json(chance: random.Random, value: object) -> object:
    places = list(_places(value))
    if not places or chance.random() < 0.02:
        return _any_json(chance)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        holder, key = chance.choice(places)
        what = chance.randrange(6)
        old = holder.get(key) if isinstance(holder, dict) else holder[key] if key < len(holder) else None  # type: ignore[operator,index]
        if what == 0 and isinstance(old, int):
            new: object = old + chance.choice((-8, -4, -1, 1, 4, 8))
        elif what == 1:
            new = chance.choice(places)[0]
            new = json.loads(json.dumps(new)) if len(json.dumps(new)) < 2000 else 0
        elif what == 2 and isinstance(holder, dict):
            holder.pop(key, None)
            continue
        elif what == 3 and isinstance(holder, dict):
            holder[chance.choice(_TEXTS)] = holder.pop(key, None)
            continue
        elif what == 4:
            new = chance.choice(_NUMBERS)
        else:
            new = _any_json(chance)
        if isinstance(holder, dict) or (isinstance(key, int) and key < len(holder)):
            holder[key] = new  # type: ignore[index]
    return value


def _changed_bytes(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(len(changed) + 1)
        what = chance.randrange(7)
        if what == 0 and place < len(changed):
            changed[place] = chance.randrange(256)
        elif what == 1 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif what == 2:
            changed[place:place] = chance.choice(_TOKENS)
        elif what == 3:
            del changed[place : place + chance.choice((1, 2, 8, 100))]
        elif what == 4:
            other = chance.randrange(len(changed) + 1)
            changed[place:place] = changed[other : other + chance.choice((1, 4, 16, 200))]
        elif what == 5:
            token = chance.choice(_TOKENS)
            changed[place : place + len(token)] = token
        else:
            digits = list(re.finditer(rb"\d+", changed))
            if digits:
                found = chance.choice(digits)
                changed[found.start() : found.end()] = str(chance.choice(_NUMBERS)).encode()
    return bytes(changed[:LARGEST_INPUT])


def mutated(chance: random.Random, name: str, data: bytes) -> bytes:
    """Another input for a target: changed in its bytes, or in its grammar where it has one."""
    if name == "header":
        length = int.from_bytes(data[:8], "little")
        text, rest = data[8 : 8 + length], data[8 + length :]
        what = chance.randrange(4)
        if what == 0:
            return _changed_bytes(chance, data)
        text = _changed_text(chance, text) if what < 3 else _changed_bytes(chance, text)
        if chance.random() < 0.2:
            rest = rest[: chance.randrange(len(rest) + 1)] + bytes(chance.choice((0, 0, 1, 8)))
        return (len(text).to_bytes(8, "little") + text + rest)[:LARGEST_INPUT]
    if name in ("index", "config", "report") and chance.random() < 0.6:
        return _changed_text(chance, data)
    if name == "journal" and chance.random() < 0.6:
        lines = data.splitlines(keepends=True) or [b""]
        place = chance.randrange(len(lines))
        lines[place] = _changed_text(chance, lines[place]) + (b"\n" if chance.random() < 0.95 else b"")
        return b"".join(lines)[:LARGEST_INPUT]
    return _changed_bytes(chance, data)


def _changed_text(chance: random.Random, text: bytes) -> bytes:
    try:
        changed = json.dumps(_changed_json(chance, json.loads(text)), ensure_ascii=chance.random() < 0.5)
    except (ValueError, RecursionError):
        return _changed_bytes(chance, text)
    return changed.encode("utf-8", "surrogatepass")[:LARGEST_INPUT]


def corpus(name: str) -> list[bytes]:
    """The sound inputs of a target, and those that were kept."""
    return [*SEEDS[name], *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]


# a run


class TooSlow(AssertionError):
    """An input that took more than MOST_SECONDS."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(name: str, data: bytes) -> int:
    """Give a target one input within its limits of time and memory. Returns the bytes it took at most."""
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with time_limit():
            TARGETS[name](data)
    except Exception as error:
        raise AssertionError(f"{name} raised {error!r} for {data[:2000]!r}") from error
    taken = tracemalloc.get_traced_memory()[1] - before
    if taken > MOST_BYTES:
        raise AssertionError(f"{name} took {taken} bytes for {data[:2000]!r}")
    return taken


def run(
    name: str, executions: int, seed: int, seconds: float | None = None, *, measured: bool = True
) -> dict[str, float]:
    """Mutate and try, from the seeds and what the corpus keeps. Raises for the first input that breaks something.

    measured  what each input takes is traced, four times slower; else the process may not grow as a whole
    """
    chance = random.Random(f"{name} {seed}")
    pool = corpus(name)
    largest, slowest, done = 0, 0.0, 0
    # what is loaded on first use is loaded before anything is measured
    TARGETS[name](pool[0])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, told = time.monotonic(), 0.0
    if measured:
        tracemalloc.start()
    try:
        for data in pool:
            attempt(name, data)
        for _ in range(executions):
            data = mutated(chance, name, chance.choice(pool))
            # changes of changes: further out than one step from what is sound
            while chance.random() < 0.4:
                data = mutated(chance, name, data)
            before = time.perf_counter()
            largest = max(largest, attempt(name, data))
            slowest = max(slowest, time.perf_counter() - before)
            done += 1
            elapsed = time.monotonic() - started
            if elapsed > told + PROGRESS_SECONDS:
                told = elapsed
                sys.stderr.write(f"{name}: {done} of {executions} in {elapsed:.0f} s\n")
            if seconds is not None and elapsed > seconds:
                break
    finally:
        tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) << 10
    if grown > MOST_BYTES:
        raise AssertionError(f"{name} let the process grow by {grown} bytes")
    return {
        "executions": done,
        "seconds": round(time.monotonic() - started, 1),
        "most_bytes": largest,
        "grown_bytes": grown,
        "slowest_seconds": round(slowest, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("executions", type=int, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seconds", type=float, help="of each target, at most")
    parser.add_argument("--measured", action="store_true", help="trace the memory of each input")
    options = parser.parse_args()
    for name in options.target or TARGETS:
        found = run(name, options.executions, options.seed, options.seconds, measured=options.measured)
        sys.stdout.write(json.dumps({"target": name, "seed": options.seed, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
