"""Experts in one native op against the same experts one after another, in every format, at odd sizes; routers; replays."""

import pytest
import torch

from llmd_kernels import native
from llmd_kernels.experts import ExpertWeights, Fp8Weight, add_gated, cpu, reference, route
from llmd_kernels.fp8_linear import quantize_weight
from llmd_kernels.grouped_linear import pack
from llmd_kernels.int8_linear import quantize
from llmd_kernels.linear import ways
from llmd_kernels.replay import Pool, Recording
from llmd_kernels.silu_mul import gelu_mul, silu_mul

ACTIVATIONS = {"silu": silu_mul, "gelu": gelu_mul, "gelu_tanh": lambda x: gelu_mul(x, tanh=True)}
SIZES = [  # tokens, chosen, experts, hidden, inner
    (1, 1, 1, 16, 16), (1, 3, 5, 120, 24), (2, 2, 4, 1030, 50), (5, 4, 7, 65, 33), (17, 2, 9, 130, 100), (64, 5, 8, 96, 80),
    (90, 2, 3, 200, 64), (300, 2, 3, 100, 70), (1100, 1, 1, 40, 24), (1300, 3, 2 + 2, 64, 33),
]  # fmt: skip


@pytest.fixture(autouse=True)
def always_ours(monkeypatch):
    """Whatever this processor would be better served by."""
    if native.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setattr("llmd_kernels.experts.cpu.max_rows", lambda: ways.ALL)


