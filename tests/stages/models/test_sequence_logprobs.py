"""Log-probs of answers: the head against dense float64 autograd, sequences against plain forwards.

Dimensions: M = (row, token) pairs, R = rows, V = vocabulary, D = hidden width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from stages.models.causal_lm.chunked_loss import StudentHead
from stages.models.causal_lm.sequence_logprobs import (
    Continuations,
    continuation_logprobs,
    gathered_logprobs,
    sequence_logprobs,
)
from tests.fixtures.cached_data import VOCAB_SIZE, save_model
from tests.fixtures.episode_data import slow_logprob, successor_model

R, V, D = 6, 31, 5
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.37},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 1.7, "softcap": 2.5},
}
# Rows in no order, one without a pair, one with many, one pair twice.
ROWS = torch.tensor([4, 0, 4, 2, 4, 5, 0, 4, 2, 4])
TOKENS = torch.tensor([1, 30, 2, 7, 3, 0, 30, 4, 8, 1])


def make_head(
    *, bias: bool = False, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, StudentHead, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(R, D), (V, D), *([(V,)] if bias else [])]
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    head = StudentHead(tensors[1], tensors[2] if bias else None, scale, softcap)
    return tensors[0], head, tensors


def dense(hidden_RD: Tensor, head: StudentHead) -> Tensor:
    """The obvious way, all [R, V] at once."""
    logits_RV = hidden_RD @ head.weight_VD.T
    if head.bias_V is not None:
        logits_RV = logits_RV + head.bias_V
    logits_RV = logits_RV * head.scale
    if head.softcap is not None:
        logits_RV = head.softcap * torch.tanh(logits_RV / head.softcap)
    return logits_RV.log_softmax(-1)[ROWS, TOKENS]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_bytes", [1, 4000, None])
def test_gathered_logprobs_match_dense_autograd(kind: str, chunk_bytes: int | None) -> None:
    hidden_RD, head, inputs = make_head(**HEADS[kind])
    found_M = gathered_logprobs(
        hidden_RD, head, ROWS, TOKENS, dtype=torch.float64, chunk_bytes=chunk_bytes
    )
    wanted_M = dense(hidden_RD, head)
    torch.testing.assert_close(found_M, wanted_M, rtol=1e-12, atol=1e-12)
    weights_M = torch.linspace(-2, 3, len(ROWS), dtype=torch.float64)
    found = torch.autograd.grad((found_M * weights_M).sum(), inputs)
    wanted = torch.autograd.grad((wanted_M * weights_M).sum(), inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_match_finite_differences(kind: str) -> None:
    _, head, inputs = make_head(**HEADS[kind])

    def logprobs(hidden_RD: Tensor, weight_VD: Tensor, *bias: Tensor) -> Tensor:
        own = StudentHead(weight_VD, bias[0] if bias else None, head.scale, head.softcap)
        return gathered_logprobs(
            hidden_RD, own, ROWS[:4], TOKENS[:4], dtype=torch.float64, chunk_bytes=4000
        )

    assert torch.autograd.gradcheck(logprobs, inputs)


def test_bfloat16_products_keep_float32_sums() -> None:
    """8 bits in the products: some hundredths of a nat on logits of this size."""
    hidden_RD, head, _ = make_head()
    narrow_head = StudentHead(head.weight_VD.detach().float().requires_grad_())
    narrow_M = gathered_logprobs(
        hidden_RD.detach().float(), narrow_head, ROWS, TOKENS, dtype=torch.bfloat16
    )
    assert narrow_M.dtype == torch.float32
    torch.testing.assert_close(narrow_M.double(), dense(hidden_RD, head), rtol=0.0, atol=0.06)
    torch.autograd.backward(narrow_M.sum())
    assert narrow_head.weight_VD.grad is not None
    assert narrow_head.weight_VD.grad.dtype == torch.float32


def test_no_block_exceeds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and, as often again, backward: no softmax of more rows than the budget allows."""
    hidden_RD, head, inputs = make_head()
    seen: list[int] = []
    original = torch.log_softmax

    def watched(values: Tensor, *, dim: int, dtype: torch.dtype) -> Tensor:
        seen.append(values.numel() * 8 * 5)
        return original(values, dim=dim, dtype=dtype)

    monkeypatch.setattr(torch, "log_softmax", watched)
    found_M = gathered_logprobs(
        hidden_RD, head, ROWS, TOKENS, dtype=torch.float64, chunk_bytes=3000
    )
    forward = len(seen)
    torch.autograd.grad(found_M.sum(), inputs)
    assert forward == R // 2 and len(seen) == 2 * forward and max(seen) <= 3000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=3, num_layers=2)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)


def some_sequences() -> tuple[list[Any], list[int]]:
    """Mixed lengths, one twice, one that begins another, answers of one token and of many."""
    rng = np.random.default_rng(5)
    sequences = [rng.integers(0, VOCAB_SIZE, length) for length in (5, 9, 9, 14, 3, 21)]
    sequences += [sequences[1].copy(), np.concatenate([sequences[0], [4, 8]])]
    return sequences, [4, 5, 8, 1, 2, 18, 5, 5]


