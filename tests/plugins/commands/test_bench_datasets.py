"""Prompts: lengths, seeds, shared prefixes, files and their mistakes."""

import json
import random

import pytest

from llmd_plugins.commands.bench.datasets import (
    DatasetError,
    RandomLengths,
    custom_requests,
    random_requests,
    random_token_ids,
    sharegpt_requests,
)


def count_words(text: str) -> int:
    return len(text.split())


def test_random_lengths_spread_around_the_mean():
    lengths = RandomLengths(input_len=100, output_len=10, range_ratio=0.5, prefix_len=7)
    requests = random_requests(400, lengths, seed=1, vocab_size=1000)
    inputs = [len(request.prompt) - 7 for request in requests]
    assert min(inputs) >= 50
    assert max(inputs) <= 150
    assert 90 < sum(inputs) / len(inputs) < 110
    assert {request.num_output_tokens for request in requests} == set(range(5, 16))
    assert len({tuple(request.prompt[:7]) for request in requests}) == 1
    assert len({tuple(request.prompt[7:20]) for request in requests}) == 400
    assert all(request.num_prompt_tokens == len(request.prompt) for request in requests)


def test_the_seed_decides():
    lengths = RandomLengths(input_len=8)
    assert random_requests(5, lengths, 3, vocab_size=50) == random_requests(5, lengths, 3, vocab_size=50)
    assert random_requests(5, lengths, 3, vocab_size=50) != random_requests(5, lengths, 4, vocab_size=50)


def test_without_a_vocabulary_prompts_are_words():
    (request,) = random_requests(1, RandomLengths(input_len=20, prefix_len=4), 0, vocab_size=None)
    assert isinstance(request.prompt, str)
    assert count_words(request.prompt) == request.num_prompt_tokens == 24


def test_with_a_tokenizer_prompts_are_its_text():
    lengths = RandomLengths(input_len=3)
    (request,) = random_requests(1, lengths, 0, vocab_size=80, decode=lambda ids: "-".join(map(str, ids)))
    assert len(request.prompt.split("-")) == 3


@pytest.mark.parametrize("vocab_size", [1, 2, 8, 1000])
def test_token_ids_are_of_the_vocabulary(vocab_size):
    ids = random_token_ids(200, vocab_size, random.Random(0))
    assert 0 <= min(ids) <= max(ids) < vocab_size


@pytest.mark.parametrize(
    "fields", [{"range_ratio": 1.0}, {"range_ratio": -0.1}, {"input_len": 0}, {"prefix_len": -1}], ids=str
)
def test_impossible_lengths_are_refused(fields):
    with pytest.raises(DatasetError):
        RandomLengths(**fields)


def exchange(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_sharegpt_takes_the_first_exchange_within_bounds(tmp_path):
    path = tmp_path / "chats.json"
    good = [exchange(f"what is the number {i} like", "it is a very nice number") for i in range(3)]
    bad = [exchange("hi", "hello there my dear friend"), exchange("word " * 1025, "a b c d"), {"conversations": []}, 7, {}]
    path.write_text(json.dumps(bad + good))
    requests = sharegpt_requests(path, 5, 0, count=count_words)
    assert len(requests) == 5
    assert {r.prompt for r in requests} == {entry["conversations"][0]["value"] for entry in good}
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in requests} == {(6, 6)}
    assert sharegpt_requests(path, 1, 0, count=count_words, output_len=99)[0].num_output_tokens == 99


def test_custom_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a b c", "output_tokens": 7},
        {"prompt": [5, 6]},
        {"messages": [{"role": "user", "content": "x y"}]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    requests = custom_requests(path, 4, count=count_words)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in requests] == [(3, 7), (2, 256), (2, 256), (3, 7)]
    assert requests[2].prompt == lines[2]["messages"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: expected"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens must be"),
        ("\n", "no usable prompt"),
        ("[1]", "line 1: expected"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path, text, problem):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=problem):
        custom_requests(path, 3, count=count_words)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '[{"conversations": [1, 2]}]'])
def test_sharegpt_files_without_conversations_are_refused(tmp_path, text):
    path = tmp_path / "chats.json"
    path.write_text(text)
    with pytest.raises(DatasetError):
        sharegpt_requests(path, 3, 0, count=count_words)
