"""Distributions of a T5 of each generation, against a plain transformers forward in float64.

Dimensions: P = scored positions of a row, V = vocabulary.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration

from schemas.errors import ConfigError, EngineError
from schemas.tables.demonstrations import Demonstrated
from stages.models.causal_lm.language_head import LanguageHead
from stages.stage import Rejected
from tests.fixtures.demonstration_data import context_of, cut, kept, shard_of
from tests.fixtures.tiny_t5 import END, GENERATIONS, PAD, save_t5
from tests.fixtures.tiny_teacher import ENCODINGS, sampled_of, stage_of

pytestmark = pytest.mark.slow

# Float16 of the table and float32 of the forward, of log-probs down to -20; 7 significant bits.
CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
COARSE: dict[str, Any] = {"rtol": 1 / 128 + 2e-3, "atol": 2e-3}


@pytest.fixture(scope="module", params=GENERATIONS)
def teacher(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("older"), "older")


def made_rows() -> list[Demonstrated]:
    """Rows of documents and of episodes, and one with two spans, of which one is in the query."""
    rows = [*kept(cut("documents"))[:3], *kept(cut("episodes", teacher_tokens=25))[:4]]
    last = rows[-1]
    first, end = last.query_start + 1, len(last.input_ids_T)
    return [*rows, replace(last, scored_S2=np.array([[first, first + 1], [end - 1, end]]))]


def run(teacher: Path, rows: list[Demonstrated], out: Path, kind: str, **options: Any) -> Any:
    with stage_of(kind).open(context_of(teacher, out, **options)) as work:
        return list(work(shard_of(rows)))


def plain(model: Any, row: Demonstrated) -> tuple[int, Tensor, Tensor, Tensor]:
    """First scored token, its and the others' ids, [P, V] log-probs and [P, D] head inputs.

    The encoder reads all up to the answer, or of a document its demonstration, and ``</s>``.
    """
    ids_T = torch.from_numpy(np.asarray(row.input_ids_T, np.int64))
    begins = row.answer_start if row.answer_start < len(ids_T) else row.query_start
    text_ids = torch.cat([ids_T[:begins], torch.tensor([END])])
    decoder_ids = torch.cat([torch.tensor([PAD]), ids_T[begins:-1]])
    with torch.no_grad():
        output = model(
            input_ids=text_ids[None], decoder_input_ids=decoder_ids[None], output_hidden_states=True
        )
    targets = [t for a, b in row.scored_S2 for t in range(int(a), int(b)) if t >= begins]
    places = torch.tensor(targets) - begins
    hidden_PD = output.decoder_hidden_states[-1][0, places]
    return targets[0], ids_T[targets], output.logits[0, places].log_softmax(-1), hidden_PD


@pytest.mark.parametrize("kind", ENCODINGS)
def test_entries_are_those_of_a_forward_of_both_halves(
    teacher: Path, tmp_path: Path, kind: str
) -> None:
    rows = made_rows()
    model = T5ForConditionalGeneration.from_pretrained(teacher, dtype=torch.float64).eval()
    within = COARSE if kind.startswith("threshold") else CLOSE
    found_rows = run(teacher, rows, tmp_path, kind)
    for row, found in zip(rows, found_rows, strict=True):
        first, next_ids_P, logprobs_PV, hidden_PD = plain(model, row)
        next_P = logprobs_PV.gather(1, next_ids_P[:, None])[:, 0]
        entropies_P = -(logprobs_PV.exp() * logprobs_PV).sum(-1)
        assert (found.sample_id, found.first_target) == (row.sample_id, first)
        np.testing.assert_allclose(found.next_token_logprobs_P, next_P, **within)
        np.testing.assert_allclose(found.entropies_P, entropies_P, **within)
        if kind.startswith("exact"):
            half = getattr(found, "hidden_step", 0.0) / 2
            np.testing.assert_allclose(found.hidden_PD, hidden_PD, atol=2e-3 + half, rtol=2e-3)
            head = LanguageHead.load(tmp_path, device="cpu")
            read_PV = head.logits(torch.from_numpy(found.hidden_PD)).log_softmax(-1)
            # each component is off by half a step at most, a log-prob by twice what a logit is
            weights_DV = head.logits(torch.eye(hidden_PD.shape[1]))
            reach = 2 * half * float(weights_DV.abs().sum(0).max())
            np.testing.assert_allclose(read_PV, logprobs_PV, atol=2e-2 + reach, rtol=2e-3)
        elif kind == "top_k":
            top_PK = logprobs_PV.topk(found.logprobs_PK.shape[1]).values
            np.testing.assert_allclose(found.logprobs_PK, top_PK, atol=2e-2)
        else:
            np.testing.assert_allclose(sampled_of(found)[1].sum(1), 1.0, atol=1e-5)
    answered = rows[3]
    assert answered.answer_start == found_rows[3].first_target  # from the start token alone
    assert rows[0].query_start + 1 == found_rows[0].first_target


def test_the_head_reads_the_switch_and_the_matrix_of_each_generation(
    teacher: Path, tmp_path: Path
) -> None:
    """As published, and as transformers saves it again: tied it says of both."""
    model = T5ForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    ids_T = torch.arange(5, 21)
    with torch.no_grad():
        output = model(input_ids=ids_T[None], labels=ids_T[None], output_hidden_states=True)
    is_older = model.lm_head.weight is model.shared.weight
    for folder in (teacher, tmp_path):
        head = LanguageHead.from_model_folder(folder, device="cpu", dtype=torch.float32)
        assert head.scale == (32**-0.5 if is_older else 1.0)
        found_TV = head.logits(output.decoder_hidden_states[-1][0])
        torch.testing.assert_close(found_TV, output.logits[0], rtol=1e-5, atol=1e-5)


def test_mt5_is_read_as_the_newer_generation(tmp_path: Path) -> None:
    folder = save_t5(tmp_path / "mt5", "newer", kind=MT5ForConditionalGeneration)
    model = MT5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    row = made_rows()[3]
    (found,) = run(folder, [row], tmp_path, "top_k")
    _, next_ids_P, logprobs_PV, _ = plain(model, row)
    next_P = logprobs_PV.gather(1, next_ids_P[:, None])[:, 0]
    np.testing.assert_allclose(found.next_token_logprobs_P, next_P, **CLOSE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_start_token_id": None}, "names no decoder_start_token_id, with which"),
        ({"eos_token_id": 7}, ""),  # another end of the text is another model, and no error
    ],
)
def test_what_a_folder_has_to_say(
    older: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(older, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    row = made_rows()[3]
    (before,) = run(older, [row], tmp_path / "a", "top_k")
    if message:
        with pytest.raises(ConfigError, match=message):
            run(folder, [row], tmp_path / "b", "top_k")
        return
    (after,) = run(folder, [row], tmp_path / "b", "top_k")
    assert before.next_token_logprobs_P.tolist() != after.next_token_logprobs_P.tolist()


def test_a_row_that_cannot_be_scored_costs_itself_alone(older: Path, tmp_path: Path) -> None:
    """An older folder names 32 positions; tokens of the frame take one of the encoder's."""
    folder = tmp_path / "copy"
    shutil.copytree(older, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 32}))
    fine, other, strange = made_rows()[3:6]

    def long(num_before: int) -> Demonstrated:
        ids_T, ends = np.arange(1, num_before + 5), [[num_before, num_before + 4]]
        starts: Any = {"query_start": num_before - 2, "answer_start": num_before}
        starts |= {
            "distiller_ids_L": ids_T[:-6],
            "demonstration_ends_M": np.array([len(ids_T) - 6]),
        }
        starts |= {"num_teacher_demonstrations": 1, "num_distiller_demonstrations": 1}
        return replace(other, input_ids_T=ids_T, scored_S2=np.array(ends), **starts)

    in_query = np.array([[fine.query_start + 1, fine.answer_start]])
    rows = [
        long(31),
        long(32),
        replace(fine, scored_S2=in_query),
        replace(strange, input_ids_T=np.where(strange.input_ids_T >= 0, 400, 0)),
    ]
    found = run(folder, rows, tmp_path / "out", "threshold")
    assert [isinstance(row, Rejected) for row in found] == [False, True, True, True]
    assert [row.reason for row in found[1:]] == [
        "longer than the model's window of 32 tokens",
        "none of its scored tokens is one that a decoder says",
        "token id 400 outside the teacher's vocabulary of 307",
    ]
    with pytest.raises(ConfigError, match=r"max_model_len is 9, a row has \d+ tokens"):
        run(folder, rows, tmp_path / "out", "threshold", max_model_len=9)


def test_the_start_up_check_finds_another_head(older: Path, tmp_path: Path) -> None:
    """The reference is kept by the files' times: those of a copy with another head are older."""
    out, folder = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(older, folder)
    row = made_rows()[3]
    run(folder, [row], out, "top_k")
    (kept_file,) = (out / "head_check").glob("*.json")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["shared.weight"] = tensors["shared.weight"] * 1.2
    tensors["lm_head.weight"] = tensors.get("lm_head.weight", tensors["shared.weight"]) * 1.2
    save_file(tensors, weights, metadata={"format": "pt"})
    run(folder, [row], out, "top_k")
    (other,) = (file for file in (out / "head_check").glob("*.json") if file != kept_file)
    shutil.copyfile(kept_file, other)
    with pytest.raises(EngineError, match="log-probs differ from transformers by"):
        run(folder, [row], out, "top_k")
