"""The GPU check's own promises, kept on a CPU: it runs, says what is wrong, and gives no speed without truth."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from streammerge_kernels.choice import FASTER_FROM

BENCH = Path(__file__).resolve().parent.parent / "bench"
FIGURES = ("seconds", "gb_per_s", "share_of_copy", "tflop_per_s")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of bench/ the way it imports its neighbours."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def run(bench, tmp_path) -> Any:
    return bench("gpu_run").Run(
        "kernels", results=tmp_path, run="r", device="cpu", small=True, seconds=60.0, shared=tmp_path, work=tmp_path
    )


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def checked(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    """The exit code of a run of `main`."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words), "--device", "cpu", "--small"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code


def test_the_small_check_is_green_in_every_section(bench, tmp_path):
    work = tmp_path / "work"
    command = [sys.executable, BENCH / "gpu.py", tmp_path / "out", "--device", "cpu", "--small", "--work", work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = rows_in(tmp_path / "out")
    assert {row["outcome"] for row in found} == {"green"}
    assert {row["section"] for row in found} == {section.name for section in bench("gpu").SECTIONS}
    for row in found:
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in FIGURES if name in row), row
        assert "tolerance" not in row or 0 <= row["error"] <= row["tolerance"], row
    by_section = {name: [row for row in found if row["section"] == name] for name in {r["section"] for r in found}}
    for name, part in by_section.items():
        assert name in ("machine", "tests") or any(any(figure in row for figure in FIGURES) for row in part), name
    assert by_section["tests"][0]["counts"]["PASSED"] > 5
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("op", sorted(FASTER_FROM))
def test_every_twin_is_among_what_is_measured(bench, op):
    kernels = bench("gpu_kernels")
    assert f'implementations("{op}")' in Path(kernels.__file__).read_text()
    assert kernels.implementations(op).keys() == {"torch", "triton"}


def test_a_section_that_breaks_is_a_red_row_and_the_next_one_still_runs(bench, monkeypatch, tmp_path):
    gpu = bench("gpu")
    # the process that is started does not know it either
    broken = gpu.Section(name="unheard of", module="none", function="none", most=30, least=1)
    monkeypatch.setattr(gpu, "SECTIONS", (broken, gpu.SECTIONS[0]))
    assert checked(gpu, monkeypatch, tmp_path) == 1
    assert [(row["section"], row["outcome"]) for row in rows_in(tmp_path)] == [
        ("unheard of", "red"),
        ("machine", "green"),
    ]


def test_a_section_that_takes_too_long_is_stopped(bench, monkeypatch, tmp_path):
    gpu = bench("gpu")
    short = gpu.Section(name="machine", module="gpu_machine", function="machine", most=0.05, least=0.01)
    monkeypatch.setattr(gpu, "SECTIONS", (short,))
    assert checked(gpu, monkeypatch, tmp_path) == 1
    (row,) = rows_in(tmp_path)
    assert (row["outcome"], row["error"]) == ("red", "stopped after 0 s")


def test_a_section_for_which_no_time_is_left_is_skipped_and_not_called_green(bench, monkeypatch, tmp_path):
    assert checked(bench("gpu"), monkeypatch, tmp_path, "--only", "ceilings", "--seconds", "1") == 1
    (row,) = rows_in(tmp_path)
    assert (row["outcome"], row["section"]) == ("skipped", "ceilings")


