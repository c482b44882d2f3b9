"""A served model that writes what a script tells it, a character a token."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from llmd.engine.executor import LoadProgress
from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason
from llmd.server.parsers import ModelParsers
from llmd.text.stream import RequestStream, TextDelta

EOS = 3


class Tokenizer:
    vocab_size, added_tokens = 1 << 20, {}

    def encode(self, text, *, add_special_tokens=True):
        return [ord(char) for char in text]

    async def encode_async(self, text, *, add_special_tokens=True):
        return self.encode(text)


class ScriptedService:
    """`script(prompt, constraint)` is what the model would write behind the prompt."""

    names, eos_token_ids, max_model_len = ("scripted",), (EOS,), 1000
    state, created_s, progress = "ready", 0.0, LoadProgress("ready", 1.0)

    def __init__(self, script, *, tool=None, reasoning=None, opening=""):
        self.script, self.opening = script, opening
        self.parsers = ModelParsers(tool, reasoning)
        self.tokenizer = Tokenizer()
        self.engine = SimpleNamespace(check_admission=lambda num_tokens, num_requests: None)
        self.chat_template = SimpleNamespace(templates={"default": ""})
        self.adapters = SimpleNamespace(list=list, find=lambda name: False, is_enabled=False)
        self.asked, self.streams, self.arguments = [], [], {}

    def sampling_params(self, overrides):
        return SamplingParams(**overrides)

    def render_chat(self, messages, **arguments):
        self.arguments = arguments
        return f"{messages[-1]['content']}:{self.opening}"

    async def compile_constraint(self, params, constraint):
        return None

    async def generate(self, prompt, params, *, constraint=None, clip_max_tokens=False, request_id, **_):
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        self.asked.append((text, params, constraint))
        written = self.script(text, constraint)
        if isinstance(written, Exception):
            raise written
        request = Request(request_id=request_id, prompt=Prompt(tuple(map(ord, text))), params=params)
        stream = RequestStream(request, lambda closed: task.cancel(), 1 << 20)
        task = asyncio.ensure_future(self._speak(stream, written, params))
        self.streams.append(stream)
        return stream

    async def _speak(self, stream, text, params):
        for index in range(params.n):
            said = ""
            for char in [*text, None]:
                await asyncio.sleep(0)
                said += char or ""
                stop = next((stop for stop in params.stop if said.endswith(stop)), None)
                is_full = len(said) == params.max_tokens
                held = max([0, *(size for s in params.stop for size in range(1, len(s)) if said.endswith(s[:size]))])
                ends = stop or is_full or char is None
                shown = said[: -len(stop)] if stop else said if ends else said[: len(said) - held]
                reason = (FinishReason.STOP if stop or char is None else FinishReason.LENGTH) if ends else None
                done = getattr(stream, "shown", {}).get(index, 0)
                stream.shown = {**getattr(stream, "shown", {}), index: max(done, len(shown))}
                stream.num_output_tokens += 1
                token = [ord(char) if char else EOS]
                stream.put(TextDelta("", index, shown[done:], token, finish_reason=reason, stop_reason=stop))
                if ends:
                    break
