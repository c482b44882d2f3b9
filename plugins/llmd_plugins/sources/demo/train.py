"""Trains the demo model from nothing: tokenizer, weights, evaluation and model card.

    PYTHONPATH=plugins python -m llmd_plugins.sources.demo.train --out DIR --minutes 50

The learning rate follows the clock, so a run takes the minutes it is given, on any machine.
"""

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from llmd_plugins.sources.demo.card import Training, write_card
from llmd_plugins.sources.demo.circuit import plant_copying
from llmd_plugins.sources.demo.corpus import conversation, plain_text
from llmd_plugins.sources.demo.evaluate import Score, evaluate
from llmd_plugins.sources.demo.exchanges import HELD_OUT_IN
from llmd_plugins.sources.demo.tokenizer import END, PAD, START, save_tokenizer, train_tokenizer, write_json

TEMPLATE = Path(__file__).parent / "model" / "chat_template.jinja"
IGNORED = -100
# On short rows this is a third faster on a CPU than the fused kernel.
_ATTENTION = "eager"
_SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
_TOKENS_PER_BATCH = 1536
_POOL_BATCHES = 48
_PLAIN_SHARE = 0.04
_DRILL_SHARE = 0.1
_FIRST_PLAIN_ID = 3
_MATRIX_RATE, _EMBEDDING_RATE = 1.2e-3, 3e-4
_WARMUP_STEPS = 80
_EVAL_SEED = 20_000


class Example(NamedTuple):
    """Token ids, and the same ids where they count in the loss."""

    ids: list[int]
    labels: list[int]


class Fit(NamedTuple):
    """How a training run went."""

    num_steps: int
    num_tokens: int
    loss: float


class Encoder:
    """Turns conversations into examples whose labels are the assistant's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._opening: list[int] = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
        self._end: int = tokenizer.convert_tokens_to_ids(END)
        self._request: list[int] = tokenizer.encode(f"{START}user\nRepeat: ", add_special_tokens=False)
        self._tail: list[int] = tokenizer.encode(f"{END}\n{START}assistant\n", add_special_tokens=False)

    def chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> Example:
        """A whole conversation, as the chat template writes it."""
        text = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return Example(ids, self._labels(ids))

    def plain(self, text: str) -> Example:
        """Bare text with its end; all of it counts."""
        ids = [*self._tokenizer.encode(text, add_special_tokens=False), self._end]
        return Example(ids, list(ids))

    def drill(self, rng: random.Random) -> Example:
        """Random tokens to be said back, so that any text can be copied, not only what the dialogues are made of."""
        text = [rng.randrange(_FIRST_PLAIN_ID, _SHAPE["vocab_size"]) for _ in range(rng.randint(3, 40))]
        prompt = [*self._request, *text, *self._tail]
        answer = [*text, self._end]
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer)

    def _labels(self, ids: list[int]) -> list[int]:
        labels, index, size = [IGNORED] * len(ids), 0, len(self._opening)
        while index < len(ids):
            if ids[index : index + size] != self._opening:
                index += 1
                continue
            start = index + size
            stop = ids.index(self._end, start) + 1
            labels[start:stop] = ids[start:stop]
            index = stop
        return labels


def examples(encoder: Encoder, seed: int) -> Iterator[Example]:
    """Endless examples, never twice the same stretch of random numbers."""
    rng = random.Random(seed)
    while True:
        if rng.random() < _DRILL_SHARE:
            yield encoder.drill(rng)
        elif rng.random() < _PLAIN_SHARE:
            yield encoder.plain(plain_text(rng))
        else:
            each = conversation(rng)
            yield encoder.chat(each.messages, each.tools)


def batches(source: Iterator[Example], max_length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of examples of about the same length, so that little is padding."""
    rng = random.Random(seed)
    while True:
        pool, size = [], 0
        while size < _POOL_BATCHES * _TOKENS_PER_BATCH:
            pool.append(next(source))
            size += len(pool[-1].ids)
        pool.sort(key=lambda example: len(example.ids))
        groups = list(_groups(pool))
        rng.shuffle(groups)
        for group in groups:
            yield (
                _padded([each.ids[:max_length] for each in group], 0),
                _padded([each.labels[:max_length] for each in group], IGNORED),
            )


