"""What a checkpoint's headers tell of its modules is what the loaded model says of them."""

import json

import pytest
import torch
from model.step_driver import make_runner
from safetensors.torch import load_file, save_file

from llmd.checks_adapters import base_modules, check_adapters
from llmd.config import Config
from llmd.plugin.catalog import build_catalog
from llmd_plugins.sources.demo_source import folder


@pytest.mark.parametrize("targets", [(), ("q_proj", "embed_tokens"), ("lm_head", "mlp.down_proj")])
def test_modules_are_those_of_the_loaded_model(targets):
    runner = make_runner(folder(), adapters={"max_loras": 1, "max_lora_rank": 4, "lora_target_modules": targets})
    served = {name: (base.kind, base.in_features, base.out_features) for name, base in runner.adapters.modules.items()}
    found = {
        name: (base.kind, base.in_features, base.out_features) for name, base in base_modules(folder(), targets).items()
    }
    assert served == found
    runner.close()


def test_shards_are_read_together_and_what_cannot_be_read_tells_nothing(tmp_path):
    tensors = {f"model.layers.0.mlp.{name}.weight": torch.zeros(4, 8) for name in ("gate_proj", "up_proj")}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    assert base_modules(tmp_path) is None  # there is no config.json
    (tmp_path / "config.json").write_text("{}")
    merged = base_modules(tmp_path)["model.layers.0.mlp.gate_up_proj"]
    assert (merged.kind, merged.in_features, merged.out_features) == ("merged", 8, 8)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert base_modules(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    for garbage in (b"", b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a": 5}  ', (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "model-0.safetensors").write_bytes(garbage)
        assert base_modules(tmp_path) is None


def problems_of(base=None, **tables):
    catalog = build_catalog(Config().plugins)
    return list(check_adapters(Config.model_validate(tables), catalog, base))


def test_problems_name_the_key_the_adapter_and_the_file(tmp_path):
    good = folder().parent / "adapters" / "demo-json"
    modules = (f"good={good}", f"none={tmp_path / 'none'}")
    adapters = {"enable_lora": True, "max_lora_rank": 2, "lora_modules": modules, "lora_dir": str(tmp_path / "lost")}
    for base, words in ((None, "rank 4 is above max_lora_rank (2)"), (folder(), "rank 4 is above max_lora_rank (2)")):
        where, high, none = problems_of(base, adapters=adapters)
        assert where.startswith("adapters.lora_dir: ")
        assert high.startswith("adapters.lora_modules: 'good'")
        assert words in high
        assert none.startswith("adapters.lora_modules: 'none'")
    assert problems_of(folder(), adapters=adapters | {"enable_lora": False}) == []
    assert problems_of(folder(), adapters={"enable_lora": True, "lora_modules": modules[:1]}) == []


def test_an_adapter_to_be_merged_is_looked_at_too(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (problem,) = problems_of(models=({"model": "demo", "merge_adapter": str(tmp_path)},))
    assert problem.startswith("models[0].merge_adapter: ")
    assert "peft_type" in problem
    good = folder().parent / "adapters" / "demo-pirate"
    assert problems_of(models=({"model": "demo", "merge_adapter": str(good)},)) == []
    assert load_file(good / "adapter_model.safetensors")
