"""Tables: golden schemas, exact round trips, refusals, and readers that know nothing of us."""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from schemas.distribution import weighted_tokens
from schemas.errors import SchemaMismatch
from schemas.sample_id import sample_id_of
from schemas.storage.shards import read_shard, write_shard
from schemas.table import BoundTable
from schemas.tables.aligned_spans import ALIGNED_ENTRIES, ALIGNED_SPANS
from schemas.tables.candidate_scores import CANDIDATE_SCORES, CandidateScores
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.episodes import EPISODES, Episode, split_candidates, subset_input_ids
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from schemas.tables.prompted.advantages import (
    SUPPORTS,
    ReleasedAdvantages,
    TauAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from schemas.tables.prompted.response_logprobs import RESPONSE_LOGPROBS, ResponseLogprobs
from schemas.tables.prompted.response_token_logprobs import (
    RESPONSE_TOKEN_LOGPROBS,
    ResponseTokenLogprobs,
)
from schemas.tables.prompted.responses import RESPONSES, Responses
from schemas.tables.span_masks import SPAN_MASKS, SpanMask
from schemas.tables.subset_preferences import SUBSET_PREFERENCES, SubsetPreferences, split_subsets
from schemas.tables.teacher_logits import (
    EXACT,
    EXACT_INT8,
    THRESHOLD,
    THRESHOLD_TAU,
    TOP_K,
    TauLogits,
    ThresholdLogits,
    TopKLogits,
)
from schemas.tables.token_entropies import TOKEN_ENTROPIES, TokenEntropies

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"K": 4, "D": 8, "R": 6}
BOUND: dict[str, BoundTable[Any]] = {
    "documents": DOCUMENTS.bind(vocab_size=49_152),
    "documents_large_vocabulary": DOCUMENTS.bind(vocab_size=262_144),
    "episodes": EPISODES.bind(vocab_size=49_152),
    "episodes_large_vocabulary": EPISODES.bind(vocab_size=262_144),
    "conversations": CONVERSATIONS.bind(vocab_size=49_152),
    "demonstrations": DEMONSTRATIONS.bind(vocab_size=49_152),
    "subset_preferences": SUBSET_PREFERENCES.bind(vocab_size=49_152),
    "candidate_scores": CANDIDATE_SCORES.bind(vocab_size=49_152),
    "aligned_spans": ALIGNED_SPANS.bind(vocab_size=49_152),
    "aligned_spans_entries": ALIGNED_ENTRIES.bind(vocab_size=49_152),
    "teacher_logits_threshold": THRESHOLD.bind(vocab_size=49_152, sizes=SIZES),
    "teacher_logits_threshold_tau": THRESHOLD_TAU.bind(vocab_size=49_152),
    "teacher_logits_threshold_tau_large_vocabulary": THRESHOLD_TAU.bind(vocab_size=151_936),
    "teacher_logits_top_k": TOP_K.bind(vocab_size=151_936, sizes=SIZES),
    "teacher_logits_exact": EXACT.bind(vocab_size=49_152, sizes=SIZES),
    "teacher_logits_exact_int8": EXACT_INT8.bind(vocab_size=49_152, sizes=SIZES),
    "token_entropies": TOKEN_ENTROPIES.bind(vocab_size=49_152),
    "span_masks": SPAN_MASKS.bind(vocab_size=49_152),
    "preference_pairs": PREFERENCE_PAIRS.bind(vocab_size=49_152),
    "responses": RESPONSES.bind(vocab_size=151_936, sizes=SIZES),
    "response_logprobs": RESPONSE_LOGPROBS.bind(vocab_size=49_152),
    "response_token_logprobs": RESPONSE_TOKEN_LOGPROBS.bind(vocab_size=49_152),
    **{
        f"advantages_{name}": table.bind(vocab_size=49_152, sizes=SIZES)
        for name, table in SUPPORTS.items()
    },
    "advantages_threshold_tau_large_vocabulary": SUPPORTS["threshold_tau"].bind(vocab_size=151_936),
}


def document(first: int, length: int = 10) -> Document:
    ids_T = np.arange(first, first + length)
    return Document(sample_id=sample_id_of(ids_T), split="train", input_ids_T=ids_T)


