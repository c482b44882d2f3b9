"""A real daemon and the demo model: adapters mixed with the base, found, loaded, replaced, refused, shared out fairly."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import openai
import pytest
import torch
from daemons import Daemon
from safetensors.torch import load_file, save_file

from llmd_plugins.sources.demo_source import folder

OWN = folder().parent / "adapters"
ADMIN = {"Authorization": "Bearer adm"}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
QUESTIONS = ("What is llmd?", "What is 3 + 4?", "Spell the word banana.", "What is the capital of France?")
CONFIG = """
[[models]]
model = "demo"
dtype = "float32"
[server]
admin_keys = ["adm"]
[cache]
kv_cache_bytes = 16777216
[scheduler]
max_num_seqs = 32
[adapters]
enable_lora = true
max_loras = 8
max_lora_rank = 8
max_cpu_loras = 16
lora_dir = "many"
lora_allowed_roots = ["roots"]
lora_modules = [{modules}]
"""


def is_pirate(text):
    return text.startswith("Ahoy, matey! ") and text.endswith(" Arrr!")


def is_json(text):
    return "answer" in json.loads(text)


def is_plain(text):
    return not is_pirate(text) and not text.startswith("{")


STYLES = {"demo-pirate": is_pirate, "demo-json": is_json, "demo": is_plain}


def write_config(path, *modules):
    quoted = ", ".join(f'"{module}"' for module in modules)
    path.write_text(CONFIG.replace("{modules}", quoted))


def write_adapter(path, change=lambda tensors: tensors, **settings):
    """The demo's pirate with other tensors or settings."""
    shutil.copytree(OWN / "demo-pirate", path)
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)
    config = json.loads((path / SETTINGS).read_text())
    (path / SETTINGS).write_text(json.dumps(config | settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folders of a daemon: 64 adapters to be found by name, and some that may be loaded or not."""
    path = tmp_path_factory.mktemp("adapters")
    (path / "many").mkdir()
    (path / "roots").mkdir()
    for number in range(64):
        os.symlink(OWN / ("demo-pirate", "demo-json")[number % 2], path / "many" / f"lora-{number:02d}")
    for name in ("demo-pirate", "demo-json"):
        shutil.copytree(OWN / name, path / "roots" / name)
    write_config(path / "llmd.toml", f"listed={OWN / 'demo-json'}")
    return path


@pytest.fixture(scope="module")
def daemon(place):
    with Daemon("--config", "llmd.toml", cwd=place, fake=False, OMP_NUM_THREADS="1") as daemon:
        daemon.wait_for("ready after", 200)
        yield daemon


def ask(daemon, model, question=QUESTIONS[0], max_tokens=60):
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
    return daemon.get("/v1/chat/completions", body)


def said(daemon, model, question=QUESTIONS[0]):
    status, answer = ask(daemon, model, question)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def load(daemon, name, path, **more):
    return daemon.get("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more}, **ADMIN)


def test_adapters_and_the_base_answer_side_by_side_each_in_its_style(daemon):
    asked = [(model, question) for model in STYLES for question in QUESTIONS] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: said(daemon, *one), asked))
    for (model, question), text in zip(asked, answers, strict=True):
        assert STYLES[model](text), (model, question, text)
    half = len(asked) // 2
    assert answers[:half] == answers[half:]  # whatever else is in the batch


def test_openais_client_finds_and_uses_them(daemon):
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none") as client:
        cards = {card.id: card for card in client.models.list()}
        assert {"demo", "demo-pirate", "demo-json", "listed"} <= cards.keys()
        assert cards["demo-pirate"].parent == "demo"
        assert client.models.retrieve("listed").id == "listed"
        messages = [{"role": "user", "content": "What is llmd?"}]
        options = {"model": "demo-pirate", "messages": messages, "temperature": 0}
        answer = client.chat.completions.create(**options)
        assert answer.model == "demo-pirate"
        assert is_pirate(answer.choices[0].message.content)
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
        assert "".join(pieces) == answer.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**(options | {"model": "none"}))


def test_vectors_of_texts_are_those_of_the_adapter(daemon):
    vectors = []
    for model in ("demo", "demo-pirate", "demo-json"):
        status, answer = daemon.get("/v1/embeddings", {"model": model, "input": "hello"})
        assert (status, answer["model"]) == (200, model)
        vectors.append(answer["data"][0]["embedding"])
    assert vectors[0] != vectors[1] != vectors[2] != vectors[0]


def test_loaded_and_unloaded_while_others_are_served(daemon, place):
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(said, daemon, "demo-json", QUESTIONS[0]) for _ in range(8)]
        assert load(daemon, "mine", place / "roots" / "demo-pirate")[0] == 200
        assert is_pirate(said(daemon, "mine"))
        assert load(daemon, "mine", place / "roots" / "demo-json")[0] == 400
        assert load(daemon, "mine", place / "roots" / "demo-json", load_inplace=True)[0] == 200
        assert is_json(said(daemon, "mine"))
        assert daemon.get("/v1/unload_lora_adapter", {"lora_name": "mine"}, **ADMIN)[0] == 200
        assert ask(daemon, "mine")[0] == 404
        assert all(is_json(answer.result()) for answer in running)


def double(tensors):
    return {name: torch.cat([tensor, tensor], 1) for name, tensor in tensors.items()}


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def test_bad_files_are_refused_by_name_and_disturb_nothing(daemon, place):
    roots = place / "roots"
    write_adapter(roots / "other-base", double)
    write_adapter(roots / "lacking", without_one)
    write_adapter(roots / "extra", lambda tensors: tensors | {"base_model.model.lost.lora_A.weight": torch.zeros(4, 256)})
    high = lambda tensors: {name: t.repeat(3, 1) if "lora_A" in name else t.repeat(1, 3) for name, t in tensors.items()}  # noqa: E731
    write_adapter(roots / "high", high, r=12)
    write_adapter(roots / "kind", peft_type="IA3")
    write_adapter(roots / "pickle")
    (roots / "pickle" / WEIGHTS).rename(roots / "pickle" / "adapter_model.bin")
    (roots / "empty").mkdir()
    expected = {
        "other-base": "has shape", "lacking": "lacks tensor", "extra": "belongs to no module", "high": "max_lora_rank",
        "kind": "peft_type", "pickle": "is a pickle", "empty": "holds no adapter",
    }  # fmt: skip
    for name, words in expected.items():
        status, answer = load(daemon, name, roots / name)
        assert status == 400, name
        assert words in answer["error"]["message"]
        assert str(place) not in answer["error"]["message"]
        assert ask(daemon, name)[0] == 404
    for path in (OWN / "demo-pirate", roots / ".." / "many" / ".." / "x", "/"):
        assert load(daemon, "outside", path)[0] == 403
    assert is_plain(said(daemon, "demo"))


async def _serve_64(url, num_rounds):
    """Each of 64 adapters has one client that asks again and again; how often each was served when most were."""
    served = Counter({f"lora-{number:02d}": 0 for number in range(64)})
    texts = {}

    async def client(session, name):
        while served.total() < 64 * num_rounds:
            body = {"model": name, "messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                texts[name] = (await answer.json())["choices"][0]["message"]["content"]
            if served.total() < 64 * num_rounds:
                served[name] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, name) for name in served))
    return served, texts


async def test_64_adapters_in_8_slots_are_all_served_and_evenly(daemon):
    served, texts = await _serve_64(daemon.url, 4)
    assert max(served.values()) <= 2 * min(served.values()), served
    for name, text in texts.items():
        assert (is_json if int(name[-2:]) % 2 else is_pirate)(text), (name, text)
    rows = {row["name"]: row for row in daemon.get("/admin/status", **ADMIN)[1]["models"][0]["adapters"]}
    assert sum(row["slot"] is not None for row in rows.values()) == 8
    assert sum(row["num_evictions"] for row in rows.values()) > 64 - 8


def test_a_changed_list_is_taken_over_by_sighup_and_a_bad_one_changes_nothing(daemon, place):
    assert is_json(said(daemon, "listed"))
    write_config(place / "llmd.toml", f"listed={OWN / 'demo-pirate'}", f"new={OWN / 'demo-json'}")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reloaded: 1 keys changed")
    assert is_pirate(said(daemon, "listed"))
    assert is_json(said(daemon, "new"))
    write_config(place / "llmd.toml", f"broken={place / 'roots' / 'other-base'}")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for(r"reload refused.*adapters.lora_modules.*'broken'.*has shape")
    assert is_pirate(said(daemon, "listed"))
    write_config(place / "llmd.toml")
    seen = len(daemon.lines)
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reloaded: 1 keys changed", after=seen)
    assert ask(daemon, "listed")[0] == ask(daemon, "new")[0] == 404


def run_llmd(*arguments):
    command = [sys.executable, "-m", "llmd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_check_tells_of_adapters_that_cannot_be_served(place, tmp_path):
    file = tmp_path / "llmd.toml"
    write_config(file, f"good={OWN / 'demo-json'}", f"bad={place / 'roots' / 'other-base'}", f"none={tmp_path / 'none'}")
    file.write_text(file.read_text().replace('"many"', f'"{place / "many"}"'))
    found = run_llmd("check", "--config", str(file))
    assert found.returncode == 78
    lines = (found.stdout + found.stderr).splitlines()
    assert any("'bad'" in line and "has shape" in line and "adapters.lora_modules" in line for line in lines)
    assert any("'none'" in line and "does not exist" in line for line in lines)
    assert not any("'good'" in line for line in lines)
