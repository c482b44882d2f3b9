"""AsyncLLM on the test's own loop: streams, aborts, cancellation, many at once, errors of one, life and death."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from itertools import pairwise

import numpy as np
import pytest
from model.tiny_encoders import make_encoder, save_tokenizer

from llmd import LLM, AsyncLLM, BeamSearchParams, PoolingParams, SamplingParams, StructuredOutputsParams
from llmd.errors import ConfigError, InvalidRequest, ModelError
from llmd.offline import EmbeddingRequestOutput, RequestOutputKind

OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_bytes": 32 << 20, "max_num_seqs": 8}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture
async def llm():
    async with AsyncLLM("demo", **OPTIONS) as llm:
        yield llm
        await idle(llm)


async def idle(llm):
    """Wait until the engine holds nothing; its own books are checked there."""
    service = llm._running.service
    for _ in range(500):
        stats = service.engine.stats()
        if not (stats.num_running or stats.num_waiting or service.outputs.num_open):
            assert stats.num_free_blocks == stats.num_blocks
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a request was left behind")


async def last_of(outputs):
    return [output async for output in outputs][-1]


async def test_cumulative_outputs_grow(llm):
    outputs = [output async for output in llm.generate("Hello", GREEDY, "mine")]
    assert {output.request_id for output in outputs} == {"mine"}
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    texts = [output.outputs[0].text for output in outputs]
    assert all(later.startswith(text) and later != text for text, later in pairwise(texts))
    assert len(outputs) > 3
    assert len(outputs[-1].outputs[0].token_ids) == 12
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert outputs[0].prompt == "Hello"
    metrics = outputs[-1].metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time


async def test_every_kind_says_the_same(llm):
    params = SamplingParams(n=3, seed=4, temperature=1, max_tokens=10, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    whole = await last_of(llm.generate("Once upon a time", params))
    (final,) = [output async for output in llm.generate("Once upon a time", params, output_kind="final_only")]
    assert final.outputs == whole.outputs
    assert final.prompt_logprobs == whole.prompt_logprobs
    assert len(whole.prompt_logprobs) == len(whole.prompt_token_ids)
    deltas = [output async for output in llm.generate("Once upon a time", params, output_kind=RequestOutputKind.DELTA)]
    assert [d.prompt_logprobs for d in deltas if d.prompt_logprobs] == [whole.prompt_logprobs]
    for expected in whole.outputs:
        parts = [part for output in deltas for part in output.outputs if part.index == expected.index]
        assert "".join(part.text for part in parts) == expected.text
        assert [token_id for part in parts for token_id in part.token_ids] == expected.token_ids
        assert [entry for part in parts for entry in part.logprobs or ()] == expected.logprobs
        assert sum(part.cumulative_logprob or 0 for part in parts) == pytest.approx(expected.cumulative_logprob)
        assert [part.finish_reason for part in parts if part.finished()] == [expected.finish_reason]


async def test_the_synchronous_llm_says_the_same(llm):
    asynchronous = await last_of(llm.generate("Hello", GREEDY))
    answered = await last_of(llm.chat(CHAT, GREEDY))

    def synchronous():
        with LLM("demo", **OPTIONS) as other:
            return other.generate("Hello", GREEDY, use_tqdm=False)[0], other.chat(CHAT, GREEDY, use_tqdm=False)[0]

    whole, chat = await asyncio.to_thread(synchronous)
    assert asynchronous.outputs == whole.outputs
    assert (answered.outputs, answered.prompt) == (chat.outputs, chat.prompt)


async def test_many_at_once_and_one_that_is_wrong(llm):
    prompts = [f"Count to {number}:" for number in range(60)]
    prompts[7], prompts[30] = "", [1, 99999]
    results = await asyncio.gather(
        *(last_of(llm.generate(prompt, GREEDY, f"r{index}")) for index, prompt in enumerate(prompts)),
        return_exceptions=True,
    )
    assert [index for index, result in enumerate(results) if isinstance(result, InvalidRequest)] == [7, 30]
    alone = await last_of(llm.generate(prompts[59], GREEDY))
    assert results[59].outputs == alone.outputs
    assert all(len(result.outputs[0].token_ids) == 12 for index, result in enumerate(results) if index not in (7, 30))


async def test_a_full_queue_makes_others_wait():
    async with AsyncLLM("demo", **{**OPTIONS, "max_num_seqs": 2, "scheduler.max_waiting_requests": 3}) as llm:
        results = await asyncio.gather(*(last_of(llm.generate("Hi", GREEDY)) for _ in range(24)))
        assert len({result.outputs[0].text for result in results}) == 1
        await idle(llm)


async def test_an_abort_is_the_last_output(llm):
    reasons = {}

    async def read(request_id, **options):
        output = await last_of(llm.generate("Hello", LONG, request_id, **options))
        reasons[request_id] = output.finished, output.outputs[0].finish_reason

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for number, kind in enumerate(RequestOutputKind):
            group.create_task(read(f"a{number}", output_kind=kind))
        other = group.create_task(read("other"))
        await asyncio.sleep(0.1)
        await llm.abort("a0")
        await llm.abort(["a1", "a2", "nobody"])
    assert [reasons[f"a{number}"] for number in range(3)] == [(True, "abort")] * 3
    assert other.done()
    assert reasons["other"] == (True, "length")
    await llm.abort("other")


async def test_an_abort_before_there_is_room():
    async with AsyncLLM("demo", **{**OPTIONS, "max_num_seqs": 1, "scheduler.max_waiting_requests": 1}) as llm:
        tasks = [asyncio.ensure_future(last_of(llm.generate("Hello", LONG, str(number)))) for number in range(6)]
        await asyncio.sleep(0.05)
        await llm.abort(map(str, range(6)))
        outputs = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert all(output.outputs[0].finish_reason == "abort" for output in outputs)
        await idle(llm)


async def test_leaving_and_cancelling_free_the_request(llm):
    async for _ in llm.generate("Hello", LONG, "left"):
        break
    await idle(llm)
    async with aclosing(llm.generate("Hello", LONG, "left")) as outputs:
        await anext(outputs)
    assert llm._running.service.outputs.num_open == 0
    task = asyncio.ensure_future(last_of(llm.generate("Hello", LONG)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(llm)


async def test_an_id_runs_once_at_a_time(llm):
    outputs = llm.generate("Hello", LONG, "same")
    await anext(outputs)
    with pytest.raises(InvalidRequest, match="'same' is already running"):
        await last_of(llm.generate("Hello", GREEDY, "same"))
    assert not (await anext(outputs)).finished
    await outputs.aclose()
    assert (await last_of(llm.generate("Hello", GREEDY, "same"))).finished


async def test_wrong_params_are_refused_and_the_loop_goes_on(llm):
    bad = StructuredOutputsParams(regex="(a")
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        await last_of(llm.generate("Hello", SamplingParams(structured_outputs=bad)))
    with pytest.raises(ValueError, match="RequestOutputKind"):
        llm.generate("Hello", GREEDY, output_kind="all")
    with pytest.raises(InvalidRequest, match="messages"):
        llm.chat([], GREEDY)
    with pytest.raises(TypeError, match="template"):
        llm.chat(CHAT, GREEDY, template="x")


async def test_the_loop_is_free_while_it_generates(llm):
    async def tick():
        ticks = 0
        while True:
            await asyncio.sleep(0)
            ticks += 1
            counted[0] = ticks

    counted = [0]
    task = asyncio.ensure_future(tick())
    await last_of(llm.generate("Hello", GREEDY))
    task.cancel()
    assert counted[0] > 12


async def test_chat_beams_and_vectors(llm):
    texts = [output.outputs[0].text async for output in llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=20))]
    assert texts[-1]
    (beams,) = await llm.beam_search("Hello", BeamSearchParams(beam_width=2, max_tokens=4))
    assert len(beams.sequences) == 2
    first, second = await llm.embed(["Hello", "Hello"])
    assert isinstance(first, EmbeddingRequestOutput)
    assert second.outputs.embedding == pytest.approx(first.outputs.embedding, abs=1e-4)
    (raw,) = await llm.encode([5, 6, 7], PoolingParams(normalize=False))
    assert raw.prompt_token_ids == [5, 6, 7]
    scores = await llm.score("Hello", ["Hello", "The cat"])
    assert scores[0].outputs.score == pytest.approx(1, abs=1e-3)
    assert scores[1].outputs.score < scores[0].outputs.score
    with pytest.raises(InvalidRequest, match="prompt 1: the prompt is empty"):
        await llm.embed(["Hello", ""])
    with pytest.raises(InvalidRequest, match="not a classifier"):
        await llm.classify("Hello")
    assert llm.get_default_sampling_params().temperature == 0.7
    assert (await llm.get_tokenizer()).encode("Hello")


async def test_a_classifier(tmp_path):
    make_encoder("RobertaForSequenceClassification", num_labels=3, type_vocab_size=1).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    async with AsyncLLM(str(tmp_path), dtype="float32", device="cpu") as llm:
        outputs = await llm.classify(["HELLO", "B"])
        assert [np.sum(output.outputs.probs) for output in outputs] == pytest.approx([1, 1], abs=1e-4)
        with pytest.raises(InvalidRequest, match="generates no text"):
            await last_of(llm.generate("HELLO", GREEDY))


async def test_closing_ends_what_runs_and_starts_happen_once():
    before = {thread.name for thread in threading.enumerate()}
    llm = AsyncLLM("demo", **OPTIONS)
    with pytest.raises(RuntimeError, match="not started"):
        llm.generate("Hello")
    await llm.start()
    with pytest.raises(RuntimeError, match="starts once"):
        await llm.start()
    assert "llmd-loop" not in {thread.name for thread in threading.enumerate()}
    task = asyncio.ensure_future(last_of(llm.generate("Hello", LONG)))
    await asyncio.sleep(0.05)
    await llm.close()
    await llm.close()
    assert (await asyncio.wait_for(task, 5)).outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="closed"):
        await llm.abort("x")
    assert {thread.name for thread in threading.enumerate()} - before <= {"asyncio_0", "asyncio_1"}


async def test_closing_may_wait_for_what_runs():
    llm = AsyncLLM("demo", **OPTIONS)
    await llm.start()
    task = asyncio.ensure_future(last_of(llm.generate("Hello", GREEDY)))
    await asyncio.sleep(0.02)
    await llm.close(drain_s=10)
    assert (await task).outputs[0].finish_reason == "length"


async def test_a_start_that_fails(tmp_path):
    with pytest.raises(TypeError, match=r"AsyncLLM\(\) got an unexpected keyword 'dtyp'"):
        AsyncLLM(dtyp="float32")
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        AsyncLLM(gpu_memory_utilization=2)
    llm = AsyncLLM(str(tmp_path))
    with pytest.raises((ConfigError, ModelError)):
        await llm.start()
    with pytest.raises(RuntimeError, match="start failed"):
        llm.generate("Hello")
