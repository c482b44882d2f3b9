"""llmd beside every other engine that is installed, on a CPU: same prompts, in turn, round by round.

    python benchmarks/cpu/peers.py --models DIR [--peers VENV-OR-FOLDER …] [--engine llama.cpp=/path/to/python …]
        [--formats bf16,int8,int4] [--work decode,prefill,many16,many64,start,http] [--rounds 3] [--output FILE]

The model has the shape of Qwen2.5-0.5B and random weights; it and what each engine makes of it are written to --models once.
Every engine has a process of its own in its own environment; one runs, the others are stopped. Before each run the machine
must be quiet: what others use is watched for half a second, waited for, and otherwise marked (--strict: refused).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.cpu import conversions, engine_list, machine
from benchmarks.cpu.engine_list import ENGINES, FORMATS, LLMD_FRESH, LLMD_HTTP
from benchmarks.cpu.figures import summarize, table
from benchmarks.cpu.found import Found, Plan
from benchmarks.cpu.process import EngineProcess
from benchmarks.cpu.rounds import Machine, Noisy, Rounds
from benchmarks.cpu.works import HTTP, NAMES, START, describe
from benchmarks.results import report

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
KV_BYTES = 256 << 20  # 64 sequences of 256 tokens take 192 MiB
_COPY_BYTES = 16 << 20


def say(text: str) -> None:
    """Progress; the result alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def listed(choices: Sequence[str], text: str) -> list[str]:
    """Names with commas between, of these."""
    names = text.split(",")
    if unknown := [name for name in names if name not in choices]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(choices)}")
    return names


def named_engine(text: str) -> tuple[str, str]:
    """ENGINE=PYTHON."""
    name, _, python = text.partition("=")
    if name not in ENGINES or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE=PYTHON; engines are {', '.join(ENGINES)}")
    return name, python


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the models, which are made where missing")
    parser.add_argument("--peers", type=Path, action="append", default=[], help="a virtual environment, or a folder of some")
    parser.add_argument("--engine", type=named_engine, action="append", default=[], help="ENGINE=PYTHON: who has it")
    parser.add_argument("--without", type=functools.partial(listed, tuple(ENGINES)), default=[], help="engines to leave out")
    parser.add_argument("--formats", type=functools.partial(listed, FORMATS), default=list(FORMATS))
    parser.add_argument("--work", type=functools.partial(listed, NAMES), default=list(NAMES))
    parser.add_argument(
        "--http-formats", type=functools.partial(listed, FORMATS), help="formats of http; default: the first"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget-s", type=float, default=720.0, help="later rounds leave out what does not fit")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="an engine that takes longer for one call is out")
    parser.add_argument("--sit-out", type=float, default=0.7, help="peers below this share of the best run a work once")
    parser.add_argument("--quiet-wait-s", type=float, default=20.0, help="how long to wait for a quiet machine")
    parser.add_argument("--strict", action="store_true", help="give up when the machine does not get quiet")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers: checks the benchmark itself")
    parser.add_argument("--output", type=Path, help="write the JSON there, after each round")
    return parser


def choose(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreter of each engine that takes part, and why others do not."""
    pythons = [sys.executable, *engine_list.interpreters(options.peers)]
    found, left_out = engine_list.find_engines(dict(options.engine), pythons)
    for name in options.without:
        found.pop(name, None)
        left_out[name] = "not wanted"
    for name, work in ((LLMD_HTTP, HTTP), (LLMD_FRESH, START)):
        if work not in options.work:
            found.pop(name, None)
    return found, left_out


def make_plan(options: argparse.Namespace, names: Sequence[str], vocab_size: int) -> Plan:
    """What the command line asks for."""
    http_formats = options.http_formats or options.formats[:1]
    engines = {
        model_format: [
            name
            for name in names
            if model_format in ENGINES[name].formats and (name != LLMD_HTTP or model_format in http_formats)
        ]
        for model_format in options.formats
    }
    return Plan(
        engines=engines,
        works=options.work,
        rounds=options.rounds,
        options={
            "threads": options.threads,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
            "kv_bytes": KV_BYTES,
        },
        vocab_size=vocab_size,
        timeout_s=options.timeout_s,
        budget_s=options.budget_s,
        sit_out=options.sit_out,
        is_strict=options.strict,
    )


def prepare_models(plan: Plan, pythons: dict[str, str], options: argparse.Namespace, left_out: dict[str, str]) -> Plan:
    """Make what is missing; an engine without its model is left out."""
    ready: dict[str, list[str]] = {}
    for model_format, names in plan.engines.items():
        ready[model_format] = []
        for name in names:
            try:
                conversions.prepare(options.models, options.shape, name, model_format, pythons[name], say)
            except conversions.ConversionFailure as failure:
                left_out[f"{name} {model_format}"] = str(failure)
                continue
            ready[model_format].append(name)
    return Plan(**{**vars(plan), "engines": ready})


def read_through(model: str) -> None:
    """Have the model's files in the page cache."""
    path = Path(model)
    for file in [path] if path.is_file() else filter(Path.is_file, path.iterdir()):
        with file.open("rb") as content:
            while content.read(_COPY_BYTES):
                pass


def real_machine(options: argparse.Namespace, pythons: dict[str, str], logs: Path) -> Machine:
    """Engines as processes, and this computer."""

    def launch(name: str, model_format: str) -> EngineProcess:
        command = engine_list.command(name, pythons[name], options.threads)
        return EngineProcess(name, command, logs / f"{name}-{model_format}.log")

    return Machine(
        launch=launch,
        model_path=lambda name, form: str(conversions.model_path(options.models, options.shape, name, form)),
        read_through=read_through,
        wait_until_quiet=functools.partial(machine.wait_until_quiet, bound_s=options.quiet_wait_s),
        read_bandwidth=functools.partial(machine.read_bandwidth, options.threads),
        say=say,
    )


def main() -> None:
    """Measure, show, write."""
    options = arguments().parse_args()
    options.shape = "tiny" if options.tiny else "q05"
    config: dict[str, Any] = conversions.SHAPES[options.shape]
    try:
        pythons, left_out = choose(options)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    plan = prepare_models(make_plan(options, list(pythons), config["vocab_size"]), pythons, options, left_out)
    for name, reason in left_out.items():
        say(f"{name} is left out: {reason}")

    def write(found: Found) -> dict[str, Any]:
        figures = summarize(found, plan, config)
        settings = {"rounds": plan.rounds, "works": describe(plan.works), "options": plan.options, "left_out": left_out}
        report(settings | figures, options.output, shown=("left_out", "failures"))
        return figures

    with tempfile.TemporaryDirectory() as logs:
        rounds = Rounds(plan, real_machine(options, pythons, Path(logs)))
        try:
            found = rounds.run(write)
        except Noisy as noisy:
            raise SystemExit(f"refused, the machine is not quiet: {noisy}") from None
    print("\n".join(table(summarize(found, plan, config))))


if __name__ == "__main__":
    main()
