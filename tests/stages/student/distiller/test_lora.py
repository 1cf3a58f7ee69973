"""LoRA on the distiller's body: maths, folder, what is trained, and names of recipes without it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM, LlamaModel

from schemas.errors import ConfigError
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.spec import ModelSpec
from stages.stage import StepJob
from stages.student.distiller.distiller import Distiller, load_distiller
from stages.student.distiller.reader import load_reader, read_hidden_states
from stages.student.distiller.stage import DistillerInitStage
from stages.student.objectives.mend import MendConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import TrainResult, train
from tests.fixtures.demonstration_data import (
    MendData,
    MendModels,
    cut,
    kept,
    make_mend_data,
    make_models,
)

CPU = torch.device("cpu")
RANK, SCALE = 2, 3.0  # the fixture's alpha is 3 ranks
OPTIONS = TrainOptions(num_workers=0, log_every=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> MendModels:
    """A distiller with a projection and LoRA, both its matrices away from 0."""
    folder = tmp_path_factory.mktemp("lora")
    made = make_models(folder, distiller_width=24, lora_rank=RANK)
    distiller = load_distiller(made.distiller, device=CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in distiller.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    distiller.save_pretrained(made.distiller)
    return made


def loss_of(reader: Any, vectors_MR: Tensor, row: Any) -> Tensor:
    """Minus the log-probs of the query's tokens after vectors, by a plain forward."""
    query_Q = torch.tensor(row.input_ids_T[row.query_start :].tolist())
    inputs_TR = torch.cat([vectors_MR, reader.get_input_embeddings()(query_Q)])
    logprobs_TV = reader(inputs_embeds=inputs_TR[None]).logits[0].log_softmax(-1)
    loss: Tensor = -logprobs_TV[len(vectors_MR) : -1].gather(1, query_Q[1:, None]).sum()
    return loss


def test_gradients_are_those_of_weights_plus_the_product(models: MendModels) -> None:
    """W + (alpha / rank) B A written out in float64: A, B, prompt embeddings, projection; no W."""
    (row, *_) = kept(cut("episodes"))
    distiller = load_distiller(models.distiller, device=CPU).double().train()
    reader = load_reader(models.teacher, device=CPU, dtype=torch.float64)
    ids_L = torch.tensor(row.distiller_ids_L.tolist())
    query_BQ = torch.tensor([row.input_ids_T[row.query_start :].tolist()])
    hidden_BQR = read_hidden_states(
        reader, distiller(ids_L[None], torch.tensor([len(ids_L)])), query_BQ
    )
    logprobs_QV = reader.lm_head(hidden_BQR[0, :-1]).log_softmax(-1)
    (-logprobs_QV.gather(1, query_BQ[0, 1:, None]).sum()).backward()

    stored = load_file(models.distiller / "model.safetensors")
    leaves = {name: tensor.double().requires_grad_() for name, tensor in stored.items()}
    body, slow = plain_body(models), plain_reader(models)
    weights = {}
    for name, _ in body.named_parameters():
        place = f"body.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.default.weight" in leaves:
            a_rI, b_Or = (leaves[f"{place}.lora_{one}.default.weight"] for one in "AB")
            weights[name] = leaves[f"{place}.base_layer.weight"].detach() + SCALE * b_Or @ a_rI
        else:
            weights[name] = leaves[f"{place}.weight"].detach()
    inputs_TD = torch.cat([weights["embed_tokens.weight"][ids_L], leaves["prompt_embeddings_MD"]])
    output = functional_call(body, weights, (), {"inputs_embeds": inputs_TD[None]})
    vectors_MD = output.last_hidden_state[0, len(ids_L) :]
    weight, bias = leaves["projection.weight"], leaves["projection.bias"]
    loss: Any = loss_of(slow, torch.tanh(vectors_MD @ weight.T + bias), row)
    loss.backward()

    found = {name: parameter.grad for name, parameter in distiller.named_parameters()}
    trained = {name for name, grad in found.items() if grad is not None}
    assert trained == {n for n in found if "lora_" in n or not n.startswith("body.")}
    assert sum("lora_A" in name for name in trained) == 7  # every linear layer of one block
    for name in trained:
        expected = leaves[name].grad
        assert expected is not None and float(expected.abs().max()) > 0, name
        torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-10)


def plain_body(models: MendModels) -> Any:
    """The small model, in float64, without LoRA; its weights are given to it."""
    return LlamaModel.from_pretrained(models.teacher.parent / "small", dtype=torch.float64)


def plain_reader(models: MendModels) -> Any:
    return LlamaForCausalLM.from_pretrained(models.teacher, dtype=torch.float64).eval()


