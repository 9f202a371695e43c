"""Check and measure everything on a GPU: kernels, solver, a layer, a whole merge; under nine minutes, no network.

python bench/gpu.py FOLDER [--only SECTION] [--device cpu --small]

Rows are appended to FOLDER/gpu.jsonl as they come. Each section is a process of its own with a time limit:
an error on a GPU spoils the process that made it. A speed is written only where the result was right in the
same run. `--device cpu --small` tries the script out; kernels are interpreted then, and no time means anything.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import child
import gpu_rows
import rows

HERE = Path(__file__).resolve().parent
MEMORY_FOLDER = Path("/dev/shm")
TOTAL_SECONDS = 520
# where the script is only tried out, on a machine that may be busy with other things
SLOWER_ON_CPU = 4
# between what a section is told to end by and what ends it
GRACE_SECONDS = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the check: `function` of `module` is given a `Run`.

    most   seconds after which it is ended
    least  seconds without which it is not begun; kept free by the sections before it
    """

    name: str
    module: str
    function: str
    most: float
    least: float


SECTIONS = (
    Section(name="machine", module="gpu_machine", function="machine", most=40, least=10),
    Section(name="tests", module="gpu_machine", function="kernel_tests", most=100, least=20),
    Section(name="ceilings", module="gpu_machine", function="ceilings", most=50, least=15),
    Section(name="kernels", module="gpu_kernels", function="kernels", most=130, least=40),
    Section(name="solver", module="gpu_solver", function="solver", most=80, least=25),
    Section(name="layer", module="gpu_layer", function="layer", most=80, least=25),
    Section(name="merge", module="gpu_merge", function="merge", most=240, least=95),
)


def main() -> None:
    given = arguments()
    if given.section:
        raise SystemExit(carry_out(given))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given.results = given.results.resolve()
    given.results.mkdir(parents=True, exist_ok=True)
    given.run = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    deadline = time.monotonic() + given.seconds
    wanted = [section for section in SECTIONS if not given.only or section.name in given.only]
    lines = []
    for number, section in enumerate(wanted):
        began = time.monotonic()
        most = section.most * (1 if given.device == "cuda" else SLOWER_ON_CPU)
        allowed = min(most, deadline - began - sum(other.least for other in wanted[number + 1 :]))
        if allowed < section.least:
            _note(given, section, "skipped", f"{allowed:.0f} s left, {section.least:.0f} s needed")
        else:
            _carry_out_apart(given, section, allowed)
        counts = Counter(row["outcome"] for row in gpu_rows.rows_of(given.results, given.run, section.name))
        outcome = "red" if counts["red"] else "green" if counts["green"] else "skipped"
        seconds = f"{time.monotonic() - began:.1f}"
        lines.append((section.name, outcome, counts["green"], counts["red"], counts["skipped"], seconds))
    print("\n" + rows.table(("section", "outcome", "green", "red", "skipped", "seconds"), lines))
    # a section that did not run has checked nothing
    if any(line[1] != "green" for line in lines):
        raise SystemExit(1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, metavar="FOLDER", help="where rows are appended")
    parser.add_argument("--device", default="cuda", help="`cpu` tries the script out")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--only", action="append", choices=[section.name for section in SECTIONS], metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="when all should have ended")
    parser.add_argument(
        "--work", type=Path, default=rows.WORK / "gpu", metavar="DIR", help="where a model is merged to"
    )
    # how this program starts itself
    for hidden in ("--section", "--run"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def carry_out(given: argparse.Namespace) -> int:
    """Run one section in this process. 1 where a row of it is red."""
    (section,) = (section for section in SECTIONS if section.name == given.section)
    try:
        from streammerge.devices import prepare_torch

        # as before a merge: torch's libraries read these settings as they are loaded
        prepare_torch()
        from gpu_run import Run

        run = Run(
            section.name,
            results=given.results,
            run=given.run,
            device=given.device,
            small=given.small,
            seconds=given.seconds,
            shared=given.shared or MEMORY_FOLDER,
            work=given.work,
        )
        function = getattr(importlib.import_module(section.module), section.function)
    except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a row
        _note(given, section, "red", gpu_rows.told(error))
        return 1
    run.part("section", function, needs=0.0)
    return int(run.red)


def _carry_out_apart(given: argparse.Namespace, section: Section, seconds: float) -> None:
    """Run one section in a process of its own, and note it where that ended badly."""
    print(f"\n{section.name}: at most {seconds:.0f} s", flush=True)
    try:
        ended = _start(given, section, seconds)
    except OSError as error:
        _note(given, section, "red", str(error))
        return
    if ended is None:
        _note(given, section, "red", f"stopped after {seconds:.0f} s")
    elif ended != 0 and not any(
        row["outcome"] == "red" for row in gpu_rows.rows_of(given.results, given.run, section.name)
    ):
        _note(given, section, "red", f"ended with {ended}")


def _start(given: argparse.Namespace, section: Section, seconds: float) -> int | None:
    """The exit code of a section's own process; None where its time was up."""
    options = ["--section", section.name, "--run", given.run, "--device", given.device]
    options += ["--seconds", str(max(seconds - GRACE_SECONDS, seconds / 2)), *(["--small"] if given.small else [])]
    with ExitStack() as folders:
        if section.name == "merge":
            given.work.mkdir(parents=True, exist_ok=True)
            shared = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else given.work
            for option, parent in (("--shared", shared), ("--work", given.work)):
                folder = tempfile.mkdtemp(prefix="streammerge-gpu-", dir=parent)
                folders.callback(shutil.rmtree, folder, ignore_errors=True)
                options += [option, folder]
        command = [sys.executable, str(HERE / "gpu.py"), str(given.results), *options]
        interpreted = {"TRITON_INTERPRET": "1"} if given.device == "cpu" else {}
        # a session of its own, so that all it started can be ended with it
        process = subprocess.Popen(command, cwd=rows.ROOT, env=child.ENVIRONMENT | interpreted, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _note(given: argparse.Namespace, section: Section, outcome: str, why: str) -> None:
    gpu_rows.append(given.results, given.run, section.name, "section", outcome, small=given.small, error=why)


if __name__ == "__main__":
    main()
