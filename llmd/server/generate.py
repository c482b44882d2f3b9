"""One served model as every front sees it: prompts in, streams of text out. No HTTP here; `llmd.offline` uses it too."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmd.config import Config, ModelConfig
from llmd.engine.engine import Engine
from llmd.engine.executor import Executor, LoadProgress
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.queue import WaitingQueue
from llmd.engine.request import Prompt, Request
from llmd.errors import ConfigError, InvalidParams, InvalidRequest, NotReady
from llmd.server.adapters import AdapterSources, ServedAdapters
from llmd.server.parsers import ModelParsers, ParserParts, choose_parsers, model_facts
from llmd.server.pooling import Pooling
from llmd.server.quotas import Quotas
from llmd.text.chat_template import ChatTemplate, load_override
from llmd.text.defaults import GenerationDefaults, read_defaults
from llmd.text.output import OutputProcessor
from llmd.text.pooling import PoolingDefaults, read_pooling
from llmd.text.stream import RequestStream
from llmd.text.structured import Constraint, GrammarContext, Grammars, constraint_of, select_compilers
from llmd.text.tokenizer import ASYNC_FROM_LENGTH, Tokenizer, check_unicode

if TYPE_CHECKING:
    from llmd.engine.grammar import CompiledGrammar

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]
_CHARACTERS_A_TOKEN = 8  # above the usual: an estimate from below of a text's tokens
_SUSPICIOUS_LENGTH = 16  # characters a token of context, from which a text's length is looked at before tokenizing


class ModelService:
    """Tokenizer, chat template and engine of one model. Loop thread only, but for `create`."""

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        defaults: GenerationDefaults,
        executor: Executor,
        waiting: WaitingQueue,
        grammars: Mapping[str, Any] | None = None,
        parsers: ModelParsers | None = None,
        pooling: PoolingDefaults | None = None,
        adapters: AdapterSources | None = None,
    ) -> None:
        self.names: tuple[str, ...] = model_config.served_model_name or (model_config.model,)
        self.config = model_config
        self.tokenizer, self.chat_template, self.defaults = tokenizer, chat_template, defaults
        self.parsers = parsers or ModelParsers()
        self.pooling = Pooling(self, pooling or PoolingDefaults())
        self.created_s = time.time()
        self.max_model_len = model_config.max_model_len or 0  # what the executor says, once it has loaded
        self.vocab_size = tokenizer.vocab_size
        self.eos_token_ids = defaults.eos_token_ids
        self.state: State = "loading"
        self.progress = LoadProgress("starting", 0.0)
        self._grammar_specs, self._grammars = grammars or {}, Grammars((), config.limits)
        self._limits, self._isolate_keys = config.limits, config.cache.isolate_keys
        self.outputs = OutputProcessor(tokenizer, max_buffer_bytes=config.server.max_stream_buffer_bytes)
        self.engine = Engine(
            executor,
            config.scheduler,
            config.cache,
            waiting=waiting,
            publish=self.outputs.publish,
            on_failure=self._failed,
            seed=model_config.seed,
            health=config.health,
            name=self.names[0],
            model=model_config.model,
        )
        self.outputs.bind(self.engine)
        self.adapters = ServedAdapters(self.engine, config.adapters, adapters or AdapterSources())
        self.folder: Path | None = None  # of the model's files
        self.quotas = Quotas()  # the daemon's own, once it serves
        self._bad_words_ids = lru_cache(maxsize=128)(self._encode_bad_words)

    @classmethod
    def create(
        cls,
        config: Config,
        model_config: ModelConfig,
        path: Path,
        executor: Executor,
        waiting: WaitingQueue,
        *,
        tokenizer_path: Path | None = None,
        grammars: Mapping[str, Any] | None = None,
        parsers: ParserParts | None = None,
        adapters: AdapterSources | None = None,
    ) -> ModelService:
        """Read the model's text files; blocks, so call it in a thread while others are served.

        `tokenizer_path` is where the files of model_config.tokenizer are, if that is no folder; `grammars` are the specs
        of structured output by name, `parsers` those of what models write, `adapters` tells where some may be found. Raises
        ModelError and ConfigError for files and values that cannot be used.
        """
        folder = tokenizer_path or (Path(model_config.tokenizer) if model_config.tokenizer else path)
        if not folder.is_dir():
            raise ConfigError(f"models.tokenizer: {str(model_config.tokenizer)!r} is not a folder")
        tokenizer = Tokenizer.from_folder(folder, trust_remote_code=model_config.trust_remote_code)
        override = load_override(model_config.chat_template)
        template = ChatTemplate(
            override if override is not None else tokenizer.chat_templates,
            tokenizer.special_tokens,
            max_bytes=config.limits.max_template_bytes,
        )
        defaults = read_defaults(path, tokenizer, model_config.generation_config, model_config.override_generation_config)
        chosen = choose_parsers(parsers or ParserParts(), model_config, model_facts(model_config, path, template))
        pooling = read_pooling(path, model_config.hf_overrides)
        files = (tokenizer, template, defaults)
        made = cls(config, model_config, *files, executor, waiting, grammars, chosen, pooling, adapters)
        made.folder = path
        return made

    # --- life

    async def start(self, report: Callable[[LoadProgress], None]) -> None:
        """Load the model; `progress` follows. Raises what the executor raises, and the state is then "failed"."""

        def note(progress: LoadProgress) -> None:
            self.progress = progress
            report(progress)

        try:
            info = await self.engine.start(note)
        except BaseException:
            self.state = "failed"
            raise
        self.max_model_len, self.vocab_size = info.max_model_len, info.vocab_size
        if not info.can_generate:
            self.max_model_len = self.pooling.max_length(info.max_model_len)
        self.eos_token_ids = tuple(token_id for token_id in self.defaults.eos_token_ids if token_id < info.vocab_size)
        if self.tokenizer.vocab_size > info.vocab_size:
            logger.warning(
                "%s: the tokenizer has %d tokens and the model %d: prompts with the others are refused",
                self.names[0], self.tokenizer.vocab_size, info.vocab_size,
            )  # fmt: skip
        compilers = select_compilers(self._grammar_specs, self.config.structured_outputs_backend, self._grammar_context())
        self._grammars = Grammars(compilers, self._limits)
        await self._start_adapters()
        self.progress = LoadProgress("ready", 1.0)
        self.state = "ready"

    async def _start_adapters(self) -> None:
        try:
            await self.adapters.start()
        except BaseException:
            self.state = "failed"
            raise

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give running ones `drain_s` seconds, end the rest. May be called again."""
        if self.state != "failed":
            self.state = "draining"
        await self.engine.stop(drain_s=drain_s)
        self.outputs.fail_all(NotReady("the server is shutting down"), "the server is shutting down")
        self.tokenizer.close()
        self._grammars.close()

    def read_defaults(self, model_config: ModelConfig) -> GenerationDefaults:
        """The sampling defaults of a changed configuration; blocks. Raises ConfigError and ModelError."""
        given = (model_config.generation_config, model_config.override_generation_config)
        if self.folder is None or given == (self.config.generation_config, self.config.override_generation_config):
            return self.defaults
        return read_defaults(self.folder, self.tokenizer, *given)

    def reconfigure(self, config: Config, model_config: ModelConfig, defaults: GenerationDefaults) -> None:
        """Go by a changed configuration, as far as a loaded model can; requests that run keep what they began with."""
        self.config, self.defaults = model_config, defaults
        self._limits, self._isolate_keys = config.limits, config.cache.isolate_keys
        self.chat_template.max_bytes = config.limits.max_template_bytes
        self._grammars.set_limits(config.limits)
        self.engine.set_queue_limits(config.scheduler)

    def _grammar_context(self) -> GrammarContext:
        return GrammarContext(
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            special_token_ids=frozenset(self.tokenizer.special_ids),
            token_bytes=self.tokenizer.token_bytes,
            encode=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            tokenizer_json=lambda: self.tokenizer.serialized,
        )

    def _failed(self, error: BaseException) -> None:
        self.state = "failed"
        self.outputs.fail_all(error)

    # --- requests

    def sampling_params(self, overrides: Mapping[str, Any]) -> SamplingParams:
        """The model's defaults with the request's own fields over them; None means not given.

        max_tokens = None asks for the model's default, and without one for all the context. Raises InvalidParams.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        values = {**self.defaults.sampling, **given}
        if "max_tokens" in overrides:
            values.setdefault("max_tokens", None)
        try:
            return SamplingParams(**values)
        except TypeError as error:
            raise InvalidRequest(f"sampling parameters: {error}") from error

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        timeout_s: float | None = None,
        key: str = "",
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        clip_max_tokens: bool = False,
        constraint: Constraint | None = None,
        adapter: str | None = None,
    ) -> RequestStream:
        """Queue a request for tokens; read and close the stream. Nothing is left behind when this raises.

        `clip_max_tokens` lets max_tokens reach past the context, where it ends anyway. `constraint` stands for
        params.structured_outputs where it was not the request's own. `adapter` is one that `adapters` knows.
        """
        self._check_params(params)
        token_ids = await self._token_ids(prompt, params.n, add_special_tokens)
        grammar = await self.compile_constraint(params, constraint)
        bad_words_ids = await self._bad_words_of(params)
        is_asked = not clip_max_tokens and params.max_tokens != self.defaults.sampling.get("max_tokens")
        params = self._fit(params, len(token_ids), clip_max_tokens)
        params = self.quotas.fit(key, params, len(token_ids), is_asked=is_asked)
        if not clip_max_tokens:  # else it is the rest of an answer, which goes on
            self.quotas.check_tokens(key, params, len(token_ids))
        told = {"grammar": grammar, "eos_token_ids": self.eos_token_ids, "bad_words_ids": bad_words_ids}
        return self._queue(Prompt(token_ids), params, request_id, priority, timeout_s, key, cache_salt, adapter, **told)

    async def compile_constraint(self, params: SamplingParams, constraint: Constraint | None) -> CompiledGrammar | None:
        """The grammar of a request, compiled or found in the cache; raises InvalidRequest for one that cannot be."""
        if constraint is None and params.structured_outputs is not None:
            constraint = constraint_of(params.structured_outputs)
        return await self._grammars.compile(constraint) if constraint is not None else None

    async def embed(
        self,
        prompt: str | Sequence[int] | Prompt,
        params: PoolingParams,
        *,
        request_id: str,
        priority: int = 0,
        timeout_s: float | None = None,
        key: str = "",
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
        adapter: str | None = None,
    ) -> RequestStream:
        """Queue a request for a vector: the stream's one delta has it in `pooled`."""
        types = prompt.token_types if isinstance(prompt, Prompt) else ()
        given = prompt.token_ids if isinstance(prompt, Prompt) else prompt
        token_ids = await self._token_ids(given, 1, add_special_tokens)
        self._check_length(len(token_ids), self.max_model_len)
        self.quotas.fit_prompt(key, len(token_ids))
        self.quotas.check_tokens(key, params, len(token_ids))
        made, params = Prompt(token_ids, token_types=types), self.pooling.params(params)
        return self._queue(made, params, request_id, priority, timeout_s, key, cache_salt, adapter)

    def render_chat(self, messages: Sequence[Any], **arguments: Any) -> str:
        """The prompt of a conversation; arguments as ChatTemplate.render takes them. Raises InvalidRequest."""
        return self.chat_template.render(messages, **arguments)

    def logprob_token(self, token_id: int) -> tuple[str, bytes]:
        """A token as logprobs show it: its text, U+FFFD for parts of characters, and its exact bytes."""
        raw = self.tokenizer.token_bytes(token_id)
        return raw.decode(errors="replace"), raw

    # --- checks

    def check(
        self, prompt: Sequence[int], params: SamplingParams | PoolingParams, *, clip_max_tokens: bool = False
    ) -> tuple[int, ...]:
        """The prompt as it would be queued; raises InvalidRequest where `generate` or `embed` would, and queues nothing."""
        token_ids = self._checked_ids(prompt)
        if isinstance(params, SamplingParams):
            self._check_params(params)
            self._fit(params, len(token_ids), clip_max_tokens)
        else:
            self._check_length(len(token_ids), self.max_model_len)
        return token_ids

    def _queue(
        self,
        prompt: Prompt,
        params: SamplingParams | PoolingParams,
        request_id: str,
        priority: int,
        timeout_s: float | None,
        key: str,
        cache_salt: str | None,
        adapter: str | None,
        **told: Any,
    ) -> RequestStream:
        """Hand what was checked to the engine; `told` are the fields of Request that only tokens need."""
        request = Request(
            request_id=request_id,
            prompt=prompt,
            params=params,
            adapter=adapter,
            namespace=self._namespace(key, cache_salt, adapter),
            key=key,
            priority=priority,
            deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
            **told,
        )
        self.quotas.check(key, self.names, request.adapter)
        stream = self.outputs.open(request)
        try:
            stream.sequences = self.engine.add(request)
        except BaseException:
            stream.close()
            raise
        stream.settle = self.quotas.reserve(key, params, len(prompt))
        return stream

    async def _token_ids(self, prompt: str | Sequence[int], num_sequences: int, special: bool) -> tuple[int, ...]:
        """The prompt in token ids, checked. Overload is told before a text is tokenized."""
        if self.state != "ready":
            raise NotReady(f"model {self.names[0]!r} is {self.state}")
        if not isinstance(prompt, str):
            token_ids = self._checked_ids(prompt)
            self.engine.check_admission(len(token_ids), num_sequences)
            return token_ids
        self.engine.check_admission(len(prompt) // _CHARACTERS_A_TOKEN, num_sequences)
        check_unicode(prompt)
        await self._check_text_length(prompt)
        token_ids = tuple(await self.tokenizer.encode_async(prompt, add_special_tokens=special))
        return self._checked_ids(token_ids)

    def _checked_ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        self._check_length(len(prompt), self.max_model_len)  # before a million of them are looked at
        token_ids = tuple(prompt)
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if set(map(type, token_ids)) != {int}:
            raise InvalidRequest("a prompt must be a text or a list of integer token ids", param="prompt")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise InvalidRequest(
                f"the prompt has token id {wrong}, which is not in the vocabulary (0 to {self.vocab_size - 1})",
                param="prompt",
            )
        return token_ids

    async def check_text(self, text: str, *, clips: bool = False) -> None:
        """What `generate` and `embed` look at before a text is tokenized; `clips`: what is too long will be cut."""
        if self.state != "ready":
            raise NotReady(f"model {self.names[0]!r} is {self.state}")
        check_unicode(text)
        if not clips:
            await self._check_text_length(text)

    async def _check_text_length(self, text: str) -> None:
        """Refuse a text that cannot fit however well it is tokenized: tokenizing it would take seconds."""
        if len(text) <= _SUSPICIOUS_LENGTH * self.max_model_len:
            return
        longest = await asyncio.to_thread(self.tokenizer.max_text_length, self.max_model_len)
        if len(text) > longest:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, more than {self.max_model_len} tokens of context can hold",
                param="prompt",
                code="context_length_exceeded",
            )

    def _check_length(self, num_tokens: int, room: int) -> None:
        if num_tokens > room:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens and the context of this model holds {self.max_model_len}: "
                f"shorten it by at least {num_tokens - room}",
                param="prompt",
                code="context_length_exceeded",
            )

    def _fit(self, params: SamplingParams, num_prompt_tokens: int, clip: bool) -> SamplingParams:
        """The params with max_tokens within the context: filled in where it is None."""
        self._check_length(num_prompt_tokens, self.max_model_len - 1)
        room, wanted = self.max_model_len - num_prompt_tokens, params.max_tokens
        if wanted is None:
            room = min(room, self._limits.max_output_tokens or room)
        elif wanted <= room:
            return params
        elif not clip:
            raise InvalidRequest(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {wanted}: together "
                f"{num_prompt_tokens + wanted}, and the context of this model holds {self.max_model_len}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))

    def _check_params(self, params: SamplingParams) -> None:
        """What only the model can tell: token ids within its vocabulary, text for stop strings."""
        allowed = f"token ids between 0 and {self.vocab_size - 1}"
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            token_ids = getattr(params, name)
            if token_ids and max(token_ids) >= self.vocab_size:
                raise InvalidParams(name, max(token_ids), allowed)
        if params.stop and not params.detokenize:
            raise InvalidRequest("stop strings need detokenize = true", param="stop")

    async def _bad_words_of(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if sum(map(len, params.bad_words)) < ASYNC_FROM_LENGTH:
            return self._bad_words_ids(params.bad_words)
        return await asyncio.to_thread(self._bad_words_ids, params.bad_words)

    def _encode_bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word as a text's start and, where it is other ids of the same number, behind a space."""
        found: list[tuple[int, ...]] = []
        for word in words:
            check_unicode(word, "bad_words")
            bare, spaced = (
                tuple(self.tokenizer.encode(start + word.lstrip(), add_special_tokens=False)) for start in ("", " ")
            )
            if not bare or max(bare) >= self.vocab_size:
                raise InvalidParams("bad_words", word, "words that have tokens in the model's vocabulary")
            found.append(bare)
            if spaced[0] != bare[0] and len(spaced) == len(bare) and max(spaced) < self.vocab_size:
                found.append(spaced)
        return tuple(found)

    def _namespace(self, key: str, cache_salt: str | None, adapter: str | None) -> bytes:
        """What separates prefix caches: b"" for all who may share."""
        parts = [cache_salt or "", key if self._isolate_keys else "", adapter or ""]
        if not any(parts):
            return b""
        digest = hashlib.sha256()
        for part in parts:
            raw = part.encode(errors="surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return digest.digest()
