"""Run a command in a child process and watch its memory and its time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import ROOT

EVERY_SECONDS = 0.02
# long enough for what is measured in a pause to cost little, short beside how the machine's rate drifts
PAUSE_EVERY_SECONDS = 45.0
# the package works from a bare checkout as well as installed
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a finished command took. Anonymous memory is sampled; the resident peak is the kernel's own.

    elapsed_seconds                      without the pauses
    disk_read_bytes, disk_written_bytes  what the kernel counted: not what came from the page cache
    """

    stdout: str
    elapsed_seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    samples: int
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    paused_seconds: float = 0.0

    def json(self) -> dict[str, float]:
        """The JSON object on the last line of its output."""
        found: dict[str, float] = json.loads(self.stdout.strip().splitlines()[-1])
        return found


def run(
    command: Sequence[str],
    environment: Mapping[str, str] = ENVIRONMENT,
    in_pauses: Callable[[], None] | None = None,
) -> Ran:
    """Run it to its end. Stops this program with its last words when it fails.

    in_pauses  called while the command is stopped, every `PAUSE_EVERY_SECONDS`: to measure the machine beside it
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as talk:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=talk, cwd=ROOT, env=environment)
        anonymous = resident = samples = 0
        paused, since_pause = 0.0, began
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            memory = memory_of(child.pid)
            anonymous = max(anonymous, memory.get("RssAnon", 0))
            resident = max(resident, memory.get("VmHWM", 0))
            samples += 1
            time.sleep(EVERY_SECONDS)
            if in_pauses is not None and time.perf_counter() - since_pause >= PAUSE_EVERY_SECONDS:
                since_pause = time.perf_counter()
                os.kill(child.pid, signal.SIGSTOP)
                try:
                    in_pauses()
                finally:
                    os.kill(child.pid, signal.SIGCONT)
                paused += time.perf_counter() - since_pause
                since_pause = time.perf_counter()
        elapsed = time.perf_counter() - began - paused
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        talk.seek(0)
        if child.returncode:
            name = " ".join(Path(word).name for word in command[:4])
            raise SystemExit(f"error: `{name} …` ended with {child.returncode}\n{talk.read()[-4000:]}")
        return Ran(
            stdout=output.read(),
            elapsed_seconds=elapsed,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_anonymous_bytes=anonymous,
            peak_resident_bytes=resident,
            samples=samples,
            # in sectors
            disk_read_bytes=512 * usage.ru_inblock,
            disk_written_bytes=512 * usage.ru_oublock,
            paused_seconds=paused,
        )


def merge(recipe: Path, out: Path, *options: str) -> Ran:
    """`streammerge merge RECIPE OUT --json`, from nothing: what an earlier run left at OUT is deleted."""
    for old in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(old, ignore_errors=True)
    return run([sys.executable, "-m", "streammerge", "merge", str(recipe), str(out), "--json", *options])


def write_recipe(
    path: Path,
    method: str,
    models: Sequence[Path],
    base: Path | None = None,
    parameters: Mapping[str, object] | None = None,
    **rest: object,
) -> Path:
    """Write a recipe that merges equally weighted models; JSON is YAML."""
    recipe: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(model.resolve()), "parameters": {}} for model in models],
        "parameters": dict(parameters or {}),
        "dtype": "bfloat16",
        **rest,
    }
    if base is not None:
        recipe["base_model"] = str(base.resolve())
    path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return path


def memory_of(pid: int | str) -> dict[str, int]:
    """The memory lines of /proc/PID/status in bytes; nothing once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in pairs}
