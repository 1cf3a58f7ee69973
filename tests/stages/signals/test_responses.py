"""The stage ``responses``: what it stores, what it rejects and what it refuses.

Most run a student that counts: after token v it is all but sure of v + 1, so its answers are known.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.tables.preference_pairs import PreferencePair
from schemas.tables.prompted.responses import RESPONSES, Responses
from stages.models.causal_lm.end_tokens import stop_tokens_of
from stages.models.engines.decoding import Decoding
from stages.models.engines.generator import open_generator
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.responses.work import Prompt, generate_responses, request_seed
from stages.stage import Rejected, StageContext
from tests.fixtures.episode_data import whole_logprobs
from tests.fixtures.tiny_generation import (
    EMPTY,
    STOP,
    pair_of,
    save_counting_student,
    save_tokenizer,
    shard_of,
    stage_of,
)


def context(model: Path, vocab_size: int, **options: Any) -> StageContext:
    spec = ModelSpec(model, "float32", "transformers", 64)
    engine = EngineOptions(device="cpu", **options)
    return StageContext(model, vocab_size, {"student": spec}, engine, "preference_pairs")


def answered(
    model: Path, pairs: Sequence[PreferencePair], *, vocab_size: int = 64, **config: Any
) -> list[Responses | Rejected]:
    """Run the stage as a worker does: open it, give it one shard."""
    with stage_of(**config).open(context(model, vocab_size)) as work:
        return list(work(shard_of(pairs)))


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_counting_student(tmp_path_factory.mktemp("counting"))


def test_stopped_truncated_and_empty_responses(counting: Path) -> None:
    """Prompts of several lengths out of order; each gets its own answer, or its reason."""
    prompts = [[9, 9, 37], [20], [5, 39], [1, 2, 3, 4, 31], [32], [39], [3, 50, 51, 52]]
    rows = answered(counting, [pair_of(prompt) for prompt in prompts])
    expected = {0: [38, 39, 40], 1: [*range(21, 29)], 3: [*range(32, 40)], 4: [*range(33, 41)]}
    expected[6] = [*range(53, 61)]
    for index, row in enumerate(rows):
        assert row.sample_id == "-".join(map(str, prompts[index]))
        if index not in expected:
            assert row == Rejected(row.sample_id, EMPTY)
            continue
        assert isinstance(row, Responses)
        said = expected[index]
        assert row.prompt_ids_T.tolist() == prompts[index]
        assert row.response_ids_A.tolist() == said
        assert row.response_lengths_N.tolist() == [len(said)]
        assert row.finish_reasons_N.tolist() == [1 if said[-1] == STOP else 0]
        assert row.top_ids_AK.shape == (len(said), 16)
        assert row.top_ids_AK[:, 0].tolist() == said
        np.testing.assert_allclose(row.logprobs_A, 0.0, atol=1e-5)
    assert sum(isinstance(row, Rejected) for row in rows) == 2


def test_the_rows_can_be_written_and_read(counting: Path) -> None:
    stage = stage_of(top_k=3)
    (row,) = answered(counting, [pair_of([20])], top_k=3)
    bound = stage.bind(context(counting, 64))
    assert bound.table is stage.table is RESPONSES
    assert isinstance(row, Responses)
    batch = bound.to_batch([row])
    (read,) = RESPONSES.rows(batch)
    assert read.response_ids_A.tolist() == row.response_ids_A.tolist()
    assert read.top_ids_AK.dtype == np.dtype(np.uint16)
    assert read.top_logprobs_AK.dtype == np.dtype(np.float16)
    assert read.logprobs_A.tolist() == row.logprobs_A.tolist()


def test_numbers_are_the_students_raw_logprobs(tiny_model: Path) -> None:
    """Sampled responses, end to end in a row, against one forward pass over prompt + response."""
    draw = np.random.default_rng(8)
    pairs = [pair_of(draw.integers(1, 512, length).tolist(), str(length)) for length in (3, 40, 17)]
    rows = answered(tiny_model, pairs, vocab_size=512, n=3, temperature=0.8, top_p=0.95, top_k=4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    for pair, row in zip(pairs, rows, strict=True):
        assert isinstance(row, Responses) and len(row.response_lengths_N) == 3
        ends = np.cumsum(row.response_lengths_N)
        for start, end in zip(ends - row.response_lengths_N, ends, strict=True):
            said = row.response_ids_A[start:end]
            with torch.no_grad():
                whole_TV = whole_logprobs(model, np.concatenate([pair.prompt_ids_T, said])).numpy()
            logprobs_AV = whole_TV[len(pair.prompt_ids_T) - 1 :]
            at = np.arange(len(said))
            np.testing.assert_allclose(row.logprobs_A[start:end], logprobs_AV[at, said], atol=5e-4)
            top_ids_AK = row.top_ids_AK[start:end]
            expected_AK = np.take_along_axis(logprobs_AV, top_ids_AK, axis=1)
            top_AK = row.top_logprobs_AK[start:end]
            np.testing.assert_allclose(top_AK, expected_AK, rtol=1e-3, atol=1e-3)  # float16
            assert (np.diff(top_AK.astype(np.float64)) <= 0).all()


@pytest.mark.slow
def test_equal_recipes_give_equal_tokens_and_draws_differ(tiny_model: Path) -> None:
    """A response is a matter of seed, sample and draw: not of the shard's order or its size."""
    pairs = [pair_of([7, 8, 9], name) for name in ("a", "b", "c")]
    with stage_of(temperature=1.0, n=2).open(context(tiny_model, 512)) as work:
        tokens = said_by_sample(work(shard_of(pairs)))
        assert said_by_sample(work(shard_of(pairs[::-1]))) == tokens
        assert said_by_sample(work(shard_of(pairs[1:2]))) == {"b": tokens["b"]}
    responses = {tuple(said) for draws in tokens.values() for said in draws}
    assert len(responses) == 6
    one = said_by_sample(answered(tiny_model, pairs, vocab_size=512, temperature=1.0))
    assert one == {name: draws[:1] for name, draws in tokens.items()}
    other = said_by_sample(answered(tiny_model, pairs, vocab_size=512, temperature=1.0, seed=1))
    assert not responses & {tuple(said) for draws in other.values() for said in draws}


