"""Other people's clients against a live daemon: litellm, langchain-openai, instructor, cohere and lm-eval.

They run in an environment of their own (requirements.txt beside this file), which `make test` builds: what they need
excludes what llmd is tested with. Each program tells what it found; here it is compared with plain HTTP and with
transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest
import torch
from daemons import ROOT, Daemon
from model.tiny_encoders import make_encoder, save_tokenizer, write_sentence_files
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmd_plugins.sources.demo as demo

PROGRAMS = Path(__file__).parent / "programs"
CLIENTS = ROOT / ".venv" / "clients"
PYTHON = CLIENTS / "bin" / "python"
KEY = "only-for-tests"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}

pytestmark = pytest.mark.skipif(
    not (CLIENTS / ".installed").exists(), reason="the clients' environment is not built: make test builds it"
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """The demo model, an embedder and a cross-encoder, behind a key."""
    path = tmp_path_factory.mktemp("clients")
    embedder = make_encoder("Qwen3Model", num_key_value_heads=1, head_dim=20)
    cross = make_encoder("BertForSequenceClassification", num_labels=1)
    for name, model in {"embedder": embedder, "cross": cross}.items():
        model.save_pretrained(path / name)
        save_tokenizer(path / name, ends_with_eos=name == "embedder")
    write_sentence_files(path / "embedder", pooling={"pooling_mode_lasttoken": True})
    config = path / "embedder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "matryoshka_dimensions": [8, 32]}))
    tables = [("demo", "demo"), (str(path / "embedder"), "embedder"), (str(path / "cross"), "cross")]
    models = "".join(
        f'[[models]]\nmodel = "{folder}"\nserved_model_name = ["{name}"]\ndevice = "cpu"\ndtype = "float32"\n'
        for folder, name in tables
    )
    (path / "llmd.toml").write_text(f'{models}[cache]\nkv_cache_bytes = 64000000\n[server]\napi_keys = ["{KEY}"]\n')
    with Daemon("--config", "llmd.toml", cwd=path, fake=False, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000") as daemon:
        yield daemon.ready()


def run(name: str, daemon: Daemon) -> dict:
    """What a client program found."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    env = {
        **kept, "LLMD_TEST_URL": daemon.url, "LLMD_TEST_KEY": KEY, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, PROGRAMS / f"use_{name}.py"], env=env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def post(daemon: Daemon, path: str, **body):
    """The answer over plain HTTP."""
    status, answer = daemon.get(path, body, Authorization=f"Bearer {KEY}")
    assert status == 200, answer
    return answer


def chat_text(daemon: Daemon) -> str:
    """What the demo model answers to the programs' question."""
    ask = [{"role": "user", "content": "What is 12 + 30?"}]
    answer = post(daemon, "/v1/chat/completions", model="demo", messages=ask, temperature=0, max_tokens=24)
    return answer["choices"][0]["message"]["content"]


def plain_text(daemon: Daemon) -> str:
    """How it continues the programs' text."""
    answer = post(daemon, "/v1/completions", model="demo", prompt="one two", temperature=0, max_tokens=5)
    return answer["choices"][0]["text"]


def check_call(name: str, arguments: dict) -> None:
    """A forced call follows its function's schema."""
    assert name == "get_weather"
    jsonschema.validate(arguments, CITY)


def test_litellm(daemon):
    found = run("litellm", daemon)
    text = chat_text(daemon)
    assert [found["whole"], found["sync"], found["text"], found["messages"]] == [text] * 4
    assert found["whole_tokens"] == found["num_tokens"] > 0
    assert found["plain"] == plain_text(daemon)
    assert found["plain_tokens"] <= 5
    check_call(found["call"][0], json.loads(found["call"][1]))
    errors = [found[name] for name in ("unknown_model", "wrong_key", "bad_field")]
    assert errors == ["NotFoundError", "AuthenticationError", "BadRequestError"]


def test_langchain(daemon):
    found = run("langchain", daemon)
    text = chat_text(daemon)
    assert [found["whole"], found["sync"], found["text"], found["responses"]] == [text] * 4
    assert found["usage"] > 0
    assert found["plain"] == plain_text(daemon)
    check_call(*found["call"])
    jsonschema.validate(found["structured"], CITY)
    wanted = post(daemon, "/v1/embeddings", model="embedder", input=["a red cat", "a blue dog"])["data"]
    assert torch.allclose(torch.tensor(found["vectors"]), torch.tensor([row["embedding"] for row in wanted]), atol=1e-5)
    assert len(found["short"]) == 8


def test_instructor(daemon):
    found = run("instructor", daemon)
    assert found["num_parts"] > 1
    for trip in (found["tools"], found["schema"], found["last"]):
        assert len(trip["city"]) <= 12
        assert 1 <= trip["days"] <= 9
        assert trip["unit"] in ("C", "F")
    assert found["last"] == found["schema"], "the last part is the whole"


def test_cohere(daemon):
    found = run("cohere", daemon)
    documents = ["a red cat", "the stock market", "a blue dog", "cats and dogs"]
    wanted = post(daemon, "/rerank", model="cross", query="cat", documents=documents)["results"]
    order = [[row["index"], pytest.approx(row["relevance_score"], abs=1e-6)] for row in wanted]
    assert found["newer"] == order
    assert found["older"] == order
    assert found["best"] == order[:2]
    assert found["status"] == 404


def test_lm_eval(daemon):
    found = run("lm_eval", daemon)
    folder = Path(demo.__file__).parent / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (context, more), single, batched in zip(found["pairs"], found["single"], found["batched"], strict=True):
        logprob, is_greedy = reference(model, tokenizer, context, more)
        for given in (single, batched):
            assert given == [pytest.approx(logprob, abs=1e-3), is_greedy]
    assert found["rolling"][0] < 0
    assert isinstance(found["text"], str)
    assert "\n" not in found["text"]


def reference(model, tokenizer, context: str, more: str) -> tuple[float, bool]:
    """The log-likelihood of a continuation by transformers, and whether each of its tokens is the likeliest."""
    ids = tokenizer(context + more, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    rows, tokens = logprobs[start - 1 : -1], ids[0, start:]
    return rows[torch.arange(len(tokens)), tokens].sum().item(), bool((rows.argmax(-1) == tokens).all())
