"""Decoders that no plugin knows, through Transformers' own code over paged KV: Hugging Face's logits and tokens."""

import json

import pytest
import torch
from model.made_adapters import make_adapter
from model.step_driver import StepDriver, make_runner
from model.tiny_models import make_model, prompts, reference_generate, reference_logits, save_model
from safetensors.torch import load_file, save_file
from transformers import masking_utils

from llmd.errors import ModelError
from llmd_plugins.architectures.transformers_masks import Sight, describe, sight_of

PLAIN = {"pad_token_id": None}
WIDE = {"hidden_size": 120, **PLAIN}  # for those that take head_dim from the hidden size
EAGER = {"attn_implementation": "eager"}  # caps and sinks are not in torch's attention, with which they are compared
S, F = "sliding_attention", "full_attention"
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 80}
CASES = {
    "gemma2-caps": (
        "Gemma2",
        {**PLAIN, **EAGER, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0}
        | {"final_logit_softcapping": 9.0},
    ),
    "gemma3-two-ropes": (
        "Gemma3",
        {**PLAIN, "config_family": "Gemma3Text", "sliding_window": 8, "query_pre_attn_scalar": 20, "layer_types": [S, F, S]},
    ),
    "phi3-window": ("Phi3", {**WIDE, "sliding_window": 9}),
    "olmo2": ("Olmo2", WIDE),
    "starcoder2-window": ("Starcoder2", {**WIDE, "sliding_window": 7}),
    "gpt-neox": ("GPTNeoX", {**WIDE, "num_key_value_heads": 6}),
    "granite": (
        "Granite",
        {**WIDE, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
        | {"attention_multiplier": 0.1},
    ),
    "cohere": ("Cohere", {**WIDE, "logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**WIDE, "sliding_window": 6, "layer_types": [S, S, F]}),
    "glm4": ("Glm4", PLAIN),
    "smollm3": ("SmolLM3", WIDE),
    "exaone4": ("Exaone4", {**WIDE, "sliding_window": 8, "layer_types": [S, F, F]}),
    "nemotron": ("Nemotron", PLAIN),
    "phi-head-with-bias": ("Phi", WIDE),
    "opt-learned-positions": (
        "OPT",
        {**WIDE, "word_embed_proj_dim": 120, "ffn_dim": 77, "dropout": 0.0, "pad_token_id": 1, "num_key_value_heads": 6},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **MOE}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, **MOE}),
    "olmoe": ("Olmoe", {**WIDE, "num_experts": 4, **MOE}),
    "phimoe-window-that-only-its-mask-has": (
        "Phimoe",
        {**WIDE, **MOE, "num_local_experts": 4, "sliding_window": 8, "rope_parameters": ROPE},
    ),
    "gpt-oss-sinks": (
        "GptOss",
        {**PLAIN, **EAGER, **MOE, "num_local_experts": 4, "sliding_window": 8, "rope_parameters": ROPE},
    ),
}
LENGTHS = (29, 1, 5, 13, 40, 3)


def check(model, sequence, driver):
    """Logits of every sampled position, and the tokens."""
    expected = reference_logits(model, sequence.tokens)[sequence.num_prompt - 1 : -1]
    seen = torch.stack(driver.logits[sequence.row][-len(expected) :])
    torch.testing.assert_close(seen, expected, rtol=0, atol=2e-4)
    assert sequence.tokens == reference_generate(model, sequence.tokens[: sequence.num_prompt], len(expected))


@pytest.mark.parametrize("case", CASES)
def test_parity(tmp_path, case):
    family, changes = CASES[case]
    model = make_model(family, **changes)
    runner = make_runner(save_model(model, tmp_path))
    driver = StepDriver(runner)
    alone, *batch = [driver.sequence(prompt) for prompt in (prompts(LENGTHS[0]) + prompts(*LENGTHS))]
    driver.generate([alone], 4)
    check(model, alone, driver)
    driver.generate(batch, 4, chunks=(3, 7, 5, 1))
    for sequence in batch:
        check(model, sequence, driver)
    assert batch[0].tokens == alone.tokens


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_what_a_plugin_knows_runs_so_too_when_asked(tmp_path, changes):
    model = make_model("Llama", **changes)
    path = save_model(model, tmp_path)
    runners = [make_runner(path, model_impl=name) for name in ("llmd", "transformers")]
    assert [type(runner.model.module).__name__ for runner in runners] == ["CausalLM", "TransformersDecoder"]
    assert runners[0].info.weights_bytes == runners[1].info.weights_bytes
    driver = StepDriver(runners[1])
    sequences = [driver.sequence(prompt) for prompt in prompts(*LENGTHS)]
    driver.generate(sequences, 4, chunks=(6, 2))
    for sequence in sequences:
        check(model, sequence, driver)


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe"])
def test_experts_that_a_checkpoint_holds_as_one_tensor(tmp_path, case):
    """Each weight as Transformers keeps it in memory is taken as well as what `save_pretrained` writes."""
    family, changes = CASES[case]
    model = make_model(family, **changes)
    path = save_model(model, tmp_path)
    assert any("experts.3." in name for name in load_file(path / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path / "model.safetensors")
    driver = StepDriver(make_runner(path))
    sequence = driver.sequence(prompts(11)[0])
    driver.generate([sequence], 3)
    check(model, sequence, driver)


def test_missing_extra_and_misshapen_tensors_are_told_by_their_names_in_the_checkpoint(tmp_path):
    family, changes = CASES["mixtral"]
    path = save_model(make_model(family, **changes), tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and "experts.2.w1" in name)

    def refused(changed, problem):
        save_file(changed, path / "model.safetensors")
        with pytest.raises(ModelError, match=problem):
            make_runner(path)

    refused({**tensors, "model.zeta": torch.zeros(1)}, "holds tensor model.zeta, for which this architecture has no place")
    refused({**tensors, name: torch.zeros(3, 60)}, rf"{name} in model.safetensors has shape \[3, 60\], config.json asks for")
    refused(
        {**tensors, name.replace("experts.2", "experts.9"): tensors[name].clone()}, "is of expert 9, config.json asks for 4"
    )
    refused(
        {key: value for key, value in tensors.items() if key != name},
        "lacks 1 of the 8 tensors that make .*gate_up_proj of experts 2",
    )
    refused({key: value for key, value in tensors.items() if "o_proj" not in key}, r"lacks 3 tensors: .*o_proj")


def test_a_checkpoint_without_the_base_models_prefix_and_with_dead_tensors(tmp_path):
    family, changes = CASES["gpt-neox"]
    model = make_model(family, **changes)
    path = save_model(model, tmp_path)
    tensors = {name.removeprefix("gpt_neox."): tensor for name, tensor in load_file(path / "model.safetensors").items()}
    tensors["layers.0.attention.masked_bias"] = torch.zeros(1)
    tensors["layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, path / "model.safetensors")
    driver = StepDriver(make_runner(path))
    sequence = driver.sequence(prompts(7)[0])
    driver.generate([sequence], 2)
    check(model, sequence, driver)


def test_int8_keeps_a_quarter_of_the_linears_and_nearly_the_logits(tmp_path):
    model = make_model("Olmo2", **WIDE)
    path = save_model(model, tmp_path)
    plain, small = make_runner(path), make_runner(path, quantization="int8")
    assert small.info.weights_bytes < 0.5 * plain.info.weights_bytes
    driver = StepDriver(small)
    sequence = driver.sequence(prompts(20)[0])
    driver.step([(sequence, 20)])
    expected = reference_logits(model, sequence.tokens[:20])[-1]
    assert torch.nn.functional.cosine_similarity(driver.logits[sequence.row][0], expected, dim=0) > 0.99


def test_adapters_of_two_rows_and_none(tmp_path):
    model = make_model("Olmo2", **WIDE)
    path = save_model(model, tmp_path / "base")
    made = [make_adapter(model, tmp_path / f"a{seed}", rank=4, seed=seed) for seed in (1, 2)]
    driver = StepDriver(make_runner(path, adapters={"max_loras": 2, "max_lora_rank": 8}))
    for slot, adapter in enumerate(made):
        driver.load_adapter(adapter.path, slot)
    rows = [driver.sequence(prompt, slot=slot) for prompt, slot in zip(prompts(9, 12, 7), (0, None, 1), strict=True)]
    driver.generate(rows, 4, chunks=(5,))
    for sequence, served in zip(rows, (made[0].merged, model, made[1].merged), strict=True):
        check(served.eval(), sequence, driver)
    assert len({tuple(sequence.tokens[-4:]) for sequence in rows}) == 3


def test_bfloat16_is_close(tmp_path):
    model = make_model("Gemma2", **{**CASES["gemma2-caps"][1], "initializer_range": 0.05}).bfloat16()
    driver = StepDriver(make_runner(save_model(model, tmp_path), dtype="auto"))
    sequence = driver.sequence(prompts(30)[0])
    driver.generate([sequence], 2, chunks=(8,))
    expected = reference_logits(model.float(), sequence.tokens)[sequence.num_prompt - 1 : -1]
    seen = torch.stack(driver.logits[sequence.row])
    assert seen.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(seen, expected).min() > 0.999


def changed_config(path, **changes):
    """config.json with other entries; the weights do not matter where it is refused."""
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["ZetaForCausalLM"]}, "Transformers as installed has no ZetaForCausalLM. A plugin wheel"),
        ({"architectures": ["ZetaForCausalLM"], "auto_map": {}}, "has no ZetaForCausalLM"),
        ({"architectures": ["ZetaForCausalLM"], "auto_map": {"A": "b.C"}}, "code in the model's folder is not run"),
        ({"architectures": ["../ForCausalLM"]}, "Transformers as installed has no ../ForCausalLM"),
        ({"architectures": ["Olmo2Model"]}, "Olmo2Model is no decoder with a language head"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not known; .*recurrent state, not keys and values"),
        ({"architectures": ["FalconForCausalLM"]}, "does not let attention be replaced"),
        ({"architectures": ["GemmaForCausalLM"]}, "Transformers builds Olmo2ForCausalLM for this model_type"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "zeta"}, "model_type 'zeta' is not one that Transformers as installed knows"),
        ({"is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"vision_config": {"a": 1}}, r"made of several models \(vision_config\)"),
        ({"layer_types": ["linear_attention"] * 3}, "layers of the kind linear_attention"),
        ({"layer_types": ["chunked_attention"] * 3}, "layers of the kind chunked_attention"),
        ({"kv_lora_rank": 8}, r"latent vectors \(MLA\)"),
        ({"num_kv_shared_layers": 2}, "share keys and values"),
        ({"alibi": True}, "ALiBi"),
        ({"hidden_size": "many"}, "config.json: Transformers cannot read it: "),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"hidden_act": "zeta"}, "Transformers cannot build Olmo2ForCausalLM: "),
    ],
)
def test_refused_by_name(tmp_path, changes, problem):
    path = save_model(make_model("Olmo2", **WIDE), tmp_path)
    with pytest.raises(ModelError, match=problem):
        make_runner(changed_config(path, **changes))


