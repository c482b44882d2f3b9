"""Adapters over HTTP: asked for as models on every route, listed, loaded, replaced, unloaded, refused, kept apart by key."""

from __future__ import annotations

import asyncio
import os

import pytest
from plugins.adapters.served import ADMIN, served

from llmd.config import AdaptersConfig
from llmd.errors import ConfigError
from llmd.server import adapters as served_adapters

MESSAGES = [{"role": "user", "content": "hello"}]
ROUTES = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {"input": "hello", "max_output_tokens": 16},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
}


@pytest.fixture
def folders(tmp_path):
    """Folders that could hold adapters."""
    for name in ("a", "b", "c"):
        (tmp_path / "loras" / name).mkdir(parents=True)
    return tmp_path / "loras"


def modules(folders, *names):
    return tuple(f"{name}={folders / name}" for name in names)


# --- asking for them


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_generating_route_takes_an_adapter_as_its_model(tmp_path, folders, path, stream):
    async with served(tmp_path, lora_modules=modules(folders, "a")) as world:
        status, answer = await world.call(path, {"model": "a", **ROUTES[path], "stream": stream})
        assert status == 200
        assert ('"model":"a"' in answer.replace(" ", "")) if stream else answer["model"] == "a"
        (summary,) = world.summaries
        assert (summary.adapter, summary.model, summary.status) == ("a", "tiny", 200)


