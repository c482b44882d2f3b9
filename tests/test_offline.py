"""LLM over the demo model: vLLM's calls and objects, bad input, a running loop, Ctrl-C, shutdown."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from llmd import LLM, PoolingParams, SamplingParams
from llmd.errors import ConfigError, InvalidRequest
from llmd.offline import EmbeddingRequestOutput, Logprob, PoolingRequestOutput, RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", dtype="float32", max_model_len=256, kv_cache_bytes=32 << 20, max_num_seqs=8) as llm:
        yield llm


def test_one_prompt(llm):
    (output,) = llm.generate("Hello", GREEDY, use_tqdm=False)
    assert isinstance(output, RequestOutput)
    assert output.prompt == "Hello"
    assert output.prompt_token_ids == llm._service.tokenizer.encode("Hello")
    assert output.finished
    (completion,) = output.outputs
    assert completion.text == llm._service.tokenizer.decode(completion.token_ids)
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert len(completion.token_ids) == 8
    assert completion.logprobs is completion.cumulative_logprob is output.prompt_logprobs is None
    assert completion.finished()
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.time_in_queue >= 0


def test_every_form_of_a_prompt(llm):
    ids = llm._service.tokenizer.encode("Hello")
    forms = [
        "Hello",
        ids,
        tuple(ids),
        {"prompt": "Hello"},
        {"prompt_token_ids": ids},
        {"prompt": "Hello", "cache_salt": "s"},
    ]
    texts = [output.outputs[0].text for output in llm.generate(forms, GREEDY, use_tqdm=False)]
    assert len(set(texts)) == 1
    assert [output.prompt for output in llm.generate(forms[:2], GREEDY, use_tqdm=False)] == ["Hello", None]
    for one in (ids, {"prompt": "Hello"}):
        assert llm.generate(one, GREEDY, use_tqdm=False)[0].outputs[0].text == texts[0]
    assert llm.generate(prompt_token_ids=[ids], sampling_params=GREEDY, use_tqdm=False)[0].outputs[0].text == texts[0]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_many_prompts_keep_their_order_and_params(llm):
    prompts = [f"Count to {number}:" for number in range(40)]
    params = [SamplingParams(temperature=0, max_tokens=1 + number % 5, ignore_eos=True) for number in range(40)]
    outputs = llm.generate(prompts, params, use_tqdm=False, priority=list(range(40)))
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + number % 5 for number in range(40)]
    alone = llm.generate(prompts[7], params[7], use_tqdm=False)[0].outputs[0]
    assert outputs[7].outputs[0].token_ids == alone.token_ids


def test_logprobs(llm):
    params = SamplingParams(
        temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True, skip_special_tokens=False
    )
    (output,) = llm.generate("Hello world", params, use_tqdm=False)
    completion = output.outputs[0]
    for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert 2 <= len(entry) <= 3
        assert isinstance(entry[token_id], Logprob)
        assert entry[token_id].rank == 1
    text = "".join(entry[i].decoded_token for i, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    assert text == completion.text
    assert completion.cumulative_logprob == pytest.approx(
        sum(entry[i].logprob for i, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    assert [set(entry) >= {i} for i, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True) if entry]
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_several_continuations_and_seeds(llm):
    params = SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("Once", params, use_tqdm=False)[0].outputs for _ in range(2))
    assert [completion.index for completion in first] == [0, 1, 2]
    assert [completion.text for completion in first] == [completion.text for completion in second]
    assert len({completion.text for completion in first}) > 1


def test_stop_strings(llm):
    text = (
        llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)[0]
        .outputs[0]
        .text
    )
    stop = text[5:8]
    (output,) = llm.generate(
        "Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=stop), use_tqdm=False
    )
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == text[: text.index(stop)]


def test_chat(llm):
    params = SamplingParams(temperature=0, max_tokens=20)
    (output,) = llm.chat(CHAT, params, use_tqdm=False)
    assert output.prompt == llm.get_tokenizer().apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert output.outputs[0].text
    several = llm.chat([CHAT, CHAT], params, use_tqdm=False)
    assert [one.outputs[0].text for one in several] == [output.outputs[0].text] * 2
    begun = [*CHAT, {"role": "assistant", "content": "3 + 4 is"}]
    continued = llm.chat(begun, params, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert continued[0].prompt.endswith("3 + 4 is")
    assert "<tools>" in llm.chat(CHAT, params, use_tqdm=False, tools=[{"type": "function"}])[0].prompt


def test_defaults_come_from_the_model(llm):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p) == (0.7, 0.9)
    assert llm.generate("Hello", use_tqdm=False)[0].outputs[0].token_ids


def test_embeddings(llm):
    first, second = llm.embed(["Hello", "Hello"], use_tqdm=False)
    assert isinstance(first, EmbeddingRequestOutput)
    assert first.outputs.hidden_size == len(first.outputs.embedding) == 256
    assert sum(value * value for value in first.outputs.embedding) == pytest.approx(1, rel=1e-3)
    assert second.outputs.embedding == pytest.approx(first.outputs.embedding, abs=1e-4)
    (pooled,) = llm.encode("Hello", PoolingParams(normalize=False), use_tqdm=False)
    assert isinstance(pooled, PoolingRequestOutput)
    assert len(pooled.outputs.data) == 256


def test_max_tokens_may_reach_past_the_context(llm):
    (output,) = llm.generate([[5] * 250], SamplingParams(max_tokens=1000, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt 1: the prompt is empty"),
        ([5] * 256, "prompt 1: the prompt has 256 tokens"),
        ([1, 99999], "prompt 1: .* 99999"),
        (["a", 1], "integer token ids"),
        ({"text": "x"}, "not 'text'"),
        ({}, "needs 'prompt'"),
        ({"prompt": 5}, "needs 'prompt'"),
        ("a\ud800", "surrogate"),
    ],
)
def test_a_bad_prompt_raises_before_anything_runs(llm, prompt, words):
    before = llm._service.engine.stats().admitted
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(["Hello", prompt], GREEDY, use_tqdm=False)
    assert llm._service.engine.stats().admitted == before


def test_wrong_calls_say_what_is_wrong(llm):
    with pytest.raises(ValueError, match="2 sampling or pooling params for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="2 priorities for 1"):
        llm.generate("x", GREEDY, priority=[1, 2])
    with pytest.raises(TypeError, match="either prompts or prompt_token_ids"):
        llm.generate(sampling_params=GREEDY)
    with pytest.raises(InvalidRequest, match="messages must be a list"):
        llm.chat([[]], GREEDY)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_model_length": 5}, TypeError, "did you mean 'max_model_len'"),
        ({"nonsense_at_all": 5}, TypeError, "unexpected keyword 'nonsense_at_all'"),
        ({"gpu_memory_utilization": 1.5}, ConfigError, "gpu_memory_utilization"),
        ({"tensor_parallel_size": 2}, ConfigError, "tensor parallelism"),
        ({"dtype": "int3"}, ConfigError, "dtype"),
        ({"model": "./no/such/folder"}, Exception, "folder"),
    ],
)
def test_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        LLM(**{"model": "demo", **options})


async def test_works_under_a_running_loop(llm):
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_progress_is_shown(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    seen = []

    def bar(**options):
        from tqdm import tqdm

        seen.append(options["total"])
        return tqdm(**options)

    llm.generate(["a", "b"], GREEDY, use_tqdm=bar)
    assert seen == [2]


def test_ctrl_c_aborts_and_leaves_it_usable(llm):
    long = SamplingParams(max_tokens=240, ignore_eos=True)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 200, long, use_tqdm=False)
    timer.join()
    deadline = time.monotonic() + 5
    while llm._service.engine.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = llm._service.engine.stats()
    assert (stats.num_running, stats.num_waiting, llm._service.outputs.num_open) == (0, 0, 0)
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].text


def test_shutdown_ends_the_thread():
    before = threading.active_count()
    llm = LLM("demo", max_model_len=64, kv_cache_bytes=8 << 20)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("x", GREEDY)
    assert threading.active_count() <= before


def test_a_stream_grows_to_the_whole(llm):
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1)
    (whole,) = llm.generate("Hello", params, use_tqdm=False)
    outputs = list(llm.stream("Hello", params))
    assert outputs[-1].outputs == whole.outputs
    assert len(outputs) > 3
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    deltas = [output.outputs[0].text for output in llm.stream("Hello", params, output_kind="delta")]
    assert "".join(deltas) == whole.outputs[0].text
    (chat,) = llm.chat(CHAT, GREEDY, use_tqdm=False)
    assert list(llm.stream_chat(CHAT, GREEDY, add_generation_prompt=True))[-1].outputs == chat.outputs


def test_streams_side_by_side_and_left(llm):
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    for one, other in zip(llm.stream("Hello", long), llm.stream("The cat", long), strict=False):
        assert one.request_id != other.request_id
        break
    left = llm.stream("Once", long)
    next(left)
    left.close()
    assert llm._service.outputs.num_open <= 2  # those of the loop above are closed as garbage
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        llm.stream("", long)
    with pytest.raises(ValueError, match="RequestOutputKind"):
        llm.stream("x", output_kind="some")


def test_a_stream_ends_with_its_llm():
    llm = LLM("demo", max_model_len=256, kv_cache_bytes=16 << 20)
    outputs = llm.stream("Hello", SamplingParams(max_tokens=200, ignore_eos=True))
    next(outputs)
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        list(outputs)
    with pytest.raises(RuntimeError, match="shut down"):
        llm.stream("Hello")
