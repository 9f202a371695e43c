"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them.

One child process compiles all the cases of a call: the tests' own process has kernels that are interpreted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
SHARED_BYTES = {80: 166912, 90: 232448}  # what one block may have


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with its launch constants.

    module       where it is, such as "streammerge_kernels.gram_triton"
    signature    argument to type: "*fp16", "i32", "fp32", "tensordesc<fp16[1, 64, 128]>". Those of tl.constexpr
                 are left out, and are all in `constants`, with values that JSON has
    divisible    pointers and integers that are multiples of 16, as a launch finds out by itself: 16-byte
                 loads need it. Descriptors have it
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a kernel became.

    sass         how often an instruction occurs, by every beginning of its name: "LDG", "LDG.E", "LDG.E.128"
    wait_depths  products still in flight where a loop that issues wgmma waits for them in every round; 0 is a
                 serialised loop. Empty where there is no wgmma
    ptx_vector_loads  loads from global memory of 16 bytes per thread
    warnings     the assembler's: that it serialises wgmma, for one
    """

    shared_bytes: int
    registers: int
    spill_bytes: int
    sass: dict[str, int]
    wait_depths: tuple[int, ...]
    ptx_vector_loads: int
    warnings: tuple[str, ...]


def compile_all(cases: Sequence[Case], capability: int) -> list[Facts]:
    """Compile the cases for 80, 90, ...; takes half a second to two seconds each. Raises what the compiler says."""
    with TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment["TRITON_CACHE_DIR"] = cache
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        child = subprocess.run(
            [sys.executable, "-c", "from tests.compiled import main; main()"],
            input=json.dumps({"cases": [dataclasses.asdict(case) for case in cases], "capability": capability}),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    assert child.returncode == 0, child.stderr[-6000:]
    found = json.loads(child.stdout.splitlines()[-1])
    return [Facts(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}) for facts in found]


def main() -> None:
    """The child: cases on stdin, facts as the last line on stdout."""
    asked = json.load(sys.stdin)
    facts = [_compile(Case(**case), asked["capability"]) for case in asked["cases"]]
    sys.stdout.write("\n" + json.dumps([dataclasses.asdict(f) for f in facts]) + "\n")


def _compile(case: Case, capability: int) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(case.module), case.kernel)
    names: list[str] = function.arg_names
    given = {*case.signature, *case.constants}
    assert given == set(names), f"{case.kernel}: {sorted(given ^ set(names))} on one side only"
    source = ASTSource(
        function,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx: str = kernel.asm["ptx"]
    with TemporaryDirectory() as folder:
        cubin, text = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        text.write_text(ptx)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _tool("cuobjdump", "--dump-sass", str(cubin))
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert target is not None
        assembler = "ptxas" if capability < 100 else "ptxas-blackwell"
        verbose = _tool(assembler, "-v", f"--gpu-name={target[1]}", str(text), "-o", str(Path(folder, "again")))
    return Facts(
        shared_bytes=kernel.metadata.shared,
        registers=_largest(r"REG:(\d+)", usage),
        spill_bytes=_largest(r"(\d+) bytes spill stores", verbose) + _largest(r"(\d+) bytes spill loads", verbose),
        sass=_opcodes(sass),
        wait_depths=tuple(_wait_depths(kernel.asm["ttgir"])),
        ptx_vector_loads=len(re.findall(r"ld\.global[.:\w]*\.v4\.(?:b|u|s|f)32", ptx)),
        warnings=tuple(re.findall(r"^ptxas warning.*|^.*\(C\d+\).*", verbose, re.MULTILINE)),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _largest(pattern: str, text: str) -> int:
    numbers = [int(number) for number in re.findall(pattern, text)]
    assert numbers, f"no {pattern} in {text[:500]}"
    return max(numbers)


def _opcodes(sass: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE):
        parts = name.split(".")
        counts.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return dict(counts)


def _wait_depths(ttgir: str) -> Iterator[int]:
    # regions that enclose the line: what follows in them is indented deeper than their own line, their end is not.
    # What counts is the innermost around a product, so neither a loop outside nor a branch inside, taken now and then
    regions: list[tuple[int, list[int], bool]] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while regions and line.strip().startswith("}") and indent <= regions[-1][0]:
            _, waits, multiplies = regions.pop()
            if multiplies:
                yield from waits
        if re.search(r"\bscf\.(for|while|if)\b|^\s*} (else|do) ", line):
            regions.append((indent, [], False))
        elif regions and "ttng.warp_group_dot " in line:
            regions[-1] = (*regions[-1][:2], True)
        elif regions and (wait := re.search(r"ttng\.warp_group_dot_wait .*pendings = (\d+)", line)):
            regions[-1][1].append(int(wait[1]))