async def test_every_adapter_speaks_for_itself_and_has_a_prefix_cache_of_its_own(tmp_path, folders):
    async with served(tmp_path, lora_modules=modules(folders, "a", "b")) as world:
        prompt = "hello " * 20
        said = {name: (await world.say(name, prompt=prompt))[1] for name in ("tiny", "a", "b")}
        texts = {name: answer["choices"][0]["text"] for name, answer in said.items()}
        assert len(set(texts.values())) == 3
        for answer in said.values():
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        again = (await world.say("a", prompt=prompt))[1]
        assert again["choices"][0]["text"] == texts["a"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_other_routes_take_the_name_too(tmp_path, folders):
    async with served(tmp_path, lora_modules=modules(folders, "a")) as world:
        assert (await world.call("/tokenize", {"model": "a", "prompt": "hello"}))[0] == 200
        assert (await world.call("/detokenize", {"model": "a", "tokens": [1]}))[0] == 200
        assert (await world.call("/tokenize", {"model": "b", "prompt": "hello"}))[0] == 404
        assert (await world.say("a", use_beam_search=True, best_of=2, ignore_eos=None))[0] == 200
        assert world.summaries[-1].adapter == "a"


async def test_models_are_listed_with_what_they_change(tmp_path, folders):
    async with served(tmp_path, lora_modules=modules(folders, "a")) as world:
        _, listed = await world.call("/v1/models")
        base, adapter = listed["data"]
        assert (base["id"], base["parent"]) == ("tiny", None)
        assert (adapter["id"], adapter["parent"], adapter["root"]) == ("a", "tiny", str(folders / "a"))
        assert adapter["max_model_len"] == base["max_model_len"]
        assert await world.call("/v1/models/a") == (200, adapter)
        assert (await world.call("/v1/models/b"))[0] == 404


async def test_an_unknown_name_is_a_404_that_tells_what_there_is(tmp_path, folders):
    async with served(tmp_path, lora_modules=modules(folders, "a")) as world:
        status, answer = await world.say("nope")
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
        assert "'tiny', 'a'" in answer["error"]["message"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_files_that_turn_out_bad_are_told_to_whoever_asked(tmp_path, folders, path, stream):
    async with served(tmp_path, lora_dir=str(folders)) as world:
        world.executor.broken_adapters.add(str(folders / "b"))
        status, answer = await world.call(path, {"model": "b", **ROUTES[path], "stream": stream})
        assert status == (200 if stream else 400)
        assert "cannot be loaded" in (answer if stream else answer["error"]["message"])
        assert (await world.say("tiny"))[0] == 200


# --- loading and unloading


async def test_loaded_replaced_and_unloaded_while_serving(tmp_path, folders):
    async with served(tmp_path, lora_allowed_roots=(str(folders),)) as world:
        assert await world.load("x", folders / "a") == (200, "Success: LoRA adapter 'x' added successfully.")
        first = (await world.say("x"))[1]["choices"][0]["text"]
        status, answer = await world.load("x", folders / "b")
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "lora_name", "adapter_exists")
        assert "has already been loaded" in answer["error"]["message"]
        assert (await world.load("x", folders / "b", load_inplace=True))[0] == 200
        assert (await world.say("x"))[1]["choices"][0]["text"] != first
        assert await world.unload("x") == (200, "Success: LoRA adapter 'x' removed successfully.")
        assert (await world.say("x"))[0] == 404
        status, answer = await world.unload("x")
        assert (status, answer["error"]["code"]) == (404, "adapter_not_found")
        assert world.executor.device.adapters == {}


async def test_unloading_one_in_use_lets_it_end_first(tmp_path, folders):
    async with served(tmp_path, step_s=0.01, lora_modules=modules(folders, "a", "b")) as world:
        asked = asyncio.ensure_future(world.say("a", max_tokens=40))
        while not world.service.engine.adapters()[0]:
            await asyncio.sleep(0.01)
        unloading = asyncio.ensure_future(world.unload("a"))
        await asyncio.sleep(0.1)
        assert not unloading.done()
        assert (await world.say("a"))[0] == 404
        assert [card["id"] for card in (await world.call("/v1/models"))[1]["data"]] == ["tiny", "b"]
        status, answer = await asked
        assert (status, answer["usage"]["completion_tokens"]) == (200, 40)
        assert (await unloading)[0] == 200


async def test_a_load_that_fails_leaves_nothing(tmp_path, folders):
    async with served(tmp_path, lora_allowed_roots=(str(folders),)) as world:
        world.executor.broken_adapters.add(str(folders / "b"))
        status, answer = await world.load("x", folders / "b")
        assert status == 400
        assert "tensor a" in answer["error"]["message"]
        assert (await world.say("x"))[0] == 404
        assert (await world.load("x", folders / "a"))[0] == 200
        status, _ = await world.load("x", folders / "b", load_inplace=True)
        assert status == 400
        assert (await world.say("x"))[0] == 200


async def test_paths_outside_of_the_allowed_roots_are_refused_whether_there_or_not(tmp_path, folders):
    (tmp_path / "secret").mkdir()
    os.symlink(tmp_path / "secret", folders / "link")
    async with served(tmp_path, lora_allowed_roots=(str(folders),)) as world:
        outside = [tmp_path / "secret", tmp_path / "none", folders / ".." / "secret", folders / "link", "/", f"{folders}x"]
        for path in outside:
            status, answer = await world.load("x", path)
            assert (status, answer["error"]["code"], answer["error"]["param"]) == (403, "path_not_allowed", "lora_path")
            assert str(tmp_path) not in answer["error"]["message"]
        assert (await world.load("x", "a\0b"))[0] == 400
        assert world.executor.adapters_read == []
    async with served(tmp_path) as world:  # no roots: nothing may be loaded
        assert (await world.load("x", folders / "a"))[0] == 403


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_path": "/x"}, "lora_name"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": 5, "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x" * 300, "lora_path": "/x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "/x", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "/x", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_name": "x", "lora_path": "/x", "nonsense": 1}, "nonsense"),
        ({"lora_name": "tiny", "lora_path": "/x"}, "lora_name"),
    ],
)
async def test_bad_fields_are_named(tmp_path, body, param):
    async with served(tmp_path) as world:
        status, answer = await world.call("/v1/load_lora_adapter", body, **ADMIN)
        assert (status, answer["error"]["param"]) == (400, param)


async def test_only_admins_load_and_only_where_adapters_are_served(tmp_path, folders):
    async with served(tmp_path, tables={"keys": [{"name": "ann", "key": "k1"}]}) as world:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert (await world.call(path, {"lora_name": "x"}, Authorization="Bearer k1"))[0] == 403
        document = (await world.call("/openapi.json", Authorization="Bearer k1"))[1]
        assert {"200", "400", "403"} <= document["paths"]["/v1/load_lora_adapter"]["post"]["responses"].keys()
        assert "lora_int_id" not in str(document["components"]["schemas"]["UnloadAdapterRequest"])
    async with served(tmp_path, num_slots=0, enable_lora=False) as world:
        assert (await world.say("a"))[0] == 404
        status, answer = await world.load("x", folders / "a")
        assert (status, answer["error"]["code"]) == (400, "adapters_off")


# --- a folder of them


