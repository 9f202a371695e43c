"""What the compiler makes of delta_pack and of fused's Gram for GPUs that need not be here."""

import pytest

from streammerge_kernels import delta_pack_triton, fused_triton
from streammerge_kernels.delta_pack import SCALE
from tests.compiled import SHARED_BYTES, Case, compile_all

# the base and the experts
STORED = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32")]
CAPABILITIES = [80, 90]

PACK_POINTERS = {"values": "*fp16", "squares": "*fp32", "facts": "*i32", "lost": "*fp32"}
PACK_STRIDES = ["base_pitch", "expert_step", "expert_pitch", "values_step", "values_pitch", "squares_step"]
PACK_SIZES = ["rows", "columns", *PACK_STRIDES, "facts_step", "column_blocks", "blocks", "count"]
GRAM_POINTERS = {"packed": "*fp16", "out": "*fp32"}
GRAM_STRIDES = ["base_pitch", "expert_pitch", "packed_pitch", "out_pitch"]
GRAM_SIZES = ["rows", "columns", *GRAM_STRIDES]


def case(module, kernel, pointers, sizes, strides, constants, *, aligned=True, integer="i32", one=False, **options):
    """A launch whose strides are multiples of 16, or are not, or are int64, or whose sizes are all one."""
    ones = dict.fromkeys(sizes, 1) if one else {}  # which a launch makes constants of
    return Case(
        module=module,
        kernel=kernel,
        signature=pointers if one else pointers | dict.fromkeys(sizes, integer),
        constants=constants | ones,
        divisible=(*pointers, "columns", *strides) if aligned else (),
        **options,
    )


def pack_case(base, expert, **kind):
    return case(
        "streammerge_kernels.delta_pack_triton",
        "_pack",
        {"base": f"*{base}", "experts": f"*{expert}", **PACK_POINTERS},
        PACK_SIZES,
        PACK_STRIDES,
        {"ROWS": delta_pack_triton.ROWS, "COLUMNS": delta_pack_triton.COLUMNS, "scale": SCALE},
        num_warps=delta_pack_triton.WARPS,
        num_stages=3,
        **kind,
    )


def gram_case(base, expert, capability, **kind):
    tile = fused_triton.TILE if kind.get("aligned", True) else fused_triton.UNALIGNED_TILE
    return case(
        "streammerge_kernels.fused_triton",
        "_gram",
        {"base": f"*{base}", "expert": f"*{expert}", **GRAM_POINTERS},
        GRAM_SIZES,
        GRAM_STRIDES,
        {"TILE": tile, "DEPTH": fused_triton.DEPTH, "PROMOTE": fused_triton.PROMOTE, "scale": SCALE},
        num_warps=fused_triton.WARPS,
        num_stages=fused_triton.STAGES[capability],
        **kind,
    )


KINDS = [{"aligned": False}, {"integer": "i64"}, {"aligned": False, "one": True}]


@pytest.fixture(scope="module", params=CAPABILITIES, ids="sm_{}".format)
def compiled(request):
    """Capability, then the facts of packs by dtypes, of Grams by dtypes, and of odd sizes."""
    cases = [
        *(pack_case(*stored) for stored in STORED),
        *(gram_case(*stored, request.param) for stored in STORED),
        *(pack_case("bf16", "bf16", **kind) for kind in KINDS),
        *(gram_case("bf16", "bf16", request.param, **kind) for kind in KINDS),
    ]
    facts = compile_all(cases, request.param)
    split, end = len(STORED), 2 * len(STORED)
    by_pack = dict(zip(STORED, facts[:split], strict=True))
    return request.param, by_pack, dict(zip(STORED, facts[split:end], strict=True)), facts[end:]


def test_no_kernel_spills_registers_or_needs_more_shared_memory_than_there_is(compiled):
    capability, packs, grams, odd = compiled
    facts = [*packs.values(), *grams.values(), *odd]
    assert [f.spill_bytes for f in facts] == [0] * len(facts)
    assert max(f.shared_bytes for f in facts) <= SHARED_BYTES[capability]


def test_delta_pack_reads_and_writes_matrices_16_bytes_at_a_time_and_the_base_once(compiled):
    _, packs, _, _ = compiled
    for (base, expert), facts in packs.items():
        # a thread's 16 elements of a tile, by the 8 or 4 that 16 bytes hold
        loads = {"bf16": 2, "fp16": 2, "fp32": 4}
        # the first expert's are before the loop, the next one's in it
        expected = loads[base] + 2 * loads[expert]
        assert facts.ptx_vector_loads == facts.sass["LDG.E.128"] == facts.sass["LDG"] == expected, (base, expert)
        assert facts.sass["STG.E.128"] == 2


def test_delta_pack_leaves_room_for_two_blocks_on_a_processor(compiled):
    _, packs, _, _ = compiled
    assert all(2 * 32 * delta_pack_triton.WARPS * facts.registers <= 65536 for facts in packs.values())


def test_the_fused_gram_multiplies_in_tensor_cores_and_prefetches_16_bytes_at_a_time(compiled):
    capability, _, grams, _ = compiled
    for facts in grams.values():
        assert facts.sass["HGMMA" if capability >= 90 else "HMMA"] > 0
        assert facts.sass["LDGSTS.E.BYPASS.128"] == facts.sass["LDGSTS"] > 0
        assert facts.sass.get("LDG", 0) == 0


def test_the_fused_gram_keeps_no_product_in_flight_which_is_why_packing_is_the_default(compiled):
    capability, _, grams, _ = compiled
    if capability >= 90:
        assert all(set(facts.wait_depths) == {0} for facts in grams.values())
