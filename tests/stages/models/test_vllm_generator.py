"""The real vLLM generator against the transformers one and plain forward passes; two starts.

The second starts after the first is closed, in one process: closing frees what the next needs.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from schemas.errors import EngineError
from schemas.tables.prompted.responses import Responses
from stages.models.engines.decoding import Decoding, Generated
from stages.models.engines.generator import Generator, open_generator
from stages.models.engines.vllm_generator import VllmGenerator
from stages.models.spec import EngineOptions, ModelSpec
from stages.stage import Rejected, StageContext
from tests.fixtures.tiny_generation import (
    EMPTY,
    GREEDY,
    MAX_TOKENS,
    SAMPLED,
    assert_logprobs_are_plain,
    mixed_prompts,
    pair_of,
    plain_model,
    save_counting_student,
    seeds_of,
    shard_of,
    stage_of,
)

ORDER = (5, 2, 7, 0, 1, 6, 4, 3)


@dataclass(frozen=True)
class Written:
    """What one generator said to the same prompts in several ways."""

    kind: str
    max_length: int
    greedy: list[Generated]
    shuffled: list[Generated]
    again: list[Generated]
    sampled: list[Generated]
    sampled_shuffled: list[Generated]
    crowd: list[Generated]
    of_crowd: Generated
    brim: Generated
    ended: list[Generated]
    too_long: str


def stops_of(said: list[int]) -> list[tuple[int, ...]]:
    """Stop tokens that end ``said`` after its first token, after several, and never."""
    late = next(place for place in range(2, MAX_TOKENS) if said[place] not in said[:place])
    return [(said[0], said[late]), (said[late], 511), (511,)]


def write(generator: Generator) -> Written:
    prompts = mixed_prompts()
    seeds = seeds_of(prompts)
    greedy = list(generator.generate(prompts, seeds, GREEDY))
    stops = stops_of(greedy[3].token_ids_A.tolist())
    decodings = [Decoding(MAX_TOKENS, ids, temperature=0.0, top_p=1.0, top_k=5) for ids in stops]
    with pytest.raises(EngineError) as refusal:
        list(generator.generate([np.zeros(245, np.int64)], [0], GREEDY))
    # More tokens than a step of vLLM takes (4,096): a prompt has to wait, or is read in parts.
    crowd = [np.full(240, 9 + number) for number in range(20)]
    moved = ([prompts[i] for i in ORDER], [seeds[i] for i in ORDER])
    return Written(
        kind=generator.kind,
        max_length=generator.max_length,
        greedy=greedy,
        shuffled=list(generator.generate(*moved, GREEDY)),
        again=list(generator.generate(prompts, seeds, GREEDY)),
        sampled=list(generator.generate(prompts, seeds, SAMPLED)),
        sampled_shuffled=list(generator.generate(*moved, SAMPLED)),
        crowd=list(generator.generate(crowd, range(20), SAMPLED)),
        of_crowd=next(generator.generate(crowd[17:18], [17], SAMPLED)),
        brim=next(generator.generate([np.full(244, 9)], [0], GREEDY)),
        ended=[next(generator.generate([prompts[3]], [0], decoding)) for decoding in decodings],
        too_long=str(refusal.value),
    )


@pytest.fixture(scope="module")
def suggesting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a generation config that must move nothing."""
    folder = tmp_path_factory.mktemp("suggesting")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=3.0, top_k=3, eos_token_id=[0, 7]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(suggesting: Path) -> tuple[Written, Written]:
    """Both generators on the same model; then vLLM's own dies."""
    options = EngineOptions(device="cpu", kv_cache_memory_bytes=64 << 20)
    with open_generator("transformers", suggesting, dtype="float32", options=options) as generator:
        by_transformers = write(generator)
    with open_generator("vllm", suggesting, dtype="float32", options=options) as generator:
        by_vllm = write(generator)
        assert isinstance(generator, VllmGenerator)
        generator._llm.llm_engine.engine_core.shutdown()
        with pytest.raises(EngineError, match="the vLLM engine died on a batch of 1 prompts"):
            list(generator.generate([np.array([3])], [0], GREEDY))
        with pytest.raises(EngineError, match="is closed or has died: open it again"):
            list(generator.generate([np.array([3])], [0], GREEDY))
    return by_vllm, by_transformers


def tokens_of(responses: list[Generated]) -> list[list[int]]:
    return [response.token_ids_A.tolist() for response in responses]


@pytest.mark.vllm
@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(written: tuple[Written, Written]) -> None:
    by_vllm, by_transformers = written
    assert (by_vllm.kind, by_vllm.max_length) == ("vllm", 256)
    assert by_vllm.too_long == by_transformers.too_long
    assert len(by_vllm.brim.token_ids_A) == MAX_TOKENS, "the window is used to its last token"
    assert tokens_of(by_vllm.greedy) == tokens_of(by_transformers.greedy)
    assert tokens_of(by_vllm.ended) == tokens_of(by_transformers.ended)


