"""What sampling costs a step, by what the rows ask for. Prints one JSON object: milliseconds a row, minimum of several.

    python benchmarks/model/sampling.py [--rows 16] [--vocab-size 151936] [--threads 1] [--output FILE]

`peaked` logits put most of the probability on a few tokens, as a trained model's do; `flat` ones are the worst case for
top_p, because tens of thousands of tokens stay. `sort` and `multinomial` are what the plain way would cost: top_p by sorting
the row, a draw by torch.multinomial.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmd.engine.params import SamplingParams
from llmd.engine.step import RowAdmit
from llmd.model.sampler import SamplerContext, TorchSampler

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "greedy": (6.0, {"temperature": 0.0}),
    "temperature": (6.0, {}),
    "top_k 20, top_p 0.8": (6.0, {"top_k": 20, "top_p": 0.8}),
    "top_p 0.9, peaked": (6.0, {"top_p": 0.9}),
    "top_p 0.9, flat": (1.0, {"top_p": 0.9}),
    "min_p 0.05": (6.0, {"min_p": 0.05}),
    "greedy, penalties": (6.0, {"temperature": 0.0, "presence_penalty": 0.5, "repetition_penalty": 1.1}),
    "greedy, 5 logprobs": (6.0, {"temperature": 0.0, "logprobs": 5}),
}
NUM_TOKENS = 256


def least(work: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the quickest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def sampling(num_rows: int, vocab_size: int, scale: float, params: dict[str, Any]) -> Callable[[], object]:
    """A step's sampling, from logits to plain data."""
    context = SamplerContext(
        max_num_rows=num_rows, max_model_len=NUM_TOKENS, vocab_size=vocab_size, device=torch.device("cpu")
    )
    sampler, generator = TorchSampler(context), torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (num_rows, NUM_TOKENS), generator=generator, dtype=torch.int32)
    for row in range(num_rows):
        ids = token_ids[row].tolist()
        admit = RowAdmit(
            row=row,
            seq_id=row,
            request_id=str(row),
            token_ids=ids,
            num_prompt_tokens=NUM_TOKENS // 2,
            params=SamplingParams(**params),
            seed=row,
        )
        sampler.admit(admit)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * scale
    rows, num_tokens = torch.arange(num_rows), torch.full((num_rows,), NUM_TOKENS)
    given = {"host_rows": list(range(num_rows)), "max_tokens": NUM_TOKENS}
    return lambda: sampler.sample(logits, rows, num_tokens, token_ids, **given).to_host().result()


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    num_rows, vocab_size = arguments.rows, arguments.vocab_size
    found = {
        name: least(sampling(num_rows, vocab_size, scale, params)) * 1000 / num_rows
        for name, (scale, params) in CASES.items()
    }
    x = torch.randn(1, vocab_size) * 6
    plain = {
        "sort": least(lambda: x.sort(1, descending=True)) * 1000,
        "multinomial": least(lambda: torch.multinomial(x.softmax(1), 1)) * 1000,
        "argmax": least(lambda: x.argmax(1)) * 1000,
    }
    result = {"rows": num_rows, "vocab_size": vocab_size, "threads": arguments.threads, "ms_per_row": found, "plain": plain}
    report(result, arguments.output)


if __name__ == "__main__":
    main()
