"""The row-major bfloat16 product against float32, at odd sizes, on both sides of where one way takes over from another."""

import pytest
import torch
from kernels.test_lora import run_script
from model.fake_cuda import fake_cuda

from llmd_kernels import native
from llmd_kernels.linear import gated_linear, linear, table, ways
from llmd_kernels.silu_mul import gelu_mul, silu_mul

SIZES = [  # rows, width, depth
    (1, 1, 1), (1, 7, 33), (2, 130, 896), (3, 66, 31), (4, 5, 4865), (5, 65, 100), (7, 33, 1537), (8, 9, 70), (17, 18, 64),
    (48, 64, 64), (64, 35, 3100), (65, 64, 64), (66, 1, 33), (67, 129, 897), (131, 15, 5155), (1050, 20, 40),
    (1040, 3, 2600),
]  # fmt: skip
FEW = 64  # the most rows that are read by dot products


@pytest.fixture(autouse=True)
def always_ours(monkeypatch):
    """Whatever this processor would be better served by."""
    if native.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setattr("llmd_kernels.linear.max_rows", lambda: ways.ALL)


def made(rows, width, depth):
    """x with rows that lie apart, a NaN between them; W with rows that lie apart; a bias."""
    torch.manual_seed(0)
    x = torch.full((rows, depth + 3), torch.nan).bfloat16()
    x[:, :depth] = torch.randn(rows, depth)
    weight = torch.full((width, depth + 5), torch.nan).bfloat16()
    weight[:, :depth] = torch.randn(width, depth)
    return x[:, :depth], weight[:, :depth], torch.randn(width).bfloat16()


def check(x, weight, bias):
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    scale = x.shape[1] ** 0.5
    for out_dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        actual = linear(x, weight, bias, out_dtype=out_dtype)
        assert actual.dtype == out_dtype
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=tolerance * scale)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "depth"), SIZES)
def test_linear(rows, width, depth, has_bias):
    x, weight, bias = made(rows, width, depth)
    check(x, weight, bias if has_bias else None)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(rows, threads):
    x, weight, bias = made(rows, 700, 900)
    expected = linear(x, weight, bias)
    native.set_num_threads(threads)
    try:
        assert torch.equal(linear(x, weight, bias), expected)
    finally:
        native.set_num_threads(torch.get_num_threads())


def test_no_rows_and_no_depth():
    x, weight, bias = made(70, 9, 4)
    assert linear(x[:0], weight, bias).shape == (0, 9)
    for rows in (3, 70):
        assert torch.equal(linear(x[:rows, :0], weight[:, :0], bias), bias.expand(rows, -1))


def test_columns_of_x_may_lie_apart():
    x, weight, _ = made(9, 20, 40)
    assert torch.equal(linear(x.t().contiguous().t(), weight), linear(x, weight))


@pytest.mark.parametrize("depth", [200, 2001, 4864])
def test_a_row_is_the_same_in_every_small_batch(depth):
    x, weight, bias = made(FEW, 77, depth)
    together = linear(x, weight, bias)
    for rows in (1, 2, 3, 4, 5, 16, 33):
        assert torch.equal(linear(x[:rows], weight, bias), together[:rows])
    assert torch.equal(linear(x[9:10], weight, bias), together[9:10])


def test_a_row_is_the_same_in_every_large_batch():
    x, weight, bias = made(2100, 70, 300)
    together = linear(x, weight, bias)
    for begin, end in ((0, 65), (0, 512), (3, 1100), (2027, 2100)):
        assert torch.equal(linear(x[begin:end], weight, bias), together[begin:end])


@pytest.mark.parametrize("rows", [3, 64, 65])
def test_what_is_not_finite_stays_in_its_row(rows):
    x, weight, _ = made(rows, 20, 100)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    y = linear(x, weight)
    assert not y[1].isfinite().any()
    assert y[2].isnan().all()
    assert y[[i for i in range(rows) if i not in (1, 2)]].isfinite().all()


def test_float32_is_plain():
    x, weight = torch.randn(3, 20), torch.randn(5, 20)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_the_way_is_chosen_by_what_the_processor_has():
    assert ways.choose(has_amx=False, capability="AVX512") == ways.ALL
    assert ways.choose(has_amx=True, capability="AVX512") == 8
    assert ways.choose(has_amx=False, capability="AVX2") == ways.choose(has_amx=False, capability="DEFAULT") == 0


@pytest.mark.parametrize("activation", [silu_mul, gelu_mul, lambda x: x[:, :3]])
def test_a_gated_product_is_the_activation_of_the_plain_one(activation):
    x, weight, bias = made(5, 12, 48)
    assert torch.equal(gated_linear(x, weight, bias, activation), activation(linear(x, weight, bias)))


