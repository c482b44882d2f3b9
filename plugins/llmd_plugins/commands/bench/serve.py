"""`llmd bench serve`: a load generator for any OpenAI-compatible server, with vLLM's flags."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from llmd_plugins.commands.bench.datasets import (
    BenchRequest,
    DatasetError,
    RandomLengths,
    custom_requests,
    random_requests,
    sharegpt_requests,
)
from llmd_plugins.commands.bench.options import (
    RANDOM_OPTIONS,
    JsonObject,
    ManyValuesCommand,
    NameList,
    NumberList,
    PositiveOrInf,
    pairs,
    stacked,
)

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from llmd_plugins.commands.bench.client import Target
    from llmd_plugins.commands.bench.load import Load
    from llmd_plugins.commands.bench.stats import RequestResult

_CHAT = "/v1/chat/completions"

_TARGET_OPTIONS = stacked(
    [
        click.option("--base-url", help="Where the server is.  [default: http://HOST:PORT]"),
        click.option("--host", default="127.0.0.1", show_default=True),
        click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True),
        click.option(
            "--backend",
            type=click.Choice(["openai", "vllm", "openai-chat"]),
            default="openai",
            show_default=True,
            help=f"openai-chat is short for --endpoint {_CHAT}.",
        ),
        click.option("--endpoint", help="/v1/completions or /v1/chat/completions.  [default: /v1/completions]"),
        click.option("--model", help="The model's name.  [default: the first of /v1/models]"),
        click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Sent as bearer token."),
        click.option("--header", multiple=True, metavar="KEY=VALUE ...", help="Further headers."),
        click.option("--request-timeout-s", type=click.FloatRange(min=0, min_open=True), default=21600.0, show_default=True),
        click.option(
            "--ready-check-timeout-sec",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            help="How long to wait until a first, uncounted request works; 0: do not try one.",
        ),
        click.option("--num-warmups", type=click.IntRange(0), default=0, show_default=True, help="Uncounted requests."),
        click.option(
            "--max-retries",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Times that a request answered with 429 waits for Retry-After and comes again (the wait is latency).",
        ),
    ]
)

_DATASET_OPTIONS = stacked(
    [
        click.option(
            "--dataset-name", type=click.Choice(["random", "sharegpt", "custom"]), default="random", show_default=True
        ),
        click.option(
            "--dataset-path",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="sharegpt: its JSON; custom: JSON lines with prompt (text or token ids) or messages, and output_tokens.",
        ),
        click.option(
            "--tokenizer",
            help="Folder with tokenizer.json, or a hub name: lengths are exact, and random prompts are random tokens.",
        ),
        click.option(
            "--vocab-size",
            type=click.IntRange(1),
            help="Without --tokenizer: random prompts are lists of so many different token ids (completions only).",
        ),
        click.option("--output-len", type=click.IntRange(1), help="sharegpt, custom: ask for so many tokens each."),
    ]
)

_LOAD_OPTIONS = stacked(
    [
        click.option("--num-prompts", type=click.IntRange(1), default=1000, show_default=True),
        click.option(
            "--request-rate",
            type=PositiveOrInf(),
            default=float("inf"),
            show_default=True,
            help="Requests a second, as a Poisson process; inf: all at once.",
        ),
        click.option(
            "--burstiness",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="1: Poisson; below: bursts; above: more even.",
        ),
        click.option("--max-concurrency", type=click.IntRange(1), help="At most so many requests under way."),
        click.option("--seed", type=int, default=0, show_default=True),
    ]
)

_SAMPLING_OPTIONS = stacked(
    [
        click.option("--ignore-eos", is_flag=True, help="Ask for exactly the wanted number of tokens (vLLM, llmd)."),
        click.option("--temperature", type=float, help="0: greedy.  [default: the server's]"),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--min-p", type=float),
        click.option("--frequency-penalty", type=float),
        click.option("--presence-penalty", type=float),
        click.option("--repetition-penalty", type=float),
        click.option("--extra-body", type=JsonObject(), default="{}", help="Further fields of each request."),
    ]
)

_RESULT_OPTIONS = stacked(
    [
        click.option(
            "--percentile-metrics",
            type=NameList(("ttft", "tpot", "itl", "e2el")),
            default="ttft,tpot,itl,e2el",
            show_default=True,
        ),
        click.option("--metric-percentiles", type=NumberList(), default="50,90,99", show_default=True),
        click.option(
            "--goodput",
            multiple=True,
            metavar="METRIC:MS ...",
            help="Objectives (ttft, tpot, e2el): count the requests a second that meet them all.",
        ),
        click.option("--save-result", is_flag=True, help="Write a JSON file."),
        click.option("--save-detailed", is_flag=True, help="Write each request's figures and text into it, too."),
        click.option("--result-dir", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Its folder."),
        click.option("--result-filename", help="Its name.  [default: from rate, model and time]"),
        click.option("--metadata", multiple=True, metavar="KEY=VALUE ...", help="Further entries of the file."),
        click.option("--disable-tqdm", is_flag=True, help="No progress bar."),
    ]
)


@click.command("serve", cls=ManyValuesCommand, short_help="Send requests to a server and measure its answers.")
@_TARGET_OPTIONS
@_DATASET_OPTIONS
@RANDOM_OPTIONS
@_LOAD_OPTIONS
@_SAMPLING_OPTIONS
@_RESULT_OPTIONS
def serve(**options: Any) -> None:
    """Send requests to any OpenAI-compatible server and measure its answers.

    Random prompts are token ids where the vocabulary is known: with --tokenizer, or with --vocab-size for the completions
    endpoint. Otherwise they are common English words, about a token each; the true lengths are in the server's usage.

    Times are the client's: TTFT from send to the first token, TPOT = (E2E - TTFT) / (output tokens - 1), ITL between
    arrivals, E2E to the last token. Token counts are the server's (stream_options.include_usage).
    """
    try:
        summary = asyncio.run(_run(options))
    except (DatasetError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    _show(summary, options)
    if not summary["completed"]:
        raise click.exceptions.Exit(1)


async def _run(options: dict[str, Any]) -> dict[str, Any]:
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    from llmd_plugins.commands.bench.load import Load
    from llmd_plugins.commands.bench.stats import parse_goodput

    objectives = parse_goodput(options["goodput"])
    timeout = ClientTimeout(total=options["request_timeout_s"], sock_connect=30)
    async with ClientSession(connector=TCPConnector(limit=0), timeout=timeout, read_bufsize=1 << 20) as session:
        target = await _target(session, options)
        requests = _requests(options, is_chat=target.is_chat)
        await _warm_up(session, target, requests, options)
        load = Load(
            request_rate=options["request_rate"],
            burstiness=options["burstiness"],
            max_concurrency=options["max_concurrency"],
            seed=options["seed"],
        )
        results, duration_s = await _measure(session, target, requests, load, options["disable_tqdm"])
    return _summary(options, target, results, duration_s, objectives)


async def _target(session: ClientSession, options: dict[str, Any]) -> Target:
    from llmd_plugins.commands.bench.client import Target

    base = (options["base_url"] or f"http://{options['host']}:{options['port']}").rstrip("/")
    endpoint = options["endpoint"] or (_CHAT if options["backend"] == "openai-chat" else "/v1/completions")
    headers = pairs(options["header"])
    if options["api_key"]:
        headers["Authorization"] = f"Bearer {options['api_key']}"
    names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    return Target(
        url=base + "/" + endpoint.lstrip("/"),
        model=options["model"] or await _first_model(session, base, headers, options["ready_check_timeout_sec"]),
        is_chat=endpoint.rstrip("/").endswith("/chat/completions"),
        ignore_eos=options["ignore_eos"],
        headers=headers,
        sampling={name: options[name] for name in names if options[name] is not None} | options["extra_body"],
        max_retries=options["max_retries"],
    )


async def _first_model(session: ClientSession, base: str, headers: dict[str, str], timeout_s: float) -> str:
    """The first name of /v1/models, as soon as the server answers."""
    from aiohttp import ClientError

    until = perf_counter() + timeout_s
    while True:
        try:
            async with session.get(f"{base}/v1/models", headers=headers) as response:
                if response.status == 200:
                    return str((await response.json())["data"][0]["id"])
                problem = f"{base}/v1/models answered HTTP {response.status}; name the model with --model"
                is_final = response.status < 500
        except ClientError as error:
            problem, is_final = f"no server at {base}: {error}", False
        except (ValueError, KeyError, IndexError, TypeError):
            # so does a server that is still loading
            problem, is_final = f"{base}/v1/models names no model; name it with --model", False
        if is_final or perf_counter() >= until:
            raise click.ClickException(problem)
        await asyncio.sleep(0.5)


def _requests(options: dict[str, Any], *, is_chat: bool) -> list[BenchRequest]:
    tokenizer = _tokenizer(options["tokenizer"])
    if options["dataset_name"] == "random":
        return _random_requests(options, tokenizer, is_chat=is_chat)
    if options["dataset_path"] is None:
        raise click.UsageError(f"--dataset-name {options['dataset_name']} needs --dataset-path")
    count: Callable[[str], int] = (lambda text: len(tokenizer.encode(text).ids)) if tokenizer else _estimate
    path, num, output_len = options["dataset_path"], options["num_prompts"], options["output_len"]
    if options["dataset_name"] == "sharegpt":
        return sharegpt_requests(path, num, options["seed"], count=count, output_len=output_len)
    return custom_requests(path, num, count=count, output_len=output_len)


def _random_requests(options: dict[str, Any], tokenizer: Any, *, is_chat: bool) -> list[BenchRequest]:
    lengths = RandomLengths(
        input_len=options["random_input_len"],
        output_len=options["random_output_len"],
        range_ratio=options["random_range_ratio"],
        prefix_len=options["random_prefix_len"],
    )
    if is_chat and options["vocab_size"] and not tokenizer:
        raise click.UsageError("chat messages are text: --vocab-size is of use with --tokenizer or /v1/completions only")
    vocab_size = options["vocab_size"] or (tokenizer.get_vocab_size() if tokenizer else None)
    decode = tokenizer.decode if tokenizer and is_chat else None
    return random_requests(options["num_prompts"], lengths, options["seed"], vocab_size=vocab_size, decode=decode)


def _estimate(text: str) -> int:
    """Tokens of a text without a tokenizer: four characters each, for English."""
    return max(1, len(text) // 4)


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from tokenizers import Tokenizer

    file = Path(name) / "tokenizer.json"
    if Path(name).is_dir() and not file.exists():
        raise click.ClickException(f"--tokenizer: there is no tokenizer.json in {name}")
    return Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(name)


async def _warm_up(
    session: ClientSession, target: Target, requests: Sequence[BenchRequest], options: dict[str, Any]
) -> None:
    from llmd_plugins.commands.bench.client import ask
    from llmd_plugins.commands.bench.load import wait_until_ready

    if timeout_s := options["ready_check_timeout_sec"]:
        error = await wait_until_ready(session, target, requests[0], timeout_s)
        if error:
            raise click.ClickException(f"the first request to {target.url} failed: {error}")
    for request in requests[: options["num_warmups"]]:
        await ask(session, target, request)


async def _measure(
    session: ClientSession, target: Target, requests: Sequence[BenchRequest], load: Load, is_quiet: bool
) -> tuple[list[RequestResult], float]:
    from tqdm import tqdm

    from llmd_plugins.commands.bench.client import ask
    from llmd_plugins.commands.bench.load import run_load

    num_failed = 0
    with tqdm(total=len(requests), unit="req", disable=is_quiet) as bar:

        def on_done(result: RequestResult) -> None:
            nonlocal num_failed
            num_failed += not result.is_ok
            if num_failed:
                bar.set_postfix_str(f"{num_failed} failed", refresh=False)
            bar.update()

        return await run_load(requests, load, lambda request: ask(session, target, request), on_done=on_done)


def _summary(
    options: dict[str, Any],
    target: Target,
    results: Sequence[RequestResult],
    duration_s: float,
    objectives: dict[str, float],
) -> dict[str, Any]:
    from llmd_plugins.commands.bench.report import stamp
    from llmd_plugins.commands.bench.stats import summarize

    rate = options["request_rate"]
    summary = stamp() | {
        "backend": options["backend"],
        "endpoint": target.url,
        "model_id": target.model,
        "dataset_name": options["dataset_name"],
        "num_prompts": len(results),
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": options["burstiness"],
        "max_concurrency": options["max_concurrency"],
    }
    if objectives:
        summary["goodput_objectives_ms"] = objectives
    summary |= pairs(options["metadata"])
    summary |= summarize(
        results,
        duration_s,
        metrics=options["percentile_metrics"],
        percentiles=options["metric_percentiles"],
        objectives=objectives,
    )
    if options["save_detailed"]:
        summary |= {
            "input_lens": [result.num_prompt_tokens for result in results],
            "output_lens": [result.num_output_tokens for result in results],
            "ttfts": [result.ttft_s for result in results],
            "itls": [result.itls_s for result in results],
            "e2els": [result.e2e_s for result in results],
            "generated_texts": [result.text for result in results],
            "errors": [result.error for result in results],
        }
    return summary


def _show(summary: dict[str, Any], options: dict[str, Any]) -> None:
    from llmd_plugins.commands.bench.report import serve_lines, write_json

    click.echo("\n".join(serve_lines(summary, options["percentile_metrics"], options["metric_percentiles"])))
    if options["save_result"] or options["save_detailed"] or options["result_filename"]:
        model = str(summary["model_id"]).rpartition("/")[2]
        name = f"{options['backend']}-{summary['request_rate']}qps-{model}-{datetime.now():%Y%m%d-%H%M%S}.json"
        path = options["result_dir"] / (options["result_filename"] or name)
        write_json(path, summary)
        click.echo(f"written: {path}")
