"""Which parsers a model gets, by what stands in its chat template (llmd_select_parsers)."""

from pathlib import Path

import pytest

import llmd_plugins.sources.demo
from llmd_plugins.parsers.select import llmd_select_parsers

CHATML = "<|im_start|>assistant\n"
HERMES = '<tools>{{ tool }}</tools> <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>'
# What is telling in the templates of model families, look-alikes side by side.
TEMPLATES = {
    "Qwen2.5": (CHATML + HERMES, ("hermes", None)),
    "Qwen3": (CHATML + HERMES + "{% if '</think>' in content %} <think>\\n\\n</think>", ("hermes", "qwen3")),
    "Qwen3-Coder": (
        CHATML + "<tool_call>\\n<function=' ~ name ~ '><parameter=' ~ key ~ '></tool_call>",
        ("qwen3_coder", None),
    ),
    "Qwen3.5": (
        CHATML + "<tool_call>\\n<function=f>\\n<parameter=a></tool_call> <think>\\n\\n</think>",
        ("qwen3_coder", "qwen3"),
    ),
    "Hermes 3": (CHATML + HERMES + "<scratch_pad>", ("hermes", None)),
    "QwQ": (CHATML + HERMES + "<think>\\n{{ content.split('</think>')[-1] }}", ("hermes", "qwen3")),
    "Llama 3.1": (
        '<|start_header_id|> <|python_tag|> {"name": function name, "parameters": dictionary} <|eom_id|>',
        ("llama3_json", None),
    ),
    "Llama 3.2": (
        '<|start_header_id|> Respond in the format {"name": function name, "parameters": …',
        ("llama3_json", None),
    ),
    "Llama 3 (no tools)": ("<|start_header_id|>{{ role }}<|end_header_id|>", None),
    "Llama 4": (
        '<|header_start|>assistant<|header_end|> <|python_start|> {"name": function name, "parameters": …}',
        ("llama4_json", None),
    ),
    "Llama 4 pythonic": ("<|header_start|>assistant<|header_end|> [func_name1(name=value)]", ("llama4_pythonic", None)),
    "DeepSeek V3.2": (
        '<｜Assistant｜></think> <｜DSML｜invoke name="$TOOL_NAME"> thinking',
        ("deepseek_v32", "deepseek_v3"),
    ),
    "Llama 3.1 functions": ('<|start_header_id|> <function=name>{"a": 1}</function> "parameters"', ("llama3_json", None)),
    "Mistral": ("[INST] [TOOL_CALLS] [AVAILABLE_TOOLS]", ("mistral", None)),
    "Magistral": ("[INST] [TOOL_CALLS]name[ARGS] [THINK][/THINK]", ("mistral", "mistral")),
    "DeepSeek V3": ("<｜Assistant｜> <｜tool▁call▁begin｜>function<｜tool▁sep｜>\\n```json", ("deepseek_v3", None)),
    "DeepSeek R1": (
        "<｜Assistant｜><think>\\n {% if '</think>' in content %} <｜tool▁call▁begin｜> type <｜tool▁sep｜> ```json",
        ("deepseek_v3", "deepseek_r1"),
    ),
    "R1 distilled": ("<｜User｜><｜Assistant｜><think>\\n content.split('</think>')", (None, "deepseek_r1")),
    "DeepSeek V3.1": (
        "{%- set thinking = false -%}<｜Assistant｜></think> <｜tool▁call▁begin｜>name<｜tool▁sep｜>",
        ("deepseek_v31", "deepseek_v3"),
    ),
    "Granite 3.1": ("<|start_of_role|>assistant <|tool_call|>", ("granite", None)),
    "Granite 3.2": ("<|start_of_role|> <|tool_call|> Here is my thought process:", ("granite", "granite")),
    "Granite 3.3": ("<|start_of_role|> <|tool_call|> <think></think> <response></response>", ("granite", "granite")),
    "Granite 4": ("<|start_of_role|> <tools></tools> <tool_call>\\n{…}\\n</tool_call>", ("hermes", None)),
    "gpt-oss": ("<|start|>assistant<|channel|>analysis<|message|> to=functions.", ("openai", "openai_gptoss")),
    "Phi-4-mini": ("<|tool|>{{ tools }}<|/tool|><|end|>", ("phi4_mini", None)),
    "Jamba": ("<|bom|><|system|> <tool_calls>[{{ … }}]</tool_calls>", ("jamba", None)),
    "MiniMax M1": ("<beginning_of_sentence>ai <tool_calls></tool_calls>", ("minimax", None)),
    "MiniMax M2": ("]~b]ai <minimax:tool_call><invoke name= <think>", ("minimax_m2", "minimax_m2")),
    "GLM 4.5": ("[gMASK]<sop> <tool_call>{name} <arg_key> <arg_value> </tool_call> <think></think>", ("glm45", "glm45")),
    "Kimi K2": ("<|im_system|> <|tool_calls_section_begin|><|tool_call_begin|>", ("kimi_k2", None)),
    "Kimi K2 Thinking": ("<|tool_calls_section_begin|> <think></think>", ("kimi_k2", "kimi_k2")),
    "InternLM": (CHATML + "<|action_start|><|plugin|>", ("internlm", None)),
    "plain ChatML": (CHATML, None),
    "none": (None, None),
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_by_template(model):
    template, expected = TEMPLATES[model]
    facts = {"chat_template": template, "architectures": ["XForCausalLM"], "model_type": "x", "special_tokens": []}
    assert llmd_select_parsers(facts) == expected


def test_by_type_where_the_template_is_silent():
    assert llmd_select_parsers({"model_type": "gpt_oss"}) == ("openai", "openai_gptoss")
    assert llmd_select_parsers({}) is None


def test_demo_model_speaks_hermes():
    folder = Path(llmd_plugins.sources.demo.__file__).parent / "model"
    template = (folder / "chat_template.jinja").read_text()
    assert llmd_select_parsers({"chat_template": template, "model_type": "llama"}) == ("hermes", None)


def test_every_choice_is_a_parser_that_exists():
    from importlib import import_module

    from llmd_plugins.parsers import select

    modules = [import_module(f"llmd_plugins.parsers.{file.stem}") for file in Path(select.__file__).parent.glob("[a-z]*.py")]
    tools = {spec.name for each in modules for spec in getattr(each, "llmd_register_tool_parsers", list)()}
    reasoning = {spec.name for each in modules for spec in getattr(each, "llmd_register_reasoning_parsers", list)()}
    assert {mark.name for mark in select._TOOLS} | {tool for tool, _ in select._BY_TYPE.values()} <= tools
    assert {mark.name for mark in select._REASONING} <= reasoning
