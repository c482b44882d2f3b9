"""LLM: the engine in a script or a notebook, without HTTP; names and meanings are vLLM's.

The engine runs on an event loop of its own in a background thread, so that it works whether or not the caller has one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmd.config import Config
from llmd.config_load import load_config
from llmd.daemon import build_service, load_catalog, resolve_model
from llmd.engine.params import BeamSearchParams, PoolingParams, SamplingParams
from llmd.engine.request import Prompt as TokenPrompt
from llmd.engine.step import FinishReason
from llmd.errors import InvalidRequest, Overloaded
from llmd.flags import settings_of
from llmd.flags_table import FLAGS
from llmd.offline.beams import BeamSearchOutput, BeamSearchSequence, search_all
from llmd.offline.loop import LoopThread, Progress
from llmd.offline.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    classification_output,
    embedding_output,
    pooling_output,
    request_output,
    scoring_output,
)

if TYPE_CHECKING:
    from llmd.server.generate import ModelService
    from llmd.text.stream import RequestStream, TextDelta

__all__ = [
    "LLM", "BeamSearchOutput", "BeamSearchSequence", "ClassificationOutput", "ClassificationRequestOutput",
    "CompletionOutput", "EmbeddingOutput", "EmbeddingRequestOutput", "Logprob", "PoolingOutput", "PoolingRequestOutput",
    "RequestMetrics", "RequestOutput", "ScoringOutput", "ScoringRequestOutput",
]  # fmt: skip

logger = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]
_ALIASES = {"kv_cache_bytes": "kv_cache_memory_bytes", "disable_log_stats": None}
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_RETRY_S = 0.02  # how soon a request is offered again that found the queue full


class LLM:
    """A model loaded in this process. Keywords are those of `llmd serve`, with underscores: dtype, max_model_len, …

    Raises TypeError for an unknown keyword, ConfigError and ModelError for what cannot be used. Use it as a context
    manager or call `shutdown` to free the device.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        config = _make_config({"model": model, **options})
        catalog = load_catalog(config)
        self.config = config.models[0]
        self._path = resolve_model(config, catalog, self.config)
        self._service = build_service(config, catalog, self.config, path=self._path)
        self._max_in_flight = 2 * config.scheduler.max_num_seqs + 16
        self._ids = count()
        self._hf_tokenizer: Any = None
        self._loop = LoopThread()
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._service)
        try:
            self._loop.call(_start(self._service))
        except BaseException:
            self.shutdown()
            raise

    # --- what it does

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Sequence[Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: text, token ids, or {"prompt": …} or {"prompt_token_ids": …}; results in their order.

        Without sampling_params the model's defaults are taken. A prompt that cannot be served raises InvalidRequest before
        any of them runs.
        """
        given = prompts if prompts is not None else prompt_token_ids
        if given is None or (prompts is not None and prompt_token_ids is not None):
            raise TypeError("generate() takes either prompts or prompt_token_ids")
        jobs = self._jobs(_as_list(given), sampling_params, add_special_tokens=True)
        return self._generate(jobs, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations, with the model's chat template."""
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        rendered = [
            self._service.render_chat(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                **(chat_template_kwargs or {}),
            )
            for conversation in ([messages] if is_one else messages)
        ]
        return self._generate(self._jobs(rendered, sampling_params, add_special_tokens=False), use_tqdm, None)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, as Hugging Face's generate(num_beams=…) finds them."""
        step = SamplingParams(temperature=0.0, max_tokens=1)
        jobs = self._jobs(_as_list(prompts), step, add_special_tokens=True)
        if not self._finalizer.alive:
            raise RuntimeError("this LLM has been shut down")
        token_ids = [job.token_ids for job in jobs]
        max_at_once = self._max_in_flight // params.beam_width
        return self._loop.call(search_all(self._service, token_ids, params, lambda: str(next(self._ids)), max_at_once))

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
    ) -> list[PoolingRequestOutput]:
        """What the model makes of each prompt, as an array: a vector, or a classifier's scores.

        `truncate_prompt_tokens` cuts longer prompts (-1: to the context); `prompt_name` is one of the model's own prompts.
        """
        params = pooling_params or PoolingParams(task="classify" if self._service.pooling.labels else "embed")
        given = _as_list(prompts)
        make = partial(self._pooled_job, max_length=truncate_prompt_tokens, prompt_name=prompt_name)
        return self._pool(self._checked(make, given, self._each(params, len(given))), use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, as a list of floats."""
        options: dict[str, Any] = {"truncate_prompt_tokens": truncate_prompt_tokens, "prompt_name": prompt_name}
        pooled = self.encode(prompts, pooling_params or PoolingParams(), use_tqdm, **options)
        return [embedding_output(output) for output in pooled]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Probabilities of a classifier's labels for each prompt."""
        params = pooling_params or PoolingParams(task="classify")
        pooled = self.encode(prompts, params, use_tqdm, truncate_prompt_tokens=truncate_prompt_tokens)
        return [classification_output(output) for output in pooled]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well two texts go together: by a cross-encoder, or as the cosine of the model's vectors.

        One text on the left goes with every text on the right; otherwise there are as many of each.
        """
        left, right = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        if len(left) not in (1, len(right)):
            raise ValueError(f"{len(left)} texts cannot be scored with {len(right)}: give one, or as many")
        own = self._service.pooling
        params = own.score_params()
        if not own.is_cross_encoder:
            pooled = self.encode([*left, *right], params, use_tqdm, truncate_prompt_tokens=truncate_prompt_tokens)
            firsts, seconds = pooled[: len(left)], pooled[len(left) :]
            pairs = zip(firsts * (len(right) if len(left) == 1 else 1), seconds, strict=True)
            return [scoring_output(float(one.outputs.data @ two.outputs.data), one, two) for one, two in pairs]
        texts = list(zip(left * (len(right) if len(left) == 1 else 1), right, strict=True))
        make = partial(self._pair_job, max_length=truncate_prompt_tokens)
        pooled = self._pool(self._checked(make, texts, [params] * len(texts)), use_tqdm)
        return [scoring_output(float(output.outputs.data[0]), output) for output in pooled]

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as transformers loads it."""
        if self._hf_tokenizer is None:
            from transformers import AutoTokenizer

            folder = self.config.tokenizer or str(self._path)
            self._hf_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.config.trust_remote_code)
        return self._hf_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate() takes when it is given none: the model's own defaults."""
        return self._service.sampling_params({})

    def shutdown(self) -> None:
        """Free the device and end the thread. May be called again."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # --- how

    def _jobs(self, prompts: Sequence[Prompt], params: Any, *, add_special_tokens: bool) -> list[_Job]:
        """Every prompt tokenized and checked; raises for the first that cannot be served."""
        make = partial(self._job, add_special_tokens=add_special_tokens)
        return self._checked(make, prompts, self._each(params, len(prompts)))

    def _checked(self, make: Callable[[Any, Any], _Job], prompts: Sequence[Any], params: Sequence[Any]) -> list[_Job]:
        """What `make` makes of each prompt and its params; an error names the prompt."""
        jobs = []
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            try:
                jobs.append(make(prompt, own))
            except InvalidRequest as error:
                where = f"prompt {index}: " if len(prompts) > 1 else ""
                raise InvalidRequest(where + error.message, param=error.param, code=error.code) from error
        return jobs

    def _each(self, params: Any, num_prompts: int) -> Sequence[Any]:
        if params is None:
            params = self.get_default_sampling_params()
        if not isinstance(params, Sequence):
            return [params] * num_prompts
        if len(params) != num_prompts:
            raise ValueError(
                f"{len(params)} sampling or pooling params for {num_prompts} prompts: give one, or one for each"
            )
        return params

    def _job(self, prompt: Prompt, params: Any, add_special_tokens: bool) -> _Job:
        text, token_ids, cache_salt = _parts(prompt)
        if token_ids is None:
            token_ids = self._service.tokenizer.encode(text or "", add_special_tokens=add_special_tokens)
        checked = self._service.check(_plain_ids(token_ids), params, clip_max_tokens=True)
        return _Job(text, checked, params, cache_salt)

    def _pooled_job(self, prompt: Prompt, params: PoolingParams, *, max_length: int | None, prompt_name: str | None) -> _Job:
        text, token_ids, cache_salt = _parts(prompt)
        given = _plain_ids(token_ids) if token_ids is not None else text or ""
        made = self._service.pooling.make_prompt(given, max_length=max_length, prompt_name=prompt_name)
        return self._made_job(text, made, params, cache_salt)

    def _pair_job(self, pair: tuple[str, str], params: PoolingParams, *, max_length: int | None) -> _Job:
        return self._made_job(None, self._service.pooling.make_pair(*pair, max_length=max_length), params, None)

    def _made_job(self, text: str | None, made: TokenPrompt, params: PoolingParams, cache_salt: str | None) -> _Job:
        params = self._service.pooling.params(params)
        return _Job(text, self._service.check(made.token_ids, params), params, cache_salt, made.token_types)

    def _pool(self, jobs: list[_Job], use_tqdm: Any) -> list[PoolingRequestOutput]:
        return self._run(jobs, use_tqdm, None, lambda job, stream, deltas: pooling_output(stream, deltas))

    def _generate(self, jobs: list[_Job], use_tqdm: Any, priority: Sequence[int] | None) -> list[RequestOutput]:
        service = self._service
        return self._run(
            jobs, use_tqdm, priority, lambda job, stream, deltas: request_output(service, stream, deltas, job.text)
        )

    def _run(self, jobs: list[_Job], use_tqdm: Any, priority: Sequence[int] | None, finish: Callable[..., T]) -> list[T]:
        """Run all jobs on the loop thread; what `finish` makes of each stream, in the jobs' order."""
        if not self._finalizer.alive:
            raise RuntimeError("this LLM has been shut down")
        if priority is not None and len(priority) != len(jobs):
            raise ValueError(f"{len(priority)} priorities for {len(jobs)} prompts")
        with Progress(use_tqdm, len(jobs)) as progress:
            return self._loop.call(self._run_all(jobs, priority or [0] * len(jobs), progress, finish))

    async def _run_all(
        self, jobs: list[_Job], priority: Sequence[int], progress: Progress, finish: Callable[..., T]
    ) -> list[T]:
        slots = asyncio.Semaphore(self._max_in_flight)

        async def run(job: _Job, level: int) -> T:
            async with slots, await self._open(job, level) as stream:
                deltas = await stream.collect()
            _check_ended(stream, deltas)
            progress.add(stream)
            return finish(job, stream, deltas)

        tasks = [asyncio.ensure_future(run(job, level)) for job, level in zip(jobs, priority, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open(self, job: _Job, priority: int) -> RequestStream:
        """Queue the job, as soon as the queue has room."""
        request_id = str(next(self._ids))
        options: dict[str, Any] = {"request_id": request_id, "priority": priority, "cache_salt": job.cache_salt}
        while True:
            try:
                if isinstance(job.params, SamplingParams):
                    return await self._service.generate(job.token_ids, job.params, clip_max_tokens=True, **options)
                prompt = TokenPrompt(job.token_ids, token_types=job.token_types)
                return await self._service.embed(prompt, job.params, **options)
            except Overloaded:
                await asyncio.sleep(_RETRY_S)


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt, checked."""

    text: str | None
    token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams
    cache_salt: str | None
    token_types: tuple[int, ...] = ()


def _make_config(options: dict[str, Any]) -> Config:
    """Keywords as the configuration. Raises TypeError for unknown ones, ConfigError for wrong values."""
    given: dict[str, Any] = {}
    known = [*(name.replace("-", "_") for name in FLAGS), *_ALIASES]
    for name, value in options.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise TypeError(f"LLM() got an unexpected keyword {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        target = _ALIASES.get(name, name)
        if target is not None:
            given[target] = str(value) if isinstance(value, Path) else value
    return load_config(settings=settings_of(given))


async def _start(service: ModelService) -> None:
    from llmd.loading import Bar

    bar = Bar(service.names[0])
    try:
        await service.start(bar.show)
    finally:
        bar.close()


def _shut_down(loop: LoopThread, service: ModelService) -> None:
    if loop.is_current:  # collected as garbage on the loop's own thread, which cannot wait for itself
        threading.Thread(target=_shut_down, args=(loop, service), name="llmd-shutdown").start()
        return
    try:
        loop.call(service.stop())
    finally:
        loop.stop()


def _as_list(prompts: Any) -> Sequence[Prompt]:
    """Several prompts as they are, one as a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        prompts = list(prompts)
    return [prompts] if len(prompts) and all(hasattr(item, "__index__") for item in prompts) else prompts


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


def _check_ended(stream: RequestStream, deltas: Sequence[TextDelta]) -> None:
    if stream.error is not None:
        raise stream.error
    for delta in deltas:
        if delta.finish_reason is FinishReason.ERROR:
            logger.warning("request %s, sequence %d ended with an error: %s", delta.request_id, delta.index, delta.error)
