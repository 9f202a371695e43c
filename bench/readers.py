"""Compare positioned reads with memory mapping, in the blocks that a merge reads.

python bench/readers.py
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import child
import files
import numpy as np
import rows
from generate import Settings, ensure

WAYS = ("positioned", "mapped")


def measure(way: str, location: str) -> None:
    """In a child: read a model's tensors in file order, a block at a time, and consume every byte once."""
    from streammerge.checkpoint import load_checkpoint
    from streammerge.memory import LARGEST_SLOT_BYTES as BLOCK_BYTES
    from streammerge.storage.local import LocalStorage

    storage = LocalStorage(mapped=way == "mapped")
    checkpoint = load_checkpoint(storage, location)
    opened = {name: storage.open(location, name) for name in checkpoint.header_sha256}
    # the buffer is filled, so that its first touch falls before the clock starts
    buffer = memoryview(bytearray(b"\xff") * (BLOCK_BYTES if way == "positioned" else 0))
    before = child.memory_of("self")
    began, cpu_began = time.perf_counter(), time.process_time()
    read, checksum = 0, np.uint64(0)
    for entry in checkpoint.tensors.values():
        for start in range(0, entry.nbytes, BLOCK_BYTES):
            offset, nbytes = entry.offset + start, min(BLOCK_BYTES, entry.nbytes - start)
            view = opened[entry.file].fetch(offset, nbytes, buffer)
            checksum ^= np.bitwise_xor.reduce(np.frombuffer(view, np.uint64))
            del view
            opened[entry.file].release(offset, nbytes)
            read += nbytes
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    after = child.memory_of("self")
    found = {
        "bytes": read,
        "checksum": int(checksum),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_resident_bytes": after["VmHWM"] - before["VmRSS"] + len(buffer),
    }
    print(json.dumps(found))


def main() -> None:
    parser = rows.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    model = ensure(given.work / given.size, Settings(size=given.size), experts=3)[1]
    shards = files.weight_files([model])
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(given.repeats):
        for state in ("cold", "warm"):
            for way in WAYS:
                left = files.make_cold(shards)
                if state == "warm":
                    files.make_warm(shards)
                elif left:
                    raise SystemExit(f"error: {left} bytes stayed in the page cache")
                ran = child.run([sys.executable, __file__, "--measure", way, str(model)]).json()
                cached = sum(map(files.cached_bytes, shards))
                found.setdefault((state, way), []).append(ran | {"left_cached_bytes": cached})
    files.make_cold(shards)
    sums = {ran["checksum"] for runs in found.values() for ran in runs}
    if len(sums) != 1:
        raise SystemExit("error: the two ways read different bytes; no rates are printed")
    lines = []
    for (state, way), runs in found.items():
        middle = {key: median(ran[key] for ran in runs) for key in runs[0] if key != "checksum"}
        rate = middle["bytes"] / middle["seconds"] / 1e9
        facts = {"size": given.size, "state": state, "way": way, "gb_per_second": rate, **middle}
        all_seconds = [ran["seconds"] for ran in runs]
        rows.append(given.results, "readers", facts | {"all_seconds": all_seconds})
        memory = rows.mib(middle["peak_resident_bytes"])
        kept = rows.mib(middle["left_cached_bytes"])
        lines.append((f"{state} {way}", f"{rate:.2f}", f"{middle['cpu_seconds']:.2f}", memory, kept))
    print(rows.table(("reader", "GB/s", "CPU s", "peak memory", "left in page cache"), lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], str(Path(sys.argv[3])))
    else:
        main()
