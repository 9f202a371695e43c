"""What the spectral methods cost on one matrix, known before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.solve.cost import Cost

# what is smaller, and the libraries' packing buffers; on an accelerator its libraries' workspaces too
_SMALL_BYTES = 8 << 20
_DEVICE_SMALL_BYTES = 96 << 20


def spectral(elements: int, size: int, flops: int, passes: int, *, narrow_bytes: int = 0) -> Cost:
    """Price of a method that holds float64 `elements` and takes one spectrum [size, size] at a time.

    narrow_bytes  buffers in the stream's dtype
    """
    held = 8 * elements + narrow_bytes
    # LAPACK's divide and conquer takes twice the matrix, and a copy of a few columns' worth
    lapack = 8 * (2 * size**2 + 8 * size)
    return Cost(
        workspace_bytes=held + lapack + held // 50 + _SMALL_BYTES,
        flops=flops,
        passes=passes,
        # an accelerator's solver returns its vectors beside the matrix that they replace
        device_bytes=held + 2 * lapack + held // 50 + _DEVICE_SMALL_BYTES,
    )


def eigen_flops(size: int) -> int:
    """All eigenvalues and eigenvectors of a symmetric matrix."""
    return 9 * size**3


def shared_directions(size: int, experts: int, fraction: float) -> tuple[int, int]:
    """How many of Iso-CTS's directions are common, and how many each expert has of its own."""
    own = min(round((size - int(size * fraction)) / experts), size // experts)
    return size - own * experts, own


def tsv(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of TSV-Merge."""
    rows, columns = shape
    size = min(shape)
    count = size // experts * experts
    if experts == 1:
        return Cost(workspace_bytes=rows * columns * itemsize, flops=rows * columns, passes=1)
    spectra = experts * _spectrum_flops(rows, columns, count // experts) + _polar_flops(rows, columns, count)
    elements = rows * columns + _stacked(rows, columns, count) + size**2
    return spectral(elements, size, spectra, passes=1, narrow_bytes=rows * columns * itemsize)


def iso_c(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of Iso-C."""
    rows, columns = shape
    size, matrix = min(shape), rows * columns
    flops = 4 * matrix * size + eigen_flops(size) + 2 * size**3 + experts * matrix
    # the sum and the result; the delta of one expert and the result as it is returned
    return spectral(2 * matrix + 2 * size**2, size, flops, passes=1, narrow_bytes=2 * matrix * itemsize)


def iso_cts(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of Iso-CTS."""
    rows, columns = shape
    size, matrix = min(shape), rows * columns
    fraction = min(max(float(parameters.get("common_space_fraction", 0.8)), 0.0), 1.0)
    common, own = shared_directions(size, experts, fraction)
    flops = _spectrum_flops(rows, columns, common) + _polar_flops(rows, columns, size)
    if own:
        flops += experts * (_spectrum_flops(rows, columns, own) + 4 * matrix * common)
    elements = matrix + _stacked(rows, columns, size) + size**2
    return spectral(elements, size, flops, passes=2 if own else 1, narrow_bytes=2 * matrix * itemsize)


def frequencies(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of FR-Merging."""
    rows, columns = shape
    matrix, half = rows * columns, rows * (columns // 2 + 1)
    # one expert's delta, the sum and the inverse; two spectra, complex; the mask and what it is made of
    taken = 3 * matrix * itemsize + 2 * half * 2 * itemsize + half * (8 + 8 + 1)
    flops = 2 * experts * matrix + 10 * matrix * max(matrix.bit_length(), 1)
    return Cost(
        workspace_bytes=taken + taken // 10 + _SMALL_BYTES,
        flops=flops,
        passes=1,
        device_bytes=taken + 2 * half * 2 * itemsize + _DEVICE_SMALL_BYTES,
    )


def residual(shape: tuple[int, int], experts: int, parameters: Mapping[str, Any], itemsize: int) -> Cost:
    """Price of ResMerge."""
    rows, columns = shape
    size, matrix = min(shape), rows * columns
    most = min(max(int(parameters.get("head_rank", 1)), 1), size)
    heads = experts * most
    flops = experts * (_spectrum_flops(rows, columns, most) + 2 * matrix * most + 6 * matrix)
    elements = 3 * matrix + size**2 + heads * (rows + columns) + 3 * heads**2
    return spectral(elements, size, flops, passes=1, narrow_bytes=matrix * itemsize)


def _spectrum_flops(rows: int, columns: int, count: int) -> int:
    size = min(rows, columns)
    return 2 * rows * columns * size + eigen_flops(size) + 2 * rows * columns * count


def _polar_flops(rows: int, columns: int, count: int) -> int:
    overlaps = 2 * count**2 * (rows + columns) + 2 * (eigen_flops(count) + 2 * count**3)
    return overlaps + 2 * count**3 + 2 * count**2 * columns + 2 * rows * count * columns


def _stacked(rows: int, columns: int, count: int) -> int:
    # left and right directions, two roots, and the product on its way
    return count * (rows + columns) + 2 * count**2 + count * columns
