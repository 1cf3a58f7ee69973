"""Fixtures: a tiny real model with a trained tokenizer, made once a session and reused."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # small products: starting a second thread costs more than it does

# Real English prose that every Python carries: the language reference.
PARAGRAPHS = [
    re.sub(r"\s+", " ", paragraph).strip()
    for name in sorted(topics)
    for paragraph in topics[name].split("\n\n")
    if len(paragraph) > 200
]


def save_tiny_model(folder: Path, *, vocab_size: int, tie: bool = True) -> Path:
    """Save a random Llama (2 layers, width 64) beside a byte-level BPE trained on real text.

    ``vocab_size`` counts the model's logits; the tokenizer has at most 512 tokens of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 512),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PARAGRAPHS[:200], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with 512 logits, tied embeddings."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=512)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder that this test alone has."""
    monkeypatch.setenv("TEACHERCACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_model_large_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose ids do not fit 16 or 17 bits: 151,936 logits, untied head."""
    folder = tmp_path_factory.mktemp("large")
    return save_tiny_model(folder, vocab_size=151_936, tie=False)


@pytest.fixture(scope="session")
def tiny_encoder(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a WordPiece tokenizer of its own."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(paragraphs[:50], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Real English paragraphs of 200 characters and more."""
    return PARAGRAPHS


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct folder that `make assets` prepares."""
    default = Path("~/.cache/teachercache").expanduser()
    cache = Path(os.environ.get("TEACHERCACHE_CACHE", default))
    folder = cache / "models" / "smollm2-135m-instruct"
    assert (folder / "config.json").is_file(), f"{folder} is missing: run `make assets`"
    return folder
