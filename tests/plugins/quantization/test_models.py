"""Whole models as other tools quantize them: their tokens are those of the dense model that the weights stand for."""

import json
from functools import partial

import pytest
import torch
from model.tiny_models import make_model
from plugins.quantization import packers
from plugins.quantization.compressed_packer import compressed
from plugins.quantization.quantized_models import SHAPE, agreement, quantized_model
from safetensors.torch import save_file

from llmd.api.v1 import Linear
from llmd.api.v1.testing import make_runner
from llmd.errors import ModelError
from llmd_kernels import native

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def all_alike(write):
    return lambda name, weight: write(weight)


def groups(form, weights, inputs=None, targets=("Linear",)):
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": form}


def compressed_settings(*config_groups, form="mixed-precision", ignore=("lm_head",)):
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": list(ignore),
        "config_groups": {f"group_{index}": group for index, group in enumerate(config_groups)},
    }  # fmt: skip


W4 = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group", "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
F8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize(
    ("settings", "write"),
    [
        (GPTQ, packers.gptq),
        ({**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}, partial(packers.gptq, act_order=True, less_one=False)),
        ({**GPTQ, "bits": 8, "sym": False}, partial(packers.gptq, bits=8, symmetric=False)),
        (AWQ, packers.awq),
        (FP8, partial(packers.fp8, block=(128, 128), scale="weight_scale_inv")),
        ({**FP8, "weight_block_size": None}, packers.fp8),
        ({"quant_method": "mxfp4"}, packers.mxfp4),
        (compressed_settings(groups("pack-quantized", W4)), partial(compressed, form="pack-quantized", weights=W4)),
        (compressed_settings(groups("int-quantized", W8, TOKENS)), partial(compressed, form="int-quantized", weights=W8)),
        (compressed_settings(groups("float-quantized", F8)), partial(compressed, form="float-quantized", weights=F8)),
    ],
)
def test_tokens(tmp_path, family, settings, write):
    model = quantized_model(tmp_path, all_alike(write), settings, family=family)
    assert agreement(tmp_path, model) >= 0.95


@pytest.mark.parametrize(("settings", "write"), [(GPTQ, packers.gptq), (AWQ, packers.awq)])
def test_tokens_without_rounded_activations(tmp_path, monkeypatch, settings, write):
    """The CPU's kernels make activations 8-bit; without them only the weights' own rounding is left, and it is the same."""
    monkeypatch.setattr(native, "library", lambda: None)
    model = quantized_model(tmp_path, all_alike(write), settings, initializer_range=0.2)
    assert agreement(tmp_path, model) == 1


# --- models that are not quantized in one piece


def test_a_quantized_head_and_skipped_modules(tmp_path):
    settings = {
        **GPTQ, "lm_head": True,
        "dynamic": {
            r"-:.*\.1\..*": {}, r"+:.*\.mlp\.down_proj": {"bits": 8, "group_size": -1}, r".*k_proj": {"desc_act": True},
        },
    }  # fmt: skip

    def write(name, weight):
        if ".mlp.down_proj" in name:
            return packers.gptq(weight, bits=8, group_size=-1)
        return packers.gptq(weight, act_order="k_proj" in name)

    model = quantized_model(tmp_path, write, settings, is_kept=lambda name: ".1." in name)
    assert agreement(tmp_path, model) >= 0.95
    module = make_runner(tmp_path).model.module
    assert type(module.lm_head.linear.method).__name__ == "GptqLinear"
    assert type(module.model.layers[0].self_attn.qkv_proj.method).__name__ == "PartMethods"
    assert type(module.model.layers[1].self_attn.qkv_proj.method).__name__ == "Unquantized"


def test_merged_parts_with_orders_of_their_own(tmp_path):
    calls = iter(range(1000))

    def write(name, weight):
        torch.manual_seed(next(calls))
        return packers.gptq(weight, act_order=True, seed=next(calls))

    model = quantized_model(tmp_path, write, {**GPTQ, "desc_act": True}, family="Qwen2")
    assert agreement(tmp_path, model) >= 0.95


