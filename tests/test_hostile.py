"""Inputs made to do harm. SECURITY.md lists them; here they are tried."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge import owners
from streammerge.checkpoint import MOST_JSON_VALUES, load_checkpoint, parse_json
from streammerge.cli import cli
from streammerge.errors import CheckpointError, RecipeError, StreamMergeError, quoted
from streammerge.folder import side_files
from streammerge.plan import make_plan
from streammerge.recipe import Recipe
from streammerge.rules import layer_count, layer_position
from streammerge.storage.local import LocalStorage
from tests import fuzzing
from tests.fuzzing import SEEDS, TARGETS, InMemory, file_of, mutated, tensor
from tests.models import CONFIG, llama_tensors, recipe_of, save_model, tuned

ROOT = Path(__file__).parent.parent
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# moves the cursor, sets a title, turns the direction of writing, begins a line that looks like ours
ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e\nerror: no"


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


# anything at all: read or refused, inside its files, in bounded memory and time


def test_the_corpus_is_small() -> None:
    files = [path for path in fuzzing.CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(TARGETS)
    assert len(files) < 200
    assert sum(path.stat().st_size for path in files) < 300_000


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_and_changes_of_it_are_read_or_refused(target: str) -> None:
    assert fuzzing.run(target, 150, seed=0)["executions"] == 150


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("target", TARGETS)
def test_any_change_of_a_sound_input_is_read_or_refused(target: str) -> None:
    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from(SEEDS[target]), st.integers(0, 2**32), st.integers(1, 5))
    def tried(data: bytes, seed: int, changes: int) -> None:
        chance = random.Random(seed)
        for _ in range(changes):
            data = mutated(chance, target, data)
        fuzzing.attempt(target, data)

    TARGETS[target](SEEDS[target][0])
    tried()


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_read_or_refused(target: str) -> None:
    @settings(deadline=None, max_examples=60)
    @given(st.binary(max_size=200))
    def tried(data: bytes) -> None:
        fuzzing.attempt(target, data)
        fuzzing.attempt(target, len(data).to_bytes(8, "little") + data)

    TARGETS[target](SEEDS[target][0])
    tried()


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_a_million_hostile_inputs_are_read_or_refused(target: str) -> None:
    # a process of its own, whose growth is this target's
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    executions = {"header": 300_000, "index": 200_000, "config": 200_000}.get(target, 100_000)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", str(executions), "--target", target],
        # what it says of its progress is seen with `-s`
        stdout=subprocess.PIPE, text=True, env=environment, check=False, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["executions"] == executions


# memory


def in_a_small_process(code: str, most_mib: int) -> str:
    """Run code that may take so much memory beyond what it begins with."""
    limited = f"""
import resource
from streammerge.checkpoint import load_checkpoint
from streammerge.storage.local import LocalStorage
from streammerge.errors import CheckpointError
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + ({most_mib} << 20),) * 2)
{code}
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    ran = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def refused_by(folder: Path, most_mib: int) -> str:
    return in_a_small_process(
        f"""
try:
    load_checkpoint(LocalStorage(), {str(folder)!r})
except CheckpointError as error:
    print(error.message)
""",
        most_mib,
    )


@pytest.mark.parametrize("length", [2**63, 2**64 - 1])
def test_a_header_said_to_be_huge_takes_no_memory(length: int, tmp_path: Path) -> None:
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(1 << 40)
    assert f"announces a header of {length} bytes" in refused_by(tmp_path, 64)


def test_a_header_of_holes_takes_no_more_than_its_text(tmp_path: Path) -> None:
    with (tmp_path / SINGLE).open("wb") as file:
        file.write((99_000_000).to_bytes(8, "little"))
        file.truncate(1 << 40)
    assert "does not hold readable JSON" in refused_by(tmp_path, 512)


def test_ten_million_values_are_refused_before_they_are_built(tmp_path: Path) -> None:
    text = b"{" + b'"a":[],' * 10_000_000 + b'"b":[]}'
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    assert f"holds more than {MOST_JSON_VALUES} JSON values" in refused_by(tmp_path, 300)
    with pytest.raises(CheckpointError, match="`f` holds more than 4000000 JSON values"):
        parse_json(text, "`f`")


def test_a_name_as_long_as_a_header_is_cut_before_it_is_escaped() -> None:
    name = "\U000e0001" * 3_000_000
    tracemalloc.start()
    try:
        assert len(quoted(name)) < 210
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# sizes


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**62, 2**62, 0], [2**61, 0, 4]])
def test_huge_sides_beside_a_zero_are_refused(shape: list[int]) -> None:
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(CheckpointError, match="whose bytes no 64-bit number counts"):
        load_checkpoint(InMemory({SINGLE: file_of(header)}), "m")


