"""Tokens carried to a larger vocabulary: each to an id of its own, with its probability."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.storage import carried_ids
from benchmarks.storage.carried_ids import PUBLISHED, by_text, read_tekken, read_tiktoken, spread
from benchmarks.storage.vocabularies import CarriedHead
from stages.models.causal_lm.language_head import LanguageHead


class FourTokens:
    """A byte-level tokenizer: a letter, a space and a letter, a newline, and one that is rare."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [["a", "\u0120b", "\u010a", "rare"][id_] for id_ in ids]


@pytest.mark.parametrize("vocab_size", [131_072, 151_936, 262_144])
def test_spread_keeps_ranks_and_the_share_of_each(vocab_size: int) -> None:
    ids_V = spread(49_152, vocab_size).ids_V
    assert (np.diff(ids_V) > 0).all()
    shares = ids_V / vocab_size * 49_152 - np.arange(49_152)
    assert (shares >= 0).all() and (shares < 1).all() and abs(shares.mean() - 0.5) < 0.2


def test_a_token_goes_to_the_id_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [b"x", b" b", b"\n", b"a"]
    lines = [f"{base64.b64encode(text).decode()} {rank}" for rank, text in enumerate(texts)]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines))
    assert read_tiktoken(tmp_path / "qwen.tiktoken")[b" b"] == 1
    monkeypatch.setattr(carried_ids, "fetched", lambda published, cache: tmp_path / "qwen.tiktoken")
    carried = by_text(PUBLISHED[1], FourTokens(), 4, tmp_path)
    assert carried.ids_V[:3].tolist() == [3, 1, 2]
    assert carried.same_text_V.tolist() == [True, True, True, False]
    assert carried.ids_V[3] not in (1, 2, 3)


def test_tekkens_tokens_follow_its_special_ones(tmp_path: Path) -> None:
    tokens = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode()} for n in range(5)]
    content = {"config": {"default_vocab_size": 1003}, "vocab": tokens}
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    assert read_tekken(tmp_path / "tekken.json") == {b"\0": 1000, b"\1": 1001, b"\2": 1002}


def test_carried_logits_have_the_probabilities_of_the_head() -> None:
    weight_VD = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    head = LanguageHead(weight_VD, None, 1.0, None, torch.float32)
    way = spread(7, 40)
    carried = CarriedHead.of(head, way)
    hidden_PD = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    probs_PU = carried.logits(hidden_PD).softmax(1)
    assert carried.vocab_size == 40 and probs_PU.shape == (5, 40)
    torch.testing.assert_close(probs_PU[:, way.ids_V], head.logits(hidden_PD).softmax(1))
    assert float(probs_PU.sum()) == pytest.approx(5.0)
