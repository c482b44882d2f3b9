"""What PEFT saves is served as PEFT itself computes it: eight adapters and base rows in one batch."""

import copy
import warnings

import pytest
import torch
from model.made_adapters import PROJECTIONS
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_logits, save_model

KINDS = {
    "attention": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 16, "target_modules": "all-linear"},
    "pattern": {
        "r": 16,
        "target_modules": r".*\.(q|k|v|o)_proj",
        "rank_pattern": {"k_proj": 4},
        "alpha_pattern": {"o_proj": 2},
    },
    "rslora": {"r": 64, "target_modules": list(PROJECTIONS), "use_rslora": True},
    "dora": {"r": 32, "target_modules": list(PROJECTIONS), "use_dora": True},
    "tables": {"r": 24, "target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "bias": {"r": 48, "target_modules": ["q_proj", "k_proj", "gate_proj"], "bias": "lora_only"},
    "layers": {"r": 56, "target_modules": ["down_proj", "q_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A runner with an adapter of each kind in a slot, and PEFT's models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        folder = tmp_path_factory.mktemp("peft")
        base = make_model("Qwen2")
        runner = make_runner(
            save_model(base, folder / "base"),
            adapters={"max_loras": len(KINDS), "max_lora_rank": 64},
            scheduler={"max_num_seqs": 32},
        )
        models = [base]
        for index, (name, kind) in enumerate(KINDS.items()):
            torch.manual_seed(index)
            config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_alpha=kind["r"], **kind)
            model = peft.get_peft_model(copy.deepcopy(base), config).eval()
            _shake(model)
            model.save_pretrained(folder / name)
            models.append(model)
    return runner, folder, models


@torch.no_grad()
def _shake(model):
    """Make what training would have changed differ from how it starts."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name or (name.endswith("base_layer.bias") and parameter.requires_grad):
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        elif "lora_" in name:
            parameter.mul_(0.2)


def test_a_mixed_batch_equals_pefts_models(served):
    runner, folder, models = served
    driver = StepDriver(runner)
    for slot, name in enumerate(KINDS):
        driver.load_adapter(folder / name, slot)
    wanted = [None, *range(len(KINDS)), *range(len(KINDS)), None]
    lengths = (17, 5, 30, 9, 1, 12, 21, 8, 14, 3, 40, 2, 19, 6, 11, 25, 7, 13)
    sequences = [driver.sequence(prompt, slot=slot) for slot, prompt in zip(wanted, prompts(*lengths), strict=True)]
    driver.generate(sequences, 5, chunks=(11, 4, 100))
    for sequence, slot in zip(sequences, wanted, strict=True):
        model = models[0 if slot is None else slot + 1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
        actual = torch.stack(driver.logits[sequence.row])
        torch.testing.assert_close(
            actual, expected, rtol=1e-3, atol=1e-3, msg=lambda text, slot=slot: f"slot {slot}: {text}"
        )
