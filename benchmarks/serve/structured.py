"""What structured output costs: 16 constrained streams beside the same 16 without constraint, on a 0.5B Qwen2 shape.

    python benchmarks/serve/structured.py [--tiny] [--rounds 5] [--backend llguidance] [--output structured.json]

One process, random bf16 weights, a vocabulary of 151,936 byte-level tokens made for the purpose; 16 prompts of 32 to 96
random tokens, 64 tokens each, temperature 1. Round by round in turn:

    free      no constraint, EOS ignored
    sampled   a JSON schema (a list of records that does not end), every token sampled under its mask
    forced    the same, tokens that leave no choice appended without a forward each, as the server does it

Reported are the medians of output tokens a second, their ratios to `free`, and where a step's time goes: milliseconds of
filling masks (beside the forward, on a thread), of applying them, and of the matchers on the loop thread. `foreign_cpu` is
the share of the machine that other work took meanwhile: do not believe a round in which it is large.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers_batch import QWEN2_05B, TINY, cpu_seconds

ROOT = Path(__file__).parent.parent.parent
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["person", "place", "thing"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
        "is_open": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["name", "kind", "count", "is_open", "tags", "size"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 1000}
MODES = ("free", "sampled", "forced")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes, all beginnings of some thousand made-up words (so that they merge), then strings of letters and marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {char: index for index, char in enumerate(alphabet)}, []
    words = [*RECORD["properties"], "person", "place", "thing", "true", "false", "null"]  # type: ignore[misc]
    words += ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(3000)]
    for word in [start + word for word in words for start in ("", "Ġ", '"')]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab and len(vocab) < vocab_size - 1:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    marks = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789Ġ\",:{}[]._-'()"
    weights = [8 if char.islower() else 1 for char in marks]
    while len(vocab) < vocab_size - 1:
        vocab.setdefault("".join(rng.choices(marks, weights=weights, k=rng.randint(2, 9))), len(vocab))
    vocab["<eos>"] = vocab_size - 1
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A config and a tokenizer; the weights are random."""
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "eos_token_id": shape["vocab_size"] - 1}
    (folder / "config.json").write_text(json.dumps(config | shape))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    write_tokenizer(folder, shape["vocab_size"])


class Clock:
    """Seconds spent in functions, by a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


@contextmanager
def watched(matcher: type, clock: Clock) -> Iterator[None]:
    """Time what structured output does; the originals come back."""
    import llmd.model.runner as runner

    places = [(matcher, name) for name in ("fill", "accept", "forced")] + [(runner, "mask_logits")]
    originals = [getattr(place, name) for place, name in places]
    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, clock.around(name, original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def one_round(llm: Any, mode: str, prompts: list[list[int]], num_tokens: int, seed: int) -> tuple[int, float]:
    """Output tokens and seconds."""
    from llmd import SamplingParams
    from llmd.engine.params import StructuredOutputsParams

    constraint = None if mode == "free" else StructuredOutputsParams(json=SCHEMA)
    params = SamplingParams(
        temperature=1.0, seed=seed, max_tokens=num_tokens, ignore_eos=mode == "free", structured_outputs=constraint
    )
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    if min(counts) != num_tokens:
        raise SystemExit(f"{mode} gave {counts} tokens instead of {num_tokens} each")
    return sum(counts), seconds


def measure(arguments: argparse.Namespace, folder: Path, vocab_size: int) -> dict[str, Any]:
    """All rounds, the modes in turn."""
    from llmd import LLM
    from llmd_plugins.grammars.llguidance import LlguidanceMatcher
    from llmd_plugins.grammars.xgrammar import XgrammarMatcher

    matcher: Any = LlguidanceMatcher if arguments.backend == "llguidance" else XgrammarMatcher
    llm = LLM(
        model=str(folder), load_format="dummy", dtype="bfloat16", device="cpu", max_model_len=512,
        kv_cache_memory_bytes=128 << 20, structured_outputs_config={"backend": arguments.backend},
    )  # fmt: skip
    forced = matcher.forced
    rounds: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(arguments.rounds + 1):
        rng = random.Random(number)
        prompts = [[rng.randrange(vocab_size - 1) for _ in range(rng.randint(32, 96))] for _ in range(arguments.requests)]
        for mode in MODES:
            matcher.forced = forced if mode == "forced" else lambda self: []
            clock = Clock()
            all_before, own_before = cpu_seconds(), time.process_time()
            with watched(matcher, clock):
                tokens, seconds = one_round(llm, mode, prompts, arguments.output_len if number else 8, number)
            own = time.process_time() - own_before
            foreign = max(0.0, cpu_seconds() - all_before - own) / (seconds * (os.cpu_count() or 1))
            found = {"tokens_per_s": tokens / seconds, "foreign_cpu": foreign, "seconds": seconds}
            found |= {f"{name}_ms": 1000 * spent_s for name, spent_s in clock.seconds.items()}
            if number:  # the first is a warm-up: kernels, the grammar's automata, the tokenizer's trie
                rounds[mode].append(found)
                spent = {key: round(value) for key, value in found.items() if key.endswith("_ms")}
                print(f"round {number}: {mode:8} {found['tokens_per_s']:7.1f} tokens/s (foreign CPU {foreign:.0%})", spent,
                      file=sys.stderr)  # fmt: skip
    matcher.forced = forced
    llm.shutdown()
    medians = {mode: statistics.median(entry["tokens_per_s"] for entry in rounds[mode]) for mode in MODES}
    ratios = {
        mode: statistics.median(
            ours["tokens_per_s"] / free["tokens_per_s"] for ours, free in zip(rounds[mode], rounds["free"], strict=True)
        )
        for mode in MODES[1:]
    }
    return {"tokens_per_s": medians, "ratio": ratios, "rounds": rounds}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a two-layer model: checks the benchmark, measures nothing")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", choices=("llguidance", "xgrammar"), default="llguidance")
    parser.add_argument("--output", type=Path, help="write the JSON there")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results import report

    shape = QWEN2_05B | {"vocab_size": 151_936} if not arguments.tiny else TINY | {"vocab_size": 30_000}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        found = measure(arguments, Path(folder), int(shape["vocab_size"]))
    workload = {"requests": arguments.requests, "output_len": arguments.output_len, "backend": arguments.backend}
    report({"workload": workload} | found, arguments.output, shown=("tokens_per_s", "ratio"))


if __name__ == "__main__":
    main()
