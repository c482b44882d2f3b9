"""Fields of the requests that are known and not served; every mistake in the others names its field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from llmd.api.v1 import parse_request

Model = TypeVar("Model", bound=BaseModel)

# Fields of OpenAI's or vLLM's requests that are known and not served, some by one of the routes only, and the values of
# theirs that do no harm.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "suffix": ("",),
    "reasoning": (),
    "reasoning_effort": ("none",),
    "include_reasoning": (True,),
    "thinking_token_budget": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": ("none",),
    "logits_processors": (),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "logprob_token_ids": (),
}


def parse(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The validated request. Raises InvalidRequest with the path of the first field that is wrong."""
    return parse_request(model, body, UNSERVED)
