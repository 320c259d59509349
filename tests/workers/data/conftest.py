"""Tokenizers of the real bases, loaded once."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from workers.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def talk(test_data: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE with a chat template whose turns end in <|end|>, which is not the EOS."""
    return load_tokenizer(test_data / "bases" / "talk-5m")


@pytest.fixture(scope="session")
def stories(test_data: Path) -> PreTrainedTokenizerBase:
    """512 tokens with byte fallback and a prefix space; no chat template."""
    return load_tokenizer(test_data / "bases" / "stories260k")
