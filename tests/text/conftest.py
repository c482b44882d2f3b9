"""Folders of tiny tokenizers, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_tokenizers import KINDS, write_folder

from llmd.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind → folder."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_folder(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def tokenizers_made(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    """Kind → our tokenizer."""
    return {kind: Tokenizer.from_folder(folder) for kind, folder in folders.items()}
