"""Pickled weights: read as byte ranges, never unpickled."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammerge
from streammerge import pickled, zipped
from streammerge.checkpoint import Checkpoint, changed_files, load_checkpoint
from streammerge.errors import CheckpointError, PlanError
from streammerge.storage.local import LocalStorage
from streammerge.torch_dtypes import TORCH_DTYPES
from tests.fuzzing import InMemory, archive_of, pickled_file
from tests.models import llama_tensors, recipe_of, save_model
from tests.stored import digests, tensor_of, tensors_of


def saved(value: object, **options: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written, **options)
    return written.getvalue()


def loaded(data: bytes, name: str = "pytorch_model.bin") -> Checkpoint:
    return load_checkpoint(InMemory({name: data}), "m")


def read(data: bytes) -> dict[str, Tensor]:
    """Every tensor of a pickled file, by the ranges that its checkpoint names."""
    return {
        name: tensor_of(data[entry.offset : entry.offset + entry.nbytes], entry.dtype, entry.shape)
        for name, entry in loaded(data).tensors.items()
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def refused(data: bytes) -> str:
    with pytest.raises(CheckpointError) as raised:
        loaded(data)
    assert raised.value.hint
    return raised.value.message


def changed_member(data: bytes, change: Callable[[str, bytes], bytes | None], **options: Any) -> bytes:
    """The archive written again by another hand, its members changed or (None) left out."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(written, "w", **options) as after:
        for name in before.namelist():
            content = change(name, before.read(name))
            if content is not None:
                after.writestr(name, content)
    return written.getvalue()


def state_dict() -> OrderedDict[str, Tensor]:
    every = {code: (torch.arange(12) % 7).to(dtype).view(3, 4) for code, dtype in TORCH_DTYPES.items()}
    whole = torch.randn(6, 5)
    tensors = OrderedDict(
        **every,
        parameter=torch.nn.Parameter(torch.randn(2, 3, dtype=torch.bfloat16)),
        rows=whole[2:4],
        column=whole[:, :1].contiguous(),
        tied=whole,
        again=whole,
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 7),
        one_column=torch.randn(4, 1).t(),
    )
    tensors._metadata = {"": {"version": 1}, "layers.0": {"version": 2}}  # type: ignore[attr-defined]
    return tensors


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_dtype_and_every_row_major_view_is_found_where_torch_finds_it(protocol):
    tensors = state_dict()
    found = read(saved(tensors, pickle_protocol=protocol))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def test_tied_tensors_share_their_bytes():
    found = loaded(saved(state_dict())).tensors
    assert (found["tied"].offset, found["tied"].nbytes) == (found["again"].offset, found["again"].nbytes)
    assert found["rows"].offset == found["tied"].offset + 2 * 5 * 4


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_any_tensors_are_found_as_they_were_saved(described):
    def random(dtype: str, shape: list[int]) -> Tensor:
        return torch.randint(0, 2, shape).to(TORCH_DTYPES[dtype])

    tensors = {name: random(*facts) for name, facts in described.items()}
    found = read(saved(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor))


@pytest.mark.parametrize("wrapping", ["state_dict", "model"])
def test_a_state_dict_inside_a_trainers_dict_is_the_model(wrapping):
    assert loaded(saved({"epoch": 3, "loss": 0.5, wrapping: {"a": torch.ones(2)}})).tensors.keys() == {"a"}


# whole folders


def as_pickled(folder: Path) -> Path:
    """The folder with its weights pickled instead, in as many files."""
    twin = Path(shutil.copytree(folder, folder.parent / "pickled" / folder.name))
    index = twin / "model.safetensors.index.json"
    parts: dict[str, list[str]] = {}
    for file in sorted(twin.glob("*.safetensors")):
        tensors = tensors_of_file(file)
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(tensors, twin / name)
        parts[name] = list(tensors)
        file.unlink()
    if index.exists():
        index.unlink()
        weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
        (twin / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return twin


def tensors_of_file(file: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("method", ["actmat", "ties"])
def test_pickled_models_merge_to_the_bytes_of_the_same_models_in_safetensors(family, method, tmp_path):
    streammerge.merge(recipe_of(family, method), tmp_path / "expected")
    twins = {name: as_pickled(folder) for name, folder in family.items()}
    assert not [path for folder in twins.values() for path in folder.glob("*.safetensors")]
    streammerge.merge(recipe_of(twins, method), tmp_path / "found")
    expected, found = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "found")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    assert {path.suffix for path in (tmp_path / "found").iterdir()} == {".json", ".safetensors", ".md"}
    assert streammerge.verify(tmp_path / "found", inputs=True, recompute=3).problems == ()


def test_one_kind_of_file_merges_with_the_other(family, tmp_path):
    streammerge.merge(recipe_of(family, "linear"), tmp_path / "expected")
    family["code"] = as_pickled(family["code"])
    streammerge.merge(recipe_of(family, "linear"), tmp_path / "found")
    weights = {name for name in digests(tmp_path / "expected") if name.endswith(".safetensors")}
    assert {n: digests(tmp_path / "found")[n] for n in weights} == {
        n: digests(tmp_path / "expected")[n] for n in weights
    }


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "pytorch_model.pth"])
def test_one_file_may_have_any_of_the_usual_names(name):
    assert loaded(saved({"a": torch.ones(2)}), name).tensors["a"].file == name


