"""From merged folders to a file that a browser opens."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from streammerge.errors import OutputError, quoted
from streammerge.reporting.comparison_page import comparison_page
from streammerge.reporting.facts import MergeFacts, read_merge
from streammerge.reporting.merge_page import merge_page


def report_page(folders: Sequence[str | os.PathLike[str]]) -> str:
    """The page of one merged folder, or of several a comparison. Raises OutputError as `read_merge` does."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    twice = {name for name, count in Counter(names).items() if count > 1}
    merges: list[MergeFacts] = [
        read_merge(folder, os.fspath(folder) if name in twice else name)
        for folder, name in zip(folders, names, strict=True)
    ]
    return merge_page(merges[0]) if len(merges) == 1 else comparison_page(merges)


def write_pages(folder: str | os.PathLike[str], pages: Mapping[str, str]) -> None:
    """Write files into a folder, which is made if it is not there. Raises OutputError where that cannot be."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{quoted(folder)} cannot be written: {(error.strerror or str(error)).lower()}",
            hint="Choose another folder with `-o`.",
        ) from error
    for name, text in pages.items():
        write_page(text, Path(folder) / name)


def write_page(text: str, path: str | os.PathLike[str]) -> None:
    """Write a page whole or not at all, in place of a file of that name. Raises OutputError where it cannot be."""
    target = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise OutputError(
            f"{quoted(target)} cannot be written: {(error.strerror or str(error)).lower()}",
            hint="Choose another file with `-o`.",
        ) from error
