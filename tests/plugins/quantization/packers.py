"""Weights as other tools write them, from their formats' public definitions; written apart from the plugins that read them.

Each packer takes float32 [out, in] and gives the tensors and what they stand for.
"""

from __future__ import annotations

import torch

from llmd.api.v1.testing import QuantizedWeight

AWQ_PLACE_OF_OUTPUT = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # nibble of a word → the output in it


def group_of(num_columns, group_size):
    """[K]: the group of each input feature."""
    return torch.arange(num_columns) // (num_columns if group_size == -1 else group_size)


def round_by_groups(weight, bits, groups, symmetric):
    """Codes [N, K], scales [N, G] that float16 holds, zero points [N, G]."""
    num_groups, top = int(groups.max()) + 1, (1 << bits) - 1
    codes = torch.empty(weight.shape, dtype=torch.int64)
    scales, zeros = torch.empty(len(weight), num_groups), torch.empty(len(weight), num_groups, dtype=torch.int64)
    for group in range(num_groups):
        part = weight[:, groups == group]
        high, low = part.amax(1).clamp(min=1e-3), part.amin(1).clamp(max=-1e-3)
        if symmetric:
            scales[:, group] = (torch.maximum(high, -low) / ((top + 1) // 2)).half().float()
            zeros[:, group] = (top + 1) // 2
        else:
            scales[:, group] = ((high - low) / top).half().float()
            zeros[:, group] = (-low / scales[:, group]).round().clamp(1, top)
        code = (part / scales[:, group, None]).round() + zeros[:, group, None]
        codes[:, groups == group] = code.clamp(0, top).long()
    return codes, scales, zeros


def dense_of(codes, scales, zeros, groups):
    return (codes - zeros[:, groups]).float() * scales[:, groups]


def bit_stream(codes, bits):
    """[R, C] → int32 [R, ceil(C · bits / 32)], each row one stream of bits, the first code lowest."""
    rows = []
    for row in codes.tolist():
        stream = 0
        for index, code in enumerate(row):
            stream |= code << (index * bits)
        num_words = -(-len(row) * bits // 32)
        words = [stream >> (32 * word) & 0xFFFFFFFF for word in range(num_words)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(weight, *, bits=4, group_size=32, symmetric=True, act_order=False, less_one=True, seed=7):
    """GPTQModel's and AutoGPTQ's; `less_one` as in checkpoint_format "gptq"."""
    groups = group_of(weight.shape[1], group_size)
    if act_order:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    codes, scales, zeros = round_by_groups(weight, bits, groups, symmetric)
    tensors = {
        "qweight": bit_stream(codes, bits).T.contiguous(),
        "qzeros": bit_stream((zeros - int(less_one)).T, bits),
        "scales": scales.T.contiguous().half(),
        "g_idx": groups.to(torch.int32),
    }
    return QuantizedWeight(tensors, dense_of(codes, scales, zeros, groups))


def awq_words(codes):
    """[R, N] → int32 [R, N / 8]."""
    rows = []
    for row in codes.tolist():
        words = []
        for start in range(0, len(row), 8):
            word = sum(row[start + output] << (4 * place) for output, place in AWQ_PLACE_OF_OUTPUT.items())
            words.append(word - (1 << 32) if word >> 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def awq(weight, *, group_size=32):
    """AutoAWQ's GEMM packing."""
    groups = group_of(weight.shape[1], group_size)
    codes, scales, zeros = round_by_groups(weight, 4, groups, symmetric=False)
    tensors = {
        "qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scales.T.contiguous().half(),
    }  # fmt: skip
    return QuantizedWeight(tensors, dense_of(codes, scales, zeros, groups))


def fp8(weight, *, block=None, by_row=False, scale="weight_scale", input_scale=None):
    """A scale for each block (DeepSeek's weight_scale_inv), each output, or all; float32."""
    rows, columns = weight.shape
    high, wide = block or ((1, columns) if by_row else (rows, columns))
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    dense = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            dense[place] = codes[place].float() * scales[i, j]
    tensors = {"weight": codes, scale: scales if block or by_row else scales[0, 0]}
    if input_scale is not None:
        tensors[input_scale] = torch.tensor(0.02)
    return QuantizedWeight(tensors, dense)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e2m1_codes(values):
    """The nearest of E2M1's values for each."""
    return (values.unsqueeze(-1) - E2M1).abs().argmin(-1)


def mxfp4(weight):
    """gpt-oss's blocks and scales, for a linear."""
    groups = weight.unflatten(1, (-1, 32))
    exponents = groups.abs().amax(2).log2().floor() - 2
    codes = e2m1_codes(groups / exponents.exp2().unsqueeze(2))
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    dense = (E2M1[codes] * exponents.exp2().unsqueeze(2)).flatten(1)
    return QuantizedWeight({"weight_blocks": blocks, "weight_scales": (exponents + 127).to(torch.uint8)}, dense)


def nvfp4(weight):
    """ModelOpt's: e4m3 scales by 16, and one for the tensor."""
    groups = weight.unflatten(1, (-1, 16))
    outer = weight.abs().max() / 6 / 448
    scales = (groups.abs().amax(2) / 6 / outer).to(torch.float8_e4m3fn)
    whole = (scales.float() * outer).unsqueeze(2)
    codes = e2m1_codes(groups / whole)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).flatten(1)
    tensors = {"weight": packed, "weight_scale": scales, "weight_scale_2": outer, "input_scale": torch.tensor(0.1)}
    return QuantizedWeight(tensors, (E2M1[codes] * whole).flatten(1))


HQQ_PLACES = {8: 1, 4: 2, 2: 4, 3: 10}


def hqq(weight, *, bits=4, group_size=64):
    """hqq's safetensors: rows of [R, group] laid over each other, the first in the highest bits; floats as zero points."""
    groups = group_of(weight.shape[1], group_size)
    _, scales, _ = round_by_groups(weight, bits, groups, symmetric=False)
    zeros = torch.stack([-weight[:, groups == group].amin(1) for group in range(scales.shape[1])], 1) / scales
    wide = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, (1 << bits) - 1).long()
    rows = wide.reshape(-1, weight.shape[1] if group_size == -1 else group_size)
    count = HQQ_PLACES[bits]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % count))
    parts = rows.view(count, -1, rows.shape[1])
    words = sum(part << (bits * (count - 1 - place)) for place, part in enumerate(parts))
    tensors = {
        "W_q": words.to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scales.view(-1, 1), "zero": zeros.view(-1, 1), "nbits": torch.tensor(bits, dtype=torch.uint8),
        "axis": torch.tensor(1, dtype=torch.uint8), "shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return QuantizedWeight(tensors, (wide - zeros[:, groups]) * scales[:, groups])
