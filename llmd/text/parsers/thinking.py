"""Reasoning between tags, at the start of an answer."""

from __future__ import annotations

from llmd.text.parsers.reader import ParserSteps, TextParser, TrailingSpace


class ThinkingParser(TextParser):
    """What stands between one of OPENS and one of CLOSES is reasoning, all behind it content.

    `prompt` is the prompt's text (its end suffices): where it ends with a tag, that decides whether the answer begins
    inside the reasoning; otherwise STARTS_INSIDE does. White space around the tags belongs to the format.
    """

    OPENS: tuple[str, ...] = ("<think>",)
    CLOSES: tuple[str, ...] = ("</think>",)
    STARTS_INSIDE = False
    ENDS_BEFORE: tuple[str, ...] = ()  # tags of content that end a reasoning which was not closed
    WRAPS: tuple[tuple[str, str], ...] = ()  # tags that may stand around the content

    def __init__(self, prompt: str = "") -> None:
        prompt = prompt.rstrip()
        self._is_inside = prompt.endswith(self.OPENS) or (self.STARTS_INSIDE and not prompt.endswith(self.CLOSES))
        super().__init__()

    def _steps(self) -> ParserSteps[None]:
        space = TrailingSpace()
        yield from self._skip_space(lambda text: self._tell(space.push(text)))
        opening = yield from self._accept_any(self.OPENS)
        if opening is not None or self._is_inside:
            yield from self._reasoning()
            yield from self._skip_space()
            for begin, end in self.WRAPS:
                if (yield from self._accept(begin)):
                    yield from self._wrapped(end)
        else:
            self._tell(space.take())
        yield from self._to_end(self._tell)

    def _reasoning(self) -> ParserSteps[None]:
        yield from self._skip_space()
        space = TrailingSpace()
        tag = yield from self._until(self.CLOSES + self.ENDS_BEFORE, lambda text: self._emit("reasoning", space.push(text)))
        if tag in self.ENDS_BEFORE:
            self._tell(tag)

    def _wrapped(self, end: str) -> ParserSteps[None]:
        yield from self._skip_space()
        if (yield from self._until((end,), self._say)) is None:
            self._say_rest()
        yield from self._skip_space()

    def _tell(self, text: str) -> None:
        self._emit("content", text)
