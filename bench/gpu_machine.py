"""GPU check: what the machine is, whether the kernels' tests pass there, and the rates that nothing exceeds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial

import rows
import torch
from gpu_run import Run, Way, relative_error
from torch import Tensor

from streammerge.budget import available_memory_bytes
from streammerge.memory import STAGED_SLOT_BYTES

SMI_FACTS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
    "pcie.link.gen.current",
    "pcie.link.width.current",
)
TESTS_AT_ONCE = 8
# a few seconds' worth, to try the section out
SMALL_TESTS = "a_gram_adds_to_what_is_there or no_experts_sum_to_zero"
# rows of a product that are compared with float64
SAMPLED = 64
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SMALL_SHAPES = ((96, 64),)


def machine(run: Run) -> None:
    """What is measured on."""
    gpu: dict[str, object] = {}
    if run.on_gpu:
        facts = torch.cuda.get_device_properties(run.device)
        gpu = {
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "device_bytes": facts.total_memory,
            "device_free_bytes": torch.cuda.mem_get_info(run.device)[0],
            "l2_bytes": facts.L2_cache_size,
            "cuda": torch.version.cuda,
            "expandable_segments": torch.cuda.memory._snapshot()
            .get("allocator_settings", {})
            .get("expandable_segments"),
            "linalg": str(torch.backends.cuda.preferred_linalg_library()),
            "smi": _smi(),
        }
    triton = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
    run.row(
        "facts",
        "green",
        **gpu,
        triton=getattr(triton, "__version__", None),
        commit=rows._commit() if shutil.which("git") else "none",
        machine=rows._machine(),
        versions=rows._versions(),
        free_bytes={
            "memory": available_memory_bytes(),
            "shared": shutil.disk_usage(run.shared).free if run.shared.exists() else 0,
            "disk": shutil.disk_usage(rows.ROOT).free,
        },
    )


def _smi() -> dict[str, str] | None:
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(SMI_FACTS)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(SMI_FACTS, (word.strip() for word in said.splitlines()[0].split(",")), strict=False))


def kernel_tests(run: Run) -> None:
    """tests/kernels, compiled where there is a GPU. What pytest says goes to gpu_*.txt beside the rows."""
    if run.small:
        groups = {"tests": ["-k", SMALL_TESTS]}
    else:
        # compiled ahead of time: in a module's fixture, so that spreading a module repeats it
        groups = {"tests": ["-k", "not ahead_of_time"], "ahead_of_time": ["-k", "ahead_of_time"]}
    spread = {"tests": (TESTS_AT_ONCE, "worksteal"), "ahead_of_time": (3, "loadfile")}
    # other plugins that happen to be installed may warn, which is an error to these tests; so may torch itself
    # about the variable that a merge sets for its allocator
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    with ExitStack() as running:
        processes = {}
        for name, chosen in groups.items():
            command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
            if not run.small and importlib.util.find_spec("xdist"):
                # most of the time goes into compiling
                workers, how = spread[name]
                command += ["-p", "xdist.plugin", "-n", str(min(workers, os.cpu_count() or 1)), "--dist", how]
            log = running.enter_context((run.results / f"gpu_{name}.txt").open("w", encoding="utf-8"))
            process = subprocess.Popen(
                [*command, "tests/kernels"], cwd=rows.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            running.callback(_end, process)
            processes[name] = process
        for name, process in processes.items():
            began, ended = time.perf_counter(), None
            with suppress(subprocess.TimeoutExpired):
                ended = process.wait(max(run.left_seconds, 0.1))
            counts, failed = counted((run.results / f"gpu_{name}.txt").read_text(encoding="utf-8"))
            error = (
                None if ended == 0 else "stopped for want of time" if ended is None else f"pytest ended with {ended}"
            )
            run.row(
                f"tests/kernels, {name}", "green" if ended == 0 and counts["PASSED"] else "red", counts=counts,
                failed=failed, error=error, waited_seconds=time.perf_counter() - began,
            )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def counted(text: str) -> tuple[dict[str, int], list[str]]:
    """Tests by outcome, and the names of those that failed, from what pytest -v or xdist writes."""
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    # NAME WORD [ 10%], or with xdist [gw0] [ 10%] WORD NAME
    plain = re.findall(rf"^(tests/\S+(?: .*)?) ({words})\s+\[ *\d+%\]", text, re.MULTILINE)
    spread = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (tests/.*?) *$", text, re.MULTILINE)
    found = plain + [(name, word) for word, name in spread]
    counts = Counter(word for _, word in found)
    return {"PASSED": 0, **counts}, [name for name, word in found if word in ("FAILED", "ERROR")]


def ceilings(run: Run) -> None:
    """Copies and the vendor's products."""
    run.part("copy on the device", _device_copy)
    run.part("copy from and to the host", _host_copies)
    for k, n in run.pick(SHAPES, SMALL_SHAPES):
        for dtype in (torch.float16, torch.float32, torch.float64):
            run.part(f"XᵀX, {str(dtype)[6:]}, X {k}x{n}", _product, dtype, k, n)


