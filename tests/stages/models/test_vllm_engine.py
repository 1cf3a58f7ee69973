"""The real vLLM engine against plain transformers forward passes; six engine starts in all.

Engines run one after the other in one process, so this file also shows that closing one frees what
the next needs.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from schemas.errors import EngineError
from stages.models.engines.engine import Engine, open_engine
from stages.models.engines.head_check import (
    Reference,
    answers_of,
    check_head,
    probe_sequences,
)
from stages.models.engines.sequences import TokenIds
from stages.models.engines.vllm_engine import VllmEngine
from stages.models.spec import EngineOptions
from tests.fixtures.tiny_recipe import finish
from tests.servers.warm_python import WarmProcess

# Nats, float32 on a CPU: both sum the same products in another order, over 2 layers of width 64.
# Measured 2e-5; any mix-up of rows or positions gives whole nats.
TOLERANCE = 5e-4

MIXED_LENGTHS = (5, 1, 200, 17, 1, 256, 64, 3, 128, 17, 99, 2)


@dataclass(frozen=True)
class Captured:
    """One engine's answers: hidden states in the given order, and for a shuffled one."""

    kind: str
    max_length: int
    hidden: list[torch.Tensor]
    shuffled: list[torch.Tensor]
    again: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    too_long: str
    grown_bytes: int


def mixed_sequences() -> list[TokenIds]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, 512, length).astype(np.uint16) for length in MIXED_LENGTHS]


def shuffled_order() -> list[int]:
    return [int(index) for index in np.random.default_rng(4).permutation(len(MIXED_LENGTHS))]


def resident() -> int:
    """Return this process's own bytes that lie in memory, files left out."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def packed_layers(model: torch.nn.Module) -> set[str]:
    """Name the kinds of layers that vLLM holds in oneDNN's form."""
    linear = torch.nn.functional.linear
    return {
        type(module).__name__
        for module in model.modules()
        if getattr(module, "cpu_linear", linear) is not linear
    }


def capture(engine: Engine, start: int) -> Captured:
    sequences = mixed_sequences()
    hidden = list(engine.hidden_states(sequences))
    with pytest.raises(EngineError) as refusal:
        list(engine.hidden_states([np.zeros(engine.max_length + 1, np.int64)]))
    return Captured(
        kind=engine.kind,
        max_length=engine.max_length,
        hidden=hidden,
        shuffled=list(engine.hidden_states([sequences[i] for i in shuffled_order()])),
        again=list(engine.hidden_states(sequences)),
        logprobs=[engine.head.logits(hidden_TD).log_softmax(-1) for hidden_TD in hidden],
        too_long=str(refusal.value),
        grown_bytes=resident() - start,
    )


def captured_with(folder: Path, cache_dir: Path, **settings: int | bool | str) -> Captured:
    options = EngineOptions.model_validate(
        {"cache_dir": cache_dir, "kv_cache_memory_bytes": 64 << 20, **settings}
    )
    start = resident()
    with open_engine("vllm", folder, dtype="float32", options=options) as engine:
        return capture(engine, start)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Every prompt in one forward pass: no chunked prefill."""
    cache = tmp_path_factory.mktemp("whole")
    return captured_with(
        tiny_model,
        cache,
        enable_chunked_prefill=False,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=2 << 30,
    )


@pytest.fixture(scope="module")
def chunked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Prompts cut into pieces of at most 32 tokens, several requests a step."""
    cache = tmp_path_factory.mktemp("chunked")
    return captured_with(tiny_model, cache, enable_chunked_prefill=True, max_num_batched_tokens=32)


