"""Log-probabilities of a live server beside Hugging Face's: values, order, bytes, offsets; streamed, cached, in chunks."""

from __future__ import annotations

import pytest
from made_tokenizers import write_folder
from model.tiny_models import make_model, reference_logits, save_model
from plugins.openai.openai_server import served_model
from server.serving import call, events_of

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROMPT = "Hello 日本 naïve 😀 world, how are you today? 1 2 3"
PROMPTS = [PROMPT, "the quick brown fox", "é"]
KINDS = ("byte_level", "llama", "byte_level_bos")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By the kind of tokenizer: the folder of a tiny model and the model itself."""
    models = {}
    for kind in KINDS:
        path = write_folder(kind, tmp_path_factory.mktemp(kind) / "m", chat_template=TEMPLATE)
        model = make_model("Qwen2" if kind == "llama" else "Llama", vocab_size=430, max_position_embeddings=512)
        models[kind] = save_model(model, path), model
    return models


def served(made, kind, **config):
    return served_model(made[kind][0], **config)


async def post(url, body, path="/v1/completions"):
    answer = await call(url, "POST", path, body)
    assert answer.status == 200, answer.body
    return answer.json()


def reference(model, token_ids):
    """[T, V]: of each token, given those before it; the first row is for the second token."""
    return reference_logits(model, token_ids)[:-1].log_softmax(-1)


def check_completion(choice, model, num_top, is_echo):
    """Every array of `logprobs` against the model and the text."""
    prompt_ids, output_ids = choice["prompt_token_ids"], choice["token_ids"]
    token_ids = [*prompt_ids, *output_ids]
    rows = reference(model, token_ids)
    logprobs, text = choice["logprobs"], choice["text"]
    assert {len(values) for values in logprobs.values()} == {len(token_ids if is_echo else output_ids)}
    values, tops = list(logprobs["token_logprobs"]), list(logprobs["top_logprobs"])
    if is_echo:
        assert values.pop(0) is tops.pop(0) is None
        expected = rows
    else:
        expected = rows[len(prompt_ids) - 1 :]
    chosen = expected[range(len(expected)), token_ids[-len(expected) :]]
    assert values == pytest.approx(chosen.tolist(), abs=1e-3)
    named = logprobs["tokens"][-len(expected) :]
    for top, token, row in zip(tops, named, expected, strict=True):
        assert token in top
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert len(top) <= num_top + 1
        best = row.topk(max(num_top, 1)).values.tolist()
        assert max(top.values()) == pytest.approx(best[0], abs=1e-3) or num_top == 0
        others = [value for name, value in top.items() if name != token]
        assert all(any(abs(value - one) < 1e-3 for one in best) for value in others)
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for token, start, end in zip(logprobs["tokens"], offsets, [*offsets[1:], len(text)], strict=True):
        if end > start and "\ufffd" not in token and "\ufffd" not in text[start:end]:
            assert text[start:end] in (token, token.lstrip(" "))


BASE = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_echo", [False, True])
async def test_completions(made, kind, is_echo):
    async with served(made, kind) as url:
        for num_top in (0, 5):
            body = {**BASE, "prompt": PROMPTS, "logprobs": num_top, "echo": is_echo}
            answer = await post(url, body)
            for choice in answer["choices"]:
                check_completion(choice, made[kind][1], num_top, is_echo)
            await check_streamed(url, body, answer)


async def check_streamed(url, body, whole):
    events = await events_of(url, {**body, "stream": True}, "/v1/completions")
    for expected in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        for name, values in expected["logprobs"].items():
            given = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            assert len(given) == len(values)
            for one, other in zip(given, values, strict=True):  # another batch may round otherwise
                assert one == (other if isinstance(other, str | None) else pytest.approx(other, abs=1e-4))


@pytest.mark.parametrize("kind", KINDS)
async def test_chat(made, kind):
    body = {**BASE, "messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 7}
    async with served(made, kind) as url:
        answer = await post(url, body, "/v1/chat/completions")
        events = await events_of(url, {**body, "stream": True})
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    token_ids = [*answer["prompt_token_ids"], *choice["token_ids"]]
    rows = reference(made[kind][1], token_ids)[len(answer["prompt_token_ids"]) - 1 :]
    assert len(content) == len(rows) == 12
    for entry, row, token_id in zip(content, rows, choice["token_ids"], strict=True):
        assert entry["logprob"] == pytest.approx(row[token_id].item(), abs=1e-3)
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == pytest.approx(row.topk(7).values.tolist(), abs=1e-3)
        assert values == sorted(values, reverse=True)
        for one in (entry, *entry["top_logprobs"]):
            assert bytes(one["bytes"]).decode(errors="replace") == one["token"]
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
    assert text.replace("\ufffd", "").strip() == choice["message"]["content"].replace("\ufffd", "").strip()
    streamed = [
        entry for event in events for part in event["choices"] for entry in (part["logprobs"] or {}).get("content", [])
    ]
    assert streamed == content


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.8, "seed": 3, "top_k": 20, "presence_penalty": 1}, {"min_tokens": 3}]
)
async def test_they_are_the_models_own_whatever_changes_the_choice(made, sampling):
    """Raw log-softmax of the logits: neither temperature nor filters nor penalties move them."""
    async with served(made, "byte_level") as url:
        answer = await post(url, {**BASE, "prompt": PROMPT, "logprobs": 2, "logit_bias": {"70": 3}, **sampling})
    check_completion(answer["choices"][0], made["byte_level"][1], 2, False)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("chunk", [None, 8])
async def test_prompts_in_chunks_and_several_sequences(made, chunk, n):
    """A prompt is scored once, however many sequences continue it and in however many steps it is computed."""
    config = {} if chunk is None else {"scheduler": {"max_num_batched_tokens": chunk, "max_num_seqs": 4}}
    model = made["byte_level"][1]
    async with served(made, "byte_level", **config) as url:
        body = {**BASE, "temperature": 1, "seed": 5, "n": n, "prompt": PROMPT, "logprobs": 3, "prompt_logprobs": 4}
        for _ in range(2):
            answer = await post(url, {**body, "echo": True})
            assert len(answer["choices"]) == n
            for choice in answer["choices"]:
                check_completion(choice, model, 3, True)
                check_prompt(choice["prompt_logprobs"], choice["prompt_token_ids"], model, 4)
            await check_streamed(
                url, {name: body[name] for name in body if name != "prompt_logprobs"} | {"echo": True}, answer
            )


def check_prompt(given, token_ids, model, num_top):
    assert given[0] is None
    assert len(given) == len(token_ids)
    for entry, row, token_id in zip(given[1:], reference(model, token_ids), token_ids[1:], strict=True):
        assert {token: one["logprob"] for token, one in entry.items()} == {
            token: pytest.approx(row[int(token)].item(), abs=1e-3) for token in entry
        }
        assert entry[str(token_id)]["rank"] == (row > row[token_id]).sum().item() + 1
        top = {str(token) for token in row.topk(num_top).indices.tolist()}
        assert len(top - set(entry)) <= 1  # equal logits may change places
        assert len(entry) <= num_top + 1


async def test_prompt_logprobs_of_a_conversation(made):
    body = {**BASE, "messages": [{"role": "user", "content": PROMPT}], "prompt_logprobs": 2, "n": 2}
    async with served(made, "llama") as url:
        answer = await post(url, body, "/v1/chat/completions")
    check_prompt(answer["prompt_logprobs"], answer["prompt_token_ids"], made["llama"][1], 2)


async def test_behind_a_cached_prefix(made):
    model = made["byte_level"][1]
    async with served(made, "byte_level", cache={"block_size": 8, "kv_cache_bytes": 16 << 20}) as url:
        body = {**BASE, "prompt": PROMPT, "logprobs": 5}
        first, second = [await post(url, body) for _ in range(2)]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
        for answer in (first, second, await post(url, {**body, "echo": True})):
            check_completion(answer["choices"][0], model, 5, answer["choices"][0]["text"].startswith(PROMPT))
        extended = await post(url, {**body, "prompt": PROMPT + first["choices"][0]["text"].replace("\ufffd", "")})
        check_completion(extended["choices"][0], model, 5, False)


async def test_the_loglikelihood_of_a_continuation(made):
    """As lm-eval asks for it: the prompt alone, echoed, and the sum over the continuation's tokens."""
    model = made["byte_level"][1]
    async with served(made, "byte_level") as url:
        body = {"prompt": [[5, 60, 71, 82, 93, 104]], "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True}
        choice = (await post(url, body))["choices"][0]
        rows = reference(model, body["prompt"][0])
        wanted = sum(rows[position - 1, body["prompt"][0][position]].item() for position in (3, 4, 5))
        assert sum(choice["logprobs"]["token_logprobs"][3:]) == pytest.approx(wanted, abs=3e-3)
        one_more = await post(url, {**body, "max_tokens": 1})
        assert len(one_more["choices"][0]["logprobs"]["tokens"]) == 7


async def test_a_stop_string_takes_its_logprobs_along(made):
    async with served(made, "byte_level") as url:
        whole = (await post(url, {**BASE, "prompt": PROMPT, "logprobs": 1}))["choices"][0]
        stop = next(token for token in whole["logprobs"]["tokens"][3:] if token.strip() and "\ufffd" not in token)
        body = {**BASE, "prompt": PROMPT, "logprobs": 1, "stop": stop}
        answer = await post(url, body)
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert whole["text"].startswith(choice["text"])
        assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
        for name, values in choice["logprobs"].items():
            assert whole["logprobs"][name][: len(values)] == values
        await check_streamed(url, body, answer)
