"""AsyncLLM: the engine in someone's own asyncio program, on the loop of whoever starts it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

from llmd.engine.params import BeamSearchParams, PoolingParams, SamplingParams
from llmd.loading import in_thread
from llmd.offline.adapters import Lora
from llmd.offline.beams import BeamSearchOutput, search_all
from llmd.offline.jobs import ChatOptions, Job, JobMaker, Prompt, as_list, num_characters, with_loras
from llmd.offline.outputs import RequestOutputKind
from llmd.offline.pooled import Scoring
from llmd.offline.results import classification_output, embedding_output, pooling_output
from llmd.offline.running import Runner
from llmd.offline.settings import Loaded, hugging_face_tokenizer, load, make_config, start

if TYPE_CHECKING:
    from llmd.offline.outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringRequestOutput,
    )
    from llmd.server.generate import ModelService


class _Running(NamedTuple):
    """What there is once the model is loaded."""

    loaded: Loaded
    service: ModelService
    jobs: JobMaker
    runner: Runner


class AsyncLLM:
    """A model loaded in this process, for many tasks at once. Keywords are those of LLM and of `llmd serve`.

    Raises TypeError for an unknown keyword and ConfigError for wrong values at once; `start`, or `async with`, loads the
    model and raises ModelError for one that cannot be used. All methods belong to the loop that started it.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self._config = make_config("AsyncLLM", {"model": model, **options})
        self._state: _Running | None = None
        self._is_used = False

    # --- life

    async def start(self) -> None:
        """Load the model; the loop goes on meanwhile. Raises RuntimeError the second time."""
        if self._is_used:
            raise RuntimeError("an AsyncLLM starts once: make another")
        self._is_used = True
        loaded = await in_thread(partial(load, self._config))
        service = loaded.service
        try:
            await start(service)
        except BaseException:
            await service.stop()
            raise
        self._state = _Running(loaded, service, JobMaker(service), Runner(service, loaded.max_in_flight))

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Give running requests `drain_s` seconds, abort the rest and free the device. May be called again."""
        state, self._state = self._state, None
        if state is not None:
            await state.service.stop(drain_s)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- text

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: RequestOutputKind | str = RequestOutputKind.CUMULATIVE,
        priority: int = 0,
        lora_request: Lora = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue one prompt, and yield an output for each piece of it: all so far, "delta", or "final_only".

        Leaving the iterator, or cancelling its task, ends the request. The iterator raises InvalidRequest for what cannot be
        served; where the engine's queue is full, it waits.
        """
        make = partial(self._running.jobs.generation, [prompt], sampling_params)
        return self._stream(make, num_characters([prompt]), request_id, output_kind, priority, lora_request)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: RequestOutputKind | str = RequestOutputKind.CUMULATIVE,
        priority: int = 0,
        lora_request: Lora = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation with the model's chat template, piece by piece, as `generate` does."""
        jobs = self._running.jobs
        text = jobs.render(messages, **options)
        make = partial(jobs.generation, [text], sampling_params, add_special_tokens=False)
        return self._stream(make, len(text), request_id, output_kind, priority, lora_request)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by their ids: the iterator of each yields a last output with finish_reason "abort".

        Unknown and finished ones are ignored.
        """
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self._running.runner.abort(one)

    async def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, as Hugging Face's generate(num_beams=…) finds them."""
        state, given = self._running, as_list(prompts)
        step = SamplingParams(temperature=0.0, max_tokens=1)
        jobs = await self._made(partial(state.jobs.generation, given, step), num_characters(given))
        return await search_all(state.service, with_loras(jobs, lora_request), params, state.runner)

    # --- vectors, classes, scores

    async def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[PoolingRequestOutput]:
        """What the model makes of each prompt, as an array: a vector, or a classifier's scores."""
        given, options = as_list(prompts), {"max_length": truncate_prompt_tokens, "prompt_name": prompt_name}
        make = partial(self._running.jobs.pooling, given, pooling_params, **options)  # type: ignore[arg-type]
        return await self._pool(make, num_characters(given), lora_request)

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, as a list of floats."""
        options: dict[str, Any] = {"truncate_prompt_tokens": truncate_prompt_tokens, "prompt_name": prompt_name}
        options["lora_request"] = lora_request
        return [embedding_output(one) for one in await self.encode(prompts, pooling_params or PoolingParams(), **options)]

    async def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[ClassificationRequestOutput]:
        """Probabilities of a classifier's labels for each prompt."""
        params = pooling_params or PoolingParams(task="classify")
        options: dict[str, Any] = {"truncate_prompt_tokens": truncate_prompt_tokens, "lora_request": lora_request}
        pooled = await self.encode(prompts, params, **options)
        return [classification_output(one) for one in pooled]

    async def score(
        self, data_1: str | Sequence[str], data_2: str | Sequence[str], *, truncate_prompt_tokens: int | None = None
    ) -> list[ScoringRequestOutput]:
        """How well two texts go together; one on the left goes with every text on the right."""
        state = self._running
        scoring = Scoring.of(state.service, data_1, data_2)
        make = partial(scoring.jobs, state.jobs, state.service, truncate_prompt_tokens)
        return scoring.scores(await self._pool(make, sum(map(len, scoring.texts))))

    # --- the model

    async def get_tokenizer(self) -> Any:
        """The model's tokenizer as transformers loads it."""
        return await in_thread(partial(hugging_face_tokenizer, self._running.loaded))

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate() takes when it is given none: the model's own defaults."""
        return self._running.service.sampling_params({})

    # --- how

    @property
    def _running(self) -> _Running:
        if self._state is None:
            reason = "has been closed, or its start failed" if self._is_used else "is not started: use `async with`"
            raise RuntimeError(f"this AsyncLLM {reason}")
        return self._state

    async def _made(self, make: Callable[[], list[Job]], num_characters: int) -> list[Job]:
        """The jobs; long texts are tokenized in a thread."""
        return await self._running.service.tokenizer.off_loop(num_characters, make)

    def _stream(
        self,
        make: Callable[[], list[Job]],
        num_characters: int,
        request_id: str | None,
        kind: str,
        priority: int,
        lora_request: Lora,
    ) -> AsyncGenerator[RequestOutput, None]:
        async def prepared() -> Job:
            return with_loras(await self._made(make, num_characters), lora_request)[0]

        runner = self._running.runner
        return runner.stream(prepared, request_id or runner.new_id(), RequestOutputKind(kind), priority)

    async def _pool(
        self, make: Callable[[], list[Job]], num_characters: int, lora_request: Lora | Sequence[Lora] = None
    ) -> list[PoolingRequestOutput]:
        jobs = with_loras(await self._made(make, num_characters), lora_request)
        return await self._running.runner.run_all(jobs, pooling_output)
