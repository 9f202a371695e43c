"""The command line: data on stdout, talk on stderr, exit codes that scripts can rely on."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from streammerge import methods, progress, write
from streammerge.cli import cli, main
from streammerge.progress import ProgressLine
from tests.models import llama_tensors, recipe_of, save_model
from tests.stored import digests, tensors_of

ROOT = Path(__file__).resolve().parent.parent
VERBS = (
    "merge", "plan", "inspect", "verify", "report", "diagnose", "evaluate", "batch", "capture", "extract", "methods",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command line in this process, up to its exit code."""
    handler, root = signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["streammerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return Result(stopped.value.code if isinstance(stopped.value.code, int) else 0, out, err)

    yield call
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger().handlers[:] = root


@pytest.fixture
def recipe(family: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(family, "task_arithmetic"), indent=1))
    return path


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-m", "streammerge", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, env=environment, check=False, cwd=ROOT,
    )  # fmt: skip


def alone(text: str) -> object:
    """The one JSON document that stdout holds."""
    assert text.count("\n") == 1
    return json.loads(text)


def test_merge_says_what_it_did_on_stderr_and_nothing_on_stdout(run, recipe, tmp_path):
    result = run("merge", recipe, tmp_path / "out")
    assert (result.code, result.out) == (0, "")
    assert re.fullmatch(
        rf"merged 20 tensors into {tmp_path}/out: 16\.1 KiB in \d+\.\d s\n(rounding took .*\n)?", result.err
    )
    assert tensors_of(tmp_path / "out")


def test_merge_json_is_alone_on_stdout(run, recipe, tmp_path):
    result = run("merge", recipe, tmp_path / "out", "--json")
    totals = alone(result.out)
    assert isinstance(totals, dict)
    assert totals.keys() == {"tensors", "resumed_tensors", "read_bytes", "written_bytes", "elapsed_seconds"}
    assert totals["tensors"] == 20
    assert result.err == ""


def test_merge_needs_no_recipe_file(run, family, tmp_path):
    arguments = ["--base", family["base"], "--expert", family["math"], "--expert", family["code"]]
    assert run("merge", *arguments, "--method", "task_arithmetic", tmp_path / "out").code == 0
    report = json.loads((tmp_path / "out" / "streammerge.json").read_text())
    assert report["recipe"] == recipe_of({n: family[n] for n in ("base", "math", "code")}, "task_arithmetic")


def test_without_a_method_it_is_actmat(run, family, tmp_path):
    result = run("merge", "--base", family["base"], "--expert", family["math"], tmp_path / "out", "-q")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out" / "streammerge.json").read_text())["recipe"]["merge_method"] == "actmat"


def test_an_interrupted_merge_is_resumed_by_the_flag(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "GROUP_BYTES", 1)
    seen: list[int] = []

    def stop(self: ProgressLine, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressLine, "show", stop)
        result = run("merge", recipe, tmp_path / "out")
    assert (result.code, result.out) == (130, "")
    hint = f"hint: Pass `--resume` to continue: `{tmp_path}/out.partial` holds what is done."
    assert result.err.strip() == f"interrupted\n\n{hint}"
    again = run("merge", recipe, tmp_path / "out")
    assert again.code == 1
    assert "Pass `--resume` to continue it" in again.err
    resumed = run("merge", recipe, tmp_path / "out", "--resume", "--json")
    assert resumed.code == 0
    assert json.loads(resumed.out)["resumed_tensors"] >= 8


