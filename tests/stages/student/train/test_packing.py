"""Rows end to end in one: what each says is what it says alone, whatever stands before it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError
from stages.models.causal_lm.model import last_layer_of, load_student, scored_hidden_states
from stages.models.causal_lm.packed_rows import require_packs
from stages.student.batches.signals import Collator
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig, TrainStage
from stages.student.train.work import train
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data

OPTIONS = TrainOptions(num_workers=0, log_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def test_packed_states_are_those_of_single_rows(data: CachedData) -> None:
    """In float64, of rows of several lengths; nothing is padding, and no row sees another."""
    dataset = open_dataset(data.tables("threshold"))
    rows = [dataset[index] for index in range(6)]
    assert len({len(row["input_ids_T"]) for row in rows}) > 2
    packed: Any = Collator("threshold", VOCAB_SIZE, packing=True)(rows)
    plain = Collator("threshold", VOCAB_SIZE)(rows)
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids_T"]) for row in rows))
    assert packed["num_samples"] == len(rows)
    model = LlamaForCausalLM.from_pretrained(data.student, dtype=torch.float64).eval()
    with torch.no_grad():
        found_ND, expected_ND = (
            scored_hidden_states(model, batch, last_layer=last_layer_of(model))
            for batch in (packed, plain)
        )
        apart = [
            model.model(torch.from_numpy(row["input_ids_T"].astype(np.int64))[None]) for row in rows
        ]
    torch.testing.assert_close(found_ND, expected_ND, rtol=1e-9, atol=1e-9)
    alone_ND = torch.cat([output.last_hidden_state[0, :-1] for output in apart])
    torch.testing.assert_close(found_ND, alone_ND, rtol=1e-9, atol=1e-9)
    for name in set(plain) - {"input_ids", "labels", "positions_N"}:
        torch.testing.assert_close(packed[name], plain[name])


@pytest.mark.parametrize("loss", ["kd", "cross_entropy"])
def test_a_packed_run_has_the_losses_of_a_padded_one(
    data: CachedData, loss: str, tmp_path: Path
) -> None:
    runs = []
    for packing in (False, True):
        config = TrainConfig.model_validate(
            {
                "objective": {"loss": loss},
                "max_steps": 3,
                "per_device_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "packing": packing,
            }
        )
        out = tmp_path / str(packing)
        tables = data.tables("threshold")
        runs.append(train(config, student=data.student, data=tables, output=out, options=OPTIONS))
    for padded, packed in zip(runs[0].history, runs[1].history, strict=True):
        for name in ("loss", "num_tokens", "num_samples", "grad_norm"):
            assert packed[name] == pytest.approx(padded[name], rel=2e-4), name


def test_a_model_that_reads_on_is_refused(data: CachedData, tmp_path: Path) -> None:
    """Bloom's biases are by distance in the row, so the second row would see the first."""
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=4)
    torch.manual_seed(0)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    model = load_student(tmp_path / "bloom", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"packing: student bloom .* reads rows .* as one"):
        require_packs(model, "student bloom")
    require_packs(load_student(data.student, device=torch.device("cpu")), "student")


def test_packing_is_hashed_where_it_is_set_and_refused_where_rows_are_several() -> None:
    body = {"stage": "train", "student": "s", "data": ["d"], "max_steps": 2}
    plain, packed = (
        TrainStage.model_validate(body | {"packing": packing}).hashed() for packing in (False, True)
    )
    assert "packing" not in plain["config"] and packed["config"]["packing"] is True
    with pytest.raises(ValidationError, match="packing: objective 'dckd' reads several sequences"):
        TrainStage.model_validate(body | {"packing": True, "objective": {"loss": "dckd"}})
