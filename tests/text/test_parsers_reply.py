"""Tags across increments, reasoning before tools, and what is held back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import TOOLS, counted_ids, cut, join, parse

from llmd.text.parsers import JsonCallParser, ParsedDelta, ReplyParser, ThinkingParser, new_call_id, new_short_call_id
from llmd.text.parsers.reader import MAX_HELD, MAX_SPACE, TrailingSpace
from llmd.text.parsers.tags import Tags

cuts = st.lists(st.integers(0, 1 << 20), max_size=8)


class Calls(JsonCallParser):
    OPENS = ("<call>",)
    CLOSES = ("</call>",)


def find_all(tags, chunks):
    """Every tag and the text around, from a text in pieces."""
    found, rest = [""], ""
    for index, chunk in enumerate([*chunks, ""]):
        rest, at = rest + chunk, 0
        while True:
            hit = tags.find(rest, at, len(rest), is_last=index == len(chunks))
            found[-1] += rest[at : hit.end]
            at = hit.end + len(hit.tag or "")
            if hit.tag is None:
                break
            found += [hit.tag, ""]
        rest = rest[at:]
    return found


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab<>\n", max_size=30), cuts)
def test_tags_are_found_however_the_text_is_cut(text, positions):
    tags = Tags(["<a>", "\n<a>", "ab<b", "<<"])
    found = find_all(tags, cut(text, positions))
    assert found == find_all(tags, [text])
    assert "".join(found) == text


def test_only_what_may_become_a_tag_is_held_back():
    parser = Calls(TOOLS)
    assert parser.feed("one < two <cal") == [ParsedDelta(content="one < two")]
    assert parser.feed("m> x") == [ParsedDelta(content=" <calm> x")]
    assert parser.feed("<call>{") == []
    assert parser.feed('"name": "nope"') == [ParsedDelta(content='<call>{"name": "nope"')]
    assert parser.finish() == []


def test_arguments_stream():
    parser = Calls(TOOLS, make_id=counted_ids())
    assert parser.feed('<call>{"name": "now", "arguments": ') == []
    deltas = [parser.feed(text) for text in ('{"a": "x', "y", "\\", 'n"', "}", "}</call>")]
    assert ["".join(delta.tool_call.arguments for delta in each) for each in deltas] == [
        '{"a": "x',
        "y",
        "",
        '\\n"',
        "}",
        "",
    ]
    assert deltas[0][0].tool_call.id == "id0"
    assert deltas[1][0].tool_call.id is None


@pytest.mark.parametrize("chunk", [1000, 4096, 1 << 20])
def test_what_is_held_has_a_bound(chunk):
    text = '<call>{"arguments": {"a": "' + "x" * (MAX_HELD + 5000)
    parser = Calls(TOOLS)
    shown = 0
    for start in range(0, len(text), chunk):
        shown += sum(len(delta.content) for delta in parser.feed(text[start : start + chunk]))
        assert min(start + chunk, len(text)) - shown <= MAX_HELD + chunk
    rest = parser.feed('"}, "name": "now"}</call>') + parser.finish()
    assert join(rest).calls == []
    assert parse(Calls(TOOLS), text).content == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=" \nx", max_size=20), cuts)
def test_trailing_space(text, positions):
    space = TrailingSpace()
    out = "".join(space.push(chunk) for chunk in cut(text, positions))
    assert out == text.rstrip()
    assert out + space.take() == text


def test_trailing_space_is_bounded():
    space = TrailingSpace()
    assert len(space.push(" " * 1000)) == 1000 - MAX_SPACE
    assert len(space.push(" " * 10)) == 10


@pytest.mark.parametrize(
    ("text", "prompt", "reasoning", "content"),
    [
        ("<think>a\nb</think>\n\nc", "", "a\nb", "c"),
        ("\n<think>\na\n</think>c ", "", "a", "c "),
        ("<think>a", "", "a", ""),
        ("<think>a</think", "", "a</think", ""),
        ("<think></think>c", "", "", "c"),
        ("c <think>a</think>", "", "", "c <think>a</think>"),
        ("  c", "", "", "  c"),
        ("a</think>c", "user <think>\n", "a", "c"),
        ("<think>a</think>c", "user <think>", "a", "c"),
        ("c</think>", "<think></think>\n\n", "", "c</think>"),
        ("a</think>c</think>", "<think>", "a", "c</think>"),
        ("", "<think>", "", ""),
        ("a < b << </ </th \n", "<think>", "a < b << </ </th", ""),
    ],
)
def test_thinking(text, prompt, reasoning, content):
    whole = parse(ThinkingParser(prompt), text)
    assert (whole.reasoning, whole.content) == (reasoning, content)
    assert parse(ThinkingParser(prompt), *text) == whole


def test_reasoning_first_then_tools():
    text = '<think>\nperhaps <call>{"name": "now"}</call>\n</think>\n\nSure.\n<call>{"name": "now", "arguments": {}}</call>'
    whole = parse(ReplyParser(ThinkingParser(), Calls(TOOLS, make_id=counted_ids())), text)
    assert whole.reasoning == 'perhaps <call>{"name": "now"}</call>'
    assert whole.content == "Sure."
    assert whole.calls == [("id0", "now", "{}")]
    assert parse(ReplyParser(ThinkingParser(), Calls(TOOLS, make_id=counted_ids())), *text) == whole


@pytest.mark.parametrize("reply", [ReplyParser(), ReplyParser(None, Calls([])), ReplyParser(ThinkingParser())])
def test_either_part_may_be_missing(reply):
    assert parse(reply, "one ", "", "<call>{} two").content == "one <call>{} two"


def test_no_text_at_all():
    for parser in (Calls(TOOLS), ThinkingParser(), ReplyParser(ThinkingParser(), Calls(TOOLS))):
        assert parser.finish() == []


def test_ids():
    assert len(new_call_id()) == len("call_") + 24
    assert int(new_call_id().removeprefix("call_"), 16) >= 0
    assert len(new_short_call_id()) == 9
    assert new_short_call_id().isalnum()
    assert parse(Calls(None), '<call>{"name": "any"}').calls[0][0].startswith("call_")