def test_safetensors_are_read_where_both_are_there(tmp_path):
    folder = save_model(tmp_path / "m", llama_tensors())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02 never opened")
    assert {e.file for e in load_checkpoint(LocalStorage(), str(folder)).tensors.values()} == {"model.safetensors"}


def test_two_pickled_files_that_could_each_be_the_model_are_refused():
    data = saved({"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match="none is known to be all of its weights"):
        load_checkpoint(InMemory({"pytorch_model.bin": data, "model.pt": data}), "m")


def test_an_index_of_pickled_shards_may_only_name_shards_beside_it():
    for shard in ("../pytorch_model-1.bin", "/etc/passwd", "a.safetensors"):
        index = json.dumps({"weight_map": {"a": shard}}).encode()
        with pytest.raises(CheckpointError, match="which is not a pickled file name"):
            load_checkpoint(InMemory({"pytorch_model.bin.index.json": index}), "m")


def test_pickled_shards_must_hold_what_their_index_says():
    index = json.dumps({"weight_map": {"a": "x.bin", "b": "x.bin"}}).encode()
    contents = {"pytorch_model.bin.index.json": index, "x.bin": saved({"a": torch.ones(2), "c": torch.ones(2)})}
    with pytest.raises(CheckpointError, match=r"`b` is in the index but not in the file\n  `c` is in the file"):
        load_checkpoint(InMemory(contents), "m")


def test_the_plan_of_pickled_models_loads_no_torch(family):
    folder = str(as_pickled(family["base"]))
    code = (
        "import sys; from streammerge.inspection import inspect_models; from streammerge.storage.local import *\n"
        f"inspect_models(LocalStorage(), {folder!r}); print('torch' in sys.modules, 'pickle' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_a_capture_runs_no_pickled_model(family, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(PlanError, match="has pickled weights, which a capture does not run"):
        streammerge.capture(as_pickled(family["base"]), tmp_path / "data.jsonl", tmp_path / "out")


@pytest.mark.parametrize("what", ["weights", "names", "kind"])
def test_a_pickled_file_that_changes_is_noticed_by_what_describes_it(what):
    before = saved({"a": torch.ones(2)})
    after = {
        "weights": saved({"a": torch.zeros(2)}),
        "names": saved({"b": torch.ones(2)}),
        "kind": b"x" * len(before),
    }[what]
    model = loaded(before)
    assert changed_files(InMemory({"pytorch_model.bin": before}), model) == []
    assert len(after) == len(before)
    assert changed_files(InMemory({"pytorch_model.bin": after}), model) == [
        "`m/pytorch_model.bin` was written to: its header is another"
    ]


# what a pickle could do


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped_too", [False, True])
def test_code_in_a_pickle_is_refused_and_never_run(zipped_too, protocol, tmp_path):
    text = pickle.dumps({"a": Trap(tmp_path / "ran")}, protocol)
    message = refused(pickled_file(text) if zipped_too else text)
    assert message.startswith("`m/pytorch_model.bin` ")
    if zipped_too and protocol >= 2:
        assert message.endswith("holds more than tensors: its pickle asks for `io.open`, which was not run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["os system", "builtins eval", "builtins getattr", "torch load", "torch.jit._pickle build_intlist",
     "torch serialization.load",
     "torch._utils _rebuild_wrapper_subclass", "torch._utils _rebuild_sparse_tensor", "collections defaultdict",
     "torch.storage _load_from_bytes", "numpy.core.multiarray _reconstruct", "_codecs encode", "torch QInt8Storage"],
)  # fmt: skip
def test_only_what_makes_plain_tensors_may_be_named(name):
    module, _, what = name.partition(" ")
    text = f"c{module}\n{what}\n".encode()
    assert f"asks for `{module}.{what}`, which was not run" in refused(pickled_file(b"\x80\x02" + text + b")R."))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "has `` at byte 0"),
        (b"\x80\x02}", "has `` at byte 3"),
        (b"}}.", "has `2e` at byte 2"),
        (b"}.}", "has `2e` at byte 1"),
        (b"i os\nsystem\n", "has `69` at byte 0"),
        (b"}X\xff\xff\xff\xffa", "it ends here"),
        (b"}\x8d" + b"\xff" * 8 + b"a", "it ends here"),
        (b"}X\x01\x00\x00\x00\xff", "invalid start byte"),
        (b"u.", "makes no sense at byte 0"),
        (b"h\x00", "makes no sense at byte 0: `0`"),
        (b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "the key a twice"),
        (b"}K\x01K\x01s.", "a key that is no text"),
        (b"}K\x01\x85Q.", "makes no sense at byte 4"),
        (b"ctorch\nFloatStorage\n)R.", "a call of what is no function"),
        (b"].", "is no dict of names to tensors"),
        (b"}X\x01\x00\x00\x00aK\x01s.", "`a` in `m/pytorch_model.bin` is no tensor"),
        (b"r\xff\xff\xff\xff", "makes no sense at byte 0"),
    ],
)
def test_a_pickle_that_makes_no_dict_of_tensors_is_refused(text, reason):
    assert reason in refused(pickled_file(text))


