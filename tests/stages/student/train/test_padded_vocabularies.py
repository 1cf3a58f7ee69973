"""One tokenizer, matrices of unlike heights: it trains, and what is dropped is counted.

Dimensions: P = scored positions, V = rows of the teacher.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import IdentityMismatch
from stages.models.causal_lm.response_measures import mean_kl
from stages.models.checkpoints.tokenizer_identity import num_token_ids
from stages.student.evaluate.positions import evaluate
from stages.student.evaluate.vectors import evaluate_vectors
from stages.student.objectives.mend import MendConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data, save_model
from tests.fixtures.demonstration_data import SlowMend, make_mend_data

pytestmark = pytest.mark.slow

TALL = VOCAB_SIZE + 13
OPTIONS = TrainOptions(num_workers=0, log_every=1)
CONFIG = TrainConfig(max_steps=2, per_device_batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    """A teacher with 13 rows that no token uses, and a student without any."""
    return make_cached_data(tmp_path_factory.mktemp("cache"), teacher_rows=TALL)


@pytest.fixture(scope="module")
def plain(data: CachedData) -> dict[str, float]:
    """KL to the teacher without padding ids, and their mass, by float64 forwards."""
    models = [
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (data.teacher, data.student)
    ]
    kl, dropped = [], []
    dataset = open_dataset([data.documents], split="heldout")
    for index in range(len(dataset)):
        ids_T = torch.as_tensor(dataset[index]["input_ids_T"].astype(np.int64))
        with torch.no_grad():
            teacher_PV, student_PV = (model(ids_T[None]).logits[0, :-1] for model in models)
        p_PV = teacher_PV.softmax(1)
        q_PV = p_PV[:, :VOCAB_SIZE] / p_PV[:, :VOCAB_SIZE].sum(1, keepdim=True)
        kl += (q_PV * (q_PV.log() - student_PV.log_softmax(1))).sum(1).tolist()
        dropped += p_PV[:, VOCAB_SIZE:].sum(1).tolist()
    return {"kl_to_teacher": float(np.mean(kl)), "dropped_mass": float(np.mean(dropped))}


@pytest.mark.parametrize("encoding", ["exact", "threshold", "top_k"])
def test_a_shorter_student_trains_on_what_tokens_have(
    data: CachedData, plain: dict[str, float], encoding: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tables = data.tables(encoding)
    result = train(CONFIG, student=data.student, data=tables, output=out, options=OPTIONS)
    before, after = result.metrics["before"], result.metrics["after"]
    # Of top_k only what is among the 8 kept can be told; of threshold it is a draw.
    off = {"exact": 1e-3, "threshold": 0.5, "top_k": 0.9}[encoding]
    assert plain["dropped_mass"] > 0.005
    assert before["dropped_mass"] == pytest.approx(plain["dropped_mass"], rel=off)
    kl = {"exact": 2e-3, "threshold": 0.3, "top_k": 10.0}[encoding]
    assert before["kl_to_teacher"] == pytest.approx(plain["kl_to_teacher"], abs=kl)
    assert after["kl_to_teacher"] < before["kl_to_teacher"]
    assert all(0 < entry["dropped_mass"] < 0.2 for entry in result.history)


@pytest.mark.parametrize("encoding", ["exact", "threshold"])
def test_a_distiller_learns_what_tokens_have(encoding: str, tmp_path: Path) -> None:
    """Its reader is the teacher with the padding, its own matrix has none; queries alone count."""
    cache = make_mend_data(tmp_path / "mend", [encoding], ["episodes"], teacher_rows=TALL)
    tables, models = cache.tables("episodes", encoding), cache.models
    slow, kl, dropped = SlowMend(models), [], []
    rows = [row for row in cache.rows("episodes").values() if row.split == "heldout"]
    for row in rows:
        p_PV, own_PV = slow.teacher(row).exp(), slow.logprobs(row).detach()[:, :VOCAB_SIZE]
        q_PV = p_PV[:, :VOCAB_SIZE] / p_PV[:, :VOCAB_SIZE].sum(1, keepdim=True)
        kl += (q_PV * (q_PV.log() - own_PV)).sum(1).tolist()
        dropped += p_PV[:, VOCAB_SIZE:].sum(1).tolist()
    reader, config = models.teacher, CONFIG.model_copy(update={"objective": MendConfig()})
    out = tmp_path / "out"
    given = {"student": models.distiller, "reader": reader, "data": tables, "options": OPTIONS}
    result = train(config, output=out, **given)  # type: ignore[arg-type]
    before = result.metrics["before"]
    off = {"exact": 1e-3, "threshold": 0.8}[encoding]
    assert before["tokens"] == len(kl) and float(np.mean(dropped)) > 0.001
    assert before["dropped_mass"] == pytest.approx(float(np.mean(dropped)), rel=off)
    within = {"exact": 2e-3, "threshold": 0.3}[encoding]
    assert before["kl_to_teacher"] == pytest.approx(float(np.mean(kl)), abs=within)
    assert all(0 < entry["dropped_mass"] < 0.2 for entry in result.history)
    reports = evaluate_vectors({"distiller": models.distiller}, reader, tables, options=OPTIONS)
    assert reports["distiller"].summary()["kl_to_teacher"] == pytest.approx(before["kl_to_teacher"])


def test_a_taller_student_counts_its_padding_in_its_own_softmax(
    data: CachedData, tmp_path: Path
) -> None:
    """It is there wherever the student is run, and training makes it less likely."""
    save_model(tmp_path / "tall", seed=2, num_layers=1, rows=TALL + 5)
    found = evaluate(tmp_path / "tall", data.tables("exact"))
    short = evaluate(data.student, data.tables("exact"))
    assert found["dropped_mass"] == pytest.approx(short["dropped_mass"], rel=1e-6)
    out = tmp_path / "out"
    config = TrainConfig(max_steps=6, per_device_batch_size=8, lr=1e-2)
    tables = data.tables("threshold")
    train(config, student=tmp_path / "tall", data=tables, output=out, options=OPTIONS)
    ids_T = torch.arange(20)
    masses = [
        LlamaForCausalLM.from_pretrained(folder)(ids_T[None]).logits.softmax(-1)[..., VOCAB_SIZE:]
        for folder in (tmp_path / "tall", out)
    ]
    assert float(masses[1].sum()) < 0.9 * float(masses[0].sum())


def test_a_student_that_lacks_a_token_is_refused(data: CachedData, tmp_path: Path) -> None:
    save_model(tmp_path / "small", seed=2, num_layers=1, rows=VOCAB_SIZE - 1)
    with pytest.raises(IdentityMismatch, match="vocabulary of 306, the data's ids need 307"):
        evaluate(tmp_path / "small", data.tables("threshold"))


def test_the_kl_of_students_of_two_heights_is_that_of_the_tokens(
    data: CachedData, tmp_path: Path
) -> None:
    save_model(tmp_path / "tall", seed=3, num_layers=1, rows=TALL)
    one, other = (
        LlamaForCausalLM.from_pretrained(folder).eval()
        for folder in (data.student, tmp_path / "tall")
    )
    prompt_T, response_T = np.arange(5), np.arange(7, 16)
    with torch.inference_mode():
        found = mean_kl(one, other, [(prompt_T, response_T)], batch_size=2, num_ids=VOCAB_SIZE)
        ids_T = torch.from_numpy(np.concatenate([prompt_T, response_T[:-1]]))
        first, second = (
            model.double()(ids_T[None]).logits[0, 4:, :VOCAB_SIZE].log_softmax(1)
            for model in (one, other)
        )
    expected = (first.exp() * (first - second)).sum(1).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_how_many_ids_a_tokenizer_uses(data: CachedData, tmp_path: Path) -> None:
    """The largest id decides: of the vocabulary, an added token, or the settings' list."""
    assert num_token_ids(data.student) == VOCAB_SIZE
    assert num_token_ids(tmp_path) is None
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}')
    assert num_token_ids(tmp_path) == 2
    file.write_text('{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7}]}')
    assert num_token_ids(tmp_path) == 8
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"9": {}}}')
    assert num_token_ids(tmp_path) == 10
