"""The packers of these tests against other tools' own readers, so that both cannot be wrong in the same way."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from plugins.quantization import packers
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmd_plugins.quantization.stored import unpack_words


def random_weight(rows, columns):
    torch.manual_seed(0)
    return torch.randn(rows, columns) * 0.1


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq(group_size):
    written = packers.awq(random_weight(24, 96), group_size=group_size)
    converter = AutoAWQConverter(bits=4, group_size=group_size)
    codes, scale, zeros = converter._convert_gemm_module(
        *(written.tensors[name] for name in ("qweight", "scales", "qzeros"))
    )
    groups = packers.group_of(96, group_size)
    torch.testing.assert_close((codes - zeros[:, groups]) * scale.float()[:, groups], written.dense)


@pytest.mark.parametrize("block", [(128, 128), (16, 32)])
def test_fp8_blocks(block):
    written = packers.fp8(random_weight(150, 200), block=block, scale="weight_scale_inv")
    dense = _dequantize_fp8_weight(
        written.tensors["weight"], written.tensors["weight_scale_inv"], list(block), torch.float32
    )
    torch.testing.assert_close(dense, written.dense)


def test_mxfp4():
    """gpt-oss's experts, one of them: read as [experts, inputs, outputs]."""
    written = packers.mxfp4(random_weight(24, 96))
    blocks, scales = (written.tensors[name].unsqueeze(0) for name in ("weight_blocks", "weight_scales"))
    dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0]
    torch.testing.assert_close(dense.T if dense.shape == (96, 24) else dense, written.dense)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_bit_streams(bits, count):
    torch.manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, count))
    words = packers.bit_stream(codes, bits)
    assert torch.equal(unpack_words(words, bits, count).long(), codes)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape).long() + (1 << (bits - 1)), codes)
