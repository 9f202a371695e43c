"""Where the members of a zip archive lie, as torch writes one: its directory, read and distrusted.

The format: members, each behind a header of its own, then a directory of them all, then where that begins.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from streammerge.errors import CheckpointError, quoted

ReadRange = Callable[[int, int], bytes]
"""Reads a small range of a file, from a byte on so many; fewer only at the file's end."""

DIRECTORY_LIMIT_BYTES = 32_000_000

_END = struct.Struct("<4s4H2LH")
_WIDE_LOCATOR = struct.Struct("<4sLQL")
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_RECORD = struct.Struct("<4s6H3L5H2L")
_MEMBER = struct.Struct("<4s5H3L2H")
_IN_WIDE_FIELDS = 0xFFFFFFFF
_ENCRYPTED = 0x41


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `nbytes` bytes with the checksum `crc32`, in the bytes [header_offset, ends_before) of the file."""

    name: str
    header_offset: int
    ends_before: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Archive:
    """An uncompressed archive's members by name, and the bytes of its directory."""

    members: Mapping[str, Member]
    directory: bytes
    read: ReadRange
    label: str

    def data_offset(self, member: Member) -> int:
        """Where in the file a member's data begins. Raises CheckpointError unless its own header agrees."""
        header = self.read(member.header_offset, _MEMBER.size)
        if len(header) < _MEMBER.size:
            _refuse(self.label, f"ends inside the header of {quoted(member.name)}")
        signature, _, flags, method, *_, name_bytes, extra_bytes = _MEMBER.unpack(header)
        offset: int = member.header_offset + _MEMBER.size + name_bytes + extra_bytes
        if offset + member.nbytes > member.ends_before:
            _refuse(self.label, f"has the member {quoted(member.name)} reach into the one behind it")
        own_name = self.read(member.header_offset + _MEMBER.size, name_bytes)
        if signature != b"PK\3\4" or own_name != member.name.encode() or method or flags & _ENCRYPTED:
            _refuse(self.label, f"has a header of {quoted(member.name)} that its directory contradicts")
        return offset

    def content(self, member: Member) -> bytes:
        """All of a small member."""
        return self.read(self.data_offset(member), member.nbytes)


def read_archive(read: ReadRange, file_bytes: int, label: str) -> Archive:
    """Read an archive's directory; no member is touched.

    Raises CheckpointError for what torch never writes: compressed or encrypted members, several of one name, members
    that overlap or leave the file, comments, archives in parts, bytes that belong to nothing at the end.
    """
    count, start, nbytes = _find_directory(read, file_bytes, label)
    if nbytes > DIRECTORY_LIMIT_BYTES:
        _refuse(label, f"has a directory of {nbytes} bytes, more than the limit of {DIRECTORY_LIMIT_BYTES}")
    directory = read(start, nbytes)
    records = _records(directory, label)
    if len(directory) < nbytes or len(records) != count:
        _refuse(label, f"announces {count} members and lists {len(records)}")
    records.sort(key=lambda record: record[1])
    members = {}
    for (name, offset, size, crc32), (_, ends_before, *_) in pairwise([*records, ("", start, 0, 0)]):
        if name in members:
            _refuse(label, f"has the member {quoted(name)} twice")
        # the least it takes; how much really, its own header tells
        if offset + _MEMBER.size + size > ends_before:
            _refuse(label, f"has the member {quoted(name)} reach into the one behind it")
        members[name] = Member(name, offset, ends_before, size, crc32)
    return Archive(members, directory, read, label)