def plain_logprobs(folder: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [
            model(torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0].log_softmax(-1)
            for ids_T in mixed_sequences()
        ]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [tuple(t.shape) for t in got] == [tuple(t.shape) for t in expected]
    for got_TV, expected_TV in zip(got, expected, strict=True):
        torch.testing.assert_close(got_TV, expected_TV, rtol=0, atol=TOLERANCE)


@pytest.mark.vllm
@pytest.mark.slow
def test_logprobs_are_those_of_transformers(
    whole: Captured, chunked: Captured, tiny_model: Path
) -> None:
    expected = plain_logprobs(tiny_model)
    assert (whole.kind, whole.max_length) == ("vllm", 256)
    assert_close(whole.logprobs, expected)
    assert_close(chunked.logprobs, expected)


@pytest.mark.vllm
@pytest.mark.slow
def test_each_request_gets_its_own_rows_in_any_order(whole: Captured, chunked: Captured) -> None:
    for captured in (whole, chunked):
        assert_close(captured.shuffled, [captured.hidden[index] for index in shuffled_order()])


@pytest.mark.vllm
@pytest.mark.slow
def test_the_same_shard_gives_the_same_bits(whole: Captured, chunked: Captured) -> None:
    for captured in (whole, chunked):
        for first, second in zip(captured.hidden, captured.again, strict=True):
            assert torch.equal(first, second)


@pytest.mark.vllm
@pytest.mark.slow
def test_keys_and_values_take_memory_as_they_are_written(whole: Captured) -> None:
    """2 GiB are set aside; libraries, model and the blocks in use take less than half of that."""
    assert whole.grown_bytes < 1 << 30


@pytest.mark.vllm
@pytest.mark.slow
def test_a_sequence_beyond_the_window_is_refused(whole: Captured) -> None:
    assert "has 257 tokens, the engine takes 1 to 256" in whole.too_long


@pytest.mark.vllm
@pytest.mark.slow
def test_another_family_with_a_soft_cap_and_an_engine_that_dies(
    tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "gemma3")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=64,
        max_position_embeddings=256,
        final_logit_softcapping=4.0,
        initializer_range=0.2,
        query_pre_attn_scalar=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3")
    options = EngineOptions(cache_dir=tmp_path / "cache", kv_cache_memory_bytes=64 << 20)
    with open_engine("vllm", tmp_path / "gemma3", dtype="float32", options=options) as engine:
        logprobs = capture(engine, resident()).logprobs
        assert isinstance(engine, VllmEngine)
        (packed,) = engine._llm.apply_model(packed_layers)
        assert "QKVParallelLinear" in packed and "VocabParallelEmbedding" not in packed
        engine._llm.llm_engine.engine_core.shutdown()
        with pytest.raises(EngineError, match="the vLLM engine died on a batch of 1 sequences"):
            list(engine.hidden_states([np.zeros(3, np.int64)]))
        with pytest.raises(EngineError, match="is closed or has died: open it again"):
            list(engine.hidden_states([np.zeros(3, np.int64)]))
    expected = plain_logprobs(tmp_path / "gemma3")
    assert_close(logprobs, expected)
    spread = torch.cat(expected).amax(1) - torch.cat(expected).amin(1)
    assert spread.max() <= 8.0, "the soft-cap holds every logit between -4 and 4"


@pytest.mark.vllm
@pytest.mark.slow
def test_a_long_window_little_memory_and_a_check_without_transformers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is left of the window; the engine is held to its own prompt log-probs."""
    folder = shutil.copytree(tiny_model, tmp_path / "long")
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | {"max_position_embeddings": 1_000_000}))
    options = EngineOptions(
        cache_dir=tmp_path / "cache",
        kv_cache_memory_bytes=64 << 20,
        head_check="engine",
        extra={"max_num_seqs": 8},
    )
    monkeypatch.setattr("stages.models.engines.head_check._computed", None)  # of transformers
    with open_engine("vllm", folder, dtype="float32", options=options) as engine:
        assert isinstance(engine, VllmEngine) and engine.head_check == "engine"
        assert engine._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 8
        assert (256 < engine.max_length < engine.window) and engine.window == 1_000_000
        sequences = mixed_sequences()
        logprobs = [
            engine.head.logits(hidden_TD).log_softmax(-1)
            for hidden_TD in engine.hidden_states(sequences)
        ]
        probes = list(engine.hidden_states(probe_sequences(512)))
        answers = answers_of(iter(probes), replace(engine.head, scale=0.5))
    assert_close(logprobs, plain_logprobs(folder))
    (kept,) = (tmp_path / "cache").iterdir()
    reference = Reference(**json.loads(kept.read_text()))
    assert [len(rows) for rows in reference.token_ids] == [7, 23]
    with pytest.raises(EngineError, match=r"differ from the engine's own by .* nats"):
        check_head(answers, reference, torch.float32, folder, made_by="engine")


@pytest.mark.vllm
@pytest.mark.slow
def test_two_tensor_parallel_ranks_give_the_numbers_of_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # as where nobody sets it
    found = captured_with(tiny_model, tmp_path, tensor_parallel_size=2, head_check="off")
    assert_close(found.logprobs, plain_logprobs(tiny_model))


@pytest.mark.slow
def test_a_missing_vllm_is_named_with_the_extra_to_install(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A process that cannot import vLLM, as on a machine where the extra is not installed."""
    script = f"""
import sys
from pathlib import Path
sys.modules["vllm"] = None
from schemas.errors import EngineError
from stages.models.engines.engine import open_engine
from stages.models.spec import EngineOptions
options = EngineOptions(cache_dir=Path({str(tmp_path)!r}), device="cpu")
try:
    with open_engine("vllm", Path({str(tiny_model)!r}), dtype="float32", options=options):
        pass
except EngineError as error:
    sys.stdout.write(str(error))
"""
    said = finish(WarmProcess(script, ["-c"], dict(os.environ)))
    assert said.code == 0 and "install teachercache[vllm] on a GPU machine" in said.out, said.err
