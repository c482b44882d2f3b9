"""What adapters cost a decode step: 16 rows on 16 adapters, on one, on none with adapters enabled, and on a plain model.

    python benchmarks/model/lora.py [--shape 0.5b] [--rank 16] [--rows 16] [--rounds 15] [--output FILE]

Random weights in the shape of Qwen2.5-0.5B, bfloat16, adapters on every linear of every layer. The four kinds of batch take
turns, so that whatever else the machine does hits them alike; ratios are of medians, to the plain model. Also the time from
a cold adapter's request to its first token, beside what reading its file alone takes. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmd.config import AdaptersConfig, CacheConfig, ModelConfig, PluginsConfig, SchedulerConfig
from llmd.daemon import model_parts
from llmd.engine.params import SamplingParams
from llmd.engine.step import AdapterLoad, BlockUpdate, RowAdmit, StepPlan
from llmd.model.executor import num_threads
from llmd.model.runner import Runner
from llmd.plugin.catalog import build_catalog
from llmd_kernels import native

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import report

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip
PROMPT = 32


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """config.json; the weights are drawn when it is loaded."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "max_position_embeddings": 1024, "torch_dtype": "bfloat16", "rope_theta": 1e6, **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, runner: Runner, rank: int, seed: int) -> Path:
    """An adapter of every linear in the layers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in runner.adapters.modules.items():  # type: ignore[union-attr]
        if module.kind == "linear":
            for kind, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                values = torch.randn(shape, generator=generator) * 0.01
                tensors[f"base_model.model.{name}.lora_{kind}.weight"] = values.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def make_runner(folder: Path, rows: int, rank: int | None) -> Runner:
    """A loaded model; with a rank, with as many slots as rows."""
    adapters = None if rank is None else AdaptersConfig(enable_lora=True, max_loras=rows, max_lora_rank=rank)
    runner = Runner(
        ModelConfig(model=str(folder), load_format="dummy", max_model_len=512),
        CacheConfig(kv_cache_bytes=256 << 20),
        SchedulerConfig(max_num_seqs=rows),
        folder,
        model_parts(build_catalog(PluginsConfig(autoload=False)), adapters),
    )
    runner.load(lambda progress: None)
    return runner


class Batch:
    """Rows that decode for ever, each with its slot."""

    def __init__(self, runner: Runner, slots: list[int | None], loads: list[AdapterLoad]) -> None:
        self.runner, self.count = runner, len(slots)
        per_row = 512 // 16
        params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
        admitted = [
            RowAdmit(
                row=row, seq_id=row, request_id=str(row), token_ids=tuple(range(row, row + PROMPT)),
                num_prompt_tokens=PROMPT, params=params, seed=0, adapter_slot=slot,
            )
            for row, slot in enumerate(slots)
        ]  # fmt: skip
        updates = [BlockUpdate(row, 0, 0, range(row * per_row, (row + 1) * per_row)) for row in range(self.count)]
        self.length = 0
        self.rows = list(range(self.count))
        self.first = StepPlan(
            step_id=0,
            released=self.rows,
            adapter_loads=loads,
            admitted=admitted,
            block_updates=updates,
            **self.columns(PROMPT),
        )
        self.start_over()

    def start_over(self) -> None:
        """The prompts again."""
        self.runner.run(self.first)
        self.length = PROMPT

    def columns(self, count: int) -> dict[str, Any]:
        """A plan's columns."""
        ones = [1] * self.count
        return {
            "rows": self.rows, "starts": [self.length] * self.count, "counts": [count] * self.count, "num_logits": ones,
            "samples": [True] * self.count,
        }  # fmt: skip

    def step(self) -> float:
        """Seconds of one decode step."""
        began = time.perf_counter()
        self.runner.run(StepPlan(step_id=1, **self.columns(1)))
        self.length += 1
        return time.perf_counter() - began


def measure(folder: Path, shape: str, rows: int, rank: int, rounds: int) -> dict[str, float]:
    """Medians and ratios."""
    write_model(folder, SHAPES[shape])
    plain, served = make_runner(folder, rows, None), make_runner(folder, rows, rank)
    paths = [write_adapter(folder / str(index), served, rank, index) for index in range(rows)]
    loads = []
    for slot, path in enumerate(paths):
        served.keep_adapter(slot + 1, served.read_adapter(path))
        loads.append(AdapterLoad(slot, slot + 1))
    kinds: dict[str, tuple[Runner, list[int | None], list[AdapterLoad]]] = {
        "plain": (plain, [None] * rows, []),
        "none": (served, [None] * rows, loads),
        "one": (served, [0] * rows, []),
        "each": (served, list(range(rows)), []),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            batch = Batch(*kind)
            times[name] += [batch.step() for _ in range(3)][1:]
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {f"{name}_ms": round(value * 1e3, 2) for name, value in medians.items()}
    figures |= {f"{name}_ratio": round(medians[name] / medians["plain"], 3) for name in kinds if name != "plain"}
    return figures | first_token(served, paths)


def first_token(runner: Runner, paths: list[Path]) -> dict[str, float]:
    """From asking for a cold adapter to its first token, and the parts of it."""
    reads, totals, fills = [], [], []
    for path in paths[:8]:
        began = time.perf_counter()
        load_file(path / "adapter_model.safetensors")
        reads.append(time.perf_counter() - began)
        began = time.perf_counter()
        packed = runner.read_adapter(path)
        runner.keep_adapter(99, packed)
        loaded = time.perf_counter()
        Batch(runner, [0], [AdapterLoad(0, 99)])
        totals.append(time.perf_counter() - began)
        fills.append(time.perf_counter() - loaded)
    return {
        "file_read_ms": round(statistics.median(reads) * 1e3, 2),
        "cold_first_token_ms": round(statistics.median(totals) * 1e3, 2),
        "of_it_slot_and_prompt_ms": round(statistics.median(fills) * 1e3, 2),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.5b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(num_threads())
    native.set_num_threads(num_threads())
    sizes = {"shape": options.shape, "rank": options.rank, "rows": options.rows, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        report(sizes | measure(Path(folder), options.shape, options.rows, options.rank, options.rounds), options.output)


if __name__ == "__main__":
    main()
