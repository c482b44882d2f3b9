"""Every architecture and rope scaling against Hugging Face: alone, in batches, chunked, scattered, recomputed."""

import pytest
import torch
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, reference_generate, reference_logits, save_model

from llmd.config import ModelConfig
from llmd.model.blueprint import read_model_config
from llmd_kernels import native

ROPE = {"rope_theta": 1000.0}
CASES = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-3-1": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "llama-linear": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama-yarn": (
        "Llama",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama-yarn-mscale": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
            }
        },
    ),
    "llama-llama3": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"hidden_size": 120}),
    "qwen2-tied-3-1": (
        "Qwen2",
        {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen2-window": (
        "Qwen2",
        {"hidden_size": 120, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3-tied-7-7-bias": (
        "Qwen3",
        {"num_attention_heads": 7, "num_key_value_heads": 7, "tie_word_embeddings": True, "attention_bias": True},
    ),
}
LENGTHS = (29, 1, 5, 13, 70, 3, 17, 8)


def check(model, sequence, driver):
    """Logits of every sampled position, and the tokens while the best two are not within rounding of each other."""
    expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
    seen = torch.stack(driver.logits[sequence.row][-len(expected) :])
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
    top = expected.topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-4, "a tie: choose another seed"
    assert sequence.tokens == reference_generate(model, sequence.tokens[: sequence.num_prompt], len(expected))


@pytest.mark.parametrize("case", CASES)
def test_parity(tmp_path, case):
    family, changes = CASES[case]
    model = make_model(family, **changes)
    runner = make_runner(save_model(model, tmp_path))
    driver = StepDriver(runner)
    alone, *batch = [driver.sequence(prompt) for prompt in (prompts(LENGTHS[0]) + prompts(*LENGTHS))]
    driver.generate([alone], 8)
    check(model, alone, driver)
    driver.generate(batch, 8, chunks=(3, 7, 5, 1))
    for sequence in batch:
        check(model, sequence, driver)
    assert batch[0].tokens == alone.tokens


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("case", ["mistral-window", "qwen3"])
def test_backends_and_recomputation(tmp_path, monkeypatch, case, backend):
    family, changes = CASES[case]
    model = make_model(family, **changes)
    if backend == "sdpa":
        monkeypatch.setattr(native, "library", lambda: None)
    runner = make_runner(save_model(model, tmp_path), attention_backend="reference" if backend == "reference" else "cpu")
    driver = StepDriver(runner, seed=3)
    sequences = [driver.sequence(prompt) for prompt in prompts(*LENGTHS)]
    driver.generate(sequences, 3, chunks=(11, 2))
    for sequence in sequences[::2]:
        driver.release(sequence)  # preempted: recomputed with its output tokens, in other rows and blocks
    driver.generate(sequences, 6, chunks=(4, 9))
    for sequence in sequences:
        driver.logits[sequence.row] = driver.logits[sequence.row][-3:]
        expected = reference_logits(model, sequence.tokens)[-4:-1]
        torch.testing.assert_close(torch.stack(driver.logits[sequence.row]), expected, rtol=0, atol=1e-4)
        assert sequence.tokens == reference_generate(model, sequence.tokens[: sequence.num_prompt], 6)


def test_prefix_blocks_are_shared(tmp_path):
    model = make_model("Llama")
    driver = StepDriver(make_runner(save_model(model, tmp_path)))
    prompt = prompts(21)[0]
    first = driver.sequence(prompt)
    driver.generate([first], 4)
    second = driver.sequence(prompt[:16] + prompts(9, seed=7)[0])
    plan_blocks, second.blocks = first.blocks[:4], []
    second.blocks = list(plan_blocks)
    second.computed = 16
    from llmd.engine.step import BlockUpdate

    plan = driver.plan([(second, 9)])
    updates = [BlockUpdate(second.row, 0, 0, plan_blocks), *plan.block_updates]
    import dataclasses

    result = driver.runner.run(dataclasses.replace(plan, block_updates=updates))
    second.tokens += result.token_ids
    check(model, second, driver)


def test_dynamic_rope_stretches_to_the_context_that_was_asked_for(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    model = make_model("Llama", max_position_embeddings=32, rope_parameters=rope)
    runner = make_runner(save_model(model, tmp_path), max_model_len=80)
    driver = StepDriver(runner)
    sequence = driver.sequence(prompts(80)[0])
    driver.step([(sequence, 80)])
    expected = reference_logits(model, sequence.tokens[:80])[-1]
    torch.testing.assert_close(driver.logits[sequence.row][0], expected, rtol=0, atol=1e-4)


def test_bfloat16_is_close(tmp_path):
    model = make_model("Qwen3", initializer_range=0.05).bfloat16()
    driver = StepDriver(make_runner(save_model(model, tmp_path), dtype="auto"))
    sequences = [driver.sequence(prompt) for prompt in prompts(*LENGTHS)]
    driver.generate(sequences, 2, chunks=(6,))
    exact = model.float()
    for sequence in sequences:
        expected = reference_logits(exact, sequence.tokens)[sequence.num_prompt - 1 : -1]
        seen = torch.stack(driver.logits[sequence.row])
        assert seen.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(seen, expected).min() > 0.999


def test_llama_has_no_window(tmp_path):
    path = save_model(make_model("Llama", sliding_window=9), tmp_path)
    assert read_model_config(ModelConfig(model=str(path)), path, model_parts()).sliding_window is None
