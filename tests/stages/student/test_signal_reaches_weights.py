"""The signal reaches the weights: one changed entry of a cache moves the gradient where it belongs.

Tables lie on the disk, one is written anew with one entry changed, and both go the way of a run:
``open_dataset``, the objective's collator, its terms, a step. The cases are those of the product's
own lists: every objective, every signal table it reads, every variant of that table.

Dimensions: P = positions of a row, V = vocabulary, D = hidden width.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.distribution import weighted_tokens
from schemas.storage.manifest import read_manifest
from schemas.tables import TABLES
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.objectives.dckd import DckdConfig
from stages.student.objectives.kd import KdConfig
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.changed_entries import CHANGES, places_of
from tests.fixtures.objective_sources import (
    OBJECTIVES,
    Caches,
    Source,
    loaded,
    make_caches,
    one_step,
    signals_of,
    stored_row,
    with_table,
)
from tests.fixtures.position_gradients import Place, Trained, changed_places
from tests.fixtures.signal_places import answer_places, places_in_student, row_of

pytestmark = pytest.mark.slow

CHANGED_ROW = 1
CASES = [
    (loss, table, variant)
    for loss in OBJECTIVES
    for table in signals_of(loss)
    for name, variant in TABLES
    if name == table
]
# What is stored position by position, and what is said of whole answers.
OF_POSITIONS = ("teacher_logits", "advantages", "response_token_logprobs")
POSITIONS = [case for case in CASES if case[1] in OF_POSITIONS]
ANSWERS = [case for case in CASES if case not in POSITIONS]
WITHOUT_SIGNAL = [loss for loss in OBJECTIVES if not signals_of(loss)]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return make_caches(tmp_path_factory.mktemp("caches"))


def assert_weights_moved(before: Trained, after: Trained) -> None:
    assert any(not torch.equal(w, after.weights[name]) for name, w in before.weights.items())


def assert_at_one_place(before: Trained, after: Trained, place: Place, what: str) -> Tensor:
    """No other position of any row has another bit; at this one it is no rounding: return it."""
    moved = changed_places(before, after)
    assert list(moved) == [place], what
    assert float(moved[place].norm()) > 1e-5 * float(before.gradients[place].norm()), what
    assert_weights_moved(before, after)
    return moved[place]


def dense_teacher(stored: Any, p: int, folder: Path) -> Tensor:
    """[V] what is stored of a position, as probabilities."""
    if hasattr(stored, "hidden_PD"):
        head = LanguageHead.load(folder, device="cpu")
        hidden_1D = torch.from_numpy(stored.hidden_PD[p : p + 1].astype("f4"))
        return head.logits(hidden_1D)[0].softmax(-1)
    ids_PK, weights_PK = weighted_tokens(asdict(stored))
    ids_K, weights_K = (torch.from_numpy(each[p]) for each in (ids_PK.astype("i8"), weights_PK))
    return torch.zeros(VOCAB_SIZE).scatter_add_(0, ids_K, weights_K)


def share_of(loss: str, row: Any, p: int, counts: dict[str, int]) -> float:
    """What the KL of a position is multiplied with in the loss of the whole step."""
    if loss == "dckd":
        lengths = len(row["chosen_ids_C"]), len(row["rejected_ids_R"])
        config = DckdConfig()
        weights = config.chosen_weight, config.rejected_weight
        side = int(p >= lengths[0])
        return config.alpha * weights[side] / lengths[side] / counts["samples"]
    if loss == "bialign":  # kl_reduction: sum
        return 1.0 / counts["samples"]
    of_text = 0.2 * (1.0 - 0.5)  # lm_weight, and what alpha leaves the teacher
    return (of_text if loss == "icl_distillation" else 1.0) / counts["tokens"]


@pytest.mark.parametrize(("loss", "table", "variant"), POSITIONS)
def test_an_entry_reaches_its_position_and_no_other(
    caches: Caches, loss: str, table: str, variant: str, tmp_path: Path
) -> None:
    """Of documents, where those are rows of tokens that the objective reads."""
    assert_entries_reach(caches.source(loss, table, variant), loss, table, variant, tmp_path)


@pytest.mark.parametrize("rows", KdConfig().reads.rows)
def test_an_entry_reaches_its_position_in_rows_of_every_kind(
    caches: Caches, rows: str, tmp_path: Path
) -> None:
    """Conversations are scored in spans: positions of a row do not lie side by side."""
    source = caches.source_of_rows(rows, "exact")
    assert read_manifest(source.data[0]).table == rows
    assert_entries_reach(source, "kd", "teacher_logits", "exact", tmp_path)


def assert_entries_reach(
    source: Source, loss: str, table: str, variant: str, tmp_path: Path
) -> None:
    """Each kind of entry, at the first and at the last position of a row; packed too.

    The gradient of a KL is the student's distribution less the stored one, through the head: it
    changes by their difference. ``top_k`` is left out of that: its rest is no distribution.
    """
    before = one_step(loss, source)
    row = row_of(loss, table, before.rows[CHANGED_ROW])
    stored = stored_row(source, table, row["sample_id"])
    packed = one_step(loss, source, packing=True) if OBJECTIVES[loss].PACKS else None
    places = places_in_student(loss, row)
    head_VD = head_of(source)
    for what, change in CHANGES[table, variant].items():
        for p in places_of(stored):
            out = tmp_path / f"{what} {p}"
            other = change(stored, p)
            changed = with_table(source, table, out, row["sample_id"], lambda _, row=other: row)
            after = one_step(loss, changed)
            moved_D = assert_at_one_place(before, after, places[p], what)
            if packed is not None:
                together = one_step(loss, changed, packing=True)
                assert_at_one_place(packed, together, places[p], what)
            if table == "teacher_logits" and variant != "top_k":
                old_V, new_V = (dense_teacher(each, p, out) for each in (stored, other))
                expected_D = share_of(loss, row, p, before.counts) * ((old_V - new_V) @ head_VD)
                torch.testing.assert_close(moved_D, expected_D, rtol=1e-3, atol=1e-6)


def head_of(source: Source) -> Tensor:
    """[V, D] of the model whose log-probs the loss is about."""
    student, reader = loaded(source.student, source.reader)
    weight_VD: Tensor = (reader or student).get_output_embeddings().weight.detach()
    return weight_VD


@pytest.mark.parametrize(("loss", "table", "variant"), ANSWERS)
def test_a_score_reaches_the_answers_of_its_row_and_no_other(
    caches: Caches, loss: str, table: str, variant: str, tmp_path: Path
) -> None:
    """The loss of a row is of all its scores together, so all of its answers may change.

    DPO's is of the difference of two rewards, a softmax over candidates is of all of them, and a
    preference is an order of subsets. No bit changes of another row, nor of this row's positions
    in another term (BiAlign's KL on the whole episode, ICL-D's running text).
    """
    source = caches.source(loss, table, variant)
    before = one_step(loss, source)
    row = row_of(loss, table, before.rows[CHANGED_ROW])
    asked = answer_places(table, row)
    for what, change in CHANGES[table, variant].items():
        sample_id = row["sample_id"]
        changed = with_table(source, table, tmp_path / what, sample_id, lambda r, c=change: c(r, 0))
        after = one_step(loss, changed)
        moved = changed_places(before, after)
        assert moved and set(moved) <= asked, what
        for place, moved_D in moved.items():
            known = before.gradients.get(place, torch.zeros(1))  # none: a pair that was in order
            assert float(moved_D.norm()) > 1e-5 * float(known.norm()), what
        assert_weights_moved(before, after)
        if table == "response_logprobs":  # one factor of both responses' gradients
            assert set(moved) == asked
            ratios = [
                after.gradients[place].norm() / before.gradients[place].norm() for place in asked
            ]
            torch.testing.assert_close(ratios, [ratios[0]] * len(ratios), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("loss", WITHOUT_SIGNAL)
def test_an_objective_without_a_teacher_sees_no_change_of_one(
    caches: Caches, loss: str, tmp_path: Path
) -> None:
    """The table lies beside the rows; neither a gradient nor a weight has another bit."""
    table, variant = "teacher_logits", "threshold"
    source = caches.source(loss, table, variant)
    before = one_step(loss, source)
    sample_id = before.rows[CHANGED_ROW]["sample_id"]
    for what, change in CHANGES[table, variant].items():
        changed = with_table(source, table, tmp_path / what, sample_id, lambda r, c=change: c(r, 0))
        after = one_step(loss, changed)
        assert not changed_places(before, after)
        assert all(torch.equal(w, after.weights[name]) for name, w in before.weights.items())


def test_no_objective_and_no_signal_is_left_out(caches: Caches) -> None:
    """An objective, a table or a variant that is new has to be given data and a change."""
    assert {loss for loss, _, _ in CASES} | set(WITHOUT_SIGNAL) == set(OBJECTIVES)
    for loss, table, variant in CASES:
        assert CHANGES[table, variant], f"no change of {table} {variant}"
        assert caches.source(loss, table, variant), f"no data for {loss}"
