"""What the road of GPUs must give the same tokens for as the CPU's: run by both."""

from __future__ import annotations

from typing import Any

from model.made_adapters import make_adapter
from model.step_driver import GREEDY, StepDriver
from model.tiny_models import make_model, prompts, save_model

from llmd.engine.params import SamplingParams

DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, max_tokens=64)
CHANGED = SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, logit_bias={5: 2.0}, max_tokens=64)
TOLD = SamplingParams(temperature=1.0, logprobs=2, prompt_logprobs=1, max_tokens=64)
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
EXPERTS = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256}

# name: model, its changes, what the rows want, settings of the runner
CASES: dict[str, tuple[str, dict[str, Any], tuple[SamplingParams, ...], dict[str, Any]]] = {
    "every wish": ("Qwen3", {"num_hidden_layers": 2}, (DRAWN, CHANGED, TOLD), {}),
    "int8": ("Llama", {}, (GREEDY, DRAWN, GREEDY), {"quantization": "int8", "cache": {"kv_cache_dtype": "int8"}}),
    "nf4": ("Llama", {"hidden_size": 64, "intermediate_size": 128}, (GREEDY,) * 3, {"quantization": "nf4"}),
    "experts": ("Mixtral", EXPERTS, (GREEDY, DRAWN, GREEDY), {}),
    "adapters": ("Qwen2", {}, (GREEDY, GREEDY, DRAWN), {"adapters": {"max_loras": 2, "max_lora_rank": 8}}),
}


def save(name: str, folder: Any) -> None:
    """The case's model, and adapters for it."""
    family, changes, _, settings = CASES[name]
    model = make_model(family, **{**SMALL, **changes})
    save_model(model, folder / "base")
    for seed in range(2 if "adapters" in settings else 0):
        make_adapter(model, folder / f"adapter-{seed}", seed=seed, rank=8)


def generate(driver: StepDriver, name: str, folder: Any) -> list[Any]:
    """Rows that come one after another, the second one's prompt in two chunks, and leave in another order: all tokens, and
    what was told of the last step."""
    _, _, wishes, settings = CASES[name]
    slots = (0, None, 1) if "adapters" in settings else (None,) * 3
    for slot in range(2 if "adapters" in settings else 0):
        driver.load_adapter(folder / f"adapter-{slot}", slot)
    first, second, third = (
        driver.sequence(prompts(length, seed=length)[0], params, seed=length, slot=slot)
        for length, params, slot in zip((5, 9, 3), wishes, slots, strict=True)
    )
    driver.step([(first, 5)])
    driver.step([(first, 1), (second, 4)])
    driver.step([(first, 1), (second, 5)])
    driver.step([(third, 3), (first, 1), (second, 1)])
    told = []
    for rows in ((first, second, third), (third, first, second), (second, third), (third,)):
        result = driver.step([(row, 1) for row in rows])
        told = [entry.token_id for entries in result.logprobs.values() for entry in entries]
    return [first.tokens, second.tokens, third.tokens, told]
