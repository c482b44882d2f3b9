"""Tool calls as `<zeta>{"name": …, "arguments": {…}}</zeta>`."""

from llmd.api.v1 import CallForm, JsonCallParser, ParserSpec, hookimpl, json_call


class ZetaParser(JsonCallParser):
    """What stands between the tags is a call if it is a JSON object with a name; otherwise it is content."""

    OPENS = ("<zeta>",)
    CLOSES = ("</zeta>",)


# how the format is written: what forces a call (tool_choice) and holds it to its schema is made of this
FORM = CallForm(
    call=json_call('{"name": {name}, "arguments": ', "}"),
    begin="<zeta>",
    between="</zeta><zeta>",
    end="</zeta>",
    opens=ZetaParser.OPENS,
)


@hookimpl
def llmd_register_tool_parsers() -> list[ParserSpec]:
    return [ParserSpec(name="zeta", summary="<zeta>{JSON}</zeta>", build=ZetaParser, form=FORM)]
