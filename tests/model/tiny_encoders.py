"""Tiny random encoders and classifiers in Hugging Face's own classes, and a Runner's vectors for a batch of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from model.step_driver import model_parts
from safetensors.torch import save_file

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import PoolingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.model.parts import ModelParts
from llmd.model.runner import Runner

VOCAB_SIZE = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 60, "intermediate_size": 76, "num_hidden_layers": 4,
    "num_attention_heads": 3, "max_position_embeddings": 300, "initializer_range": 0.2, "pad_token_id": 1,
    "bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None,
}  # fmt: skip


def make_encoder(name: str, **changes: Any) -> Any:
    """A random model of the class `name`; equal calls give equal weights."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**{**SHAPE, **changes})).eval()
    with torch.no_grad():  # the initial zeros and ones would hide a bias or norm that is not applied
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def pooling_parts() -> ModelParts:
    """The built-in plugins that encoders and decoders for vectors need."""
    from llmd_plugins.architectures import bert, decoder_vectors, modernbert, roberta
    from llmd_plugins.attention import encoder

    parts = model_parts()
    plugins = (bert, decoder_vectors, modernbert, roberta)
    specs = [spec for plugin in plugins for spec in plugin.llmd_register_architectures()]
    named = {name: spec for spec in specs for name in spec.architectures}
    backends = {spec.name: spec for spec in encoder.llmd_register_attention_backends()}
    return replace(
        parts,
        architectures={**parts.architectures, **named},
        attention_backends={**parts.attention_backends, **backends},
    )


def make_runner(path: Path, **model: Any) -> Runner:
    """A loaded Runner on the CPU."""
    runner = Runner(
        ModelConfig(model=str(path), **{"dtype": "float32", "device": "cpu", **model}),
        CacheConfig(block_size=16, kv_cache_bytes=8 << 20),
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512),
        path,
        pooling_parts(),
    )
    runner.info = runner.load(lambda progress: None)  # type: ignore[attr-defined]
    return runner


def pool(
    runner: Runner, prompts: Sequence[Sequence[int]], params: PoolingParams, types: Sequence[Sequence[int]] = ()
) -> list[np.ndarray]:
    """The vectors of all prompts, computed in one step."""
    per_row = -(-runner.max_model_len // 16)
    admitted = [
        RowAdmit(
            row=row, seq_id=row, request_id=str(row), token_ids=tuple(prompt), num_prompt_tokens=len(prompt),
            params=params, seed=0, token_types=types[row] if types else (),
        )
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip
    rows, counts = range(len(prompts)), [len(prompt) for prompt in prompts]
    updates = [
        BlockUpdate(row, 0, 0, range(row * per_row, -(-count // 16) + row * per_row)) for row, count in enumerate(counts)
    ]
    nothing = [0] * len(counts)
    result = runner.run(
        StepPlan(
            step_id=0, admitted=admitted, block_updates=updates, rows=rows, starts=nothing, counts=counts,
            num_logits=nothing, samples=[False] * len(counts),
        )
    )  # fmt: skip
    assert not result.errors
    runner.run(StepPlan(step_id=1, released=rows))
    return [result.pooled[row] for row in rows]


def save_tokenizer(path: Path, *, ends_with_eos: bool = False, **config: Any) -> Path:
    """A tokenizer of characters below VOCAB_SIZE: [CLS] text [SEP] other [SEP] in two types, or text and EOS alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]
    characters = [chr(code) for code in range(32, 32 + VOCAB_SIZE - len(specials))]
    vocab = {token: index for index, token in enumerate([*specials, *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ends_with_eos:
        backend.post_processor = processors.TemplateProcessing("$A [EOS]", "$A $B [EOS]", [("[EOS]", 4)])
    else:
        backend.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
        )
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(facts))
    return path


def write_dense(path: Path, index: int, linear: torch.nn.Linear, activation: str = "activation.Tanh") -> None:
    """A Dense module's folder, as sentence-transformers saves it."""
    folder = path / f"{index}_Dense"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"linear.{name}": tensor.detach() for name, tensor in linear.named_parameters()}, folder / "model.safetensors"
    )
    config = {
        "in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None,
        "activation_function": f"torch.nn.modules.{activation}",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_sentence_files(
    path: Path, *, pooling: Any = "mean", normalize: bool = True, prompts: dict[str, str] | None = None, **more: Any
) -> Path:
    """What sentence-transformers writes beside a model."""
    kinds = ["Transformer", "Pooling", *more.get("kinds", ()), *(["Normalize"] if normalize else [])]
    folders = ["" if kind == "Transformer" else f"{index}_{kind}" for index, kind in enumerate(kinds)]
    modules = [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, folder) in enumerate(zip(kinds, folders, strict=True))
    ]
    config = pooling if isinstance(pooling, dict) else {f"pooling_mode_{pooling}_tokens": True}
    path.mkdir(parents=True, exist_ok=True)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (path / "sentence_bert_config.json").write_text(json.dumps(more.get("sentence", {})))
    facts = {"prompts": prompts or {}, "default_prompt_name": more.get("default_prompt")}
    (path / "config_sentence_transformers.json").write_text(json.dumps(facts))
    return path
