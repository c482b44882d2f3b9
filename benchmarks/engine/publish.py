"""What a step's publish costs the loop thread: detokenize, stop strings, hand to streams. Prints one JSON object.

    python benchmarks/engine/publish.py [--sequences 256] [--steps 300] [--tokenizer FOLDER] [--output FILE]

Without a folder a byte-level BPE tokenizer of 151,936 tokens is made up, as large as Qwen2's. Figures are microseconds;
`publish_us` is the wall time of a whole step with one token for each sequence, `publish_cpu_us` the thread's CPU time of the
same (beside other work only that one means something), `read_cpu_us` is what the readers take to fetch it. Medians.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from llmd.engine.params import SamplingParams
from llmd.engine.request import Prompt, Request
from llmd.engine.step import FinishReason, SequenceDelta, TokenLogprobs
from llmd.text.detokenizer import WindowDetokenizer
from llmd.text.output import OutputProcessor
from llmd.text.stream import RequestStream
from llmd.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stop": {"stop": ("\n\nUser:", "<|stop|>", "###")},
    "logprobs": {"logprobs": 5},
    "stop_and_logprobs": {"stop": ("\n\nUser:", "<|stop|>", "###"), "logprobs": 5},
}


class Engine:
    """Takes what the output processor tells."""

    def abort(self, request_id: str) -> None:
        """Nothing runs."""

    def finish(self, request_id: str, index: int, reason: FinishReason) -> None:
        """Nothing runs."""


def made_up_tokenizer(vocab_size: int = 151_936) -> Tokenizer:
    """Byte-level BPE with random words, one in ten of its tokens parts of characters beyond ASCII."""
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [character for character in alphabet if character.isascii() and character.isalpha()]
    words = dict.fromkeys(alphabet)
    while len(words) < vocab_size:
        source = alphabet if rng.random() < 0.1 else letters
        words[rng.choice(["Ġ", ""]) + "".join(rng.choices(source, k=rng.randint(2, 9)))] = None
    backend = Backend(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, {}, {})


def make_steps(tokenizer: Tokenizer, num_seqs: int, num_steps: int, with_logprobs: bool) -> list[list[SequenceDelta]]:
    """Deltas of every step; tokens are drawn as in text: a few thousand of them make most of it."""
    rng = random.Random(1)
    common = [rng.randrange(tokenizer.vocab_size) for _ in range(4000)]
    return [[delta_of(index, rng.choice(common), with_logprobs) for index in range(num_seqs)] for _ in range(num_steps)]


def delta_of(index: int, token_id: int, with_logprobs: bool) -> SequenceDelta:
    """One token of one request."""
    rows = [TokenLogprobs(token_id, -1.0, 1, (1, 2, 3, 4, 5), (-1.0, -2.0, -3.0, -4.0, -5.0))] if with_logprobs else None
    return SequenceDelta(f"request-{index}", 0, (token_id,), logprobs=rows)


async def publish(tokenizer: Tokenizer, num_seqs: int, num_steps: int, sampling: dict[str, Any]) -> dict[str, float]:
    """Run the steps with a reader task for each sequence; medians over the steps."""
    outputs = OutputProcessor(tokenizer, max_buffer_bytes=4 << 20)
    outputs.bind(Engine())
    params = SamplingParams(max_tokens=None, **sampling)
    requests = [Request(request_id=f"request-{i}", prompt=Prompt((1, 2, 3)), params=params) for i in range(num_seqs)]
    streams = [outputs.open(request) for request in requests]
    readers = [asyncio.create_task(drain(stream)) for stream in streams]
    await asyncio.sleep(0)
    published, used, read = [], [], []
    for deltas in make_steps(tokenizer, num_seqs, num_steps, "logprobs" in sampling):
        start, cpu_start = time.perf_counter(), time.thread_time()
        outputs.publish(deltas)
        middle, cpu_middle = time.perf_counter(), time.thread_time()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        published.append((middle - start) * 1e6)
        used.append((cpu_middle - cpu_start) * 1e6)
        read.append((time.thread_time() - cpu_middle) * 1e6)
    for stream in streams:
        stream.close()
    await asyncio.gather(*readers)
    warm = num_steps // 5  # the pieces of common tokens are cached by then
    return {
        "publish_us": round(statistics.median(published[warm:]), 1),
        "publish_cpu_us": round(statistics.median(used[warm:]), 1),
        "publish_cpu_p99_us": round(statistics.quantiles(used[warm:], n=100)[98], 1),
        "publish_cpu_first_us": round(used[0], 1),
        "read_cpu_us": round(statistics.median(read[warm:]), 1),
        "cpu_us_a_token": round(statistics.median(used[warm:]) / num_seqs, 2),
    }


async def drain(stream: RequestStream) -> None:
    """Read and drop."""
    async for _ in stream:
        pass


def detokenizers(tokenizer: Tokenizer, backend: Any, num_tokens: int = 30_000) -> dict[str, float]:
    """Microseconds a token of the ways to detokenize, same tokens, one after the other."""
    rng = random.Random(2)
    common = [rng.randrange(tokenizer.vocab_size) for _ in range(4000)]
    ids = [rng.choice(common) for _ in range(num_tokens)]

    def decode_stream() -> Callable[[int], object]:
        stream = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(backend, token_id)

    def fed(detokenizer: Any) -> Callable[[int], object]:
        return lambda token_id: detokenizer.feed((token_id,))

    makers = {
        "table": lambda: fed(tokenizer.detokenizer()),
        "decode_stream": decode_stream,
        "window": lambda: fed(WindowDetokenizer(tokenizer.decode)),
    }
    return {name: _us_a_token(make, ids[: num_tokens if name == "table" else 5000]) for name, make in makers.items()}


def _us_a_token(make: Callable[[], Callable[[int], object]], ids: list[int]) -> float:
    """The best of three runs over fresh detokenizers of 500 tokens each."""
    best = float("inf")
    for _ in range(3):
        used = 0.0
        for first in range(0, len(ids), 500):
            step = make()
            start = time.thread_time()
            for token_id in ids[first : first + 500]:
                step(token_id)
            used += time.thread_time() - start
        best = min(best, used / len(ids) * 1e6)
    return round(best, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_folder(options.tokenizer) if options.tokenizer else made_up_tokenizer()
    result = {
        "sequences": options.sequences,
        "steps": options.steps,
        "vocab_size": tokenizer.vocab_size,
        "publish": {
            name: asyncio.run(publish(tokenizer, options.sequences, options.steps, sampling))
            for name, sampling in VARIANTS.items()
        },
        "detokenize_us_a_token": detokenizers(tokenizer, tokenizer._backend),
    }
    report(result, options.output)


if __name__ == "__main__":
    main()
