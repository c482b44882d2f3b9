"""Models on a device: Hugging Face's logits and tokens, in every way that weights, caches and adapters are stored."""

from functools import partial

import pytest
from gpu.models import generated, loaded, logits_of
from model.made_adapters import make_adapter
from model.tiny_models import make_model, prompts, reference_generate, reference_logits, save_model
from plugins.quantization import packers
from plugins.quantization.quantized_models import quantized_model

from llmd.api.v1.testing.driver import StepDriver
from llmd.engine.params import SamplingParams

FAMILIES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"head_dim": 32},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
# relative error of logits in the 2-norm: random weights with sharp scores amplify what goes in
QUANTIZED = {"int8": 0.25, "fp8": 0.35, "int4": 0.8, "nf4": 0.8}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHECKPOINTS = {
    "gptq": (GPTQ, packers.gptq),
    "gptq, columns in another order": ({**GPTQ, "desc_act": True}, partial(packers.gptq, act_order=True)),
    "awq": (AWQ, packers.awq),
    "fp8 by block": (FP8, partial(packers.fp8, block=(128, 128), scale="weight_scale_inv")),
}
CACHES = {"int8": 0.1, "fp8": 0.35}


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_hugging_faces(family, device, tmp_path):
    model = make_model(family, **{**SHAPE, **FAMILIES[family]})
    given = prompts(50, 1, 29, 17)
    with loaded(save_model(model, tmp_path), device) as runner:
        assert distance(logits_of(runner, given[0]), reference_logits(model, given[0])) < 1e-3
        assert generated(runner, given, 12) == [reference_generate(model, prompt, 12) for prompt in given]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_near(dtype, device, tmp_path):
    model = make_model("Qwen3", **SHAPE, initializer_range=0.05)
    [prompt] = prompts(90)
    with loaded(save_model(model, tmp_path), device, dtype=dtype) as runner:
        assert distance(logits_of(runner, prompt), reference_logits(model, prompt)) < 0.05


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_near(method, device, tmp_path):
    model = make_model("Llama", **SHAPE, initializer_range=0.05)
    [prompt] = prompts(60)
    with loaded(save_model(model, tmp_path), device, dtype="bfloat16", quantization=method) as runner:
        assert distance(logits_of(runner, prompt), reference_logits(model, prompt)) < QUANTIZED[method]
        assert len(generated(runner, prompts(5, 9), 6)[0]) == 11


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_quantized_checkpoints_are_what_they_stand_for(name, device, tmp_path):
    settings, write = CHECKPOINTS[name]
    model = quantized_model(tmp_path, lambda _, weight: write(weight), settings)
    prompt = [token % 96 for token in prompts(60)[0]]
    with loaded(tmp_path, device) as runner:
        assert distance(logits_of(runner, prompt), reference_logits(model, prompt)) < 0.1


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantized_experts_are_near(method, device, tmp_path):
    model = make_model("Qwen3Moe", **{**SHAPE, **FAMILIES["Qwen3Moe"], "initializer_range": 0.05})
    [prompt] = prompts(60)
    with loaded(save_model(model, tmp_path), device, dtype="bfloat16", quantization=method) as runner:
        assert distance(logits_of(runner, prompt), reference_logits(model, prompt)) < QUANTIZED[method]


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_in_eight_bits_is_near(kind, device, tmp_path):
    model = make_model("Llama", **SHAPE)
    [prompt] = prompts(90)
    with loaded(save_model(model, tmp_path), device, cache={"kv_cache_dtype": kind}) as runner:
        assert distance(logits_of(runner, prompt), reference_logits(model, prompt)) < CACHES[kind]
        assert len(generated(runner, prompts(5, 9), 6)[0]) == 11


def test_rows_with_adapters_and_without_in_one_batch(device, tmp_path):
    base = make_model("Llama", **SHAPE)
    made = [make_adapter(base, tmp_path / name, rank=rank, seed=rank) for name, rank in (("a", 8), ("b", 3))]
    path, given = save_model(base, tmp_path / "base"), prompts(9, 30, 4, 17)
    slots = [0, None, 1, 0]
    with loaded(path, device, adapters={"max_loras": 2, "max_lora_rank": 8}) as runner:
        driver = StepDriver(runner)
        for slot, adapter in enumerate(made):
            driver.load_adapter(adapter.path, slot)
        driver.step([])
        found = generated(runner, given, 10, slots)
    models = [base if slot is None else made[slot].merged for slot in slots]
    assert found == [reference_generate(model, prompt, 10) for model, prompt in zip(models, given, strict=True)]


def test_both_samplers_draw_the_same_tokens(device, tmp_path):
    path = save_model(make_model("Qwen2", **SHAPE), tmp_path)
    wishes = [
        {}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.05, "temperature": 1.5}, {"temperature": 0.0, "logit_bias": {7: 3.0}},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2},
    ]  # fmt: skip
    found = []
    for sampler in ("torch", ""):
        with loaded(path, device, sampler=sampler) as runner:
            driver = StepDriver(runner)
            sequences = [
                driver.sequence(prompt, SamplingParams(**wish, max_tokens=99), seed=seed)
                for seed, (prompt, wish) in enumerate(zip(prompts(3, 9, 5, 1, 14), wishes, strict=True))
            ]
            driver.generate(sequences, 20)
            found.append([sequence.tokens for sequence in sequences])
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0]] == [23, 29, 25, 21, 34]
