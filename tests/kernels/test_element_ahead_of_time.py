import pytest

from streammerge_kernels import apply_triton, drop_triton, elect_triton, magnitude_triton, weighted_sum_triton
from tests.compiled import SHARED_BYTES, Case, compile_all

APPLY = {
    "base": "*i16",
    "merged": "*fp32",
    "counts": "*i32",
    "squares": "*fp32",
    "elements": "i32",
    "blocks": "i32",
    "key_low": "i32",
    "key_high": "i32",
    "first_count": "i32",
    "skipped": "i32",
}
NOT_ALIGNED = {"key_low", "key_high", "first_count", "largest", "blocks", "first"}


def case(module, kernel, signature, **constants):
    return Case(
        module=module.__name__,
        kernel=kernel,
        signature=signature,
        constants={"BLOCK": module.BLOCK, **constants},
        num_warps=module.WARPS,
        num_stages=3,
        divisible=tuple(name for name in signature if name not in NOT_ALIGNED),
    )


def applied(out, stochastic):
    signature = {**APPLY, "out": out}
    return case(apply_triton, "_apply_kernel", signature, STOCHASTIC=stochastic, MEASURE=True)


def counted(low):
    signature = {"pattern": "*i32", "copies": "*i32", "prefix": "*i64" if low else "*i32", "elements": "i32"}
    bins = magnitude_triton.LOW_BINS if low else magnitude_triton.HIGH_BINS
    return case(magnitude_triton, "_count_kernel", signature, LOW=low, BINS=bins, COPIES=magnitude_triton.COPIES)


SUM = {"base": "*i16", "experts": "*i16", "shares": "*fp32", "out": "*fp32", "elements": "i32", "expert_stride": "i32"}
ELECT = {"deltas": "*fp32", "shares": "*fp32", "tie": "*fp32", "merged": "*fp32", "elements": "i32", "stride": "i32"}
DROP = {"mask": "*u8", "elements": "i32", "first_count": "i32", "skipped": "i32"}
TRIM = {"pattern": "*i32", "threshold": "*i32", "elements": "i32"}
CASES = {
    "apply bf16": applied("*i16", False),
    "apply bf16 stochastic": applied("*i16", True),
    "apply fp16 stochastic": applied("*fp16", True),
    "apply fp32": applied("*fp32", False),
    "sum of 3": case(weighted_sum_triton, "_sum_kernel", {**SUM, "first": "i32"}, EXPERTS=3, ADD=False),
    "sum of 8 more": case(weighted_sum_triton, "_sum_kernel", {**SUM, "first": "i32"}, EXPERTS=8, ADD=True),
    "elect of 3": case(elect_triton, "_elect_kernel", ELECT, EXPERTS=3, COUNT=False, NORMALIZE=True),
    "elect of 32": case(elect_triton, "_elect_kernel", ELECT, EXPERTS=32, COUNT=True, NORMALIZE=True),
    "drop": case(drop_triton, "_mask_kernel", {**DROP, "key_low": "i32", "key_high": "i32", "largest": "i32"}),
    "count high": counted(False),
    "count low": counted(True),
    "ties": case(magnitude_triton, "_ties_kernel", {**TRIM, "equal": "*i32"}),
    "trim": case(magnitude_triton, "_trim_kernel", {**TRIM, "left": "*i64"}),
}


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request):
    facts = compile_all(list(CASES.values()), request.param)
    return request.param, dict(zip(CASES, facts, strict=True))


def test_no_kernel_spills_or_takes_more_shared_memory_than_there_is(compiled):
    capability, facts = compiled
    for name, fact in facts.items():
        assert fact.spill_bytes == 0, name
        assert fact.sass.get("STL", 0) == 0, name
        assert fact.shared_bytes <= SHARED_BYTES[capability], name


def test_every_block_is_read_and_written_16_bytes_at_a_time(compiled):
    _, facts = compiled
    for name, fact in facts.items():
        if name != "drop":
            assert fact.ptx_vector_loads > 0, name
        if name.split()[0] not in ("count", "ties"):
            assert fact.sass.get("STG.E.128", 0) > 0, name


def test_random_words_reach_their_elements_in_registers(compiled):
    _, facts = compiled
    assert facts["drop"].shared_bytes == 0
    assert "SHFL" not in facts["drop"].sass
    # what passes between threads are the sums of what is measured, as without random words
    for opcode in ("SHFL", "LDS", "STS"):
        assert facts["apply bf16 stochastic"].sass[opcode] == facts["apply bf16"].sass[opcode]


def test_counting_does_not_wait_for_its_atomics(compiled):
    _, facts = compiled
    for name in ("count high", "count low"):
        assert facts[name].sass.get("RED", 0) + facts[name].sass.get("REDG", 0) > 0
        assert not {"ATOM", "ATOMG"} & facts[name].sass.keys()
