"""Thread rules of the built-in plugins, watched in a daemon that serves: who is of the loop never runs beside it.

Loop-thread objects own requests, executor-thread objects own tensors; a grammar's masks, its compilation and an adapter's
files have threads of their own. No object is ever called from two of them at once (plugins/README.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "threads_program.py"
LOOP, EXECUTOR = "MainThread", "llmd-executor"
# family → its objects' functions, where they must run
RULES = {
    "authenticators": (r"auth/api_keys\.py: ApiKeys\.", LOOP),
    "scheduling policies": (r"scheduling/fair\.py: FairQueue\.(push|remove|ordered|claims|charge|rank)", LOOP),
    "routes of OpenAI": (r"openai/\w+\.py: \w+\.?", LOOP),
    "routes of Anthropic": (r"anthropic/\w+\.py: \w+\.?", LOOP),
    "routes of responses": (r"responses/\w+\.py: \w+\.?", LOOP),
    "parsers": (r".*/text/parsers/\w+\.py: \w*Parser\.(feed|finish)", LOOP),
    "ends of requests": (r"observe/\w+\.py: llmd_request_finished", LOOP),
    "metrics": (r"observe/daemon_metrics\.py: \w+", LOOP),
    "matchers: tokens": (r"grammars/\w+\.py: \w*Matcher\.(accept|forced|finished)", LOOP),
    "matchers: masks": (r"grammars/\w+\.py: \w*Matcher\.fill", "llmd-masks"),
    "grammar compilers": (r"grammars/\w+\.py: \w*Compiler\.compile", "llmd-grammar"),
    "adapter formats": (r"adapters/peft_files\.py: PeftFormat\.(detect|load)", "llmd-adapters"),
    "architectures": (r"architectures/decoder\.py: \w+\.(__init__|forward|logits)", EXECUTOR),
    "attention backends": (r"attention/\w+\.py: \w+\.(why_not|kv_shape|prepare|forward)", EXECUTOR),
    "quantization methods": (r"quantization/\w+\.py: \w+\.(create_weights|finish_weights|apply)", EXECUTOR),
    "checkpoint formats": (r"checkpoints/dummy\.py: \w+\.(infos|tensors|close)", EXECUTOR),
    "logits processors": (r"sampling/bad_words/processor\.py: \w+\.(wants|admit|release|apply)", EXECUTOR),
    "samplers": (r".*/model/sampler\.py: TorchSampler\.(admit|release|sample)", EXECUTOR),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What ran where while a daemon answered requests of every kind."""
    command = [sys.executable, str(PROGRAM), str(tmp_path_factory.mktemp("threads"))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    return {name: {re.sub(r"_\d+$", "", thread) for thread in threads} for name, threads in found.items()}


@pytest.mark.parametrize("family", RULES)
def test_objects_stay_on_their_thread(family, seen):
    pattern, thread = RULES[family]
    mine = {name: threads for name, threads in seen.items() if re.match(pattern, name)}
    assert mine, f"nothing of {family} was called"
    assert {name: threads for name, threads in mine.items() if threads != {thread}} == {}


def test_nothing_built_in_runs_on_both(seen):
    """Whatever it is: tensors and requests have no function in common."""
    assert [name for name, threads in seen.items() if {LOOP, EXECUTOR} <= threads] == []
