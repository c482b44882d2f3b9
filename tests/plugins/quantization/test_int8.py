"""--quantization int8: exact integer arithmetic, close to the full weights, the same alone and in a batch."""

import pytest
import torch
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_logits, save_model

from llmd.errors import ModelError
from llmd.model.layers import Linear, Part, Slice
from llmd_kernels import native
from llmd_plugins.quantization.int8_linear import Int8, Int8Linear


def make_linear(rows=37, columns=53, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = Linear(
        [Part("", Slice(rows, 0, rows))], Slice(columns, 0, columns), bias=bias, dtype=dtype, device=torch.device("cpu")
    )
    layer.name, layer.method = "linear", Int8Linear()
    layer.method.create_weights(layer)
    tensors = {"linear.weight": torch.randn(rows, columns), "linear.bias": torch.randn(rows)}
    for slot in layer.weight_slots():
        slot.load(tensors[slot.name])
    layer.finish_weights()
    return layer, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_close(bias, dtype):
    layer, tensors = make_linear(bias=bias, dtype=dtype)
    x = torch.randn(5, 53).to(dtype)
    expected = x.float() @ tensors["linear.weight"].T + (tensors["linear.bias"] if bias else 0)
    error = (layer(x).float() - expected).norm() / expected.norm()
    assert error < 0.02
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("is_native", [True, False])
def test_end_to_end(tmp_path, monkeypatch, is_native):
    if not is_native:
        monkeypatch.setattr(native, "library", lambda: None)
    model = make_model("Qwen2", hidden_size=120, initializer_range=0.05)
    runner = make_runner(save_model(model, tmp_path), quantization="int8")
    assert runner.info.facts["quantization"] == "int8"
    driver = StepDriver(runner)
    sequences = [driver.sequence(prompt) for prompt in prompts(9, 30, 3)]
    driver.generate(sequences, 4, chunks=(5,))
    for sequence in sequences:
        expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
        seen = torch.stack(driver.logits[sequence.row])
        assert torch.nn.functional.cosine_similarity(seen, expected).min() > 0.99


def test_weights_are_freed(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    module = make_runner(path, quantization="int8").model.module
    for layer in module.modules():
        if isinstance(layer, Linear):
            assert layer.weight.dtype in (torch.uint8, torch.int8)


def test_it_never_claims_a_checkpoint():
    assert not Int8().detect({"quant_method": "int8"})


def test_unknown_methods_are_named(tmp_path):
    path = save_model(make_model("Llama"), tmp_path)
    with pytest.raises(ModelError, match=r"quantization 'awq' is not known; known are .*int8"):
        make_runner(path, quantization="awq")


def test_a_checkpoint_quantized_by_something_else(tmp_path):
    import json

    path = save_model(make_model("Llama"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantized by 'gptq', which no plugin reads; known are .*int8"):
        make_runner(path)
    with pytest.raises(ModelError, match="quantized by 'gptq', which is not 'int8'"):
        make_runner(path, quantization="int8")
