"""modules.json: what it may list, in which order, and what is refused by name."""

import json

import pytest
from model.tiny_encoders import write_sentence_files

from llmd.errors import ModelError
from llmd.sentence_files import DenseModule, SentenceModules, read_modules

DENSE = {"in_features": 60, "out_features": 24, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


def write_dense(folder, **changes):
    """A folder whose modules end with one Dense, and that module's config."""
    write_sentence_files(folder, kinds=["Dense"], normalize=False)
    (folder / "2_Dense").mkdir(exist_ok=True)
    config = {key: value for key, value in {**DENSE, **changes}.items() if value != "absent"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_without_it(tmp_path):
    assert read_modules(tmp_path) == SentenceModules(None, True, (), True)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "word_embedding_dimension": 8, "include_prompt": True}, "last"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_poolings(tmp_path, config, pooling):
    assert read_modules(write_sentence_files(tmp_path, pooling=config)).pooling == pooling


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pooling_mode_median_tokens": True}, "1_Pooling/config.json: pooling must be one of .* got median"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "got cls and max"),
        ({"pooling_mode_cls_token": False}, "got none"),
    ],
)
def test_poolings_that_are_refused(tmp_path, config, words):
    with pytest.raises(ModelError, match=words):
        read_modules(write_sentence_files(tmp_path, pooling=config))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "must be a list"),
        ("[", "cannot be read"),
        ('[{"type": "x.Pooling", "path": "../elsewhere"}]', "must lie within"),
        ('[{"type": "x.LSTM", "path": "1_LSTM"}]', r"the module 'LSTM' \(1_LSTM\) is not served"),
        ('[{"type": "x.Normalize"}, {"type": "x.Pooling"}]', "the order Normalize → Pooling is not served"),
        ('[{"type": "x.Pooling"}, {"type": "x.Pooling"}]', "the order Pooling → Pooling is not served"),
        ('[{"type": "x.Transformer"}, {"type": "x.Dense"}]', "the order Transformer → Dense is not served"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, words):
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        read_modules(tmp_path)


def test_dense(tmp_path):
    found = read_modules(write_dense(tmp_path))
    assert found.dense == (DenseModule("2_Dense", 60, 24, True, "Tanh"),)
    assert not found.normalizes
    assert read_modules(write_dense(tmp_path, activation_function=None, bias="absent")).dense[0].activation == "Identity"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_features": 0}, "in_features must be an integer between 1 and 1048576, got 0"),
        ({"out_features": "absent"}, "out_features must be an integer .* got None"),
        ({"bias": "yes"}, "bias must be true or false, got 'yes'"),
        ({"activation_function": "acme.Magic"}, "activation_function must be one of Identity, Tanh, .* got 'acme.Magic'"),
        ({"module_input_name": "token_embeddings"}, "module_input_name must be 'sentence_embedding'"),
    ],
)
def test_dense_that_is_refused(tmp_path, changes, words):
    with pytest.raises(ModelError, match=f"2_Dense/config.json: {words}"):
        read_modules(write_dense(tmp_path, **changes))


def test_sizes_of_two_must_meet(tmp_path):
    write_sentence_files(tmp_path, kinds=["Dense", "Dense"], normalize=False)
    for index, size in ((2, 60), (3, 25)):
        (tmp_path / f"{index}_Dense").mkdir()
        (tmp_path / f"{index}_Dense" / "config.json").write_text(json.dumps({**DENSE, "in_features": size}))
    with pytest.raises(ModelError, match=r"3_Dense/config.json: in_features must be 24, the out_features of 2_Dense"):
        read_modules(tmp_path)
