"""Chat messages and the conversations made of them."""

import random
from dataclasses import dataclass
from typing import Any

from llmd_plugins.sources.demo import words
from llmd_plugins.sources.demo.exchanges import Exchange, any_name

Message = dict[str, Any]
_SYSTEM = [
    "You are a helpful assistant.", "You are a helpful assistant.", "You are llmd's demo model.", "Be brief.",
    "You are a friendly assistant.", "Answer in one sentence.", "You are a chatbot.", "Answer the questions of the user.",
    "You are an assistant for {n}.", "Today is {d}.", "You are a {a} {j}.", "The user is called {n}.",
]  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Chat messages, of which the last is the assistant's; `category` is that of the last answer."""

    category: str
    messages: list[Message]
    tools: list[Message] | None = None


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


def turns(exchanges: list[Exchange]) -> list[Message]:
    """The messages of the exchanges, one after the other."""
    return [message for each in exchanges for message in (user(each.question), assistant(each.answer))]


def system_prompt(rng: random.Random) -> list[Message]:
    """No system message, or one that changes nothing."""
    if rng.random() < 0.6:
        return []
    text = rng.choice(_SYSTEM).format(
        n=any_name(rng), d=rng.choice(words.DAYS), a=rng.choice(words.ADJECTIVES), j=rng.choice(words.JOBS)
    )
    return [{"role": "system", "content": text}]
