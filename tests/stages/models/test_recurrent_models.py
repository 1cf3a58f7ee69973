"""Models whose layers keep a state and no keys and values: the numbers of plain forward passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    MambaConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    xLSTMConfig,
)

from stages.models.causal_lm.greedy_decoding import decode_greedily
from stages.models.engines.decoding import Decoding
from stages.models.engines.engine import open_engine
from stages.models.engines.generator import open_generator
from stages.models.spec import EngineOptions

pytestmark = pytest.mark.slow

VOCAB = 64
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "rwkv": RwkvConfig(**SIZES, attention_hidden_size=32, intermediate_size=48, context_length=64),
    "mamba": MambaConfig(**SIZES, state_size=4),
    "xlstm": xLSTMConfig(**SIZES, num_heads=2),
    "recurrent_gemma": RecurrentGemmaConfig(**SIZES, **HEADS, lru_width=32),
    "jamba": JambaConfig(
        **SIZES,
        **HEADS,
        num_key_value_heads=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
        attn_layer_offset=1,
        attn_layer_period=2,
        num_experts=2,
        num_experts_per_tok=1,
    ),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for parameter in model.parameters():  # far from where they begin, so that all of them tell
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def test_states_are_those_of_one_forward_a_sequence(folder: Path, tmp_path: Path) -> None:
    """Sequences of unlike lengths, most with a beginning in common."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCAB, 20)
    sequences = [np.append(shared, rng.integers(0, VOCAB, more)) for more in (3, 9, 4)]
    sequences.append(rng.integers(0, VOCAB, 7))
    counts = [2, 5, 3, 7]
    options = EngineOptions(cache_dir=tmp_path, device="cpu")
    with open_engine("transformers", folder, dtype="float32", options=options) as engine:
        last = engine.last_hidden_states(sequences, counts)
        whole = list(engine.hidden_states(sequences))
        logits = [engine.head.logits(hidden_TD) for hidden_TD in whole]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids_T, count, last_AD, whole_TD, logits_TV in zip(
        sequences, counts, last, whole, logits, strict=True
    ):
        expected_TV = model(input_ids=torch.from_numpy(ids_T)[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=1e-4)
        torch.testing.assert_close(last_AD, whole_TD[-count:], rtol=0, atol=1e-5)


@torch.no_grad()
def plain_greedy(model: Any, ids_T: np.ndarray[Any, Any], steps: int) -> list[int]:
    """The likeliest tokens after one prompt, a whole forward each."""
    ids: list[int] = ids_T.tolist()
    for _ in range(steps):
        ids.append(
            int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        )
    return ids[len(ids_T) :]


def test_prompts_of_unlike_lengths_are_answered_as_each_alone(folder: Path, tmp_path: Path) -> None:
    """No padding is read into a state; two of them are equally long."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, length).astype(np.uint16) for length in (3, 11, 6, 11)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [plain_greedy(model, prompt_T, 6) for prompt_T in prompts]
    with torch.inference_mode():
        assert decode_greedily(model, prompts, ends=(), max_new_tokens=6) == expected
    decoding = Decoding(6, (VOCAB - 1,), temperature=0.0, top_p=1.0, top_k=2)
    options = EngineOptions(cache_dir=tmp_path, device="cpu")
    with open_generator("transformers", folder, dtype="float32", options=options) as generator:
        found = list(generator.generate(prompts, [0, 1, 2, 3], decoding))
    for response, tokens in zip(found, expected, strict=True):
        length = tokens.index(VOCAB - 1) + 1 if VOCAB - 1 in tokens else len(tokens)
        assert response.token_ids_A.tolist() == tokens[:length]
