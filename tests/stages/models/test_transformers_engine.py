"""The transformers engine against plain forward passes, and the start-up check of the head."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from schemas.errors import ConfigError, EngineError
from stages.models.engines.engine import open_engine
from stages.models.engines.head_check import chosen_check, reference_of
from stages.models.engines.sequences import TokenIds, windows
from stages.models.spec import EngineOptions

# float32 on one CPU: sums run in another order in padded batches. Logits are of order 10.
TOLERANCE = 1e-4


def mixed_lengths(vocab_size: int, *lengths: int) -> list[TokenIds]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, vocab_size, length).astype(np.uint16) for length in lengths]


def plain_logits(folder: Path, sequences: list[TokenIds]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(torch.from_numpy(s.astype(np.int64))[None]).logits[0] for s in sequences]


def edited_copy(model: Path, folder: Path, **settings: object) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_results_come_in_the_order_given(tiny_model: Path, tmp_path: Path) -> None:
    sequences = mixed_lengths(512, 5, 1, 200, 17, 1, 256, 64, 3, 128, 17)
    options = EngineOptions(cache_dir=tmp_path, max_num_batched_tokens=300, device="cpu")
    with open_engine("transformers", tiny_model, dtype="float32", options=options) as engine:
        assert (engine.kind, engine.max_length) == ("transformers", 256)
        hidden = list(engine.hidden_states(sequences))
        got = [engine.head.logits(hidden_TD) for hidden_TD in hidden]
    for got_TV, expected_TV in zip(got, plain_logits(tiny_model, sequences), strict=True):
        torch.testing.assert_close(got_TV, expected_TV, rtol=0, atol=TOLERANCE)


def test_the_dtype_is_honoured(tiny_model: Path, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path, device="cpu")
    with open_engine("transformers", tiny_model, dtype="bfloat16", options=options) as engine:
        (hidden_TD,) = engine.hidden_states(mixed_lengths(512, 9))
        assert hidden_TD.dtype == engine.head.dtype == torch.bfloat16
        assert engine.head.logits(hidden_TD).dtype == torch.float32


def test_sequences_the_model_cannot_take_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path, max_model_len=16, device="cpu")
    with open_engine("transformers", tiny_model, dtype="float32", options=options) as engine:
        assert engine.max_length == 16
        for wrong, reason in (
            (np.zeros(17, np.int64), "sequence 1 of 2 has 17 tokens, the engine takes 1 to 16"),
            (np.zeros(0, np.int64), "has 0 tokens"),
            (np.full(3, 512), "has token ids from 512 to 512, the model has 0 to 511"),
        ):
            with pytest.raises(EngineError, match=reason):
                list(engine.hidden_states([np.zeros(2, np.int64), wrong]))
        engine.close()
        with pytest.raises(EngineError, match="is closed"):
            list(engine.hidden_states([np.zeros(2, np.int64)]))


def test_settings_that_cannot_work_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path)
    with (
        pytest.raises(ConfigError, match="dtype is 'int8'"),
        open_engine("transformers", tiny_model, dtype="int8", options=options),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="not a transformers model folder"),
        open_engine("transformers", tmp_path, dtype="float32", options=options),
    ):
        pass


@pytest.mark.slow
def test_the_reference_is_computed_once_for_equal_files(tiny_model: Path, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path / "cache", device="cpu")
    for folder, num_references in ((tiny_model, 1), (tiny_model, 1)):
        with open_engine("transformers", folder, dtype="float32", options=options):
            assert len(list((tmp_path / "cache").iterdir())) == num_references
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    with open_engine("transformers", tiny_model, dtype="float32", options=options):
        assert kept.read_bytes() == whole
    copy = edited_copy(tiny_model, tmp_path / "copy", rms_norm_eps=1e-5)
    with open_engine("transformers", copy, dtype="float32", options=options):
        assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
def test_a_head_that_is_not_the_models_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Llama does not read these settings, so a head that obeys them is not the model's."""
    options = EngineOptions(cache_dir=tmp_path / "cache", device="cpu")
    for number, settings in enumerate(({"final_logit_softcapping": 5.0}, {"logit_scale": 0.5})):
        folder = edited_copy(tiny_model, tmp_path / str(number), **settings)
        with (
            pytest.raises(EngineError, match=r"differ from transformers by .* nats"),
            open_engine("transformers", folder, dtype="float32", options=options),
        ):
            pass


