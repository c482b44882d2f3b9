"""Mixtures of experts: what the package checks, the reference by hand, and the Triton kernels without a GPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.test_triton import run_script

from llmd_kernels.experts import ExpertWeights, Fp8Weight, Stack, experts, reference, route, table, why_not
from llmd_kernels.experts.weights import facts_of
from llmd_kernels.fp8_linear import quantize_weight
from llmd_kernels.grouped_linear import pack
from llmd_kernels.int8_linear import quantize


def test_in_the_interpreter_they_equal_the_reference():
    errors = run_script("experts_interpreted.py", TRITON_INTERPRET="1")
    assert len(errors) > 30
    for case, error in errors.items():
        assert error < (2e-3 if "float16" in case else 1e-6), case


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_89", "gfx942"])
def test_all_compile_within_shared_memory_and_registers(target):
    found = run_script("experts_compiled.py", TRITON_INTERPRET="0", LLMD_TEST_TARGET=target)
    assert len(found) >= 20
    assert not {name: trouble for name, trouble in found.items() if trouble}


# --- the reference


def made(count=3, hidden=8, size=6):
    torch.manual_seed(0)
    gate_up = [torch.randn(2 * size, hidden) for _ in range(count)]
    down = [torch.randn(hidden, size) for _ in range(count)]
    return ExpertWeights(gate_up), ExpertWeights(down)


def test_the_sum_by_hand():
    gate_up, down = made()
    x, ids = torch.randn(5, 8), torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]])
    weights = torch.rand(5, 2)
    for activation, act in (("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", lambda g: F.gelu(g, approximate="tanh"))):
        expected = torch.zeros(5, 8)
        for token in range(5):
            for slot in range(2):
                gate, up = (gate_up.each[ids[token, slot]] @ x[token]).chunk(2)
                expected[token] += weights[token, slot] * (down.each[ids[token, slot]] @ (act(gate) * up))
        torch.testing.assert_close(experts(x, ids, weights, gate_up, down, activation), expected)


def test_no_tokens():
    gate_up, down = made()
    empty = torch.empty(0, 2)
    assert experts(torch.empty(0, 8), empty.long(), empty, gate_up, down).shape == (0, 8)


def test_of_equal_experts_the_first_is_taken():
    ids, weights = route(torch.tensor([[1.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 3, normalized=False)
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    torch.testing.assert_close(weights[1], torch.full((3,), 0.25))
    _, weights = route(torch.randn(4, 6), 2, normalized=True)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


@pytest.mark.parametrize("make", ["dense", "int8", "int4", "fp8"])
def test_packed_experts_are_computed_like_their_linears(make):
    torch.manual_seed(0)
    q = torch.randint(0, 16, (64, 32), dtype=torch.uint8)
    weight = {
        "dense": lambda: torch.randn(64, 32),
        "int8": lambda: quantize(torch.randn(64, 32)),
        "int4": lambda: pack(q, torch.rand(64, 1), bits=4, group_size=32, zero=8),
        "fp8": lambda: Fp8Weight(*quantize_weight(torch.randn(64, 32)), None, "float", None),
    }[make]
    gate_up, down = ExpertWeights([weight() for _ in range(2)]), ExpertWeights([torch.randn(32, 32) for _ in range(2)])
    x, ids, weights = torch.randn(3, 32), torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.rand(3, 2)
    result = experts(x, ids, weights, gate_up, down)
    expected = reference.experts(x, ids, weights, gate_up, down, lambda y: F.silu(y[:, :32]) * y[:, 32:])
    assert (result - expected).norm() / expected.norm() < 2e-2
    assert gate_up.kind is (torch.Tensor if make == "dense" else type(weight()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(5, 9)}, r"x \[T, 8\] of floats, got torch.float32 \[5, 9\]"),
        ({"x": torch.zeros(5, 8, dtype=torch.int32)}, r"x \[T, 8\] of floats"),
        ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, r"ids \[5, k\] int64, got torch.int64 \[4, 2\]"),
        ({"ids": torch.zeros(5, 2, dtype=torch.int32)}, "int64, got torch.int32"),
        ({"weights": torch.zeros(5, 2).half()}, r"weights \[5, 2\] float32, got torch.float16"),
        ({"activation": "relu"}, "activation silu or gelu or gelu_tanh, got 'relu'"),
        ({"down": ExpertWeights([torch.zeros(8, 5)] * 3)}, "as many gate_up"),
        ({"down": ExpertWeights([torch.zeros(8, 6)] * 2)}, r"got 3 of \[12, 8\] and 2 of \[8, 6\]"),
    ],
)
def test_what_does_not_go_together(change, words):
    gate_up, down = made()
    given_ = {"x": torch.zeros(5, 8), "ids": torch.zeros(5, 2, dtype=torch.int64), "weights": torch.zeros(5, 2)}
    with pytest.raises(ValueError, match=words):
        experts(**{**given_, "gate_up": gate_up, "down": down, **change})


def test_routes_that_cannot_be():
    for logits, k in ((torch.zeros(3), 1), (torch.zeros(3, 4), 5), (torch.zeros(3, 4), 0)):
        with pytest.raises(ValueError, match="route wants logits"):
            route(logits, k, normalized=True)


# --- weights of all experts


def test_experts_must_be_alike():
    with pytest.raises(ValueError, match="one expert at least"):
        ExpertWeights([])
    with pytest.raises(ValueError, match="expert 1 is"):
        ExpertWeights([torch.zeros(4, 4), torch.zeros(4, 4).half()])
    with pytest.raises(ValueError, match="expert 2 is"):
        ExpertWeights([quantize(torch.randn(4, 4)), quantize(torch.randn(4, 4)), torch.zeros(4, 4)])


def test_a_stack_takes_weights_in_any_order_and_holds_them_once():
    each = [torch.randn(4, 3) for _ in range(3)]
    copies = [weight.clone() for weight in each]
    stack = Stack(3)
    for number in (2, 0, 1):
        assert stack.weight is None
        stack.take(number, each[number])
    assert torch.equal(stack.weight, torch.stack(copies))
    for number, weight in enumerate(each):
        assert torch.equal(weight, copies[number])
        assert weight.data_ptr() == stack.weight[number].data_ptr()


def test_a_stack_of_packed_weights_keeps_their_facts():
    each = [quantize(torch.randn(64, 32)) for _ in range(2)]
    before = [facts_of(weight) for weight in each]
    stack = Stack(2)
    for number, weight in enumerate(each):
        stack.take(number, weight)
    assert stack.weight.scale.shape == (2, 64)
    assert stack.weight.in_features == 32
    assert [facts_of(weight) for weight in each] == before


def test_one_that_differs_leaves_no_stack():
    stack, other = Stack(2), torch.randn(5, 3)
    stack.take(0, torch.randn(4, 3))
    stack.take(1, other)
    assert stack.weight is None
    assert other.shape == (5, 3)


def test_nothing_keeps_a_cpu_from_anything():
    assert why_not(*made(), torch.device("cpu")) is None


# --- tiles


@given(
    ids=st.integers(1, 60).flatmap(
        lambda count: st.lists(st.integers(0, count - 1), min_size=1, max_size=300).map(lambda ids: (count, ids))
    ),
    block_m=st.sampled_from([16, 32, 64, 128]),
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_enough_for_any_choice(ids, block_m):
    count, chosen = ids
    used = sum(-(-chosen.count(expert) // block_m) for expert in set(chosen))
    assert used <= table.num_blocks(len(chosen), 1, count, block_m) <= len(chosen)


@pytest.mark.parametrize("device", ["sm_90", "sm_100", "sm_80", "gfx942", "gfx1100", "cpu"])
def test_tiles_grow_with_the_tokens(device):
    sizes = [table.tile_for(device, tokens, 8, 128).block_m for tokens in (1, 16, 32, 64, 256, 1024, 8192)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (16, 128)
    assert table.tile_for(device, 8192, 8, 128, 4).block_m == 64


def test_few_programs_are_made_more():
    tile = table.tile_for("sm_90", 1, 8, 128)
    assert table.narrowed(tile, 8, 1536, 132).block_n == 32
    assert table.narrowed(tile, 2, 28672, 132).block_n == 64
    many = table.tile_for("sm_90", 8192, 2, 8)
    assert table.narrowed(many, 1, 64, 132) == many
