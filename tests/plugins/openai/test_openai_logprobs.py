"""Log-probabilities in both formats, of prompts too, streamed and not."""

from __future__ import annotations

import pytest
from server.serving import FakeService, call, events_of, make_context, serving


async def post(body, path="/v1/completions", service=None):
    async with serving(make_context(service)) as url:
        answer = await call(url, "POST", path, body)
    assert answer.status == 200, answer.body
    return answer.json()


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True}


async def test_chat():
    answer = await post({**CHAT, "top_logprobs": 2}, "/v1/chat/completions")
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["w10", "w11"]
    assert content[0] == {
        "token": "w10",
        "logprob": -0.5,
        "bytes": [119, 49, 48],
        "top_logprobs": [
            {"token": "w10", "logprob": -0.5, "bytes": [119, 49, 48]},
            {"token": "w110", "logprob": -1.5, "bytes": [119, 49, 49, 48]},
        ],
    }
    answer = await post(CHAT, "/v1/chat/completions")
    assert [entry["top_logprobs"] for entry in answer["choices"][0]["logprobs"]["content"]] == [[], []]
    answer = await post({**CHAT, "return_tokens_as_token_ids": True}, "/v1/chat/completions")
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:10"


async def test_chat_stream():
    async with serving(make_context()) as url:
        events = await events_of(url, {**CHAT, "top_logprobs": 1, "stream": True})
    tokens = [entry["token"] for event in events for entry in event["choices"][0]["logprobs"]["content"]]
    assert tokens == ["w10", "w11"]


async def test_completion():
    answer = await post({"prompt": "a b", "max_tokens": 3, "logprobs": 2})
    assert answer["choices"][0]["text"] == "t0 t1 t2"
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["w10", "w11", "w12"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"w10": -0.5, "w110": -1.5}, {"w11": -0.5, "w111": -1.5}, {"w12": -0.5, "w112": -1.5}],
        "text_offset": [0, 2, 5],
    }


async def test_echo_scores_the_prompt():
    for max_tokens in (0, 2):
        answer = await post({"prompt": "a b", "max_tokens": max_tokens, "logprobs": 1, "echo": True})
        choice = answer["choices"][0]
        words = ["w10", "w11"][:max_tokens]
        assert choice["text"] == "a b" + "t0 t1" * bool(max_tokens)
        assert choice["logprobs"]["tokens"] == ["w1", "a", "b", *words]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, *[-0.5] * max_tokens]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["text_offset"][3:] == [3, 5][:max_tokens]
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens


async def test_echo_of_token_ids_is_their_text():
    answer = await post({"prompt": [[20, 21]], "max_tokens": 0, "echo": True, "logprobs": 0})
    assert answer["choices"][0]["text"] == "w20 w21"
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [None, {"w21": -0.5}]


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_streamed_echo_says_the_same(max_tokens):
    body = {"prompt": ["a b", "c"], "max_tokens": max_tokens, "logprobs": 1, "echo": True, "n": 2}
    whole = await post(body)
    async with serving(make_context()) as url:
        events = await events_of(url, {**body, "stream": True, "stream_options": {"include_usage": True}}, "/v1/completions")
    assert events.pop()["usage"] == whole["usage"]
    for expected in whole["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        for name, values in expected["logprobs"].items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values
        assert parts[-1]["finish_reason"] == expected["finish_reason"]


async def test_prompt_logprobs():
    service = FakeService()
    answer = await post({"prompt": [20, 21], "max_tokens": 1, "prompt_logprobs": 1}, service=service)
    expected = [None, {"21": {"logprob": -0.5, "rank": 1, "decoded_token": "w21"}}]
    assert answer["choices"][0]["prompt_logprobs"] == expected
    answer = await post({**CHAT, "prompt_logprobs": 0}, "/v1/chat/completions")
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


async def test_token_ids_are_returned_on_request():
    answer = await post({"prompt": [20, 21], "max_tokens": 2, "return_token_ids": True})
    assert answer["choices"][0]["prompt_token_ids"] == [20, 21]
    assert answer["choices"][0]["token_ids"] == [10, 11]
    answer = await post({**CHAT, "return_token_ids": True}, "/v1/chat/completions")
    assert answer["choices"][0]["token_ids"] == [10, 11]
    assert answer["prompt_token_ids"]
