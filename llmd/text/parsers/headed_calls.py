"""Calls as a head with the name, then the arguments as a JSON object: `<begin>name<separator>{…}<end>`."""

from __future__ import annotations

from llmd.text.parsers.reader import ParserSteps
from llmd.text.parsers.scanners import NotACall
from llmd.text.parsers.tool_parser import ToolParser


class HeadedCallParser(ToolParser):
    """Reads calls of the form BEGIN head SEPARATOR arguments END, with SECTION in front of the first of them."""

    SECTION = ""
    BEGIN = ""
    SEPARATOR = ""
    END = ""

    def _first(self, tag: str) -> ParserSteps[None]:
        if tag == self.SECTION:
            yield from self._skip_space()
            yield from self._expect(self.BEGIN)
        yield from self._call()

    def _next(self) -> ParserSteps[None]:
        yield from self._skip_space()
        yield from self._expect(self.BEGIN)
        yield from self._call()

    def _call(self) -> ParserSteps[None]:
        head, _ = yield from self._head((self.SEPARATOR,))
        name, call_id = yield from self._read_head(head.strip())
        if (yield from self._skip_space()) != "{":
            raise NotACall
        self._begin_call(self._check_name(name), call_id)
        yield from self._arguments()
        yield from self._attempt("", self._end_call())

    def _read_head(self, head: str) -> ParserSteps[tuple[str, str | None]]:
        """The function's name and the call's id, if the format has one; what stands before the arguments is read."""
        yield from ()
        return head, None

    def _end_call(self) -> ParserSteps[None]:
        yield from self._skip_space()
        yield from self._expect(self.END)
