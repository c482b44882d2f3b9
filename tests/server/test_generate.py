"""ModelService over a FakeExecutor: from prompts to text, checks of bad input, defaults of the model, life and death."""

from __future__ import annotations

import asyncio
import json

import pytest
from fakes import FakeExecutor, expected_tokens, fake_info, greedy
from made_tokenizers import write_folder

from llmd.config import CacheConfig, Config, LimitsConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import FinishReason
from llmd.errors import ConfigError, EngineFailure, InvalidRequest, ModelError, NotReady, Overloaded
from llmd.server.generate import ModelService

VOCAB = 420


class Fifo:
    """WaitingQueue, first come first served."""

    def __init__(self):
        self.sequences = []

    def push(self, sequence):
        self.sequences.append(sequence)

    def push_front(self, sequence):
        self.sequences.insert(0, sequence)

    def remove(self, sequence):
        self.sequences.remove(sequence)

    def ordered(self, now_s):
        yield from list(self.sequences)

    def __len__(self):
        return len(self.sequences)


def make(path, *, config=None, executor=None, **model):
    executor = executor or FakeExecutor(fake_info(vocab_size=VOCAB))
    config = config or Config(cache=CacheConfig(block_size=4))
    return ModelService.create(config, ModelConfig(model="tiny", **model), path, executor, Fifo())


@pytest.fixture
def folder(tmp_path):
    path = write_folder("byte_level", tmp_path / "model", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    return path


@pytest.fixture
async def service(folder):
    service = make(folder)
    await service.start(lambda progress: None)
    yield service
    await service.stop()


async def one(service, prompt, params=None, request_id="r", **options):
    stream = await service.generate(
        prompt, params or greedy(max_tokens=6, ignore_eos=True), request_id=request_id, **options
    )
    async with stream:
        return (await stream.collect())[0]


async def test_generates_what_the_model_says(service):
    prompt = service.tokenizer.encode("Hello world")
    delta = await one(service, "Hello world")
    assert list(delta.token_ids) == expected_tokens(prompt, 6, VOCAB)
    assert delta.text == service.tokenizer.decode(prompt + list(delta.token_ids))[len("Hello world") :]
    assert (await one(service, prompt)).text == delta.text


async def test_streams_run_side_by_side(service):
    prompts = [[number, 2, 3] for number in range(20)]
    deltas = await asyncio.gather(*(one(service, prompt, request_id=str(prompt)) for prompt in prompts))
    assert [list(delta.token_ids) for delta in deltas] == [expected_tokens(prompt, 6, VOCAB) for prompt in prompts]


async def test_a_stop_string_frees_the_engine(service):
    ids = expected_tokens([5, 6], 20, VOCAB)
    text = service.tokenizer.detokenizer([5, 6]).feed(ids)
    stop = text.strip("\ufffd")[2:5]
    delta = await one(service, [5, 6], greedy(max_tokens=40, ignore_eos=True, stop=stop))
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, stop)
    await asyncio.sleep(0.01)
    assert service.engine.stats().num_running == 0


async def test_closing_a_stream_frees_the_engine(service):
    stream = await service.generate([1, 2], greedy(max_tokens=100, ignore_eos=True), request_id="r")
    await anext(stream)
    stream.close()
    await asyncio.sleep(0.01)
    stats = service.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stream.finished_s is not None


