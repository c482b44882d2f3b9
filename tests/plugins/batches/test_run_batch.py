"""`llmd run-batch` with the demo model, as its users call it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from llmd_plugins.batches.command import run_batch


def test_the_demo_model_answers_a_file(tmp_path):
    chat = {"model": "demo", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "max_tokens": 16, "temperature": 0}
    rows = [
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "text", "url": "/v1/completions", "body": {"model": "demo", "prompt": "Hello", "max_tokens": 4}},
        {"custom_id": "message", "url": "/v1/messages", "body": {**chat, "max_tokens": 8}},
        {"custom_id": "items", "url": "/v1/responses", "body": {"model": "demo", "input": "Hello", "max_output_tokens": 8}},
        {"custom_id": "vector", "url": "/v1/embeddings", "body": {"model": "demo", "input": "Hello"}},
        {"custom_id": "score", "url": "/score", "body": {"model": "demo", "text_1": "Hello", "text_2": ["Hello", "no"]}},
        {"custom_id": "order", "url": "/v1/rerank", "body": {"model": "demo", "query": "Hello", "documents": ["a", "b"]}},
        {"custom_id": "wrong", "url": "/v1/chat/completions", "body": {**chat, "temperature": -1}},
        {"custom_id": "nowhere", "url": "/health", "body": {}},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\nnonsense\n")
    flags = ["--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory-bytes", str(32 << 20)]
    command = [sys.executable, "-m", "llmd", "run-batch", "-i", str(source), "-o", str(target), "--model", "demo", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "7 answered, 3 failed" in ended.stderr
    found = {row["custom_id"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert set(found) == {"chat", "text", "message", "items", "vector", "score", "order", "wrong", "nowhere", ""}
    bodies = {name: found[name]["response"]["body"] for name in found}
    assert bodies["message"]["type"] == "message"
    assert bodies["items"]["object"] == "response"
    assert len(bodies["vector"]["data"][0]["embedding"]) > 0
    assert bodies["score"]["data"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert len(bodies["order"]["results"]) == 2
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["content"]
    assert found["chat"]["error"] is None
    assert found["wrong"]["response"]["status_code"] == found["nowhere"]["response"]["status_code"] == 400
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--input-file"),
        (("-i", "nothing.jsonl", "-o", "x", "--model", "demo"), "does not exist"),
        (("-i", "in.jsonl", "-o", "no/where/x", "--model", "demo"), "folder that does not exist"),
        (("-i", "in.jsonl", "-o", "x"), "--model"),
    ],
)
def test_wrong_calls(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("")
    result = CliRunner().invoke(run_batch, list(arguments))
    assert result.exit_code == 2
    assert words in result.output


def test_a_daemon_that_does_not_start(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    command = [
        sys.executable,
        "-m",
        "llmd",
        "run-batch",
        "-i",
        "in.jsonl",
        "-o",
        "out.jsonl",
        "--model",
        "demo",
        "--no-such",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert ended.returncode not in (0, 1)
    assert "--no-such" in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}
