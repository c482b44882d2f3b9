"""Adapters in mixed batches against the base model with each of them merged in."""

from dataclasses import replace

import pytest
import torch
from model.made_adapters import WEIGHTS, make_adapter
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_encoders import make_encoder, pooling_parts
from model.tiny_models import make_model, prompts, reference_logits, save_model
from safetensors.torch import load_file, save_file

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import AdapterLoad, RowAdmit, StepPlan
from llmd.errors import AdapterError, ModelError, StepFailed
from llmd.model.adapter_packing import pack
from llmd.model.adapter_slots import AdapterTable
from llmd.model.adapters import read_adapter
from llmd.model.layers import Layers, Shard
from llmd.model.runner import Runner
from llmd.model.weights import prepare_slots

LENGTHS = (17, 5, 30, 9, 1, 12, 21, 8, 14)
KINDS = {
    "all": {"rank": 8},
    "rslora": {"rank": 16, "alpha": 8, "config": {"use_rslora": True}},
    "q_and_up": {"rank": 12, "targets": ("q_proj", "up_proj")},
    "dora": {"rank": 32, "config": {"use_dora": True}},
    "tables": {"rank": 24, "targets": ("embed_tokens", "lm_head", "v_proj")},
    "patterns": {"rank": 8, "ranks": {"k_proj": 4, "down_proj": 64}, "alphas": {"down_proj": 32}},
    "biases": {"rank": 64, "alpha": 64, "bias": "lora_only", "config": {"lora_bias": True}},
    "layers": {"rank": 48, "layers": (0, 2), "targets": ("q_proj", "o_proj", "gate_proj")},
    "tables_dora": {"rank": 8, "targets": ("embed_tokens", "lm_head"), "config": {"use_dora": True}},
}


@pytest.fixture(scope="module", params=["Qwen2", "Llama"])
def served(request, tmp_path_factory):
    """A runner with every kind in a slot of its own, and the models that they should equal."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, tie_word_embeddings=True)
    runner = make_runner(
        save_model(model, folder / "base"),
        adapters={"max_loras": len(KINDS), "max_lora_rank": 64},
        scheduler={"max_num_seqs": 32},
    )
    made = [make_adapter(model, folder / name, seed=index, **kind) for index, (name, kind) in enumerate(KINDS.items())]
    return runner, [adapter.path for adapter in made], [adapter.merged.eval() for adapter in made], model


def test_every_row_of_a_mixed_batch_equals_its_merged_model(served):
    runner, paths, merged, base = served
    driver = StepDriver(runner)
    for slot, path in enumerate(paths):
        driver.load_adapter(path, slot)
    models = {None: base, **dict(enumerate(merged))}
    wanted = [None, *range(len(paths)), None, *range(len(paths))]
    sequences = [
        driver.sequence(prompt, slot=slot)
        for slot, prompt in zip(wanted, prompts(*(LENGTHS * 3)[: len(wanted)]), strict=False)
    ]
    driver.generate(sequences, 6, chunks=(7, 3, 100))
    for sequence, slot in zip(sequences, wanted, strict=True):
        expected = reference_logits(models[slot], sequence.tokens)[sequence.num_prompt - 1 : -1]
        actual = torch.stack(driver.logits[sequence.row])
        torch.testing.assert_close(
            actual, expected, rtol=1e-3, atol=1e-3, msg=lambda text, slot=slot: f"slot {slot}: {text}"
        )
    plain = reference_logits(base, sequences[1].tokens)[sequences[1].num_prompt - 1 : -1]
    assert (torch.stack(driver.logits[sequences[1].row]) - plain).abs().max() > 0.1


def sampled(driver, sequence):
    """The logits of a sequence's sampled tokens."""
    return torch.stack(driver.logits[sequence.row])