async def test_embeds(service):
    async with await service.embed("Hello", PoolingParams(), request_id="e") as stream:
        (delta,) = await stream.collect()
    assert len(delta.pooled) == 12
    assert delta.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ("", {}, "prompt", "the prompt is empty"),
        ([], {}, "prompt", "the prompt is empty"),
        ([1, 2.5], {}, "prompt", "integer token ids"),
        ([True], {}, "prompt", "integer token ids"),
        (["a"], {}, "prompt", "integer token ids"),
        ([1, VOCAB], {}, "prompt", f"token id {VOCAB}, which is not in the vocabulary"),
        ([-1], {}, "prompt", "token id -1"),
        ("<|late|>", {}, "prompt", "not in the vocabulary"),
        ("a\udfffb", {}, "prompt", "surrogate"),
        ([1] * 128, {}, "prompt", "the prompt has 128 tokens and the context of this model holds 128"),
        ([1] * 100, {"max_tokens": 29}, "max_tokens", "100 tokens and max_tokens is 29: together 129, and .* holds 128"),
        ("x" * 1_000_000, {}, "prompt", "1000000 characters"),
        ("x", {"stop_token_ids": [VOCAB]}, "stop_token_ids", "between 0 and 419"),
        ("x", {"logit_bias": {5000: 1.0}}, "logit_bias", "between 0 and 419"),
        ("x", {"allowed_token_ids": [0, 999]}, "allowed_token_ids", "between 0 and 419"),
        ("x", {"bad_words": ["<|late|>"]}, "bad_words", "words that have tokens"),
        ("x", {"bad_words": ["a\ud800"]}, "bad_words", "surrogate"),
        ("x", {"stop": "a", "detokenize": False}, "stop", "detokenize"),
    ],
)
async def test_bad_input_names_the_field(service, prompt, params, param, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        await one(service, prompt, SamplingParams(**{"max_tokens": 5, **params}))
    assert caught.value.param == param
    assert service.outputs.num_open == 0
    assert (await one(service, [1, 2])).finish_reason is FinishReason.LENGTH


async def test_max_tokens_is_filled_in_or_clipped(service):
    async def limit(params, **options):
        async with await service.generate([1] * 100, params, request_id="r", **options) as stream:
            return stream.request.params.max_tokens

    assert await limit(SamplingParams(max_tokens=None)) == 28
    assert await limit(SamplingParams(max_tokens=28)) == 28
    assert await limit(SamplingParams(max_tokens=500, min_tokens=400), clip_max_tokens=True) == 28


async def test_a_limit_of_the_operator_bounds_what_is_filled_in(folder):
    service = make(folder, config=Config(limits=LimitsConfig(max_output_tokens=9), cache=CacheConfig(block_size=4)))
    await service.start(lambda progress: None)
    async with await service.generate([1], SamplingParams(max_tokens=None), request_id="r") as stream:
        assert stream.request.params.max_tokens == 9
    await service.stop()


async def test_an_id_can_run_only_once(service):
    async with await service.generate([1, 2], greedy(max_tokens=50, ignore_eos=True), request_id="r") as stream:
        with pytest.raises(InvalidRequest, match="already running"):
            await service.generate([1, 2], greedy(), request_id="r")
        assert (await stream.collect())[0].finish_reason is FinishReason.LENGTH


async def test_overload_is_told_before_tokenizing(folder, monkeypatch):
    config = Config(scheduler=SchedulerConfig(max_waiting_requests=1), cache=CacheConfig(block_size=4))
    service = make(folder, config=config, executor=FakeExecutor(fake_info(vocab_size=VOCAB, max_num_seqs=1), step_s=0.01))
    await service.start(lambda progress: None)
    streams = [await service.generate([1, 2], greedy(max_tokens=50, ignore_eos=True), request_id="first")]
    await asyncio.sleep(0.03)
    streams.append(await service.generate([1, 2], greedy(max_tokens=50), request_id="second"))
    monkeypatch.setattr(service.tokenizer, "encode", None)
    with pytest.raises(Overloaded) as caught:
        await service.generate("text", greedy(), request_id="third")
    assert caught.value.retry_after_s >= 1
    for stream in streams:
        stream.close()
    await service.stop()


async def test_bad_words_with_and_without_a_space(service):
    encode = service.tokenizer.encode
    async with await service.generate([1], SamplingParams(bad_words=[" the", "quick"]), request_id="r") as stream:
        ids = stream.request.bad_words_ids
    for word in ("the", "quick"):
        assert tuple(encode(word)) in ids
    for found in ids:
        assert service.tokenizer.decode(found).strip() in ("the", "quick")


async def test_many_bad_words_are_encoded_off_the_loop(service):
    words = tuple("x" * 100 + str(number) for number in range(200))
    async with await service.generate([1], SamplingParams(bad_words=words), request_id="r") as stream:
        assert len(stream.request.bad_words_ids) >= 200


async def test_ids_that_the_model_has_not(folder, caplog):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 100_000]}))
    service = make(folder, executor=FakeExecutor(fake_info(vocab_size=100)))
    await service.start(lambda progress: None)
    assert service.eos_token_ids == (3, service.tokenizer.eos_token_id)
    assert "tokenizer has 422 tokens and the model 100" in caplog.text
    await service.stop()


def test_eos_comes_from_all_files(folder):
    own = make(folder).tokenizer.eos_token_id
    assert make(folder).defaults.eos_token_ids == (7, own)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert make(folder).defaults.eos_token_ids == (3, 4, own)
    assert make(folder, generation_config="llmd").defaults.eos_token_ids == (3, 4, own)


