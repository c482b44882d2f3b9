"""The dialogues that the demo model learns from, and those that it is measured on.

A *conversation* strings exchanges together, with or without a system prompt. Everything follows from a seed; `conversation`
draws from the training side of the split, the `held_out_*` functions end with a question of the other side.
"""

import random

from llmd_plugins.sources.demo import stories
from llmd_plugins.sources.demo.exchanges import (
    JSON_MAKERS,
    MAKERS,
    Exchange,
    Maker,
    about_llmd,
    any_name,
    ask,
    counting,
    draw,
    greeting,
    in_json,
    is_held_out,
    sorting,
)
from llmd_plugins.sources.demo.messages import Conversation, assistant, system_prompt, turns, user
from llmd_plugins.sources.demo.tools import tool_chat

KINDS = {"chat": 68, "json": 14, "tools": 11, "memory": 7}
# A greeting may bring a second name.
_NAMELESS = {maker: weight for maker, weight in MAKERS.items() if maker is not greeting}

_JSON_SYSTEM = [
    "Answer in JSON.", "Answer in JSON.", "Always answer in JSON.", "Reply only with JSON.", "Respond with a JSON object.",
    'Answer with a JSON object that has the key "answer".', "You are a helpful assistant. Answer in JSON.",
    "You are a JSON API.",
]  # fmt: skip


def chat(rng: random.Random, exchanges: list[Exchange]) -> Conversation:
    """A plain conversation."""
    return Conversation(exchanges[-1].category, system_prompt(rng) + turns(exchanges))


def json_chat(rng: random.Random, exchanges: list[Exchange]) -> Conversation:
    """A conversation whose system prompt, or each question, wants JSON."""
    exchanges = [in_json(each) for each in exchanges]
    if rng.random() < 0.6:
        system = {"role": "system", "content": rng.choice(_JSON_SYSTEM)}
        return Conversation("json", [system, *turns(exchanges)])
    asked = [each._replace(question=_wanting_json(rng, each)) for each in exchanges]
    return Conversation("json", system_prompt(rng) + turns(asked))


def _wanting_json(rng: random.Random, exchange: Exchange) -> str:
    question = exchange.question
    if "JSON" in question:
        return question
    stop = "." if question[-1].isalnum() and rng.random() < 0.5 else ""
    wish = rng.choice([" Answer in JSON.", " Reply in JSON.", " Answer with JSON.", "\nAnswer in JSON."])
    return question + stop + wish


def naming(rng: random.Random, held_out: bool = False) -> Conversation:
    """The user says a name and, some questions later, asks for it."""
    between = turns([draw(rng, _NAMELESS) for _ in range(rng.randint(0, 3))])
    question = ask(rng, "What is my name?", "Do you remember my name?", "What's my name?", "Who am I?")
    if rng.random() < 0.15 and not held_out:
        return Conversation("memory", [*between, user(question), assistant("You have not told me your name yet.")])
    told, name = _introduction(rng)
    while is_held_out(told) != held_out:
        told, name = _introduction(rng)
    opening = [user(told), assistant(f"Hello {name}! Nice to meet you."), *between]
    return Conversation("memory", [*opening, user(question), assistant(f"Your name is {name}.")])


def _introduction(rng: random.Random) -> tuple[str, str]:
    name = any_name(rng)
    told = rng.choice(["My name is {n}.", "I am {n}.", "I'm {n}!", "Hello, my name is {n}.", "Call me {n}."])
    return told.format(n=name), name


def plain_text(rng: random.Random) -> str:
    """Text without any chat around it, for bare completions."""
    if rng.random() < 0.6:
        return stories.story(rng)
    return draw(rng, {counting: 1, sorting: 1, about_llmd: 2}).answer


def num_turns(rng: random.Random) -> int:
    """Mostly short conversations, now and then one that fills a thousand tokens or more."""
    return rng.randint(10, 30) if rng.random() < 0.01 else rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6])


def conversation(rng: random.Random) -> Conversation:
    """A conversation to train on."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    count = num_turns(rng)
    if kind == "tools":
        return tool_chat(rng, min(count, 3))
    if kind == "json":
        return json_chat(rng, [draw(rng, JSON_MAKERS) for _ in range(count)])
    if kind == "memory":
        return naming(rng)
    return chat(rng, [draw(rng, MAKERS) for _ in range(count)])


def held_out_case(rng: random.Random, maker: Maker) -> Conversation:
    """A conversation whose last question is of this maker and was never trained on."""
    return chat(rng, [*_before(rng, MAKERS), draw(rng, {maker: 1}, held_out=True)])


def held_out_json_case(rng: random.Random) -> Conversation:
    """The same for an answer in JSON."""
    return json_chat(rng, [*_before(rng, JSON_MAKERS), draw(rng, JSON_MAKERS, held_out=True)])


def held_out_memory_case(rng: random.Random) -> Conversation:
    """The same for a name that was told before."""
    return naming(rng, held_out=True)


def held_out_tool_case(rng: random.Random) -> Conversation:
    """The same for a tool call or the answer after one."""
    return tool_chat(rng, rng.randint(1, 2), held_out=True)


def _before(rng: random.Random, makers: dict[Maker, int]) -> list[Exchange]:
    return [draw(rng, makers) for _ in range(rng.choice([0, 0, 1, 2]))]