def test_empty_tensors_are_sound_wherever_they_lie() -> None:
    header = {"a": tensor("F32", [0, 5], 0), "w": tensor("F32", [2], 0), "z": tensor("F32", [3, 0], 8)}
    assert list(load_checkpoint(InMemory({SINGLE: file_of(header, bytes(8))}), "m").tensors) == ["a", "w", "z"]


@pytest.mark.parametrize("digits", [10, 5000])
def test_a_layer_number_that_no_model_has_is_none(digits: int) -> None:
    name = f"model.layers.{'9' * digits}.weight"
    assert layer_count([name, "model.layers.3.weight"]) == 4
    assert layer_position(name, 4) == 0.0


@pytest.mark.parametrize(
    "absurd",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"depths": [2, 10**9]}},
        {"num_labels": 10**12},
        {"max_position_embeddings": 10**15},
        {"vocab_size": -(10**15)},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_config_of_absurd_sizes_is_not_built(absurd: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is more than"):
        owners.build({**CONFIG, **absurd})
    assert owners.roles_from_model({**CONFIG, **absurd}) == {}


def test_a_config_of_more_modules_than_any_model_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert owners.roles_from_model({**CONFIG, **wide})
    monkeypatch.setattr(owners, "MOST_MODULES", 30)
    assert owners.roles_from_model({**CONFIG, **wide}) == {}
    torch.nn.Linear(2, 2)


def test_a_config_that_names_weights_to_fetch_fetches_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **named: asked.append(arguments) or [])
    config = {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "backbone": "someone/else",
        "use_pretrained_backbone": True,
        "use_timm_backbone": False,
        "backbone_config": None,
    }
    owners.roles_from_model(config)
    assert asked == []


# files that lead elsewhere


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text('{"key": "s3cret"}')
    return path


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "LICENSE", "modeling.py", "chat_template.jinja", "odd.json"]
)
@pytest.mark.parametrize("kind", ["absolute", "relative", "folder"])
def test_a_link_that_leaves_the_folder_is_not_copied(
    name: str, kind: str, secret: Path, family: dict[str, Path], tmp_path: Path
) -> None:
    (family["base"] / name).unlink(missing_ok=True)
    target: Path | str = secret
    if kind == "relative":
        target = "../secret"
    elif kind == "folder":
        (family["base"] / "aside").symlink_to(tmp_path)
        target = "aside/secret"
    (family["base"] / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=rf"base/{name}` is a link to `{secret}`, outside of the") as raised:
        streammerge.merge(recipe_of(family, "linear"), tmp_path / "out")
    assert raised.value.hint == "Put a copy of the file there, if it is meant to be part of the model."
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_index_that_is_a_link_elsewhere_is_refused(secret: Path, family: dict[str, Path]) -> None:
    (family["base"] / INDEX).unlink()
    (family["base"] / INDEX).symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        streammerge.inspect(family["base"])


def test_links_inside_a_folder_and_those_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    plain = save_model(tmp_path / "plain", llama_tensors())
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    for folder in (snapshot, linked):
        recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": str(folder)}]})
        plan = make_plan(recipe, LocalStorage(), memory_bytes=1 << 30)
        assert {"config.json", "tokenizer.json", "vocab.json"} <= side_files(plan, LocalStorage()).keys()


