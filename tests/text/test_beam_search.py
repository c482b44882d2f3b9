"""Beam search makes Hugging Face's choices, on tiny models with and without end tokens."""

from __future__ import annotations

import pytest

from llmd.engine.params import BeamSearchParams
from llmd.errors import InvalidParams
from llmd.text.beam_search import BeamSearch

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # far from uniform, so that beams differ by more than rounding
    return model


def search(model, prompt: list[int], params: BeamSearchParams, eos: tuple[int, ...]):
    state = BeamSearch(params, eos)
    while not state.is_done:
        nexts = []
        for beam in state.running:
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *beam.token_ids]])).logits[0, -1].float()
            top = logits.log_softmax(-1).topk(min(state.num_candidates, 31))
            nexts.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        state.advance(nexts)
    return state.results()


@pytest.mark.parametrize("eos", [(), (5,), (5, 9, 11)])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("width", "penalty"), [(2, -1.0), (3, 1.0), (4, 0.0), (5, 2.0)])
def test_the_beams_are_those_of_transformers(model, width, penalty, early_stopping, eos):
    for seed in range(4):
        prompt = torch.randint(0, 31, (1, 5), generator=torch.Generator().manual_seed(seed))
        params = BeamSearchParams(beam_width=width, max_tokens=9, length_penalty=penalty, early_stopping=early_stopping)
        ours = search(model, prompt[0].tolist(), params, eos)
        theirs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=9,
            do_sample=False,
            length_penalty=penalty,
            early_stopping=early_stopping,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for beam, row, score in zip(ours, theirs.sequences[:, 5:].tolist(), theirs.sequences_scores.tolist(), strict=True):
            assert list(beam.token_ids) == row[: len(beam.token_ids)]
            assert beam.score == pytest.approx(score, abs=1e-4)
            assert beam.is_stopped == (beam.token_ids[-1] in eos)


@pytest.mark.parametrize(
    ("field", "value"),
    [("beam_width", 0), ("beam_width", 51), ("max_tokens", 0), ("length_penalty", 11), ("early_stopping", 2)],
)
def test_parameters_out_of_bounds_are_refused(field, value):
    with pytest.raises(InvalidParams, match=field):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, field: value})
