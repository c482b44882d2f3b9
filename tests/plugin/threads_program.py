"""A daemon that serves requests of every kind, and tells on which threads the functions of plugins' objects ran.

    python threads_program.py FOLDER      a folder to work in; prints {"file: function": [threads]}

It watches what is built in (files below llmd_plugins), and the classes of llmd that built-in objects inherit from.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import threading
from pathlib import Path
from typing import Any

import llmd
import llmd_plugins

CORE = Path(llmd.__file__).parent
ROOTS = (f"{Path(llmd_plugins.__file__).parent}/", f"{CORE}/text/parsers/", f"{CORE}/model/sampler.py")
KEY = "sk-threads"
seen: dict[str, set[str]] = {}


def watch(frame: Any, event: str, arg: object) -> None:
    """A profile function: note calls of plugins' functions."""
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(ROOTS) or code.co_name.startswith("<"):
        return
    if not code.co_flags & inspect.CO_GENERATOR:  # an unfinished one ends wherever the garbage collector runs
        name = f"{code.co_filename.removeprefix(ROOTS[0])}: {code.co_qualname}"
        seen.setdefault(name, set()).add(threading.current_thread().name)


def make_adapter(folder: Path) -> Path:
    """LoRA of rank 2 on the first layer's queries."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Everything that a request can meet."""
    from llmd.api.v1.testing import make_tiny_model

    model = {
        "model": str(make_tiny_model(folder / "model")), "served_model_name": ["tiny"], "load_format": "dummy",
        "device": "cpu", "dtype": "float32", "quantization": "int8", "tool_call_parser": "hermes",
        "reasoning_parser": "qwen3",
    }  # fmt: skip
    return {
        "models": [model],
        "server": {"uds": str(folder / "llmd.sock"), "api_keys": [KEY]},
        "adapters": {"enable_lora": True, "lora_modules": [f"ada={make_adapter(folder / 'adapter')}"]},
    }


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Of every kind."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    calls = {"tool_choice": "required", "stream": True}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    messages = [{"role": "user", "content": "hi"}]
    plain = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "bad_words": ["x"], "min_p": 0.1, "top_k": 5, "seed": 1}
    return [
        ("/v1/completions", {**plain, "presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"65": 1.0}}),
        ("/v1/completions", {"model": "ada", "prompt": "hello", "max_tokens": 4, "n": 2, "logprobs": 1}),
        ("/v1/chat/completions", {
            "model": "tiny", "messages": messages, "max_tokens": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        }),
        ("/v1/chat/completions", {
            "model": "tiny", "messages": messages, "max_tokens": 40, "tools": [tool], **calls,
        }),
        ("/v1/messages", {"model": "tiny", "messages": messages, "max_tokens": 4}),
        ("/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 4}),
    ]  # fmt: skip


async def converse(daemon: Any, socket: Path) -> None:
    """Ask for everything, then stop the daemon."""
    import aiohttp

    try:
        while daemon._context.state != "ready":
            await asyncio.sleep(0.02)
        headers = {"Authorization": f"Bearer {KEY}"}
        connector = aiohttp.UnixConnector(str(socket))
        async with aiohttp.ClientSession("http://daemon", connector=connector, headers=headers) as session:
            for path, body in requests():
                async with session.post(path, json=body) as answer:
                    text = await answer.text()
                    assert answer.status == 200, (path, text)
            async with session.get("/metrics") as answer:
                assert answer.status == 200
    finally:
        daemon.stop()


async def main(folder: Path) -> None:
    """Serve in this very thread, which is the loop's."""
    from llmd.config import Config
    from llmd.daemon import build_service, load_catalog, resolve_model
    from llmd.lifecycle import Daemon

    config = Config.model_validate(settings(folder))
    daemon = Daemon(config, load_catalog(config), resolve=resolve_model, build=build_service)
    await asyncio.gather(daemon.run(), converse(daemon, folder / "llmd.sock"))


if __name__ == "__main__":
    threading.setprofile(watch)
    sys.setprofile(watch)
    asyncio.run(main(Path(sys.argv[1])))
    sys.setprofile(None)
    print(json.dumps({name: sorted(threads) for name, threads in sorted(seen.items())}))
