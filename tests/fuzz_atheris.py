"""The targets of `tests/fuzzing.py` under atheris, which steers by the code that an input reaches.

`make fuzz` runs it in an environment of its own: python tests/fuzz_atheris.py TARGET [libFuzzer's options] FOLDER…
An input that breaks something is left in the current folder as `crash-…`; put it into `tests/corpus/TARGET/`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "kernels")]
with atheris.instrument_imports(include=["streammerge"]):
    from tests import fuzzing


def main() -> None:
    name = sys.argv.pop(1)
    seeds = Path(sys.argv[-1])
    seeds.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(fuzzing.corpus(name)):
        (seeds / f"seed-{number}").write_bytes(data)

    def mutated(data: bytes, most_bytes: int, seed: int) -> bytes:
        # as often by the grammar of the input as blindly
        chance = random.Random(seed)
        changed = fuzzing.mutated(chance, name, data) if chance.random() < 0.5 else data
        return bytes(atheris.Mutate(changed[:most_bytes], most_bytes) if changed == data else changed[:most_bytes])

    atheris.Setup(sys.argv, fuzzing.TARGETS[name], custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