def test_sampling_defaults(folder):
    values = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "max_new_tokens": 99,
        "do_sample": True,
        "repetition_penalty": None,
    }
    (folder / "generation_config.json").write_text(json.dumps(values))
    service = make(folder)
    params = service.sampling_params({"top_p": 0.5, "temperature": None})
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.5, 20, 99)
    assert service.sampling_params({"max_tokens": None}).max_tokens == 99
    for plain in ("llmd", "vllm"):
        params = make(folder, generation_config=plain).sampling_params({})
        assert (params.temperature, params.top_k, params.max_tokens) == (1.0, 0, 16)
    assert make(folder, generation_config="llmd").sampling_params({"max_tokens": None}).max_tokens is None
    over = make(folder, override_generation_config={"temperature": 0.1, "max_new_tokens": 5}).sampling_params({})
    assert (over.temperature, over.top_p, over.max_tokens) == (0.1, 0.9, 5)
    with pytest.raises(InvalidRequest, match="unexpected"):
        service.sampling_params({"nonsense": 1})


def test_bad_defaults_stop_the_start(folder, tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'temprature', did you mean 'temperature'"):
        make(folder, override_generation_config={"temprature": 1})
    with pytest.raises(ConfigError, match="temperature must be"):
        make(folder, override_generation_config={"temperature": -1})
    with pytest.raises(ConfigError, match="'auto', 'llmd' or a folder"):
        make(folder, generation_config=str(tmp_path / "none"))
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p"):
        make(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        make(folder)


def test_templates_may_be_overridden(folder):
    service = make(folder, chat_template="{{ messages | length }}")
    assert service.render_chat([{"role": "user", "content": "x"}]) == "1"
    assert make(folder).render_chat([{"role": "user", "content": "x"}]) == "x"
    assert service.names == ("tiny",)
    assert make(folder, served_model_name=("a", "b")).names == ("a", "b")


def test_prefix_caches_are_apart_only_where_asked(folder):
    shared, apart = make(folder), make(folder, config=Config(cache=CacheConfig(isolate_keys=True)))
    assert shared._namespace("key", None, None) == shared._namespace("other", None, None) == b""
    names = {
        apart._namespace("key", None, None), apart._namespace("other", None, None), apart._namespace("key", "salt", None),
        shared._namespace("key", "salt", None), shared._namespace("", "sal", "t"), shared._namespace("", "salt", "t"),
    }  # fmt: skip
    assert len(names) == 6


def test_logprob_tokens_have_exact_bytes(folder):
    service = make(folder)
    half = next(number for number in range(VOCAB) if service.tokenizer.token_bytes(number) == b"\xf0")
    assert service.logprob_token(half) == ("\ufffd", b"\xf0")


async def test_a_model_that_is_not_ready_says_so(folder):
    service = make(folder)
    with pytest.raises(NotReady, match="'tiny' is loading"):
        await one(service, "x")
    seen = []
    await service.start(seen.append)
    assert seen[0].phase == "loading the fake"
    assert (service.state, service.max_model_len, service.progress.fraction) == ("ready", 128, 1.0)
    await service.stop()
    assert service.state == "draining"
    with pytest.raises(NotReady, match="draining"):
        await one(service, "x")
    await service.stop()


async def test_a_deadline_ends_a_request(folder):
    service = make(folder, executor=FakeExecutor(fake_info(vocab_size=VOCAB), step_s=0.01))
    await service.start(lambda progress: None)
    delta = await one(service, [1], greedy(max_tokens=100, ignore_eos=True), timeout_s=0.05)
    assert delta.finish_reason is FinishReason.TIMEOUT
    await service.stop()


async def test_a_failed_engine_fails_the_model(folder):
    executor = FakeExecutor(fake_info(vocab_size=VOCAB))
    service = make(folder, executor=executor)
    await service.start(lambda progress: None)
    executor.fail_next = EngineFailure("the device is gone")
    delta = await one(service, [1, 2])
    assert delta.finish_reason is FinishReason.ERROR
    await asyncio.sleep(0)
    assert service.state == "failed"
    with pytest.raises(NotReady, match="failed"):
        await one(service, [1, 2])
    await service.stop()
    assert service.state == "failed"


async def test_loading_that_fails_is_raised(folder):
    executor = FakeExecutor(fake_info(vocab_size=VOCAB))

    async def start(report):
        raise ModelError("shard 1 is truncated")

    executor.start = start
    service = make(folder, executor=executor)
    with pytest.raises(ModelError, match="truncated"):
        await service.start(lambda progress: None)
    assert service.state == "failed"