def _find_directory(read: ReadRange, file_bytes: int, label: str) -> tuple[int, int, int]:
    """How many members the directory lists, where it begins, and its bytes."""
    tail_bytes = min(file_bytes, _WIDE_END.size + _WIDE_LOCATOR.size + _END.size)
    tail = read(file_bytes - tail_bytes, tail_bytes)
    end = tail[-_END.size :]
    if len(end) < _END.size or end[:4] != b"PK\5\6":
        _refuse(label, "does not end as a zip archive does")
    _, disk, directory_disk, here, count, nbytes, start, comment_bytes = _END.unpack(end)
    ends = file_bytes - _END.size
    locator = tail[-_END.size - _WIDE_LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\6\7":
        if len(tail) < tail_bytes or tail[:4] != b"PK\6\6":
            _refuse(label, "has no end of its directory where its last bytes say")
        _, wide_disk, wide_offset, disks = _WIDE_LOCATOR.unpack(locator)
        _, wide_bytes, _, _, disk, directory_disk, here, wide_count, wide_nbytes, wide_start = _WIDE_END.unpack(
            tail[: _WIDE_END.size]
        )
        ends = file_bytes - tail_bytes
        narrow = (
            (count, 0xFFFF, wide_count),
            (nbytes, _IN_WIDE_FIELDS, wide_nbytes),
            (start, _IN_WIDE_FIELDS, wide_start),
        )
        if wide_offset != ends or wide_bytes != _WIDE_END.size - 12 or wide_disk or disks != 1:
            _refuse(label, "has no end of its directory where its last bytes say")
        if any(value not in (marker, wide) for value, marker, wide in narrow):
            _refuse(label, "tells its directory twice, and not the same")
        count, nbytes, start = wide_count, wide_nbytes, wide_start
    if disk or directory_disk or here != count or comment_bytes:
        _refuse(label, "is an archive in parts, or with a comment")
    if start + nbytes != ends:
        _refuse(label, f"has a directory that ends at byte {start + nbytes}, expected {ends}")
    return count, start, nbytes


def _records(directory: bytes, label: str) -> list[tuple[str, int, int, int]]:
    """Each member's name, the offset of its header, its bytes and its checksum."""
    found = []
    at = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\1\2" or at + _RECORD.size > len(directory):
            _refuse(label, f"has a directory that does not parse from its byte {at} on")
        (
            _,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc32,
            packed,
            size,
            name_bytes,
            extra_bytes,
            comment_bytes,
            disk,
            _,
            _,
            offset,
        ) = _RECORD.unpack_from(directory, at)
        at += _RECORD.size
        name_and_extra = directory[at : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        try:
            name = name_and_extra[:name_bytes].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{label} has a member whose name is not UTF-8", hint=DAMAGED) from error
        if at > len(directory):
            _refuse(label, f"has a directory that ends inside the record of {quoted(name)}")
        size, packed, offset = _widened(name_and_extra[name_bytes:], [size, packed, offset], label)
        if method or size != packed:
            _refuse(label, f"holds {quoted(name)} compressed")
        if flags & _ENCRYPTED or disk or comment_bytes:
            _refuse(label, f"holds {quoted(name)} encrypted, in parts or with a comment")
        found.append((name, offset, size, crc32))
    return found


def _widened(extra: bytes, numbers: list[int], label: str) -> list[int]:
    """The numbers, those of them that 32 bits do not hold from the field of wide ones."""
    wide = b""
    while extra:
        kind, nbytes = struct.unpack("<2H", extra[:4]) if len(extra) >= 4 else (0, len(extra))
        if 4 + nbytes > len(extra):
            _refuse(label, "has a field in its directory that does not end")
        wide = extra[4 : 4 + nbytes] if kind == 1 else wide
        extra = extra[4 + nbytes :]
    needed = sum(number == _IN_WIDE_FIELDS for number in numbers)
    if len(wide) < 8 * needed:
        _refuse(label, "lacks a field of wide numbers in its directory")
    found = iter(struct.unpack(f"<{needed}Q", wide[: 8 * needed]))
    return [next(found) if number == _IN_WIDE_FIELDS else number for number in numbers]


DAMAGED = "The file is damaged or was not written by `torch.save`. Fetch it again, or convert it to safetensors."


def _refuse(label: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{label} {reason}", hint=DAMAGED)