@pytest.mark.slow
def test_a_head_read_from_other_weights_is_refused(
    tiny_model_large_vocab: Path, tmp_path: Path
) -> None:
    """The engine meets scaled head weights that the reference has not seen."""
    folder = edited_copy(tiny_model_large_vocab, tmp_path / "copy")
    options = EngineOptions(cache_dir=tmp_path / "cache", device="cpu")
    with open_engine("transformers", folder, dtype="float32", options=options):
        (reference,) = (tmp_path / "cache").iterdir()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_engine("transformers", folder, dtype="float32", options=options):
        (newer,) = set((tmp_path / "cache").iterdir()) - {reference}
    newer.write_bytes(reference.read_bytes())
    with (
        pytest.raises(EngineError, match=r"differ from transformers by .* nats"),
        open_engine("transformers", folder, dtype="float32", options=options),
    ):
        pass


def test_which_check_is_made_follows_the_setting_then_the_memory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(folder: Path, **options: Any) -> str:
        at, device = EngineOptions(**options), torch.device("cpu")
        return chosen_check(folder, dtype=torch.float32, device=device, options=at)

    quantised = edited_copy(
        tiny_model, tmp_path / "fp8", quantization_config={"quant_method": "fp8"}
    )
    assert chosen(tiny_model) == "transformers" and chosen(quantised) == "engine"
    assert chosen(quantised, head_check="transformers") == "transformers"
    size = (tiny_model / "model.safetensors").stat().st_size
    for free, expected in ((size, "transformers"), (size - 1, "engine"), (0, "transformers")):
        monkeypatch.setattr("stages.models.engines.head_check.available_memory", lambda n=free: n)
        assert chosen(tiny_model) == expected
        assert chosen(tiny_model, head_check="off") == "off"


def test_a_check_that_is_switched_off_is_not_made(tiny_model: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_model, tmp_path / "model", logit_scale=0.5)
    options = EngineOptions(cache_dir=tmp_path / "cache", device="cpu", head_check="off")
    with open_engine("transformers", folder, dtype="float32", options=options) as engine:
        assert engine.head_check == "off" and not (tmp_path / "cache").exists()
    options = EngineOptions(cache_dir=tmp_path / "cache", device="cpu", head_check="engine")
    with open_engine("transformers", tiny_model, dtype="float32", options=options) as engine:
        assert engine.head_check == "transformers", "what this engine says is what that says"


def test_windows_bound_the_memory_of_a_shard() -> None:
    sequences = [np.zeros(length, np.int64) for length in (10, 20, 30, 40, 5, 200, 1)]
    cut = list(windows(sequences, bytes_per_token=(1 << 30) // 50))
    assert [[len(s) for s in window] for window in cut] == [[10, 20], [30], [40, 5], [200], [1]]


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4), sys.maxsize),
        (MptConfig(vocab_size=512, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), 64),
    ],
    ids=["bloom", "mpt"],
)
def test_a_model_that_names_no_positions(config: Any, window: int, tmp_path: Path) -> None:
    """ALiBi has none to run out of: numbers are those of a plain forward."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    sequences = mixed_lengths(512, 5, 40, 17)
    options = EngineOptions(cache_dir=tmp_path, device="cpu")
    with open_engine(
        "transformers", tmp_path / "model", dtype="float32", options=options
    ) as engine:
        assert engine.max_length == window
        got = [engine.head.logits(hidden_TD) for hidden_TD in engine.hidden_states(sequences)]
    for got_TV, expected_TV in zip(got, plain_logits(tmp_path / "model", sequences), strict=True):
        torch.testing.assert_close(got_TV, expected_TV, rtol=0, atol=TOLERANCE)


def test_models_of_equal_sizes_and_times_have_references_of_their_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Two folders that an archive unpacked, say: the second was held to what the first one says."""
    for name, seed in (("one", 0), ("other", 1)):
        shutil.copytree(tiny_model, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.model.norm.weight.copy_(torch.rand_like(model.model.norm.weight))
        model.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).iterdir():
            os.utime(file, (1_700_000_000, 1_700_000_000))
    device = torch.device("cpu")
    found = [
        reference_of(
            tmp_path / name, dtype=torch.float32, device=device, cache_dir=tmp_path / "cache"
        )
        for name in ("one", "other", "one")
    ]
    assert found[0] == found[2] != found[1]
