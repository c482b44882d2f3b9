"""suffix: the prompt of a model that was trained to fill in the middle, by the names of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmd.api.v1 import InvalidRequest

if TYPE_CHECKING:
    from llmd.api.v1 import ModelService


class _Middle(NamedTuple):
    """What stands before the prefix, between it and the suffix, and behind that."""

    prefix: str
    suffix: str
    middle: str


_FORMATS = (
    _Middle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    _Middle("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    _Middle("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Middle("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    _Middle("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)


async def fill_in(service: ModelService, prompt: str | Sequence[int], suffix: str, add_special_tokens: bool) -> list[int]:
    """Prompt and suffix in token ids, with the model's own marks. Raises InvalidRequest for a model that has none."""
    tokenizer = service.tokenizer
    for names in _FORMATS:
        marks = [tokenizer.token_to_id(name) for name in names]
        if None not in marks:
            break
    else:
        message = "suffix is not served for this model: its tokenizer has no tokens for filling in the middle"
        raise InvalidRequest(message, param="suffix", code="unsupported_parameter")
    start, between, end = (mark for mark in marks if mark is not None)
    before = list(prompt) if not isinstance(prompt, str) else await tokenizer.encode_async(prompt, add_special_tokens=False)
    after = await tokenizer.encode_async(suffix, add_special_tokens=False)
    bos = tokenizer.encode("", add_special_tokens=True) if add_special_tokens else []
    return [*bos, start, *before, between, *after, end]
