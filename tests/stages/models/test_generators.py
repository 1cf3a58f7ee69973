"""The transformers generator and its draws, against plain forward passes of one sequence.

Dimensions: T = tokens of a prompt, A = generated tokens, V = vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from schemas.errors import ConfigError, EngineError
from stages.models.engines.decoding import Decoding
from stages.models.engines.generator import Generator, open_generator
from stages.models.engines.transformers_generator import TransformersGenerator, draw_tokens
from stages.models.spec import EngineOptions
from tests.fixtures.tiny_generation import (
    GREEDY,
    MAX_TOKENS,
    SAMPLED,
    assert_logprobs_are_plain,
    mixed_prompts,
    plain_model,
    seeds_of,
    slow_greedy,
)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    return plain_model(tiny_model)


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Iterator[Generator]:
    options = EngineOptions(device="cpu", max_num_batched_tokens=256)  # several batches
    with open_generator("transformers", tiny_model, dtype="float32", options=options) as opened:
        yield opened


def test_greedy_tokens_are_those_of_a_slow_loop(generator: Generator, plain: Any) -> None:
    prompts = mixed_prompts()
    responses = list(generator.generate(prompts, seeds_of(prompts), GREEDY))
    expected = [slow_greedy(plain, prompt_T, GREEDY) for prompt_T in prompts]
    assert [response.token_ids_A.tolist() for response in responses] == expected
    assert len({tuple(tokens) for tokens in expected}) > 4


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED])
def test_logprobs_are_those_of_a_plain_forward_pass(
    decoding: Decoding, generator: Generator, plain: Any
) -> None:
    """Raw ones: neither temperature nor top-p moves them."""
    prompts = mixed_prompts()
    responses = generator.generate(prompts, seeds_of(prompts), decoding)
    for prompt_T, response in zip(prompts, responses, strict=True):
        assert_logprobs_are_plain(plain, prompt_T, response)
        assert response.logprobs_A.dtype == response.top_logprobs_AK.dtype == np.float32


def test_every_prompt_gets_its_own_answer_in_any_order(generator: Generator) -> None:
    """Sampled tokens too: a draw depends on its own seed, not on what else is in the batch."""
    prompts = mixed_prompts()
    seeds = seeds_of(prompts)
    order = np.random.default_rng(6).permutation(len(prompts)).tolist()
    for decoding in (GREEDY, SAMPLED):
        straight = list(generator.generate(prompts, seeds, decoding))
        shuffled = generator.generate(
            [prompts[i] for i in order], [seeds[i] for i in order], decoding
        )
        for i, response in zip(order, shuffled, strict=True):
            assert response.token_ids_A.tolist() == straight[i].token_ids_A.tolist()
        again = generator.generate(prompts, seeds, decoding)
        for first, second in zip(straight, again, strict=True):
            assert np.array_equal(first.token_ids_A, second.token_ids_A)
            assert np.array_equal(first.logprobs_A, second.logprobs_A)


def test_only_the_seed_moves_a_draw(generator: Generator) -> None:
    prompts = [mixed_prompts()[0]] * 6
    same = [r.token_ids_A.tolist() for r in generator.generate(prompts, [7] * 6, SAMPLED)]
    assert all(tokens == same[0] for tokens in same)
    unlike = [r.token_ids_A.tolist() for r in generator.generate(prompts, [*range(6)], SAMPLED)]
    assert len({tuple(tokens) for tokens in unlike}) == 6


def test_it_ends_at_the_first_stop_token_and_keeps_it(generator: Generator, plain: Any) -> None:
    """Stop tokens picked from what the model says: after one token, after several, never."""
    prompt_T = mixed_prompts()[3]
    said = slow_greedy(plain, prompt_T, GREEDY)
    late = next(place for place in range(2, MAX_TOKENS) if said[place] not in said[:place])
    for stops, expected in (
        ((said[0], said[late]), said[:1]),
        ((said[late], 511), said[: late + 1]),
        ((511,), said),
    ):
        decoding = Decoding(MAX_TOKENS, stops, temperature=0.0, top_p=1.0, top_k=5)
        (response,) = generator.generate([prompt_T], [0], decoding)
        assert response.token_ids_A.tolist() == expected
        assert response.stopped == (expected[-1] in stops)
        assert response.is_empty == (len(expected) == 1)
        assert len(response.logprobs_A) == len(response.top_ids_AK) == len(expected)


def test_what_the_folder_suggests_for_sampling_is_not_used(
    tiny_model: Path, tmp_path: Path, generator: Generator
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path)
    GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=3.0, min_new_tokens=9, eos_token_id=0
    ).save_pretrained(tmp_path)
    prompts = mixed_prompts()
    plainly = [r.token_ids_A.tolist() for r in generator.generate(prompts, [0] * 8, GREEDY)]
    options = EngineOptions(device="cpu")
    with open_generator("transformers", tmp_path, dtype="float32", options=options) as suggested:
        found = [r.token_ids_A.tolist() for r in suggested.generate(prompts, [0] * 8, GREEDY)]
    assert found == plainly


def test_draws_follow_the_distribution() -> None:
    """A grid of uniform numbers in place of chance: counts are exact to one in the grid."""
    grid = 20_000
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.3, -30.0, 1.1])
    uniforms_B = (torch.arange(grid) + 0.5) / grid
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.0, 1e-9)):
        decoding = Decoding(1, (0,), temperature=temperature, top_p=top_p, top_k=1)
        tokens_B = draw_tokens(logits_V.expand(grid, -1), uniforms_B, decoding)
        counts_V = np.bincount(tokens_B.numpy(), minlength=6)
        expected_V = slow_nucleus(logits_V.tolist(), temperature, top_p)
        np.testing.assert_allclose(counts_V / grid, expected_V, rtol=0, atol=2 / grid)


def slow_nucleus(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Keep the likeliest tokens one by one until they hold ``top_p``."""
    weights = [float(np.exp(logit / temperature)) for logit in logits]
    probs = [weight / sum(weights) for weight in weights]
    kept: list[int] = []
    for token in sorted(range(len(probs)), key=lambda v: -probs[v]):
        if sum(probs[v] for v in kept) < top_p:
            kept.append(token)
    mass = sum(probs[v] for v in kept)
    return [probs[v] / mass if v in kept else 0.0 for v in range(len(probs))]


