"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmd.api.v1 import InvalidRequest, json_response, read_json_object
from llmd_plugins.openai.beams import search_prompts
from llmd_plugins.openai.call import Call, check_length, sampling_params
from llmd_plugins.openai.fields import parse
from llmd_plugins.openai.fim import fill_in
from llmd_plugins.openai.frames import Frames, ending
from llmd_plugins.openai.logprobs import LogprobFormat
from llmd_plugins.openai.protocol import CompletionRequest

if TYPE_CHECKING:
    from llmd.api.v1 import SamplingParams, ServerContext, TextDelta

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def completions(context: ServerContext) -> Handler:
    """The handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = await read_json_object(request)
        _check_number(given.get("prompt"), context.config.limits.max_prompts)
        body = parse(CompletionRequest, given)
        call = Call(context, request, body, "cmpl")
        special = body.add_special_tokens is not False
        if body.use_beam_search:
            return json_response(Answer(call, body).build(await _search(call, body, special)))
        await call.start(await _prompts(call, body, special), _sampling_params(call, body), special)
        answer = Answer(call, body)
        if body.stream:
            return await call.stream(CompletionFrames(answer))
        return json_response(answer.build(await call.collect()))

    return handle


def _check_number(prompt: Any, limit: int) -> None:
    """How many prompts there are, before each is looked at; a list that begins with a token id is one prompt."""
    if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
        check_length("prompt", prompt, limit)


async def _prompts(call: Call, body: CompletionRequest, special: bool) -> Sequence[str | Sequence[int]]:
    """The prompts, each with the suffix where there is one."""
    if not body.suffix:
        return body.prompt
    return [await fill_in(call.service, prompt, body.suffix, special) for prompt in body.prompt]


async def _search(call: Call, body: CompletionRequest, special: bool) -> list[list[TextDelta]]:
    if _is_prompt_only(body):
        raise InvalidRequest("max_tokens must be at least 1 with use_beam_search, got 0", param="max_tokens")
    max_tokens = body.max_tokens if body.max_tokens is not None else call.service.sampling_params({}).max_tokens
    return await search_prompts(call, await _prompts(call, body, special), max_tokens, special)


def _is_prompt_only(body: CompletionRequest) -> bool:
    """max_tokens 0 with echo scores the prompt: one token is generated, since something must be, and not shown."""
    return bool(body.echo) and body.max_tokens == 0


def _sampling_params(call: Call, body: CompletionRequest) -> SamplingParams:
    changes: dict[str, Any] = {}
    if body.logprobs is not None:
        changes["logprobs"] = body.logprobs
        if body.echo:
            changes["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if _is_prompt_only(body):
        changes["max_tokens"] = 1
        changes["min_tokens"] = 0
    return sampling_params(call.service, call.context.config.limits, body, **changes)


class Answer:
    """How the choices of one request are written down."""

    def __init__(self, call: Call, body: CompletionRequest) -> None:
        self.call, self.body = call, body
        self.is_prompt_only = _is_prompt_only(body)
        self.logprobs: LogprobFormat | None = None
        if body.logprobs is not None:
            as_ids = bool(body.return_tokens_as_token_ids)
            self.logprobs = LogprobFormat(call.service, body.logprobs, as_token_ids=as_ids)

    def build(self, choices: list[list[TextDelta]]) -> dict[str, Any]:
        """The whole answer."""
        call = self.call
        return {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
            "choices": [
                self._choice(prompt_index * len(row) + index, prompt_index, delta)
                for prompt_index, row in enumerate(choices)
                for index, delta in enumerate(row)
            ],
            "usage": call.usage(0 if self.is_prompt_only else None),
            "system_fingerprint": None,
        }

    def _choice(self, index: int, prompt_index: int, delta: TextDelta) -> dict[str, Any]:
        body = self.body
        answer: dict[str, Any] = {
            "index": index,
            "text": self.text(prompt_index, delta, is_first=True),
            "logprobs": self.logprobs_of(prompt_index, delta, is_first=True),
            **self.ending(delta),
            "prompt_logprobs": None,
        }
        if body.prompt_logprobs is not None:
            form = LogprobFormat(self.call.service, body.prompt_logprobs)
            answer["prompt_logprobs"] = form.prompt(self.call.prompt_logprobs[prompt_index])
        if body.return_token_ids:
            answer["prompt_token_ids"] = self.prompt_token_ids(prompt_index)
            answer["token_ids"] = self.token_ids(delta)
        return answer

    # --- the parts of a choice, whole or of a stream

    def text(self, prompt_index: int, delta: TextDelta, is_first: bool) -> str:
        """What is new, behind the prompt where it is echoed."""
        text = "" if self.is_prompt_only else delta.text
        return self.echoed(prompt_index) + text if is_first and self.body.echo else text

    def token_ids(self, delta: TextDelta) -> list[int]:
        """The tokens of the text."""
        return [] if self.is_prompt_only else list(delta.token_ids)

    def logprobs_of(self, prompt_index: int, delta: TextDelta, is_first: bool) -> dict[str, Any] | None:
        """`logprobs` of the text, None where there are none; offsets count from the start of all the text."""
        if self.logprobs is None:
            return None
        output, offsets = ([], []) if self.is_prompt_only else (delta.logprobs or [], delta.text_offsets or [])
        if not self.body.echo:
            return self.logprobs.completion(output, offsets) if output or is_first else None
        echoed = self.echoed(prompt_index)
        form = self.logprobs.completion(output, [len(echoed) + offset for offset in offsets])
        if is_first:
            scores = self.call.prompt_logprobs[prompt_index]
            prompt = self.logprobs.echo(self.prompt_token_ids(prompt_index), scores, echoed)
            form = {name: prompt[name] + form[name] for name in form}
        return form if form["tokens"] else None

    def ending(self, delta: TextDelta) -> dict[str, Any]:
        """How it ended: a prompt that was only scored always by its length."""
        if self.is_prompt_only and delta.finish_reason is not None:
            return {"finish_reason": "length", "stop_reason": None}
        return ending(delta)

    def prompt_token_ids(self, prompt_index: int) -> list[int]:
        """The prompt as the engine has it."""
        return list(self.call.streams[prompt_index].request.prompt.token_ids)

    def echoed(self, prompt_index: int) -> str:
        """The prompt's text, as it was given where it was text."""
        prompt = self.body.prompt[prompt_index]
        if isinstance(prompt, str) and self.body.truncate_prompt_tokens is None:
            return prompt
        return self.call.service.tokenizer.decode(self.prompt_token_ids(prompt_index), skip_special_tokens=False)


class CompletionFrames(Frames):
    """Events of a completion stream; with echo the first one of each choice holds the prompt."""

    OBJECT = "text_completion"
    TEXT_HEAD = b',"text":'
    TEXT_TAIL = b',"logprobs":null,"finish_reason":null}'

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.call, answer.logprobs)
        self._answer = answer
        self.is_plain = self.is_plain and not answer.is_prompt_only

    def choice(self, index: int, prompt_index: int, delta: TextDelta, is_first: bool) -> dict[str, Any]:
        """The next piece of text."""
        answer = self._answer
        news: dict[str, Any] = {
            "index": index,
            "text": answer.text(prompt_index, delta, is_first),
            "logprobs": answer.logprobs_of(prompt_index, delta, is_first),
            **answer.ending(delta),
        }
        if self.wants_token_ids:
            news["token_ids"] = answer.token_ids(delta)
            if is_first:
                news["prompt_token_ids"] = answer.prompt_token_ids(prompt_index)
        return news

    def usage(self) -> dict[str, Any]:
        """A prompt that was only scored has no output."""
        return self.call.usage(0 if self._answer.is_prompt_only else None)
