"""Serves a tiny model by the road of GPUs on a CPU: every tensor says that it is on a GPU, so what has a Triton kernel is
launched, in the interpreter, and decode steps are padded and replayed. Prints the tokens of the case that is named.

What this cannot show: streams, pinned memory and the driver (see test_no_waits), and what a compiler makes of the kernels.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from model.gpu_path_cases import CASES, generate
from model.ladder_capture import LadderCapture
from model.step_driver import StepDriver, make_runner, model_parts
from triton.runtime.interpreter import GridExecutor

from llmd.model.sampler_triton import TritonSampler
from llmd.model.staging import Ring
from llmd_kernels import native
from llmd_plugins.architectures import moe
from llmd_plugins.attention import triton as triton_attention

folder, name = Path(sys.argv[1]), sys.argv[2]
launches = set()


def parts(settings):
    found = model_parts(**settings.get("adapters", {}))
    for spec in moe.llmd_register_architectures():
        found.architectures.update(dict.fromkeys(spec.architectures, spec))
    found.samplers.clear()
    found.samplers["triton"] = SimpleNamespace(priority=1, build=TritonSampler)
    [spec] = triton_attention.llmd_register_attention_backends()
    found.attention_backends.clear()
    found.attention_backends["triton"] = spec
    return found


def launch(executor, *args, inner=GridExecutor.__call__, **kwargs):
    launches.add(executor.fn.__name__)
    return inner(executor, *args, **kwargs)


def serve():
    settings = {key: value for key, value in CASES[name][3].items() if key != "adapters"}
    runner = make_runner(folder / "base", parts=parts(CASES[name][3]), scheduler={"max_num_seqs": 4}, **settings)
    columns = runner.rows.decode
    columns._ring = Ring(len(columns._columns), torch.int64, torch.device("cpu"))  # inputs are made by the kernel
    return generate(StepDriver(runner), name, folder)


native._found[:] = [None]
with (
    mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
    mock.patch.object(torch.Tensor, "is_cpu", property(lambda tensor: False)),
    mock.patch("llmd.model.runner.capture_for", lambda device: LadderCapture(device)),
    mock.patch.object(triton_attention.TritonAttention, "why_not", return_value=[]),
    mock.patch.object(GridExecutor, "__call__", launch),
):
    print(json.dumps({"tokens": serve(), "launches": sorted(launches)}))
