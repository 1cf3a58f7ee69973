"""What an audit asks of a row's beginning: the states of the whole row, and less to read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from schemas.sample_id import sample_id_of
from schemas.table import Table
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.scoring.agreement import Question
from stages.signals.scoring.states import States
from stages.signals.teacher_logits.questions import questions
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import open_teacher
from stages.stage import StageContext

STAGE = TeacherLogitsStage.model_validate(
    {"stage": "teacher_logits", "input": "x", "model": "m", "seed": 0}
)
IDS = np.arange(5, 35)


def context_of(table: str, model: Path, out: Path) -> StageContext:
    options = EngineOptions(device="cpu", head_check="off")
    spec = ModelSpec(model, "float32", "transformers", 64)
    return StageContext(out, 512, {"m": spec}, options, table)


def asked(table: Table[Any], row: Any, model: Path, out: Path) -> tuple[Question, Question]:
    """The questions about a row's first two positions and about all of it, both answered alike."""
    context = context_of(table.name, model, out)
    rows = pa.Table.from_batches([table.bind(vocab_size=512).to_batch([row])])
    (beginning,), (whole,) = (questions(STAGE, context, rows, most) for most in (2, None))
    with open_teacher(STAGE, context) as teacher:
        (first,), (second,) = (teacher.states(question.rows) for question in (beginning, whole))
    assert isinstance(first, States) and isinstance(second, States)
    assert beginning.expected == whole.expected
    assert whole.places_P.tolist() == list(range(len(second.hidden_PD)))
    assert first.asked.first_target == second.asked.first_target
    assert (first.asked.targets_P == second.asked.targets_P[beginning.places_P]).all()
    same_PD = second.hidden_PD[torch.from_numpy(beginning.places_P)]
    assert torch.allclose(first.hidden_PD, same_PD, rtol=0, atol=2e-5)
    return beginning, whole


def test_of_a_document(tiny_model: Path, tmp_path: Path) -> None:
    row = Document(sample_id=sample_id_of(IDS), split="train", input_ids_T=IDS)
    beginning, whole = asked(DOCUMENTS, row, tiny_model, tmp_path)
    assert (beginning.num_read, whole.num_read) == (3, 30)
    assert whole.expected == {"first_target": 1, "number of positions": 29}


def test_of_a_conversation_whose_first_span_is_shorter(tiny_model: Path, tmp_path: Path) -> None:
    """It is read up to the token before the second one that is scored, in another turn."""
    row = Conversation(
        sample_id="a" * 24,
        split="train",
        source_id="",
        input_ids_T=IDS,
        scored_S2=np.array([[9, 10], [15, 20]], np.int32),
        is_cut=False,
    )
    beginning, whole = asked(CONVERSATIONS, row, tiny_model, tmp_path)
    assert (beginning.num_read, whole.num_read) == (15, 19)
    assert whole.expected == {"first_target": 9, "number of positions": 6}


def test_of_a_pair_both_responses_begin(tiny_model: Path, tmp_path: Path) -> None:
    row = PreferencePair(
        sample_id="a" * 24,
        split="train",
        prompt_ids_T=IDS[:10],
        chosen_ids_C=IDS[10:15],
        rejected_ids_R=IDS[20:28],
        chosen_finished=True,
        rejected_finished=True,
    )
    beginning, whole = asked(PREFERENCE_PAIRS, row, tiny_model, tmp_path)
    assert beginning.places_P.tolist() == [0, 1, 5, 6]
    assert (beginning.num_read, whole.num_read) == (14, 23)
    assert whole.expected == {"first_target": 10, "number of positions": 13}
