"""A served model made of nothing: the contract of ModelService, with words for tokens and answers that are foreseeable."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

from llmd.config import Config
from llmd.engine.adapter_slots import AdapterInfo, AdapterState
from llmd.engine.executor import ExecutorInfo, LoadProgress
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason, TokenLogprobs
from llmd.errors import InvalidRequest
from llmd.plugin.specs import AuthenticatorSpec
from llmd.server.app import ServerContext, create_app, make_runner
from llmd.server.parsers import ModelParsers
from llmd.text.stream import RequestStream, TextDelta

VOCAB = 1000


class FakeTokenizer:
    """One token a word; its id is made of the word, so that text and ids go both ways."""

    vocab_size, added_tokens = VOCAB, {}

    def __init__(self) -> None:
        self.words = {}

    def token_to_id(self, token: str) -> int | None:
        return None

    def detokenizer(self, prompt: list[int], *, skip_special_tokens: bool = True) -> Any:
        return SimpleNamespace(feed=lambda token_ids: " " + self.decode(token_ids), finish=lambda: "")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [1] if add_special_tokens else []
        for word in text.split(" "):
            token_id = 2 + sum(word.encode("utf-8", "replace")) % (VOCAB - 2)
            self.words[token_id] = word
            ids.append(token_id)
        return ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode(text, add_special_tokens=add_special_tokens)

    async def off_loop(self, length: int, call: Callable[[], Any]) -> Any:
        return call()

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(self.token_text(token_id) for token_id in token_ids if token_id != 1)

    def token_text(self, token_id: int) -> str:
        return self.words.get(token_id, f"w{token_id}")


@dataclass
class FakeStats:
    """EngineStats, as far as it is read."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_blocks: int = 64
    num_free_blocks: int = 64
    kv_usage: float = 0.25
    num_steps: int = 0
    prefix_queries: int = 10
    prefix_hits: int = 5
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    admitted: int = 0
    finished: int = 0
    last_step_s: float = 0.0
    schedule_s: float = 0.0
    wait_s: float = 0.0
    commit_s: float = 0.0
    publish_s: float = 0.0
    forward_s: float = 0.0
    num_nonfinite: int = 0
    num_out_of_memory: int = 0
    step_sizes: tuple[int, ...] = (1, 0, 2)
    num_step_tokens: int = 9
    num_context_tokens: int = 0
    read_bytes: float = 4000.0
    memory_utilization: float | None = 0.625


