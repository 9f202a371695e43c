"""Compute what merges of 70B, 405B and DeepSeek-V3's size take on several machines, and write docs/scale.md.

python bench/on_paper.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rows
from headers import HeaderStorage, Shapes, deepseek_v3, llama
from llama import SIZES

from streammerge.plan import Plan, make_plan
from streammerge.recipe import Recipe

PAGE = rows.ROOT / "docs" / "scale.md"
EXPERTS = 3
# more than any machine has: what a plan takes of it is what it needs
UNBOUNDED = 1 << 44
MODELS: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "Llama-3.1-70B": ("llama", lambda: llama(8192, 28672, 80, 64, 8, 128256)),
    "Llama-3.1-405B": ("llama", lambda: llama(16384, 53248, 126, 128, 8, 128256)),
    "DeepSeek-V3 (bfloat16)": ("deepseek_v3", deepseek_v3),
}
CHECKED = "Llama-3.1-70B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What bounds a merge: rates in bytes and FLOPs per second, memory in bytes.

    source  where the rates are from; "measured" are rows of this repository
    """

    name: str
    flops_per_second: float
    read_bytes_per_second: float
    write_bytes_per_second: float
    memory_bytes: int
    device_memory_bytes: int | None = None
    bus_bytes_per_second: float | None = None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a merge takes, as its plan says: on a CPU, and with an accelerator."""

    parameters: int
    tensors: int
    flops: int
    input_bytes: int
    output_bytes: int
    read_bytes: int
    memory_bytes: int
    device_read_bytes: int
    device_host_memory_bytes: int
    device_memory_bytes: int


def need(shapes: Shapes, model_type: str) -> Need:
    """Plan the merge of three experts by actmat, on a CPU and on a device."""
    storage = HeaderStorage(shapes, model_type)
    recipe = Recipe.load(
        {
            "merge_method": "actmat",
            "base_model": "base",
            "models": [{"model": f"expert-{number}"} for number in range(EXPERTS)],
        }
    )

    def planned(**device: Any) -> Plan:
        return make_plan(recipe, storage, memory_bytes=UNBOUNDED, **device)

    host, device = planned(), planned(device="cuda", device_memory_bytes=UNBOUNDED)
    assert device.device_memory is not None
    return Need(
        parameters=sum(step.elements for step in host.steps),
        tensors=len(host.steps),
        flops=host.flops,
        input_bytes=(EXPERTS + 1) * host.layout.total_bytes,
        output_bytes=host.layout.total_bytes,
        read_bytes=host.work.read_bytes,
        memory_bytes=host.memory.peak_bytes,
        device_read_bytes=device.work.read_bytes,
        device_host_memory_bytes=device.memory.peak_bytes,
        device_memory_bytes=device.device_memory.largest_step_bytes,
    )


def machines(results: Path) -> list[Machine]:
    """The machine of the newest rows, and what others have by their data sheets."""
    flops, source = _flops_per_second(results)
    read = _newest(results, "readers", state="cold", way="positioned")
    write = _newest(results, "linear_io", size="1.1b", way="dd")
    written = 2 * sum(shape_bytes for shape_bytes in SIZES["1.1b"].nbytes().values()) // 2
    gb, gib = 10**9, 2**30
    measured = Machine(
        name="2 cores, as measured",
        flops_per_second=flops,
        read_bytes_per_second=read["gb_per_second"] * gb,
        write_bytes_per_second=written / write["write_seconds"],
        memory_bytes=read["machine"]["memory_bytes"],
        source=f"measured: {source}; disk of {read['date'][:10]} and {write['date'][:10]}",
    )
    return [
        measured,
        Machine(
            name="laptop, 8 cores, 32 GB", flops_per_second=4 * flops, read_bytes_per_second=3 * gb,
            write_bytes_per_second=2 * gb, memory_bytes=32 * gb,
            source="prediction: the measured cores times four, an NVMe drive of 3 and 2 GB/s",
        ),
        Machine(
            name="one 24 GB GPU (RTX 4090)", flops_per_second=82.6e12, read_bytes_per_second=7 * gb,
            write_bytes_per_second=5 * gb, memory_bytes=64 * gib, device_memory_bytes=24 * gb,
            bus_bytes_per_second=32 * gb,
            source="prediction: data sheet's float32 peak, PCIe 4.0 x16, an NVMe drive of 7 and 5 GB/s",
        ),
        Machine(
            name="one H200", flops_per_second=67e12, read_bytes_per_second=7 * gb, write_bytes_per_second=5 * gb,
            memory_bytes=256 * gib, device_memory_bytes=141 * gb, bus_bytes_per_second=64 * gb,
            source="prediction: data sheet's float32 peak without tensor cores, PCIe 5.0 x16, one NVMe drive",
        ),
        Machine(
            name="8 H200, 4 drives", flops_per_second=8 * 67e12, read_bytes_per_second=28 * gb,
            write_bytes_per_second=20 * gb, memory_bytes=2048 * gib, device_memory_bytes=141 * gb,
            bus_bytes_per_second=8 * 64 * gb,
            source="prediction: eight times one, as if the plan were shared out evenly",
        ),
    ]  # fmt: skip


def _flops_per_second(results: Path) -> tuple[float, str]:
    """Of actmat on this machine's cores, from the newest 7B merge or, before there is one, of 1.1B."""
    if (results / "seven.jsonl").exists():
        row = _newest(results, "seven", size="7b")
        return row["matrix_flops"] / row["matrix_seconds"], f"7B of {row['date'][:10]}"
    row = _newest(results, "memory", size="1.1b", case="actmat-3")
    flops = need(SIZES["1.1b"].tensors(), "llama").flops
    return flops / row["merge"]["elapsed_seconds"], f"1.1B of {row['date'][:10]}"


