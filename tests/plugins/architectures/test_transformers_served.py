"""A model that no plugin knows, served: the engine's preemption and prefix hits, the OpenAI routes, `llmd check`, flags."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from made_tokenizers import write_folder
from model.made_adapters import make_adapter
from model.step_driver import model_parts
from model.test_engine_parity import LENGTHS, NUM_TOKENS, Reader, run
from model.tiny_models import make_model, prompts, reference_generate, save_model
from plugins.openai.openai_server import served_model
from server.serving import call, events_of

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.engine import Engine
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.flags import parse_flags
from llmd.model.executor import ThreadExecutor
from llmd_plugins.scheduling import fcfs

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
COHERE = {
    "hidden_size": 120,
    "sliding_window": 6,
    "pad_token_id": None,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}


async def test_greedy_tokens_through_preemption_and_prefix_hits(tmp_path):
    model = make_model("Cohere2", **COHERE)
    cache = CacheConfig(block_size=4, kv_cache_bytes=60 * 3 * 2 * 4 * 40 * 4)  # 60 blocks: less than all need at once
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=37)
    config = ModelConfig(model="tiny", device="cpu", dtype="float32", max_model_len=100)
    executor = ThreadExecutor(config, cache, scheduler, save_model(model, tmp_path), model_parts())
    reader = Reader()
    [policy] = fcfs.llmd_register_scheduling_policies()
    engine = Engine(executor, scheduler, cache, waiting=policy.build(scheduler), publish=reader.publish)
    info = await engine.start(lambda progress: None)
    assert (info.num_blocks, info.facts["architecture"]) == (60, "Cohere2ForCausalLM")
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    given = {str(index): prompt for index, prompt in enumerate(prompts(*LENGTHS))}
    expected = {name: reference_generate(model, prompt, NUM_TOKENS)[len(prompt) :] for name, prompt in given.items()}
    requests = [Request(request_id=name, prompt=Prompt(tuple(prompt)), params=params) for name, prompt in given.items()]
    assert await run(engine, reader, requests) == expected
    assert engine.stats().num_preemptions > 0
    again = [requests[0], requests[3]]
    for _ in range(2):
        hits = engine.stats().prefix_hits
        assert await run(engine, reader, again) == {"0": expected["0"], "3": expected["3"]}
    assert engine.stats().prefix_hits > hits
    await engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny Olmo2 with a tokenizer, and the model."""
    path = write_folder("byte_level", tmp_path_factory.mktemp("olmo2") / "m", chat_template=TEMPLATE)
    model = make_model("Olmo2", hidden_size=120, vocab_size=430, pad_token_id=None)
    return save_model(model, path), model


async def test_served_with_the_openai_routes(folder):
    path, model = folder
    async with served_model(path) as url:
        listed = (await call(url, "GET", "/v1/models")).json()
        assert [entry["id"] for entry in listed["data"]] == ["tiny"]
        body = {"model": "tiny", "prompt": "the quick brown", "temperature": 0, "max_tokens": 6, "return_token_ids": True}
        answers = await asyncio.gather(*(call(url, "POST", "/v1/completions", body) for _ in range(3)))
        for answer in answers:
            [choice] = answer.json()["choices"]
            token_ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
            assert token_ids == reference_generate(model, choice["prompt_token_ids"], 6)
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "the quick"}], "seed": 3, "max_tokens": 5}
        whole = (await call(url, "POST", "/v1/chat/completions", chat)).json()["choices"][0]["message"]["content"]
        events = await events_of(url, {**chat, "stream": True})
        streamed = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event != "[DONE]")
        assert streamed == whole


async def test_int8_and_an_adapter_together(folder, tmp_path):
    path, model = folder
    made = make_adapter(model, tmp_path / "a", rank=4)
    adapters = {"enable_lora": True, "max_lora_rank": 8, "lora_modules": [{"name": "a", "path": str(made.path)}]}
    body = {"prompt": "the quick brown", "temperature": 0, "max_tokens": 6}
    async with served_model(path, model={"quantization": "int8"}, adapters=adapters) as url:
        texts = []
        for name in ("tiny", "a", "tiny"):
            answer = await call(url, "POST", "/v1/completions", {**body, "model": name})
            assert answer.status == 200, answer.body
            texts.append(answer.json()["choices"][0]["text"])
        assert texts[0] == texts[2] != texts[1]


def checked(path, *lines):
    """What `llmd check` says of a model, without torch."""
    (path.parent / "llmd.toml").write_text("\n".join(["[[models]]", f"model = {json.dumps(str(path))}", *lines]))
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLMD_")}
    code = "import sys\nfrom llmd.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    return subprocess.run(
        [sys.executable, "-c", code, "check", "--config", str(path.parent / "llmd.toml")],
        env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_check_asks_the_fallback_without_torch(folder):
    path, _ = folder
    served = checked(path)
    assert (served.returncode, served.stdout.splitlines()[-1]) == (0, "False"), served.stderr
    refused = checked(path, "model_impl = 'llmd'")
    assert refused.returncode == 78
    assert "architecture Olmo2ForCausalLM is not known; known are " in refused.stderr
    (path.parent / "mamba").mkdir(exist_ok=True)
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (path.parent / "mamba" / "config.json").write_text(json.dumps(config))
    refused = checked(path.parent / "mamba")
    assert refused.returncode == 78
    assert "The fallback cannot serve it: it keeps a recurrent state, not keys and values" in refused.stderr


@pytest.mark.parametrize(
    ("given", "meant"), [("auto", "auto"), ("vllm", "llmd"), ("llmd", "llmd"), ("transformers", "transformers")]
)
def test_the_flag_means_what_it_means_for_vllm(given, meant):
    parsed = parse_flags(["x", "--model-impl", given])
    assert parsed.problems == []
    assert meant in [str(setting.value) for setting in parsed.settings]
