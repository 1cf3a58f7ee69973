"""Last states of sequences with text in common: the same numbers, and less of it computed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.models.engines.engine import open_engine
from stages.models.engines.sequences import TokenIds, prefix_groups
from stages.models.spec import EngineOptions

# Float32 on a CPU over 2 layers; keys and values that are read back are the same numbers, summed in
# another order. Measured 4e-6; a state of another position is off by whole units.
TOLERANCE = 2e-4
# Around the multiples of 32, the block of vLLM's cache here, and a sequence that is all of a block.
PROMPT_LENGTHS = (1, 31, 32, 33, 64, 95, 96, 130)


def families() -> tuple[list[TokenIds], list[int]]:
    """Return prompts with and without several endings, shuffled, and how many states are wanted."""
    draw = np.random.default_rng(8)
    sequences, counts = [], []
    for length in PROMPT_LENGTHS:
        prompt = draw.integers(0, 512, length)
        for ending in (0, 1, 2, 2, 5):
            sequences.append(np.concatenate([prompt, draw.integers(0, 512, ending)]))
            counts.append(ending + 1)
    sequences += [sequences[3], sequences[-1][:40]]
    counts += [counts[3], 40]
    order = draw.permutation(len(sequences)).tolist()
    return [sequences[i] for i in order], [counts[i] for i in order]


@pytest.mark.parametrize(
    "kind",
    ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])],
)
def test_last_states_are_those_of_whole_sequences(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, counts = families()
    options = EngineOptions(cache_dir=tmp_path, device="cpu", kv_cache_memory_bytes=64 << 20)
    with open_engine("transformers", tiny_model, dtype="float32", options=options) as engine:
        whole = [h[-n:] for h, n in zip(engine.hidden_states(sequences), counts, strict=True)]
    with open_engine(
        kind,  # type: ignore[arg-type]
        tiny_model,
        dtype="float32",
        options=options,
        share_prefixes=True,
    ) as engine:
        run_again: list[TokenIds] = []  # whole, for the state of a block that was skipped

        def record(given: Sequence[TokenIds]) -> list[torch.Tensor]:
            run_again.extend(given)
            return []

        monkeypatch.setattr(engine, "hidden_states", record)
        last = engine.last_hidden_states(sequences, counts)
        again = engine.last_hidden_states(sequences, counts)
    assert run_again == []
    assert [len(hidden_ND) for hidden_ND in last] == counts
    for got_ND, expected_ND, again_ND in zip(last, whole, again, strict=True):
        torch.testing.assert_close(got_ND, expected_ND, rtol=0, atol=TOLERANCE)
        assert torch.equal(got_ND, again_ND)


def test_every_sequence_is_in_one_group_and_its_wanted_states_after_the_prefix() -> None:
    sequences, counts = families()
    groups = list(prefix_groups(sequences, counts, max_tokens=512))
    assert sorted(i for group in groups for i in group.members) == list(range(len(sequences)))
    for group in groups:
        first = sequences[group.members[0]][: group.shared]
        for index in group.members:
            assert sequences[index][: group.shared].tolist() == first.tolist()
            assert group.shared <= len(sequences[index]) - counts[index]


def test_endings_of_a_long_prompt_cost_their_own_tokens() -> None:
    prompt = np.arange(100)
    sequences = [np.concatenate([prompt, [200 + i, i]]) for i in range(4)]
    (group,) = prefix_groups(sequences, [3] * 4, max_tokens=512)
    assert (len(group.members), group.shared) == (4, 99)
    cut = list(prefix_groups(sequences, [3] * 4, max_tokens=6))
    assert [len(group.members) for group in cut] == [2, 2]
