"""Deltas into text: stop strings, logprobs with their text, the final delta, slow and closed readers, failures."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import LINES

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason, SequenceDelta, TokenLogprobs
from llmd.text.output import OutputProcessor
from llmd.text.stream import TextDelta, merge


class Engine:
    """Remembers what it is told."""

    def __init__(self):
        self.finished, self.aborted = [], []

    def finish(self, request_id, index, reason):
        self.finished.append((request_id, index, reason))

    def abort(self, request_id):
        self.aborted.append(request_id)


class Setup:
    """One request against the processor; deltas are what an engine would send."""

    def __init__(self, tokenizer, *, max_buffer_bytes=1 << 20, eos=(), prompt=(), params=None, **sampling):
        self.tokenizer, self.engine = tokenizer, Engine()
        self.outputs = OutputProcessor(tokenizer, max_buffer_bytes=max_buffer_bytes)
        self.outputs.bind(self.engine)
        params = params or SamplingParams(max_tokens=None, **sampling)
        self.request = Request(request_id="r", prompt=Prompt(tuple(prompt)), params=params, eos_token_ids=eos)
        self.stream = self.outputs.open(self.request)

    def publish(self, *token_ids, index=0, **fields):
        self.outputs.publish([SequenceDelta("r", index, token_ids, **fields)])

    def say(self, text, chunk=1, **last):
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids), chunk):
            is_last = start + chunk >= len(ids)
            self.publish(*ids[start : start + chunk], **(last if is_last else {}))
        return ids


async def read(stream):
    return [delta async for deltas in stream for delta in deltas]


@pytest.fixture
def tokenizer(tokenizers_made):
    return tokenizers_made["byte_level"]


async def test_text_comes_as_it_is_made_and_ends_once(tokenizer):
    setup = Setup(tokenizer)
    ids = setup.say(LINES[2], finish_reason=FinishReason.LENGTH)
    setup.publish(5, finish_reason=FinishReason.LENGTH)  # a late row
    (delta,) = await setup.stream.collect()
    assert delta.text == LINES[2]
    assert list(delta.token_ids) == ids
    assert delta.finish_reason is FinishReason.LENGTH
    assert setup.stream.num_output_tokens == len(ids)
    assert setup.outputs.num_open == 0
    setup.stream.close()
    assert setup.engine.aborted == setup.engine.finished == []


async def test_a_reader_sees_each_step(tokenizer):
    setup = Setup(tokenizer)
    reader = asyncio.ensure_future(read(setup.stream))
    for token_id in tokenizer.encode("Hello world", add_special_tokens=False):
        setup.publish(token_id)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    setup.publish(finish_reason=FinishReason.ABORT)
    deltas = await reader
    assert len(deltas) > 2
    assert "".join(delta.text for delta in deltas) == "Hello world"
    assert [delta.finish_reason for delta in deltas][-1] is FinishReason.ABORT
    assert sum(delta.finish_reason is not None for delta in deltas) == 1
    assert setup.stream.first_token_s <= setup.stream.finished_s


async def test_half_a_character_waits_with_its_tokens(tokenizer):
    setup = Setup(tokenizer)
    ids = tokenizer.encode("🦀", add_special_tokens=False)
    assert len(ids) > 1
    for token_id in ids[:-1]:
        setup.publish(token_id, num_cached_tokens=7)
    assert setup.stream._buffer == []
    setup.publish(ids[-1])
    (delta,) = await anext(setup.stream)
    assert (delta.text, list(delta.token_ids), delta.num_cached_tokens) == ("🦀", ids, 7)
    assert setup.stream.num_cached_tokens == 7
    setup.stream.close()


async def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    setup = Setup(tokenizer)
    setup.publish(*tokenizer.encode("a🦀", add_special_tokens=False)[:-1], finish_reason=FinishReason.LENGTH)
    assert (await setup.stream.collect())[0].text == "a\ufffd"


async def test_the_token_that_ends_is_not_shown(tokenizer):
    eos = tokenizer.eos_token_id
    for shown, text in ((False, "Hello"), (True, "Hello<|im_end|>")):
        setup = Setup(tokenizer, eos=(eos,), include_stop_str_in_output=shown, skip_special_tokens=False)
        setup.say("Hello")
        setup.publish(eos, finish_reason=FinishReason.STOP)
        (delta,) = await setup.stream.collect()
        assert (delta.text, delta.stop_reason, delta.token_ids[-1]) == (text, None, eos)


async def test_stop_token_ids_are_named(tokenizer):
    stop = tokenizer.encode("!", add_special_tokens=False)[0]
    setup = Setup(tokenizer, stop_token_ids=(stop,))
    setup.say("Hi")
    setup.publish(stop, finish_reason=FinishReason.STOP, stop_token_id=stop)
    (delta,) = await setup.stream.collect()
    assert (delta.text, delta.stop_reason) == ("Hi", stop)


async def test_a_last_token_that_is_no_stop_token_is_shown(tokenizer):
    setup = Setup(tokenizer, eos=(tokenizer.eos_token_id,))
    setup.say('{"a":1}', finish_reason=FinishReason.STOP)  # a grammar that is complete
    assert (await setup.stream.collect())[0].text == '{"a":1}'


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from(LINES),
    first=st.integers(0, 50),
    length=st.integers(1, 6),
    chunk=st.integers(1, 7),
    include=st.booleans(),
    min_tokens=st.integers(0, 12),
    logprobs=st.none() | st.just(0),
)
def test_stop_strings_whatever_the_chunks(tokenizers_made, text, first, length, chunk, include, min_tokens, logprobs):
    tokenizer = tokenizers_made["byte_level"]
    stop = text[first % len(text) :][:length]
    params = {"stop": (stop,), "include_stop_str_in_output": include, "min_tokens": min_tokens, "logprobs": logprobs}
    asyncio.run(check_stop(tokenizer, text, stop, chunk, params))


async def check_stop(tokenizer, text, stop, chunk, params):
    setup = Setup(tokenizer, **params)
    ids = setup.say(text, chunk)
    setup.publish(finish_reason=FinishReason.LENGTH)
    (delta,) = await setup.stream.collect()
    assert setup.stream.num_output_tokens == len(delta.token_ids)
    texts = [tokenizer.decode(ids[: count + 1]).rstrip("\ufffd") for count in range(len(ids))]
    floor = len(texts[params["min_tokens"] - 1]) if params["min_tokens"] else 0
    found = next((end for end in range(floor + 1, len(text) + 1) if text[:end].endswith(stop)), None)
    if found is None:
        assert (delta.text, delta.finish_reason) == (text, FinishReason.LENGTH)
        assert setup.engine.finished == []
        return
    assert delta.text == text[: found if params["include_stop_str_in_output"] else found - len(stop)]
    assert (delta.finish_reason, delta.stop_reason) == (FinishReason.STOP, stop)
    assert setup.engine.finished == [("r", 0, FinishReason.STOP)]
    assert len(delta.token_ids) == next(count for count, shown in enumerate(texts, 1) if len(shown) >= found)


async def test_a_stop_string_in_the_last_step_wins(tokenizer):
    setup = Setup(tokenizer, stop="world")
    setup.say("Hello world", finish_reason=FinishReason.LENGTH)
    (delta,) = await setup.stream.collect()
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("Hello ", FinishReason.STOP, "world")
    assert setup.engine.finished == []  # the engine knows that it is over


async def test_held_text_comes_with_the_end(tokenizer):
    setup = Setup(tokenizer, stop="world!!")
    setup.say("Hello world")
    setup.publish(finish_reason=FinishReason.LENGTH)
    assert (await setup.stream.collect())[0].text == "Hello world"


async def test_logprobs_travel_with_their_text(tokenizer):
    setup = Setup(tokenizer, logprobs=1, stop="🦀🦀")
    text = "ab 🦀 cd"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for token_id in ids:
        setup.publish(token_id, logprobs=[TokenLogprobs(token_id, -1.0, 1, (token_id,), (-1.0,))])
    setup.publish(finish_reason=FinishReason.LENGTH)
    deltas = []
    async for batch in setup.stream:
        deltas += batch
    merged = merge(deltas)[0]
    assert [row.token_id for row in merged.logprobs] == ids == list(merged.token_ids)
    starts = [len(tokenizer.decode(ids[:count]).rstrip("\ufffd")) for count in range(len(ids))]
    assert merged.text_offsets == starts
    for delta in deltas:
        assert len(delta.token_ids) == len(delta.logprobs or ())


async def test_n_sequences_end_each_for_itself(tokenizer):
    setup = Setup(tokenizer, n=3)
    for index, word in enumerate(("one", "two", "three")):
        ids = tokenizer.encode(word, add_special_tokens=False)
        setup.publish(*ids, index=index, finish_reason=FinishReason.LENGTH if index else None)
    assert not setup.stream.is_finished
    setup.publish(finish_reason=FinishReason.STOP)
    deltas = await setup.stream.collect()
    assert [(delta.index, delta.text) for delta in deltas] == [(0, "one"), (1, "two"), (2, "three")]


async def test_prompt_logprobs_and_vectors_pass_through(tokenizer):
    setup = Setup(tokenizer, prompt_logprobs=0)
    rows = [TokenLogprobs(1, -1.0, 1, (), ()), TokenLogprobs(2, -1.0, 1, (), ())]
    setup.publish(prompt_logprobs=rows[:1])
    assert setup.stream.first_token_s is None
    setup.publish(prompt_logprobs=rows[1:])
    setup.say("x", finish_reason=FinishReason.LENGTH)
    (delta,) = await setup.stream.collect()
    assert (delta.text, delta.prompt_logprobs) == ("x", rows)
    pooling = Setup(tokenizer, params=PoolingParams())
    pooling.publish(pooled=[1.0, 2.0], finish_reason=FinishReason.STOP, queue_s=0.5)
    (delta,) = await pooling.stream.collect()
    assert delta.pooled == [1.0, 2.0]
    assert pooling.stream.queued_s == pooling.request.arrival_s + 0.5


async def test_without_detokenizing_ids_come_at_once(tokenizer):
    setup = Setup(tokenizer, detokenize=False)
    setup.publish(5)
    assert (await anext(setup.stream))[0] == TextDelta("r", 0, "", (5,))
    setup.stream.close()


async def test_a_failing_tokenizer_ends_only_its_sequence(tokenizer, monkeypatch, caplog):
    setup = Setup(tokenizer, n=2)
    other = setup.outputs.open(Request(request_id="o", prompt=Prompt((1,)), params=SamplingParams()))
    setup.outputs._open["r"][1][0]._detokenizer = None.__class__  # has no feed
    setup.publish(5)
    setup.publish(6)
    setup.publish(*tokenizer.encode("fine"), index=1, finish_reason=FinishReason.LENGTH)
    setup.outputs.publish([SequenceDelta("o", 0, tokenizer.encode("too"), finish_reason=FinishReason.LENGTH)])
    first, second = await setup.stream.collect()
    assert (first.finish_reason, first.error) == (FinishReason.ERROR, "the tokenizer failed on the output")
    assert (second.text, second.error) == ("fine", None)
    assert (await other.collect())[0].text == "too"
    assert setup.engine.finished == [("r", 0, FinishReason.ERROR)]
    assert "request r, sequence 0" in caplog.text


async def test_a_slow_reader_gets_merged_deltas(tokenizer):
    setup = Setup(tokenizer)
    setup.say("Hello world, this is it")
    (delta,) = await anext(setup.stream)
    assert delta.text == "Hello world, this is it"
    assert delta.finish_reason is None
    setup.stream.close()


async def test_an_aborted_request_tells_its_reader_once(tokenizer):
    setup = Setup(tokenizer, n=2)
    setup.say("Hello", finish_reason=FinishReason.STOP)
    for _ in range(2):
        setup.outputs.abort("r", "an operator asked for it")
    setup.outputs.abort("unknown", "an operator asked for it")
    first, second = await setup.stream.collect()
    assert (first.text, first.finish_reason) == ("Hello", FinishReason.STOP)
    assert (second.finish_reason, second.error) == (FinishReason.ABORT, "an operator asked for it")
    assert setup.engine.aborted == ["r"]
    assert setup.outputs.num_open == 0


async def test_a_reader_too_slow_is_cut_off(tokenizer):
    setup = Setup(tokenizer, max_buffer_bytes=20_000, n=2)
    for _ in range(1000):
        setup.publish(*tokenizer.encode("word "))
    assert setup.engine.aborted == ["r"]
    assert setup.stream.is_too_slow
    assert len(setup.stream._buffer) < 200
    first, second = await setup.stream.collect()
    assert first.text.startswith("word word ")
    assert first.finish_reason is second.finish_reason is FinishReason.ABORT
    assert "more than 20000 bytes" in first.error
    setup.stream.close()
    assert setup.engine.aborted == ["r"]


async def test_one_big_delta_is_not_the_readers_fault(tokenizer):
    setup = Setup(tokenizer, max_buffer_bytes=1000, prompt_logprobs=5)
    setup.publish(prompt_logprobs=[TokenLogprobs(1, -1.0, 1, (1,) * 5, (-1.0,) * 5)] * 1000)
    assert len((await anext(setup.stream))[0].prompt_logprobs) == 1000
    assert setup.engine.aborted == []
    setup.stream.close()


async def test_closing_aborts_once_and_ends_the_reading(tokenizer):
    setup = Setup(tokenizer)
    reader = asyncio.ensure_future(read(setup.stream))
    await asyncio.sleep(0)
    setup.stream.close()
    setup.stream.close()
    setup.publish(5)
    assert await reader == []
    assert setup.engine.aborted == ["r"]
    assert setup.outputs.num_open == 0
    async with setup.outputs.open(setup.request):
        pass
    assert setup.engine.aborted == ["r", "r"]


async def test_a_failed_engine_ends_everything(tokenizer):
    setup = Setup(tokenizer, n=2)
    setup.say("Hi")
    setup.publish(5, index=1, finish_reason=FinishReason.LENGTH)
    error = RuntimeError("gone")
    setup.outputs.fail_all(error)
    setup.outputs.fail_all(error)
    first, second = await setup.stream.collect()
    assert (first.text, first.finish_reason, first.error) == ("Hi", FinishReason.ERROR, "the engine failed")
    assert second.finish_reason is FinishReason.LENGTH
    assert setup.stream.error is error
