"""The model in each engine's own format, made once from the checkpoint and kept beside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .engine_list import ENGINES, LLMD
from .models import QWEN2_05B, TINY, write_checkpoint

SHAPES = {"q05": QWEN2_05B, "tiny": TINY}
_GGUF_TYPES = {"int8": "Q8_0", "int4": "Q4_0"}
_EXPORTS = {
    "bf16": ("--weight-format", "fp16"),
    "int8": ("--weight-format", "int8", "--sym"),
    "int4": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", "--sym"),
}
_CONVERT_S = 1200
_QUANTIZE = """
import llama_cpp, sys
source, target, kind, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GLOBALS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


class ConversionFailure(Exception):
    """A model could not be made; the message says of what and why."""


def model_path(models: Path, shape: str, engine: str, model_format: str) -> Path:
    """The file or folder that an engine loads."""
    return models / ENGINES[engine].model.format(shape=shape, format=model_format)


def prepare(models: Path, shape: str, engine: str, model_format: str, python: str, say: Callable[[str], None]) -> Path:
    """That file or folder, made now where it is missing. Raises ConversionFailure."""
    path = model_path(models, shape, engine, model_format)
    if not path.exists():
        models.mkdir(parents=True, exist_ok=True)
        source = _source(models, shape, engine, model_format, python, say)
        say(f"making {path.name}")
        part = path.with_name(f"{path.name}.part")
        _make(part, source, shape, engine, model_format, python)
        part.rename(path)
    return path


def _source(
    models: Path, shape: str, engine: str, model_format: str, python: str, say: Callable[[str], None]
) -> Path | None:
    """What it is made of, made first; None for the checkpoint itself."""
    if ENGINES[engine].model == ENGINES[LLMD].model:
        return None
    if engine == "llama.cpp" and model_format != "bf16":
        return prepare(models, shape, engine, "bf16", python, say)
    return prepare(models, shape, LLMD, "bf16", python, say)


def _make(part: Path, source: Path | None, shape: str, engine: str, model_format: str, python: str) -> None:
    if source is None:
        write_checkpoint(part, SHAPES[shape])
    elif engine == "openvino":
        command = [str(Path(python).with_name("optimum-cli")), "export", "openvino", "--model", str(source)]
        _run([*command, "--task", "text-generation-with-past", *_EXPORTS[model_format], str(part)])
    elif model_format == "bf16":
        write_gguf(source, part)
    else:
        _run([python, "-c", _QUANTIZE, str(source), str(part), _GGUF_TYPES[model_format], "2"])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConversionFailure(f"{command[0]}: {error}") from error
    if done.returncode:
        raise ConversionFailure(f"{command[0]} ended with {done.returncode}: {' '.join(done.stderr.split())[-400:]}")


# --- GGUF


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a Qwen2 checkpoint."""
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBALS:
        return f"{_GLOBALS[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def gguf_facts(config: Mapping[str, Any]) -> dict[str, int | float]:
    """The keys that llama.cpp reads of a Qwen2 model, without their prefix."""
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Matrices stay bf16, vectors become fp32 as llama.cpp wants them; no vocabulary: prompts are token ids."""
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in gguf_facts(config).items():
        if isinstance(value, int):
            writer.add_uint32(f"qwen2.{key}", value)
        else:
            writer.add_float32(f"qwen2.{key}", value)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_tensor(name)
            if tensor.dim() == 1:
                writer.add_tensor(gguf_name(name), tensor.float().numpy())
            else:
                rows = tensor.view(torch.uint8).numpy()
                writer.add_tensor(gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
