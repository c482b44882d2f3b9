"""Words of four numbers of eight bits: the PTX that takes them apart, carried out instruction by instruction."""

import re

import pytest
import torch

from llmd_kernels.quantized_kv import half_bytes, view_quantized

MASK, F8 = 0xFFFFFFFF, torch.float8_e4m3fn


def permuted(low, high, selector):
    """prmt.b32."""
    taken = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    return int.from_bytes(bytes(taken[selector >> 4 * at & 7] for at in range(4)), "little")


def halves(word):
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(torch.float16)


def packed(values):
    low, high = (int(bits) & 0xFFFF for bits in values.to(torch.float16).view(torch.int16))
    return high << 16 | low


def nearest_halves(numbers):
    return packed(numbers.to(torch.float16))


OPERATIONS = {
    "mov.b32": lambda x: x,
    "xor.b32": lambda x, y: x ^ y,
    "and.b32": lambda x, y: x & y,
    "shr.b32": lambda x, count: x >> count,
    "prmt.b32": permuted,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else None,
    "add.f16x2": lambda x, y: nearest_halves(halves(x).double() + halves(y).double()),
    "fma.rn.f16x2": lambda x, y, z: nearest_halves(halves(x).double() * halves(y).double() + halves(z).double()),
    "cvt.rn.f16x2.e4m3x2": lambda x: nearest_halves(torch.tensor([x & 0xFF, x >> 8]).to(torch.uint8).view(F8).double()),
}


def carried_out(ptx, word):
    """What a word becomes: four float16."""
    held = {"$4": word}
    for name, given in re.findall(r"^([a-z][\w.]+)\s+(.+);$", ptx, re.MULTILINE):
        operands = re.findall(r"\{.*?\}|[^,\s]+", given)
        if name == "mov.b32" and "{" in given:
            parts = re.findall(r"[\w$]+", operands[0])
            sources = re.findall(r"[\w$]+", operands[1])
            whole = sum(held[source] << 16 * at for at, source in enumerate(sources))
            held |= {part: whole >> 16 * at & 0xFFFF for at, part in enumerate(parts)}
            continue
        values = [held[operand] if operand in held else int(operand, 0) for operand in operands[1:]]
        held[operands[0]] = OPERATIONS[name](*values) & MASK
    return torch.tensor([held[f"${at}"] for at in range(4)], dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("name", ["INT8_WORD", "E4M3_WORD", "E4M3_WORD_CONVERTED"])
def test_every_number_in_every_place(name):
    kernels = pytest.importorskip("llmd_kernels.quantized_kv.triton")
    ptx = getattr(kernels, name).value
    dtype = torch.int8 if name == "INT8_WORD" else F8
    numbers = torch.arange(256, dtype=torch.uint8)
    if dtype != torch.int8:
        numbers = numbers[numbers & 0x7F != 0x7F]  # NaNs are never stored
    for at in range(len(numbers)):
        word = torch.cat((numbers[at:], numbers))[:4].roll(at)
        expected = word.view(dtype).float()
        assert torch.equal(carried_out(ptx, int(word.view(torch.int32)) & MASK).float(), expected), word


def cache(kv_heads, dim, block_size=16):
    shape = (2, block_size, kv_heads, dim)
    return view_quantized(torch.zeros(3, 2, 2, half_bytes(shape), dtype=torch.uint8)[:, 1], shape, F8)


def test_words_are_read_where_heads_and_scales_lie_in_them():
    kernels = pytest.importorskip("llmd_kernels.quantized_kv.triton")
    wide = cache(2, 64)
    assert kernels.kernel_view(wide).read == kernels.ONE_BY_ONE
    assert kernels.kernel_view(wide, 80).read == kernels.WORDS
    view = kernels.kernel_view(wide, 90)
    assert view.read == kernels.WORDS_CONVERTED
    assert (view.data.shape, view.data.dtype) == ((3, 2, 16, 2, 16), torch.int32)
    assert (view.scales.shape, view.scales.dtype) == ((3, 2, 16), torch.int32)
    assert kernels.kernel_view(cache(2, 6), 90).read == kernels.ONE_BY_ONE
    assert kernels.kernel_view(cache(1, 64, 3), 90).read == kernels.ONE_BY_ONE
    assert kernels.kernel_view(cache(1, 64), 90).read == kernels.WORDS_CONVERTED
