"""Objects that say nothing of other properties are closed where no other part of the schema adds to them."""

import pytest

from llmd.text.json_schemas import close_objects

TRIP = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CLOSED = {**TRIP, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (TRIP, CLOSED),
        ({"type": "array", "items": TRIP}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [TRIP, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/a", "$defs": {"a": TRIP}}, {"$ref": "#/$defs/a", "$defs": {"a": CLOSED}}),
    ],
)
def test_objects_are_closed(given, wanted):
    assert close_objects(given) == wanted


@pytest.mark.parametrize(
    "given",
    [
        {"type": "object"},
        {**TRIP, "additionalProperties": True},
        {**TRIP, "additionalProperties": {"type": "integer"}},
        {**TRIP, "patternProperties": {"^x": {}}},
        {**TRIP, "minProperties": 2},
        {**TRIP, "required": ["city", "other"]},
        {"allOf": [TRIP, {"properties": {"days": {"type": "integer"}}}]},
        {**TRIP, "anyOf": [{"properties": {"days": {}}, "required": ["days"]}, {"required": ["city"]}]},
        {**TRIP, "$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {}}}}},
    ],
)
def test_what_others_may_add_to_stays_open(given):
    assert close_objects(given) == given