class FakeEngine:
    """What routes and metrics ask of an engine."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.pulse = SimpleNamespace(why_not_alive=lambda: None, num_signs=0, stalled_s=0.5, patience_s=8.0)
        self.refusal: Exception | None = None
        self.info = ExecutorInfo(
            num_blocks=64, block_size=16, max_num_seqs=8, max_model_len=64, vocab_size=VOCAB, weights_bytes=1000,
            kv_bytes=64 * 16 * 10, max_loras=4, facts={"memory_bandwidth": 1e9},
        )  # fmt: skip
        self.resets = 0

    def check_admission(self, num_tokens: int = 0, num_requests: int = 1) -> None:
        if self.refusal is not None:
            raise self.refusal

    def stats(self) -> FakeStats:
        return FakeStats()

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def adapters(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset({"tiny"}), frozenset({"late"})


class Speaker:
    """Puts the words `t0 t1 …` into the stream of one request, one a step for each sequence."""

    def __init__(self, service: FakeService, request: Request) -> None:
        self.service, self.request = service, request
        self.stream = RequestStream(request, self._closed, 1 << 20)
        self.stream.num_cached_tokens = 3
        self._task = asyncio.ensure_future(self._speak())

    def _closed(self, stream: RequestStream) -> None:
        self.service.closed.append(stream)
        self._task.cancel()

    async def _speak(self) -> None:
        service, params, stream = self.service, self.request.params, self.stream
        count = min(params.max_tokens or 8, 8) if service.max_words is None else service.max_words
        for step in range(count):
            await asyncio.sleep(service.step_s)
            if step == service.fail_at:
                for index in range(params.n):
                    stream.put(self._ended(index))
                return
            stream.first_token_s = stream.first_token_s or time.monotonic()
            stream.num_output_tokens += params.n
            for index in range(params.n):
                stream.put(self._delta(index, step, step == count - 1))

    def _ended(self, index: int) -> TextDelta:
        error = self.service.fail_with
        return TextDelta(self.request.request_id, index, "", [], finish_reason=self.service.fail_as, error=error)

    def _delta(self, index: int, step: int, is_last: bool) -> TextDelta:
        params, token_id = self.request.params, 10 + step
        text = (f" t{step}" if step else f"t{step}") + self.service.padding
        delta = TextDelta(self.request.request_id, index, text, [token_id], num_cached_tokens=3)
        if params.logprobs is not None:
            delta.logprobs = [_logprobs(token_id, params.logprobs)]
            delta.text_offsets = [3 * step - 1 if step else 0]
        if params.prompt_logprobs is not None and step == 0 and index == 0:
            later = self.request.prompt.token_ids[1:]
            delta.prompt_logprobs = [_logprobs(token_id, params.prompt_logprobs) for token_id in later]
        if is_last:
            delta.finish_reason = FinishReason.LENGTH
            if params.stop:
                delta.finish_reason, delta.stop_reason = FinishReason.STOP, params.stop[0]
        return delta


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    top = [token_id, *(token_id + 100 + i for i in range(num_top))][: max(num_top, 1)]
    return TokenLogprobs(token_id, -0.5, 1, top, [-0.5 - i for i in range(len(top))])


class FakeAdapters:
    """ServedAdapters: names and nothing behind them."""

    def __init__(self, *names: str) -> None:
        self.names, self.is_enabled, self.applied = list(names), bool(names), []

    def list(self) -> list[AdapterInfo]:
        return [
            AdapterInfo(name, f"/{name}", AdapterState.LOADED, None, 8, 1000, 0, 0, 0, 1, 0, 0, 0.0) for name in self.names
        ]

    def has(self, name: str) -> bool:
        return name in self.names

    find = has

    async def apply(self, config: Any) -> None:
        self.applied.append(config)


@dataclass
class FakeService:
    """ModelService."""

    names: tuple[str, ...] = ("fake", "fake-alias")
    state: str = "ready"
    progress: LoadProgress = field(default_factory=lambda: LoadProgress("shard 3/8", 0.375))
    max_model_len: int = 64
    eos_token_ids: tuple[int, ...] = ()
    created_s: float = 1700000000.0
    step_s: float = 0.0
    max_words: int | None = None
    padding: str = ""  # behind each word
    fail_at: int | None = None
    fail_as: FinishReason = FinishReason.ERROR
    fail_with: str | None = "NaN logits"
    defaults: dict[str, Any] = field(default_factory=dict)
    chat_template: Any = field(default_factory=lambda: SimpleNamespace(templates={"default": "{{ messages }}"}))
    engine: FakeEngine = field(default_factory=FakeEngine)
    adapters: FakeAdapters = field(default_factory=FakeAdapters)
    parsers: ModelParsers = field(default_factory=ModelParsers)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    requests: list[Request] = field(default_factory=list)
    closed: list[RequestStream] = field(default_factory=list)
    rendered: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    streams: list[RequestStream] = field(default_factory=list)

    def sampling_params(self, overrides: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams(**{**self.defaults, **overrides})

    def render_chat(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        self.rendered.append((messages, arguments))
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)

    def logprob_token(self, token_id: int) -> tuple[str, bytes]:
        text = self.tokenizer.token_text(token_id)
        return text, text.encode()

    async def generate(self, prompt, params, *, request_id, priority=0, timeout_s=None, key="", cache_salt=None,
                       adapter=None, add_special_tokens=True, clip_max_tokens=False,
                       constraint=None) -> RequestStream:  # fmt: skip
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(prompt) >= self.max_model_len:
            message = f"the prompt has {len(prompt)} tokens, the context {self.max_model_len}"
            raise InvalidRequest(message, param="prompt", code="context_length_exceeded")
        if max(prompt) >= VOCAB or min(prompt) < 0:
            raise InvalidRequest(f"token ids must be between 0 and {VOCAB - 1}", param="prompt")
        request = Request(
            request_id=request_id, prompt=Prompt(tuple(prompt)), params=params, priority=priority, key=key, adapter=adapter
        )
        self.requests.append(request)
        stream = Speaker(self, request).stream
        self.streams.append(stream)
        return stream


def all_routes() -> list[Any]:
    """The OpenAI routes, as the catalog would list them."""
    from llmd_plugins import openai

    return openai.llmd_register_routes()


def make_context(service: Any = None, **changes: Any) -> ServerContext:
    """A context with the built-in plugins that are not switched off by `changes`."""
    from llmd_plugins import openai
    from llmd_plugins.auth import api_keys
    from llmd_plugins.server import cors

    service = service if service is not None else FakeService()
    values: dict[str, Any] = {
        "config": Config(),
        "services": dict.fromkeys(service.names, service),
        "routes": all_routes(),
        "authenticators": api_keys.llmd_register_authenticators(),
        "middlewares": cors.llmd_register_middlewares(),
        "sections": {"openai": openai.OpenAISettings()},
        "state": "ready",
        **changes,
    }
    return ServerContext(**values)


def make_config(**server: Any) -> Config:
    """A configuration with these `[server]` keys."""
    return Config.model_validate({"server": server})


def broken_authenticator() -> AuthenticatorSpec:
    """One that raises whenever it is asked."""

    class Broken:
        async def authenticate(self, headers: Any, peer: Any) -> Any:
            raise RuntimeError("database down at /srv/keys.db")

    return AuthenticatorSpec(name="broken", summary="raises", build=lambda config: Broken())


@asynccontextmanager
async def serving(context: ServerContext, prepare: Callable[[web.Application], None] | None = None) -> AsyncIterator[str]:
    """A real server on a free port; yields its URL."""
    app = create_app(context)
    if prepare is not None:
        prepare(app)
    runner = make_runner(app, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def summaries_of(context: ServerContext) -> list[Any]:
    """Every summary that the context is handed from now on."""
    seen: list[Any] = []
    context.request_finished = seen.append
    return seen


async def events_of(url, body, path="/v1/chat/completions"):
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        return parse_events(await answer.read())


def parse_events(data: bytes):
    frames = data.decode().split("\n\n")
    assert frames.pop() == ""
    lines = [frame for frame in frames if not frame.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert [line for line in lines if line == "data: [DONE]"] == lines[-1:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def until(condition, limit_s=3.0):
    for _ in range(int(limit_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in time")


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def call(url: str, method: str, path: str, body: Any = None, **options: Any) -> Answer:
    """One request on a connection of its own; `body` is sent as JSON."""
    if body is not None:
        options["json"] = body
    async with aiohttp.ClientSession() as session, session.request(method, url + path, **options) as answer:
        return Answer(answer.status, answer.headers, await answer.read())
