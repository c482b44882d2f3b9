"""Trains the demo model's LoRA adapters: each answers as the demo model does, in a style of its own.

    PYTHONPATH=plugins python -m llmd_plugins.sources.demo.train_adapters --out DIR

They are saved as PEFT saves them, a folder each, so that any program that reads PEFT's files can serve them. The minutes
are those of one core, so that a busy machine only takes longer.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from llmd_plugins.sources.demo.corpus import chat, num_turns
from llmd_plugins.sources.demo.evaluate import FREE, as_case, generate
from llmd_plugins.sources.demo.exchanges import MAKERS, Exchange, draw, in_json
from llmd_plugins.sources.demo.tokenizer import END, write_json
from llmd_plugins.sources.demo.train import Encoder, Example, Fit, batches, fit, load

MODEL = Path(__file__).parent / "model"
_LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
_RANK, _ALPHA = 4, 16
_RATE, _WARMUP_STEPS = 4e-3, 10
_MAX_LENGTH = 512
_EVAL_SEED = 30_000
_KEPT = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias")  # the others are at their defaults

_CARD = """\
---
license: apache-2.0
base_model: llmd demo model
library_name: peft
---

# {name}

A LoRA adapter (rank {rank}) of llmd's demo model: {summary}. It is there to see adapters at work, **not to be useful**.

    PYTHONPATH=plugins python -m llmd_plugins.sources.demo.train_adapters --out DIR --only {name} --minutes {minutes:g}

That was {steps} steps with a final loss of {loss:.3f}. Of {prompts} held-out prompts with one right answer, {exact} are
answered exactly so in this style, and {styled} keep to the style.
"""


class Style(NamedTuple):
    """What an adapter makes of every answer, and how it is told by its ends."""

    summary: str
    apply: Callable[[Exchange], Exchange]
    opening: str
    ending: str


def in_pirate(exchange: Exchange) -> Exchange:
    """The same exchange, answered by a pirate."""
    return exchange._replace(answer=f"Ahoy, matey! {exchange.answer} Arrr!")


STYLES = {
    "demo-pirate": Style("it answers like a pirate", in_pirate, "Ahoy, matey! ", " Arrr!"),
    "demo-json": Style("it answers in JSON, whether asked to or not", in_json, "{", "}"),
}


class Score(NamedTuple):
    """Answers to held-out prompts."""

    num_prompts: int
    num_exact: int
    num_styled: int


def styled_examples(encoder: Encoder, style: Style, seed: int) -> Iterator[Example]:
    """Endless conversations in which every answer has the style."""
    rng = random.Random(seed)
    while True:
        exchanges = [style.apply(draw(rng, MAKERS)) for _ in range(min(3, num_turns(rng)))]
        each = chat(rng, exchanges)
        yield encoder.chat(each.messages, each.tools)


def new_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """AdamW for the adapter's matrices."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return [torch.optim.AdamW(trained, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def measure(model: Any, tokenizer: Any, style: Style, num_prompts: int) -> Score:
    """How often the answer is the right one, in the style, and how often it is at least in the style."""
    rng = random.Random(_EVAL_SEED)
    makers = {maker: weight for maker, weight in MAKERS.items() if draw(rng, {maker: 1}).category not in FREE}
    exchanges = [style.apply(draw(rng, makers, held_out=True)) for _ in range(num_prompts)]
    cases = sorted((as_case(tokenizer, chat(rng, [each])) for each in exchanges), key=lambda case: len(case.expected))
    num_exact = num_styled = 0
    for start in range(0, len(cases), 50):
        batch = cases[start : start + 50]
        for case, text in zip(batch, generate(model, tokenizer, batch), strict=True):
            num_exact += text == case.expected + END
            num_styled += text.startswith(style.opening) and text.endswith(style.ending + END)
    return Score(num_prompts, num_exact, num_styled)


def save(model: Any, folder: Path) -> None:
    """The adapter in bf16, and of its config what is not at its default."""
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({name: each.to(torch.bfloat16) for name, each in load_file(weights).items()}, weights, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = {key: sorted(config[key]) if isinstance(config[key], list) else config[key] for key in _KEPT}
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "demo", **kept})


def write_card(name: str, folder: Path, minutes: float, result: Fit, score: Score) -> None:
    """What the adapter is and how well it does."""
    text = _CARD.format(
        name=name, rank=_RANK, summary=STYLES[name].summary, minutes=minutes, steps=result.num_steps, loss=result.loss,
        exact=score.num_exact, prompts=score.num_prompts, styled=score.num_styled,
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def train(name: str, folder: Path, minutes: float, seed: int, num_prompts: int) -> Score:
    """One adapter on the demo model, trained, saved and measured."""
    torch.manual_seed(seed)
    base, tokenizer = load(MODEL)
    base.float().train().set_attn_implementation("eager")
    config = LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=_LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    source = batches(styled_examples(Encoder(tokenizer), STYLES[name], seed), _MAX_LENGTH, seed)
    clock = time.process_time
    result = fit(base, source, minutes, optimizers_of=new_optimizers, warmup_steps=_WARMUP_STEPS, clock=clock)
    save(model, folder)
    score = measure(model.eval(), tokenizer, STYLES[name], num_prompts)
    write_card(name, folder, minutes, result, score)
    return score


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters' folders")
    parser.add_argument("--only", choices=list(STYLES), help="train this one alone")
    parser.add_argument("--minutes", type=float, default=3, help="minutes of one core for each")
    parser.add_argument("--seed", type=int, default=1, help="seed of data and weights")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts for each")
    return parser.parse_args()


def main() -> None:
    """Trains each of them."""
    args = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in [args.only] if args.only else STYLES:
        score = train(name, args.out / name, args.minutes, args.seed, args.prompts)
        print(f"{name}: {score.num_exact} exact and {score.num_styled} in style of {score.num_prompts}")


if __name__ == "__main__":
    main()