def test_a_folder_that_cannot_be_made_is_a_red_row(bench, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("--only", "merge", "--work", tmp_path / "file")
    assert checked(bench("gpu"), monkeypatch, tmp_path, *words) == 1
    (row,) = rows_in(tmp_path)
    assert (row["section"], row["outcome"]) == ("merge", "red")
    assert "File exists" in row["error"]


@pytest.mark.parametrize("error", [0.5, math.nan, math.inf])
def test_a_wrong_result_is_red_and_has_no_speed(bench, run, tmp_path, error):
    way = bench("gpu_run").Way
    wrong = way(call=lambda: None, error=lambda: error, tolerance=0.1)
    right = way(call=lambda: None, error=lambda: 0.0, tolerance=0.1)
    run.compare("case", {"wrong": wrong, "right": right}, nbytes=8)
    first, second = rows_in(tmp_path)
    assert (first["way"], first["outcome"]) == ("wrong", "red")
    assert not any(figure in first for figure in FIGURES)
    assert (second["way"], second["outcome"]) == ("right", "green")
    assert run.red


def test_what_raises_is_a_red_row_that_says_where(bench, run, tmp_path):
    def raises(*_: object) -> None:
        raise ValueError("bad\nluck")

    run.part("part", raises)
    way = bench("gpu_run").Way(call=raises, error=raises, tolerance=0.1)
    run.compare("case", {"way": way})
    assert [row["outcome"] for row in rows_in(tmp_path)] == ["red", "red"]
    assert all(row["error"].startswith("ValueError: bad (test_bench_gpu.py:") for row in rows_in(tmp_path))


def test_a_part_that_needs_more_time_than_is_left_is_skipped(run, tmp_path):
    run.part("part", lambda run: pytest.fail("was run"), needs=1000.0)
    assert [row["outcome"] for row in rows_in(tmp_path)] == ["skipped"]
    assert not run.red


def test_rows_of_a_killed_run_can_be_read(bench, tmp_path):
    rows = bench("gpu_rows")
    rows.append(tmp_path, "r", "machine", "case", "green", figure=math.nan)
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('{"run": "r", "sect')
    (row,) = rows.rows_of(tmp_path, "r", "machine")
    assert row["figure"] == "nan"


def test_what_pytest_writes_is_counted_with_and_without_xdist(bench):
    plain = "tests/a.py::one[x y] PASSED    [ 50%]\ntests/a.py::two FAILED [100%]\n"
    spread = "tests/a.py::one\n[gw0] [ 50%] PASSED tests/a.py::one[x y] \n[gw11] [100%] FAILED tests/a.py::two \n"
    for text in (plain, spread):
        assert bench("gpu_machine").counted(text) == ({"PASSED": 1, "FAILED": 1}, ["tests/a.py::two"])


def test_a_set_names_every_tensor_once_and_no_more_layers_than_fit(bench):
    merge = bench("gpu_merge")
    groups = list(merge._alike(merge.OLMO_7B))
    assert sorted(name for names, _ in groups for name in names) == sorted(merge.OLMO_7B.tensors())
    assert merge._nbytes(merge.OLMO_7B) == pytest.approx(14.6e9, rel=0.01)
    assert [merge._layers(room, 30, 10) for room in (29, 30, 39, 50)] == [0, 1, 1, 3]


def test_tilings_are_put_back(bench, run):
    kernels = bench("gpu_kernels")
    table = importlib.import_module("streammerge_kernels.product_triton").TILES
    before = dict(table)
    tilings = kernels.tilings(run)
    assert {"narrow", "wide", "narrow, one sum"} <= tilings.keys()
    with kernels.tiled(tilings["narrow"]):
        assert set(table.values()) == {(tilings["narrow"], tilings["narrow"])}
    assert table == before


@pytest.mark.parametrize(
    ("shared", "memory", "disk", "layers", "place"),
    [(69e9, 130e9, 60e9, 32, "shared"), (30e9, 130e9, 60e9, 14, "shared"), (8e9, 20e9, 60e9, 8, "work")],
    ids=["all of it", "small memory folder", "hardly any memory"],
)
def test_a_set_lies_where_most_of_it_fits(bench, run, monkeypatch, tmp_path, shared, memory, disk, layers, place):
    merge = bench("gpu_merge")
    run.shared, run.work = tmp_path / "shared", tmp_path / "work"
    free = {run.shared: shared, run.work: disk}
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free[folder])))
    monkeypatch.setattr(merge, "available_memory_bytes", lambda: int(memory))
    assert merge._room(run, merge.OLMO_7B) == (tmp_path / place, layers)
    assert rows_in(tmp_path)[0]["layers"] == layers