def test_parts_of_a_merged_linear_that_are_skipped(tmp_path):
    settings = {**AWQ, "modules_to_not_convert": ["v_proj", "model.layers.0.mlp.gate_proj", "lm_head"]}
    skipped = lambda name: name.endswith(("v_proj", "layers.0.mlp.gate_proj")) or name == "lm_head"  # noqa: E731
    model = quantized_model(tmp_path, all_alike(packers.awq), settings, family="Qwen2", is_kept=skipped)
    assert agreement(tmp_path, model) >= 0.95


@pytest.mark.parametrize("settings", [GPTQ, compressed_settings(groups("pack-quantized", W4), ignore=[])])
def test_a_tied_head_stays_the_embedding(tmp_path, settings):
    write = packers.gptq if settings is GPTQ else partial(compressed, form="pack-quantized", weights=W4)
    model = quantized_model(tmp_path, all_alike(write), settings, tie_word_embeddings=True)
    assert agreement(tmp_path, model) >= 0.95


def test_mixed_groups(tmp_path):
    """Names before regexes, and those before classes, whatever the order of the groups."""
    settings = compressed_settings(
        groups("pack-quantized", W4),
        groups("float-quantized", F8, targets=["re:.*down_proj"]),
        groups("int-quantized", W8, TOKENS, targets=["model.layers.1.mlp.down_proj", "re:.*v_proj"]),
        ignore=["re:.*layers\\.2\\..*gate_proj", "model.layers.0.self_attn.o_proj"],
    )

    def write(name, weight):
        if name.endswith("v_proj") or name == "model.layers.1.mlp.down_proj":
            return compressed(weight, form="int-quantized", weights=W8, inputs=TOKENS)
        if name.endswith("down_proj"):
            return compressed(weight, form="float-quantized", weights=F8)
        return compressed(weight, form="pack-quantized", weights=W4)

    kept = ("model.layers.2.mlp.gate_proj", "model.layers.0.self_attn.o_proj")
    model = quantized_model(tmp_path, write, settings, is_kept=lambda name: name in kept)
    assert agreement(tmp_path, model) >= 0.95


def test_biases_of_zeros_where_the_model_has_none(tmp_path):
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64), "model.layers.1.mlp.up_proj.bias": torch.zeros(96)}
    model = quantized_model(tmp_path, all_alike(packers.gptq), GPTQ, extra=extra)
    assert agreement(tmp_path, model) >= 0.95
    quantized_model(tmp_path, all_alike(packers.gptq), GPTQ, extra={key: value + 1 for key, value in extra.items()})
    with pytest.raises(ModelError, match=r"tensor model.layers.0.self_attn.q_proj.bias is not zero"):
        make_runner(tmp_path)


def test_scales_of_a_quantized_cache_are_passed_over(tmp_path):
    extra = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("k_scale", "v_scale")}
    model = quantized_model(tmp_path, all_alike(packers.fp8), {**FP8, "weight_block_size": None}, extra=extra)
    assert agreement(tmp_path, model) >= 0.95


def test_modelopts_own_file(tmp_path):
    quantized_model(tmp_path, all_alike(packers.fp8), {})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    written = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": quantization}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(written))
    runner = make_runner(tmp_path)
    assert runner.info.facts["quantization"] == "modelopt"


# --- bytes