def grouped(weight, *, bits, group_size, has_offset=False, is_reordered=False):
    shape = weight.shape[0], -(-weight.shape[1] // group_size)
    q = torch.randint(0, 1 << bits, weight.shape, dtype=torch.uint8)
    scale = (1 + torch.rand(shape)) * weight.shape[1] ** -0.5 / (1 << bits) * float(2 ** torch.randint(0, 3, ()))
    offset = torch.randn(shape) * weight.shape[1] ** -0.5 if has_offset else None
    columns = torch.randperm(weight.shape[1]) if is_reordered else None
    zero = 0 if has_offset else 1 << (bits - 1)
    return pack(q, scale, offset, bits=bits, group_size=group_size, zero=zero, columns=columns)


def fp8(weight, block=None):
    return Fp8Weight(*quantize_weight(weight, block), block, "float", None)


FORMATS = {
    "bf16": lambda w: w.bfloat16(),
    "fp32": lambda w: w,
    "int8": quantize,
    "4 bits": lambda w: grouped(w, bits=4, group_size=32),
    "4 bits with offsets": lambda w: grouped(w, bits=4, group_size=64, has_offset=True),
    "4 bits reordered": lambda w: grouped(w, bits=4, group_size=128, is_reordered=True),
    "8 bits by groups": lambda w: grouped(w, bits=8, group_size=48),
    "fp8": fp8,
    "fp8 by blocks": lambda w: fp8(w, (64, 32)),
}


def dtypes(name):
    return [torch.float32 if name == "fp32" else torch.bfloat16] if name in ("bf16", "fp32") else list(native.DTYPES)


def made(name, size, dtype, seed=0):
    """x, ids, weights, gate_up and down of a format."""
    tokens, chosen, experts, hidden, inner = size
    torch.manual_seed(seed)
    x = torch.full((tokens, hidden + 3), torch.nan, dtype=dtype)
    x[:, :hidden] = torch.randn(tokens, hidden)
    shapes = ((2 * inner, hidden), (hidden, inner))
    each = [ExpertWeights([FORMATS[name](torch.randn(s) * s[1] ** -0.5) for _ in range(experts)]) for s in shapes]
    return x[:, :hidden], *routed(tokens, chosen, experts), *each


def routed(tokens, chosen, experts):
    ids = torch.stack([torch.randperm(experts)[:chosen] for _ in range(tokens)])
    return ids, torch.rand(tokens, chosen)


def check(actual, expected):
    bound = 3e-3 if actual.dtype == torch.bfloat16 else 1e-5
    assert (actual.float() - expected.float()).norm() <= bound * expected.float().norm()
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.05 * float(expected.float().std()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_as_one_after_another(size, name):
    for dtype, activation in zip(dtypes(name), ACTIVATIONS, strict=False):
        x, ids, weights, gate_up, down = made(name, size, dtype)
        assert cpu.why_not(x, gate_up, down) is None
        actual = cpu.experts(x, ids, weights, gate_up, down, activation)
        assert actual.dtype == dtype
        check(actual, reference.experts(x, ids, weights, gate_up, down, ACTIVATIONS[activation]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x, ids, weights, gate_up, down = made(name, (9, 2, 4, 50, 37), dtype)
        expected = reference.experts(x, ids, weights, gate_up, down, ACTIVATIONS[activation])
        check(cpu.experts(x, ids, weights, gate_up, down, activation), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_any_number_of_threads_gives_the_same(name):
    for size in ((3, 2, 6, 500, 90), (150, 2, 3, 200, 130)):
        given = made(name, size, dtypes(name)[-1])
        expected = cpu.experts(*given, "silu")
        try:
            for threads in (1, 2, 3, 5):
                native.set_num_threads(threads)
                assert torch.equal(cpu.experts(*given, "silu"), expected)
        finally:
            native.set_num_threads(torch.get_num_threads())


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("fp8")])
def test_a_token_is_the_same_in_every_batch(name):
    x, ids, weights, *both = made(name, (60, 3, 5, 200, 72), dtypes(name)[-1])
    together = cpu.experts(x, ids, weights, *both, "silu")
    for some in (slice(0, 1), slice(7, 8), slice(3, 9), slice(20, 53)):
        assert torch.equal(cpu.experts(x[some], ids[some], weights[some], *both, "silu"), together[some])


@pytest.mark.parametrize("name", FORMATS)
def test_all_tokens_may_want_one_expert(name):
    x, ids, weights, gate_up, down = made(name, (200, 1, 40, 64, 48), torch.float32 if name == "fp32" else torch.bfloat16)
    ids.fill_(23)
    check(
        cpu.experts(x, ids, weights, gate_up, down, "silu"),
        reference.experts(x, ids, weights, gate_up, down, silu_mul),
    )


def test_experts_that_are_not_there_add_nothing():
    x, ids, weights, *both = made("bf16", (6, 3, 5, 40, 24), torch.bfloat16)
    wrong = ids.clone()
    wrong[0, 1], wrong[3], wrong[5, 0] = -1, torch.tensor([5, 1 << 40, -(1 << 62)]), 77
    actual = cpu.experts(x, wrong, weights, *both, "silu")
    weights[wrong != ids] = 0
    assert torch.equal(actual, cpu.experts(x, ids, weights, *both, "silu"))
    assert not actual[3].any()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_in_its_token(name):
    x, ids, weights, *both = made(name, (9, 2, 3, 64, 48), dtypes(name)[0])
    x[4, 7] = torch.nan
    y = cpu.experts(x, ids, weights, *both, "silu")
    assert y[4].isnan().all()
    assert y[[t for t in range(9) if t != 4]].isfinite().all()


def test_more_tokens_than_fit_are_taken_in_parts(monkeypatch):
    given = made("bf16", (50, 3, 5, 64, 40), torch.bfloat16)
    expected = cpu.experts(*given, "silu")
    monkeypatch.setattr(cpu, "_MOST_BYTES", 20_000)
    assert torch.equal(cpu.experts(*given, "silu"), expected)


def test_columns_may_lie_apart():
    x, ids, weights, *both = made("bf16", (7, 2, 4, 40, 24), torch.bfloat16)
    expected = cpu.experts(x, ids, weights, *both, "silu")
    apart = [tensor.t().contiguous().t() for tensor in (x, ids, weights)]
    assert torch.equal(cpu.experts(*apart, *both, "silu"), expected)


def test_weights_may_be_moved():
    x, ids, weights, gate_up, down = made("bf16", (7, 2, 4, 40, 24), torch.bfloat16)
    expected = cpu.experts(x, ids, weights, gate_up, down, "silu")
    for tensor in (*gate_up.each, *down.each):
        old = tensor.clone()
        tensor.set_(old.clone())
        tensor.copy_(old)
    assert torch.equal(cpu.experts(x, ids, weights, gate_up, down, "silu"), expected)
    for weights_of_all in (gate_up, down):
        assert weights_of_all.cpu_table.kept[0].data_ptr() == weights_of_all.cpu_table.array[8]


def test_why_not():
    x, *_, gate_up, down = made("bf16", (2, 1, 3, 64, 48), torch.bfloat16)
    *_, other, _ = made("int8", (2, 1, 3, 64, 48), torch.bfloat16)
    assert "together" in cpu.why_not(x, gate_up, other)
    assert "float32" in cpu.why_not(x.float(), gate_up, down)
    inputs = ExpertWeights([fp8(torch.randn(64, 64))._replace(activations="token")])
    assert "inputs" in cpu.why_not(x, inputs, inputs)


def test_where_torch_is_faster_it_serves(monkeypatch):
    x, *_, gate_up, down = made("bf16", (7, 1, 3, 64, 48), torch.bfloat16)
    for most, is_ours in ((0, False), (2, False), (3, True)):
        monkeypatch.setattr(cpu, "max_rows", lambda most=most: most)
        assert (cpu.why_not(x, gate_up, down) is None) == is_ours


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_replays_read_what_is_routed_then(name, threads):
    native.set_num_threads(threads)
    try:
        x, _, _, gate_up, down = made(name, (6, 2, 9, 80, 40), dtypes(name)[-1])
        x, logits = x.contiguous(), torch.randn(6, 9)
        with Recording(Pool()) as recording:
            y = cpu.experts(x, *route(logits, 2, normalized=True), gate_up, down, "silu")
        assert not recording.missed
        assert recording.num_calls == 2
        for _ in range(3):
            x.normal_()
            logits.normal_()
            expected = cpu.experts(x, *route(logits, 2, normalized=True), gate_up, down, "silu")
            recording.replay()
            assert torch.equal(y, expected)
    finally:
        native.set_num_threads(torch.get_num_threads())


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"),
    [(1, 1, 1), (3, 8, 2), (40, 7, 7), (5, 128, 8), (9, 60, 4), (2, 257, 33), (300, 16, 6), (2, 4096, 20), (2, 4097, 3)],
)
def test_route(tokens, experts, chosen):
    torch.manual_seed(0)
    for dtype in native.DTYPES:
        logits = (torch.randn(tokens, experts + 5) * 3).to(dtype)[:, :experts]
        for normalized in (True, False):
            ids, weights = route(logits, chosen, normalized=normalized)
            expected_ids, expected = reference.route(logits, chosen, normalized=normalized)
            assert torch.equal(ids, expected_ids)
            torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-9)


def test_of_equal_ones_the_first_is_chosen():
    logits = torch.tensor([[1.0, 2, 2, 1, 2], [0, 0, 0, 0, 0], [-torch.inf, 3, -torch.inf, -torch.inf, -200]])
    ids, weights = route(logits, 4, normalized=False)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [1, 4, 0, 2]]
    torch.testing.assert_close(weights, logits.softmax(1).gather(1, ids))
    assert weights[2].tolist() == [1, 0, 0, 0]


def test_a_route_without_meaning_is_no_danger():
    logits = torch.randn(4, 6)
    logits[0, 3], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    ids, weights = route(logits, 2, normalized=True)
    assert ids.min() >= 0
    assert ids.max() < 6
    assert weights[:2].isnan().all()
    assert torch.equal(weights[3], route(logits[3:], 2, normalized=True)[1][0])


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 100), (70, 33), (5, 2000)])
def test_add_gated(tokens, width):
    torch.manual_seed(0)
    for dtype in native.DTYPES:
        y, x, gate = (torch.randn(tokens, size).to(dtype) for size in (width, width, 1))
        expected = (y.float() + torch.sigmoid(gate.float()) * x.float()).to(dtype)
        torch.testing.assert_close(add_gated(y, x, gate), expected)


def test_add_gated_says_what_it_wants():
    y = torch.randn(3, 8)
    for x, gate in ((y[:2], y[:, :1]), (y, y[:, 0]), (y.bfloat16(), y[:, :1]), (y, y[:, :1].bfloat16())):
        with pytest.raises(ValueError, match=r"add_gated wants y and x \[T, H\] and gate \[T, 1\] of one dtype, got"):
            add_gated(y, x, gate)
