"""llmd beside one batched `transformers` generate: 16 requests at once on the shape of a 0.5B Qwen2, random bf16 weights.

    python benchmarks/serve/transformers_batch.py [--tiny] [--rounds 3] [--output benchmarks/results/transformers_batch.json]

Both engines run in a process of their own on the same weights and, round by round in turn, on the same prompts (64-192
random tokens each, new ones every round, so that no prefix cache helps), greedy, 64 tokens each, EOS ignored; transformers
gets the prompts left-padded as one batch. Reported are the medians of output tokens a second, their ratio, and each
process's peak memory, for llmd beside its weights and KV pool. `foreign_cpu` is the share of the machine that other work
took meanwhile: do not believe a round in which it is large.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
QWEN2_05B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
TINY = QWEN2_05B | {
    "vocab_size": 1000, "hidden_size": 112, "intermediate_size": 304, "num_hidden_layers": 2, "num_attention_heads": 7,
    "num_key_value_heads": 1,
}  # fmt: skip
MAX_MODEL_LEN = 512
KV_BYTES = 128 << 20


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Random weights and a tokenizer that nobody will use, as a checkpoint."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(shape["vocab_size"])}, unk_token="t0")).save(
        str(folder / "tokenizer.json")
    )


class LlmdWorker:
    """llmd.LLM over token ids."""

    def __init__(self, folder: str) -> None:
        from llmd import LLM

        self._llm = LLM(
            model=folder, dtype="bfloat16", device="cpu", max_model_len=MAX_MODEL_LEN, kv_cache_memory_bytes=KV_BYTES
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        from llmd import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        self._llm.shutdown()


class TransformersWorker:
    """One batched generate."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import Qwen2ForCausalLM

        self._model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        return out[:, width:].tolist()

    def close(self) -> None:
        """Nothing is open."""


WORKERS = {"llmd": LlmdWorker, "transformers": TransformersWorker}


def cpu_seconds() -> float:
    """CPU time that the whole machine has spent, idle and waiting aside."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def work(name: str, folder: str) -> None:
    """Serve orders from stdin, a JSON line each, until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers
    start = time.perf_counter()
    worker = WORKERS[name](folder)
    worker.generate([[1, 2, 3]], 2)
    print(json.dumps({"start_s": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        all_before, own_before, start = cpu_seconds(), time.process_time(), time.perf_counter()
        tokens = worker.generate(order["prompts"], order["num_tokens"])
        seconds, own = time.perf_counter() - start, time.process_time() - own_before
        foreign = max(0.0, cpu_seconds() - all_before - own) / (seconds * (os.cpu_count() or 1))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "tokens": tokens, "foreign_cpu": foreign, "peak_rss_bytes": peak}
        print(json.dumps(answer), file=answers, flush=True)
    worker.close()


class Engine:
    """A worker process."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "1000",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.name, self.rounds = name, list[dict[str, Any]]()
        self.start_s = self._answer()["start_s"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} process ended with {self._process.wait()}")
        return json.loads(line)

    def run(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """One round; checks that every token asked for came."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "num_tokens": num_tokens}), file=self._process.stdin, flush=True)
        answer = self._answer()
        tokens = answer.pop("tokens")
        if any(len(row) != num_tokens for row in tokens):
            raise SystemExit(f"{self.name} gave {[len(row) for row in tokens]} tokens instead of {num_tokens} each")
        answer["tokens_per_s"] = len(prompts) * num_tokens / answer["seconds"]
        self.rounds.append(answer)
        return answer | {"tokens": tokens}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def report(self) -> dict[str, Any]:
        """Its part of the result."""
        return {
            "tokens_per_s": statistics.median(r["tokens_per_s"] for r in self.rounds),
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in self.rounds),
            "start_s": self.start_s,
            "rounds": self.rounds,
        }


def draw_prompts(num: int, vocab_size: int, seed: int) -> list[list[int]]:
    """64 to 192 tokens each."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(64, 192))] for _ in range(num)]


def equal_prefix(left: list[list[int]], right: list[list[int]]) -> float:
    """Mean share of the tokens before the first difference: random weights have near ties, so it need not be 1."""
    shares = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) / len(x)
        for x, y in zip(left, right, strict=True)
    ]
    return statistics.mean(shares)


def measure(arguments: argparse.Namespace, folder: Path, vocab_size: int) -> dict[str, Any]:
    """All rounds, the engines in turn."""
    engines = {name: Engine(name, folder, arguments.threads) for name in WORKERS}
    equal = []
    try:
        for engine in engines.values():  # the full batch once, uncounted: buffers and kernels exist
            engine.run(draw_prompts(arguments.requests, vocab_size, 0), 2)
            engine.rounds.clear()
        for number in range(1, arguments.rounds + 1):
            prompts = draw_prompts(arguments.requests, vocab_size, number)
            answers = {name: engine.run(prompts, arguments.output_len) for name, engine in engines.items()}
            equal.append(equal_prefix(*(answer["tokens"] for answer in answers.values())))
            for name, answer in answers.items():
                print(
                    f"round {number}: {name:12} {answer['tokens_per_s']:8.1f} tokens/s "
                    f"(foreign CPU {answer['foreign_cpu']:.0%})",
                    file=sys.stderr,
                )
    finally:
        for engine in engines.values():
            engine.close()
    found = {name: engine.report() for name, engine in engines.items()}
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return found | {
        "ratio": found["llmd"]["tokens_per_s"] / found["transformers"]["tokens_per_s"],
        "ratio_of_rounds": [
            ours["tokens_per_s"] / theirs["tokens_per_s"]
            for ours, theirs in zip(found["llmd"]["rounds"], found["transformers"]["rounds"], strict=True)
        ],
        "equal_prefix": equal,
        "weights_bytes": weights,
        "kv_bytes": KV_BYTES,
        "memory_above_weights_and_kv_bytes": found["llmd"]["peak_rss_bytes"] - weights - KV_BYTES,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a two-layer model: checks the benchmark, measures nothing")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="write the JSON there")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.folder)
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results import report

    shape = TINY if arguments.tiny else QWEN2_05B
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        found = measure(arguments, Path(folder), int(shape["vocab_size"]))
    workload = {"requests": arguments.requests, "input_len": [64, 192], "output_len": arguments.output_len}
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads}
    shown = ("ratio", "ratio_of_rounds", "memory_above_weights_and_kv_bytes")
    report({"versions": versions, "workload": workload} | found, arguments.output, shown=shown)


if __name__ == "__main__":
    main()
