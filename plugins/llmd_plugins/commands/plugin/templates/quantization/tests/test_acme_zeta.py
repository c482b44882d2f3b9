"""The quantizer by the kit, and a model that speaks through it."""

from acme_zeta import llmd_register_quantizations

from llmd.api.v1 import SamplingParams
from llmd.api.v1.testing import check_architecture, check_quantization


def test_linear():
    (spec,) = llmd_register_quantizations()
    check_quantization(spec, max_bits=8.1)


def test_schedules(llmd_tiny_model):
    """The whole model: alone, in a batch, in chunks."""
    check_architecture(llmd_tiny_model, *llmd_register_quantizations(), load_format="dummy", quantization="zeta")


def test_engine(llmd_engine):
    llm = llmd_engine(quantization="zeta")
    (output,) = llm.generate("hello", SamplingParams(max_tokens=4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