def test_weights_may_be_links_to_anywhere(family: dict[str, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in family["base"].glob("*.safetensors"):
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
    assert streammerge.inspect(family["base"], family["math"]).differences == ()


def test_a_link_to_itself_is_an_error_like_any_other(family: dict[str, Path]) -> None:
    (family["base"] / "tokenizer.json").unlink()
    (family["base"] / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"base` cannot be read: too many levels of symbolic links"):
        streammerge.inspect(family["base"])


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_plain_file_is_not_read(kind: str, family: dict[str, Path]) -> None:
    shard = next(family["base"].glob("*.safetensors"))
    shard.unlink()
    if kind == "pipe":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"names the shard .* which is not there"):
        streammerge.inspect(family["base"])


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_does_not_reach_a_file_that_is_there(absolute: bool, family: dict[str, Path]) -> None:
    shard = next(family["math"].glob("*.safetensors"))
    outside = str(shard) if absolute else f"../math/{shard.name}"
    index = json.loads((family["base"] / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], outside)
    (family["base"] / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not a safetensors file name"):
        streammerge.inspect(family["base"])


# what is printed


def shown(*arguments: object) -> str:
    ran = CliRunner().invoke(cli, [str(each) for each in arguments])
    error = ran.exception
    if isinstance(error, StreamMergeError):
        return f"{error.message}\n{error.hint}"
    assert error is None or isinstance(error, SystemExit), error
    return ran.output


@pytest.mark.parametrize("verb", ["inspect", "inspect --json", "inspect two", "plan", "plan --json", "merge", "verify"])
def test_names_with_terminal_escapes_are_never_printed_raw(verb: str, tmp_path: Path) -> None:
    names = {f"{ESCAPE}.{number}.weight": torch.ones(4, 4) * number for number in range(3)}
    folders = {}
    for name in ("base", "math"):
        folders[name] = save_model(tmp_path / f"{name}{ESCAPE}", names)
        (folders[name] / f"{ESCAPE}.json").write_text("{}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(folders, "task_arithmetic")))
    out = tmp_path / "out"
    command, *more = verb.split()
    if command == "inspect":
        paths = [folders["base"], *([folders["math"]] if more == ["two"] else [])]
        text = shown("inspect", *paths, *([] if more == ["two"] else more))
    elif command == "plan":
        text = shown("plan", recipe, *more)
    else:
        text = shown("merge", recipe, out)
        if command == "verify":
            text = shown("verify", out)
    assert text
    for line in text.splitlines():
        assert line.isprintable(), repr(line)
        assert not line.startswith("error: no")


def test_a_long_name_does_not_widen_every_line(tmp_path: Path) -> None:
    names = {"x" * 5000: torch.zeros(1), **{f"n{number}": torch.zeros(1) for number in range(20)}}
    text = shown("inspect", save_model(tmp_path / "m", names))
    assert max(map(len, text.splitlines())) < 300


def test_names_with_terminal_escapes_that_differ_are_never_printed_raw(tmp_path: Path) -> None:
    folders = [
        save_model(tmp_path / name, {f"{ESCAPE}{name}": torch.zeros(1), "w": torch.zeros(2)}) for name in ("a", "b")
    ]
    for line in shown("inspect", *folders).splitlines():
        assert line.isprintable(), repr(line)


def test_a_recipe_file_with_an_escape_in_its_name_is_never_printed_raw(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2J.yaml"
    path.write_text("merge_method: nothing\n")
    with pytest.raises(RecipeError) as raised:
        Recipe.from_file(path)
    assert raised.value.message.isprintable()


@pytest.mark.parametrize("key", ["name", "chat_template", "base_model"])
def test_half_a_character_in_a_recipe_is_refused(key: str) -> None:
    text = f'merge_method: linear\nmodels: [{{model: a}}]\n{key}: "{{{{ \\uD800"\n'
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: `{{ \\ud800` holds half of a character"):
        Recipe.from_yaml(text)


def test_a_folder_of_any_name_has_a_card_with_one_title(tmp_path: Path) -> None:
    odd = save_model(tmp_path / os.fsdecode(b"\xff\n---\n# mine"), llama_tensors())
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": str(odd)}]})
    card = side_files(make_plan(recipe, LocalStorage(), memory_bytes=1 << 30), LocalStorage())["README.md"].decode()
    # to Markdown two backslashes are one
    assert r"# \\udcff\\n---\\n# mine" in card
    assert len(re.findall(r"^# ", card, re.MULTILINE)) == 1


# code


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "optimizer.pt", "LICENSE.bin", "NOTICE.pt", "LICENSE.safetensors", "NOTICE.pkl",
     "LICENSE.partial"],
)  # fmt: skip
def test_pickled_files_beside_the_weights_stay_behind(name: str, family: dict[str, Path], tmp_path: Path) -> None:
    for folder in family.values():
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    (family["base"] / "LICENSE.txt").write_text("…")
    streammerge.merge(recipe_of(family, "linear"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"LICENSE.txt", "config.json"}
    assert not (tmp_path / "out" / name).exists()
    assert not (tmp_path / "ran").exists()


def test_code_that_a_config_names_is_copied_and_never_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.T", None]}
    base = {"odd.name.weight": torch.ones(4, 4)}
    folders = {}
    for number, name in enumerate(("base", "math")):
        folders[name] = save_model(tmp_path / name, tuned(base, number))
        own = {"architectures": ["Own"], "model_type": "own", "auto_map": auto_map, "trust_remote_code": True}
        (folders[name] / "config.json").write_text(json.dumps({**CONFIG, **own}))
        (folders[name] / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
        (folders[name] / "own.py").write_text(code)
        (folders[name] / "__init__.py").write_text(code)
    streammerge.inspect(*folders.values())
    # a method of matrices asks what a tensor of unknown name is
    streammerge.merge(recipe_of(folders, "actmat"), tmp_path / "out")
    assert (tmp_path / "out" / "own.py").read_text() == code
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == auto_map
    assert not (tmp_path / "ran").exists()


def test_a_template_in_a_tokenizer_config_is_copied_and_never_rendered(family: dict[str, Path], tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(10 ** 12) %}{% endfor %}"
    (family["base"] / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    streammerge.merge(recipe_of(family, "linear", chat_template="auto"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