def threshold_row(num_positions: int = 3) -> ThresholdLogits:
    return ThresholdLogits(
        sample_id="a" * 24,
        first_target=1,
        token_ids_PK=np.arange(num_positions * 4).reshape(-1, 4),
        num_head_P=np.array([2, 0, 4][:num_positions], np.uint8),
        head_codes_E=np.arange(6, dtype=np.uint8),
        next_token_logprobs_P=np.linspace(-3, 0, num_positions).astype(np.float16),
        entropies_P=np.linspace(0, 3, num_positions).astype(np.float16),
    )


def tau_row() -> TauLogits:
    """Three positions of a head and a tail, a tail alone and a head alone."""
    return TauLogits(
        sample_id="a" * 24,
        first_target=1,
        num_head_P=np.array([1, 0, 2], np.uint8),
        num_tail_P=np.array([2, 1, 0], np.uint8),
        head_ids_H=np.array([7, 140_000, 3]),
        head_codes_H=np.array([60, 40, 63], np.uint8),
        tail_gaps_low_E=np.array([255, 1, 9], np.uint8),
        tail_gaps_high_E=np.array([500, 0, 3]),
        next_token_logprobs_P=np.linspace(-3, 0, 3).astype(np.float16),
        entropies_P=np.linspace(0, 3, 3).astype(np.float16),
    )


def text_of(name: str) -> str:
    """A schema as its golden file has it."""
    return str(BOUND[name].schema.to_string(truncate_metadata=False)) + "\n"


@pytest.mark.parametrize("name", BOUND)
def test_schema_is_the_golden_one(name: str) -> None:
    """A changed column needs a raised version: other people's trainers read these files."""
    golden = GOLDEN / f"{name}.schema.txt"
    assert golden.is_file(), f"{golden} is not there: `python -m tests.schemas.test_schemas`"
    text = text_of(name)
    assert golden.read_text() == text, f"{name} changed: raise its version, then rewrite {golden}"


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [document(40_000), document(3, length=2), document(49_000, length=152)]
    path = tmp_path / "shard.arrow"
    write_shard(path, BOUND["documents"], rows)
    batches = read_shard(path).to_batches()
    found = [row for batch in batches for row in DOCUMENTS.rows(batch)]
    for row, expected in zip(found, rows, strict=True):
        assert (row.sample_id, row.split) == (expected.sample_id, expected.split)
        np.testing.assert_array_equal(row.input_ids_T, expected.input_ids_T)


def test_two_dimensional_columns_and_slices_come_back() -> None:
    rows = [threshold_row(), dataclasses.replace(threshold_row(), sample_id="b" * 24)]
    batch = BOUND["teacher_logits_threshold"].to_batch(rows)
    assert batch.schema.field("token_ids_PK").type.value_type.list_size == 4
    second = next(THRESHOLD.rows(batch.slice(1)))
    assert second.sample_id == "b" * 24
    np.testing.assert_array_equal(second.token_ids_PK, rows[1].token_ids_PK)
    np.testing.assert_array_equal(second.head_codes_E, rows[1].head_codes_E)


@pytest.mark.parametrize(("vocab_size", "largest"), [(49_152, 49_151), (262_144, 262_143)])
def test_large_ids_survive(tmp_path: Path, vocab_size: int, largest: int) -> None:
    row = Document(sample_id="c" * 24, split="heldout", input_ids_T=np.array([0, largest]))
    write_shard(tmp_path / "s.arrow", DOCUMENTS.bind(vocab_size=vocab_size), [row])
    found = read_shard(tmp_path / "s.arrow").column("input_ids_T").to_pylist()
    assert found == [[0, largest]]


def test_an_id_that_does_not_fit_is_refused_not_wrapped() -> None:
    with pytest.raises(ValueError, match="65536 do not fit uint16"):
        BOUND["documents"].to_batch([document(65_527)])


def test_a_foreign_shard_is_refused_in_one_line() -> None:
    batch = pa.RecordBatch.from_pydict({"sample_id": ["x"], "text": ["hello"]})
    with pytest.raises(SchemaMismatch, match=r"no column 'split'.*holds sample_id, text"):
        list(DOCUMENTS.rows(batch))


