from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from streammerge.checkpoint import (
    DEEPEST_JSON,
    DTYPE_BYTES,
    HEADER_LIMIT_BYTES,
    ByteFile,
    Checkpoint,
    FileFacts,
    load_checkpoint,
    parse_header,
    parse_json,
)
from streammerge.errors import CheckpointError, quoted
from streammerge.storage.local import LocalStorage
from tests.models import CONFIG, llama_tensors, save_model

DAMAGED = "The file is damaged or was not written by safetensors. Fetch it again."
UNREADABLE = "The file is damaged. Fetch it again."
INCOMPLETE = "The download is incomplete. Compare with the size on the hub."
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip


class Memory:
    """Models in memory, whose reads must stay inside their files."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.contents = contents

    def files(self, location: str) -> dict[str, FileFacts]:
        return {name: FileFacts(len(data), 1) for name, data in self.contents.items()}

    def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        # 8 bytes are asked of any file, to see its length field
        assert nbytes <= max(8, len(self.contents[name]) - offset)
        return self.contents[name][offset : offset + nbytes]

    def open(self, location: str, name: str) -> ByteFile:
        raise AssertionError("headers are all that is read")


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any JSON, or any bytes, for a header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    return {"dtype": plain(dtype), "shape": plain(shape), "data_offsets": plain(offsets)}


def load_file(data: bytes) -> Checkpoint:
    return load_checkpoint(Memory({SINGLE: data}), "m")


def load_files(contents: Mapping[str, bytes]) -> Checkpoint:
    return load_checkpoint(Memory(contents), "m")


def outcome(contents: Mapping[str, bytes]) -> Checkpoint | CheckpointError:
    try:
        return load_files(contents)
    except CheckpointError as error:
        return error


def refused(data: bytes | Mapping[str, bytes]) -> tuple[str, str | None]:
    contents = {SINGLE: data} if isinstance(data, bytes) else data
    with pytest.raises(CheckpointError) as raised:
        load_files(contents)
    return raised.value.message, raised.value.hint


def raw(value: torch.Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def with_random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype is torch.bool else 256
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, top, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
models = st.dictionaries(
    names,
    st.builds(with_random_bytes, st.sampled_from(list(TORCH_DTYPES.values())), shapes, st.integers(0, 9)),
    min_size=1,
    max_size=8,
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
sizes = st.integers(0, 12) | st.sampled_from([2**31, 2**62, 2**63 - 1])
plausible = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BYTES)) | junk,
        "shape": st.lists(sizes, max_size=3) | junk,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | junk,
    }
)
headers = st.dictionaries(names, plausible | junk, max_size=4) | junk


def assert_sound_or_refused(contents: Mapping[str, bytes]) -> None:
    loaded = outcome(contents)
    if isinstance(loaded, CheckpointError):
        assert loaded.message.isprintable()
        assert loaded.hint
        return
    for entry in loaded.tensors.values():
        assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(contents[entry.file])
        assert entry.nbytes == math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]


# what safetensors writes


@settings(deadline=None, max_examples=60)
@given(models)
def test_what_safetensors_writes_is_found_at_its_bytes(model: dict[str, torch.Tensor]) -> None:
    file = save(model, metadata={"format": "pt"})
    loaded = load_file(file)

    stored = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    start = 8 + int.from_bytes(file[:8], "little")
    assert loaded.tensors.keys() == model.keys()
    for name, value in model.items():
        entry = loaded.tensors[name]
        assert (TORCH_DTYPES[entry.dtype], entry.shape) == (value.dtype, tuple(value.shape))
        assert [entry.offset - start, entry.offset - start + entry.nbytes] == stored[name]["data_offsets"]
        assert file[entry.offset : entry.offset + entry.nbytes] == raw(value)


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = {"z": tensor(offsets=(0, 8)), "m": tensor(shape=(0,), offsets=(8, 8)), "a": tensor(offsets=(8, 16))}
    loaded = load_file(file_of(dict(reversed(header.items())), bytes(16)))
    assert list(loaded.tensors) == ["z", "m", "a"]


def test_metadata_and_padding_are_no_tensors() -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor()}).encode() + b" " * 100
    assert list(load_file(file_of(text, bytes(8))).tensors) == ["w"]


def test_a_sharded_model_is_one_model(tmp_path: Path) -> None:
    whole = llama_tensors()
    loaded = load_checkpoint(LocalStorage(), str(save_model(tmp_path / "m", whole, shards=3)))
    assert loaded.tensors.keys() == whole.keys()
    assert len({entry.file for entry in loaded.tensors.values()}) == len(loaded.header_sha256) == 3
    assert loaded.tensor_bytes == sum(value.nbytes for value in whole.values())
    assert loaded.config == CONFIG
    for name, entry in loaded.tensors.items():
        assert LocalStorage().read(loaded.location, entry.file, entry.offset, entry.nbytes) == raw(whole[name])


def test_one_file_is_preferred_to_an_index() -> None:
    contents = {SINGLE: file_of({"w": tensor()}, bytes(8)), INDEX: b"not read"}
    assert list(load_files(contents).tensors) == ["w"]


def test_a_model_without_config_has_an_empty_one() -> None:
    assert load_file(file_of({"w": tensor()}, bytes(8))).config == {}


def test_the_header_hash_changes_with_the_header_alone() -> None:
    def hashed(name: str, data: bytes) -> str:
        return load_file(file_of({name: tensor()}, data)).header_sha256[SINGLE]

    assert hashed("w", bytes(8)) == hashed("w", b"-another") != hashed("v", bytes(8))


def test_a_tensor_knows_its_elements_and_whether_it_can_be_merged() -> None:
    entries = load_file(
        file_of({"w": tensor("BF16", (2, 3), (0, 12)), "scalar": tensor("I32", (), (12, 16))}, bytes(16))
    ).tensors
    assert (entries["w"].elements, entries["w"].is_float) == (6, True)
    assert (entries["scalar"].elements, entries["scalar"].is_float) == (1, False)


# anything may come from outside: it parses to ranges inside the file, or is a CheckpointError

SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)})


@settings(deadline=None)
@given(st.integers(0, len(SOUND) - 1))
def test_a_file_cut_anywhere_is_refused(length: int) -> None:
    message, hint = refused(SOUND[:length])
    assert "`m/model.safetensors`" in message
    assert hint in (DAMAGED, INCOMPLETE)


@settings(deadline=None, max_examples=400)
@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_a_flipped_byte_never_leads_outside_the_file(position: int, value: int) -> None:
    assert_sound_or_refused({SINGLE: SOUND[:position] + bytes([value]) + SOUND[position + 1 :]})


@settings(deadline=None, max_examples=400)
@given(headers, st.integers(0, 40))
@example({"w": tensor("F32", [2], [0, 8])}, 8)
@example({"w": {"dtype": [[["F32"]]], "shape": [2], "data_offsets": [0, 8]}}, 8)
def test_any_json_for_a_header_never_leads_outside_the_file(header: object, data_bytes: int) -> None:
    assert_sound_or_refused({SINGLE: file_of(header, bytes(data_bytes))})


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64))
def test_any_bytes_for_a_file_are_refused(data: bytes) -> None:
    assert_sound_or_refused({SINGLE: data})


@settings(deadline=None, max_examples=200)
@given(junk)
@example({"weight_map": {"w": ["a.safetensors"]}})
@example({"weight_map": {"w": "../a.safetensors"}})
def test_any_json_for_an_index_or_a_config_is_at_worst_refused(value: object) -> None:
    text = json.dumps(value).encode()
    sound = file_of({"w": tensor()}, bytes(8))
    assert_sound_or_refused({INDEX: text, "a.safetensors": sound})
    assert_sound_or_refused({SINGLE: sound, "config.json": text})


# what is wrong is said


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_file_too_short_for_a_length_field_says_its_size(length: int) -> None:
    message, hint = refused(bytes(length))
    assert message == f"`m/model.safetensors` has {length} bytes, too few for a header"
    assert hint == DAMAGED


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, HEADER_LIMIT_BYTES + 1])
def test_an_absurd_header_length_is_refused_before_anything_is_read(length: int) -> None:
    message, hint = refused(length.to_bytes(8, "little") + b"{}")
    limit = f"more than the limit of {HEADER_LIMIT_BYTES}"
    assert message == f"`m/model.safetensors` announces a header of {length} bytes, {limit}"
    assert hint == DAMAGED


def test_a_file_that_ends_in_its_header_is_an_incomplete_download() -> None:
    message, hint = refused(SOUND[:40])
    length = int.from_bytes(SOUND[:8], "little")
    assert message == f"`m/model.safetensors` ends at byte 40, inside its header of {length} bytes"
    assert hint == INCOMPLETE


def test_cut_data_is_an_incomplete_download() -> None:
    message, hint = refused(SOUND[:-1])
    found, expected = len(SOUND) - 1, len(SOUND)
    assert message == f"`m/model.safetensors` ends at byte {found} but its header describes {expected}"
    assert hint == INCOMPLETE


def test_bytes_after_the_data_are_damage() -> None:
    message, hint = refused(SOUND + b"x")
    assert message.endswith(f"ends at byte {len(SOUND) + 1} but its header describes {len(SOUND)}")
    assert hint == DAMAGED


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ((4, 12), "overlaps the tensor before it: begins at byte {}, expected {}"),
        ((0, 8), "overlaps the tensor before it: begins at byte {}, expected {}"),
        ((12, 20), "leaves a hole before it: begins at byte {}, expected {}"),
    ],
)
def test_tensors_must_tile_the_data(second: tuple[int, int], reason: str) -> None:
    file = file_of({"a": tensor(), "b": tensor(offsets=second)}, bytes(second[1]))
    start = len(file) - second[1]
    message, hint = refused(file)
    assert message == "`b` in `m/model.safetensors` " + reason.format(start + second[0], start + 8)
    assert hint == DAMAGED


def test_a_hole_before_the_first_tensor_is_refused() -> None:
    message, _ = refused(file_of({"a": tensor(offsets=(8, 16))}, bytes(16)))
    assert "`a` in `m/model.safetensors` leaves a hole before it" in message


NOT_A_SHAPE = "has a shape that is not a short list of sizes"
NOT_OFFSETS = "has data_offsets that are not two byte positions"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (tensor("F31"), "has the unknown dtype `F31`"),
        (tensor("f32"), "has the unknown dtype `f32`"),
        (tensor(None), "has the unknown dtype `None`"),
        (tensor(["F32"]), "has the unknown dtype `['F32']`"),
        (tensor(shape=[-1]), NOT_A_SHAPE),
        (tensor(shape=[2.0]), NOT_A_SHAPE),
        (tensor(shape=[True, 2]), NOT_A_SHAPE),
        (tensor(shape=[2**63]), NOT_A_SHAPE),
        (tensor(shape=["2"]), NOT_A_SHAPE),
        (tensor(shape=2), NOT_A_SHAPE),
        (tensor(shape=[1] * 17), NOT_A_SHAPE),
        (tensor(offsets=[0]), NOT_OFFSETS),
        (tensor(offsets=[0, 8, 16]), NOT_OFFSETS),
        (tensor(offsets=[-8, 0]), NOT_OFFSETS),
        (tensor(offsets=[False, 8]), NOT_OFFSETS),
        (tensor(offsets=[0, 2**64]), NOT_OFFSETS),
        (tensor(offsets="08"), NOT_OFFSETS),
        (tensor(offsets=[8, 0]), "spans -8 bytes but F32 [2] takes 8"),
        (tensor(offsets=[0, 4]), "spans 4 bytes but F32 [2] takes 8"),
        (tensor(shape=[2**62, 2**62]), f"spans 8 bytes but F32 [{2**62}, {2**62}] takes {2**126}"),
        ({"dtype": "F32", "shape": [2]}, "lacks a dtype, shape or data_offsets"),
        (None, "lacks a dtype, shape or data_offsets"),
        ([], "lacks a dtype, shape or data_offsets"),
    ],
)
def test_an_unsound_tensor_is_named_with_the_reason(facts: object, reason: str) -> None:
    message, hint = refused(file_of({"w": facts}, bytes(8)))
    assert message == f"`w` in `m/model.safetensors` {reason}"
    assert hint == DAMAGED


def test_a_tensor_named_twice_is_refused() -> None:
    one = json.dumps(tensor())
    message, hint = refused(file_of(f'{{"w": {one}, "w": {one}}}'.encode(), bytes(8)))
    assert message == "`m/model.safetensors` has the key `w` twice"
    assert hint == UNREADABLE


@pytest.mark.parametrize("header", [b"[]", b"1", b"null", b'"F32"'])
def test_a_header_must_be_an_object(header: bytes) -> None:
    message, hint = refused(file_of(header))
    assert message == "`m/model.safetensors` has a header that is not a JSON object"
    assert hint == DAMAGED


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"{} {}",
        b"{'w': 1}",
        b"\xff{}",
        b'{"w": "\xc3"}',
        b"\xef\xbb\xbf{}",
        b'{"\\ud800": 1}',
        b"[" * 100_000,
        b'{"w":' * 100_000,
        b"9" * 10_000,
    ],
    ids=lambda header: repr(header[:12]),
)
def test_a_header_that_is_not_json_is_refused(header: bytes) -> None:
    message, hint = refused(file_of(header))
    assert message.startswith("`m/model.safetensors` does not hold readable JSON: ")
    assert message.isprintable()
    assert hint == UNREADABLE


def test_json_may_be_nested_to_a_depth_that_all_of_python_can_walk() -> None:
    assert parse_json(b"[" * DEEPEST_JSON + b"]" * DEEPEST_JSON, "`f`")
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        for depth in (DEEPEST_JSON + 1, 300, 900, 990):
            text = opening * depth + b"1" + closing * depth
            with pytest.raises(CheckpointError, match=r"^`f` (nests JSON deeper than 64 levels|does not hold)"):
                parse_json(text, "`f`")


def test_a_nested_dtype_is_refused_like_any_other() -> None:
    message, _ = refused(file_of({"w": tensor(json.loads("[" * 900 + "]" * 900))}, bytes(8)))
    assert message == "`m/model.safetensors` nests JSON deeper than 64 levels"


def test_a_model_needs_a_tensor() -> None:
    message, hint = refused(file_of({}))
    assert message == "`m` holds no tensors"
    assert hint == UNREADABLE


def test_parse_header_needs_no_storage() -> None:
    header = json.dumps({"w": tensor()}).encode()
    assert parse_header(header, 8, "f", "`f`")["w"].offset == 8 + len(header)


# the index


def indexed(weight_map: object, **shards: object) -> dict[str, bytes]:
    files = {f"{name}.safetensors": file_of(header, bytes(8)) for name, header in shards.items()}
    return {**files, INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


@pytest.mark.parametrize(
    "shard", ["../other/a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a.bin", "", 3]
)
def test_an_index_may_only_name_shards_beside_it(shard: object) -> None:
    message, hint = refused(indexed({"w": shard}, a={"w": tensor()}))
    assert message == f"`m/{INDEX}` places `w` in `{shard}`, which is not a safetensors file name"
    assert hint == "Shards lie beside the index. Do not use models from sources you do not trust."


def test_a_missing_shard_is_an_incomplete_download() -> None:
    message, hint = refused(indexed({"w": "a.safetensors", "v": "b.safetensors"}, a={"w": tensor()}))
    assert message == f"`m/{INDEX}` names the shard `b.safetensors`, which is not there"
    assert hint == "The download is incomplete. Fetch the missing shard."


@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": null}'])
def test_an_index_needs_a_weight_map(index: bytes) -> None:
    message, hint = refused({INDEX: index})
    assert message == f"`m/{INDEX}` has no `weight_map`"
    assert hint == UNREADABLE


def test_an_index_that_is_not_json_is_refused() -> None:
    message, hint = refused({INDEX: b"<html>"})
    assert message.startswith(f"`m/{INDEX}` does not hold readable JSON: Expecting value")
    assert hint == UNREADABLE


def test_an_index_and_its_shards_must_agree_and_all_that_differs_is_listed() -> None:
    contents = indexed({"w": "a.safetensors", "x": "a.safetensors", "y": "a.safetensors"}, a={"w": tensor()})
    message, hint = refused(contents)
    assert message == (
        f"`m/a.safetensors` does not match `{INDEX}`:\n"
        "  `x` is in the index but not in the file\n"
        "  `y` is in the index but not in the file"
    )
    assert hint == "The folder mixes files of two models or two downloads. Fetch it again."
    message, _ = refused(indexed({"w": "a.safetensors"}, a={"w": tensor(), "v": tensor("F32", (0,), (0, 0))}))
    assert message.endswith("  `v` is in the file but not in the index")


def test_a_tensor_in_two_shards_is_refused() -> None:
    contents = indexed(
        {"w": "a.safetensors", "v": "b.safetensors"},
        a={"w": tensor()},
        b={"v": tensor("F32", (1,), (0, 4)), "w": tensor("F32", (1,), (4, 8))},
    )
    message, _ = refused(contents)
    assert message.endswith("  `w` is in the file but not in the index")


def test_a_damaged_shard_is_named() -> None:
    contents = indexed({"w": "a.safetensors", "v": "b.safetensors"}, a={"w": tensor()}, b={"v": tensor()})
    contents["b.safetensors"] = contents["b.safetensors"][:-1]
    assert refused(contents)[0].startswith("`m/b.safetensors` ends at byte")


# folders that hold no safetensors model


def test_a_missing_folder_says_how_to_fetch_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(LocalStorage(), str(tmp_path / "absent"))
    assert raised.value.message == f"`{tmp_path / 'absent'}` does not exist"
    assert raised.value.hint == "Name a model folder. A model on the hub is named `ORG/NAME`."


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(SOUND)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(LocalStorage(), str(tmp_path / SINGLE))
    assert raised.value.message == f"`{tmp_path / SINGLE}` is a file, not a folder"
    assert raised.value.hint == "Name the folder that holds the model's files."


NO_WEIGHTS = f"`m` has no `{SINGLE}` and no `{INDEX}`"


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        ((), NO_WEIGHTS, "Name a Hugging Face model folder."),
        (("config.json", "model.gguf"), NO_WEIGHTS, "Name a Hugging Face model folder."),
        (
            ("consolidated.00.pth", "consolidated.01.pth"),
            NO_WEIGHTS + ": of 2 pickled files such as `consolidated.00.pth` none is known to be all of its weights",
            "Pickled weights are read from `pytorch_model.bin`, from the shards of `pytorch_model.bin.index.json`, or "
            "from one file `model` with such an ending. "
            "Or convert them to safetensors: load with transformers, then `save_pretrained`.",
        ),
        (
            ("adapter_model.safetensors", "training_args.bin"),
            NO_WEIGHTS + ": it holds an adapter",
            "Name it beside its base, as BASE+ADAPTER, with its `adapter_config.json`.",
        ),
    ],
)
def test_a_folder_without_weights_says_what_it_holds_instead(names: tuple[str, ...], message: str, hint: str) -> None:
    assert refused(dict.fromkeys(names, b"x")) == (message, hint)


def test_a_location_with_a_null_character_is_refused() -> None:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(LocalStorage(), "a\0b")
    assert raised.value.message == r"`a\x00b` cannot be read: embedded null byte"


def test_a_link_to_a_shard_is_followed_and_a_dead_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(SOUND)
    folder = tmp_path / "m"
    folder.mkdir()
    os.symlink("../blob", folder / SINGLE)
    assert len(load_checkpoint(LocalStorage(), str(folder)).tensors) == 3
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointError, match=r"has no `model\.safetensors`"):
        load_checkpoint(LocalStorage(), str(folder))


# the config


@pytest.mark.parametrize("config", [b"[]", b'"llama"', b"null"])
def test_a_config_must_be_an_object(config: bytes) -> None:
    message, hint = refused({SINGLE: SOUND, "config.json": config})
    assert message == "`m/config.json` is not a JSON object"
    assert hint == UNREADABLE


def test_a_config_that_is_not_json_is_refused() -> None:
    message, _ = refused({SINGLE: SOUND, "config.json": b"{"})
    assert message.startswith("`m/config.json` does not hold readable JSON: ")


def test_a_huge_config_is_refused_before_it_is_read() -> None:
    class Huge(Memory):
        def files(self, location: str) -> dict[str, FileFacts]:
            return {**super().files(location), "config.json": FileFacts(200_000_000, 1)}

    with pytest.raises(CheckpointError, match=r"`m/config\.json` has 200000000 bytes, over the limit of 100000000"):
        load_checkpoint(Huge({SINGLE: SOUND}), "m")


def test_a_file_that_shrinks_between_two_looks_is_refused() -> None:
    class Shrinking(Memory):
        def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
            return super().read(location, name, offset, nbytes)[: 8 if offset == 0 else 2]

    with pytest.raises(CheckpointError, match=r"`m/model\.safetensors` became shorter while it was read"):
        load_checkpoint(Shrinking({SINGLE: SOUND}), "m")


# a terminal never sees what it could act on

ESCAPE = "\x1b]0;owned\x07\u202e\n"


def outside_names() -> list[tuple[str, dict[str, bytes]]]:
    sound: dict[str, Any] = {"w": tensor()}
    return [
        ("tensor", {SINGLE: file_of({ESCAPE: None})}),
        ("dtype", {SINGLE: file_of({"w": tensor(ESCAPE)}, bytes(8))}),
        ("key", {SINGLE: file_of(f'{{"{json.dumps(ESCAPE)[1:-1]}": 1, "{json.dumps(ESCAPE)[1:-1]}": 1}}'.encode())}),
        ("overlap", {SINGLE: file_of({ESCAPE: tensor(), "v": tensor()}, bytes(8))}),
        ("shard", indexed({"w": ESCAPE + ".safetensors"}, a=sound)),
        ("path", indexed({ESCAPE: "../x"}, a=sound)),
        ("promise", indexed({"w": "a.safetensors", ESCAPE: "a.safetensors"}, a=sound)),
    ]


@pytest.mark.parametrize(("what", "contents"), outside_names(), ids=lambda value: value if type(value) is str else "")
def test_a_name_from_outside_is_never_printed_raw(what: str, contents: dict[str, bytes]) -> None:
    message, hint = refused(contents)
    for text in (message, hint or ""):
        assert text.replace("\n  ", " ").isprintable(), what


def test_a_location_is_never_printed_raw(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(LocalStorage(), str(tmp_path / "\x1b[2J"))
    assert raised.value.message == rf"`{tmp_path}/\x1b[2J` does not exist"


def test_a_long_name_is_cut() -> None:
    assert quoted("x" * 300) == "`" + "x" * 200 + "…`"
    assert quoted("déjà ✓") == "`déjà ✓`"
    assert quoted("a\udcffb") == r"`a\udcffb`"
