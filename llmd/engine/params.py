"""What a request asks of the sampler, validated once more on construction whatever the wire already checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmd.errors import InvalidParams

MAX_N = 128
MAX_LOGPROBS = 100
MAX_BEAM_WIDTH = MAX_LOGPROBS // 2  # a step looks at twice as many candidates a beam
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_CHOICES = 4096
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
MAX_SEED = (1 << 63) - 1
POOLINGS = ("last", "cls", "mean", "max", "mean_sqrt_len", "all")
POOLING_TASKS = ("embed", "classify")
MIN_TEMPERATURE = 1e-2


def _number(name: str, value: Any, low: float, high: float, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParams(name, value, allowed)
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidParams(name, value, allowed)
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParams(name, value, f"an integer between {low} and {high}")
    return value


def _token_ids(name: str, value: Any, limit: int) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidParams(name, value, "a list of token ids")
    ids = tuple(value)
    if len(ids) > limit:
        raise InvalidParams(name, f"{len(ids)} ids", f"at most {limit} token ids")
    for token_id in ids:
        _integer(name, token_id, 0, MAX_TOKEN_ID)
    return ids


def _strings(name: str, value: Any, limit: int) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else value or ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise InvalidParams(name, value, "a string or a list of strings")
    if len(value) > limit:
        raise InvalidParams(name, f"{len(value)} strings", f"at most {limit} strings")
    for item in value:
        if not item or len(item) > MAX_STOP_STRING_LENGTH:
            raise InvalidParams(name, item, f"strings of 1 to {MAX_STOP_STRING_LENGTH} characters")
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        raise InvalidParams("logit_bias", value, f"a map of at most {MAX_LOGIT_BIAS} token ids to biases")
    bias = {}
    for key, entry in value.items():
        if isinstance(key, str) and key.isdecimal() and len(key) <= 10:
            key = int(key)
        token_id = _integer("logit_bias", key, 0, MAX_TOKEN_ID)
        bias[token_id] = _number("logit_bias", entry, -100.0, 100.0, "between -100 and 100")
    return bias


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the output must follow: exactly one of these, with vLLM's names. Compiled by the text layer's grammars."""

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None  # EBNF or Lark
    json_object: bool | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            known = ", ".join(field.name for field in fields(self))
            raise InvalidParams("structured_outputs", given, f"exactly one of {known}")
        for name in ("regex", "grammar", "structural_tag"):
            if name in given and not isinstance(getattr(self, name), str):
                raise InvalidParams(f"structured_outputs.{name}", getattr(self, name), "a string")
        if self.choice is not None:
            choices = _strings("structured_outputs.choice", self.choice, MAX_CHOICES)
            if not choices:
                raise InvalidParams("structured_outputs.choice", self.choice, "a list of at least one string")
            object.__setattr__(self, "choice", choices)
        if self.json is not None and not isinstance(self.json, str | bool | Mapping):
            raise InvalidParams("structured_outputs.json", self.json, "a JSON schema")
        if self.json_object not in (None, True):
            raise InvalidParams("structured_outputs.json_object", self.json_object, "true")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request; names and meanings are vLLM's, lists may be given where tuples are stored.

    Raises InvalidParams with the field's name for every value out of bounds.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all tokens
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the context's end
    min_tokens: int = 0
    logprobs: int | None = None  # how many top tokens besides the sampled one
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """Every field in its stored form; raises for the first that is out of bounds."""
        checked: dict[str, Any] = {
            "n": _integer("n", self.n, 1, MAX_N),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2, 2, "between -2 and 2"),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2, 2, "between -2 and 2"),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "between 0.001 and 1000"
            ),
            "temperature": _number("temperature", self.temperature, 0, 100, "between 0 and 100"),
            "top_p": _number("top_p", self.top_p, 1e-8, 1, "above 0 and at most 1"),
            "top_k": _integer("top_k", self.top_k, -1, MAX_TOKEN_ID),
            "min_p": _number("min_p", self.min_p, 0, 1, "between 0 and 1"),
            "stop": _strings("stop", self.stop, MAX_STOP_STRINGS),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids or (), MAX_STOP_TOKEN_IDS),
            "bad_words": _strings("bad_words", self.bad_words, MAX_BAD_WORDS),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0, MAX_TOKEN_ID),
            "logit_bias": _logit_bias(self.logit_bias),
        }
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            checked["max_tokens"] = _integer("max_tokens", self.max_tokens, 1, MAX_TOKEN_ID)
            if self.min_tokens > self.max_tokens:
                raise InvalidParams("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                checked[name] = _integer(name, value, 0, MAX_LOGPROBS)
        if self.allowed_token_ids is not None:
            checked["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not checked["allowed_token_ids"]:
                raise InvalidParams("allowed_token_ids", [], "a list of at least one token id")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidParams("structured_outputs", self.structured_outputs, "StructuredOutputsParams")
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise InvalidParams(field.name, getattr(self, field.name), "true or false")
        return checked

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken: temperature 0, or so small that it means the same."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Ask for a vector instead of tokens: which hidden states are pooled, and how. None: as the model's files say."""

    pooling: str | None = None  # one of POOLINGS; "all" keeps every token's vector
    normalize: bool | None = None
    dimensions: int | None = None  # keep the first so many, then normalize (Matryoshka models)
    task: str = "embed"  # "classify": what the model's head makes of the pooled vector
    use_activation: bool | None = None  # classify: probabilities (the default), or the head's raw scores

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InvalidParams("pooling", self.pooling, f"one of {', '.join(POOLINGS)}")
        if self.task not in POOLING_TASKS:
            raise InvalidParams("task", self.task, f"one of {', '.join(POOLING_TASKS)}")
        if self.dimensions is not None:
            _integer("dimensions", self.dimensions, 1, 1 << 20)
            if self.task == "classify":
                raise InvalidParams("dimensions", self.dimensions, "left out: scores of a classifier are not cut")
        for name in ("normalize", "use_activation"):
            if not isinstance(getattr(self, name), bool | None):
                raise InvalidParams(name, getattr(self, name), "true, false or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search over `beam_width` continuations; the best `num_return` of them are the answer.

    A finished beam's score is its log-probability divided by its length to the power of `length_penalty`. `early_stopping`
    as in Hugging Face's generate: True ends with `beam_width` finished beams, False when the running ones can hardly
    improve on them, "never" when they cannot.
    """

    beam_width: int
    max_tokens: int
    num_return: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        _integer("max_tokens", self.max_tokens, 1, MAX_TOKEN_ID)
        _number("length_penalty", self.length_penalty, -10, 10, "between -10 and 10")
        if self.num_return is not None:
            _integer("num_return", self.num_return, 1, self.beam_width)
        if self.early_stopping not in (True, False, "never"):
            raise InvalidParams("early_stopping", self.early_stopping, "true, false or 'never'")
