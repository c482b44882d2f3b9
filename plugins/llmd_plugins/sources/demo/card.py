"""The model card, written from what the training script measured."""

from dataclasses import dataclass
from string import Template

from llmd_plugins.sources.demo.evaluate import FREE, Score

_CARD = Template("""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# llmd demo model

A very small Llama-architecture decoder that is there to try the daemon, **not to be useful**. It makes the first minute
with llmd need no download. It greets, counts, spells, sorts words, does small arithmetic, answers in JSON, calls tools
and tells short stories about cats and dragons; it knows a few things about llmd and nothing else. Whatever else it says
is made up.

## Model

| | |
|---|---|
| parameters | $num_parameters |
| layers, hidden, MLP | $layers, $hidden, $mlp |
| heads, KV heads, head size | $heads, $kv_heads, $head_dim |
| vocabulary | $vocab tokens, byte-level BPE, digits one by one |
| positions | $positions |
| weights | bf16, input and output embeddings shared |
| chat format | ChatML; tools as `<tools>`, `<tool_call>`, `<tool_response>` |

## Data and training

Trained from scratch on dialogues that the script in this repository makes by rule from fixed seeds; no text of anybody
else is in it. Every dialogue is new, none is repeated on purpose. Only the tokens of the assistant count in the loss.
The attention of the first two layers starts from weights that can already copy (`circuit.py`); all else starts at random.

    PYTHONPATH=plugins python -m llmd_plugins.sources.demo.train --out DIR --minutes $minutes --seed $seed

That took $minutes minutes on $threads CPU thread(s): $steps steps, $tokens tokens, final loss $loss.

## Exact answers on held-out prompts

Greedy decoding of the bf16 weights. An answer counts only if it is right to the last character and ends there. No
prompt was trained on: one key in $held_out_in is kept apart by its hash. For sums, differences, comparisons, counting,
sorting, repeating and JSON the key is the numbers, words or sentence themselves, however asked; for spelling it is the
made-up word, or the question with a known word; for products, facts, tools and llmd it is the wording of the question.

| category | prompts | exact | ended by itself |
|---|---:|---:|---:|
$rows

Where several answers are good (greetings, stories), only the end is checked.
""")


@dataclass(frozen=True)
class Training:
    """What the card tells about a training run."""

    minutes: float
    seed: int
    threads: int
    num_steps: int
    num_tokens: int
    loss: float


def percent(part: int, whole: int) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * part / whole:.1f} %"


def score_rows(scores: dict[str, Score]) -> str:
    """The table of exact-answer rates."""
    rows = []
    exact = [score for name, score in scores.items() if name not in FREE]
    for name, score in sorted(scores.items()):
        rate = "–" if name in FREE else percent(score.num_exact, score.num_prompts)
        rows.append(f"| {name} | {score.num_prompts} | {rate} | {percent(score.num_ended, score.num_prompts)} |")
    total, right = sum(score.num_prompts for score in exact), sum(score.num_exact for score in exact)
    rows.append(f"| **all with one right answer** | {total} | **{percent(right, total)}** | |")
    return "\n".join(rows)


def write_card(config: dict[str, int], training: Training, scores: dict[str, Score], held_out_in: int) -> str:
    """The card's text."""
    return _CARD.substitute(
        num_parameters=f"{config['num_parameters']:,}",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        mlp=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        positions=config["max_position_embeddings"],
        minutes=f"{training.minutes:g}",
        seed=training.seed,
        threads=training.threads,
        steps=f"{training.num_steps:,}",
        tokens=f"{training.num_tokens:,}",
        loss=f"{training.loss:.3f}",
        held_out_in=held_out_in,
        rows=score_rows(scores),
    )