def test_an_interruption_with_nothing_done_needs_no_hint(run, recipe, tmp_path, monkeypatch):
    def stop(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streammerge.api.run", stop)
    result = run("merge", recipe, tmp_path / "out")
    assert (result.code, result.err.strip()) == (130, "interrupted")


def test_plan_shows_bytes_memory_and_disk_and_writes_nothing(run, recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("plan", recipe, tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    for line in ("task_arithmetic of 3 models onto base, BF16", "tensors   20", "read ", "write ", "memory ", "time "):
        assert line in result.out
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_json_is_alone_on_stdout(run, recipe):
    table = alone(run("plan", recipe, "--json", "--max-shard-size", "6KB").out)
    assert isinstance(table, dict)
    assert len(table["steps"]) == 20
    assert table["shards"] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert table["read_bytes"] == sum(step["read_bytes"] for step in table["steps"])


def test_inspect_of_one_model_lists_its_tensors(run, family):
    result = run("inspect", family["base"])
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == f"{family['base']}: 20 tensors (19 BF16, 1 I64), 14.2 KiB"
    assert re.search(r"^  model\.norm\.weight +BF16 +vector +\[16\]$", result.out, re.MULTILINE)


def test_inspect_of_several_models_tells_whether_they_differ(run, family, tmp_path):
    assert run("inspect", family["base"], family["math"]).out.endswith("same names and shapes in all\n")
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    other = save_model(tmp_path / "other", tensors)
    assert (
        f"`lm_head.weight` is in `{family['base']}` but not in `{other}`" in run("inspect", family["base"], other).out
    )


def test_inspect_json_is_alone_on_stdout(run, family):
    table = alone(run("inspect", family["base"], family["chat"], "--json").out)
    assert isinstance(table, dict)
    assert [model["location"] for model in table["models"]] == [str(family["base"]), str(family["chat"])]
    assert table["differences"] == []


def test_verify_exits_with_3_when_it_finds_a_difference(run, recipe, tmp_path):
    assert run("merge", recipe, tmp_path / "out", "-q").code == 0
    result = run("verify", tmp_path / "out")
    assert (result.code, result.out, result.err) == (0, f"{tmp_path}/out: 20 tensors, 0 problems\n", "")
    assert alone(run("verify", tmp_path / "out", "--json").out) == {
        "tensors": 20, "problems": [], "notes": [], "unchecked": [], "recomputed": [],
    }  # fmt: skip
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    result = run("verify", tmp_path / "out")
    assert result.code == 3
    assert "has other bytes than the report's checksum says" in result.out
    result = run("verify", tmp_path / "out", "--json")
    assert result.code == 3
    assert len(json.loads(result.out)["problems"]) == 1


def test_verify_exits_with_1_when_it_cannot_look(run, family):
    assert run("verify", family["base"], "--inputs").code == 1


def test_verify_says_of_another_tools_model_what_it_could_not_check(run, family):
    result = run("verify", family["math"], "--base", family["base"])
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0].startswith("not checked: there is no `streammerge.json`")
    assert run("verify", family["math"], "--base", family["base"], "--json").code == 0


def test_verify_merges_a_sample_again_and_exits_with_3_where_it_differs(run, recipe, family, tmp_path):
    assert run("merge", recipe, tmp_path / "out", "-q").code == 0
    result = run("verify", tmp_path / "out", "--recompute", 20, "--seed", 1, "--memory", "1GiB")
    assert (result.code, result.err) == (0, "")
    assert len(re.findall(r"^`.*` \(\w+, \w+\): 0\.0e\+00 of its change beyond rounding, 1\.0e-04 allowed$", result.out,
                          re.MULTILINE)) == 20  # fmt: skip
    file = family["math"] / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x3f")
    result = run("verify", tmp_path / "out", "--recompute", 20, "--json")
    assert result.code == 3
    table = alone(result.out)
    assert isinstance(table, dict)
    assert len(table["problems"]) == 1
    assert "it is not what the recipe and inputs give" in table["problems"][0]


def test_merge_takes_a_report_as_its_recipe(run, recipe, tmp_path):
    assert run("merge", recipe, tmp_path / "out", "-q", "--max-shard-size", "6KB").code == 0
    assert run("merge", tmp_path / "out" / "streammerge.json", tmp_path / "again", "-q").code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "again")


def test_methods_lists_every_method(run):
    result = run("methods")
    assert [line.split()[0] for line in result.out.splitlines()] == methods.names()
    table = alone(run("methods", "--json").out)
    assert isinstance(table, dict)
    assert list(table) == methods.names()
    assert all(table.values())


@pytest.mark.parametrize("name", methods.names())
def test_methods_explains_each_method(run, name):
    result = run("methods", name)
    assert (result.code, result.err) == (0, "")
    described = methods.describe(name)
    assert result.out.startswith(f"{name}   {described.summary}\n")
    for parameter in described.parameters.values():
        assert re.search(rf"^  {parameter.name} +\S.*; default ", result.out, re.MULTILINE), (
            f"{parameter.name} has no text"
        )
    table = alone(run("methods", name, "--json").out)
    assert isinstance(table, dict)
    assert table["name"] == name
    assert table["parameters"].keys() == {p.name for p in described.parameters.values()}


@pytest.mark.parametrize(
    ("command", "message", "hint"),
    [
        ("methods actmatt", "unknown method `actmatt`", "`streammerge methods` lists them."),
        ("plan nowhere.yaml", "`nowhere.yaml` does not exist", None),
        ("inspect nowhere", "`nowhere` does not exist", "Name a model folder."),
        ("verify nowhere", "`nowhere` does not exist", "Name a model folder."),
        ("merge --base b --expert e --method actmatt out", "unknown method `actmatt`", "Did you mean `actmat`?"),
        ("merge --expert e out", "method `actmat` needs a base model", "Add `base_model`"),
        ("merge --base b --expert e --device tpu out", "`tpu` is not a device", "`cuda` is the first NVIDIA GPU."),
        ("merge recipe.yaml out --memory lots", "`lots` is not a size", "Write a number and a unit"),
        ("merge recipe.yaml out --memory 1MiB", "the largest step needs a budget of", "Pass `--memory"),
        ("merge recipe.yaml out --max-shard-size 0", "`0` is not a size", "Write a number and a unit"),
        ("plan recipe.yaml --memory -3GiB", "`-3GiB` is not a size", "Write a number and a unit"),
    ],
)
def test_an_error_is_one_message_and_one_hint_on_stderr(run, recipe, monkeypatch, command, message, hint):
    monkeypatch.chdir(recipe.parent)
    result = run(*command.split(), "--json")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert message in result.err.splitlines()[0]
    if hint:
        assert f"\n\nhint: {hint}" in result.err
    assert "Traceback" not in result.err
    assert not (recipe.parent / "out").exists()


def test_a_problem_in_a_recipe_is_named_by_file_and_line(run, family, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: linear\nmodels:\n  - model: {family['math']}\n    wieght: 2\n")
    result = run("merge", path, tmp_path / "out")
    assert result.code == 1
    assert result.err.startswith(f"error: {path}:4: unknown key `wieght`")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "unmerge",
        "merge",
        "merge recipe.yaml",
        "merge a b c",
        "merge --base b out",
        "merge --base b --expert e recipe.yaml out",
        "merge a b --memory",
        "plan",
        "plan --nonsense r",
        "inspect",
        "verify",
        "verify a b",
    ],
)
def test_wrong_usage_exits_with_2(run, command):
    result = run(*command.split())
    assert (result.code, result.out) == (2, "")
    assert "Error: " in result.err or result.err.startswith("Usage: streammerge")


