"""A wheel whose architecture keeps states of its own: the same tokens whatever the engine does to its sequences."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from model.ladder_capture import LadderCapture
from safetensors.torch import save_file
from wheels.test_good_wheels import normed, rotated

from llmd.api.v1 import LLM, ModelError, SamplingParams
from llmd.api.v1.testing import Server, check_architecture, make_tiny_model

SIZE, HEADS, KV_HEADS, DIM, INNER, VOCAB, WIDTH = 64, 4, 2, 16, 96, 258, 4
PATTERN = "rra"
PROMPTS = ["hello", "a longer one, of several blocks", "x", "the quick brown fox " * 4, "hello"]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def weights():
    """A checkpoint of three layers: recurrent, recurrent, attention."""
    torch.manual_seed(0)
    shapes = {"embed.weight": (VOCAB, SIZE), "norm.weight": (SIZE,), "head.weight": (VOCAB, SIZE)}
    for layer, kind in enumerate(PATTERN):
        prefix = f"blocks.{layer}."
        mix = {"gate_proj": (SIZE, SIZE), "in_proj": (SIZE, SIZE), "out_proj": (SIZE, SIZE), "convolution": (SIZE, WIDTH)}
        mix |= {"recurrence.recurrence_gate": (SIZE, SIZE), "recurrence.input_gate": (SIZE, SIZE)}
        if kind == "a":
            rows = {"q_proj": HEADS * DIM, "k_proj": KV_HEADS * DIM, "v_proj": KV_HEADS * DIM}
            mix = {name: (count, SIZE) for name, count in rows.items()} | {"o_proj": (SIZE, HEADS * DIM)}
        shapes |= {f"{prefix}mix.{name}.weight": shape for name, shape in mix.items()}
        biased = ("convolution", "recurrence.recurrence_gate", "recurrence.input_gate") if kind == "r" else ()
        shapes |= {f"{prefix}mix.{name}.bias": (SIZE,) for name in biased}
        shapes |= {f"{prefix}mix.recurrence.decay": (SIZE,)} if kind == "r" else {}
        shapes |= {f"{prefix}{name}_proj.weight": (INNER, SIZE) for name in ("gate", "up")}
        shapes |= {f"{prefix}down_proj.weight": (SIZE, INNER)}
        shapes |= {f"{prefix}{name}_norm.weight": (SIZE,) for name in ("mix", "mlp")}
    return {name: 0.2 * torch.randn(shape) + (1 if name.endswith("norm.weight") else 0) for name, shape in shapes.items()}


def recurrent(w, x):
    """The mixer of §2.4 of the paper that the wheel names, a token after the other."""
    y, bias = x @ w["in_proj.weight"].T, w["convolution.bias"]
    padded = torch.cat((torch.zeros(WIDTH - 1, SIZE), y))
    y = torch.stack([bias + (padded[t : t + WIDTH] * w["convolution.weight"].T).sum(0) for t in range(len(x))])
    r, i = (
        (y @ w[f"recurrence.{g}_gate.weight"].T + w[f"recurrence.{g}_gate.bias"]).sigmoid() for g in ("recurrence", "input")
    )
    decay = torch.exp(-8 * F.softplus(w["recurrence.decay"]) * r)
    h, found = torch.zeros(SIZE), []
    for a, value in zip(decay, (1 - decay.square()).sqrt() * i * y, strict=True):
        h = a * h + value
        found.append(h)
    return (F.gelu(x @ w["gate_proj.weight"].T) * torch.stack(found)) @ w["out_proj.weight"].T


def attention(w, x):
    q, k, v = ((x @ w[f"{name}_proj.weight"].T).view(len(x), -1, DIM) for name in "qkv")
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (rotated(k), v))
    scores = torch.einsum("nhd,lhd->hnl", rotated(q), k) / DIM**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    return torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v).flatten(1) @ w["o_proj.weight"].T


def below(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def reference(tensors, token_ids):
    """[L, V], a whole sequence at once, from the formulas and no layer of llmd's."""
    x = tensors["embed.weight"][list(token_ids)]
    for layer, kind in enumerate(PATTERN):
        w = below(tensors, f"blocks.{layer}.")
        mix = recurrent if kind == "r" else attention
        x = x + mix(below(w, "mix."), normed(x, w["mix_norm.weight"]))
        y = normed(x, w["mlp_norm.weight"])
        x = x + (F.silu(y @ w["gate_proj.weight"].T) * (y @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T
    return normed(x, tensors["norm.weight"]) @ tensors["head.weight"].T


def made(folder, **config):
    given = {"num_hidden_layers": len(PATTERN), "layer_pattern": PATTERN, **config}
    return make_tiny_model(folder, architectures=["AcmeHybridForCausalLM"], model_type="acme", **given)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = made(tmp_path_factory.mktemp("hybrid") / "model")
    save_file(weights(), folder / "model.safetensors")
    return folder


def spoken(model, prompts=PROMPTS, params=GREEDY, **options):
    """The tokens of each prompt's answers, and the engine's counters."""
    with LLM(model=str(model), device="cpu", dtype="float32", block_size=4, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[answer.token_ids for answer in output.outputs] for output in outputs], llm._service.engine.stats()


@functools.cache
def spoken_alone(model):
    found = {prompt: spoken(model, [prompt])[0][0] for prompt in PROMPTS}
    return [found[prompt] for prompt in PROMPTS]


@pytest.fixture
def alone(installed, model):
    """Each prompt by itself."""
    return spoken_alone(model)


def test_against_the_formulas(installed, model):
    tensors = weights()
    check_architecture(model, reference=lambda token_ids: reference(tensors, token_ids))


def test_without_any_attention(installed, tmp_path):
    """No KV at all: rows and their states are what there is."""
    folder = made(tmp_path / "model", layer_pattern="r")
    check_architecture(folder, load_format="dummy")
    found, stats = spoken(folder, load_format="dummy", max_num_seqs=2)
    assert [len(answer) for (answer,) in found] == [24] * len(PROMPTS)
    assert found[0] == found[-1]
    assert stats.num_preemptions == 0


def test_quantized(installed, tmp_path):
    """Neither plugin knows of the other."""
    check_architecture(made(tmp_path / "model"), load_format="dummy", quantization="ternary")


def test_preempted_sequences_and_prompts_in_chunks(alone, model):
    room = 32 * 2 * KV_HEADS * DIM * 4 * 4 + 8 * 4096  # some 32 blocks: they do not hold five sequences
    found, stats = spoken(model, kv_cache_bytes=room, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=112)
    assert stats.num_preemptions > 0
    assert found == alone


def test_steps_that_a_gpu_records_for_more_rows_than_there_are(alone, model, monkeypatch):
    monkeypatch.setattr("llmd.model.runner.capture_for", lambda device: LadderCapture(device))
    found, _ = spoken(model, max_num_seqs=8)
    assert found == alone


def test_answers_to_one_prompt_have_states_of_their_own(installed, model):
    params = SamplingParams(max_tokens=20, n=3, seed=5, ignore_eos=True)
    (found,), stats = spoken(model, PROMPTS[3:4], params)
    assert len(set(map(tuple, found))) == 3
    assert stats.prefix_hits == 0
    for index, answer in enumerate(found):
        params = SamplingParams(max_tokens=20, seed=5 + index, ignore_eos=True)
        assert spoken(model, PROMPTS[3:4], params)[0] == [[answer]]


@pytest.mark.parametrize("failing", [1, 4, 9, 20])
def test_a_step_that_breaks_off_midway_is_as_if_it_had_not_been(failing, alone, model, monkeypatch):
    """In the last layer: the states of those before are a step ahead by then."""
    from acme_hybrid.model import AttentionMixer

    inner, calls = AttentionMixer.forward, []

    def forward(self, x, batch):
        calls.append(batch.num_tokens)
        if len(calls) == 3 + failing:  # behind the warm-up
            raise MemoryError
        return inner(self, x, batch)

    monkeypatch.setattr(AttentionMixer, "forward", forward)
    found, stats = spoken(model, enforce_eager=True)
    assert len(calls) > 3 + failing
    assert stats.num_out_of_memory == 1
    assert found == alone


def test_what_does_not_fit_is_told_at_once(installed, model):
    with pytest.raises(ModelError, match=r"the states of 9000 rows take .* lower max_num_seqs"):
        spoken(model, kv_cache_bytes=1 << 20, max_num_seqs=9000, max_num_batched_tokens=9000)


def test_a_spec_that_is_silent_about_states(installed, model):
    from dataclasses import replace

    from acme_hybrid import llmd_register_architectures

    (spec,) = llmd_register_architectures()
    with pytest.raises(ModelError, match="its spec must say has_state=True"):
        check_architecture(model, replace(spec, has_state=False))


def test_served(site, model):
    ask = {"prompt": "once upon a time", "max_tokens": 8, "temperature": 0, "n": 2, "ignore_eos": True}
    with Server(str(model), "--device", "cpu", "--dtype", "float32", PYTHONPATH=str(site)) as server:
        first, again = (server.request("POST", "/v1/completions", ask).json() for _ in range(2))
        texts = [choice["text"] for answer in (first, again) for choice in answer["choices"]]
        assert len(texts) == 4
        assert len(set(texts)) == 1
        assert server.log.count("prefix caching is off") == 1


def test_planned(environment, model, tmp_path):
    settings = f'[scheduler]\nmax_num_seqs = 64\n[[models]]\nmodel = "{model}"\ndevice = "cpu"\n'
    (tmp_path / "llmd.toml").write_text(settings)
    command = [sys.executable, "-m", "llmd", "plan", "--config", str(tmp_path / "llmd.toml")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    (line,) = [line for line in ended.stdout.splitlines() if line.strip().startswith("states")]
    row = 2 * (3 * SIZE + SIZE) * 4  # float32: three inputs and a sum for each channel of two layers
    assert line.split()[1:] == [f"{64 * row / 1024:.2f}", "KiB", f"{row / 1024:.2f}", "KiB", "for", "each", "row"]
