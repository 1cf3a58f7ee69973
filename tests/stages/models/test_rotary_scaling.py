"""Models whose rotary factors change with a row's length: no row is moved by those beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from pipeline.planning.fingerprint import model_identity
from schemas.errors import ConfigError
from stages.models.causal_lm.greedy_decoding import decode_greedily
from stages.models.causal_lm.model import final_hidden_states, last_hidden_states, load_student
from stages.models.checkpoints.rotary_scaling import fixed_window
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer
from stages.models.engines.engine import open_engine
from stages.models.engines.sequences import TokenIds
from stages.models.spec import EngineOptions
from stages.sources.reading.tokens import TextTokenizer, model_limits
from stages.student.distiller.reader import window_of

SHORT, LONG = [1.0] * 16, [1.0 + index for index in range(16)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def save_phi3(folder: Path, **rope: Any) -> Path:
    """A random Phi3 with a window of 256 tokens, of which its short factors serve 64."""
    torch.manual_seed(0)
    config = Phi3Config(
        **SIZES,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={**LONGROPE, "rope_theta": 10_000.0, **rope},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_dynamic_llama(folder: Path) -> Path:
    """A random Llama that stretches its rotary frequencies beyond 64 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=DYNAMIC)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def rows(*lengths: int) -> list[TokenIds]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, 512, length) for length in lengths]


def alone(folder: Path, row_T: TokenIds) -> torch.Tensor:
    """Log-probs of one row by itself, in float64, by a model that has met no other row."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(row_T)[None], use_cache=False).logits[0]
    found: torch.Tensor = logits_TV.log_softmax(-1)
    return found


def by_engine(
    folder: Path, cache: Path, sequences: list[TokenIds], **options: Any
) -> list[torch.Tensor]:
    """Log-probs of those rows that the engine's window has room for."""
    at = EngineOptions(device="cpu", cache_dir=cache, **options)
    with open_engine("transformers", folder, dtype="float32", options=at) as engine:
        fitting = [ids_T for ids_T in sequences if len(ids_T) <= engine.max_length]
        shared = engine.last_hidden_states(fitting, [1] * len(fitting))
        states = list(engine.hidden_states(fitting))
        for state_TD, last_1D in zip(states, shared, strict=True):
            torch.testing.assert_close(state_TD[-1:], last_1D, rtol=0, atol=1e-3)
        return [engine.head.logits(state_TD).log_softmax(-1) for state_TD in states]


def test_no_row_is_moved_by_a_longer_one_or_by_the_size_of_a_batch(tmp_path: Path) -> None:
    """Rows beyond 64 tokens would switch every row of their batch to the long factors."""
    folder = save_phi3(tmp_path / "model")
    sequences = rows(40, 200, 64, 65, 7)
    wanted = [alone(folder, row_T) for row_T in sequences if len(row_T) <= 64]
    for max_num_batched_tokens in (16, 4096):
        limit = {"max_num_batched_tokens": max_num_batched_tokens}
        found = by_engine(folder, tmp_path / "check", sequences, **limit)
        assert len(found) == 3
        for found_TV, wanted_TV in zip(found, wanted, strict=True):
            torch.testing.assert_close(found_TV.double(), wanted_TV, rtol=0, atol=1e-4)


def test_one_set_of_factors_serves_the_whole_window(tmp_path: Path) -> None:
    folder = save_phi3(tmp_path / "model", short_factor=LONG)
    sequences = rows(40, 200, 64, 65, 7)
    found = by_engine(folder, tmp_path / "check", sequences)
    for found_TV, row_T in zip(found, sequences, strict=True):
        torch.testing.assert_close(found_TV.double(), alone(folder, row_T), rtol=0, atol=1e-4)


@pytest.mark.parametrize("save", [save_phi3, save_dynamic_llama])
def test_a_student_takes_no_row_that_would_move_the_others(save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    model = load_student(folder, device=torch.device("cpu")).eval()
    ids_BT = torch.from_numpy(np.stack([*rows(64), *rows(64)]))
    with torch.inference_mode():
        hidden_BTD = final_hidden_states(model, ids_BT, last_layer=1)
        logprobs_TV = model.get_output_embeddings()(hidden_BTD[0]).log_softmax(-1)
        torch.testing.assert_close(
            logprobs_TV.double(), alone(folder, rows(64)[0]), rtol=0, atol=1e-4
        )
        with pytest.raises(ConfigError, match=r"a row of 65 tokens and takes 64: beyond that"):
            final_hidden_states(model, torch.from_numpy(rows(65)[0])[None], last_layer=1)
        assert window_of(model) == 64  # of a frozen reader, which is fed vectors before a query
        embedded_BTD = model.get_input_embeddings()(torch.from_numpy(rows(65)[0])[None])
        with pytest.raises(ConfigError, match=r"a row of 65 tokens and takes 64: beyond that"):
            last_hidden_states(model, last_layer=1, inputs_embeds=embedded_BTD)
        (answer,) = decode_greedily(model, rows(60), ends=(), max_new_tokens=40)
    assert len(answer) == 4


def test_what_a_config_says_of_its_window(tmp_path: Path) -> None:
    original = {"original_max_position_embeddings": 64}
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **original}}, None),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **original}}, None),
        ({"rope_parameters": {**LONGROPE, **original}}, 64),
        ({"rope_parameters": {**LONGROPE, "short_factor": LONG, **original}}, None),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}}, 64),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 256),
        ({"rope_parameters": {"full": {**LONGROPE, **original}, "sliding": {}}}, 64),
        ({"text_config": {"rope_parameters": {**LONGROPE, **original}}}, 64),
    ]
    for settings, window in cases:
        config = {"max_position_embeddings": 256, **original, **settings}
        assert fixed_window(config) == window, settings
    assert fixed_window(Phi3Config().to_dict()) is None
    assert model_limits(save_phi3(tmp_path / "model"), 0) == (512, 64)


def test_documents_longer_than_the_window_are_refused_before_they_are_made(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy_tokenizer(tiny_model, save_phi3(tmp_path / "model"))
    tokenizer = TextTokenizer(tmp_path / "model")
    tokenizer.require(length=64, eos=True)
    with pytest.raises(ConfigError, match=r"takes at most 64 tokens; beyond that its rotary"):
        tokenizer.require(length=65, eos=True)


def test_the_window_is_part_of_such_a_models_name_alone(tiny_model: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_model, save_phi3(tmp_path / "model"))
    moved, same = (
        model_identity(folder, dtype="float32", engine="vllm")
        for folder in (tmp_path / "model", tiny_model)
    )
    assert moved["rotary_window"] == 64 and "rotary_window" not in same


@pytest.mark.vllm
@pytest.mark.slow
def test_a_wider_window_moves_no_number_of_vllm(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM would take the long factors for every row because of ``max_model_len``."""
    folder = save_phi3(tmp_path / "model")
    copy_tokenizer(tiny_model, folder)
    options = EngineOptions(
        cache_dir=tmp_path / "check", kv_cache_memory_bytes=64 << 20, max_model_len=256
    )
    with open_engine("vllm", folder, dtype="float32", options=options) as engine:
        assert engine.max_length == 64
        sequences = rows(40, 64, 7)
        states = list(engine.hidden_states(sequences))
        found = [engine.head.logits(state_TD).log_softmax(-1) for state_TD in states]
    for found_TV, row_T in zip(found, sequences, strict=True):
        torch.testing.assert_close(found_TV.double(), alone(folder, row_T), rtol=0, atol=5e-4)
