"""Poolings and Dense modules by sentence-transformers' definitions, in plain torch over Hugging Face's hidden states."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model.tiny_encoders import make_encoder, make_runner, pool, write_dense, write_sentence_files

from llmd.engine.params import PoolingParams
from llmd.errors import ModelError
from llmd.model.pooler import Pooler
from llmd.model.sentence import Tail, read_tail
from llmd.model.staging import Outbox

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
AS_THE_FILES_SAY = PoolingParams(normalize=False)
CPU = torch.device("cpu")


def weightedmean(hidden):
    weights = torch.arange(1, len(hidden) + 1)[:, None]
    return (hidden * weights).sum(0) / weights.sum()


DEFINITIONS = {
    "pooling_mode_cls_token": lambda hidden: hidden[0],
    "pooling_mode_mean_tokens": lambda hidden: hidden.mean(0),
    "pooling_mode_max_tokens": lambda hidden: hidden.max(0).values,
    "pooling_mode_lasttoken": lambda hidden: hidden[-1],
    "pooling_mode_mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / math.sqrt(len(hidden)),
    "pooling_mode_weightedmean_tokens": weightedmean,
}


@pytest.fixture(scope="module")
def model():
    return make_encoder("BertModel")


@torch.no_grad()
def hidden_states(model):
    return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]


@pytest.mark.parametrize("mode", DEFINITIONS)
def test_poolings_of_the_files(model, tmp_path, mode):
    model.save_pretrained(tmp_path)
    write_sentence_files(tmp_path, pooling={mode: True})
    vectors = pool(make_runner(tmp_path), PROMPTS, AS_THE_FILES_SAY)
    for vector, hidden in zip(vectors, hidden_states(model), strict=True):
        np.testing.assert_allclose(vector, DEFINITIONS[mode](hidden), atol=1e-4)


def test_dense_modules(model, tmp_path):
    """As LaBSE and EmbeddingGemma have them: between pooling and normalizing."""
    model.save_pretrained(tmp_path)
    write_sentence_files(tmp_path, pooling="mean", kinds=["Dense", "Dense"])
    torch.manual_seed(1)
    first, second = torch.nn.Linear(60, 77), torch.nn.Linear(77, 24, bias=False)
    write_dense(tmp_path, 2, first)
    write_dense(tmp_path, 3, second, "linear.Identity")
    runner = make_runner(tmp_path)
    assert runner.info.embedding_size == 24
    with torch.no_grad():
        expected = [second(first(hidden.mean(0)).tanh()) for hidden in hidden_states(model)]
    for vector, wanted in zip(pool(runner, PROMPTS, AS_THE_FILES_SAY), expected, strict=True):
        np.testing.assert_allclose(vector, wanted, atol=1e-4)
    for vector, wanted in zip(pool(runner, PROMPTS, PoolingParams(dimensions=8)), expected, strict=True):
        np.testing.assert_allclose(vector, F.normalize(wanted[:8], dim=0), atol=1e-4)
    tokens = pool(runner, PROMPTS, PoolingParams(pooling="all", normalize=False))
    assert [array.shape for array in tokens] == [(7, 24), (1, 24), (3, 24)]


@pytest.mark.parametrize("cuts", [(7,), (1, 6), (2, 2, 3), (1,) * 7])
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last", "mean_sqrt_len", "weightedmean", "all"])
def test_chunks_amount_to_the_whole(pooling, cuts):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16)
    definitions = {
        **{name.removeprefix("pooling_mode_").removesuffix("_tokens"): one for name, one in DEFINITIONS.items()},
        "cls": lambda hidden: hidden[0], "last": lambda hidden: hidden[-1], "all": lambda hidden: hidden,
    }  # fmt: skip
    pooler, start = Pooler(tail=Tail(pooling)), 0
    for count in cuts:
        end = start + count
        assert pooler.feed(3, hidden[start:end], start, end == len(hidden), AS_THE_FILES_SAY) is None
        start = end
    torch.testing.assert_close(pooler.take(Outbox(hidden.device))()[3], definitions[pooling](hidden))


def test_dimensions_beyond_the_last_module():
    pooler = Pooler(tail=Tail("mean", ()))
    params = PoolingParams(dimensions=17)
    assert pooler.feed(0, torch.ones(2, 16), 0, True, params) == "dimensions must be at most 16, got 17"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "2_Dense/model.safetensors is missing$"),
        (
            lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
            "2_Dense/model.safetensors is missing; pytorch_model.bin is a pickle and is never read",
        ),
        (lambda path: (path / "model.safetensors").write_bytes(b"nothing"), "cannot be read .* download it again"),
        (
            lambda path: write_dense(path.parent, 2, torch.nn.Linear(61, 24)),
            "2_Dense/config.json: in_features must be the model's hidden size, 60, got 61",
        ),
        (
            lambda path: (path / "config.json").write_text('{"in_features": 60, "out_features": 24, "bias": false}'),
            r"must hold linear.weight \[24, 60\] as config.json says, it holds linear.bias \[24\], linear.weight",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, damage, words):
    write_sentence_files(tmp_path, kinds=["Dense"])
    write_dense(tmp_path, 2, torch.nn.Linear(60, 24))
    damage(tmp_path / "2_Dense")
    with pytest.raises(ModelError, match=words):
        read_tail(tmp_path, 60, CPU)
