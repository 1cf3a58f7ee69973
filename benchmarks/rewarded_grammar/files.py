"""What the experiment on preferences gives to the product: model folders, texts and pairs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.rewarded_grammar.grammar import (
    ASKED,
    COMMON,
    EMPHASIS,
    GREETING,
    NOUNS,
    RARE,
    STOP,
    STYLES,
)

END = "<|end|>"
WINDOW, HEAD_WIDTH = 64, 16
WORDS = (*STYLES, *NOUNS, *COMMON, *RARE, GREETING, EMPHASIS, ASKED, STOP)


def write_model(folder: Path, *, width: int, layers: int, seed: int) -> None:
    """Save a small Llama with random weights of the seed, and a token for each word.

    There are no other tokens: DPO moves mass to such as no text has, wherever there are some.
    """
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=width // HEAD_WIDTH,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=len(vocabulary),
        pad_token_id=len(vocabulary),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END
    ).save_pretrained(folder)


def num_parameters(folder: Path) -> int:
    """Return how many weights a model folder has."""
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