def tensor_pickle(
    elements: int = 12, first: int = 0, shape: str = "K\x03K\x04\x86", strides: str = "K\x04K\x01\x86"
) -> bytes:
    """{"a": a float32 tensor} over storage 0, all numbers as given."""
    number = struct.pack("<Bi", ord("J"), elements)
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number + b"tQ" + struct.pack("<Bi", ord("J"), first)
        + shape.encode("latin-1") + strides.encode("latin-1") + b"\x89NtRs."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"elements": 13}, "lies in a storage of 52 bytes that has 48 bytes"),
        ({"first": 1}, r"takes the bytes [4, 52) of a storage of 48"),
        ({"first": -1}, "a tensor without a storage, a place in it or a dtype"),
        ({"shape": "K\x03K\x05\x86"}, "strides [4, 1], expected its [3, 5] row by row"),
        ({"shape": "K\x03K\x05\x86", "strides": "K\x05K\x01\x86"}, "takes the bytes [0, 60) of a storage of 48"),
        ({"shape": "K\x03J\xff\xff\xff\xff\x86"}, "a shape that is not a short tuple of sizes"),
        ({"shape": "K\x03\x88\x86"}, "a shape that is not a short tuple of sizes"),
        ({"strides": "K\x01K\x03\x86"}, "is a view with the strides [1, 3], expected its [3, 4] row by row"),
        ({"strides": "K\x00K\x00\x86"}, "is a view with the strides [0, 0]"),
        ({"strides": "K\x01\x85"}, "as many strides as it has not sides"),
        ({"shape": "K\x00\x8a\x08" + "\xff" * 7 + "\x7f\x86", "strides": "K\x01K\x01\x86"}, "takes the bytes [0, 0)"),
    ],
    ids=str,
)
def test_a_tensor_must_lie_in_its_storage_row_by_row(changes, reason):
    assert loaded(pickled_file(tensor_pickle())).tensors["a"].shape == (3, 4)
    assert reason in refused(pickled_file(tensor_pickle(**changes)))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(3, 4).t(), "is a view with the strides [1, 4]"),
        (torch.ones(1).expand(5), "is a view with the strides [0]"),
        (torch.ones(3, dtype=torch.complex64).conj(), "to be conjugated"),
        (torch.ones(3, 3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex128), "ComplexDoubleStorage"),
        ({"nested": torch.ones(2)}, "`a` in `m/pytorch_model.bin` is no tensor"),
    ],
    ids=["transposed", "expanded", "conjugated", "sparse", "complex128", "nested"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_plain_row_major_one_is_refused(tensor, reason):
    assert reason in refused(saved({"a": tensor, "b": torch.ones(2)}))


def test_a_pickle_of_endless_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(pickled, "MOST_INSTRUCTIONS", 1000)
    assert "more than 1000 instructions" in refused(pickled_file(b"}" * 1001))


def test_a_huge_pickle_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(pickled, "PICKLE_LIMIT_BYTES", 100)
    data = saved({"a": torch.ones(2)})

    class Watched(InMemory):
        def read(self, location: str, name: str, offset: int, nbytes: int) -> bytes:
            assert nbytes < 1000
            return super().read(location, name, offset, nbytes)

    with pytest.raises(CheckpointError, match=r"has a pickle of \d+ bytes, more than the limit of 100"):
        load_checkpoint(Watched({"pytorch_model.bin": data}), "m")


# what an archive could do

SOUND = {"m/data.pkl": tensor_pickle(), "m/data/0": bytes(48), "m/byteorder": b"little"}


def test_the_older_kind_of_pickle_is_refused():
    data = saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert refused(data).endswith("since torch 1.6: its weights are pickled the older way")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused():
    written = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), written)
    assert "compressed" in refused(written.getvalue())
    stored = changed_member(written.getvalue(), lambda _, content: content)
    assert "asks for `__torch__" in refused(stored)