def test_a_slot_takes_another_adapter_and_a_row_another_sequence(tmp_path):
    model = make_model("Qwen2")
    runner = make_runner(save_model(model, tmp_path / "base"), adapters={"max_loras": 1, "max_lora_rank": 32})
    large = make_adapter(model, tmp_path / "large", rank=32, config={"use_dora": True}, bias="lora_only", seed=1)
    small = make_adapter(model, tmp_path / "small", rank=2, targets=("v_proj", "down_proj"), seed=2)
    driver = StepDriver(runner)
    [prompt] = prompts(9)
    for made in (large, small, large):
        driver.load_adapter(made.path, 0)
        sequences = [driver.sequence(prompt, slot=0), driver.sequence(prompt)]
        driver.generate(sequences, 2)
        for sequence, expected in zip(sequences, (made.merged.eval(), model), strict=True):
            logits = reference_logits(expected, sequence.tokens)[len(prompt) - 1 : -1]
            torch.testing.assert_close(sampled(driver, sequence), logits, rtol=1e-3, atol=1e-3)
            driver.release(sequence)


def test_a_prefix_and_logprobs_of_the_prompt_are_the_adapters_own(tmp_path):
    model = make_model("Llama")
    runner = make_runner(save_model(model, tmp_path / "base"), adapters={"max_loras": 2, "max_lora_rank": 8})
    made = make_adapter(model, tmp_path / "a", targets=("lm_head", "q_proj"))
    driver = StepDriver(runner)
    driver.load_adapter(made.path, 1)
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0)
    given = prompts(13, 6)
    sequences = [driver.sequence(given[0], params, slot=1), driver.sequence(given[1], params)]
    result = driver.step([(sequence, sequence.num_prompt) for sequence in sequences], num_logits=[13, 6])
    for sequence, expected in zip(sequences, (made.merged.eval(), model), strict=True):
        logprobs = reference_logits(expected, sequence.tokens[:-1]).log_softmax(-1)
        found = result.prompt_logprobs[sequence.row]
        wanted = [float(logprobs[place, token]) for place, token in enumerate(sequence.tokens[1:-1])]
        assert [entry.logprob for entry in found] == pytest.approx(wanted, abs=1e-3)


def test_an_int8_base_takes_adapters(tmp_path):
    """The adapter adds what it would add to the base, on top of what the quantized base gives."""
    model = make_model("Qwen2", num_hidden_layers=1)
    path = save_model(model, tmp_path / "base")
    made = [
        make_adapter(model, tmp_path / "plain", rank=4, seed=1),
        make_adapter(model, tmp_path / "dora", rank=4, seed=2, config={"use_dora": True}),
    ]
    runner = make_runner(path, quantization="int8", adapters={"max_loras": 2, "max_lora_rank": 4})
    driver = StepDriver(runner)
    for slot, adapter in enumerate(made):
        driver.load_adapter(adapter.path, slot)
    [prompt] = prompts(11)
    sequences = [driver.sequence(prompt), *(driver.sequence(prompt, slot=slot) for slot in range(2))]
    driver.generate(sequences, 1)
    exact = [reference_logits(each.eval(), prompt)[-1] for each in (model, made[0].merged, made[1].merged)]
    off = (sampled(driver, sequences[0])[0] - exact[0]).norm()  # what quantization costs
    for sequence, wanted in zip(sequences[1:], exact[1:], strict=True):
        assert (sampled(driver, sequence)[0] - wanted).norm() < 3 * off
        assert (wanted - exact[0]).norm() > 6 * off


def test_an_encoder_takes_adapters(tmp_path):
    base = make_encoder("BertModel")
    path = save_model(base, tmp_path / "base")
    made = make_adapter(base, tmp_path / "a", rank=4, targets=("query", "value"))
    given = prompts(9, 14)
    params = PoolingParams(pooling="mean", normalize=False)
    served = model_parts(max_loras=1, max_lora_rank=4)
    parts = replace(pooling_parts(), adapters=served.adapters, adapter_formats=served.adapter_formats)
    config = ModelConfig(model="tiny", dtype="float32", device="cpu")
    runner = Runner(config, CacheConfig(), SchedulerConfig(max_num_seqs=4), path, parts)
    runner.load(lambda progress: None)
    runner.keep_adapter(1, runner.read_adapter(made.path))
    admitted = [
        RowAdmit(
            row=row, seq_id=row, request_id=str(row), token_ids=tuple(prompt), num_prompt_tokens=len(prompt), params=params,
            seed=0, adapter_slot=slot,
        )
        for row, (prompt, slot) in enumerate(zip(given, (0, None), strict=True))
    ]  # fmt: skip
    lengths = [len(prompt) for prompt in given]
    plan = StepPlan(
        step_id=1, adapter_loads=[AdapterLoad(0, 1)], admitted=admitted, rows=[0, 1], starts=[0, 0], counts=lengths,
        num_logits=[0, 0], samples=[False, False],
    )  # fmt: skip
    pooled = runner.run(plan).pooled
    for row, model in enumerate((made.merged.eval(), base)):
        with torch.no_grad():
            expected = model(torch.tensor([given[row]])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(pooled[row]), expected, rtol=1e-3, atol=1e-3)


