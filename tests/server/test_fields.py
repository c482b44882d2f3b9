"""Request fields: every mistake names its field, and what asks for nothing passes."""

from __future__ import annotations

import pytest

from llmd.errors import InvalidRequest
from llmd.server.fields import (
    RequestFields,
    Whole,
    check_field_names,
    list_at,
    object_at,
    parse_request,
    shown,
    string_at,
)


class Inner(RequestFields):
    depth: Whole = 1


class Body(RequestFields):
    model: str
    count: Whole = 3
    inner: list[Inner] = []


UNSERVED = {"audio": (), "modalities": (["text"],)}


def test_a_whole_number_may_have_a_point_and_neutral_fields_pass():
    given = {"model": "m", "count": 5.0, "audio": None, "modalities": ["text"]}
    assert parse_request(Body, given, UNSERVED).count == 5


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({}, "model", "model is required"),
        ({"model": 3}, "model", "must be a valid string, got 3"),
        ({"model": "m", "count": 1.5}, "count", "count must be"),
        ({"model": "m", "inner": [{"depth": 1}, {"depth": "x"}]}, "inner[1].depth", "inner[1].depth must be"),
        ({"model": "m", "inner": [{"deep": 1}]}, "inner[0].deep", "unknown field 'inner[0].deep'"),
        ({"model": "m", "cuont": 1}, "cuont", "did you mean 'count'?"),
        ({"model": "m", "audio": {}}, "audio", "audio is not served"),
        ({"model": "m", "modalities": ["text", "audio"]}, "modalities", "modalities is not served"),
        ({"model": "m", "x" * 500: 1}, "x" * 64, "unknown field"),
    ],
)
def test_mistakes_name_their_field(given, param, words):
    with pytest.raises(InvalidRequest) as refused:
        parse_request(Body, given, UNSERVED)
    assert refused.value.param == param
    assert words in str(refused.value)


def test_values_are_looked_at_where_they_stand():
    assert (string_at("a", "x"), object_at("a", {}), list_at("a", [1], 1)) == ("x", {}, [1])
    for call in (
        lambda: string_at("a", 1),
        lambda: object_at("a", []),
        lambda: list_at("a", {}, 1),
        lambda: list_at("a", [1, 2], 1),
    ):
        with pytest.raises(InvalidRequest, match=r"^a must"):
            call()
    check_field_names("tool", {"name": 1, "other": None}, ["name"])
    with pytest.raises(InvalidRequest, match=r"tool\.nmae.*did you mean 'name'"):
        check_field_names("tool", {"nmae": 1}, ["name"])
    assert len(shown("x" * 10_000)) < 100
