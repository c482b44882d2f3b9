"""The whole road of GPUs, kernels and padded replays, in Triton's interpreter: the tokens of the CPU's road."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model.gpu_path_cases import CASES, generate, save
from model.step_driver import StepDriver, make_runner, model_parts

from llmd_plugins.architectures import moe

pytest.importorskip("triton")

TESTS = Path(__file__).parent.parent


EVERY = {"prepare", "decode_inputs", "normalise", "rotate_and_store", "prefill", "decode", "maxima_of", "pick"}
LAUNCHES = {
    "every wish": {"look_up", "narrow", "tally", "count", "apply", "parts"},
    "int8": {"quantize", "multiply", "hand_out"},
    "nf4": {"quantize", "multiply", "hand_out"},
    "experts": {"choose", "hand_out"},
    "adapters": {"shrink", "expand"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_the_cpus(name, tmp_path):
    save(name, tmp_path)
    found = interpreted(name, tmp_path)
    settings = {key: value for key, value in CASES[name][3].items() if key != "adapters"}
    adapters = CASES[name][3].get("adapters", {})
    runner = make_runner(
        tmp_path / "base", parts=parts(**adapters), enforce_eager=True, scheduler={"max_num_seqs": 4}, **settings
    )
    assert found["tokens"] == generate(StepDriver(runner), name, tmp_path)
    missing = (EVERY | LAUNCHES[name]) - set(found["launches"])
    assert missing == ({"decode_inputs"} if name == "adapters" else set())  # rows with adapters are recorded after a while


def interpreted(name, folder):
    """What the other script prints."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(TESTS / "model" / "gpu_path_interpreted.py"), str(folder), name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=190, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def parts(**adapters):
    made = model_parts(**adapters)
    for spec in moe.llmd_register_architectures():
        made.architectures.update(dict.fromkeys(spec.architectures, spec))
    return made