def test_numbers_in_the_other_byte_order_are_refused():
    assert "another byte order" in refused(archive_of({**SOUND, "m/byteorder": b"big"}))
    assert "another byte order" in refused(archive_of({**SOUND, "m/byteorder": b"bigger"}))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_members_are_refused(method):
    data = changed_member(saved({"a": torch.ones(64)}), lambda _, content: content, compression=method)
    assert "compressed" in refused(data)


def test_a_pickle_whose_checksum_is_another_is_refused():
    data = archive_of(SOUND)
    assert "whose checksum is another" in refused(data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"m/data/0": bytes(48)}, "has 0 members `data.pkl`"),
        ({**SOUND, "n/data.pkl": b"}."}, "has 2 members `data.pkl`"),
        ({name: data for name, data in SOUND.items() if name != "m/data/0"}, "a storage of 48 bytes that is not there"),
        ({**SOUND, "m/data/0": bytes(47)}, "a storage of 48 bytes that has 47 bytes"),
    ],
)
def test_an_archive_must_hold_one_pickle_and_its_storages(members, reason):
    assert reason in refused(archive_of(members))


def test_paths_in_an_archive_lead_nowhere(tmp_path):
    evil = {"../../etc/passwd": b"x", "/root": b"x", "m/../../x": b"x"}
    assert loaded(archive_of({**SOUND, **evil})).tensors.keys() == {"a"}
    key = tensor_pickle().replace(b"X\x01\x00\x00\x000", b"X\x0d\x00\x00\x00../../etc/pwd")
    assert "that is not there" in refused(pickled_file(key))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused():
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in [*SOUND.items(), ("m/data/0", b"\1" * 48)]:
            archive.writestr(name, data)
    assert "has the member `m/data/0` twice" in refused(written.getvalue())


def directory_of(data: bytes) -> int:
    return data.index(b"PK\1\2")


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize("member", ["m/data.pkl", "m/data/0"])
@pytest.mark.parametrize("field", ["offset", "bytes"])
def test_members_that_overlap_or_leave_the_file_are_refused(member, field):
    data = archive_of(SOUND)
    record = data.index(member.encode(), directory_of(data)) - 46
    for number in (1, 40, 200, len(data), 2**31, 2**32 - 1):
        new = struct.pack("<L", number)
        damaged = patched(data, record + 42, new) if field == "offset" else patched(data, record + 20, new + new)
        assert refused(damaged)


@pytest.mark.parametrize("writer", [archive_of, None], ids=["narrow", "by torch"])
def test_a_pickled_file_cut_anywhere_or_with_bytes_behind_it_is_refused(writer):
    data = archive_of(SOUND) if writer else saved({"a": torch.ones(2)})
    for end in range(len(data)):
        assert refused(data[:end])
    assert refused(data + b"x")
    assert refused(b"PK\3\4" + data)


def test_an_archive_that_tells_its_directory_twice_is_refused():
    data = saved({"a": torch.ones(2)})
    assert "tells its directory twice" in refused(patched(data, len(data) - 22 + 10, b"\x01\x00"))


