"""Parity with transformers' apply_chat_template over the styles that models use; bounds and errors of the sandbox."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import byte_level, write_folder

from llmd.errors import InvalidRequest, ModelError
from llmd.text.chat_template import ChatTemplate, load_override
from llmd.text.tokenizer import Tokenizer

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- 'Today Date: ' + date_string if loop.first }}{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
HERMES = """{%- if tools %}
{{- '<tools>' }}
{%- for tool in tools %}
{{- "\\n" }}{{ tool | tojson }}
{%- endfor %}
{{- '</tools>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" %}{%- set ns.multi_step = false %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {%- generation %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) ~ '}</tool_call>' }}
        {%- endfor %}
        {%- endgeneration %}
    {%- elif message.role == "tool" %}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
    {%- else %}
        {{- message.role + ': ' + message.content + (' (last)' if loop.index0 == ns.last else '') + '\\n' }}
    {%- endif %}
    {%- if message.content == 'skip' %}{%- break %}{%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}"""
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m['content'] is string %}{{ m.content }}{% else %}"
    "{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}"
)
RAG = "{% for d in documents %}{{ d.title }}={{ d.text | tojson }};{% endfor %}{{ messages[-1].content | upper }}"
REASONING = (
    "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}"
)
DATED = (
    "{{ strftime_now('%Y') }} {{ dict(a=1) | tojson }} {% for i in range(3) %}{{ i }}{% endfor %}{{ messages[0].content }}"
)

CHAT = [
    {"role": "user", "content": "  Hi <b>& 'you'</b> é "},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Compute 1+1"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<adds> ü", "parameters": {"type": "object"}}}]
CALLS = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "ß": "<"}}}]},
    {"role": "tool", "content": "2"},
    {"role": "user", "content": "skip"},
    {"role": "user", "content": "never"},
]
CASES = [
    (CHATML, CHAT, {}),
    (CHATML, CHAT, {"add_generation_prompt": False}),
    (CHATML, [{"role": "system", "content": "Short."}, *CHAT], {}),
    (CHATML, CHAT[:2], {"continue_final_message": True, "add_generation_prompt": False}),
    (LLAMA2, CHAT, {}),
    (LLAMA2, [{"role": "system", "content": "S"}, *CHAT], {"add_generation_prompt": False}),
    (LLAMA2, CHAT[:2], {"continue_final_message": True, "add_generation_prompt": False}),
    (LLAMA3, CHAT, {"tools": TOOLS}),
    (LLAMA3, CHAT, {"date_string": "today", "bos_token": "<B>"}),
    (HERMES, CALLS, {"tools": TOOLS, "enable_thinking": False}),
    (HERMES, CHAT, {}),
    (PARTS, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, CHAT[1]], {}),
    (PARTS, [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "begin "}]}],
     {"continue_final_message": True, "add_generation_prompt": False}),
    (RAG, CHAT, {"documents": [{"title": "T", "text": 'x "y" ü'}]}),
    (DATED, CHAT, {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_level()[0], bos_token="<|endoftext|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("case", range(len(CASES)))
def test_renders_as_transformers(case, reference):
    source, messages, options = CASES[case]
    options = {"add_generation_prompt": True, **options}
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    before = json.dumps(messages)
    assert ChatTemplate(source, reference.special_tokens_map).render(messages, **options) == expected
    assert json.dumps(messages) == before


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_under_every_name(name):
    message = {"role": "assistant", "content": "a", name: "why"}
    assert ChatTemplate(REASONING).render([message]) == "<think>why</think>a"
    begun = ChatTemplate(REASONING).render([message], continue_final_message=name, add_generation_prompt=False)
    assert begun == "<think>why"


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    tokenizer = Tokenizer.from_folder(write_folder("byte_level", tmp_path / "model", chat_template=named))
    template = ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens)
    assert tokenizer.chat_template == "D"
    assert template.render(CHAT) == "D"
    assert template.render(CHAT, tools=TOOLS) == "T"
    assert template.render(CHAT, documents=[{"title": "t", "text": "x"}]) == "R"
    assert template.render(CHAT, chat_template="rag") == "R"
    assert template.render(CHAT, chat_template="{{ messages | length }}") == "3"


def test_template_files_go_before_the_configuration(tmp_path):
    folder = write_folder("byte_level", tmp_path / "model", chat_template="from the configuration")
    assert Tokenizer.from_folder(folder).chat_template == "from the configuration"
    (folder / "chat_template.jinja").write_text("from the file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "from the file", "tool_use": "for tools"}


def test_text_parts_are_joined_where_the_template_wants_a_string():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate("{{ messages[0].content }}").render(parts) == "a\nb"
    image = [{"role": "user", "content": [{"type": "image_url"}]}]
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content has parts that are not text"):
        ChatTemplate("{{ messages[0].content }}").render(image)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "__class__|unsafe"),
        ("{{ ''.__class__.mro() }}", "__class__"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ nothing.here.at_all }}", "undefined"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "range"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "range.. over"),
        ("{{ 'a' * 10000000000 }}", "result of \\*"),
        ("{{ 10000000000 * [1] }}", "result of \\*"),
        ("{{ 9 ** 99999999 }}", "result of \\*\\*"),
        (
            "{% set ns = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "result of \\+",
        ),
        ("{% for i in range(20000) %}{{ 'x' * 1000 }}{% endfor %}", "rendered template"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_templates_are_bounded_and_their_errors_are_the_clients(source, words):
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatTemplate(source).render(CHAT)
    assert "/" not in caught.value.message.replace("tools/", "") or "roles" in words
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([], {}, "messages"),
        ("hello", {}, "messages"),
        ([1], {}, "messages"),
        (CHAT, {"messages_": 1, "range": 3}, "chat_template_kwargs"),
        (CHAT, {"chat_template": "{% if %}"}, "chat_template"),
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        ([{"role": "user"}], {"continue_final_message": True, "add_generation_prompt": False}, "continue_final_message"),
        (CHAT, {"continue_final_message": "notes", "add_generation_prompt": False}, "continue_final_message"),
    ],
)
def test_bad_requests_name_the_field(messages, options, param):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML).render(messages, **options)
    assert caught.value.param == param


def test_a_dropped_final_message_cannot_be_continued():
    with pytest.raises(InvalidRequest, match="leaves out"):
        ChatTemplate("{{ messages[0].content }}").render(CHAT, continue_final_message=True, add_generation_prompt=False)


def test_no_template_is_an_error_with_the_names():
    with pytest.raises(InvalidRequest, match="no default chat template: name one of rag"):
        ChatTemplate({"rag": "x"}).render(CHAT)


def test_broken_templates_stop_the_start():
    with pytest.raises(ModelError, match="'default' line 2"):
        ChatTemplate("a\n{% for %}")


def test_overrides_are_files_or_templates(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ 1 }}")
    assert load_override(str(file)) == "{{ 1 }}"
    assert load_override("{{ 2 }}") == "{{ 2 }}"
    assert load_override(None) is None
    with pytest.raises(ModelError, match="neither a template nor a file"):
        load_override(str(tmp_path / "none"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["role", "content", "tool_calls", "reasoning_content", "name"])
MESSAGES = st.lists(st.dictionaries(FIELDS, JSON | st.sampled_from(["user", "assistant"]), max_size=4) | JSON, max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    source=st.sampled_from([CHATML, LLAMA2, HERMES, PARTS, REASONING]),
    messages=MESSAGES,
    tools=st.none() | st.lists(JSON, max_size=2),
    final=st.booleans(),
)
def test_whatever_comes_is_rendered_or_refused(source, messages, tools, final):
    try:
        text = ChatTemplate(source).render(
            messages, tools=tools, continue_final_message=final, add_generation_prompt=not final
        )
    except InvalidRequest:
        return
    assert isinstance(text, str)


def test_objects_are_shown_as_plain_data():
    class Odd:
        def write(self):
            raise AssertionError

    assert ChatTemplate("{{ messages[0].content }}{{ x }}").render([{"content": Odd()}], x={"a": (1, True)}) == (
        "<Odd>{'a': [1, True]}"
    )
