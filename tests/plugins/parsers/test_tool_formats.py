"""Each tool format: what its calls, and its malformed calls, come to; and the same for any cut of the text."""

import json
from importlib import import_module

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parsed import TOOLS, counted_ids, cut, parse

MODULES = (
    *("deepseek", "deepseek_v32", "glm45", "granite", "hermes", "internlm", "jamba", "kimi_k2", "llama3_json", "minimax"),
    *("mistral", "openai", "phi4_mini", "pythonic", "qwen3_coder"),
)
SPECS = {
    spec.name: spec
    for module in MODULES
    for spec in import_module(f"llmd_plugins.parsers.{module}").llmd_register_tool_parsers()
}

WEATHER, TIME = ("get_weather", {"city": 'Zürich "{}"\n🌧', "days": 3}), ("now", {})
W = json.dumps(WEATHER[1], ensure_ascii=False)
V3, V31 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "<｜tool▁call▁begin｜>"
DS_OPEN, DS_SEP, DS_END, DS_CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
KIMI_SEP = "<|tool_call_argument_begin|>"
QWEN = (
    '<function=get_weather>\n<parameter=city>\nZürich "{}"\n🌧\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>'
)
GLM = (
    '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich "{}"\n🌧</arg_value>\n'
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
INVOKE = (
    '<invoke name="get_weather"><parameter name="city">Zürich "{}"\n🌧</parameter>\n'
    '<parameter name="days">3</parameter></invoke>'
)
DSML = (
    '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Zürich "{}"\n🌧</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>'
)
PLUGIN = "<|action_end|>\n<|action_start|><|plugin|>"
HARMONY = "<|start|>assistant<|channel|>commentary to=functions."


def objects(key="arguments", between=", "):
    """Both calls as JSON objects."""
    return between.join(
        json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in (WEATHER, TIME)
    )


# format → both calls, one after the other, as its chat template writes them
BOTH = {
    "deepseek_v3": f"{DS_OPEN}{V3}get_weather\n```json\n{W}\n```{DS_END}\n{V3}now\n```json\n{{}}\n```{DS_END}{DS_CLOSE}",
    "deepseek_v31": f"{DS_OPEN}{V31}get_weather{DS_SEP}{W}{DS_END}{V31}now{DS_SEP}{{}}{DS_END}{DS_CLOSE}",
    "deepseek_v32": f"<｜DSML｜function_calls>\n{DSML}\n</｜DSML｜function_calls>",
    "deepseek_v4": f"<｜DSML｜tool_calls>{DSML}</｜DSML｜tool_calls>",
    "glm45": f"{GLM}\n<tool_call>now\n</tool_call>",
    "glm47": f"{GLM.replace(chr(10) + '<arg_', '<arg_')}<tool_call>now</tool_call>",
    "granite": f"<|tool_call|>[{objects()}]",
    "hermes": "".join(f"<tool_call>\n{each}\n</tool_call>\n" for each in objects(between="\0").split("\0")),
    "internlm": "<|action_start|><|plugin|>\n" + objects("parameters", PLUGIN) + "<|action_end|>",
    "jamba": f"<tool_calls>[\n  {objects(between=chr(10))}\n]</tool_calls>",
    "kimi_k2": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0{KIMI_SEP}{W}<|tool_call_end|>"
    f"<|tool_call_begin|>functions.now:1{KIMI_SEP}{{}}<|tool_call_end|><|tool_calls_section_end|>",
    "llama3_json": objects("parameters", "; "),
    "llama4_json": "<|python_tag|>" + objects("parameters", "; "),
    "minimax": f"<tool_calls>\n{objects(between=chr(10))}\n</tool_calls>",
    "minimax_m2": f'<minimax:tool_call>\n{INVOKE}\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "mistral": f"[TOOL_CALLS][{objects()}]",
    "openai": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{W}<|call|>"
    f"{HARMONY}now<|message|>{{}}<|call|>",
    "phi4_mini": f"functools[{objects()}]",
    "phi4_mini_json": "<|tool_call|>" + objects(between="<|/tool_call|><|tool_call|>") + "<|/tool_call|>",
    "pythonic": "[get_weather(city='Zürich \"{}\"\\n🌧', days=3), now()]",
    "llama4_pythonic": '<|python_start|>[get_weather(city="Zürich \\"{}\\"\\n🌧", days=3), now()]<|python_end|>',
    "qwen3_coder": f"<tool_call>\n{QWEN}\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "qwen3_xml": f"{QWEN}\n<function=now>\n</function>\n</tool_call>",
}
UNTAGGED = ("llama3_json", "pythonic")  # calls only at the start of the answer (or of a line)
CONVERTED = (
    "deepseek_v32",
    "deepseek_v4",
    "glm45",
    "glm47",
    "llama4_pythonic",
    "minimax_m2",
    "pythonic",
    "qwen3_coder",
    "qwen3_xml",
)  # not JSON
LIVELY = sorted(set(SPECS) - {"openai"})  # formats in which text may stand anywhere


def read(name, *chunks, tools=TOOLS):
    """What the parser of a format makes of a text in pieces."""
    return parse(SPECS[name].build(tools, make_id=counted_ids()), *chunks)


def test_every_format_is_tested():
    assert set(BOTH) == set(SPECS)


@pytest.mark.parametrize("name", sorted(BOTH))
def test_two_calls(name):
    for text in (BOTH[name], BOTH[name] + "\n"):
        whole = read(name, text)
        assert list(zip(whole.names, whole.arguments, strict=True)) == [WEATHER, TIME]
        assert whole.content == whole.reasoning == ""
        assert len({call_id for call_id, _, _ in whole.calls}) == 2
        assert read(name, *text) == whole
        assert read(name, text, tools=None).names == whole.names


@pytest.mark.parametrize("name", sorted(set(LIVELY) - set(UNTAGGED)))
def test_text_around_calls(name):
    for text in (f"Let me see.\n{BOTH[name]}", f"Let me see.\n{BOTH[name]}\nDone."):
        whole = read(name, text)
        assert list(zip(whole.names, whole.arguments, strict=True)) == [WEATHER, TIME]
        assert whole.content.split() == text.replace(BOTH[name], "").split()
        assert read(name, *text) == whole


@pytest.mark.parametrize("name", sorted(BOTH))
def test_calls_of_unknown_functions_are_content(name):
    whole = read(name, BOTH[name], tools=[])
    assert whole.calls == []
    assert whole.content == (BOTH[name] if name != "openai" else BOTH[name].replace("<|call|>", ""))


@pytest.mark.parametrize("name", sorted(BOTH))
def test_cut_off_anywhere(name):
    """Of a call without a name nothing is lost; a call with one keeps what was there of its arguments."""
    for end in range(len(BOTH[name])):
        whole = read(name, BOTH[name][:end])
        if not whole.calls and name != "openai":
            assert whole.content == BOTH[name][:end]
        for call, (right_name, right) in zip(whole.calls, (WEATHER, TIME), strict=False):
            assert call[1] == right_name
            if name not in CONVERTED:
                assert json.dumps(right, ensure_ascii=False).startswith(call[2].rstrip())


GARBAGE = [
    "",
    " ",
    "\n",
    "text",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    ",",
    ";",
    "é",
    "🌧",
    "<",
    "</",
    "<|",
    "<think>",
    "3",
    "null",
    "a=",
    "(",
    ")",
]
PARTS = [
    '"name"',
    '"arguments"',
    '"parameters"',
    ": ",
    '"now"',
    '{"name": "now", "arguments": {}}',
    '{"name": "now"',
    ', "arguments": {"a": ',
    '{"arguments": {"a": [1, {"b": "}"}]}, "name": "now"}',
    '"x\\"y',
    "now(",
    "get_weather(city='x', ",
    "functions.now:0",
    "function",
    "```json\n",
    "now",
    "get_weather",
    "oops",
    '"arguments": "{\\"a\\": 1}"}',
    "[CALL_ID]",
    "[ARGS]",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<function=now>",
    "<parameter=city>",
    "</parameter>",
    "</function>",
    '<invoke name="now">',
    '<parameter name="days">',
    "</invoke>",
    "<|start|>assistant",
    "<|channel|>analysis",
    "<|channel|>final",
    "<|message|>",
    "<|end|>",
    "to=functions.now ",
]


def fragments(name):
    """Texts of parts of the format in any order, and pieces of the right one."""
    parser = SPECS[name].build
    tags = [*parser.OPENS, *parser.CLOSES, BOTH[name]]
    for attribute in ("SECTION", "BEGIN", "SEPARATOR", "END"):
        tags.append(getattr(parser, attribute, ""))
    pieces = st.integers(0, len(BOTH[name])).flatmap(
        lambda start: st.integers(0, 40).map(lambda n: BOTH[name][start : start + n])
    )
    part = st.sampled_from(tags) | st.sampled_from(tags) | st.sampled_from(PARTS) | st.sampled_from(GARBAGE) | pieces
    return st.lists(part, max_size=14).map("".join)


@pytest.mark.parametrize("name", sorted(BOTH))
def test_any_cut_gives_the_same(name):
    @settings(max_examples=120, deadline=None, database=None)
    @given(fragments(name), st.lists(st.integers(0, 1 << 16), max_size=6))
    @example(BOTH[name], list(range(len(BOTH[name]))))
    def check(text, positions):
        whole = read(name, text)
        assert read(name, *cut(text, positions)) == whole
        assert read(name, *text) == whole
        if not whole.calls and not SPECS[name].build.splits_reasoning:
            assert whole.content == text

    check()


@pytest.mark.parametrize("name", LIVELY)
def test_plain_text_comes_at_once(name):
    parser = SPECS[name].build(TOOLS)
    shown = "".join(delta.content for word in ("The", " sky", ",", " it", " is", " blue.") for delta in parser.feed(word))
    assert shown == "The sky, it is blue."


@pytest.mark.parametrize(
    ("name", "text", "calls", "content"),
    [
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', ["{}"], ""),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', ["{}"], ""),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', ['{"a": 1}'], ""),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}\n</tool_call>x', ['{"a": 1}'], "\nx"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>x', ['{"a": oops}}'], "x"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "b', ['{"a": "b'], ""),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', [], None),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', [], None),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', [], None),
        ("hermes", '<tool_call>not <tool_call>{"name": "now", "arguments": {}}</tool_call>', ["{}"], "<tool_call>not"),
        ("hermes", '<tool_call>{"id": 3, "arguments": {"b": 2}, "name": "now"}</tool_call>', ['{"b": 2}'], ""),
        ("hermes", "a </tool_call> b", [], None),
        ("hermes", "```xml\n<tool_call>\n```", [], None),
        ("granite", '<tool_call>[{"name": "now", "arguments": {}}, oops', ["{}"], ", oops"),
        ("granite", "<|tool_call|>[]", [], None),
        ("granite", '<|tool_call|>[{"name": "now", "arguments": {}}, ]', ["{}"], ""),
        ("granite", '<|tool_call|>{"name": "now", "arguments": {}} ]', ["{}"], " ]"),
        ("openai", "<|channel|>commentary to=functions.now<|message|>{} more<|call|>", ["{}"], " more"),
        ("llama3_json", '{"name": "now"}', [], None),
        ("llama3_json", '{"name": "now", "age": 3, "parameters": {}}', [], None),
        ("llama3_json", 'I call:\n{"name": "now", "parameters": {}}', ["{}"], "I call:"),
        ("llama3_json", '<|python_tag|>brave_search.call(query="x")', [], None),
        ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', ["{}"], ""),
        ("mistral", 'A[TOOL_CALLS]now[ARGS]{"a": 1}[TOOL_CALLS]now{"b": 2}', ['{"a": 1}', '{"b": 2}'], "A"),
        ("mistral", "[TOOL_CALLS]nothing of the kind", [], None),
        ("pythonic", "[now(1)]", [], None),
        ("pythonic", "[1] a note", [], None),
        ("pythonic", "[now(a=1 b=oops()), now()]", ['{"a": 1, "b": oops()), now()]'], ""),
        ("pythonic", "[now(a=None, b=(True, {'x': [1.5, -2]}),),]", ['{"a": null, "b": [true, {"x": [1.5, -2]}]}'], ""),
        ("qwen3_coder", "<function=now>\n<parameter=text>\na\n\n</parameter>\n</function>", ['{"text": "a\\n"}'], ""),
        (
            "qwen3_coder",
            "<function=now><parameter=a>1</parameter><parameter=b>{'x': 1}</parameter></function>",
            ['{"a": 1, "b": {"x": 1}}'],
            "",
        ),
        (
            "qwen3_coder",
            "<function=now>\n<parameter=a>\nx\n<parameter=b>\ny\n</function>\nz",
            ['{"a": "x", "b": "y"}'],
            "\nz",
        ),
        ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=a>\nunfinished", ['{"a": '], ""),
        ("qwen3_coder", '<tool_call>\n{"name": "now"}\n</tool_call>', [], None),
        ("glm45", "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>true</arg_value>\n</tool_call>", ['{"a": true}'], ""),
        ("glm45", "<tool_call>what is this</tool_call>", [], None),
        ("kimi_k2", f"<|tool_call_begin|>now{KIMI_SEP}{{}}<|tool_call_end|>", ["{}"], ""),
        ("deepseek_v3", f'{DS_OPEN}{V3}now\n```json\n{{"a": b}}\n```{DS_END}{DS_CLOSE}c', ['{"a": b}\n```'], "c"),
        ("openai", "<|channel|>commentary to=functions.now<|message|>not JSON<|call|>", ["not JSON"], ""),
        ("openai", "<|channel|>final<|message|>Hi<|return|>", [], "Hi"),
        ("openai", "<|start|>assistant<|message|>Hi<|end|>", [], "Hi"),
        (
            "openai",
            "<|channel|>commentary to=browser.open<|message|>Hi<|end|>",
            [],
            "<|channel|>commentary to=browser.open<|message|>Hi",
        ),
        ("openai", "no header at all", [], None),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}', ['{"a": "\\ud800"}'], ""),
        ("hermes", '<tool_call>{"name": "now", "arguments": "\\ud800"}', [], None),
    ],
)
def test_oddities(name, text, calls, content):
    whole = read(name, text)
    assert [arguments for _, _, arguments in whole.calls] == calls
    assert whole.content == (text if content is None else content)
    assert read(name, *text) == whole