def test_a_bug_shows_its_traceback(recipe, monkeypatch, tmp_path):
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("streammerge.api.plan", broken)
    monkeypatch.setattr(sys, "argv", ["streammerge", "plan", str(recipe)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        main()
    signal.signal(signal.SIGTERM, handler)


def test_warnings_go_to_stderr_and_leave_json_alone(run, family, tmp_path):
    (family["math"] / "chat_template.jinja").write_text("{{ x }}")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(family, "linear")))
    result = run("plan", path, "--json")
    assert result.err.startswith("warning: `base` has no chat template but `math` has")
    assert alone(result.out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_speaks_of_every_option(verb):
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    command = cli.commands[verb]
    assert command.help is not None
    assert len(command.help.splitlines()[0]) <= 75
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in result.output
        assert isinstance(parameter, click.Argument) or parameter.help, f"{parameter.name} has no help"


def test_help_names_every_verb():
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    assert set(VERBS) == set(cli.commands)
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\S", result.output, re.MULTILINE)


def test_the_version_is_told(run):
    result = run("--version")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("streammerge, version 0.")


def test_help_comes_in_half_a_second():
    in_a_process("--help")
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert in_a_process("--help").returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5


def test_refusals_load_no_torch(recipe, family, tmp_path):
    code = (
        "import sys; sys.argv[0] = 'streammerge'\n"
        "from streammerge.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    (tmp_path / "broken.yaml").write_text("merge_method: linear\n")
    for arguments, expected in {
        ("--help",): "0 False",
        ("methods",): "0 False",
        ("plan", str(recipe)): "0 False",
        ("inspect", str(family["base"])): "0 False",
        ("merge", str(tmp_path / "broken.yaml"), "out"): "1 False",
        ("merge", str(recipe), str(tmp_path / "out"), "--memory", "1MiB"): "1 False",
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.splitlines()[-1] == expected, (arguments, done.stdout, done.stderr)


def test_a_merge_as_a_process_keeps_its_streams_apart(recipe, tmp_path):
    done = in_a_process("merge", recipe, tmp_path / "out", "--json")
    assert done.returncode == 0
    assert alone(done.stdout)
    assert done.stderr == ""
    refused = in_a_process("merge", recipe, tmp_path / "out", "--json")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: `{tmp_path}/out` is not empty\n\nhint: Choose another folder, or delete this one first.\n"
    )


def test_a_reader_that_stops_early_is_no_traceback(family):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = f"{sys.executable} -m streammerge inspect {family['base']} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" not in done.stderr


# the progress line


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_progress_is_silent_for_half_a_minute_where_there_is_no_terminal(capsys, clock):
    with ProgressLine("merging 3 tensors", silent=False) as line:
        for _ in range(29):
            clock.now += 1
            line.show(100, 1000)
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_line_every_half_minute_where_there_is_no_terminal(capsys, clock):
    with ProgressLine("merging 3 tensors", silent=False) as line:
        for done in (1, 2, 3):
            clock.now += 30
            line.show(done << 30, 4 << 30)
            clock.now += 1
            line.show(done << 30, 4 << 30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "merging 3 tensors: 25%, 1.0 GiB of 4.0 GiB, 34.1 MiB/s, 90 s left",
        "merging 3 tensors: 50%, 2.0 GiB of 4.0 GiB, 33.6 MiB/s, 61 s left",
        "merging 3 tensors: 75%, 3.0 GiB of 4.0 GiB, 33.4 MiB/s, 31 s left",
    ]


def test_progress_of_nothing_divides_by_nothing(capsys, clock):
    with ProgressLine("merging 0 tensors", silent=False) as line:
        clock.now += 31
        line.show(0, 0)
    assert capsys.readouterr().err == "merging 0 tensors: 0%, 0 B of 0 B, 0 B/s, 0 s left\n"


def test_quiet_progress_says_nothing_however_long_it_takes(capsys, clock):
    with ProgressLine("merging", silent=True) as line:
        clock.now += 1000
        line.show(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("silent", [False, True])
def test_progress_is_a_bar_on_a_terminal(monkeypatch, silent):
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with ProgressLine("merging 3 tensors", silent=silent) as line:
            for done in range(11):
                time.sleep(0.02)
                line.show(done << 20, 10 << 20)
        stderr.flush()
        shown = ""
        # what a terminal shows arrives a little later
        while select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 100_000).decode()
    os.close(ours)
    if silent:
        assert shown == ""
    else:
        assert "merging 3 tensors" in shown
        assert "10.0M" in shown
        # the bar is taken away when the merge ends
        assert shown.rstrip(" ").endswith("\r")


def test_quiet_keeps_warnings_and_the_summary(run, family, tmp_path):
    (family["math"] / "chat_template.jinja").write_text("{{ x }}")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(family, "linear")))
    result = run("merge", path, tmp_path / "out", "--quiet")
    assert result.err.startswith("warning: ")
    assert "merged 20 tensors" in result.err