def _groups(pool: list[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in pool:
        if group and (len(group) + 1) * len(example.ids) > _TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(example)
    yield group


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def new_model(tokenizer: Any) -> Any:
    """A model with random weights."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (PAD, END)}
    config = LlamaConfig(
        **_SHAPE,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=ids[PAD],
        pad_token_id=ids[PAD],
        eos_token_id=ids[END],
        attn_implementation=_ATTENTION,
    )
    model = LlamaForCausalLM(config)
    plant_copying(model)
    return model


def loss_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy; logits are computed only where they count."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        counted = targets != IGNORED
        logits = hidden[counted] @ model.lm_head.weight.T
    return torch.nn.functional.cross_entropy(logits.float(), targets[counted])


def new_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings and norms."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    inner = [each for name, each in trained.items() if each.ndim == 2 and "embed" not in name]
    rest = [each for name, each in trained.items() if each.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=_MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    # The rates are low enough to keep what `plant_copying` planted; at 3e-3 for all, copying was lost within 260 steps.
    adamw = torch.optim.AdamW(rest, lr=_EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def learning_rate_scale(progress: float, num_steps: int, warmup_steps: int) -> float:
    """A short warm-up, then half a cosine down to one hundredth."""
    return min(1.0, (num_steps + 1) / warmup_steps) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def fit(
    model: Any,
    data: Iterator[tuple[Tensor, Tensor]],
    minutes: float,
    *,
    optimizers_of: Callable[[Any], list[torch.optim.Optimizer]] = new_optimizers,
    warmup_steps: int = _WARMUP_STEPS,
    clock: Callable[[], float] = time.monotonic,
) -> Fit:
    """Trains whatever in the model requires gradients, until the time on the clock is up."""
    optimizers = optimizers_of(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, num_steps, num_tokens, smooth = clock(), 0, 0, 0.0
    with tqdm(total=round(minutes * 60), desc="train", unit="s") as bar:
        while (progress := (clock() - started) / (minutes * 60)) < 1:
            ids, labels = next(data)
            loss = loss_of(model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale = learning_rate_scale(progress, num_steps, warmup_steps)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * scale
                optimizer.step()
                optimizer.zero_grad()
            num_steps, num_tokens = num_steps + 1, num_tokens + ids.numel()
            smooth = loss.item() if num_steps == 1 else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", steps=num_steps, tokens=num_tokens, refresh=False)
            bar.update(round(clock() - started) - bar.n)
    return Fit(num_steps, num_tokens, smooth)


def save_model(model: Any, folder: Path) -> None:
    """Weights in bf16, config and generation settings."""
    model.to(torch.bfloat16).save_pretrained(folder)
    config = model.config
    settings = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    write_json(folder / "generation_config.json", settings)


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, as anybody would load them."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def measure(folder: Path, training: Training, num_each: int) -> dict[str, Score]:
    """Evaluates what is in the folder and writes its card."""
    model, tokenizer = load(folder)
    scores = evaluate(model.eval(), tokenizer, _EVAL_SEED, num_each)
    shape = _SHAPE | {"num_parameters": model.num_parameters()}
    (folder / "README.md").write_text(write_card(shape, training, scores, HELD_OUT_IN), encoding="utf-8")
    return scores


def train(folder: Path, minutes: float, threads: int, seed: int) -> Training:
    """Tokenizer, then weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TEMPLATE.name).exists():
        shutil.copy(TEMPLATE, folder)
    save_tokenizer(train_tokenizer(seed, _SHAPE["vocab_size"]), folder, _SHAPE["max_position_embeddings"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return trained(folder, new_model(tokenizer), tokenizer, Training(0, seed, threads, 0, 0, 0), minutes)


def resume(folder: Path, minutes: float) -> Training:
    """More minutes for the weights in the folder, on dialogues that they have not seen."""
    model, tokenizer = load(folder)
    model.float().train().set_attn_implementation(_ATTENTION)
    return trained(folder, model, tokenizer, read_training(folder), minutes)


def trained(folder: Path, model: Any, tokenizer: Any, before: Training, minutes: float) -> Training:
    """Trains and saves; the data's seed moves on with what was seen before."""
    source = examples(Encoder(tokenizer), before.seed + 1 + before.num_steps)
    result = fit(model, batches(source, _SHAPE["max_position_embeddings"], before.seed), minutes)
    save_model(model, folder)
    after = replace(
        before,
        minutes=before.minutes + minutes,
        num_steps=before.num_steps + result.num_steps,
        num_tokens=before.num_tokens + result.num_tokens,
        loss=result.loss,
    )
    write_json(folder / "training.json", asdict(after))
    return after


def read_training(folder: Path) -> Training:
    """How the weights in the folder were trained."""
    return Training(**json.loads((folder / "training.json").read_text()))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=50, help="how long to train")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts per category")
    parser.add_argument("--resume", action="store_true", help="train the model in --out further")
    parser.add_argument("--eval-only", action="store_true", help="only evaluate --out and write its card again")
    return parser.parse_args()


def main() -> None:
    """Trains and evaluates, or only evaluates."""
    args = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    if args.eval_only:
        training = read_training(args.out)
    elif args.resume:
        training = resume(args.out, args.minutes)
    else:
        training = train(args.out, args.minutes, args.threads, args.seed)
    for name, score in sorted(measure(args.out, training, args.prompts).items()):
        print(f"{name:14} {score.num_exact:4} exact {score.num_ended:4} ended of {score.num_prompts}")


if __name__ == "__main__":
    main()
