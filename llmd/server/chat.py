"""A conversation and its answer as every chat-like wire format shares them: content, reasoning and tool calls. No HTTP.

    ChatCall ─► open_chat ─► prompt, parsers, constraint ─► legs ─► ChatStream ─► ChatDelta …

Most answers are one leg: one request to the engine whose text runs through the parsers. Where the thinking must be set
apart from what follows (it has a budget, or a grammar constrains the answer behind it), every choice has two: the thinking
up to its closing tag, then the rest as the continuation of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from llmd.engine.params import SamplingParams
from llmd.engine.step import FinishReason
from llmd.errors import InvalidRequest, LlmdError
from llmd.server.chat_choice import Choice, Leg
from llmd.server.chat_plan import Plan, make_plan
from llmd.server.chat_types import ChatAnswer, ChatCall, ChatDelta, add_news
from llmd.text.parsers import ParsedDelta

if TYPE_CHECKING:
    from llmd.engine.request import Request
    from llmd.server.generate import ModelService
    from llmd.text.stream import Progress, RequestStream, TextDelta

_CONTEXT_FULL = "context_length_exceeded"


async def open_chat(
    service: ModelService,
    call: ChatCall,
    *,
    request_id: str,
    key: str = "",
    priority: int = 0,
    timeout_s: float | None = None,
    cache_salt: str | None = None,
    adapter: str | None = None,
) -> ChatStream:
    """Queue a conversation; read and close the stream. Raises InvalidRequest, Overloaded or NotReady, and leaves nothing."""
    service.engine.check_admission(0, call.params.n)
    plan = await make_plan(service, call)
    options = {"priority": priority, "key": key, "cache_salt": cache_salt, "adapter": adapter}
    chat = ChatStream(service, plan, request_id, options, timeout_s)
    try:
        await chat.start()
    except BaseException:
        chat.close()
        raise
    return chat


class ChatStream:
    """The answer: iterate over lists of ChatDelta, or `collect` it whole; always `close`.

    `listen` and `take` spare a task's wake-up for each piece, as RequestStream's do. `plain` is the RequestStream itself
    where no parser looks at the text: its TextDeltas are the content.
    """

    def __init__(
        self, service: ModelService, plan: Plan, request_id: str, options: dict[str, Any], timeout_s: float | None
    ) -> None:
        self.prompt, self.num_choices = plan.prompt, plan.params.n
        self._service, self._plan, self._id, self._options = service, plan, request_id, options
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._choices = [Choice(index, plan) for index in range(self.num_choices)]
        self._legs: list[Leg] = []
        self._leg_ids = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._late: list[ChatDelta] = []  # ends of choices that no leg tells
        self._listener: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Open the first legs."""
        plan = self._plan
        if plan.thinking is None:
            await self._open(plan.prompt_ids or plan.prompt, plan.params, 0, is_thinking=False)
            return
        if plan.is_constrained:  # what cannot be compiled is refused now, not after the thinking
            await self._service.compile_constraint(plan.params, plan.constraint)
        for choice in self._choices:
            params = replace(self._params_of(choice), **plan.thinking.changes)
            await self._open(plan.prompt_ids or plan.prompt, params, choice.index, is_thinking=True)

    def _params_of(self, choice: Choice) -> SamplingParams:
        """The params of one choice alone, after what it has spent; a seed gives each choice its own."""
        params, num_spent = self._plan.params, len(choice.spent)
        return replace(
            params,
            n=1,
            seed=None if params.seed is None else params.seed + choice.index,
            max_tokens=None if params.max_tokens is None else max(1, params.max_tokens - num_spent),
            min_tokens=max(0, params.min_tokens - num_spent),
            prompt_logprobs=None if num_spent else params.prompt_logprobs,
        )

    async def _open(self, prompt: str | Sequence[int], params: SamplingParams, first: int, *, is_thinking: bool) -> None:
        options, plan = dict(self._options), self._plan
        if self._deadline_s is not None:
            options["timeout_s"] = max(0.001, self._deadline_s - time.monotonic())
        if plan.constraint is not None and not is_thinking:
            options["constraint"] = plan.constraint
        if self._choices[first].spent:
            options["clip_max_tokens"] = True
        request_id = f"{self._id}-{next(self._leg_ids)}" if plan.thinking is not None else self._id
        stream = await self._service.generate(
            prompt, params, request_id=request_id, add_special_tokens=plan.add_special_tokens, **options
        )
        leg = Leg(stream, first, is_thinking)
        self._legs.append(leg)
        if self._is_closed:
            stream.close()
        for choice in self._choices[first : first + params.n]:
            choice.leg, choice.parser = leg, plan.parser(is_thinking=is_thinking, after_thinking=bool(choice.spent))
            choice.trims = bool(choice.thought) and not is_thinking
        if self._listener is not None or self._waiter is not None:
            stream.listen(self._arrived)
            self._arrived()

    # --- what is known of it

    @property
    def plain(self) -> RequestStream | None:
        """The engine's own stream, where its text is the content as it is."""
        return self._legs[0].stream if self._plan.is_plain else None

    @property
    def request(self) -> Request:
        """The first request to the engine; its prompt is the conversation's."""
        return self._legs[0].stream.request

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt as the engine has it."""
        return self.request.prompt.token_ids

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, for all choices."""
        return sum(leg.stream.num_output_tokens for leg in self._legs if not leg.is_wasted)

    @property
    def sequences(self) -> list[Progress]:
        """The engine's sequences, of every leg."""
        return [sequence for leg in self._legs for sequence in leg.stream.sequences]

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that are reasoning, about."""
        return sum(choice.num_reasoning_tokens for choice in self._choices)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache."""
        return self._legs[0].stream.num_cached_tokens

    @property
    def queued_s(self) -> float | None:
        """When it left the waiting queue, on the monotonic clock."""
        return self._legs[0].stream.queued_s

    @property
    def first_token_s(self) -> float | None:
        """When its first token came."""
        return self._legs[0].stream.first_token_s

    @property
    def finished_s(self) -> float | None:
        """When its last token came."""
        return self._legs[-1].stream.finished_s

    @property
    def error(self) -> BaseException | None:
        """What ended the whole request, where something did."""
        return next((leg.stream.error for leg in self._legs if leg.stream.error is not None), None)

    @property
    def is_finished(self) -> bool:
        """Whether the end of every choice has been read."""
        return self._is_closed or all(choice.ended for choice in self._choices)

    # --- reading

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call `listener` whenever there may be news to `take`; it must not raise. None ends it."""
        self._listener = listener
        for leg in self._legs:
            leg.stream.listen(None if listener is None else self._arrived)

    def take(self) -> list[ChatDelta]:
        """What came since the last time."""
        news, self._late = self._late, []
        for leg in tuple(self._legs):
            for delta in leg.stream.take():
                choice = self._choices[leg.first + delta.index]
                if choice.leg is leg and not choice.ended:
                    news += self._think(choice, leg, delta) if leg.is_thinking else choice.read(delta)
        return news

    async def collect(self) -> list[ChatAnswer]:
        """Wait for the end: each choice whole, by index."""
        answers = [ChatAnswer(choice.index) for choice in self._choices]
        try:
            if self._plan.thinking is None:
                for delta in await self._legs[0].stream.collect():
                    add_news(answers, self._choices[delta.index].read(delta))
            else:
                async for deltas in self:
                    add_news(answers, deltas)
        finally:
            self.close()
        return answers

    def __aiter__(self) -> ChatStream:
        return self

    async def __anext__(self) -> list[ChatDelta]:
        while True:
            if news := self.take():
                return news
            if self.is_finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                for leg in self._legs:
                    leg.stream.listen(self._arrived)
                await self._waiter
            finally:
                self._waiter = None

    async def __aenter__(self) -> ChatStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more is wanted: what still runs is aborted. May be called again."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        for leg in self._legs:
            leg.stream.close()
        self._arrived()

    def _arrived(self) -> None:
        if self._listener is not None:
            self._listener()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- thinking apart from the answer

    def _think(self, choice: Choice, leg: Leg, delta: TextDelta) -> list[ChatDelta]:
        """The news of a delta of a thinking leg, and the step to the answer when the thinking is over."""
        thinking, parser = self._plan.thinking, choice.parser
        assert thinking is not None
        assert parser is not None
        pieces = parser.feed(delta.text, delta.token_ids) + (parser.finish() if delta.finish_reason is not None else [])
        choice.thought += "".join(piece.reasoning for piece in pieces)
        choice.spent += delta.token_ids
        choice.count_reasoning(pieces, delta)
        ended_by_itself = delta.finish_reason is not None and not thinking.is_closed_by(delta)
        if any(piece.content for piece in pieces) and not choice.thought:
            return self._without_thoughts(choice, leg, pieces, delta)
        if ended_by_itself and not self._must_go_on(choice, delta):
            return choice.news(choice.wanted(pieces), delta, ends=True)
        shown = choice.wanted([piece for piece in pieces if piece.reasoning])
        news = choice.news(shown, delta, ends=False)
        if delta.finish_reason is not None or any(piece.content for piece in pieces):
            self._go_on(choice, leg, closed=thinking.is_closed_by(delta))
        return news

    def _must_go_on(self, choice: Choice, delta: TextDelta) -> bool:
        """Whether an answer follows although the thinking was not closed."""
        limit, plan = self._plan.params.max_tokens, self._plan
        if delta.finish_reason is FinishReason.LENGTH:
            has_budget = plan.thinking is not None and plan.thinking.budget is not None
            return has_budget and (limit is None or len(choice.spent) < limit)
        return delta.finish_reason is FinishReason.STOP and delta.stop_reason is None and plan.is_constrained

    def _without_thoughts(self, choice: Choice, leg: Leg, pieces: list[ParsedDelta], delta: TextDelta) -> list[ChatDelta]:
        """The answer began at once, or the budget ended within the opening tag."""
        thinking, prompt = self._plan.thinking, list(leg.stream.request.prompt.token_ids)
        if thinking is not None and delta.finish_reason is FinishReason.LENGTH and thinking.is_opening(pieces[0].content):
            leg.is_wasted, choice.spent = True, []
            prompt += self._service.tokenizer.encode(thinking.skipping, add_special_tokens=False)
        elif self._plan.is_constrained:  # what was written is not what the grammar says
            leg.is_wasted, choice.spent = True, []
        elif delta.finish_reason is not None and not self._must_go_on(choice, delta):
            return choice.news(pieces, delta, ends=True)
        else:
            self._begin_answer(choice, leg, prompt + choice.spent)
            return choice.news(pieces, delta, ends=False)
        self._begin_answer(choice, leg, prompt)
        return []

    def _go_on(self, choice: Choice, leg: Leg, *, closed: bool) -> None:
        eos = self._service.eos_token_ids
        spent = choice.spent if closed or not choice.spent or choice.spent[-1] not in eos else choice.spent[:-1]
        prompt = [*leg.stream.request.prompt.token_ids, *spent]
        if not closed and self._plan.thinking is not None:
            prompt += self._service.tokenizer.encode(self._plan.thinking.closing, add_special_tokens=False)
        self._begin_answer(choice, leg, prompt)

    def _begin_answer(self, choice: Choice, leg: Leg, prompt: list[int]) -> None:
        choice.leg = None
        task = asyncio.get_running_loop().create_task(self._answer(choice, leg, prompt))
        self._tasks.add(task)
        task.add_done_callback(partial(_discard, self._tasks))

    async def _answer(self, choice: Choice, leg: Leg, prompt: list[int]) -> None:
        """Open the leg of the answer; what keeps it from opening is the choice's end."""
        leg.stream.close()
        limit = self._plan.params.max_tokens
        reason, error = FinishReason.LENGTH, None
        if limit is None or len(choice.spent) < limit:
            try:
                await self._open(prompt, self._params_of(choice), choice.index, is_thinking=False)
                return
            except InvalidRequest as refused:
                if refused.code != _CONTEXT_FULL:
                    reason, error = FinishReason.ERROR, str(refused)
            except LlmdError as refused:
                reason, error = FinishReason.ERROR, str(refused)
        choice.ended = True
        self._late.append(ChatDelta(choice.index, finish_reason=reason, error=error))
        self._arrived()


def _discard(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    tasks.discard(task)
