"""LLM: the engine in a script or a notebook; names and meanings are vLLM's.

The engine runs on an event loop of its own in a background thread, so that it works whether or not the caller has one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from llmd.engine.params import BeamSearchParams, PoolingParams, SamplingParams
from llmd.offline.adapters import Lora
from llmd.offline.beams import BeamSearchOutput, search_all
from llmd.offline.jobs import ChatOptions, Job, JobMaker, Prompt, as_list, with_loras
from llmd.offline.loop import LoopThread, Progress
from llmd.offline.outputs import RequestOutputKind
from llmd.offline.pooled import Scoring
from llmd.offline.results import classification_output, embedding_output, pooling_output, request_output
from llmd.offline.running import Runner
from llmd.offline.settings import hugging_face_tokenizer, load, make_config, start

if TYPE_CHECKING:
    from llmd.offline.outputs import (
        ClassificationRequestOutput,
        EmbeddingRequestOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringRequestOutput,
    )
    from llmd.server.generate import ModelService

T = TypeVar("T")
Tqdm = bool | Callable[..., Any]


class LLM:
    """A model loaded in this process. Keywords are those of `llmd serve`, with underscores: dtype, max_model_len, …

    Raises TypeError for an unknown keyword, ConfigError and ModelError for what cannot be used. Use it as a context
    manager or call `shutdown` to free the device.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self._loaded = load(make_config("LLM", {"model": model, **options}))
        self.config, self._path, self._service, max_in_flight = self._loaded
        self._jobs = JobMaker(self._service)
        self._runner = Runner(self._service, max_in_flight)
        self._hf_tokenizer: Any = None
        self._loop = LoopThread()
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._service)
        try:
            self._loop.call(start(self._service))
        except BaseException:
            self.shutdown()
            raise

    # --- text

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Tqdm = True,
        *,
        lora_request: Lora | Sequence[Lora] = None,
        prompt_token_ids: Sequence[Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: text, token ids, or {"prompt": …} or {"prompt_token_ids": …}; results in their order.

        Without sampling_params the model's defaults are taken. `lora_request` is an adapter for all prompts, by name or as a
        LoRARequest, or one (or None) for each. A prompt that cannot be served raises InvalidRequest before
        any of them runs.
        """
        given = prompts if prompts is not None else prompt_token_ids
        if given is None or (prompts is not None and prompt_token_ids is not None):
            raise TypeError("generate() takes either prompts or prompt_token_ids")
        jobs = self._jobs.generation(as_list(given), sampling_params)
        return self._run(with_loras(jobs, lora_request), use_tqdm, request_output, priority)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Tqdm = True,
        *,
        lora_request: Lora | Sequence[Lora] = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations, with the model's chat template."""
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        jobs = self._jobs.chat([messages] if is_one else messages, sampling_params, options)
        return self._run(with_loras(jobs, lora_request), use_tqdm, request_output)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        output_kind: RequestOutputKind | str = RequestOutputKind.CUMULATIVE,
        priority: int = 0,
        lora_request: Lora = None,
    ) -> Iterator[RequestOutput]:
        """Continue one prompt, and yield an output for each piece of it: all so far, or ("delta") only what is new.

        A prompt that cannot be served raises InvalidRequest here and now; leaving the iterator ends the request.
        """
        jobs = with_loras(self._jobs.generation([prompt], sampling_params), lora_request)
        return self._stream(jobs, output_kind, priority)

    def stream_chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        *,
        output_kind: RequestOutputKind | str = RequestOutputKind.CUMULATIVE,
        priority: int = 0,
        lora_request: Lora = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[RequestOutput]:
        """Answer one conversation, piece by piece, as `stream` does."""
        jobs = with_loras(self._jobs.chat([messages], sampling_params, options), lora_request)
        return self._stream(jobs, output_kind, priority)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        *,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, as Hugging Face's generate(num_beams=…) finds them."""
        jobs = self._jobs.generation(as_list(prompts), SamplingParams(temperature=0.0, max_tokens=1))
        self._check_alive()
        return self._loop.call(search_all(self._service, with_loras(jobs, lora_request), params, self._runner))

    # --- vectors, classes, scores

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: Tqdm = True,
        *,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[PoolingRequestOutput]:
        """What the model makes of each prompt, as an array: a vector, or a classifier's scores.

        `truncate_prompt_tokens` cuts longer prompts (-1: to the context); `prompt_name` is one of the model's own prompts.
        """
        given = as_list(prompts)
        jobs = self._jobs.pooling(given, pooling_params, max_length=truncate_prompt_tokens, prompt_name=prompt_name)
        return self._run(with_loras(jobs, lora_request), use_tqdm, pooling_output)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: Tqdm = True,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, as a list of floats."""
        options: dict[str, Any] = {"truncate_prompt_tokens": truncate_prompt_tokens, "prompt_name": prompt_name}
        options["lora_request"] = lora_request
        pooled = self.encode(prompts, pooling_params or PoolingParams(), use_tqdm, **options)
        return [embedding_output(output) for output in pooled]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: Tqdm = True,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        truncate_prompt_tokens: int | None = None,
        lora_request: Lora | Sequence[Lora] = None,
    ) -> list[ClassificationRequestOutput]:
        """Probabilities of a classifier's labels for each prompt."""
        params = pooling_params or PoolingParams(task="classify")
        options: dict[str, Any] = {"truncate_prompt_tokens": truncate_prompt_tokens, "lora_request": lora_request}
        pooled = self.encode(prompts, params, use_tqdm, **options)
        return [classification_output(output) for output in pooled]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        use_tqdm: Tqdm = True,
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well two texts go together: by a cross-encoder, or as the cosine of the model's vectors.

        One text on the left goes with every text on the right; otherwise there are as many of each.
        """
        scoring = Scoring.of(self._service, data_1, data_2)
        jobs = scoring.jobs(self._jobs, self._service, truncate_prompt_tokens)
        return scoring.scores(self._run(jobs, use_tqdm, pooling_output))

    # --- the model

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as transformers loads it."""
        if self._hf_tokenizer is None:
            self._hf_tokenizer = hugging_face_tokenizer(self._loaded)
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

    def _check_alive(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this LLM has been shut down")

    def _run(
        self, jobs: list[Job], use_tqdm: Tqdm, finish: Callable[..., T], priority: Sequence[int] | None = None
    ) -> list[T]:
        """Run all jobs on the loop thread; what `finish` makes of each stream, in the jobs' order."""
        self._check_alive()
        if priority is not None and len(priority) != len(jobs):
            raise ValueError(f"{len(priority)} priorities for {len(jobs)} prompts")
        with Progress(use_tqdm, len(jobs)) as progress:
            return self._loop.call(self._runner.run_all(jobs, finish, priority=priority, progress=progress))

    def _stream(self, jobs: list[Job], kind: RequestOutputKind | str, priority: int) -> Iterator[RequestOutput]:
        self._check_alive()

        async def prepared() -> Job:
            return jobs[0]

        outputs = self._runner.stream(prepared, self._runner.new_id(), RequestOutputKind(kind), priority)
        return self._loop.iterate(outputs)


def _shut_down(loop: LoopThread, service: ModelService) -> None:
    if loop.is_current:  # collected as garbage on the loop's own thread, which cannot wait for itself
        threading.Thread(target=_shut_down, args=(loop, service), name="llmd-shutdown").start()
        return
    try:
        loop.call(service.stop())
    finally:
        loop.stop()
