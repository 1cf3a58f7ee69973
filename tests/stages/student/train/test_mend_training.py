"""MEND runs: a cached run is a live run, learning, accumulation, resume, what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch
from schemas.storage.files import sha256_of
from schemas.tables.demonstrations import DEMONSTRATIONS
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.student.distiller.distiller import load_distiller
from stages.student.objectives.mend import MendConfig
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer
from stages.student.train.stage import TrainConfig, TrainStage
from stages.student.train.work import TrainResult, train
from tests.conftest import save_tiny_model
from tests.fixtures.cached_data import VOCAB_SIZE, save_model, write_table
from tests.fixtures.demonstration_data import MendData, SlowMend, make_mend_data, make_models

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=3)
STAGE_1, STAGE_2 = MendConfig(answer_weight=0.0), MendConfig()
CONFIG = TrainConfig(max_steps=6, lr=3e-3, per_device_batch_size=4, objective=STAGE_2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    return make_mend_data(tmp_path_factory.mktemp("mend"))


def run(cache: MendData, output: Path, objective: MendConfig = STAGE_2, **more: Any) -> TrainResult:
    settings = more.pop("settings", {}) | {"objective": objective}
    source = "episodes" if objective.answer_weight else "documents"
    given: dict[str, Any] = {
        "student": cache.models.distiller,
        "reader": cache.models.teacher,
        "data": cache.tables(source, "exact"),
        "heldout": False,
    }
    config = CONFIG.model_copy(update=settings)
    return train(config, output=output, options=OPTIONS, **(given | more))


def losses(result: TrainResult) -> list[float]:
    return [entry["loss"] for entry in result.history]


class LiveTrainer(DistillationTrainer):
    """The teacher in memory, which is the reader too; dense formulas, one row at a time."""

    live: Any
    rows: dict[str, Any]

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        kl, hard = zip(
            *(self._losses(model, self.rows[key]) for key in inputs["keys"]), strict=True
        )
        return torch.cat(kl).mean() + torch.cat(hard).mean()

    def _losses(self, model: Any, row: Any) -> tuple[Tensor, Tensor]:
        shown_L, all_T = (
            torch.as_tensor(np.asarray(ids, np.int64))
            for ids in (row.distiller_ids_L, row.input_ids_T)
        )
        inputs_TD = torch.cat([model.body.embed_tokens(shown_L), model.prompt_embeddings_MD])
        hidden_TD = model.body(inputs_embeds=inputs_TD[None]).last_hidden_state[0]
        vectors_MR = torch.tanh(model.projection(hidden_TD[len(shown_L) :]))
        query_Q = all_T[row.query_start :]
        read_TR = torch.cat([vectors_MR, self.live.model.embed_tokens(query_Q)])
        own_PV = self.live(inputs_embeds=read_TR[None]).logits[0, len(vectors_MR) : -1]
        with torch.no_grad():
            teacher_PV = self.live(input_ids=all_T[None]).logits[0, row.query_start : -1]
        own_PV, teacher_PV = own_PV.log_softmax(-1), teacher_PV.log_softmax(-1)
        answer_A = all_T[row.answer_start :]
        hard_A = -own_PV[-len(answer_A) :].gather(1, answer_A[:, None])[:, 0]
        return (teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1), hard_A


def keys_of(rows: Sequence[Any]) -> dict[str, Any]:
    """Forget every signal: the names of the rows alone."""
    return {"keys": [row["sample_id"] for row in rows]}


def test_the_loss_curve_from_the_cache_is_the_live_one(data: MendData, tmp_path: Path) -> None:
    """Both run the reader; only the teacher's pass is cached, in 11 significant bits."""
    cached = losses(run(data, tmp_path / "cached"))
    args = training_arguments(CONFIG, OPTIONS, tmp_path / "live")
    args.set_save(strategy="no")
    tables = data.tables("episodes", "exact")
    trainer = LiveTrainer(
        load_distiller(data.models.distiller, device=CPU),
        args,
        dataset=open_dataset(tables, split="train"),
        config=CONFIG,
        teacher_head=None,
        on_event=None,
        reader=LlamaForCausalLM.from_pretrained(data.models.teacher),
    )
    trainer.data_collator = keys_of
    trainer.live = LlamaForCausalLM.from_pretrained(data.models.teacher).eval()
    trainer.live.requires_grad_(requires_grad=False)
    trainer.rows = dict(data.rows("episodes"))
    trainer.train()
    live = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len({round(loss, 3) for loss in cached}) == 6
    assert cached == pytest.approx(live, rel=2e-4)