def test_ids_of_the_formats():
    assert [call[0] for call in read("kimi_k2", BOTH["kimi_k2"]).calls] == ["functions.get_weather:0", "functions.now:1"]
    assert read("mistral", "[TOOL_CALLS]now[CALL_ID]abcDEF123[ARGS]{}").calls == [("abcDEF123", "now", "{}")]
    call_id = parse(SPECS["mistral"].build(TOOLS), BOTH["mistral"]).calls[0][0]
    assert len(call_id) == 9
    assert call_id.isalnum()


def test_harmony_says_all_three():
    text = (
        "<|channel|>analysis<|message|>Let me\nsee.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    )
    text += "<|start|>assistant<|channel|>analysis<|message|>Now.<|end|>"
    text += "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    text += f"{HARMONY}now<|message|> {{}} <|call|>"
    text += "<|start|>assistant<|channel|>final<|message|>It is \n"
    whole = read("openai", text)
    assert (whole.reasoning, whole.content) == ("Let me\nsee.\nNow.", "I look.\nIt is \n")
    assert [call[1:] for call in whole.calls] == [("now", "{}"), ("now", "{}")]
    assert read("openai", *text) == whole


def test_strings_stream_in_markup():
    parser = SPECS["qwen3_coder"].build(TOOLS, make_id=counted_ids())
    parser.feed("<function=get_weather>\n<parameter=city>\n")
    texts = [
        "".join(delta.tool_call.arguments for delta in parser.feed(text)) for text in ("Par", '"is', "\n", "</param", "x")
    ]
    assert texts == ['"Par', '\\"is', "", "", "\\n</paramx"]


def test_the_same_tools_in_other_shapes():
    flat = [tool["function"] for tool in TOOLS]
    assert read("hermes", BOTH["hermes"], tools=flat) == read("hermes", BOTH["hermes"])
    assert read("qwen3_coder", BOTH["qwen3_coder"], tools=flat) == read("qwen3_coder", BOTH["qwen3_coder"])
