"""How often the demo model gives exactly the right answer to prompts that it was never trained on."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from llmd_plugins.sources.demo.corpus import held_out_case, held_out_json_case, held_out_memory_case, held_out_tool_case
from llmd_plugins.sources.demo.exchanges import MAKERS
from llmd_plugins.sources.demo.messages import Conversation
from llmd_plugins.sources.demo.tokenizer import END, PAD

# Their answers are drawn from several good ones, so only how they end can be checked.
FREE = {"greeting", "unknown", "story", "pastime"}
# A right answer is never longer than the expected one; a free one may be.
_ROOM = 80
_BATCH_SIZE = 50


@dataclass
class Score:
    """What happened to the prompts of one category."""

    num_prompts: int = 0
    num_exact: int = 0
    num_ended: int = 0


@dataclass(frozen=True)
class Case:
    """One prompt, ready to be continued, and the text that should follow it."""

    category: str
    prompt: str
    expected: str


def as_case(tokenizer: Any, conversation: Conversation) -> Case:
    """The conversation, cut before its last answer."""
    render = partial(tokenizer.apply_chat_template, tools=conversation.tools, tokenize=False)
    prompt = str(render(conversation.messages[:-1], add_generation_prompt=True))
    expected = str(render(conversation.messages)).removeprefix(prompt).removesuffix(f"{END}\n")
    return Case(conversation.category, prompt, expected)


def held_out_cases(tokenizer: Any, seed: int, num_each: int) -> list[Case]:
    """`num_each` cases of every category."""
    rng = random.Random(seed)
    makers: list[Callable[[], Conversation]] = [partial(held_out_case, rng, maker) for maker in MAKERS]
    makers += [partial(held_out_json_case, rng), partial(held_out_memory_case, rng)]
    makers += [partial(held_out_tool_case, rng)] * 2
    return [as_case(tokenizer, make()) for make in makers for _ in range(num_each)]


def generate(model: Any, tokenizer: Any, cases: list[Case]) -> list[str]:
    """The greedy continuation of each prompt, with its end token if it came."""
    prompts = [case.prompt for case in cases]
    limit = _ROOM + max(len(tokenizer.encode(case.expected)) for case in cases)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=limit, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
    return [text.replace(PAD, "") for text in texts]


def evaluate(model: Any, tokenizer: Any, seed: int, num_each: int) -> dict[str, Score]:
    """Scores by category."""
    cases = held_out_cases(tokenizer, seed, num_each)
    cases.sort(key=lambda case: (case.category, len(case.expected)))
    scores: dict[str, Score] = defaultdict(Score)
    for start in tqdm(range(0, len(cases), _BATCH_SIZE), desc="evaluate", unit="batch"):
        batch = cases[start : start + _BATCH_SIZE]
        for case, text in zip(batch, generate(model, tokenizer, batch), strict=True):
            score = scores[case.category]
            score.num_prompts += 1
            score.num_ended += text.endswith(END)
            score.num_exact += text == case.expected + END
    return dict(scores)