def said_by_sample(rows: Iterable[Responses | Rejected]) -> dict[str, list[list[int]]]:
    found = {}
    for row in rows:
        assert isinstance(row, Responses)
        ends = np.cumsum(row.response_lengths_N)
        found[row.sample_id] = [part.tolist() for part in np.split(row.response_ids_A, ends[:-1])]
    return found


def test_seeds_of_requests_are_apart_and_fit_63_bits() -> None:
    seeds = {request_seed(s, name, d) for s in range(4) for name in "ab" for d in range(8)}
    assert len(seeds) == 64 and min(seeds) >= 0 and 1 << 60 < max(seeds) < 1 << 63


def test_prompts_without_room_and_foreign_tokens_are_rejected(tiny_model: Path) -> None:
    pairs = [pair_of([7] * 249, "long"), pair_of([7] * 248, "fits"), pair_of([7, 512], "foreign")]
    rows = answered(tiny_model, pairs, vocab_size=512)
    reason = "the prompt leaves less than max_tokens 8 of the model's window of 256 tokens"
    assert rows[0] == Rejected("long", reason)
    assert isinstance(rows[1], Responses)
    assert rows[2] == Rejected("foreign", "prompt token outside the vocabulary of 512")


def test_a_limit_that_only_the_engine_sets_is_refused(counting: Path) -> None:
    shard = shard_of([pair_of([20] * 5), pair_of([20])])
    with stage_of().open(context(counting, 64, max_model_len=13)) as work:
        assert all(isinstance(row, Responses) for row in work(shard))
    message = "max_model_len is 12, a prompt with max_tokens has 13 tokens: raise it"
    with (
        pytest.raises(ConfigError, match=message),
        stage_of().open(context(counting, 64, max_model_len=12)) as work,
    ):
        work(shard)


def test_numbers_that_are_not_finite_are_rejected(counting: Path, tmp_path: Path) -> None:
    """The head's row of token 30 is not a number, so neither is any log-prob."""
    shutil.copytree(counting, tmp_path, dirs_exist_ok=True)
    model: Any = AutoModelForCausalLM.from_pretrained(counting)
    with torch.no_grad():
        model.lm_head.weight[30] = torch.nan
    model.save_pretrained(tmp_path)
    for temperature in (0.0, 1.0):
        (row,) = answered(tmp_path, [pair_of([20])], temperature=temperature)
        assert row == Rejected("20", "non-finite log-prob")


