"""What both grammar plugins ask of a JSON schema: exact formats, counts that can be promised."""

from __future__ import annotations

import re

from llmd.api.v1 import STRING_FORMATS, JsonSchema


def exact_formats(schema: JsonSchema) -> JsonSchema:
    """A schema's own format as a pattern, where libraries let days and seconds through that there are not."""
    given = schema.get("format")
    pattern = STRING_FORMATS.get(given) if isinstance(given, str) else None
    if pattern is None:
        return schema
    rest = {key: value for key, value in schema.items() if key != "format"}
    if "pattern" not in rest:
        return {**rest, "pattern": pattern}
    return {**rest, "allOf": [*(rest.get("allOf") or ()), {"pattern": pattern}]}


def check_counts(schema: JsonSchema) -> None:
    """Raise ValueError for a least number of properties that could be reached by one key written twice."""
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > named + 1:
        raise ValueError(
            f"minProperties {least} cannot be promised with {named} required properties: a key could come twice"
        )


def first_line(message: str) -> str:
    """An error of a library in one line, without where in its sources it was raised."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return re.sub(r"^\[[^\]]*\] \S+:\d+: ", "", " ".join(lines))[:500]
