"""Runs the PTX that kernels widen weights with, instruction by instruction; for processes without a GPU."""

import re

import numpy as np


def run(text, inputs, num_outputs):
    """What inline assembly leaves in $0 …, given the uint32 arrays that follow them, one element for each thread."""
    registers = {f"${num_outputs + place}": value.astype(np.uint32) for place, value in enumerate(inputs)}
    for line in re.sub(r"//.*|[{}]|\.reg [^;]*;", "", text).split(";"):
        if line.strip():
            name, operands = line.strip().split(maxsplit=1)
            target, *sources = (each.strip() for each in operands.split(","))
            given = [registers[each] if each in registers else np.uint32(int(each, 0)) for each in sources]
            registers[target] = _RULES[name.partition(".")[0]](name, *given)
    return [registers[f"${place}"] for place in range(num_outputs)]


def _permute(name, a, b, selector):
    bytes_ = [(source >> np.uint32(8 * place)) & 0xFF for source in (a, b) for place in range(4)]
    picked = [bytes_[(int(selector) >> (4 * place)) & 7] << np.uint32(8 * place) for place in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def _lookup(name, a, b, c, table):
    result = np.zeros_like(a)
    for place in range(8):
        if (int(table) >> place) & 1:
            terms = [value if (place >> bit) & 1 else ~value for value, bit in ((a, 2), (b, 1), (c, 0))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def _fma(name, a, b, c):
    halves = []
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (floats((value >> shift) & 0xFFFF, "bf16" in name).astype(np.float64) for value in (a, b, c))
        value = x * y + z
        assert np.array_equal(value.astype(np.float32), value, equal_nan=True)  # here no rounding is left to do
        halves.append(_bits(value.astype(np.float32), "bf16" in name) << shift)
    return halves[0] | halves[1]


def floats(bits, is_bf16):
    """16 bits as float32."""
    bits = np.asarray(bits, dtype=np.uint32)
    if is_bf16:
        return (bits << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _bits(value, is_bf16):
    if is_bf16:
        return value.view(np.uint32) >> np.uint32(16)
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


_RULES = {
    "prmt": _permute,
    "lop3": _lookup,
    "fma": _fma,
    "shr": lambda name, a, b: a >> b,
    "and": lambda name, a, b: a & b,
    "add": lambda name, a, b: a + b,
    "mad": lambda name, a, b, c: a * b + c,
    "mov": lambda name, a: a,
}
