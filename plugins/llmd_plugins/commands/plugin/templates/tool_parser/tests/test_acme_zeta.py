"""Streaming = not streaming, for calls, broken calls and plain text."""

from acme_zeta import ZetaParser

from llmd.api.v1.testing import Parsed, check_parser

CALL = '<zeta>{"name": "weather", "arguments": {"city": "Zürich"}}</zeta>'
ARGUMENTS = '{"city": "Zürich"}'


def test_parser():
    texts = ["no call", f"Let me see. {CALL}", CALL + CALL, "<zeta>not JSON</zeta>", '<zeta>{"name": "weather", "arg']
    expected = [
        Parsed("no call", "", ()),
        Parsed("Let me see.", "", (("weather", ARGUMENTS),)),
        Parsed("", "", (("weather", ARGUMENTS), ("weather", ARGUMENTS))),
        Parsed("<zeta>not JSON</zeta>", "", ()),
        Parsed('<zeta>{"name": "weather", "arg', "", ()),
    ]
    check_parser(ZetaParser, texts, expected=expected)