def test_what_the_base_cannot_do_is_told(tmp_path):
    model = make_model("Llama")
    path = save_model(model, tmp_path / "base")
    runner = make_runner(path, adapters={"max_loras": 1, "max_lora_rank": 8, "lora_target_modules": ("q_proj", "lm_head")})
    assert len(runner.read_adapter(make_adapter(model, tmp_path / "q", targets=("q_proj",)).path).layers) == 3
    with pytest.raises(AdapterError, match="belongs to no module"):
        runner.read_adapter(make_adapter(model, tmp_path / "k", targets=("k_proj",)).path)
    folder = make_adapter(model, tmp_path / "saved", targets=("q_proj",)).path
    tensors = load_file(folder / WEIGHTS)
    own = model.lm_head.weight.detach().clone()
    save_file({**tensors, "base_model.model.lm_head.weight": own}, folder / WEIGHTS)
    assert runner.read_adapter(folder).rank == 8
    save_file({**tensors, "base_model.model.lm_head.weight": own + 1}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"lm_head.weight replaces the base model's whole weight \(modules_to_save\)"):
        runner.read_adapter(folder)
    with pytest.raises(StepFailed, match="it is not loaded"):
        runner.run(StepPlan(step_id=1, adapter_loads=[AdapterLoad(0, 99)]))
    with pytest.raises(ModelError, match="lora_target_modules: this model has no modules for adapters named nothing"):
        make_runner(path, adapters={"lora_target_modules": ("nothing",)})
    plain = make_runner(path)
    with pytest.raises(AdapterError, match="enable_lora is off"):
        plain.read_adapter(folder)
    with pytest.raises(StepFailed, match="adapters are not served"):
        plain.run(StepPlan(step_id=1, adapter_loads=[AdapterLoad(0, 1)]))


def split_table(runner, shard):
    """The slots that one of several ranks would have; no weights are needed for them."""
    config = runner.model.config
    layers = Layers(config, None, dtype=torch.float32, device=torch.device("cpu"), max_model_len=64, shard=shard)
    with torch.device("meta"):
        module = model_parts().architectures[config.architectures[0]].build(config, layers)
    prepare_slots(module, None)
    return AdapterTable(module, num_slots=1, max_rank=4, max_rows=4)


def test_ranks_of_a_split_model_add_up_to_the_whole(tmp_path):
    """Each rank packs its own slices: outputs of column-split linears side by side, those of row-split ones as a sum."""
    model = make_model("Qwen2", intermediate_size=78)
    path = save_model(model, tmp_path / "base")
    made = make_adapter(model, tmp_path / "a", rank=4, targets=("q_proj", "k_proj", "down_proj"))
    runner = make_runner(path, adapters={"max_loras": 1, "max_lora_rank": 4})
    whole = runner.read_adapter(made.path).layers
    tables = [split_table(runner, Shard(rank, 2)) for rank in range(2)]
    parts = [
        pack(read_adapter(made.path, model_parts().adapter_formats, table.modules, 4), table).layers for table in tables
    ]
    qkv, down = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"
    for index in (0, 1):
        both = torch.cat([part[qkv].parts[index].b for part in parts], dim=1)
        assert torch.equal(both, whole[qkv].parts[index].b)
        assert all(torch.equal(part[qkv].parts[index].a, whole[qkv].parts[index].a) for part in parts)
    assert torch.equal(torch.cat([part[down].parts[0].a for part in parts], dim=1), whole[down].parts[0].a)
    assert all(torch.equal(part[down].parts[0].b, whole[down].parts[0].b) for part in parts)
