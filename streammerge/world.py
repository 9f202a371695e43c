"""Which of several processes this one is, as torchrun, accelerate and mpirun tell those they start. Loads no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import StreamMergeError, quoted

# rank, size, and both on this host: torchrun's and accelerate's, then those of MPI's libraries
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


@dataclass(frozen=True, slots=True)
class World:
    """One process among those that carry out one merge.

    rank, size              its number, from 0, and how many there are, on all hosts
    local_rank, local_size  the same of those on its host
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def here() -> World:
        """What the environment says of this process; one alone where it says nothing.

        Raises StreamMergeError for what no launcher sets.
        """
        names = next((each for each in _NAMES if each[0] in os.environ and each[1] in os.environ), None)
        if names is None:
            return World()
        rank, size, local_rank, local_size = (
            _count(name, default) for name, default in zip(names, (0, 1, 0, 1), strict=True)
        )
        if rank >= size or local_rank >= local_size > 1:
            raise StreamMergeError(
                f"{quoted(names[0])} is {rank} of {size}, and {quoted(names[2])} {local_rank} of {local_size}: "
                "expected numbers from 0 below their counts",
                hint=_HINT,
            )
        return World(rank, size, local_rank, max(local_size, 1))

    @property
    def is_first(self) -> bool:
        """Whether it is the one that lays the output out, publishes it, and speaks to the user."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def device(self, name: str) -> str:
        """The device that is meant: of several processes on a host, `cuda` gives each one its own."""
        return f"cuda:{self.local_rank}" if name == "cuda" and not self.is_alone else name


_HINT = "Start the processes by `torchrun` or `accelerate launch`, or unset these variables to merge in one process."


def _count(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 8):
        raise StreamMergeError(f"{quoted(name)} is {quoted(text)}, expected a number from 0", hint=_HINT)
    return int(text)


def thread_limit() -> int:
    """Threads for arithmetic: the CPUs this process may run on, within its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(int(quota) // int(period), 1))
    except (OSError, ValueError):
        pass
    # processes of one merge share their host
    return max(cpus // World.here().local_size, 1)