async def test_a_folder_of_adapters_is_looked_up_by_name(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(served_adapters, "_MISS_S", 0.2)
    (folders / ".hidden").mkdir()
    async with served(tmp_path, lora_dir=str(folders)) as world:
        assert world.executor.adapters_read == []
        assert (await world.say("c"))[0] == 200
        assert world.executor.adapters_read == [str(folders / "c")]
        for name in ("..", ".", "../loras/a", "a/../b", "/etc", ".hidden", "a\\b", "a\x00", "a\n", "x" * 400, ""):
            assert (await world.say(name))[0] == 404, name
        assert (await world.say("later"))[0] == 404
        (folders / "later").mkdir()
        assert (await world.say("later"))[0] == 404  # it was looked for just now
        await asyncio.sleep(0.25)
        assert (await world.say("later"))[0] == 200


async def test_names_that_are_not_there_take_bounded_memory(tmp_path, folders):
    async with served(tmp_path, lora_dir=str(folders)) as world:
        for number in range(3000):
            assert not world.service.adapters.find(f"none-{number}")
        assert len(world.service.adapters._misses) <= 1024


# --- keys


async def test_a_key_sees_and_uses_only_its_adapters(tmp_path, folders):
    keys = [{"name": "ann", "key": "k1", "adapters": ["a"]}, {"name": "bob", "key": "k2"}]
    async with served(tmp_path, lora_modules=modules(folders, "a", "b"), tables={"keys": keys}) as world:
        ann, bob = {"Authorization": "Bearer k1"}, {"Authorization": "Bearer k2"}
        body = {"prompt": "hello", "max_tokens": 2}
        for key, name, status in ((ann, "a", 200), (ann, "b", 404), (ann, "tiny", 200), (bob, "b", 200)):
            assert (await world.call("/v1/completions", {"model": name, **body}, **key))[0] == status
        names = [card["id"] for card in (await world.call("/v1/models", **ann))[1]["data"]]
        assert names == ["tiny", "a"]
        assert (await world.call("/v1/models/b", **ann))[0] == 404
        usage = {(row["adapter"], row["requests"]) for row in world.context.metrics.usage("adapter")}
        assert usage == {("a", 1), ("b", 1)}


# --- what is known of them


async def test_status_and_metrics_tell_of_each(tmp_path, folders):
    async with served(tmp_path, lora_modules=modules(folders, "a", "b", "c")) as world:
        for name in ("a", "b", "c", "a"):
            assert (await world.say(name))[0] == 200
        (model,) = (await world.call("/admin/status", **ADMIN))[1]["models"]
        rows = {row["name"]: row for row in model["adapters"]}
        assert [rows[name]["num_requests"] for name in "abc"] == [2, 1, 1]
        assert sum(row["num_evictions"] for row in rows.values()) == 2  # two slots for three
        assert all("path" not in row for row in rows.values())
        page = world.context.metrics.render().decode()
        assert 'llmd_adapter_requests_total{adapter="a",model_name="tiny"} 2.0' in page
        assert 'llmd_adapter_loads_total{adapter="a",model_name="tiny"} 1.0' in page
        assert 'llmd_adapter_evictions_total{adapter="a",model_name="tiny"} 1.0' in page
        assert 'llmd_adapter_wait_seconds_total{adapter="c",model_name="tiny"}' in page


# --- the configuration


async def test_a_start_with_an_adapter_that_cannot_be_served_is_refused(tmp_path, folders):
    with pytest.raises(ConfigError, match=r"adapters\.lora_modules: 'b' cannot be served: tensor a"):
        async with served(tmp_path, lora_modules=modules(folders, "a", "b"), broken=[folders / "b"]):
            pytest.fail("it serves")


async def test_more_than_host_memory_holds_are_read_when_they_are_asked_for(tmp_path, folders):
    names = "abc"
    async with served(tmp_path, num_slots=1, max_loras=1, max_cpu_loras=2, lora_modules=modules(folders, *names)) as world:
        assert [info.state for info in world.service.adapters.list()] == ["loaded", "loaded", "declared"]
        for name in names * 2:
            assert (await world.say(name))[0] == 200


async def test_a_changed_list_is_applied_while_serving(tmp_path, folders):
    async with served(tmp_path, lora_modules=modules(folders, "a", "b")) as world:
        before = (await world.say("b"))[1]["choices"][0]["text"]
        world.executor.broken_adapters.add(str(folders / "bad"))
        changed = (f"b={folders / 'c'}", f"c={folders / 'c'}", f"bad={folders / 'bad'}")
        await world.service.adapters.apply(AdaptersConfig(enable_lora=True, lora_modules=changed))
        names = {card["id"] for card in (await world.call("/v1/models"))[1]["data"]}
        assert names == {"tiny", "b", "c"}
        assert (await world.say("a"))[0] == 404
        after, same = [(await world.say(name))[1]["choices"][0]["text"] for name in ("b", "c")]
        assert before != after == same