def gradients_of(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 40, 10_000])
@pytest.mark.parametrize("layer_checkpoints", [False, True])
def test_sequences_match_one_forward_a_token(
    model: Any, micro_batch_tokens: int, layer_checkpoints: bool
) -> None:
    """Gradients to 1e-4: whatever its dtype, a llama's norms and rotations are float32."""
    sequences, starts = some_sequences()
    wanted = torch.stack(
        [
            slow_logprob(model, ids_T[:start].tolist(), ids_T[start:].tolist())
            for ids_T, start in zip(sequences, starts, strict=True)
        ]
    )
    model.train()
    if layer_checkpoints:
        model.gradient_checkpointing_enable()
    try:
        found = sequence_logprobs(
            model, sequences, starts, dtype=torch.float64, micro_batch_tokens=micro_batch_tokens
        )
        weights = torch.linspace(-1, 2, len(starts), dtype=torch.float64)
        ours = gradients_of(model, (found * weights).sum())
    finally:
        model.gradient_checkpointing_disable()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for here, there in zip(ours, gradients_of(model, (wanted * weights).sum()), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def rows_fed(model: Any, asked: Sequence[Continuations], micro_batch_tokens: int) -> list[Any]:
    shapes: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    with torch.no_grad():
        continuation_logprobs(model, asked, micro_batch_tokens=micro_batch_tokens)
    hook.remove()
    return shapes


def test_what_is_shared_is_fed_once(model: Any) -> None:
    """Single-token answers take the prompt alone, and lie on a longer row that begins with it."""
    prompt_T = np.arange(1, 9)
    singles = Continuations(prompt_T, np.arange(20, 320) % VOCAB_SIZE, np.ones(300, np.int64))
    assert rows_fed(model, [singles, singles], 10_000) == [(1, 8)]
    pair = Continuations(prompt_T, np.array([7, 9, 11, 12]), np.array([1, 3]))
    assert rows_fed(model, [singles, pair], 10_000) == [(1, 10)]


def test_micro_batches_are_bounded_and_of_like_lengths(model: Any) -> None:
    sequences, starts = some_sequences()
    asked = [
        Continuations(ids_T[:start], ids_T[start:], np.array([len(ids_T) - start]))
        for ids_T, start in zip(sequences, starts, strict=True)
    ]
    assert rows_fed(model, asked, 10_000) == [(1, 2), (3, 8), (1, 13), (1, 20)]
    assert rows_fed(model, asked, 20) == [(1, 2), (1, 6), (2, 8), (1, 13), (1, 20)]
    assert rows_fed(model, asked, 1) == [(1, n) for n in (2, 6, 8, 8, 13, 20)]


def test_activations_of_one_micro_batch_live_at_a_time(model: Any) -> None:
    """The last is differentiated first; each of the others is made again, then differentiated."""
    sequences, starts = some_sequences()
    model.train()
    order: list[str] = []
    layer = model.model.layers[-1]
    hooks = [
        layer.register_forward_pre_hook(lambda *_: order.append("forward")),
        layer.register_full_backward_pre_hook(lambda *_: order.append("backward")),
    ]
    found = sequence_logprobs(model, sequences, starts, micro_batch_tokens=20)
    assert order == ["forward"] * 5
    torch.autograd.grad(found.sum(), [model.model.embed_tokens.weight])
    assert order[5:] == ["backward"] + ["forward", "backward"] * 4
    order.clear()
    found = sequence_logprobs(model, sequences, starts, micro_batch_tokens=10_000)
    torch.autograd.grad(found.sum(), [model.model.embed_tokens.weight])
    assert order == ["forward"] * 4 + ["backward"] * 4  # all fit together: nothing is made again
    for hook in hooks:
        hook.remove()


def test_two_answers_to_one_prompt_keep_their_order() -> None:
    """A model that is sure of the successor: an answer counts up from its prompt, or is wrong."""
    model = successor_model()
    asked = [
        Continuations(np.array([40, 9]), np.array([10, 11, 12, 10, 10, 12]), np.array([3, 1, 2])),
        Continuations(np.array([9, 40]), np.array([10, 41]), np.array([1, 1])),
    ]
    with torch.no_grad():
        found = continuation_logprobs(model, asked)
    assert (found > -1e-3).tolist() == [True, True, False, False, True]


def test_an_answer_needs_a_prompt_and_a_token() -> None:
    with pytest.raises(ValueError, match=r"a prompt of 0 tokens with answers of \[2\]"):
        Continuations(np.array([], np.int64), np.array([1, 2]), np.array([2]))
    with pytest.raises(ValueError, match=r"a prompt of 1 tokens with answers of \[1, 0\]"):
        Continuations(np.array([3]), np.array([1]), np.array([1, 0]))


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        found = sequence_logprobs(successor_model(), [np.array([3, 4])], [1])
    assert not found.requires_grad
