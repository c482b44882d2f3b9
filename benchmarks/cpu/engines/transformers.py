"""transformers' `generate` on a left-padded batch."""

from __future__ import annotations

from typing import Any

from . import Generated


class Engine:
    """bf16."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None

    def facts(self) -> dict[str, Any]:
        """Versions."""
        import torch
        import transformers

        return {"version": transformers.__version__, "torch": torch.__version__}

    def prepare(self, num_seqs: int, max_len: int) -> None:
        """Nothing depends on the work."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """One batch."""
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        return Generated.of(out[:, width:].tolist())

    def close(self) -> None:
        """Nothing is open."""
