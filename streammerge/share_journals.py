"""The journals of processes that merge together, one each, and how whoever goes on takes them over. Loads no torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streammerge.entries import Entry
from streammerge.journal import Journal
from streammerge.storage.output import sync_folder

JOURNALS, MEETINGS = "journal-[0-9]*.jsonl", "processes-*"
_TRIES, _TRY_SECONDS = 20, 0.05


def share_journal(rank: int) -> str:
    """The name of a process's own journal, beside the merge's."""
    return f"journal-{rank:05d}.jsonl"


def adopt(
    folder: Path, journal: Journal, names: Container[str], refuse: Callable[[Mapping[str, Any]], None]
) -> dict[str, Entry]:
    """Move what the processes' journals cite into the merge's own; what they cited.

    refuse  told what each of them says is merged; raises where that is something else

    What they told each other is deleted. Raises OutputError while one of them is in use, and for what no crash leaves;
    nothing has changed then.
    """
    paths = sorted(folder.glob(JOURNALS))
    found: dict[str, Entry] = {}
    with ExitStack() as opened:
        for path in paths:
            # held until it is gone: none may begin to write to it
            each = Journal(path)
            opened.callback(each.close)
            begun = each.begun()
            if begun is not None:
                refuse(begun)
                found |= each.entries(names)
        if found:
            journal.append([asdict(entry) for entry in found.values()])
        forget_shares(folder)
    return found


def forget_shares(folder: Path) -> None:
    """Delete the processes' journals and what they told each other."""
    # also those whose deletion was cut short
    meetings, journals = list(folder.glob(f"*{MEETINGS}")), list(folder.glob(JOURNALS))
    for meeting in meetings:
        forget_meeting(meeting)
    for path in journals:
        path.unlink()
    if meetings or journals:
        sync_folder(folder)


def forget_meeting(meeting: Path) -> None:
    """Delete a folder that processes may still write to."""
    aside = meeting.with_name(f".{meeting.name.lstrip('.')}")
    # under its name nobody finds it any more; what was on its way there may still arrive
    os.rename(meeting, aside)
    for _ in range(_TRIES):
        shutil.rmtree(aside, ignore_errors=True)
        if not aside.exists():
            return
        time.sleep(_TRY_SECONDS)
    shutil.rmtree(aside)
