"""Decoders that no plugin knows, through Transformers' own code over paged KV: Hugging Face's logits and tokens."""

import pytest
import torch
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_generate, reference_logits, save_model

NOBODY = {"pad_token_id": None}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "gemma3-windows": (
        "Gemma3",
        {
            "config_family": "Gemma3Text",
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **NOBODY,
        },
    ),
    "gemma2-soft-cap": (
        "Gemma2",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
            "attn_implementation": "eager",
            **NOBODY,
        },
    ),
    "gpt-oss-sinks": (
        "GptOss",
        {
            "num_local_experts": 4,
            "intermediate_size": 80,
            "sliding_window": 8,
            "num_experts_per_tok": 2,
            "attn_implementation": "eager",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            **NOBODY,
        },
    ),
    "phi3": ("Phi3", {"hidden_size": 120, **NOBODY}),
    "phi3-window": ("Phi3", {"hidden_size": 120, "sliding_window": 9, **NOBODY}),
    "olmo2": ("Olmo2", {"hidden_size": 120, **NOBODY}),
    "starcoder2-window": ("Starcoder2", {"hidden_size": 120, "sliding_window": 7, **NOBODY}),
    "gpt-neox": ("GPTNeoX", {"hidden_size": 120, "num_key_value_heads": 6, "rotary_pct": 0.5, **NOBODY}),
    "granite": (
        "Granite",
        {
            "hidden_size": 120,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            **NOBODY,
        },
    ),
    "cohere": ("Cohere", {"hidden_size": 120, "logit_scale": 0.5, "use_qk_norm": True, **NOBODY}),
    "cohere2": (
        "Cohere2",
        {
            "hidden_size": 120,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            **NOBODY,
        },
    ),
    "glm4": ("Glm4", NOBODY),
    "smollm3": ("SmolLM3", {"hidden_size": 120, **NOBODY}),
    "exaone4": (
        "Exaone4",
        {
            "hidden_size": 120,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            **NOBODY,
        },
    ),
    "nemotron": ("Nemotron", {"norm_eps": 1e-5, **NOBODY}),
    "phi-with-a-biased-head": ("Phi", {"hidden_size": 120, **NOBODY}),
    "opt": (
        "OPT",
        {
            "hidden_size": 120,
            "word_embed_proj_dim": 120,
            "ffn_dim": 77,
            "dropout": 0.0,
            "pad_token_id": 1,
            "num_key_value_heads": 6,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "intermediate_size": 80, **MOE}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, **MOE}),
    "olmoe": ("Olmoe", {"hidden_size": 120, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 80, **NOBODY}),
}
LENGTHS = (29, 1, 5, 13, 40, 3)


def check(model, sequence, driver):
    """Logits of every sampled position, and the tokens."""
    expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
    seen = torch.stack(driver.logits[sequence.row][-len(expected) :])
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-4)
    assert sequence.tokens == reference_generate(model, sequence.tokens[: sequence.num_prompt], len(expected))


@pytest.mark.parametrize("case", CASES)
def test_parity(tmp_path, case):
    family, changes = CASES[case]
    model = make_model(family, **changes)
    runner = make_runner(save_model(model, tmp_path))
    driver = StepDriver(runner)
    alone, *batch = [driver.sequence(prompt) for prompt in (prompts(LENGTHS[0]) + prompts(*LENGTHS))]
    driver.generate([alone], 5)
    check(model, alone, driver)
    driver.generate(batch, 5, chunks=(3, 7, 5, 1))
    for sequence in batch:
        check(model, sequence, driver)
    assert batch[0].tokens == alone.tokens