def test_a_token_that_the_table_cannot_hold_is_rejected(counting: Path) -> None:
    """As from a model that has more logits than its config says."""
    options = EngineOptions(device="cpu")
    decoding = Decoding(8, (STOP,), temperature=0.0, top_p=1.0, top_k=2)
    prompts = [Prompt("20", pair_of([20]).prompt_ids_T)]
    with open_generator("transformers", counting, dtype="float32", options=options) as generator:
        generator.vocab_size = 25
        rows = list(generate_responses(stage_of(), generator, decoding, prompts))
    assert rows == [Rejected("20", "generated token outside the vocabulary of 25")]


def test_named_stop_tokens_replace_the_folders(counting: Path) -> None:
    (row,) = answered(counting, [pair_of([37])], stop_token_ids=[42, 44])
    assert isinstance(row, Responses)
    assert row.response_ids_A.tolist() == [38, 39, 40, 41, 42]
    with pytest.raises(ConfigError, match=r"stop_token_ids has \[64\], the model's vocabulary"):
        answered(counting, [pair_of([37])], stop_token_ids=[3, 64])


TURNS = "{% for m in messages %}<a>{{ m['content'] }}<b>{% endfor %}"


def test_the_folder_says_what_ends_a_response(counting: Path, tmp_path: Path) -> None:
    """Config, tokenizer and the token that closes a turn in the chat template."""
    folder = shutil.copytree(counting, tmp_path / "student")
    assert stop_tokens_of(folder) == (STOP,)
    save_tokenizer(folder, eos=41)
    assert stop_tokens_of(folder) == (STOP, 41)
    save_tokenizer(folder, eos=41, template=TURNS)
    assert stop_tokens_of(folder) == (STOP, 41, 63)
    save_tokenizer(folder, eos=41, template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert stop_tokens_of(folder) == (STOP, 41)
    save_tokenizer(folder, template="{{ raise_exception('no') }}")
    with pytest.raises(ConfigError, match="fails on a question and an answer"):
        stop_tokens_of(folder)


@pytest.mark.slow
def test_real_stop_tokens(smollm2: Path) -> None:
    assert stop_tokens_of(smollm2) == (2,)  # <|im_end|>


def test_a_folder_that_leaves_the_end_open_is_refused(counting: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(counting, tmp_path / "student")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [STOP, 50]}))
    with pytest.raises(ConfigError, match=r"ends texts with \[50\], .* with \[40\]: say which"):
        stop_tokens_of(folder)
    generation.write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        stop_tokens_of(folder)
    generation.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, eos=None)
    with pytest.raises(ConfigError, match="names no token that ends a text"):
        stop_tokens_of(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="cannot load the tokenizer of"):
        stop_tokens_of(folder)


def test_settings_that_make_no_sense_are_refused(counting: Path) -> None:
    for config, message in (
        ({"n": 2}, "n is 2 at temperature 0"),
        ({"temperature": 0.001}, r"temperature is 0.001, expected 0 \(greedy\) or at least 0.01"),
        ({"stop_token_ids": []}, "at least 1 item"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            stage_of(**config)
    with pytest.raises(ConfigError, match="top_k is 65, the vocabulary has 64 tokens"):
        stage_of(top_k=65).bind(context(counting, 64))


def test_the_estimate_counts_responses() -> None:
    record = ShardRecord(
        name="s",
        split="train",
        num_rows=10,
        num_tokens=600,
        num_positions=0,
        num_bytes=1,
        sha256="0" * 64,
    )
    source = Manifest(
        table="preference_pairs",
        version=1,
        variant="",
        fingerprint="f",
        tokenizer="t",
        vocab_size=49_152,
        identity={},
        shards=(record,),
    )
    estimate = stage_of(max_tokens=100, n=3, temperature=1.0, top_k=16).estimate(
        source, hidden_size=64
    )
    assert estimate.num_positions == 10 * 3 * 50
    assert 60 < estimate.num_bytes / estimate.num_positions < 70