def test_rows_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        dataclasses.replace(document(1), split="test")
    with pytest.raises(ValueError, match="1 tokens, at least 2"):
        document(1, length=1)
    with pytest.raises(ValueError, match="head codes do not match"):
        dataclasses.replace(threshold_row(), head_codes_E=np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="3 next-token log-probs"):
        dataclasses.replace(threshold_row(), entropies_P=np.zeros(2, np.float16))


def test_pyarrow_polars_and_datasets_read_a_shard_bare(tmp_path: Path) -> None:
    """All three readers, on both kinds of nesting and both id widths, without this package."""
    for bound in (BOUND["teacher_logits_threshold"], BOUND["teacher_logits_top_k"]):
        row: ThresholdLogits | TopKLogits = threshold_row()
        if bound.table is TOP_K:
            row = TopKLogits(
                sample_id="a" * 24,
                first_target=1,
                token_ids_PK=np.full((3, 4), 151_935),
                logprobs_PK=np.full((3, 4), -2.0, np.float16),
                rest_logprobs_P=np.full(3, -1.0, np.float16),
                next_token_logprobs_P=np.zeros(3, np.float16),
                entropies_P=np.zeros(3, np.float16),
            )
        path = tmp_path / bound.table.variant / "shard.arrow"
        write_shard(path, bound, [row] * 20)
        expected = np.asarray(row.token_ids_PK).tolist()
        with pa.memory_map(str(path)) as source:
            bare = pa.ipc.open_file(source).read_all()
        assert bare.column("token_ids_PK").to_pylist() == [expected] * 20
        lazy = pl.scan_ipc(path).select("sample_id", "token_ids_PK").collect()
        assert lazy["token_ids_PK"].to_list() == [expected] * 20
        loaded = datasets.load_dataset(
            "arrow", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf")
        )
        assert loaded[19]["token_ids_PK"] == expected
        np.testing.assert_allclose(loaded[0]["entropies_P"], row.entropies_P.astype(float))


def test_ragged_entries_are_plain_lists_to_bare_readers(tmp_path: Path) -> None:
    path = tmp_path / "shard.arrow"
    write_shard(path, BOUND["teacher_logits_threshold_tau_large_vocabulary"], [tau_row()] * 20)
    lazy = pl.scan_ipc(path).collect()
    loaded = datasets.load_dataset(
        "arrow", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf")
    )
    row = next(THRESHOLD_TAU.rows(read_shard(path).to_batches()[0]))
    for name in ("num_head_P", "head_ids_H", "tail_gaps_low_E", "tail_gaps_high_E"):
        expected = getattr(tau_row(), name).tolist()
        assert getattr(row, name).tolist() == lazy[name].to_list()[19] == expected
        assert loaded[19][name] == expected
    assert weighted_tokens(dataclasses.asdict(row))[0].tolist() == [
        [7, 500 * 256 + 255, 500 * 256 + 256],
        [777, 777, 777],
        [140_000, 3, 140_000],
    ]


def test_metadata_tells_a_bare_reader_what_a_column_is() -> None:
    schema = BOUND["teacher_logits_threshold"].schema
    assert schema.metadata[b"table"] == b"teacher_logits"
    assert schema.field("entropies_P").metadata[b"unit"] == b"nats"
    assert all(b"doc" in field.metadata for field in schema)


def test_sample_id_depends_on_ids_and_spans_not_on_their_width() -> None:
    ids = np.arange(20, dtype=np.uint16)
    assert sample_id_of(ids) == sample_id_of(ids.astype(np.int64)) == sample_id_of(list(range(20)))  # type: ignore[arg-type]
    assert sample_id_of(ids) != sample_id_of(ids[:-1])
    assert sample_id_of(ids) != sample_id_of(ids, [(2, 5)])
    assert sample_id_of(ids) == "6b5d8674a0b9f51dc01b6497"


def episode(**changes: Any) -> Episode:
    """Return two demonstrations (3 + 1 tokens, a separator after each), a query and an answer."""
    row = Episode(
        sample_id="e" * 24,
        split="train",
        task="facts",
        kind="classification",
        query_id="f" * 24,
        draw=0,
        input_ids_T=np.array([10, 11, 12, 13, 1, 20, 21, 22, 23, 1, 30, 31, 32]),
        demonstrations_M3=np.array([[0, 3, 4], [5, 8, 9]], np.int32),
        query_start=10,
        answer_start=12,
        candidate_ids_C=np.array([32, 33, 34]),
        candidate_lengths_N=np.array([1, 2], np.int32),
        gold=0,
    )
    return dataclasses.replace(row, **changes)