def test_prompts_it_cannot_take_are_refused(generator: Generator) -> None:
    assert (generator.kind, generator.max_length, generator.vocab_size) == (
        "transformers",
        256,
        512,
    )
    for prompt_T, message in (
        (np.zeros(245, np.int64), "has 245 tokens, the engine takes 1 to 244"),
        (np.zeros(0, np.int64), "has 0 tokens"),
        (np.array([512]), "token ids from 512 to 512, the model has 0 to 511"),
    ):
        with pytest.raises(EngineError, match=message):
            list(generator.generate([prompt_T], [0], GREEDY))
    (whole,) = generator.generate([np.full(244, 9)], [0], GREEDY)
    assert len(whole.token_ids_A) == MAX_TOKENS, "the window is used to its last token"


def test_a_closed_generator_says_so_and_bad_settings_are_one_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = EngineOptions(device="cpu", max_model_len=64)
    with open_generator("transformers", tiny_model, dtype="float32", options=options) as opened:
        assert opened.max_length == 64
    assert isinstance(opened, TransformersGenerator)
    with pytest.raises(EngineError, match="is closed: open it again"):
        list(opened.generate([np.array([3])], [0], GREEDY))
    with (
        pytest.raises(ConfigError, match="dtype is 'int8', expected one of"),
        open_generator("transformers", tiny_model, dtype="int8", options=options),
    ):
        pass
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with (
        pytest.raises(EngineError, match="transformers cannot load"),
        open_generator("transformers", tmp_path, dtype="float32", options=options),
    ):
        pass