def test_saved_and_loaded_it_gives_the_same_logits(models: MendModels, tmp_path: Path) -> None:
    """By the product's way and by transformers' own; the folder's bytes are the same again."""
    (row, *_) = kept(cut("episodes"))
    ids_L = torch.tensor(row.distiller_ids_L.tolist())
    query_BQ = torch.tensor([row.input_ids_T[row.query_start :].tolist()])
    reader = load_reader(models.teacher, device=CPU, dtype=torch.float32)
    first = load_distiller(models.distiller, device=CPU).eval()
    first.save_pretrained(tmp_path)
    second = load_distiller(tmp_path, device=CPU).eval()
    third = Distiller.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = [
            reader.lm_head(
                read_hidden_states(reader, one(ids_L[None], torch.tensor([len(ids_L)])), query_BQ)
            )
            for one in (first, second, third)
        ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    for name in ("config.json", "model.safetensors"):
        assert (models.distiller / name).read_bytes() == (tmp_path / name).read_bytes()


def test_untrained_it_is_the_distiller_without(tmp_path: Path) -> None:
    """B begins at 0, and the seed's projection and prompt embeddings are the same."""
    (row, *_) = kept(cut("episodes"))
    ids_L = torch.tensor(row.distiller_ids_L.tolist())
    vectors = []
    for rank in (0, RANK):
        made = make_models(tmp_path / str(rank), distiller_width=24, lora_rank=rank)
        distiller = load_distiller(made.distiller, device=CPU).eval()
        with torch.no_grad():
            vectors.append(distiller(ids_L[None], torch.tensor([len(ids_L)])))
        assert ("lora_rank" in (made.distiller / "config.json").read_text()) == (rank > 0)
    assert torch.equal(*vectors)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    return make_mend_data(tmp_path_factory.mktemp("mend"), ("exact",), ("episodes",))


def run(data: MendData, models: MendModels, output: Path, **more: Any) -> TrainResult:
    config = TrainConfig(max_steps=4, lr=1e-2, per_device_batch_size=4, objective=MendConfig())
    return train(
        config.model_copy(update=more.pop("settings", {})),
        student=models.distiller,
        reader=models.teacher,
        data=data.tables("episodes", "exact"),
        output=output,
        heldout=False,
        options=OPTIONS,
        **more,
    )


class Stopped(Exception):
    """What a test throws from ``on_event`` to stop a run."""


def stop_at_three(event: dict[str, Any]) -> None:
    if event["event"] == "step" and event["step"] == 3:
        raise Stopped


@pytest.mark.slow
def test_the_body_stays_and_a_stopped_run_goes_on(
    data: MendData, models: MendModels, tmp_path: Path
) -> None:
    optimized: list[int] = []

    def look(folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        optimized.append(sum(v["exp_avg"].numel() for v in state["state"].values()))

    whole = run(data, models, tmp_path / "whole", on_checkpoint=look)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (models.distiller, whole.output)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if "lora_" in n or not n.startswith("body.")}
    assert set(optimized) == {sum(before[name].numel() for name in moved)}
    with pytest.raises(Stopped):
        run(data, models, tmp_path / "out", on_event=stop_at_three)
    resumed = run(data, models, tmp_path / "out")
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]
    files = [folder / "model.safetensors" for folder in (whole.output, resumed.output)]
    assert files[0].read_bytes() == files[1].read_bytes()
    sparing = run(data, models, tmp_path / "less", settings={"gradient_checkpointing": True})
    found = [entry["loss"] for entry in sparing.history]
    assert found == pytest.approx([entry["loss"] for entry in whole.history], rel=1e-5)


def stage_of(**settings: Any) -> DistillerInitStage:
    body = {"stage": "distiller_init", "model": "small", "reader": "reader", "num_vectors": 3}
    return DistillerInitStage.model_validate(body | settings)


def test_a_recipe_without_lora_keeps_its_name() -> None:
    assert stage_of().hashed()["config"] == {"num_vectors": 3, "seed": 0}
    assert stage_of(lora_rank=4).hashed() == stage_of(lora_rank=4, lora_alpha=8).hashed()
    named = [stage_of(**one).hashed()["config"] for one in ({"lora_rank": 4}, {"lora_rank": 8})]
    assert named[0] | {"lora_rank": 8, "lora_alpha": 16.0} == named[1] != named[0]
    with pytest.raises(ValueError, match="lora_alpha is 3 without lora_rank: set lora_rank, or"):
        stage_of(lora_alpha=3)


def test_the_stage_makes_the_same_bytes_every_time(models: MendModels, tmp_path: Path) -> None:
    places = {"small": models.teacher.parent / "small", "reader": models.teacher}
    specs = {name: ModelSpec(path, "float32", "transformers", 32) for name, path in places.items()}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        torch.rand(3)  # what others drew before moves nothing
        stage = stage_of(lora_rank=RANK, lora_alpha=6)
        stage.make(StepJob(tmp_path / name, "f" * 64, {}, (), specs, print, print))
    record = read_checkpoint(tmp_path / "first")
    assert record is not None and record == read_checkpoint(tmp_path / "second")
    made = load_distiller(tmp_path / "first", device=CPU)
    assert made.config.lora_rank == RANK and made.config.lora_alpha == 6.0
    assert sum(p.requires_grad for p in made.body.parameters()) == 14


def test_without_peft_it_is_one_line(models: MendModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora_rank needs PEFT .*: install teachercache\[al"):
        load_distiller(models.distiller, device=CPU)