SCORED: dict[str, Any] = {
    "sample_id": "e" * 24,
    "token_advantages_P": np.array([0.5, -0.25], np.float16),
    "teacher_logprobs_N": np.array([-3.5], np.float32),
    "reference_logprobs_N": np.array([-4.0], np.float32),
}
TWO_BY_FOUR = np.arange(8).reshape(2, 4)


def responses(**changes: Any) -> Responses:
    """Return two responses, of two tokens and of one."""
    row = Responses(
        sample_id="e" * 24,
        prompt_ids_T=np.array([1, 2, 3]),
        response_ids_A=np.array([140_000, 2, 9]),
        response_lengths_N=np.array([2, 1], np.int32),
        finish_reasons_N=np.array([1, 0], np.uint8),
        logprobs_A=np.array([-1.5, -0.5, -3.0], np.float32),
        top_ids_AK=np.arange(12).reshape(3, 4),
        top_logprobs_AK=-np.arange(12.0).reshape(3, 4).astype(np.float16),
    )
    return dataclasses.replace(row, **changes)


def test_rows_and_their_scores_come_back_and_bare_readers_see_lists(tmp_path: Path) -> None:
    rows: dict[str, tuple[Any, Any]] = {
        "preference_pairs": (
            PREFERENCE_PAIRS,
            PreferencePair(
                sample_id="e" * 24,
                split="heldout",
                prompt_ids_T=np.array([1, 2, 3]),
                chosen_ids_C=np.array([4, 2]),
                rejected_ids_R=np.array([49_151]),
                chosen_finished=True,
                rejected_finished=False,
            ),
        ),
        "responses": (RESPONSES, responses()),
        "response_logprobs": (
            RESPONSE_LOGPROBS,
            ResponseLogprobs(
                sample_id="e" * 24,
                response_logprobs_N=np.array([-10.5, -20.25], np.float32),
                response_num_tokens_N=np.array([4, 7], np.int32),
            ),
        ),
        "response_token_logprobs": (
            RESPONSE_TOKEN_LOGPROBS,
            ResponseTokenLogprobs(
                sample_id="e" * 24,
                token_logprobs_A=np.array([-10.5, -0.25, 0.0], np.float32),
                response_num_tokens_N=np.array([1, 2], np.int32),
            ),
        ),
        "advantages_threshold": (
            SUPPORTS["threshold"],
            ThresholdAdvantages(
                token_ids_PK=TWO_BY_FOUR,
                advantages_PK=(TWO_BY_FOUR - 3.5).astype(np.float16),
                log_inclusions_PK=-TWO_BY_FOUR.astype(np.float16),
                **SCORED,
            ),
        ),
        "advantages_threshold_tau": (
            SUPPORTS["threshold_tau"],
            TauAdvantages(
                num_entries_P=np.array([0, 2], np.uint8),
                id_gaps_low_E=np.array([255, 1], np.uint8),
                id_gaps_high_E=np.array([190, 0], np.uint8),
                value_codes_E=np.array([0, 255], np.uint8),
                rest_advantages_P=np.array([0.5, -0.5], np.float16),
                **SCORED,
            ),
        ),
        "advantages_as_released": (
            SUPPORTS["as_released"],
            ReleasedAdvantages(
                token_ids_PK=TWO_BY_FOUR,
                advantages_PK=(TWO_BY_FOUR - 3.5).astype(np.float16),
                **SCORED,
            ),
        ),
        "advantages_union_top_k": (
            SUPPORTS["union_top_k"],
            UnionAdvantages(
                num_entries_P=np.array([3, 1], np.uint16),
                token_ids_E=np.array([5, 6, 7, 49_151]),
                advantages_E=np.array([1.0, -2.0, 0.5, 0.25], np.float16),
                rest_advantages_P=np.array([0.5, -0.5], np.float16),
                **SCORED,
            ),
        ),
        "episodes": (EPISODES, episode()),
        "subset_preferences": (
            SUBSET_PREFERENCES,
            SubsetPreferences(
                sample_id="e" * 24,
                subset_demonstrations_S=np.array([0, 1, 0], np.int32),
                subset_sizes_N=np.array([2, 1, 0], np.int32),
                answer_logprobs_N=np.array([-1.0, -2.0, -3.5], np.float32),
                num_answer_tokens=1,
                ranks_N=np.array([1, 2, 3], np.int32),
            ),
        ),
        "span_masks": (
            SPAN_MASKS,
            SpanMask(sample_id="e" * 24, selected_S2=np.array([[1, 3], [7, 8]], np.int32)),
        ),
        "token_entropies": (
            TOKEN_ENTROPIES,
            TokenEntropies(
                sample_id="e" * 24, token_entropies_P=np.array([0.0, 2.5, 10.5], np.float16)
            ),
        ),
        "candidate_scores": (
            CANDIDATE_SCORES,
            CandidateScores(
                sample_id="e" * 24,
                candidate_logprobs_N=np.array([-0.5, -1.5], np.float32),
                candidate_num_tokens_N=np.array([1, 2], np.int32),
            ),
        ),
    }
    for name, (table, row) in rows.items():
        path = tmp_path / f"{name}.arrow"
        write_shard(path, BOUND[name], [row, row])
        (found, _) = (r for batch in read_shard(path).to_batches() for r in table.rows(batch))
        for field in dataclasses.fields(row):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(row, field.name))
        with pa.memory_map(str(path)) as source:
            bare = pa.ipc.open_file(source).read_all().to_pylist()[0]
        assert pl.scan_ipc(path).collect().to_dicts()[0] == bare
        loaded = datasets.load_dataset(
            "arrow", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf")
        )
        assert loaded[0] == bare
        assert bare["sample_id"] == "e" * 24


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer_start": 13}, "do not lie in order within 13 tokens"),
        ({"query_start": 8}, "do not lie in order"),
        ({"candidate_lengths_N": np.array([1, 1])}, r"candidate lengths \[1, 1\] for 3 tokens"),
        ({"candidate_lengths_N": np.array([3, 0])}, "candidate lengths"),
        ({"gold": 2}, "gold is 2 of 2 candidates"),
        ({"gold": -1}, "gold is -1 of 2 candidates"),
        ({"kind": "essay"}, "kind 'essay' is unknown"),
    ],
)
def test_an_episode_whose_spans_disagree_is_no_row(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"sample {'e' * 24}: .*{reason}"):
        episode(**changes)


