"""The demo model's byte-level BPE tokenizer, trained on its own dialogues."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmd_plugins.sources.demo.corpus import conversation, plain_text
from llmd_plugins.sources.demo.exchanges import dumps

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKERS = ["<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Letters with the sign or space before them, single digits, signs with a space before a digit, white space.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NUM_CONVERSATIONS = 12_000


def train_tokenizer(seed: int, vocab_size: int) -> Tokenizer:
    """A tokenizer whose vocabulary holds every byte, so that any text encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    # Tool markers must survive `skip_special_tokens`: parsers look for them in the text.
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    return tokenizer


def _texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(_NUM_CONVERSATIONS):
        each = conversation(rng)
        yield from (str(message["content"]) for message in each.messages)
        yield from (dumps(schema) for schema in each.tools or [])
        yield plain_text(rng)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json and the two small files that name its special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": PAD, "eos_token": END, "pad_token": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [START],
        **names,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": [START]})


def write_json(path: Path, value: object) -> None:
    """A JSON file as people like to read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
