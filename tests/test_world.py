"""What launchers say of a process."""

from __future__ import annotations

import importlib
import json

import pytest
from click.testing import CliRunner

import streammerge
from streammerge import stream
from streammerge.cli import cli
from streammerge.errors import StreamMergeError
from streammerge.world import World
from tests.models import recipe_of

plan = importlib.import_module("streammerge.plan")

NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, **said: str) -> World:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    return World.here()


def test_a_process_without_a_launcher_is_alone():
    assert World.here() == World(0, 1, 0, 1)
    assert World.here().is_alone
    assert World.here().is_first


@pytest.mark.parametrize(
    ("said", "world"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, World(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, World(2, 3, 0, 1)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, World(0, 2, 0, 2)),
        # half of what a launcher says is another program's
        ({"RANK": "3"}, World()),
        ({"WORLD_SIZE": "3"}, World()),
        # torchrun inside of mpirun
        ({"RANK": "1", "WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "1"}, World(1, 2, 0, 1)),
    ],
)
def test_what_launchers_set_is_read(monkeypatch, said, world):
    assert launched(monkeypatch, **said) == world


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "`RANK` is 2 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "`RANK` is 0 of 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "`RANK` is `-1`, expected a number from 0"),
        ({"RANK": "0", "WORLD_SIZE": "²"}, "`WORLD_SIZE` is `²`, expected a number from 0"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "`WORLD_SIZE` is `9999"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "`LOCAL_RANK` 2 of 2"),
    ],
)
def test_what_no_launcher_sets_is_refused_with_a_hint(monkeypatch, said, message):
    with pytest.raises(StreamMergeError) as caught:
        launched(monkeypatch, **said)
    assert message in caught.value.message
    assert len(caught.value.message) < 400
    assert "torchrun" in str(caught.value.hint)


def test_each_process_of_a_host_gets_its_own_gpu_unless_one_is_named(monkeypatch):
    world = launched(monkeypatch, RANK="6", WORLD_SIZE="8", LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")
    assert [world.device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:1", "cpu"]
    assert World().device("cuda") == "cuda"


def test_processes_of_a_host_share_its_memory_unless_each_is_told_how_much(monkeypatch, family):
    monkeypatch.setattr(plan, "available_memory_bytes", lambda: 8 << 30)
    recipe = recipe_of(family, "linear")
    assert streammerge.plan(recipe).memory.budget_bytes == 4 << 30
    launched(monkeypatch, RANK="0", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    assert streammerge.plan(recipe).memory.budget_bytes == 2 << 30
    assert streammerge.plan(recipe, memory="1GiB").memory.budget_bytes == 1 << 30


def test_a_plan_says_that_memory_is_each_processs(family, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(family, "linear")))
    shown = CliRunner().invoke(cli, ["plan", str(tmp_path / "recipe.yaml"), "--memory", "1GiB"]).output
    assert "of 1.0 GiB, in each process\n" in shown
    assert "Memory budget of each process" in CliRunner().invoke(cli, ["merge", "--help"]).output


def test_processes_of_a_host_share_its_cpus(monkeypatch):
    alone = stream.thread_limit()
    launched(monkeypatch, RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert stream.thread_limit() == max(alone // 2, 1)
    launched(monkeypatch, WORLD_SIZE="999", LOCAL_WORLD_SIZE="999")
    assert stream.thread_limit() == 1