def _newest(results: Path, benchmark: str, **facts: object) -> dict[str, Any]:
    lines = (results / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row for row in map(json.loads, lines) if all(row.get(key) == value for key, value in facts.items())]
    if not found:
        raise SystemExit(f"error: no row of {benchmark} with {facts}")
    newest: dict[str, Any] = found[-1]
    return newest


def outcome(wanted: Need, machine: Machine) -> dict[str, Any]:
    """How long it takes, and which limit binds; or which memory is too small. Parts overlap: the longest counts."""
    on_device = machine.device_memory_bytes is not None
    memory = wanted.device_host_memory_bytes if on_device else wanted.memory_bytes
    read = wanted.device_read_bytes if on_device else wanted.read_bytes
    if memory > machine.memory_bytes:
        return {"limit": "memory", "memory_bytes": memory, "seconds": None}
    if machine.device_memory_bytes is not None and wanted.device_memory_bytes > machine.device_memory_bytes:
        return {"limit": "device memory", "memory_bytes": wanted.device_memory_bytes, "seconds": None}
    parts = {
        "arithmetic": wanted.flops / machine.flops_per_second,
        "reading": read / machine.read_bytes_per_second,
        "writing": wanted.output_bytes / machine.write_bytes_per_second,
    }
    if machine.bus_bytes_per_second is not None:
        parts["bus"] = (read + wanted.output_bytes) / machine.bus_bytes_per_second
    limit = max(parts, key=lambda name: parts[name])
    return {"limit": limit, "memory_bytes": memory, "seconds": parts[limit]}


