"""Several processes merge into one folder what one process would, whatever becomes of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge import memory, write
from streammerge.errors import OutputError
from streammerge.journal import JOURNAL
from streammerge.share_journals import forget_meeting
from tests import crashing
from tests.models import llama_tensors, recipe_of, save_model, tuned
from tests.processes import Ended, Rank, together
from tests.stored import digests, models_under
from tests.test_resume import finish, merge, partial_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGEST_SLOT_BYTES", memory.LARGEST_SLOT_BYTES)
    monkeypatch.setattr(write, "GROUP_BYTES", write.GROUP_BYTES)
    crashing.small_pieces()


@pytest.fixture
def recipe(family: dict[str, Path]) -> dict[str, object]:
    return recipe_of(family, "task_arithmetic")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(recipe: dict[str, object], tmp_path: Path) -> dict[str, str]:
    """What one process writes."""
    merge(recipe, tmp_path / "whole")
    return digests(tmp_path / "whole")


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "streammerge.json").read_text())
    return report


def succeeded(ended: list[Ended]) -> None:
    assert [each.code for each in ended] == [0] * len(ended), "\n".join(each.stderr for each in ended)


def settle(recipe: Mapping[str, object], out: Path, whole: Mapping[str, str], size: int) -> None:
    """Go on with so many processes, unless the folder is there; check every byte, and that nothing else is left."""
    for model in models_under(out.parent):
        if model == partial_of(out):
            found = {name: digest for name, digest in digests(model).items() if name in whole}
            assert found == whole, "what looks like a model is not one"
    if size == 1 or not os.path.lexists(partial_of(out)):
        finish(recipe, out, dict(whole))
        if (out / JOURNAL).exists():
            merge(recipe, out, resume=True)
    else:
        succeeded(together(recipe, out, size, "-q", "--resume"))
    assert digests(out) == whole
    assert not partial_of(out).exists()


# the same bytes


@pytest.mark.parametrize(
    ("method", "size", "more"),
    [
        ("task_arithmetic", 2, {}),
        ("actmat", 3, {"parameters": {"pool": "inputs"}}),
        ("ties", 4, {"parameters": {"trim": "model"}}),
        ("larv", 2, {"parameters": {"rule": "task_arithmetic"}}),
        ("dare_ties", 3, {"rounding": "stochastic", "out_dtype": "float16"}),
    ],
)
def test_several_processes_write_the_bytes_of_one(family, tmp_path, method, size, more):
    recipe = recipe_of(family, method, **more)
    merge(recipe, tmp_path / "whole")
    ended = together(recipe, tmp_path / "out", size, "-q", "--json")
    succeeded(ended)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not partial_of(tmp_path / "out").exists()
    assert [bool(each.stdout) for each in ended] == [True] + [False] * (size - 1)
    assert json.loads(ended[0].stdout)["tensors"] == 20
    one, several = report_of(tmp_path / "whole"), report_of(tmp_path / "out")
    for report in (one, several):
        for tensor in report["tensors"]:
            del tensor["seconds"]
    assert one["tensors"] == several["tensors"]
    assert "processes" not in one
    assert [each["rank"] for each in several["processes"]] == list(range(size))
    assert sum(each["tensors"] for each in several["processes"]) == 20
    assert all(each["tensors"] for each in several["processes"])
    assert several["totals"]["written_bytes"] == one["totals"]["written_bytes"]
    assert streammerge.verify(tmp_path / "out").problems == ()


def test_more_processes_than_tensors_leave_some_without_work(tmp_path):
    tensors = {name: t for name, t in llama_tensors().items() if name in ("lm_head.weight", "model.norm.weight")}
    models = {"base": save_model(tmp_path / "base", tensors), "math": save_model(tmp_path / "math", tuned(tensors, 1))}
    recipe = recipe_of(models, "task_arithmetic")
    merge(recipe, tmp_path / "whole")
    succeeded(together(recipe, tmp_path / "out", 4, "-q"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(each["tensors"] for each in report_of(tmp_path / "out")["processes"]) == [0, 0, 1, 1]


def test_in_python_every_process_has_the_folder_when_it_returns_and_the_first_the_whole_report(recipe, out):
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
        f"import os, streammerge\nreport = streammerge.merge({recipe!r}, {str(out)!r})\n"
        f"print(os.path.isfile({str(out / 'config.json')!r}), len(report.tensors))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]  # fmt: skip
    first, second = (process.communicate(timeout=60)[0].split() for process in processes)
    assert first == ["True", "20"]
    assert second[0] == "True"
    assert 0 < int(second[1]) < 20


ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2"]
LAUNCHERS = {
    "torchrun": (2, ["torch.distributed.run", "--nproc-per-node", "2"]),
    # without GPUs, too
    "accelerate": (2, [*ACCELERATE, "--multi_gpu", "--main_process_port", "0"]),
    # which starts one process, without a word of others
    "accelerate --cpu": (1, [*ACCELERATE, "--cpu"]),
}


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=[pytest.mark.long] if "--cpu" in name else []) for name in LAUNCHERS]
)
def test_a_launcher_starts_a_merge(recipe, out, whole, launcher):
    count, words = LAUNCHERS[launcher]
    out.with_name("recipe.yaml").write_text(json.dumps(recipe))
    ran = subprocess.run(
        [sys.executable, "-m", *words, "-m", "streammerge", "merge", "recipe.yaml", "out",
         "--max-shard-size", str(crashing.SHARD_BYTES), "--json"],
        cwd=out.parent, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["tensors"] == 20
    assert digests(out) == whole
    assert len(report_of(out).get("processes", [{}])) == count


# hosts that share a folder


@pytest.mark.parametrize("blind", [False, True])
def test_hosts_that_share_a_folder_merge_together_with_and_without_seeing_each_others_locks(recipe, out, whole, blind):
    hosts = [Rank(recipe, out, rank, 3, "-q", host=f"host{rank}", blind=blind) for rank in range(3)]
    succeeded([host.end() for host in hosts])
    assert digests(out) == whole
    assert [each["host"] for each in report_of(out)["processes"]] == ["host0", "host1", "host2"]


def test_processes_may_come_in_any_order(recipe, out, whole):
    ranks = []
    for rank in (2, 1, 0):
        ranks.append(Rank(recipe, out, rank, 3, "-q"))
        time.sleep(0.3)
    succeeded([rank.end() for rank in ranks])
    assert digests(out) == whole


@pytest.mark.parametrize("dead", [0, 1])
def test_a_host_that_dies_where_no_locks_are_seen_is_missed_when_it_is_silent(recipe, out, whole, dead):
    ranks = [
        Rank(recipe, out, rank, 2, "-q", host=f"host{rank}", blind=True, silent=1.0, dies_at=30 if rank == dead else -1)
        for rank in range(2)
    ]
    ended = [rank.end() for rank in ranks]
    assert ended[dead].code == -signal.SIGKILL
    left = ended[1 - dead]
    assert left.code == 1
    assert f"error: rank {dead} of 2 (process {ranks[dead].process.pid} on `host{dead}`) is gone" in left.stderr
    settle(recipe, out, whole, 2)


# deaths


def calls_of(recipe: Mapping[str, object], out: Path, size: int) -> list[int]:
    """How many calls each process makes when nothing happens to it; about, as they also wait for each other."""
    ended = together(recipe, out, size, "-q")
    succeeded(ended)
    return [each.calls for each in ended]


def killed(
    recipe: Mapping[str, object], out: Path, whole: Mapping[str, str], size: int, rank: int, then: int,
    *, call: int = -1, after: float | None = None,
) -> bool:  # fmt: skip
    """Kill one process at one of its calls, or after some seconds; the others must end and say why, and `then`
    processes go on. Whether it died."""
    ranks = [Rank(recipe, out, n, size, "-q", join=4.0, dies_at=call if n == rank else -1) for n in range(size)]
    if after is not None:
        time.sleep(after)
        ranks[rank].process.kill()
    ended = [each.end() for each in ranks]
    died = ended[rank].code == -signal.SIGKILL
    others = [each for number, each in enumerate(ended) if number != rank]
    assert died or ended[rank].code == 0, ended[rank].stderr
    for each in others:
        # one that has seen the folder get its name is done, whoever dies then
        assert each.code == (1 if died and not out.exists() else 0), each.stderr
        assert not each.code or each.stderr.startswith(TOLD), each.stderr
    settle(recipe, out, whole, then)
    return died


# what the others say of a process that dies while they merge, or before they began
TOLD = ("error: rank ", "error: the merge was ended by rank 0: ", "error: no merge by ", "error: of ")


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.long] if s > 1 else []) for s in range(4)])
def test_a_process_killed_at_a_random_moment_ends_the_others_and_any_number_goes_on(recipe, out, whole, seed):
    chance = random.Random(seed)
    size = chance.choice((2, 3))
    calls = calls_of(recipe, out.with_name("calls"), size)
    rank = seed % size
    call = chance.randrange(calls[rank] - 1)
    assert killed(recipe, out, whole, size, rank, chance.choice((1, 2, 3)), call=call)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.long] if s > 1 else []) for s in range(60)])
def test_a_process_killed_from_outside_ends_the_others_and_any_number_goes_on(recipe, out, whole, seed):
    chance = random.Random(seed)
    size, then = chance.choice((2, 3, 4)), chance.choice((1, 2, 3))
    killed(recipe, out, whole, size, seed % 2, then, after=chance.uniform(0, 0.8))


@pytest.mark.long
@pytest.mark.parametrize("method", ["task_arithmetic", "actmat"])
@pytest.mark.parametrize(("rank", "then"), [(0, 1), (0, 3), (1, 1), (1, 2)])
def test_a_process_killed_at_every_moment_ends_the_others_and_any_number_goes_on(family, tmp_path, method, rank, then):
    recipe = recipe_of(family, method)
    merge(recipe, tmp_path / "whole")
    whole = digests(tmp_path / "whole")
    deaths = 0
    for moment in range(200):
        folder = tmp_path / f"at{moment}"
        folder.mkdir()
        died = killed(recipe, folder / "out", whole, 2, rank, then, call=moment)
        deaths += died
        shutil.rmtree(folder)
        if moment % 10 == 0:
            print(f"killed rank {rank} at call {moment}", flush=True)  # noqa: T201 - the test takes long
        if not died:
            break
    assert deaths > 30


def test_what_a_dead_process_had_done_is_not_merged_again(recipe, out, whole):
    ranks = [Rank(recipe, out, rank, 2, "-q", rests_at=40 if rank else -1) for rank in range(2)]
    ranks[1].rests()
    cited = [
        json.loads(line)["name"] for line in (partial_of(out) / "journal-00001.jsonl").read_bytes().splitlines()[1:]
    ]
    assert cited
    ranks[1].process.kill()
    assert "is gone" in ranks[0].end().stderr
    report = merge(recipe, out, resume=True)
    assert report.resumed_tensors >= len(cited)
    assert digests(out) == whole


def test_a_process_that_was_given_up_ends_when_others_took_over(recipe, out, whole):
    # no locks are seen; the second process rests as if its host were stopped
    ranks = [
        Rank(recipe, out, rank, 2, "-q", host=f"host{rank}", blind=True, silent=1.0, rests_at=16 if rank else -1)
        for rank in range(2)
    ]
    ranks[1].rests()
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    assert "rank 1 of 2" in ranks[0].end().stderr
    for left in partial_of(out).glob("processes-*"):
        # as the next first process does
        forget_meeting(left)
    os.kill(ranks[1].process.pid, signal.SIGCONT)
    time.sleep(0.5)
    ranks[1].go_on()
    ended = ranks[1].end()
    assert ended.code == 1
    assert "was ended or taken over by other processes" in ended.stderr
    settle(recipe, out, whole, 2)


def test_a_stopped_process_is_waited_for_where_its_lock_is_seen(recipe, out, whole):
    ranks = [Rank(recipe, out, rank, 2, "-q", silent=0.3, rests_at=40 if rank else -1) for rank in range(2)]
    ranks[1].rests()
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    assert ranks[0].process.is_alive()
    os.kill(ranks[1].process.pid, signal.SIGCONT)
    ranks[1].go_on()
    succeeded([rank.end() for rank in ranks])
    assert digests(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_interrupted_tells_the_others(recipe, out, whole, number):
    ranks = [Rank(recipe, out, rank, 3, "-q", rests_at=16 if rank == 1 else -1) for rank in range(3)]
    ranks[1].rests()
    os.kill(ranks[1].process.pid, number)
    time.sleep(0.1)
    ranks[1].go_on()
    ended = [rank.end() for rank in ranks]
    assert [each.code for each in ended] == [1, 130, 1]
    assert ended[0].stderr.startswith(f"error: rank 1 of 3 (process {ranks[1].process.pid} on `")
    assert "failed: it was interrupted" in ended[0].stderr
    assert ended[2].stderr.startswith("error: the merge was ended by rank 0: rank 1 of 3 (process ")
    assert "pass `--resume`, with any number of processes" in ended[2].stderr
    settle(recipe, out, whole, 2)


def test_a_tensor_that_cannot_be_merged_ends_all_with_its_name(family, out):
    import torch
    from safetensors.torch import load_file, save_file

    file = sorted(family["math"].glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    ended = together(recipe_of(family, "task_arithmetic"), out, 2, "-q")
    assert [each.code for each in ended] == [1, 1]
    for each in ended:
        assert f"`{name}` in `math` holds NaN" in each.stderr
    assert not out.exists()


# what is refused


def test_a_process_with_another_recipe_is_refused_and_the_difference_named(recipe, out):
    other = {**recipe, "parameters": {"weight": 0.5}}
    ranks = [Rank(recipe, out, 0, 2, "-q"), Rank(other, out, 1, 2, "-q")]
    for ended in [rank.end() for rank in ranks]:
        assert ended.code == 1
        assert '`recipe.parameters` is `null`, and `{"weight": 0.5}` there' in ended.stderr
        assert "same command, models and versions" in ended.stderr
    assert not out.exists()
    assert not partial_of(out).exists()


def test_a_process_of_another_count_is_refused(recipe, out):
    ranks = [Rank(recipe, out, 0, 2, "-q", join=2.0), Rank(recipe, out, 1, 3, "-q", join=2.0)]
    first, second = (rank.end() for rank in ranks)
    assert "error: of 2 processes rank 1 did not come within 2 s" in first.stderr
    assert f"error: no merge by 3 processes was begun in `{partial_of(out)}` within 2 s" in second.stderr
    assert (first.code, second.code) == (1, 1)
    assert not partial_of(out).exists()


def test_a_second_process_of_the_same_rank_is_refused(recipe, out):
    ranks = [Rank(recipe, out, rank, 3, "-q", join=3.0, aside=aside) for rank, aside in ((1, ""), (1, "also"), (0, ""))]
    *same, first = (rank.end() for rank in ranks)
    assert sum("error: another process came as rank 1 of 3" in each.stderr for each in same) == 1
    assert "error: of 3 processes rank 2 did not come" in first.stderr
    assert not out.exists()


def test_a_second_set_of_processes_is_refused_and_disturbs_none(recipe, out, whole):
    ranks = [Rank(recipe, out, rank, 2, "-q", rests_at=40 if rank else -1) for rank in range(2)]
    ranks[1].rests()
    second = [Rank(recipe, out, rank, 2, "-q", "--resume", join=1.0, aside="second") for rank in range(2)]
    assert "is being written by another process" in second[0].end().stderr
    assert "error: no merge by 2 processes was begun" in second[1].end().stderr
    with pytest.raises(OutputError, match="is being written by another process"):
        merge(recipe, out, resume=True)
    assert ranks[0].process.is_alive()
    ranks[1].process.kill()
    assert ranks[0].end().code == 1
    settle(recipe, out, whole, 2)


@pytest.mark.parametrize(
    ("option", "told"), [("--delete-consumed", "for one process"), ("--as-adapter", "by one process")]
)
def test_what_only_one_process_can_do_is_refused_by_several(recipe, out, option, told):
    for ended in together(recipe, out, 2, "-q", option):
        assert ended.code == 1
        assert told in ended.stderr
    assert not partial_of(out).exists()


def test_a_folder_that_is_taken_is_refused(recipe, out):
    out.mkdir()
    (out / "mine").write_text("")
    first, second = (rank.end() for rank in [Rank(recipe, out, rank, 2, "-q", join=1.0) for rank in range(2)])
    assert "is not empty" in first.stderr
    assert (first.code, second.code) == (1, 1)
    assert [path.name for path in out.iterdir()] == ["mine"]
