"""An adapter merged while the model loads gives the merged model, also where layers quantize or split what they take."""

import pytest
import torch
from model.made_adapters import PROJECTIONS, WEIGHTS, make_adapter
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_logits, save_model
from safetensors.torch import load_file, save_file

from llmd.errors import ModelError

KINDS = {
    "plain": {"targets": PROJECTIONS},
    "dora": {"targets": ("q_proj", "up_proj", "lm_head", "embed_tokens"), "config": {"use_dora": True}},
    "bias": {"targets": ("q_proj", "k_proj"), "bias": "lora_only", "config": {"lora_bias": True}},
}


def logits_of(runner, prompt):
    """Of the prompt's last token."""
    driver = StepDriver(runner)
    sequence = driver.sequence(prompt)
    driver.generate([sequence], 1)
    return driver.logits[sequence.row][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model(tmp_path, kind):
    model = make_model("Qwen2")
    path = save_model(model, tmp_path / "base")
    made = make_adapter(model, tmp_path / "a", **KINDS[kind])
    [prompt] = prompts(12)
    actual = logits_of(make_runner(path, merge_adapter=str(made.path)), prompt)
    torch.testing.assert_close(actual, reference_logits(made.merged.eval(), prompt)[-1], rtol=1e-3, atol=1e-3)


def test_it_is_merged_before_it_is_quantized(tmp_path):
    model = make_model("Llama", num_hidden_layers=1)
    made = make_adapter(model, tmp_path / "a", targets=PROJECTIONS)
    [prompt] = prompts(12)
    int8 = {"quantization": "int8"}
    merged = make_runner(save_model(model, tmp_path / "base"), merge_adapter=str(made.path), **int8)
    exact = make_runner(save_model(made.merged, tmp_path / "merged"), **int8)
    torch.testing.assert_close(logits_of(merged, prompt), logits_of(exact, prompt), rtol=1e-4, atol=1e-4)


def test_a_merged_module_of_the_adapter_is_cut_into_the_checkpoints_parts(tmp_path):
    model = make_model("Llama", num_hidden_layers=1)
    path = save_model(model, tmp_path / "base")
    made = make_adapter(model, tmp_path / "a", targets=("q_proj", "k_proj", "v_proj"))
    tensors = load_file(made.path / WEIGHTS)
    folder = "base_model.model.model.layers.0.self_attn"
    a = tensors[f"{folder}.q_proj.lora_A.weight"]
    b = torch.cat([tensors[f"{folder}.{part}.lora_B.weight"] for part in ("q_proj", "k_proj", "v_proj")])
    for part in ("q_proj", "k_proj", "v_proj"):
        tensors[f"{folder}.{part}.lora_A.weight"] = a.clone()
    save_file(tensors, made.path / WEIGHTS)
    [prompt] = prompts(9)
    apart = logits_of(make_runner(path, merge_adapter=str(made.path)), prompt)
    save_file({f"{folder}.qkv_proj.lora_A.weight": a, f"{folder}.qkv_proj.lora_B.weight": b}, made.path / WEIGHTS)
    whole = make_runner(path, merge_adapter=str(made.path))
    torch.testing.assert_close(logits_of(whole, prompt), apart)
    served = make_runner(path, adapters={"max_loras": 1, "max_lora_rank": 8})
    driver = StepDriver(served)
    driver.load_adapter(made.path, 0)
    sequence = driver.sequence(prompt, slot=0)
    driver.generate([sequence], 1)
    torch.testing.assert_close(driver.logits[sequence.row][0], apart, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_merged_is_told(tmp_path):
    tied = make_model("Llama", num_hidden_layers=1, tie_word_embeddings=True)
    path = save_model(tied, tmp_path / "base")
    for targets, message in (
        (("embed_tokens",), "model.embed_tokens shares its table with lm_head"),
        (("lm_head",), "no tensor lm_head.weight of its own"),
    ):
        made = make_adapter(tied, tmp_path / targets[0], targets=targets)
        with pytest.raises(ModelError, match=f"merge_adapter: .*{message}"):
            make_runner(path, merge_adapter=str(made.path))
    both = {"use_dora": True, "lora_bias": True}
    made = make_adapter(tied, tmp_path / "both", targets=("q_proj",), config=both)
    with pytest.raises(ModelError, match="has lora_bias and use_dora"):
        make_runner(path, merge_adapter=str(made.path))
    with pytest.raises(ModelError, match="merge_adapter: the adapter's folder 'none' does not exist"):
        make_runner(path, merge_adapter=str(tmp_path / "none"))
