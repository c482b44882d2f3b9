"""`llmd bench throughput` and `latency`: the engine in this process, no HTTP, with vLLM's flags."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from llmd_plugins.commands.bench.datasets import (
    BenchRequest,
    DatasetError,
    RandomLengths,
    custom_requests,
    random_requests,
    random_token_ids,
    sharegpt_requests,
)
from llmd_plugins.commands.bench.options import JsonObject, stacked

_PERCENTILES = (10, 25, 50, 75, 90, 99)

# flag → LLM's argument of the same name
_ENGINE_OPTIONS = stacked(
    [
        click.option("--model", required=True, help="'demo', a folder, or a hub name."),
        click.option("--tokenizer", help="Folder or hub name of the tokenizer, where it is not the model's."),
        click.option("--dtype", default="auto", show_default=True),
        click.option("--device", help="cpu, cuda …  [default: what the machine has]"),
        click.option("--quantization", help="Quantization method.  [default: what the checkpoint says]"),
        click.option("--load-format", default="auto", show_default=True, help="dummy: random weights."),
        click.option("--max-model-len", type=click.IntRange(1)),
        click.option("--max-num-seqs", type=click.IntRange(1)),
        click.option("--max-num-batched-tokens", type=click.IntRange(1)),
        click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True)),
        click.option("--block-size", type=click.IntRange(1)),
        click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=None),
        click.option("--trust-remote-code", is_flag=True, default=None),
        click.option("--enforce-eager", is_flag=True, default=None),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--engine-args", type=JsonObject(), default="{}", help="Further arguments of llmd.LLM."),
        click.option("--vocab-size", type=click.IntRange(1), help="Bound of random token ids.  [default: the tokenizer's]"),
        click.option("--output-json", type=click.Path(dir_okay=False, path_type=Path), help="Write the results there."),
        click.option("--disable-tqdm", is_flag=True, help="No progress bar."),
    ]
)
_ENGINE_NAMES = (
    "model", "tokenizer", "dtype", "device", "quantization", "load_format", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "gpu_memory_utilization", "block_size", "enable_prefix_caching", "trust_remote_code",
    "enforce_eager", "seed",
)  # fmt: skip


def make_llm(options: dict[str, Any]) -> Any:
    """The engine that the flags describe."""
    from llmd.api.v1 import LLM

    wanted = {name: options[name] for name in _ENGINE_NAMES if options[name] is not None}
    return LLM(**wanted | options["engine_args"])


def _vocab_size(options: dict[str, Any], llm: Any) -> int:
    return options["vocab_size"] or len(llm.get_tokenizer())


def _params(**fields: Any) -> Any:
    from llmd.api.v1 import SamplingParams

    return SamplingParams(ignore_eos=True, detokenize=False, **fields)


def _as_prompt(prompt: Any) -> Any:
    return {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt


def _offline_errors(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from llmd.api.v1 import LlmdError

    try:
        return function()
    except (DatasetError, LlmdError) as error:
        raise click.ClickException(str(error)) from None


def _finish(summary: dict[str, Any], options: dict[str, Any]) -> None:
    from llmd_plugins.commands.bench.report import stamp, write_json

    if options["output_json"]:
        write_json(options["output_json"], stamp() | summary)
        click.echo(f"written: {options['output_json']}")


@click.command("throughput", short_help="Tokens a second for many prompts at once, offline.")
@click.option("--dataset-name", type=click.Choice(["random", "sharegpt", "custom"]), default="random", show_default=True)
@click.option("--dataset-path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--input-len", type=click.IntRange(1), default=512, show_default=True, help="random: mean prompt tokens.")
@click.option("--output-len", type=click.IntRange(1), help="Output tokens.  [default: random 128, else the dataset's]")
@click.option("--random-range-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True)
@click.option(
    "--prefix-len", type=click.IntRange(0), default=0, show_default=True, help="random: tokens of a shared prefix."
)
@click.option("--num-prompts", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--n", type=click.IntRange(1, 128), default=1, show_default=True, help="Continuations of each prompt.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@_ENGINE_OPTIONS
def throughput(**options: Any) -> None:
    """Give all prompts to the engine at once and measure requests and tokens a second (EOS is ignored)."""
    summary = _offline_errors(lambda: _throughput(options))
    click.echo(
        f"Throughput: {summary['requests_per_second']:.2f} requests/s, {summary['tokens_per_second']:.2f} total tokens/s, "
        f"{summary['output_tokens_per_second']:.2f} output tokens/s"
    )
    click.echo(f"Total num prompt tokens:  {summary['total_input_tokens']}")
    click.echo(f"Total num output tokens:  {summary['total_output_tokens']}")
    _finish(summary, options)


def _throughput(options: dict[str, Any]) -> dict[str, Any]:
    llm = make_llm(options)
    requests = _dataset(options, llm)
    params = [
        _params(n=options["n"], temperature=options["temperature"], max_tokens=request.num_output_tokens)
        for request in requests
    ]
    prompts = [_as_prompt(request.prompt) for request in requests]
    start = perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=not options["disable_tqdm"])
    elapsed_s = perf_counter() - start
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        "model": options["model"],
        "elapsed_time": elapsed_s,
        "num_requests": len(requests),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(requests) / elapsed_s,
        "tokens_per_second": (num_input + num_output) / elapsed_s,
        "output_tokens_per_second": num_output / elapsed_s,
    }


def _dataset(options: dict[str, Any], llm: Any) -> list[BenchRequest]:
    num, seed, output_len = options["num_prompts"], options["seed"], options["output_len"]
    if options["dataset_name"] == "random":
        lengths = RandomLengths(
            input_len=options["input_len"],
            output_len=output_len or 128,
            range_ratio=options["random_range_ratio"],
            prefix_len=options["prefix_len"],
        )
        return random_requests(num, lengths, seed, vocab_size=_vocab_size(options, llm))
    if options["dataset_path"] is None:
        raise click.UsageError(f"--dataset-name {options['dataset_name']} needs --dataset-path")
    tokenizer = llm.get_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    if options["dataset_name"] == "sharegpt":
        return sharegpt_requests(options["dataset_path"], num, seed, count=count, output_len=output_len)
    return custom_requests(options["dataset_path"], num, count=count, output_len=output_len)


@click.command("latency", short_help="Seconds for one batch from start to end, offline.")
@click.option("--input-len", type=click.IntRange(1), default=32, show_default=True, help="Prompt tokens.")
@click.option("--output-len", type=click.IntRange(1), default=128, show_default=True, help="Output tokens.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--n", type=click.IntRange(1, 128), default=1, show_default=True, help="Continuations of each prompt.")
@click.option("--num-iters-warmup", type=click.IntRange(0), default=10, show_default=True)
@click.option("--num-iters", type=click.IntRange(1), default=30, show_default=True)
@_ENGINE_OPTIONS
def latency(**options: Any) -> None:
    """Run one batch of random prompts again and again and measure how long it takes (EOS is ignored).

    Every iteration has prompts of its own, so that prefix caching does not help.
    """
    summary = _offline_errors(lambda: _latency(options))
    click.echo(f"Avg latency: {summary['avg_latency']:.4f} seconds")
    for percentile, seconds in summary["percentiles"].items():
        click.echo(f"{percentile}% percentile latency: {seconds:.4f} seconds")
    _finish(summary, options)


def _latency(options: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from tqdm import tqdm

    llm = make_llm(options)
    rng, vocab_size = random.Random(options["seed"]), _vocab_size(options, llm)
    params = _params(n=options["n"], temperature=1.0, max_tokens=options["output_len"])

    def once() -> float:
        prompts = [_as_prompt(random_token_ids(options["input_len"], vocab_size, rng)) for _ in range(options["batch_size"])]
        start = perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return perf_counter() - start

    def measured(num: int, name: str) -> Sequence[float]:
        return [once() for _ in tqdm(range(num), desc=name, disable=options["disable_tqdm"])]

    measured(options["num_iters_warmup"], "warm-up")
    latencies = measured(options["num_iters"], "iterations")
    return {
        "model": options["model"],
        "batch_size": options["batch_size"],
        "avg_latency": float(np.mean(latencies)),
        "latencies": list(latencies),
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in _PERCENTILES},
    }
