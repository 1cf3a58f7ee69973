"""What the experiment on distributions gives to the product: model folders, rows, peers' rows.

Peers' rows are what ``teachercache import`` reads: draws as DistillKit's raw columns, log-probs
that sum to one over the k likeliest tokens as axolotl's.

Dimensions: B = sequences, T = tokens, V = vocabulary, K = kept tokens, N = draws.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.known_source.source import KnownSource
from benchmarks.known_source.source_model import KnownSourceConfig, KnownSourceForCausalLM

Array = npt.NDArray[Any]
ROWS_AT_ONCE = 64  # of float64 distributions: 64 x 64 x 256 x 8 bytes a topic
NOTHING = -1e4  # as peers write the log-prob of a token without weight


def write_source(folder: Path, source: KnownSource, length: int) -> None:
    """Save the source as a model folder that brings its own code."""
    num_topics, num_groups, vocab_size = source.ngrams_MGV.shape
    config = KnownSourceConfig(
        vocab_size=vocab_size,
        num_topics=num_topics,
        num_groups=num_groups,
        window=source.window,
        max_position_embeddings=length,
    )
    KnownSourceConfig.register_for_auto_class()
    KnownSourceForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = KnownSourceForCausalLM(config)
    for name in ("ngrams_MGV", "group_V", "copy_M"):
        getattr(model.model, name).copy_(torch.from_numpy(getattr(source, name)))
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(vocab_size))
    model.save_pretrained(folder)
    _write_tokenizer(folder, vocab_size)


def write_student(folder: Path, *, vocab_size: int, width: int, layers: int, seed: int) -> None:
    """Save a small Llama with random weights of its own seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _write_tokenizer(folder, vocab_size)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    vocabulary = {f"t{index}": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_rows(path: Path, ids_BT: Array) -> None:
    """Write token ids as the stage ``token_files`` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"input_ids": _lists(ids_BT.astype(np.int32))}), path)


def write_draws(path: Path, ids_BT: Array, source: KnownSource, draws: int, seed: int) -> float:
    """Write RS-KD's targets: N tokens a position, drawn with replacement, each of weight count / N.

    Returns how many distinct tokens a position has on average.
    """
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(draws, probs).astype(np.uint8) for probs in _scored(ids_BT, source)]
    counts_BTV = np.concatenate(counts)
    distinct_BT = (counts_BTV > 0).sum(axis=2)
    weights_BTK, kept_BTK = _largest(counts_BTV, int(distinct_BT.max()))
    logprobs_BTK = np.full(weights_BTK.shape, NOTHING, np.float32)
    np.log(weights_BTK / draws, out=logprobs_BTK, where=weights_BTK > 0)
    columns = {
        "input_ids": _lists(ids_BT.astype(np.int32)),
        "token_ids": _lists(kept_BTK.astype(np.int32)),
        "top_values": _lists(logprobs_BTK),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return float(distinct_BT.mean())


def write_renormalised(path: Path, ids_BT: Array, source: KnownSource, k: int) -> None:
    """Write the k likeliest tokens of each position with log-probs that sum to one over them."""
    parts = [_largest(probs_BTV, k) for probs_BTV in _scored(ids_BT, source)]
    top_BTK, kept_BTK = (np.concatenate(each) for each in zip(*parts, strict=True))
    logprobs_BTK = np.log(top_BTK / top_BTK.sum(axis=2, keepdims=True))
    after_last = ((0, 0), (0, 1), (0, 0))  # nothing is said of what follows a row
    kept_BTK, logprobs_BTK = (
        np.pad(kept_BTK, after_last),
        np.pad(logprobs_BTK, after_last, constant_values=NOTHING),
    )
    mask_BTK = np.broadcast_to(np.arange(ids_BT.shape[1])[:, None] + 1, kept_BTK.shape)
    columns = {
        "input_ids": _lists(ids_BT.astype(np.int32)),
        "labels": _lists(ids_BT.astype(np.int32)),
        "target_token_ids": _lists(kept_BTK.astype(np.int32)),
        "target_logprobs": _lists(logprobs_BTK.astype(np.float32)),
        "target_mask": _lists((mask_BTK < ids_BT.shape[1]).astype(np.int32)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _scored(ids_BT: Array, source: KnownSource) -> Iterator[Array]:
    """Yield the true distributions of some rows, of all tokens but the first."""
    for start in range(0, len(ids_BT), ROWS_AT_ONCE):
        yield source.probs(ids_BT[start : start + ROWS_AT_ONCE])[:, :-1]


def _largest(values_BTV: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest values by falling size, and their ids."""
    kept_BTK = np.argsort(values_BTV.astype(np.float32) * -1.0, axis=2, kind="stable")[..., :k]
    return np.take_along_axis(values_BTV, kept_BTK, axis=2), kept_BTK


def _lists(values: Array) -> pa.Array:
    """Return [B, T] or [B, T, K] numbers as lists a row."""
    found = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in values.shape[:0:-1]:
        offsets = np.arange(0, len(found) + 1, size, dtype=np.int32)
        found = pa.ListArray.from_arrays(pa.array(offsets), found)
    return found
