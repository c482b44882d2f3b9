"""Mixtures of experts against Hugging Face's, and quantized ones against their own dequantized weights."""

import json
from dataclasses import replace

import pytest
import torch
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, reference_generate, reference_logits, save_model

from llmd.errors import ModelError
from llmd.model.layers.experts import Experts, route
from llmd_plugins.architectures import moe

QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "hidden_size": 120, "norm_topk_prob": True}
CASES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}),
    "mixtral-one-expert-window": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 40, "sliding_window": 9},
    ),
    "qwen2-shared": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 36, "norm_topk_prob": False}),
    "qwen2-every-second-layer": (
        "Qwen2Moe",
        {**QWEN, "shared_expert_intermediate_size": 36, "decoder_sparse_step": 2},
    ),
    "qwen3": ("Qwen3Moe", QWEN),
    "qwen3-one-plain-layer": ("Qwen3Moe", {**QWEN, "mlp_only_layers": [1], "norm_topk_prob": False}),
}
LENGTHS = (29, 1, 5, 13, 70, 3)


def parts():
    """The plugins of a model, those for mixtures among them."""
    given = model_parts()
    specs = {name: spec for spec in moe.llmd_register_architectures() for name in spec.architectures}
    return replace(given, architectures={**given.architectures, **specs})


def make(case, path, **changes):
    family, own = CASES[case]
    model = make_model(family, **{**own, **changes})
    return model, save_model(model, path)


def check(model, sequence, driver):
    expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
    seen = torch.stack(driver.logits[sequence.row][-len(expected) :])
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
    assert sequence.tokens == reference_generate(model, sequence.tokens[: sequence.num_prompt], len(expected))


@pytest.mark.parametrize("case", CASES)
def test_parity(tmp_path, case):
    model, path = make(case, tmp_path)
    runner = make_runner(path, parts=parts())
    assert type(runner.model.module).__name__ == "CausalLM"
    driver = StepDriver(runner)
    alone, *batch = [driver.sequence(prompt) for prompt in (prompts(LENGTHS[0]) + prompts(*LENGTHS))]
    driver.generate([alone], 6)
    check(model, alone, driver)
    driver.generate(batch, 6, chunks=(3, 7, 5, 1))
    for sequence in batch:
        check(model, sequence, driver)
    assert batch[0].tokens == alone.tokens


# nf4 keeps activations as they are; in eight bits they turn some tokens of these sharp models to other experts.
@pytest.mark.parametrize(("method", "bound"), [("int8", 0.2), ("int4", 0.2), ("nf4", 0.01)])
@pytest.mark.parametrize("case", ["mixtral", "qwen2-shared"])
def test_experts_are_quantized_and_routers_are_not(tmp_path, case, method, bound):
    model, path = make(case, tmp_path)
    runner = make_runner(path, parts=parts(), quantization=method)
    module = runner.model.module
    kinds = {
        name.rpartition(".")[2]: type(layer.method).__name__
        for name, layer in module.named_modules()
        if hasattr(layer, "method") and hasattr(layer, "parts")
    }
    assert kinds["gate"] == "Unquantized"
    assert kinds["gate_up"] != "Unquantized"
    with torch.no_grad():
        for layer in module.modules():
            if hasattr(layer, "parts") and type(layer.method).__name__ != "Unquantized":
                dense = layer.method.dense_weight(layer).float()
                start = 0
                for part, key in zip(layer.parts, layer.checkpoint_names, strict=True):
                    put(model, key, dense[start : start + part.rows.size])
                    start += part.rows.size
        table = module.model.embed_tokens
        model.model.embed_tokens.weight.copy_(table.table)
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.copy_(module.lm_head.table)
    driver = StepDriver(runner)
    sequence = driver.sequence(prompts(24)[0])
    driver.generate([sequence], 8)
    expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
    seen = torch.stack(driver.logits[sequence.row])
    errors = (seen - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < bound


def put(model, key, weight):
    """Into Hugging Face's model, which keeps experts stacked: gate and up under each other."""
    if ".experts." not in key:
        model.get_parameter(f"{key}.weight").copy_(weight)
        return
    folder, _, rest = key.partition(".experts.")
    number, name = rest.split(".")
    stacked = model.get_submodule(folder.replace("block_sparse_moe", "mlp")).experts
    size = weight.shape[0]
    if name in ("w2", "down_proj"):
        stacked.down_proj[int(number)].copy_(weight)
    else:
        first = 0 if name in ("w1", "gate_proj") else size
        stacked.gate_up_proj[int(number), first : first + size].copy_(weight)


def test_a_token_does_not_feel_its_batch():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(8, 8, bias=False) for _ in range(6)]
    experts = Experts(linears)
    x, logits = torch.randn(40, 8), torch.randn(40, 6)
    ids, weights = route(logits, 3, normalized=True)
    with torch.no_grad():
        together = experts(x, ids, weights)
        for at in range(40):
            one = slice(at, at + 1)
            expected = sum(weights[at, k] * linears[ids[at, k]](x[at]) for k in range(3))
            torch.testing.assert_close(experts(x[one], ids[one], weights[one])[0], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(together[at], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
def test_routes_are_the_likeliest(normalized):
    logits = torch.randn(9, 7).bfloat16()
    ids, weights = route(logits, 3, normalized=normalized)
    p = logits.float().softmax(1)
    assert torch.equal(ids, p.topk(3).indices)
    expected = p.gather(1, ids)
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True) if normalized else expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_local_experts": 0}, "num_local_experts must be a whole number from 1"),
        ({"num_local_experts": "4"}, "num_local_experts must be a whole number"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be a whole number from 1 to 4, got 5"),
    ],
)
def test_config_that_cannot_be(tmp_path, change, problem):
    _, path = make("mixtral", tmp_path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ModelError, match=problem):
        make_runner(path, parts=parts())


def test_adapters_find_attention_but_no_experts(tmp_path):
    _, path = make("mixtral", tmp_path)
    served = model_parts(max_loras=1, max_lora_rank=4)
    runner = make_runner(path, parts=replace(parts(), adapters=served.adapters, adapter_formats=served.adapter_formats))
    offered = runner.adapters.modules
    assert "model.layers.0.self_attn.q_proj" in offered
    assert "model.layers.0.block_sparse_moe.gate" in offered
    assert not [name for name in offered if "experts" in name]
