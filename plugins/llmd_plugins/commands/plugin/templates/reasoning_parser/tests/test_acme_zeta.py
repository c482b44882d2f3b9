"""Streaming = not streaming, with the tag in the answer and in the prompt."""

from acme_zeta import ZetaParser

from llmd.api.v1.testing import Parsed, check_parser


def test_parser():
    texts = ["plain", "<zeta>\nhm\n</zeta>\n\n42", "<zeta>never closed", "a <zeta> b"]
    expected = [
        Parsed("plain", "", ()),
        Parsed("42", "hm", ()),
        Parsed("", "never closed", ()),
        Parsed("a <zeta> b", "", ()),
    ]
    check_parser(ZetaParser, texts, expected=expected)


def test_prompt_opens():
    check_parser(lambda: ZetaParser("user: 6·7?\n<zeta>\n"), ["hm</zeta>42"], expected=[Parsed("42", "hm", ())])
