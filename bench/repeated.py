"""The command line over models whose later layers are their first ones again, for `seven.py`.

python bench/repeated.py DISTINCT_LAYERS merge RECIPE OUT --json
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import replace

from olmo3 import SIZES

from streammerge import cli
from streammerge.checkpoint import ByteFile, TensorEntry, load_checkpoint
from streammerge.storage import local


class RepeatedStorage(local.LocalStorage):
    """Local folders whose files have holes where a tensor is another one's twin; such a tensor is read from there."""

    def __init__(self, distinct_layers: int) -> None:
        super().__init__()
        self._shape = replace(SIZES["7b"], distinct_layers=distinct_layers)

    def open(self, location: str, name: str) -> ByteFile:
        """Open a file for reading: the header's ranges, each from where its bytes are."""
        tensors = load_checkpoint(self, location).tensors
        twins = [(entry.offset, tensors[self._shape.twin(key)]) for key, entry in tensors.items() if entry.file == name]
        opened = {file: super(RepeatedStorage, self).open(location, file) for file in {twin.file for _, twin in twins}}
        return RepeatedFile(sorted(twins, key=lambda pair: pair[0]), opened)


class RepeatedFile:
    """A file's tensors in the order of their `offsets`, and in the files `opened` the ones that hold their bytes."""

    def __init__(self, twins: list[tuple[int, TensorEntry]], opened: dict[str, ByteFile]) -> None:
        self._offsets, self._twins, self._opened = [offset for offset, _ in twins], [twin for _, twin in twins], opened

    def fetch(self, offset: int, nbytes: int, buffer: memoryview) -> memoryview:
        """Read a range, which lies in one tensor, into `buffer`."""
        file, at = self._place(offset)
        return file.fetch(at, nbytes, buffer)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the range from the page cache."""
        file, at = self._place(offset)
        file.release(at, nbytes)

    def close(self) -> None:
        """Close all files."""
        for file in self._opened.values():
            file.close()

    def _place(self, offset: int) -> tuple[ByteFile, int]:
        number = bisect_right(self._offsets, offset) - 1
        twin = self._twins[number]
        return self._opened[twin.file], twin.offset + offset - self._offsets[number]


def main() -> None:
    distinct_layers = int(sys.argv.pop(1))
    local.LocalStorage = lambda **_: RepeatedStorage(distinct_layers)  # type: ignore[assignment,misc]
    cli.main()


if __name__ == "__main__":
    main()