@pytest.mark.parametrize("objective", [STAGE_1, STAGE_2], ids=["stage_1", "stage_2"])
def test_the_distiller_learns_and_the_reader_does_not(
    data: MendData, tmp_path: Path, objective: MendConfig
) -> None:
    """The optimizer holds the distiller's weights alone, and the reader's file stays as it was."""
    before = sha256_of(data.models.teacher / "model.safetensors")
    seen: list[Path] = []
    optimized: list[int] = []

    def look(folder: Path) -> None:
        seen.append(folder)
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        optimized.append(sum(v["exp_avg"].numel() for v in state["state"].values()))

    settings = {"max_steps": 24, "lr": 1e-2}
    result = run(data, tmp_path / "out", objective, settings=settings, on_checkpoint=look)
    assert sum(losses(result)[-6:]) < 0.9 * sum(losses(result)[:6])
    assert ("answer_cross_entropy" in result.history[0]) == (objective is STAGE_2)
    distiller = load_distiller(result.output, device=CPU)
    assert set(optimized) == {sum(p.numel() for p in distiller.parameters())} and len(seen) == 8
    assert sha256_of(data.models.teacher / "model.safetensors") == before
    assert result.metrics["train"]["cross_model"] == 0.0
    record = read_checkpoint(result.output)
    assert record is not None and {"config.json", "tokenizer.json"} <= set(record.files)
    loss = result.history[0]["kl"] + result.history[0].get("answer_cross_entropy", 0.0)
    assert result.history[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_held_out_numbers_are_those_of_a_plain_forward(data: MendData, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", heldout=True)
    slow, rows = SlowMend(data.models), data.rows("episodes")
    kl, nll, hard, agreed = [], [], [], []
    for row in (row for row in rows.values() if row.split == "heldout"):
        with torch.no_grad():
            own_PV, teacher_PV = slow.logprobs(row), slow.teacher(row)
        ids_P = torch.as_tensor(np.asarray(row.input_ids_T[row.query_start + 1 :], np.int64))
        nll_P = -own_PV.gather(1, ids_P[:, None])[:, 0]
        nll.append(nll_P)
        hard.append(nll_P[row.answer_start - len(row.input_ids_T) :])
        kl.append((teacher_PV.exp() * (teacher_PV - own_PV)).sum(-1))
        agreed.append((own_PV.argmax(-1) == teacher_PV.argmax(-1)).double())
    before = result.metrics["before"]
    assert before["tokens"] == sum(map(len, nll))
    assert before["cross_entropy"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)
    assert before["answer_cross_entropy"] == pytest.approx(torch.cat(hard).mean().item(), rel=1e-5)
    assert before["kl_to_teacher"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert before["top1_agreement"] == pytest.approx(torch.cat(agreed).mean().item(), abs=0.03)
    assert result.metrics["after"] != before


def test_accumulated_batches_are_one_batch(data: MendData, tmp_path: Path) -> None:
    """Queries and answers of many lengths: positions and answer tokens each by the step's count."""
    short = {"max_steps": 3}
    split = short | {"per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = run(data, tmp_path / "a", settings=short)
    parts = run(data, tmp_path / "b", settings=split)
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-5)
    for here, there in zip(whole.history, parts.history, strict=True):
        for name in ("num_tokens", "num_samples", "num_answer_tokens"):
            assert here[name] == there[name] > 0


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_four(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 4:
        raise Stopped


def test_a_stopped_run_resumes_with_the_same_losses(data: MendData, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(data, tmp_path / "out", on_event=stop_at_four)
    resumed = run(data, tmp_path / "out")
    assert losses(resumed) == losses(whole)
    bytes_of = [(out / "model.safetensors").read_bytes() for out in (whole.output, resumed.output)]
    assert bytes_of[0] == bytes_of[1]


def test_bfloat16_stays_near_float32(data: MendData, tmp_path: Path) -> None:
    wide, narrow = (
        losses(run(data, tmp_path / dtype, settings={"dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    )
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.05)


def test_stage_2_begins_with_what_stage_1_made(data: MendData, tmp_path: Path) -> None:
    first = run(data, tmp_path / "first", STAGE_1)
    second = run(data, tmp_path / "second", STAGE_2, student=first.output)
    assert losses(second)[0] != losses(run(data, tmp_path / "alone", STAGE_2))[0]


def test_gradient_checkpointing_changes_nothing(data: MendData, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain")
    sparing = run(data, tmp_path / "sparing", settings={"gradient_checkpointing": True})
    assert losses(sparing) == pytest.approx(losses(plain), rel=1e-5)


def test_what_has_no_room_is_one_line(data: MendData, tmp_path: Path) -> None:
    """A window of 64: 62 vectors leave 2 tokens, 20 vectors less than the 45 of a query."""
    row = next(iter(data.rows("documents").values()))
    many = make_models(tmp_path / "many", distiller_width=24, num_vectors=62)
    with pytest.raises(ConfigError, match=r"has \d+ tokens of demonstrations, .* room for 2 b"):
        run(data, tmp_path / "out", STAGE_1, student=many.distiller)
    few = make_models(tmp_path / "few", distiller_width=24, num_vectors=20)
    ids_T = np.arange(1, 51)
    longer = replace(
        row,
        input_ids_T=ids_T,
        query_start=5,
        answer_start=50,
        scored_S2=np.array([[6, 50]]),
        distiller_ids_L=ids_T[:5],
        demonstration_ends_M=np.array([5]),
    )
    folder = tmp_path / "demonstrations"
    longer = replace(longer, sample_id=longer.hashed_id)
    rows = [longer, *list(data.rows("documents").values())[1:]]
    bound = DEMONSTRATIONS.bind(vocab_size=VOCAB_SIZE)
    write_table(folder, bound, rows, data.models.teacher)
    tables = [folder, data.root / "documents_exact"]
    with pytest.raises(ConfigError, match=r"a query of 45 tokens, with 20 vectors more than .* 64"):
        run(data, tmp_path / "out", STAGE_1, student=few.distiller, data=tables)


def test_models_that_do_not_fit_are_one_line(data: MendData, tmp_path: Path) -> None:
    other, strange = tmp_path / "other", tmp_path / "strange"
    save_model(other, seed=9, num_layers=1)
    save_tiny_model(strange, vocab_size=512)
    with pytest.raises(ConfigError, match=r"reader .*other is .*, the distiller was made for"):
        run(data, tmp_path / "out", reader=other)
    with pytest.raises(ConfigError, match="holds llama, expected a distiller"):
        run(data, tmp_path / "out", student=other)
    with pytest.raises(IdentityMismatch, match="has tokenizer"):
        run(data, tmp_path / "out", reader=strange)
    with pytest.raises(ConfigError, match="objective 'mend' needs a demonstrations table"):
        run(data, tmp_path / "out", data=[data.root / "episodes_exact"])
    with pytest.raises(ConfigError, match="objective 'mend' needs a teacher_logits table"):
        run(data, tmp_path / "out", data=[data.root / "episodes"])


@pytest.mark.parametrize(
    ("objective", "reader", "message"),
    [
        ({"loss": "mend"}, None, "objective 'mend' needs 'reader'"),
        ({"loss": "kd"}, "teacher", "'reader' is 'teacher', which objective 'kd' would not use"),
    ],
)
def test_a_recipe_names_a_reader_where_it_is_used(
    objective: dict[str, Any], reader: str | None, message: str
) -> None:
    body = {"stage": "train", "student": "s", "data": ["d"], "max_steps": 1, "reader": reader}
    with pytest.raises(ValueError, match=message):
        TrainStage.model_validate({**body, "objective": objective})
