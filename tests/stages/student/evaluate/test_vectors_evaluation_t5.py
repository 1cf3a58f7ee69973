"""A T5's answers after a distiller's vectors against slow forwards, and ``generate()`` from them.

Dimensions: T = tokens, R = the reader's width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.tables.episodes import split_candidates
from stages.student.distiller.vectors import make_task_vectors, read_vectors
from stages.student.evaluate.stage import ALL, FEWER, POOLED, RANDOM, ZERO_SHOT
from stages.student.evaluate.vectors import evaluate_vectors
from stages.student.options import TrainOptions
from tests.fixtures.demonstration_data import MendData, make_mend_data
from tests.fixtures.t5_mend import SlowT5Mend, make_t5_models
from tests.fixtures.tiny_t5 import END, PAD

pytestmark = pytest.mark.slow

OPTIONS = TrainOptions(num_workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    root = tmp_path_factory.mktemp("mend")
    return make_mend_data(root, models=make_t5_models(root, "older", "t5"))


@torch.no_grad()
def best_candidate(slow: SlowT5Mend, prefix_TR: Tensor, row: Any) -> int:
    """The candidate of the largest mean log-prob, one forward a token."""
    query = row.input_ids_T[row.query_start : row.answer_start].tolist()
    inputs_TR = torch.cat([prefix_TR, slow.reader.shared(torch.tensor([*query, END]))])
    scores = []
    for candidate in split_candidates(row.candidate_ids_C, row.candidate_lengths_N):
        total, said = 0.0, [PAD]
        for token in candidate.tolist():
            logits_TV = slow.reader(
                inputs_embeds=inputs_TR[None], decoder_input_ids=torch.tensor([said])
            ).logits[0]
            total += float(logits_TV[-1].log_softmax(-1)[token])
            said.append(token)
        scores.append(total / len(candidate))
    return int(np.argmax(scores))


def test_accuracies_are_those_of_slow_forwards(data: MendData) -> None:
    """On the training split, which has rows enough; an encoder reads ``</s>`` behind each text."""
    tables, models = data.tables("episodes", "exact"), data.models
    found = evaluate_vectors(
        {"distiller": models.distiller}, models.teacher, tables, split="train", options=OPTIONS
    )
    assert list(found) == ["distiller", ZERO_SHOT, RANDOM, POOLED, FEWER, ALL]
    slow = SlowT5Mend(models)
    rows = [row for row in data.rows("episodes").values() if row.split == "train"]
    chosen = [row for row in rows if row.gold >= 0]
    embed = slow.reader.shared
    prefixes: dict[str, Any] = {
        "distiller": slow.vectors,
        ZERO_SHOT: lambda row: torch.zeros(0, 32, dtype=torch.float64),
        ALL: lambda row: embed(torch.tensor(row.input_ids_T[: row.query_start].tolist())),
    }
    for name, prefix_of in prefixes.items():
        right = [best_candidate(slow, prefix_of(row), row) == row.gold for row in chosen]
        (task,) = found[name].tasks
        assert task.num_episodes == len(chosen)
        assert task.numbers["accuracy"] == pytest.approx(np.mean(right)), name
    assert found[ALL].tasks != found[ZERO_SHOT].tasks


def test_zero_shot_of_documents_is_a_query_after_an_empty_text(data: MendData) -> None:
    """The encoder reads ``</s>`` alone."""
    models = data.models
    tables = data.tables("documents", "exact")
    found = evaluate_vectors({"d": models.distiller}, models.teacher, tables, options=OPTIONS)
    slow, kl = SlowT5Mend(models), []
    for row in (row for row in data.rows("documents").values() if row.split == "heldout"):
        said = row.input_ids_T[row.query_start :].tolist()
        with torch.no_grad():
            own_PV = slow.after(slow.reader.shared(torch.tensor([END])), said, row)
            teacher_PV = slow.teacher(row)
        kl.append((teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1))
    positions = found[ZERO_SHOT].positions
    assert positions["kl_to_teacher"] == pytest.approx(torch.cat(kl).mean().item(), rel=2e-3)


def test_generate_goes_on_from_vectors(data: MendData, tmp_path: Path) -> None:
    """The lines of docs/guides/mend.md, against a forward a token."""
    (made,) = make_task_vectors(data.models.distiller, data.root / "episodes", [], tmp_path)
    slow = SlowT5Mend(data.models)
    reader = slow.reader.float()
    vectors_MR = read_vectors(made.file, reader=data.models.teacher)
    for row in list(data.rows("episodes").values())[:3]:
        query_ids_Q = torch.tensor(row.input_ids_T[row.query_start : row.answer_start].tolist())
        text_ids = torch.cat([query_ids_Q, torch.tensor([reader.config.eos_token_id])])
        text_TR = torch.cat([vectors_MR, reader.get_input_embeddings()(text_ids)]).detach()
        mask = torch.ones(1, len(text_TR), dtype=torch.long)
        answer = reader.generate(
            inputs_embeds=text_TR[None], attention_mask=mask, max_new_tokens=6, do_sample=False
        )
        said = [PAD]
        while len(said) < 7 and said[-1] != END:
            with torch.no_grad():
                logits_TV = reader(
                    inputs_embeds=text_TR[None], decoder_input_ids=torch.tensor([said])
                ).logits[0]
            said.append(int(logits_TV[-1].argmax()))
        assert answer[0].tolist() == said
