"""Machines that lack something: a second core, a compiler, memory. Slower, or refused with the reason; never a crash."""

import json
import os
import sys

import pytest
from daemons import Daemon

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity and /proc are Linux's")

HUGE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 16384, "intermediate_size": 131072,
    "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 4096,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_one_core_and_no_compiler(tmp_path):
    cpu = min(os.sched_getaffinity(0))
    arguments = ("serve", "demo", "--device", "cpu", "--max-model-len", "256")
    environment = {"CXX": "/nonexistent/g++", "LLMD_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": None}
    with Daemon(
        *arguments, cwd=tmp_path, fake=False, preexec=lambda: os.sched_setaffinity(0, {cpu}), **environment
    ) as daemon:
        daemon.ready()
        status, answer = daemon.complete("Hello", max_tokens=8)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 8
        assert daemon.log.count("no native CPU kernels, plain torch is used instead: no C++ compiler") == 1
        assert "CPU: 1 thread" in daemon.log
        with open(f"/proc/{daemon.process.pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
        assert int(status["RssAnon"].split()[0]) < 400 << 10  # a limit of 512 MB leaves room for it
        assert daemon.stop() == 0


def test_a_model_larger_than_memory_is_refused_with_the_arithmetic(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(HUGE))
    arguments = ("serve", "model", "--device", "cpu", "--load-format", "dummy", "--tokenizer", "demo")
    with Daemon(*arguments, cwd=tmp_path, fake=False, OMP_NUM_THREADS="1") as daemon:
        assert daemon.process.wait(60) == 78
        daemon._reader.join(5)
        found = [line for line in daemon.lines if "does not fit into memory" in line]
    assert found
    for words in ("weights 7", "KV pool", "working memory", "reserve", "are free (", "are missing", "or 'int4'"):
        assert words in found[-1]
