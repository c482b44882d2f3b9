"""Llama 3.1 to 3.3: the answer is a JSON object with name and parameters, `<|python_tag|>` in front of it or not."""

from __future__ import annotations

from llmd.api.v1 import BareJsonCallParser, CallForm, ParserSpec, hookimpl, json_call


class Llama3JsonParser(BareJsonCallParser):
    """Reads `{"name": …, "parameters": {…}}`; several are divided by semicolons."""

    OPENS = ("<|python_tag|>", "\n{")


class Llama4JsonParser(BareJsonCallParser):
    """The same between tags."""

    OPENS = ("<|python_start|>", "<|python_tag|>", "\n{")
    CLOSES = ("<|python_end|>",)


def _form(parser: type[BareJsonCallParser]) -> CallForm:
    """One call without a tag, or several divided by semicolons."""
    call = json_call('{"name": {name}, "parameters": ', "}")
    return CallForm(call=call, between="; ", opens=parser.OPENS, starts="".join(parser.STARTS))


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    """Llama 3, and Llama 4 where its template asks for JSON."""
    three, four = "Llama 3: <|python_tag|>{JSON}, tag or not", "Llama 4: <|python_start|>{JSON}, tag or not"
    return [
        ParserSpec(name="llama3_json", summary=three, build=Llama3JsonParser, form=_form(Llama3JsonParser)),
        ParserSpec(name="llama4_json", summary=four, build=Llama4JsonParser, form=_form(Llama4JsonParser)),
    ]