def test_triton_in_the_interpreter():
    errors = run_script("linear_interpreted.py", TRITON_INTERPRET="1")
    assert len(errors) > 15
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_triton_compiles_and_reads_the_weight_wide(target):
    for case, trouble in run_script("linear_compiled.py", TRITON_INTERPRET="0", LLMD_TEST_TARGET=target).items():
        assert not trouble, case


def test_tables_have_a_way_for_each_number_of_rows():
    assert set(table.FIRST) >= set(table._TABLE)
    for entries in (*table.FIRST.values(), *(entries for widths in table._TABLE.values() for entries in widths.values())):
        assert len(entries) == len(table.ROWS)
        for most, tile in zip(table.ROWS, entries, strict=True):
            assert tile is None or tile.block_m >= most
            assert tile is None or all(size & (size - 1) == 0 for size in tile[:5])
    assert all(1 << 62 in widths for widths in table._TABLE.values())


def test_a_device_that_was_not_measured_and_many_rows_are_torch_s():
    assert table.tile_for("sm_120", 1, 4096) is None
    assert table.tile_for("sm_90", 0, 4096) is table.tile_for("sm_90", 65, 4096) is None
    assert table.tile_for("sm_90", 1, 1 << 40) is not None


@pytest.mark.parametrize(
    ("blocks", "depth", "shares"),
    [(56, 3584, 4), (72, 3584, 4), (592, 3584, 1), (56, 18944, 8), (14, 896, 1), (14, 4864, 8), (1, 64, 1)],
)
def test_the_depth_is_shared_until_the_device_is_full(blocks, depth, shares):
    tile = table.FIRST["sm_90"][4]
    assert table.num_shares(tile.shares, blocks, -(-depth // tile.block_k), 132) == shares


@pytest.mark.parametrize(("rows", "launched"), [(1, ["fma"]), (2, ["fma"]), (3, []), (64, []), (65, [])])
def test_a_gpu_launches_one_kernel_or_torch_s(rows, launched):
    pytest.importorskip("triton")
    with fake_cuda() as device:
        weight, bias = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((9728, 896), (9728,)))
        x = torch.empty(rows, 896, dtype=torch.bfloat16, device="cuda")
        y = linear(x, weight, bias, out_dtype=torch.float32)
        assert (y.shape, y.dtype, y.device.type) == ((rows, 9728), torch.float32, "cuda")
        assert device.launches == launched
        device.clear()
        assert gated_linear(x, weight, bias, silu_mul).shape == (rows, 4864)
        assert device.launches == (launched or ["gate_up"])
        assert not device.waits


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"depth": 897}, {"is_transposed": True}])
def test_weights_that_no_wide_loads_read_are_torch_s(change):
    pytest.importorskip("triton")
    dtype, depth = change.get("dtype", torch.bfloat16), change.get("depth", 896)
    with fake_cuda() as device:
        weight = torch.empty(depth, 64, dtype=dtype, device="cuda").t() if "is_transposed" in change else None
        weight = torch.empty(64, depth, dtype=dtype, device="cuda") if weight is None else weight
        assert linear(torch.empty(1, depth, dtype=dtype, device="cuda"), weight).shape == (1, 64)
        assert not device.launches


def test_what_a_tile_does_not_hold_is_told_before_a_launch():
    kernels = pytest.importorskip("llmd_kernels.linear.triton")
    tile, weight = table.FIRST["sm_90"][0], torch.zeros(4, 32).bfloat16()
    with pytest.raises(ValueError, match="a tile of 1 rows does not hold 2"):
        kernels.linear(torch.zeros(2, 32).bfloat16(), weight, None, torch.bfloat16, tile)
    with pytest.raises(ValueError, match="wants 16-bit floats"):
        kernels.linear(torch.zeros(1, 32), weight.float(), None, torch.float32, tile)
    with pytest.raises(ValueError, match="wants dense rows at even places"):
        kernels.linear(torch.zeros(1, 31).bfloat16(), weight[:, 1:], None, torch.bfloat16, tile)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "depth"), [(896, 896), (9728, 896), (896, 4864), (3584, 18944), (2 * 18944, 3584)])
def test_every_way_on_a_gpu(width, depth, dtype):
    from llmd_kernels.linear import triton

    torch.manual_seed(0)
    weight, bias = torch.randn(width, depth, device="cuda").to(dtype), torch.randn(width, device="cuda").to(dtype)
    for most, tile in zip(table.ROWS, table.FIRST["sm_90"], strict=True):
        x = torch.randn(most, depth, device="cuda").to(dtype)
        for _ in range(3):  # arrivals are counted anew
            y = triton.linear(x, weight, bias, torch.float32, tile)
            expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * depth**0.5)
        gated = triton.linear(x, weight, bias, torch.float32, tile, triton.SILU)
        torch.testing.assert_close(gated, silu_mul(y), rtol=1e-4, atol=1e-3)