def test_a_subset_keeps_query_answer_and_each_demonstrations_separator() -> None:
    row = episode()
    spans = row.demonstrations_M3
    kept = {
        (): [30, 31, 32],
        (0,): [10, 11, 12, 13, 1, 30, 31, 32],
        (1,): [20, 21, 22, 23, 1, 30, 31, 32],
        (0, 1): row.input_ids_T.tolist(),
    }
    for subset, expected in kept.items():
        assert subset_input_ids(row.input_ids_T, spans, 10, subset).tolist() == expected
    with_bos = np.concatenate([[0], row.input_ids_T])
    assert subset_input_ids(with_bos, spans + 1, 11, ()).tolist() == [0, 30, 31, 32]
    candidates = split_candidates(row.candidate_ids_C, row.candidate_lengths_N)
    assert [c.tolist() for c in candidates] == [[32], [33, 34]]
    assert split_candidates(np.zeros(0), np.zeros(0)) == []
    assert split_subsets(np.array([0, 1, 1]), np.array([2, 0, 1])) == [[0, 1], [], [1]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"response_lengths_N": np.array([2, 2])}, r"responses of \[2, 2\] tokens, 3 are there"),
        ({"response_lengths_N": np.array([3, 0])}, r"responses of \[3, 0\] tokens"),
        ({"logprobs_A": np.zeros(2)}, r"3 tokens beside \[2, 3\] log-probs"),
        ({"prompt_ids_T": np.zeros(0)}, "the prompt has no token"),
    ],
)
def test_responses_that_disagree_are_no_row(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"sample {'e' * 24}: {reason}"):
        responses(**changes)


if __name__ == "__main__":  # writes what is not there; a file that is there is rewritten by hand
    for missing in (name for name in BOUND if not (GOLDEN / f"{name}.schema.txt").is_file()):
        (GOLDEN / f"{missing}.schema.txt").write_text(text_of(missing))
