"""LLM.beam_search, and constraints and tools without HTTP, over the demo model."""

from __future__ import annotations

import json

import pytest

from llmd import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from llmd.errors import InvalidRequest

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", dtype="float32", max_model_len=256, kv_cache_bytes=32 << 20, max_num_seqs=8) as llm:
        yield llm


def test_beams(llm):
    prompts = ["Hello", {"prompt_token_ids": [20, 300, 41]}] * 6
    outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5))
    assert len(outputs) == len(prompts)
    assert outputs[0] == outputs[2]
    for output in outputs[:2]:
        scores = [beam.score for beam in output.sequences]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(beam.tokens) for beam in output.sequences}) == 3
    best = outputs[0].sequences[0]
    assert best.text.startswith("Hello")
    num_own = len(best.tokens) - len(llm._service.tokenizer.encode("Hello"))
    assert best.score == pytest.approx(best.cum_logprob / num_own**0.5)
    assert best.finish_reason in ("stop", "length")


def test_one_beam_is_greedy(llm):
    (output,) = llm.beam_search("Hello", BeamSearchParams(beam_width=1, max_tokens=5, ignore_eos=True))
    greedy = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)[0]
    assert output.sequences[0].tokens == [*greedy.prompt_token_ids, *greedy.outputs[0].token_ids]


def test_errors(llm):
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        llm.beam_search([[]], BeamSearchParams(beam_width=2, max_tokens=4))
    with pytest.raises(InvalidRequest, match="max_tokens is 4000"):
        llm.beam_search(["a", "b"], BeamSearchParams(beam_width=2, max_tokens=4000))


def test_a_constraint(llm):
    params = SamplingParams(
        temperature=0, max_tokens=20, structured_outputs=StructuredOutputsParams(choice=["red", "green"])
    )
    assert llm.generate("The colour is", params, use_tqdm=False)[0].outputs[0].text in ("red", "green")


def test_tools_are_shown_to_the_model(llm):
    chat = [{"role": "user", "content": "What is the weather in Paris?"}]
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    params = SamplingParams(temperature=0, max_tokens=60, skip_special_tokens=False)
    text = llm.chat(chat, params, use_tqdm=False, tools=[tool])[0].outputs[0].text
    assert json.loads(text.removeprefix("<tool_call>\n").split("\n</tool_call>")[0])["name"] == "get_weather"