def _device_copy(run: Run) -> None:
    run.row("copy on the device", "green", gb_per_s=run.copy_gb_per_s, way="copy_")


def _host_copies(run: Run) -> None:
    """Between the device and memory that is locked as the engine locks it, a slot at a time."""
    nbytes = run.pick(1 << 30, 4 << 20)
    device = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=run.device, generator=run.generator)
    hosts = {name: torch.empty(nbytes, dtype=torch.uint8) for name in ("pageable", "locked", "locked too")}
    for host in hosts.values():
        host.copy_(device)
    runtime = torch.cuda.cudart() if run.on_gpu else None
    locked = [host for name, host in hosts.items() if name != "pageable"]
    try:
        for host in locked if runtime else ():
            failed = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
            assert failed == 0, f"cudaHostRegister: CUDA error {failed}"
        back = torch.empty_like(device)
        sides = [torch.cuda.Stream() for _ in range(2)] if run.on_gpu else []

        def both() -> None:
            if not sides:
                _by_slots(back, locked[0])
                _by_slots(locked[1], device)
                return
            with torch.cuda.stream(sides[0]):
                _by_slots(back, locked[0])
            with torch.cuda.stream(sides[1]):
                _by_slots(locked[1], device)

        def same(way: object, source: Tensor, target: Tensor) -> float:
            target.zero_()
            run.synchronize()
            way()
            run.synchronize()
            return 0.0 if torch.equal(source.cpu(), target.cpu()) else float("inf")

        pairs = {f"{name} to device": (host, back) for name, host in list(hosts.items())[:2]}
        pairs |= {f"device to {name}": (device, host) for name, host in list(hosts.items())[:2]}
        for name, (source, target) in pairs.items():
            way = partial(_by_slots, target, source)
            timed = Way(call=way, error=partial(same, way, source, target), tolerance=0.0)
            run.compare(name, {"slots": timed}, nbytes=nbytes, wall=True)
        timed = Way(call=both, error=partial(same, both, locked[0], back), tolerance=0.0)
        run.compare("both ways at once", {"slots": timed}, nbytes=2 * nbytes, wall=True)
    finally:
        run.synchronize()
        for host in locked if runtime else ():
            runtime.cudaHostUnregister(host.data_ptr())


def _by_slots(target: Tensor, source: Tensor) -> None:
    for start in range(0, len(source), STAGED_SLOT_BYTES):
        part = slice(start, start + STAGED_SLOT_BYTES)
        target[part].copy_(source[part], non_blocking=True)


def _product(run: Run, dtype: torch.dtype, k: int, n: int) -> None:
    x = run.normal(k, n, dtype=dtype)
    exact = x[:, :SAMPLED].double().mT @ x.double()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5

    def product() -> Tensor:
        return full_product(x.mT, x)

    ways = {"cublas": Way(call=product, error=lambda: relative_error(product()[:SAMPLED], exact), tolerance=tolerance)}
    run.compare(f"XᵀX, {str(dtype)[6:]}", ways, flops=2 * k * n * n, shape=[k, n])


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """The vendor's product, with float32 sums and result for float16; torch has none of that on the CPU."""
    if left.dtype != torch.float16:
        return left @ right
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)
