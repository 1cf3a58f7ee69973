"""The known source: its distributions against every path it can take, its draws, its model folder.

Dimensions: B = sequences, T = tokens, M = topics, V = vocabulary.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.known_source.files import write_source
from benchmarks.known_source.source import KnownSource
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.checkpoints import own_code
from stages.models.engines.engine import open_model
from stages.models.spec import EngineOptions, ModelSpec

V, T = 3, 5


@pytest.fixture
def source() -> KnownSource:
    return KnownSource.drawn(
        vocab_size=V, groups=2, copies=(0.2, 0.7), window=2, exponents=(0.5, 2.0), seed=3
    )


def chance_of(source: KnownSource, ids: tuple[int, ...]) -> float:
    """Sum over topics and over paths: at each token a copy of one before, or a draw."""
    total = 0.0
    for topic, copy in enumerate(source.copy_M):
        windows = [range(max(0, t - source.window), t) for t in range(1, len(ids))]
        for path in itertools.product(*([None, *window] for window in windows)):
            chance = 1.0 / len(source.copy_M) / V
            for t, copied in enumerate(path, start=1):
                if copied is None:
                    ngram_V = source.ngrams_MGV[topic, source.group_V[ids[t - 1]]]
                    chance *= (1.0 - copy) * ngram_V[ids[t]]
                else:
                    chance *= copy / len(windows[t - 1]) * (ids[copied] == ids[t])
            total += chance
    return total


def test_distributions_are_ratios_of_chances_over_every_path(source: KnownSource) -> None:
    ids_BT = np.array(list(itertools.product(range(V), repeat=T)))[::7]
    probs_BTV = source.probs(ids_BT)
    np.testing.assert_allclose(probs_BTV.sum(axis=2), 1.0)
    for row, ids_T in enumerate(ids_BT):
        for t in range(T - 1):
            begun = tuple(ids_T[: t + 1])
            chances_V = np.array([chance_of(source, (*begun, token)) for token in range(V)])
            expected_V = chances_V / chance_of(source, begun)
            np.testing.assert_allclose(probs_BTV[row, t], expected_V, rtol=1e-10)


def test_sequences_come_as_often_as_their_chance_says(source: KnownSource) -> None:
    """Every sequence of three tokens, of 40,000 drawn: within five standard deviations."""
    count = 40_000
    drawn_BT = source.sequences(count, 3, seed=1)
    found = np.bincount(drawn_BT @ [V * V, V, 1], minlength=V**3) / count
    expected = np.array([chance_of(source, ids) for ids in itertools.product(range(V), repeat=3)])
    assert expected.sum() == pytest.approx(1.0)
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected / count))


def test_equal_seeds_draw_equal_sequences(source: KnownSource) -> None:
    one, again, other = (source.sequences(8, 9, seed=seed) for seed in (4, 4, 5))
    assert (one == again).all() and not (one == other).all()


def test_the_product_runs_the_source_as_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code through the transformers engine, rows of unequal lengths side by side."""
    monkeypatch.setattr(own_code, "_trusted", set())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    source = KnownSource.drawn(
        vocab_size=40, groups=4, copies=(0.1, 0.5), window=4, exponents=(0.5, 2.0), seed=0
    )
    folder = tmp_path / "source"
    write_source(folder, source, 24)
    spec = ModelSpec(folder, "float32", "transformers", 40, trust_remote_code=True)
    spec.admit_code()
    ids_BT = source.sequences(3, 24, seed=0)
    rows = [ids_BT[0], ids_BT[1, :3], ids_BT[2, :11]]
    options = EngineOptions(device="cpu", cache_dir=tmp_path / "heads")
    with open_model(spec, options, share_prefixes=False) as engine:
        assert isinstance(engine.head, LanguageHead)
        found = [engine.head.logits(states) for states in engine.hidden_states(rows)]
    for ids_T, logits_TV in zip(rows, found, strict=True):
        expected_TV = source.probs(ids_T[None])[0]
        np.testing.assert_allclose(logits_TV.softmax(-1).numpy(), expected_TV, rtol=1e-4)
