"""The machine code of the Triton kernels of attention and of one token each, for GPUs that are not there."""

import pytest
from kernels.test_triton import run_script


@pytest.fixture(scope="module")
def compiled():
    """What is wrong with the kernels' code for each target, and what sm_90's is like."""
    return run_script("attention_compiled.py", TRITON_INTERPRET="0")


@pytest.fixture
def machine_code(compiled):
    """By kernel: registers, shared memory, programs a multiprocessor, instructions of the innermost loop and of all."""
    if compiled["code"] is None:
        pytest.skip("no disassembler beside Triton")
    return compiled["code"]


def test_all_compile_for_gpus_within_shared_memory_and_registers(compiled):
    assert set(compiled["wrong"]) == {"sm_80", "sm_90", "gfx942"}
    for target, kernels in compiled["wrong"].items():
        assert len(kernels) >= 14
        assert not {name: trouble for name, trouble in kernels.items() if trouble}, target


def test_loops_of_attention_load_sixteen_bytes_at_once_and_nothing_synchronously(machine_code):
    loops = {name: facts["loop"] for name, facts in machine_code.items() if name.startswith(("decode", "prefill"))}
    assert len(loops) >= 10
    for name, loop in loops.items():
        assert loop["LDGSTS.128"] >= 4, name  # keys and values
        assert not [op for op in loop if op.startswith(("LDG.", "LDL", "STL", "CALL"))], name
        assert "LDG" not in loop, name
        assert loop["LDGDEPBAR"] >= 3, name  # the block table runs ahead of keys and values


def test_prefill_multiplies_by_warp_groups(machine_code):
    for name, facts in machine_code.items():
        if name.startswith("prefill"):
            assert facts["loop"]["HGMMA"] >= 12, name
            assert "HMMA" not in facts["loop"], name


def test_a_loop_of_decode_costs_less_than_its_bytes(machine_code):
    """An H200's multiprocessor gets 18.6 bytes of memory a cycle and issues 4 instructions of 32 threads."""
    for name, facts in machine_code.items():
        if name.startswith("decode"):
            num_bytes = facts["loop"]["LDGSTS.128"] * 16 * 32  # of a warp, as are the instructions
            share = sum(facts["loop"].values()) / 4 / (num_bytes / 18.6)
            assert share < (0.7 if "bfloat16" not in name else 0.3), (name, share)
            assert facts["programs"] >= (2 if " 256 " in name else 3), name


def test_parts_of_decode_are_stored_before_they_are_counted_and_read_after(machine_code):
    """A barrier, a fence and the count; whoever counts last drops what its first cache holds."""
    for name, facts in machine_code.items():
        if name.startswith("decode"):
            ((before, after),) = facts["atomics"]
            barrier = next(at for at, text in enumerate(before) if text.startswith("BAR.SYNC"))
            assert [text for text in before[barrier:] if text.startswith("MEMBAR") and text.endswith("GPU")], name
            assert "CCTL.IVALL" in after, name


def test_kernels_of_one_token_move_sixteen_bytes_at_once(machine_code):
    for name, facts in machine_code.items():
        if name.startswith(("normalise", "gate_up", "look_up", "turn", "rotate_and_store")):
            assert facts["code"]["LDG.128"] >= 1, name
            assert {"STG.128", "STG.64"} & set(facts["code"]), name  # 8 bytes where those halve


def test_waves_of_amd_wait_for_their_stores_before_the_barrier():
    """Its barrier does not, and the fence of the atomic behind it waits for one wave's only."""
    found = run_script("barrier_compiled.py", TRITON_INTERPRET="0")
    assert "s_waitcnt vmcnt(0)" in found["before the barrier"]
