"""Similarity of demonstrations to the query: texts alone, one at a time, against the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from schemas.errors import ConfigError
from stages.signals.subset_preferences.similarity import SentenceSimilarity
from tests.fixtures.tiny_episodes import make_episode


def alone(model: Any, tokenizer: Any, text: str) -> Any:
    """Return the unit vector of one text, without a batch and so without padding."""
    with torch.no_grad():
        states_TD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    mean_D = states_TD.mean(dim=0)
    return (mean_D / mean_D.norm()).numpy()


def test_similarity_is_the_cosine_of_mean_pooled_inputs(
    tiny_encoder: Path, tiny_model: Path
) -> None:
    episode = make_episode(np.random.default_rng(1), num_demonstrations=5)
    found_M = SentenceSimilarity(tiny_encoder, texts_of=tiny_model).of(episode)
    model, tokenizer = (
        BertModel.from_pretrained(tiny_encoder).eval(),
        AutoTokenizer.from_pretrained(tiny_encoder),
    )
    words = AutoTokenizer.from_pretrained(tiny_model)
    ids = episode.input_ids_T
    query = words.decode(ids[episode.query_start : episode.answer_start].tolist()).strip()
    inputs = [words.decode(ids[a:b].tolist()).strip() for a, b, _ in episode.demonstrations_M3]
    expected = [alone(model, tokenizer, text) @ alone(model, tokenizer, query) for text in inputs]
    np.testing.assert_allclose(found_M, expected, atol=1e-5)
    assert len(set(np.round(found_M, 4))) > 1


def test_a_folder_that_is_no_encoder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.encoder .* cannot be loaded"):
        SentenceSimilarity(tmp_path, texts_of=tiny_model)
