"""From what a caller gives to what the engine is asked: every prompt tokenized and checked before any of them runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.request import Prompt as TokenPrompt
from llmd.errors import InvalidRequest
from llmd.offline.adapters import Lora, LoRARequest, one_each

if TYPE_CHECKING:
    from llmd.server.generate import ModelService

Prompt = str | Sequence[int] | Mapping[str, Any]
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt."""

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Any] | None
    documents: Sequence[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, checked."""

    text: str | None
    prompt: TokenPrompt
    params: SamplingParams | PoolingParams
    cache_salt: str | None
    lora: LoRARequest | None = None


def with_loras(jobs: list[Job], given: Lora | Sequence[Lora]) -> list[Job]:
    """The jobs with their adapters: one for all, or one for each."""
    return [replace(job, lora=lora) for job, lora in zip(jobs, one_each(given, len(jobs)), strict=True)]


def as_list(prompts: Any) -> Sequence[Prompt]:
    """Several prompts as they are, one as a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        prompts = list(prompts)
    return [prompts] if len(prompts) and all(hasattr(item, "__index__") for item in prompts) else prompts


def num_characters(prompts: Sequence[Any]) -> int:
    """How much text there is to tokenize."""
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) + sum(
        len(text) for prompt in prompts if isinstance(prompt, Mapping) and isinstance(text := prompt.get("prompt"), str)
    )


class JobMaker:
    """Makes jobs for one model. Every method raises InvalidRequest for the first prompt that cannot be served."""

    def __init__(self, service: ModelService) -> None:
        self._service = service

    def generation(self, prompts: Sequence[Prompt], params: Any, *, add_special_tokens: bool = True) -> list[Job]:
        """Prompts to be continued; None for the model's own params."""
        make = partial(self._generation, add_special_tokens=add_special_tokens)
        return _checked(make, prompts, self._each(params, len(prompts)))

    def chat(self, conversations: Sequence[Any], params: Any, options: ChatOptions) -> list[Job]:
        """Conversations to be answered."""
        texts = [self.render(conversation, **options) for conversation in conversations]
        return self.generation(texts, params, add_special_tokens=False)

    def render(
        self,
        conversation: Sequence[Any],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, by the model's chat template or the one given."""
        return self._service.render_chat(
            conversation,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            **(chat_template_kwargs or {}),
        )

    def pooling(
        self, prompts: Sequence[Prompt], params: Any, *, max_length: int | None = None, prompt_name: str | None = None
    ) -> list[Job]:
        """Prompts to be read; None for what the model was made for: its classes, or its vectors."""
        params = params or PoolingParams(task="classify" if self._service.pooling.labels else "embed")
        make = partial(self._pooled, max_length=max_length, prompt_name=prompt_name)
        return _checked(make, prompts, self._each(params, len(prompts)))

    def pairs(self, texts: Sequence[tuple[str, str]], params: PoolingParams, *, max_length: int | None) -> list[Job]:
        """Pairs that a cross-encoder reads at once."""
        return _checked(partial(self._pair, max_length=max_length), texts, [params] * len(texts))

    def _each(self, params: Any, num_prompts: int) -> Sequence[Any]:
        if params is None:
            params = self._service.sampling_params({})
        if not isinstance(params, Sequence):
            return [params] * num_prompts
        if len(params) != num_prompts:
            raise ValueError(
                f"{len(params)} sampling or pooling params for {num_prompts} prompts: give one, or one for each"
            )
        return params

    def _generation(self, prompt: Prompt, params: Any, add_special_tokens: bool) -> Job:
        text, token_ids, cache_salt = _parts(prompt)
        if token_ids is None:
            token_ids = self._service.tokenizer.encode(text or "", add_special_tokens=add_special_tokens)
        checked = self._service.check(_plain_ids(token_ids), params, clip_max_tokens=True)
        return Job(text, TokenPrompt(checked), params, cache_salt)

    def _pooled(self, prompt: Prompt, params: PoolingParams, *, max_length: int | None, prompt_name: str | None) -> Job:
        text, token_ids, cache_salt = _parts(prompt)
        given = _plain_ids(token_ids) if token_ids is not None else text or ""
        made = self._service.pooling.make_prompt(given, max_length=max_length, prompt_name=prompt_name)
        return self._made(text, made, params, cache_salt)

    def _pair(self, pair: tuple[str, str], params: PoolingParams, *, max_length: int | None) -> Job:
        return self._made(None, self._service.pooling.make_pair(*pair, max_length=max_length), params, None)

    def _made(self, text: str | None, made: TokenPrompt, params: PoolingParams, cache_salt: str | None) -> Job:
        params = self._service.pooling.params(params)
        checked = self._service.check(made.token_ids, params)
        return Job(text, TokenPrompt(checked, token_types=made.token_types), params, cache_salt)


def _checked(make: Callable[[Any, Any], Job], prompts: Sequence[Any], params: Sequence[Any]) -> list[Job]:
    """What `make` makes of each prompt and its params; an error names the prompt."""
    jobs = []
    for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        try:
            jobs.append(make(prompt, own))
        except InvalidRequest as error:
            where = f"prompt {index}: " if len(prompts) > 1 else ""
            raise InvalidRequest(where + error.message, param=error.param, code=error.code) from error
    return jobs


def _parts(prompt: Prompt) -> tuple[str | None, Sequence[int] | None, str | None]:
    """Text, token ids and cache salt of a prompt; one of the first two is there."""
    if isinstance(prompt, str):
        return prompt, None, None
    if not isinstance(prompt, Mapping):
        return None, prompt, None
    if unknown := set(prompt) - _PROMPT_KEYS:
        raise InvalidRequest(f"a prompt takes {', '.join(sorted(_PROMPT_KEYS))}, not {min(unknown)!r}", param=min(unknown))
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if not isinstance(text, str) and token_ids is None:
        raise InvalidRequest("a prompt needs 'prompt' (text) or 'prompt_token_ids'", param="prompt")
    return text, token_ids, prompt.get("cache_salt")


def _plain_ids(token_ids: Sequence[int]) -> list[int]:
    """Python integers, whatever kind of integers they were."""
    try:
        return [token_id.__index__() for token_id in token_ids]
    except (AttributeError, TypeError):
        raise InvalidRequest("a prompt must be a text or a list of integer token ids", param="prompt") from None