def render(row: Mapping[str, Any]) -> str:
    """The page of a row."""
    needs = {name: Need(**facts) for name, facts in row["needs"].items()}
    lines = [
        "# What a merge takes at scale",
        "",
        f"`actmat` of a base and {EXPERTS} experts in bfloat16, in its default setting. Sizes are those of real plans:",
        "names, shapes and files of each model, with no weights behind them. **Times are computed, not measured**: the",
        "plan's bytes and FLOPs over the rates below, the longest of reading, arithmetic, writing and the bus, which",
        "overlap. Only the first machine's rates were measured; no GPU's were.",
        "",
        f"Written by `bench/on_paper.py`, {row['date'][:10]}; its numbers are a row of `bench/results/on_paper.jsonl`.",
        "",
        "## What the plans need",
        "",
        "| model | parameters | tensors | PFLOP | disk: in + out | read | memory | with a GPU: read | on the GPU |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {name} | {wanted.parameters / 1e9:.1f} B | {wanted.tensors:,} | {wanted.flops / 1e15:.1f} | "
        f"{_tb(wanted.input_bytes)} + {_tb(wanted.output_bytes)} | {_tb(wanted.read_bytes)} | "
        f"{_gib(wanted.memory_bytes)} | {_tb(wanted.device_read_bytes)} | {_gib(wanted.device_memory_bytes)} |"
        for name, wanted in needs.items()
    ]
    lines += [
        "",
        "Memory is the largest step's workspace and the slots that are read and written through. It grows with the",
        "widest matrix, not with the model. Reading is more than the inputs where a matrix's changes are formed twice.",
        "",
        "## How long, and what binds",
        "",
        f"| machine | {' | '.join(needs)} |",
        f"| --- |{' --: |' * len(needs)}",
    ]
    built = [Machine(**facts) for facts in row["machines"]]
    for machine in built:
        cells = [_cell(outcome(wanted, machine)) for wanted in needs.values()]
        lines.append(f"| {machine.name} | {' | '.join(cells)} |")
    lines += ["", "## The rates", "", "| machine | TFLOP/s | read | write | bus | memory | GPU memory | from |",
              "| --- | --: | --: | --: | --: | --: | --: | --- |"]  # fmt: skip
    lines += [
        f"| {m.name} | {m.flops_per_second / 1e12:.3g} | {_rate(m.read_bytes_per_second)} | "
        f"{_rate(m.write_bytes_per_second)} | {_rate(m.bus_bytes_per_second)} | {_gib(m.memory_bytes)} | "
        f"{_gib(m.device_memory_bytes)} | {m.source} |"
        for m in built
    ]
    lines += [
        "",
        "A data sheet's peak is never reached: take a GPU's times as lower bounds. Full or warm disks are slower.",
        "The last row is what several GPUs could give at best, if one merge were shared out evenly.",
    ]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Any]) -> str:
    if found["seconds"] is None:
        return f"does not fit: {_gib(found['memory_bytes'])} of {found['limit']}"
    return f"{_time(found['seconds'])}, {found['limit']}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def _tb(nbytes: float) -> str:
    return f"{nbytes / 1e12:.2f} TB"


def _gib(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**30:.1f} GiB"


def _rate(bytes_per_second: float | None) -> str:
    return (
        "-"
        if bytes_per_second is None
        else f"{bytes_per_second / 1e9:{'.1f' if bytes_per_second < 1e10 else '.0f'}} GB/s"
    )


def newest_page(results: Path) -> str:
    """The page of the newest row."""
    return render(json.loads((results / "on_paper.jsonl").read_text(encoding="utf-8").splitlines()[-1]))


def main(words: Sequence[str] | None = None) -> None:
    parser = rows.arguments(__doc__, sizes=("all", "tiny"), size="all")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="where the page is written")
    given = parser.parse_args(words)
    chosen = MODELS if given.size == "all" else {CHECKED: MODELS[CHECKED]}
    needs = {name: asdict(need(shapes(), kind)) for name, (kind, shapes) in chosen.items()}
    built = [asdict(machine) for machine in machines(rows.RESULTS)]
    rows.append(given.results, "on_paper", {"size": given.size, "experts": EXPERTS, "needs": needs, "machines": built})
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(newest_page(given.results), encoding="utf-8")
    print(given.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
