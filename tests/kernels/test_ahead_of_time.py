"""What the compiler makes of the Gram's and the moment's kernels for GPUs that need not be here."""

import pytest

from streammerge_kernels import gram_triton, moment_triton
from streammerge_kernels.product_triton import TILES, block_shape, constants
from tests.compiled import SHARED_BYTES, Case, compile_all

CAPABILITIES = [80, 90]
# how the operands lie, which is in halves, and whether only the triangle is wanted
KINDS = {
    "xTx": (True, False, 0, True),
    "xxT": (False, True, 0, True),
    "x-gram": (False, False, 2, False),
    "xT-gram": (True, False, 2, False),
    "gram-x": (False, False, 1, False),
    "gram-xT": (False, True, 1, False),
}
STRIDES = ["left_batch", "left_pitch", "right_batch", "right_pitch", "out_batch", "out_row"]


def product(tiles, kind, *, integer="i32"):
    left_transposed, right_transposed, halves, triangle = KINDS[kind]

    def operand(transposed, *, right):
        return f"tensordesc<fp16{block_shape(tiles, transposed, right=right)}>" if tiles.descriptors else "*fp16"

    pointers = {
        "left": operand(left_transposed, right=False),
        "right": operand(right_transposed, right=True),
        "out": "*fp32",
    }
    fixed = constants(tiles, left_transposed, right_transposed, halves, triangle)
    if halves:
        pointers["inverse"] = "*fp32"
    else:
        fixed["inverse"] = None
    sizes = dict.fromkeys(["m", "n", "k"], "i32")
    strides = dict.fromkeys(STRIDES, integer)
    return Case(
        module="streammerge_kernels.product_triton",
        kernel="_product",
        signature={**pointers, **sizes, **strides, "tiles_each": "i32", "tiles": "i32"},
        constants=fixed,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        divisible=(*(name for name, kind in pointers.items() if kind.startswith("*")), *sizes, *strides),
    )


def products(capability):
    for tiles in dict.fromkeys(TILES[capability]):
        for kind in KINDS:
            yield f"{tiles.rows}x{tiles.columns}x{tiles.inner}-{kind}", product(tiles, kind)
    # batches of more than 2³¹ elements
    yield "long", product(tiles, "xTx", integer="i64")


def elementwise():
    pointers = {"wide": "*fp32", "scale": "*fp32", "halves": "*fp16"}
    sizes = dict.fromkeys(["rows", "columns", "batch_stride", "row_stride", "height", "pitch"], "i32")
    yield (
        "split",
        Case(
            module="streammerge_kernels.moment_triton",
            kernel="_split_halves",
            signature=pointers | sizes,
            # a stride of 1 is a constant to a launch
            constants={"column_stride": 1, "ROWS": moment_triton._ROWS, "COLUMNS": moment_triton._COLUMNS},
            num_warps=4,
            num_stages=3,
            divisible=(*pointers, *sizes),
        ),
    )
    sizes = dict.fromkeys(["n", "batch", "row"], "i32")
    yield (
        "mirror",
        Case(
            module="streammerge_kernels.gram_triton",
            kernel="_mirror",
            signature={"matrices": "*fp32", "tiles_each": "i32", **sizes},
            constants={"column": 1, "SIDE": gram_triton._MIRRORED},
            num_warps=4,
            num_stages=3,
            divisible=("matrices", *sizes),
        ),
    )


CASES = {capability: dict([*products(capability), *elementwise()]) for capability in CAPABILITIES}
ALL = [(capability, name) for capability in CAPABILITIES for name in CASES[capability]]


def only(capability, *, of_products):
    return [name for name in CASES[capability] if (CASES[capability][name].kernel == "_product") == of_products]


@pytest.fixture(scope="module")
def facts():
    return {
        capability: dict(zip(cases, compile_all(list(cases.values()), capability), strict=True))
        for capability, cases in CASES.items()
    }


@pytest.mark.parametrize(("capability", "name"), ALL)
def test_nothing_spills_and_all_fits_a_block(facts, capability, name):
    found = facts[capability][name]
    assert found.spill_bytes == 0
    assert found.sass.get("STL", 0) == found.sass.get("LDL", 0) == 0
    assert found.shared_bytes <= SHARED_BYTES[capability]
    assert found.registers * CASES[capability][name].num_warps * 32 <= 65536
    assert found.warnings == ()


@pytest.mark.parametrize("name", only(90, of_products=True))
def test_on_hopper_products_overlap_and_their_operands_come_by_tma(facts, name):
    found = facts[90][name]
    assert found.sass["HGMMA"] > 0
    assert "HMMA" not in found.sass
    assert found.sass["UTMALDG"] > 0
    assert found.wait_depths
    assert min(found.wait_depths) >= 1


@pytest.mark.parametrize("name", only(80, of_products=True))
def test_on_ampere_operands_are_copied_while_products_run(facts, name):
    found = facts[80][name]
    assert found.sass["HMMA"] > 0
    # 16 bytes a copy, in more stages than one
    assert found.sass["LDGSTS.E.BYPASS.128"] == found.sass["LDGSTS"] > 0
    assert found.shared_bytes >= 2 * 2 * (128 * 32 + 32 * 128)


@pytest.mark.parametrize(("capability", "name"), [pair for pair in ALL if pair[1] != "mirror"])
def test_sums_and_what_is_split_are_read_and_written_16_bytes_at_a_time(facts, capability, name):
    found = facts[capability][name]
    # but for the scale or its inverse, one for a matrix
    single = 0 if CASES[capability][name].constants.get("inverse", 0) is None else 1
    assert found.sass["LDG.E.128"] == found.sass["LDG"] - single > 0
    assert found.sass["STG.E.128"] == found.sass["STG"]
