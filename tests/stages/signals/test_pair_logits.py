"""Teacher distributions on preference pairs: responses alone are scored, each after its prompt.

Dimensions: P = response tokens of a pair, chosen first.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import ConfigError
from schemas.sample_id import sample_id_of
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from stages.models.spec import EngineOptions, ModelSpec
from stages.stage import Rejected, StageContext
from tests.fixtures.cached_data import VOCAB_SIZE, save_model
from tests.fixtures.preference_data import make_pairs, signals_of, wide_model
from tests.fixtures.tiny_teacher import ENCODINGS, sampled_of, stage_of

CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
COARSE: dict[str, Any] = {"rtol": 1 / 128 + 2e-3, "atol": 2e-3}  # 7 significant bits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, seed=1, num_layers=2)
    return folder


def run(teacher: Path, pairs: list[PreferencePair], out: Path, kind: str, **options: Any) -> Any:
    context = StageContext(
        folder=out,
        vocab_size=VOCAB_SIZE,
        models={"m": ModelSpec(teacher, "float32", "transformers", 32)},
        engine=EngineOptions(device="cpu", cache_dir=out / "head_check", **options),
        input_table="preference_pairs",
    )
    shard = pa.Table.from_batches([PREFERENCE_PAIRS.bind(vocab_size=VOCAB_SIZE).to_batch(pairs)])
    with stage_of(kind).open(context) as work:
        return list(work(shard))


@pytest.mark.parametrize("kind", ENCODINGS)
def test_entries_are_those_of_one_forward_a_response(
    teacher: Path, tmp_path: Path, kind: str
) -> None:
    pairs = make_pairs()[:6]
    model = wide_model(teacher)
    for pair, row in zip(pairs, run(teacher, pairs, tmp_path, kind), strict=True):
        wanted = signals_of(model, pair, kind)
        assert (row.sample_id, row.first_target) == (pair.sample_id, len(pair.prompt_ids_T))
        assert row.num_positions == len(pair.chosen_ids_C) + len(pair.rejected_ids_R)
        assert row.num_tokens == pair.num_tokens
        within = COARSE if kind.startswith("threshold") else CLOSE
        for name in ("next_token_logprobs_P", "entropies_P"):
            np.testing.assert_allclose(getattr(row, name), getattr(wanted, name), **within)
        if kind.startswith("exact"):
            np.testing.assert_allclose(row.hidden_PD, wanted.hidden_PD, atol=2e-2, rtol=2e-2)
        elif kind == "top_k":
            np.testing.assert_allclose(row.logprobs_PK, wanted.logprobs_PK, atol=2e-2)
        else:
            np.testing.assert_allclose(sampled_of(row)[1].sum(1), 1.0, atol=1e-5)


def test_a_pair_that_cannot_be_scored_costs_itself_alone(teacher: Path, tmp_path: Path) -> None:
    """A window of 64 tokens, ids up to the model's own 307."""
    fine, longest, strange = make_pairs()[:3]
    long_ids = np.arange(1, 70)
    pairs = [
        fine,
        replace(longest, chosen_ids_C=long_ids, sample_id=sample_id_of(long_ids)),
        replace(strange, rejected_ids_R=np.array([5, 400])),
    ]
    found = run(teacher, pairs, tmp_path, "threshold")
    assert [isinstance(row, Rejected) for row in found] == [False, True, True]
    assert found[1].reason == "longer than the model's window of 64 tokens"
    assert found[2].reason == f"token id 400 outside the teacher's vocabulary of {VOCAB_SIZE}"
    with pytest.raises(ConfigError, match=r"max_model_len is 8, a row has \d+ tokens"):
        run(teacher, [fine, longest], tmp_path, "threshold", max_model_len=8)