def test_a_members_own_header_must_agree_with_the_directory():
    data = archive_of(SOUND)
    assert "that its directory contradicts" in refused(patched(data, data.index(b"m/data/0"), b"m/data/1"))
    compressed = patched(data, data.index(b"m/data/0") - 22, struct.pack("<H", 8))
    assert "that its directory contradicts" in refused(compressed)
    longer_name = patched(data, data.index(b"m/data/0") - 4, struct.pack("<H", 60000))
    assert "reach into the one behind it" in refused(longer_name)


def test_a_huge_directory_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(zipped, "DIRECTORY_LIMIT_BYTES", 100)
    assert "more than the limit of 100" in refused(archive_of(SOUND))


def test_numbers_too_wide_for_32_bits_are_read_from_their_field():
    with_wide = bytearray(archive_of(SOUND))
    record = with_wide.index(b"m/data/0", directory_of(with_wide)) - 46
    offset = struct.unpack_from("<L", with_wide, record + 42)[0]
    struct.pack_into("<3L", with_wide, record + 16, zlib.crc32(bytes(48)), 2**32 - 1, 2**32 - 1)
    struct.pack_into("<L", with_wide, record + 42, 2**32 - 1)
    struct.pack_into("<H", with_wide, record + 30, 28)
    wide = struct.pack("<2H3Q", 1, 24, 48, 48, offset)
    data = bytes(with_wide[: record + 54]) + wide + bytes(with_wide[record + 54 :])
    nbytes = struct.unpack_from("<L", data, len(data) - 10)[0]
    data = patched(data, len(data) - 10, struct.pack("<L", nbytes + len(wide)))
    assert loaded(data).tensors["a"] == loaded(archive_of(SOUND)).tensors["a"]
    assert "lacks a field of wide numbers" in refused(
        data.replace(struct.pack("<2H", 1, 24), struct.pack("<2H", 2, 24))
    )


def test_weights_of_more_than_4_gib_are_found(tmp_path):
    sparse = tmp_path / "m" / "pytorch_model.bin"
    sparse.parent.mkdir()
    large = 5 << 30
    with sparse.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/data.pkl", large_pickle(large))
        with archive.open(zipfile.ZipInfo("m/data/0"), "w", force_zip64=True):
            pass
        archive.writestr("m/data/1", bytes(range(8)))
    grow(sparse, large)
    found = load_checkpoint(LocalStorage(), str(sparse.parent)).tensors
    assert found["large"].nbytes == large
    small = found["small"]
    assert LocalStorage().read(str(sparse.parent), sparse.name, small.offset, small.nbytes) == bytes(range(8))


def large_pickle(large: int) -> bytes:
    def one(name: str, key: str, elements: int) -> bytes:
        return (
            b"X" + struct.pack("<L", len(name)) + name.encode() + b"ctorch._utils\n_rebuild_tensor_v2\n"
            b"((X\x07\x00\x00\x00storagectorch\nByteStorage\nX\x01\x00\x00\x00" + key.encode()
            + b"X\x03\x00\x00\x00cpu\x8a\x08" + struct.pack("<q", elements) + b"tQK\x00\x8a\x08"
            + struct.pack("<q", elements) + b"\x85K\x01\x85\x89NtR"
        )  # fmt: skip

    return b"\x80\x02}(" + one("large", "0", large) + one("small", "1", 8) + b"u."


def grow(path: Path, large: int) -> None:
    """Put a hole of so many bytes where the empty member `m/data/0` is, and say so in the directory."""
    data = path.read_bytes()
    at = data.index(b"m/data/0")
    begin = at + 8 + struct.unpack_from("<H", data, at - 2)[0]
    # behind its header, up to the next one: nothing, or the note of its length that its writer left
    end = data.index(b"PK\3\4", begin)
    directory = directory_of(data)
    moved = large - (end - begin)
    records = b""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        wide_size = large if info.filename == "m/data/0" else info.file_size
        wide_offset = info.header_offset + (moved if info.header_offset > at else 0)
        extra = struct.pack("<2H3Q", 1, 24, wide_size, wide_size, wide_offset)
        name = info.filename.encode()
        records += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, info.CRC, 2**32 - 1, 2**32 - 1, len(name), len(extra), 0, 0,
            0, 0, 2**32 - 1,
        ) + name + extra  # fmt: skip
    start = directory + moved
    ends = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(infos), len(infos), len(records), start
    ) + struct.pack("<4sLQL", b"PK\6\7", 0, start + len(records), 1)  # fmt: skip
    end_record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    with path.open("wb") as file:
        file.write(data[:begin])
        file.seek(begin + large)
        file.write(data[end:directory] + records + ends + end_record)
