"""Check a merged folder against its report: headers, every tensor's bytes, non-finite values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from streammerge.checkpoint import ByteFile, Storage, TensorEntry, load_checkpoint
from streammerge.errors import OutputError, quoted
from streammerge.folder import REPORT_NAME
from streammerge.report import parse_report
from streammerge.step import COPY
from streammerge.streamed_deltas import TORCH_DTYPES

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verifying found; `problems` is empty for a folder that is as it was written."""

    tensors: int
    read_bytes: int
    problems: tuple[str, ...]


def verify(location: str, storage: Storage) -> Verification:
    """Read a merged folder whole, in bounded memory.

    Raises CheckpointError when its files are not a sound model, OutputError when it has no report.
    """
    model = load_checkpoint(storage, location)
    label = quoted(f"{location}/{REPORT_NAME}")
    if REPORT_NAME not in model.files:
        raise OutputError(f"{label} does not exist", hint="Only folders that streammerge wrote can be verified.")
    text = storage.read(location, REPORT_NAME, 0, model.files[REPORT_NAME].size)
    report = parse_report(text.decode("utf-8", "replace"), label)
    expected = {tensor["name"]: tensor["sha256"] for tensor in report["tensors"]}
    # a copy keeps the infinities that its model had, such as a stored mask's
    copied = {tensor["name"] for tensor in report["tensors"] if tensor.get("method") == COPY}
    problems = [f"{quoted(n)} is in the report but not in the files" for n in expected.keys() - model.tensors.keys()]
    problems += [f"{quoted(n)} is in the files but not in the report" for n in model.tensors.keys() - expected.keys()]
    files: dict[str, ByteFile] = {}
    try:
        for name, entry in model.tensors.items():
            if entry.file not in files:
                files[entry.file] = storage.open(location, entry.file)
            problems += _check(files[entry.file], entry, expected.get(name), must_be_finite=name not in copied)
    finally:
        for file in files.values():
            file.close()
    return Verification(tensors=len(model.tensors), read_bytes=model.tensor_bytes, problems=tuple(sorted(problems)))


def _check(file: ByteFile, entry: TensorEntry, expected: str | None, *, must_be_finite: bool) -> Iterator[str]:
    digest = hashlib.sha256()
    buffer = bytearray(min(_BLOCK_BYTES, entry.nbytes))
    non_finite = 0
    for done in range(0, entry.nbytes, _BLOCK_BYTES):
        count = min(_BLOCK_BYTES, entry.nbytes - done)
        data = file.fetch(entry.offset + done, count, memoryview(buffer))
        digest.update(data)
        if entry.is_float and must_be_finite:
            values = torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype])
            non_finite += int(values.numel() - torch.isfinite(values).sum())
        file.release(entry.offset + done, count)
    if expected is not None and digest.hexdigest() != expected:
        yield f"{quoted(entry.name)} has other bytes than the report's checksum says"
    if non_finite:
        yield f"{quoted(entry.name)} holds {non_finite} non-finite values"