def test_a_backend_without_soft_cap_is_no_backend_for_it(tmp_path, monkeypatch):
    from llmd_plugins.attention import cpu, reference

    for backend in (cpu.CpuAttention, reference.ReferenceAttention):
        monkeypatch.setattr(backend, "why_not", lambda self, needs: ["no soft cap"] if needs.soft_cap else [])
    path = save_model(make_model("Gemma2", **CASES["gemma2-caps"][1]), tmp_path)
    with pytest.raises(
        ModelError, match=r"no attention backend can serve this model \(cpu: no soft cap; reference: no soft"
    ):
        make_runner(path)


def test_ropes_that_change_with_the_longest_of_a_batch_are_held_to_where_they_do_not(tmp_path):
    half = [1.0] * 10
    rope = {**ROPE, "rope_type": "longrope", "short_factor": half, "long_factor": [3.0] * 10}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64, "max_position_embeddings": 256}
    model = make_model("Phi3", **WIDE, **changes)
    path = save_model(model, tmp_path)
    with pytest.raises(
        ModelError, match=r"rope_type 'longrope' changes once .* 64 tokens.*; set max_model_len to at most 64"
    ):
        make_runner(path)
    driver = StepDriver(make_runner(path, max_model_len=64))
    sequence = driver.sequence(prompts(30)[0])
    driver.generate([sequence], 3)
    check(model, sequence, driver)