@pytest.mark.vllm
@pytest.mark.slow
def test_logprobs_are_those_of_a_plain_forward_pass(
    written: tuple[Written, Written], tiny_model: Path
) -> None:
    by_vllm, _ = written
    plain = plain_model(tiny_model)
    for responses in (by_vllm.greedy, by_vllm.sampled):
        for prompt_T, response in zip(mixed_prompts(), responses, strict=True):
            assert_logprobs_are_plain(plain, prompt_T, response)
            assert response.logprobs_A.dtype == response.top_logprobs_AK.dtype == np.float32
    drawn = np.concatenate([response.token_ids_A for response in by_vllm.sampled])
    top_AK = np.concatenate([response.top_ids_AK for response in by_vllm.sampled])
    kept = (top_AK == drawn[:, None]).any(axis=1)
    assert kept.any() and not kept.all(), "tokens within the likeliest, and outside"


@pytest.mark.vllm
@pytest.mark.slow
def test_every_prompt_gets_its_own_answer_and_a_re_run_the_same_bits(
    written: tuple[Written, Written],
) -> None:
    by_vllm, _ = written
    greedy, sampled = tokens_of(by_vllm.greedy), tokens_of(by_vllm.sampled)
    assert tokens_of(by_vllm.shuffled) == [greedy[i] for i in ORDER]
    assert tokens_of(by_vllm.sampled_shuffled) == [sampled[i] for i in ORDER]
    assert sampled != greedy
    for first, second in zip(by_vllm.greedy, by_vllm.again, strict=True):
        assert np.array_equal(first.token_ids_A, second.token_ids_A)
        assert np.array_equal(first.logprobs_A, second.logprobs_A)
        assert np.array_equal(first.top_logprobs_AK, second.top_logprobs_AK)


@pytest.mark.vllm
@pytest.mark.slow
def test_more_prompts_than_a_step_takes_are_sampled_as_each_alone(
    written: tuple[Written, Written],
) -> None:
    by_vllm, _ = written
    assert len(by_vllm.crowd) == 20 and all(len(one.token_ids_A) for one in by_vllm.crowd)
    assert tokens_of([by_vllm.of_crowd]) == tokens_of(by_vllm.crowd[17:18])


@pytest.mark.vllm
@pytest.mark.slow
def test_a_response_ends_at_its_stop_token_and_nowhere_else(
    written: tuple[Written, Written],
) -> None:
    """Not at the end of text that config and tokenizer name (0), nor at the folder's other (7)."""
    by_vllm, _ = written
    empty, stopped, whole = by_vllm.ended
    said = by_vllm.greedy[3].token_ids_A.tolist()
    assert empty.is_empty and empty.token_ids_A.tolist() == said[:1]
    assert stopped.stopped and stopped.token_ids_A.tolist() == said[: len(stopped.token_ids_A)]
    assert 2 < len(stopped.token_ids_A) <= MAX_TOKENS
    assert not whole.stopped and len(whole.token_ids_A) == MAX_TOKENS


@pytest.mark.vllm
@pytest.mark.slow
def test_the_stage_on_a_counting_student(written: tuple[Written, Written], tmp_path: Path) -> None:
    """The whole stage; vLLM starts again here, after the one that died."""
    save_counting_student(tmp_path)
    options = EngineOptions(device="cpu", kv_cache_memory_bytes=64 << 20)
    spec = ModelSpec(tmp_path, "float32", "vllm", 64)
    context = StageContext(tmp_path, 64, {"student": spec}, options, "preference_pairs")
    prompts = [[9, 9, 37], [5, 39], [1, 2, 3, 4, 20], [3] * 2040 + [20]]
    with stage_of(n=2, temperature=1.0).open(context) as work:
        rows = list(work(shard_of([pair_of(p, str(i)) for i, p in enumerate(prompts)])))
    first, empty, third, too_long = rows
    assert isinstance(first, Responses) and isinstance(third, Responses)
    assert first.response_ids_A.tolist() == [38, 39, 40] * 2
    assert first.finish_reasons_N.tolist() == [1, 1]
    assert third.response_ids_A.tolist() == [*range(21, 29)] * 2
    assert third.finish_reasons_N.tolist() == [0, 0]
    assert third.top_ids_AK.shape == (16, 16)
    assert empty == Rejected("1", EMPTY)
    assert isinstance(too_long, Rejected)
    assert "less than max_tokens 8 of the model's window of 2048" in too_long.reason
