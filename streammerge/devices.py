"""Where arithmetic may run: the names of devices, and what memory they have free."""

from __future__ import annotations

import os
import re
import sys

from streammerge.errors import StreamMergeError, quoted

# what is left free of a device's memory for the driver, other programs and fragments
_SHARE = 0.8


def canonical(device: str) -> str:
    """`cpu` or `cuda:N`. Raises StreamMergeError for a name that is no device's; loads no torch."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise StreamMergeError(
            f"{quoted(device)} is not a device to merge on: expected `cpu`, `cuda` or `cuda:N`",
            hint="`cuda` is the first NVIDIA GPU.",
        )
    return device if device == "cpu" else f"cuda:{int(device.partition(':')[2] or 0)}"


def refuse_absent(device: str) -> None:
    """Raise StreamMergeError where torch does not see the device of a canonical name."""
    if device == "cpu":
        return
    prepare_torch()
    import torch

    count = torch.cuda.device_count()
    if int(device.partition(":")[2]) >= count:
        found = f"torch {torch.__version__} sees {count} CUDA device{'' if count == 1 else 's'}"
        raise StreamMergeError(
            f"{quoted(device)} is not there: {found}",
            hint="Use `--device cpu`, or install torch's CUDA build and the driver.",
        )


def free_memory_bytes(device: str) -> int:
    """What a merge takes of a device by default: 80 % of what is free there."""
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0] * _SHARE)


def prepare_torch() -> None:
    """Set what torch and its libraries read once, as they are loaded; what the environment says stays."""
    if "torch" in sys.modules:
        return
    # OpenMP's threads spin while they wait, on cores that reading, writing or other programs need: on busy
    # cores a merge takes many times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # cuBLAS gives the same bits on every one of several streams only with workspaces of its own
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # matrices of many sizes come and go: without this, freed pieces of one size do not serve another
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