def test_a_layer_that_attends_by_other_means_stops_the_start(tmp_path, monkeypatch):
    from transformers.models.olmo2 import modeling_olmo2

    def own(self, hidden_states, **_):
        return hidden_states, None

    path = save_model(make_model("Olmo2", **WIDE), tmp_path)
    monkeypatch.setattr(modeling_olmo2.Olmo2Attention, "forward", own)
    with pytest.raises(ModelError, match="only 0 of 3 layers attend through Transformers' interface"):
        make_runner(path)


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("DiffLlama", "layer 0 .DiffLlamaAttention.: attends twice, and a paged cache has one place"),
        ("Doge", "layer 0 .DogeAttention.: its model makes a mask that is neither causal nor a window, or one of its own"),
        ("Electra", "this head cannot share its weight with Embedding"),
        ("HrmText", r"Transformers converts it as it loads \(Chunk\), which llmd does not follow"),
    ],
)
def test_what_its_code_does_is_refused_by_name(tmp_path, family, problem):
    path = save_model(make_model(family, pad_token_id=0, hidden_size=120), tmp_path)
    with pytest.raises(ModelError, match=problem):
        make_runner(path)


@pytest.mark.parametrize(
    ("mask", "sight"),
    [
        (masking_utils.causal_mask_function, Sight(None)),
        (masking_utils.sliding_window_causal_mask_function(1), Sight(1)),
        (masking_utils.sliding_window_causal_mask_function(4096), Sight(4096)),
        (masking_utils.chunked_causal_mask_function(512, torch.zeros(1, dtype=torch.long)), None),
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_bidirectional_mask_function(8), None),
        (masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q - k) % 4 == 0), None),
    ],
)
def test_a_mask_is_known_by_what_it_lets_through(mask, sight):
    described = describe(mask_function=mask)
    if sight is None:
        with pytest.raises(ModelError, match="layer 3: its model makes a mask that is neither causal nor a window"):
            sight_of(described, "layer 3")
    else:
        assert sight_of(described, "layer 3") == sight
    assert sight_of(None, "layer 3") is None


def test_a_window_that_the_mask_has_not_is_refused(tmp_path):
    """Transformers itself answers one way with a cache and another without."""
    path = save_model(make_model("Olmoe", **WIDE, num_experts=4, sliding_window=8, **MOE), tmp_path)
    with pytest.raises(ModelError, match=r"layer 0 \(OlmoeAttention\): asks for a window of 8, its mask has none"):
        make_runner(path)


def test_the_log_tells_that_the_fallback_is_used(tmp_path, caplog):
    path = save_model(make_model("Olmo2", **WIDE), tmp_path)
    make_runner(path)
    assert "Olmo2ForCausalLM runs through Transformers' code, which is slower" in caplog.text
    with pytest.raises(ModelError, match=r"Olmo2ForCausalLM is not known; known are LlamaForCausalLM, [^*]*$"):
        make_runner(path, model_impl="llmd")
