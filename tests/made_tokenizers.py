"""Tiny tokenizers of every kind that models use, trained on a few lines and written as a model's folder has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "Hello world, this is a small corpus for tests. How are you today?",
    "Counting: 1 2 3 44 555; the quick brown fox jumps over the lazy dog!",
    "Grüße aus München, çà et là, naïve café",
    "日本語のテキスト 中文文本 한국어",
    "emoji 😀 👩‍👩‍👧‍👦 🇩🇪 and more 😀😀",
    "def f(x):\n    return x + 1\n\n\tprint('tabs')",
] * 4
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level() -> tuple[Backend, dict[str, Any]]:
    """As GPT-2, Llama 3 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens(["<tool é>"])
    return backend, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|late|>"]}


def byte_level_bos() -> tuple[Backend, dict[str, Any]]:
    """As Llama 3: BOS from the post-processor."""
    backend, config = byte_level()
    bos = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[bos]
    )
    return backend, {**config, "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}}


def llama() -> tuple[Backend, dict[str, Any]]:
    """As Llama 2 and Mistral: BPE over ▁ with byte fallback, a leading space stripped."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained.train_from_iterator(LINES[:3], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTE_TOKENS, *sorted(model["vocab"], key=model["vocab"].get)])
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma() -> tuple[Backend, dict[str, Any]]:
    """As Gemma: the same without the stripped space."""
    backend, config = llama()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend, config


def unigram() -> tuple[Backend, dict[str, Any]]:
    """As T5 and XLM-R: Unigram with Metaspace."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    end = ("</s>", backend.token_to_id("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end])
    return backend, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def word_piece() -> tuple[Backend, dict[str, Any]]:
    """As BERT."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=260, special_tokens=specials, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return backend, config


def word_level() -> tuple[Backend, dict[str, Any]]:
    """Whole words and no decoder at all."""
    backend = Backend(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[END]"], show_progress=False))
    return backend, {"unk_token": "[UNK]", "eos_token": "[END]"}


def end_of_word() -> tuple[Backend, dict[str, Any]]:
    """As the first GPT: a suffix ends each word, so that a token needs its neighbour."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return backend, {"unk_token": "<unk>"}


KINDS = {
    make.__name__: make for make in (byte_level, byte_level_bos, llama, gemma, unigram, word_piece, word_level, end_of_word)
}


def write_folder(kind: str, folder: Path, **config: Any) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json."""
    backend, facts = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", **facts, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def has_mixed_byte_run(tokenizer: Any, ids: list[int], skip_special_tokens: bool) -> bool:
    """Whether a run of byte tokens holds whole characters and invalid bytes: where our text differs on purpose."""
    run, runs = b"", []
    for token_id in ids:
        if skip_special_tokens and token_id in tokenizer.special_ids:
            continue
        token = tokenizer._backend.id_to_token(token_id)
        if token is None:
            continue
        if match := BYTE_TOKEN.fullmatch(token):
            run += bytes([int(match[1], 16)])
        else:
            runs.append(run)
            run = b""
    decoded = [run.decode(errors="replace") for run in [*runs, run]]
    return any("\ufffd" in text and text.strip("\ufffd") for text in decoded)
