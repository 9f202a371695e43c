from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from streammerge.checkpoint import DTYPE_BYTES, parse_header
from streammerge.layout import Layout, Placement, lay_out

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "BOOL": torch.bool, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
LARGEST = 64

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
Wanted = list[tuple[str, str, tuple[int, ...]]]


def tensors_of(dtypes: st.SearchStrategy[str], max_size: int = 12) -> st.SearchStrategy[Wanted]:
    return st.lists(st.tuples(names, dtypes, shapes), max_size=max_size, unique_by=lambda tensor: tensor[0])


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


def raw(value: torch.Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(dtype: str, shape: tuple[int, ...], number: int) -> torch.Tensor:
    count = math.prod(shape)
    return ((torch.arange(count) + number) % 97).to(TORCH_DTYPES[dtype]).reshape(shape)


def written(layout: Layout, values: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the shards as the layout has them."""
    for number, shard in enumerate(layout.shards):
        content = bytearray(shard.nbytes)
        content[: len(shard.header)] = shard.header
        for name, place in layout.placements.items():
            if place.shard == number:
                content[place.offset : place.offset + place.nbytes] = raw(values[name])
        assert len(content) == shard.nbytes
        (folder / shard.file).write_bytes(content)


# bytes


@settings(deadline=None)
@given(tensors_of(st.sampled_from(sorted(DTYPE_BYTES))), st.integers(1, 400))
def test_tensors_tile_their_shards_and_each_is_aligned_to_its_elements(tensors: Wanted, limit: int) -> None:
    layout = lay_out(tensors, limit)

    assert layout.placements.keys() == {name for name, _, _ in tensors}
    for number, shard in enumerate(layout.shards):
        inside = sorted((place.offset, place.nbytes) for place in layout.placements.values() if place.shard == number)
        position = len(shard.header)
        assert position % 8 == 0
        for offset, nbytes in inside:
            assert offset == position
            position += nbytes
        assert position == shard.nbytes
    for name, dtype, shape in tensors:
        place = layout.placements[name]
        assert (place.nbytes, place.dtype, place.shape) == (nbytes_of(dtype, shape), dtype, shape)
        assert place.offset % DTYPE_BYTES[dtype] == 0
    assert layout.total_bytes == sum(shard.nbytes for shard in layout.shards)


@settings(deadline=None)
@given(tensors_of(st.sampled_from(sorted(DTYPE_BYTES))), st.integers(1, 400))
def test_headers_are_read_back_as_they_were_meant(tensors: Wanted, limit: int) -> None:
    layout = lay_out(tensors, limit)
    for number, shard in enumerate(layout.shards):
        length = int.from_bytes(shard.header[:8], "little")
        assert 8 + length == len(shard.header)
        entries = parse_header(shard.header[8:], shard.nbytes - len(shard.header), shard.file, "`f`")
        assert {
            entry.name: Placement(number, entry.offset, entry.nbytes, entry.dtype, entry.shape)
            for entry in entries.values()
        } == {name: place for name, place in layout.placements.items() if place.shard == number}


@settings(deadline=None, max_examples=40)
@given(tensors=tensors_of(st.sampled_from(sorted(TORCH_DTYPES)), 8), limit=st.integers(20, 400))
def test_safetensors_reads_identical_tensors(
    tensors: Wanted, limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("out")
    values = {name: filled(dtype, shape, i) for i, (name, dtype, shape) in enumerate(tensors)}
    layout = lay_out(tensors, limit)
    written(layout, values, folder)

    found = {}
    for shard in layout.shards:
        with safe_open(folder / shard.file, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path) -> None:
    values = {"a": filled("F32", (3, 2), 0), "b": filled("F32", (4,), 1), "c": filled("BF16", (2, 2), 2)}
    layout = lay_out([("a", "F32", (3, 2)), ("b", "F32", (4,)), ("c", "BF16", (2, 2))], 10**9)
    written(layout, values, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == save(values, metadata={"format": "pt"})


def test_wider_dtypes_come_first_and_equal_ones_keep_their_order() -> None:
    layout = lay_out([("b", "U8", (3,)), ("z", "F32", (1,)), ("a", "U8", (1,)), ("y", "F32", (1,))], 10**9)
    assert sorted(layout.placements, key=lambda name: layout.placements[name].offset) == ["z", "y", "b", "a"]


# shards


@settings(deadline=None)
@given(tensors_of(st.sampled_from(sorted(DTYPE_BYTES))), st.integers(1, 400))
def test_a_shard_exceeds_the_limit_only_for_one_large_tensor(tensors: Wanted, limit: int) -> None:
    layout = lay_out(tensors, limit)
    groups: list[list[int]] = [[] for _ in layout.shards]
    for name, _, _ in tensors:
        place = layout.placements[name]
        groups[place.shard].append(place.nbytes)
    for group in groups:
        assert sum(group) <= limit or len(group) == 1
    # in the order given, so that writing passes through the files once
    order = [layout.placements[name].shard for name, _, _ in tensors]
    assert order == sorted(order)
    assert all(groups) or not tensors


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, LARGEST), min_size=1, max_size=30),
    st.integers(LARGEST * 4, 600),
)
def test_shards_are_those_hugging_face_would_make(sizes: list[int], limit: int) -> None:
    state = {f"t.{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, max_shard_size=limit, filename_pattern="model{suffix}.safetensors"
    )
    ours = lay_out([(name, "F32", tuple(value.shape)) for name, value in state.items()], limit)
    assert [shard.file for shard in ours.shards] == list(theirs.filename_to_tensors)
    assert {name: ours.shards[place.shard].file for name, place in ours.placements.items()} == dict(
        theirs.tensor_to_filename
    )
    if theirs.is_sharded:
        index = json.loads(ours.index_json() or "")
        assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own_in_its_place() -> None:
    layout = lay_out([("a", "F32", (2,)), ("huge", "F32", (100,)), ("b", "F32", (2,))], 16)
    assert [shard.file for shard in layout.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {name: place.shard for name, place in layout.placements.items()} == {"a": 0, "huge": 1, "b": 2}


def test_a_shard_may_be_filled_to_the_last_byte() -> None:
    assert len(lay_out([("a", "F32", (2,)), ("b", "F32", (2,))], 16).shards) == 1
    assert len(lay_out([("a", "F32", (2,)), ("b", "F32", (2,))], 15).shards) == 2


def test_one_file_has_the_plain_name_and_needs_no_index() -> None:
    layout = lay_out([("a", "F32", (2,))], 10**9)
    assert [shard.file for shard in layout.shards] == ["model.safetensors"]
    assert layout.index_json() is None


def test_the_index_leads_to_every_tensor_and_counts_the_data(tmp_path: Path) -> None:
    tensors = [(f"layer.{i}.é", "BF16", (i, 3)) for i in range(1, 9)]
    values = {name: filled(dtype, shape, 1) for name, dtype, shape in tensors}
    layout = lay_out(tensors, 100)
    written(layout, values, tmp_path)
    text = layout.index_json()
    assert text is not None
    assert text.endswith("}\n")

    index = json.loads(text)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    assert list(index["weight_map"]) == sorted(values)
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "pt") as file:
            assert torch.equal(file.get_tensor(name), values[name])


def test_no_tensors_are_one_empty_file(tmp_path: Path) -> None:
    layout = lay_out([], 100)
    written(layout, {}, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert list(file.keys()) == []