@pytest.mark.parametrize(
    ("settings", "write", "most"),
    [
        ({**GPTQ, "group_size": 128}, partial(packers.gptq, group_size=128), 0.30),
        ({**AWQ, "group_size": 64}, partial(packers.awq, group_size=64), 0.30),
        ({"quant_method": "mxfp4"}, packers.mxfp4, 0.30),
        ({**GPTQ, "group_size": 128, "bits": 8}, partial(packers.gptq, bits=8, group_size=128), 0.53),
        (FP8, partial(packers.fp8, block=(128, 128), scale="weight_scale_inv"), 0.53),
        (
            compressed_settings(groups("int-quantized", W8, TOKENS)),
            partial(compressed, form="int-quantized", weights=W8),
            0.53,
        ),
    ],
)
def test_bytes_kept(tmp_path, settings, write, most):
    """On shapes of a model of half a billion parameters, made narrow; what is reported is what there is."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 1}
    quantized_model(tmp_path, all_alike(write), settings, **shape)
    runner = make_runner(tmp_path, dtype="bfloat16")
    module = runner.model.module
    linears = [layer for layer in module.modules() if isinstance(layer, Linear)]
    kept = sum(tensor.nbytes for layer in linears for tensor in (*layer.parameters(), *layer.buffers()))
    dense = sum(2 * layer.in_features * layer.out_features for layer in linears)
    assert kept <= most * dense
    others = sum(tensor.nbytes for name, tensor in module.named_parameters() if "proj" not in name)
    assert runner.info.weights_bytes == kept + others


@pytest.mark.parametrize("settings", [GPTQ, AWQ, FP8, {"quant_method": "mxfp4"}])
def test_random_weights_in_the_checkpoints_format(tmp_path, settings):
    """--load-format dummy measures a quantized model that was not downloaded."""
    quantized_model(tmp_path, all_alike(packers.gptq), settings)
    (tmp_path / "model.safetensors").unlink()
    runner = make_runner(tmp_path, load_format="dummy")
    assert runner.info.facts["quantization"] == settings["quant_method"]


# --- experts


def quantized_mixtral(path, write, settings):
    """A Mixtral whose attention and experts `write` wrote, under the names of its checkpoints; routers stay."""
    shape = {**SHAPE, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = make_model("Mixtral", **shape, initializer_range=0.05)
    tensors = {}

    def add(name, weight):
        written = write(weight)
        weight.copy_(written.dense)
        tensors.update({f"{name}.{suffix}": value.contiguous() for suffix, value in written.tensors.items()})

    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            folder = key.partition(".experts.")[0].replace(".mlp", ".block_sparse_moe")
            if key.endswith("experts.gate_up_proj"):
                for number, both in enumerate(tensor):
                    for name, weight in zip(("w1", "w3"), both.chunk(2), strict=True):
                        add(f"{folder}.experts.{number}.{name}", weight)
            elif key.endswith("experts.down_proj"):
                for number, weight in enumerate(tensor):
                    add(f"{folder}.experts.{number}.w2", weight)
            elif key.endswith("_proj.weight"):
                add(key.removesuffix(".weight"), tensor)
            else:
                tensors[key.replace(".mlp.gate", ".block_sparse_moe.gate")] = tensor.clone()
    save_file(tensors, path / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["MixtralForCausalLM"], "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config, default=str))
    return model


@pytest.mark.parametrize(
    ("settings", "write"),
    [
        ({**GPTQ, "dynamic": {r"-:.*block_sparse_moe\.gate": {}}}, packers.gptq),
        ({**AWQ, "modules_to_not_convert": ["gate"]}, packers.awq),
        ({**FP8, "weight_block_size": None, "ignored_layers": ["gate", "lm_head"]}, packers.fp8),
    ],
)
def test_experts_as_other_tools_write_them(tmp_path, settings, write):
    model = quantized_mixtral(tmp_path, write, settings)
    runner = make_runner(tmp_path)
    methods = {
        name.rpartition(".")[2]: type(layer.method).__name__
        for name, layer in runner.model.module.named_modules()
        if isinstance(layer, Linear)
    }
    assert methods["gate"] == "Unquantized"
    assert "Unquantized" not in {methods["gate_up"], methods["w2"], methods["qkv_proj"]}
    assert agreement(tmp_path, model) >= 0.9  # a token whose router is at the brink may go to another expert
