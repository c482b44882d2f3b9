"""The routes over the real ModelService and engine, with a fake device: whole answers, streams, aborts, bad bodies."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import asynccontextmanager

import openai
import orjson
import pytest
from fakes import FakeExecutor, fake_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import write_folder
from server.serving import call, events_of, make_context, serving, summaries_of, until

from llmd.config import Config, ModelConfig
from llmd.server.generate import ModelService
from llmd_plugins.scheduling import fcfs

TEMPLATE = """{% for m in messages %}[{{ m.role }}] {{ m.content }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
CHAT = {"messages": [{"role": "user", "content": "Hello world"}], "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_folder("byte_level", tmp_path_factory.mktemp("served") / "model", chat_template=TEMPLATE)
    (path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    return path


@asynccontextmanager
async def served(folder, *, step_s=0.0, config=None, **info):
    """A context with one model and the URL where it is served."""
    config = Config.model_validate({"cache": {"block_size": 4}, **(config or {})})
    values = {"num_blocks": 256, "max_model_len": 256, "vocab_size": 420, **info}
    executor = FakeExecutor(fake_info(**values), step_s=step_s)
    (policy,) = fcfs.llmd_register_scheduling_policies()
    service = ModelService.create(config, ModelConfig(model="tiny"), folder, executor, policy.build(config.scheduler))
    await service.start(lambda progress: None)
    context = make_context(service, config=config)
    try:
        async with serving(context) as url:
            yield context, url
    finally:
        await service.stop()


async def chat(url, **fields):
    answer = await call(url, "POST", "/v1/chat/completions", {**CHAT, **fields})
    assert answer.status == 200, answer.body
    return answer.json()


async def test_streamed_and_whole_answers_are_equal(folder):
    async with served(folder) as (context, url):
        for fields in ({}, {"n": 2, "seed": 3, "temperature": 1}, {"stop": ["a"], "ignore_eos": True}, {"logprobs": True}):
            whole = await chat(url, max_tokens=24, **fields)
            events = await events_of(url, {**CHAT, "max_tokens": 24, "stream": True, **fields})
            for expected in whole["choices"]:
                parts = [part for event in events for part in event["choices"] if part["index"] == expected["index"]]
                text = "".join(part["delta"].get("content", "") for part in parts)
                assert text == expected["message"]["content"]
                assert parts[-1]["finish_reason"] == expected["finish_reason"]
                assert parts[-1]["stop_reason"] == expected["stop_reason"]
                if expected["logprobs"]:
                    entries = [e for part in parts if part["logprobs"] for e in part["logprobs"]["content"]]
                    assert entries == expected["logprobs"]["content"]
        await until(lambda: context.service().engine.stats().num_running == 0)


async def test_official_client(folder):
    async with served(folder) as (_, url), openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as api:
        answer = await api.chat.completions.create(model="tiny", messages=CHAT["messages"], max_tokens=5, temperature=0)
        assert answer.usage.completion_tokens <= 5
        again = await api.chat.completions.create(model="tiny", messages=CHAT["messages"], max_tokens=5, temperature=0)
        assert again.choices[0].message.content == answer.choices[0].message.content
        assert again.usage.prompt_tokens_details.cached_tokens > 0
        with pytest.raises(openai.BadRequestError) as long:
            await api.completions.create(model="tiny", prompt="Hello " * 300)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as empty:
            await api.completions.create(model="tiny", prompt="")
        assert empty.value.param == "prompt"


async def test_echo_and_prompt_logprobs(folder):
    async with served(folder) as (_, url):
        body = {"prompt": "Hello world, how are you", "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0}
        answer = (await call(url, "POST", "/v1/completions", body)).json()
        logprobs, text = answer["choices"][0]["logprobs"], answer["choices"][0]["text"]
        assert len(logprobs["tokens"]) == answer["usage"]["total_tokens"]
        assert text.startswith(body["prompt"])
        assert all(len(values) == len(logprobs["tokens"]) for values in logprobs.values())
        assert logprobs["token_logprobs"][0] is None
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
            if "\ufffd" not in token and not token.startswith("<"):
                assert text.startswith(token, offset)


async def test_leaving_frees_the_engine(folder):
    async with served(folder, step_s=0.01) as (context, url):
        seen = summaries_of(context)
        engine = context.service().engine
        body = {**CHAT, "max_tokens": 200, "ignore_eos": True, "n": 3}
        task = asyncio.ensure_future(call(url, "POST", "/v1/chat/completions", body))
        await until(lambda: engine.stats().num_running == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: engine.stats().num_running == 0)
        await until(lambda: bool(seen))
        assert seen[0].client_gone
        assert seen[0].status == 499


async def test_deadlines_are_504(folder):
    async with served(folder, step_s=0.02, config={"server": {"request_timeout_s": 0.1}}) as (_, url):
        answer = await call(url, "POST", "/v1/chat/completions", {**CHAT, "max_tokens": 200, "ignore_eos": True})
        assert answer.status == 504
        assert answer.json()["error"]["code"] == "timeout"


async def test_a_full_queue_is_429(folder):
    config = {"scheduler": {"max_waiting_requests": 1, "max_num_seqs": 1}}
    async with served(folder, step_s=0.01, config=config, max_num_seqs=1) as (_, url):
        body = {**CHAT, "max_tokens": 30, "ignore_eos": True}
        answers = await asyncio.gather(*(call(url, "POST", "/v1/chat/completions", body) for _ in range(8)))
        statuses = sorted(answer.status for answer in answers)
        assert set(statuses) == {200, 429}
        assert all(answer.headers["Retry-After"] for answer in answers if answer.status == 429)


NAMES = [
    "model", "prompt", "messages", "temperature", "top_p", "top_k", "n", "max_tokens", "min_tokens", "stop", "stream",
    "seed", "logprobs", "top_logprobs", "echo", "logit_bias", "stop_token_ids", "bad_words", "tools", "tool_choice",
    "cache_salt", "response_format", "allowed_token_ids", "truncate_prompt_tokens", "prompt_logprobs", "foo",
    "stream_options", "priority", "chat_template_kwargs", "documents", "min_p", "repetition_penalty", "request_id",
    "best_of", "ignore_eos",
]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-5, 500), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(allow_nan=False, allow_infinity=False)
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"]), "content": st.text(max_size=9) | JSON}
    ),
    max_size=3,
)
LIKELY = st.sampled_from(
    [True, False, 0, 1, 2, 3, 20, 0.5, 1.0, -1, "a", "", ["a", "b"], [5, 6], [], {}, {"5": 1}, {"5": -100}]
)


@st.composite
def bodies(draw):
    """Something that works, and a few fields of any kind over it."""
    body = {"max_tokens": draw(st.integers(0, 4)), "prompt": "Hello"}
    if draw(st.booleans()):
        body = {"max_tokens": 2, "messages": CHAT["messages"]}
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        body[name] = draw(LIKELY | JSON)
    if draw(st.integers(0, 3)) == 0:
        body["messages"] = draw(MESSAGES)
    return body


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(body=bodies(), path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]))
def test_no_body_makes_a_5xx(fuzzed, body, path):
    loop, url = fuzzed
    answer = loop.run_until_complete(call(url, "POST", path, data=orjson.dumps(body), headers=JSON_HEADERS))
    assert answer.status < 500, (answer.status, answer.body)
    if answer.status >= 400:
        assert answer.json()["error"]["message"]
    elif answer.headers["Content-Type"].startswith("application/json"):
        assert all(map(math.isfinite, _numbers(answer.json())))


JSON_HEADERS = {"Content-Type": "application/json"}


def _numbers(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module")
def fuzzed(folder):
    """A server on a loop that runs only while a request is out: the examples share it."""
    loop = asyncio.new_event_loop()
    serving_it = served(folder)
    _, url = loop.run_until_complete(serving_it.__aenter__())
    yield loop, url
    healthy = loop.run_until_complete(call(url, "GET", "/health"))
    loop.run_until_complete(serving_it.__aexit__(None, None, None))
    loop.close()
    assert healthy.status == 200
