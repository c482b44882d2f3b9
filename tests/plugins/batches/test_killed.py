"""A daemon that is killed in the midst of a batch: the next one goes on where it was, and nothing is answered twice."""

from __future__ import annotations

import json
import time

import openai
from daemons import Daemon

COUNT = 60


def daemon(path, step_s):
    return Daemon("serve", "demo", cwd=path, FAKE_STEP_S=str(step_s), LLMD_PLUGINS__BATCHES__MAX_CONCURRENT="2",
                  LLMD_PLUGINS__BATCHES__DIRECTORY=str(path / "state"))  # fmt: skip


def until(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_killed_daemon(tmp_path):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    rows = [{"custom_id": f"r{n}", "url": "/v1/chat/completions", "body": body} for n in range(COUNT)]
    data = "\n".join(map(json.dumps, rows)).encode()
    with daemon(tmp_path, 0.01) as first:
        api = openai.OpenAI(base_url=f"{first.ready().url}/v1", api_key="none", max_retries=0)
        file = api.files.create(file=("in.jsonl", data), purpose="batch")
        batch = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        until(lambda: api.batches.retrieve(batch.id).request_counts.completed > 5)
        first.process.kill()
        first.process.wait()
    journal = tmp_path / "state" / "batches" / f"{batch.id}.output"
    num_before = len(journal.read_bytes().splitlines())
    assert 5 < num_before < COUNT
    with daemon(tmp_path, 0.0) as second:
        api = openai.OpenAI(base_url=f"{second.ready().url}/v1", api_key="none", max_retries=0)
        ended = until(lambda: (one := api.batches.retrieve(batch.id)).status == "completed" and one)
        assert (ended.request_counts.completed, ended.request_counts.failed) == (COUNT, 0)
        answers = [json.loads(line) for line in api.files.content(ended.output_file_id).text.splitlines()]
        assert sorted(row["custom_id"] for row in answers) == sorted(row["custom_id"] for row in rows)
        answered = [line for line in second.lines if "/v1/chat/completions 200" in line]
        assert len(answered) == COUNT - num_before
