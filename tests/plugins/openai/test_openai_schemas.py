"""The engine with a model that has learnt nothing: its answers under JSON schemas are valid all the same."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
from plugins.openai.demo_served import ASK, demo_served

import llmd_plugins.sources.demo
from llmd.text.tokenizer import Tokenizer

FOLDER = Path(llmd_plugins.sources.demo.__file__).parent / "model"
SCHEMAS = json.loads((Path(__file__).parents[2] / "schemas" / "schemas.json").read_text(encoding="utf-8"))


async def test_random_weights_say_what_schemas_allow():
    """The engine, its masks and its forced tokens, with a model that has learnt nothing."""
    names = [name for index, name in enumerate(SCHEMAS) if index % 17 == 0]
    tokenizer = Tokenizer.from_folder(FOLDER)
    closing = {tokenizer.encode(text, add_special_tokens=False)[0]: 6.0 for text in ('"', "}", "]", "0")}
    num_finished = 0
    async with demo_served({"load_format": "dummy"}) as (client, _):
        for number, name in enumerate(names):
            form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMAS[name]}}
            answer = await client.chat.completions.create(
                model="demo", messages=ASK, response_format=form, temperature=1, seed=number, max_tokens=96, n=2,
                logit_bias={str(token_id): bias for token_id, bias in closing.items()},
            )  # fmt: skip
            for choice in answer.choices:
                assert choice.finish_reason in ("stop", "length")
                if choice.finish_reason == "stop":
                    jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(choice.message.content))
                    num_finished += 1
    assert num_finished >= len(names) // 2
