"""A real ModelService over a fake device that says what a test tells it to: for wire formats of whole conversations."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from fakes import FakeDevice, FakeExecutor, fake_info
from made_tokenizers import write_folder

from llmd.config import Config, ModelConfig
from llmd.server.app import ServerContext
from llmd.server.generate import ModelService
from llmd.server.parsers import ParserParts

# the marks of Hermes' calls and of thinking stand in it, by which parsers are chosen
TEMPLATE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if tools %}tools:{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


class ScriptedDevice(FakeDevice):
    """Says `reply_ids` to every prompt, then the end token; where a mask forbids a token, what the fake would say."""

    def __init__(self, info: Any) -> None:
        super().__init__(info)
        self.reply_ids: list[int] = []
        self.choose: Callable[[list[int]], list[int]] | None = None  # from the prompt's ids, where replies differ
        self.eos = 0

    def _compute(self, row, index, start, count, num_logits, samples, result, tokens) -> None:
        super()._compute(row, index, start, count, num_logits, samples, result, tokens)
        if not samples or isinstance(tokens[-1], bool):
            return
        prompt, position = row.admit.num_prompt_tokens, len(row.token_ids) - 1
        reply = self.reply_ids if self.choose is None else self.choose(row.token_ids[:prompt])
        position += _num_said(row.token_ids[:prompt], reply) - prompt
        wanted = reply[position] if position < len(reply) else self.eos
        mask = self.masks.get(index)
        if mask is None or mask[wanted // 32] >> (wanted % 32) & 1:
            row.token_ids[-1] = tokens[-1] = wanted


def _num_said(prompt: list[int], reply: list[int]) -> int:
    """How much of the reply stands at the prompt's end: what was said is gone on with."""
    return next((length for length in range(len(reply), 0, -1) if prompt[-length:] == reply[:length]), 0)


class Scripted:
    """The service, its context, and `say`."""

    def __init__(self, service: ModelService, context: ServerContext, device: ScriptedDevice) -> None:
        self.service, self.context, self.device = service, context, device

    def say(self, text: str) -> None:
        """What the model answers from now on."""
        self.device.reply_ids = self.ids(text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.service.tokenizer.encode(text, add_special_tokens=False)

    def prompts(self, stream: Any) -> str:
        """The text of a request's prompt."""
        return self.service.tokenizer.decode(list(stream.request.prompt.token_ids), skip_special_tokens=False)


def make_folder(path: Path) -> Path:
    """A model's folder without weights."""
    folder = write_folder("byte_level", path, chat_template=TEMPLATE)
    end = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in end}
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ids["<|im_end|>"]}))
    return folder


def parser_parts() -> ParserParts:
    """The built-in parsers and their choice."""
    modules = [import_module(f"llmd_plugins.parsers.{name}") for name in ("hermes", "think", "select")]
    tools = [spec for module in modules for spec in getattr(module, "llmd_register_tool_parsers", list)()]
    reasoning = [spec for module in modules for spec in getattr(module, "llmd_register_reasoning_parsers", list)()]
    return ParserParts(
        {spec.name: spec for spec in tools}, {spec.name: spec for spec in reasoning}, modules[2].llmd_select_parsers
    )


def grammar_specs() -> dict[str, Any]:
    """The grammar plugins."""
    from llmd_plugins.grammars import llguidance

    return {spec.name: spec for spec in llguidance.llmd_register_grammars()}


@asynccontextmanager
async def scripted(
    folder: Path, *plugins: Any, config: dict[str, Any] | None = None, sections: dict[str, Any] | None = None,
    step_s: float = 0.0, authenticators: bool = False, **info: Any,
) -> AsyncIterator[Scripted]:  # fmt: skip
    """A service named `tiny` and a context with the routes, middlewares, sections and services of these plugins."""
    from llmd_plugins.auth import api_keys
    from llmd_plugins.scheduling import fcfs

    parsed = Config.model_validate({"cache": {"block_size": 4}, **(config or {})})
    executor = FakeExecutor(step_s=step_s)
    values = {"num_blocks": 4096, "max_model_len": 2048, "vocab_size": 424, "max_num_seqs": 16, **info}
    executor.device = ScriptedDevice(fake_info(**values))
    (policy,) = fcfs.llmd_register_scheduling_policies()
    service = ModelService.create(
        parsed, ModelConfig(model="tiny"), folder, executor, policy.build(parsed.scheduler),
        grammars=grammar_specs(), parsers=parser_parts(),
    )  # fmt: skip
    executor.device.eos = service.eos_token_ids[0]
    await service.start(lambda progress: None)
    found = {spec.name: spec.model() for plugin in plugins for spec in _specs(plugin, "config_sections")}
    context = ServerContext(
        config=parsed,
        services={"tiny": service},
        routes=[spec for plugin in plugins for spec in _specs(plugin, "routes")],
        middlewares=[spec for plugin in plugins for spec in _specs(plugin, "middlewares")],
        service_specs=[spec for plugin in plugins for spec in _specs(plugin, "services")],
        authenticators=api_keys.llmd_register_authenticators() if authenticators else (),
        sections={**found, **(sections or {})},
        state="ready",
    )
    try:
        yield Scripted(service, context, executor.device)
    finally:
        await service.stop()


def _specs(plugin: Any, family: str) -> list[Any]:
    return getattr(plugin, f"llmd_register_{family}", list)()
