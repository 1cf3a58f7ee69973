"""The preference losses: one batch of each against dense float64, and what the formulas promise.

Dimensions: P = positions, V = vocabulary, K = kept tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import StoreError
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.batches.pairs import AdpaCollator, ChosenCollator, DckdCollator, DpoCollator
from stages.student.batches.signals import Collator, encoding_of
from stages.student.losses.advantage import Advantage, SparseSupport, support_of
from stages.student.losses.step import Step
from stages.student.objectives import ObjectiveConfig
from stages.student.objectives.adpa import AdpaConfig
from stages.student.objectives.dckd import DckdConfig
from stages.student.objectives.dpo import DpoConfig
from stages.student.objectives.sft import SftConfig
from tests.fixtures.cached_data import VOCAB_SIZE
from tests.fixtures.preference_data import (
    BETA,
    HEADS,
    PreferenceData,
    gathered,
    make_pairs,
    make_preference_data,
    response_logprobs,
    responses_of,
    sides_of,
    split_responses,
    wide_model,
)

F64 = torch.float64
PAIRS = {pair.sample_id: pair for pair in make_pairs()}
CHOSEN_ROWS = (0, 2, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def student(data: PreferenceData) -> Any:
    return LlamaForCausalLM.from_pretrained(data.student, dtype=F64)


def step_of(model: Any, heads: Sequence[LanguageHead] = ()) -> Step:
    return Step(
        model=model,
        bare=model,
        dtype=F64,
        teacher_head=heads[0] if heads else None,
        lm_teacher_head=None,
        micro_batch_tokens=60,
        progress=0.0,
        advantage_heads=(heads[0], heads[1]) if len(heads) == 2 else None,
    )


def rows_of(tables: list[Path]) -> tuple[Any, list[Any]]:
    dataset = open_dataset(tables, split="train")
    return dataset, [dataset[index] for index in CHOSEN_ROWS]


def loss_of(config: ObjectiveConfig, batch: dict[str, Any], step: Step) -> Any:
    terms = config.terms(batch, step)
    counts = {"tokens": len(batch.get("positions_N", ())), "samples": len(CHOSEN_ROWS)}
    return sum(term.weight * term.total / counts[term.unit] for term in terms)


def assert_same(model: Any, loss: Any, wanted: Tensor) -> None:
    """Loss to 1e-5 (targets are float32), gradients to 1e-4 (so are a llama's norms)."""
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, wanted))
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


def nll(model: Any, prompt_T: Any, response: Any) -> Tensor:
    return -gathered(response_logprobs(model, prompt_T, response), response)


def test_sft_is_the_mean_over_response_tokens(data: PreferenceData, student: Any) -> None:
    dataset, rows = rows_of([data.pairs])
    batch = ChosenCollator(Collator("", VOCAB_SIZE))(rows)
    pairs = [PAIRS[row["sample_id"]] for row in rows]
    wanted = torch.cat([nll(student, p.prompt_ids_T, p.chosen_ids_C) for p in pairs]).mean()
    assert_same(student, loss_of(SftConfig(), batch, step_of(student)), wanted)
    assert dataset.manifests[0].table == "preference_pairs"


def test_dpo_is_the_sigmoid_of_both_log_ratios(data: PreferenceData, student: Any) -> None:
    _, rows = rows_of(data.dpo)
    batch = DpoCollator(VOCAB_SIZE)(rows)
    reference = wide_model(data.reference)
    losses = []
    for pair in (PAIRS[row["sample_id"]] for row in rows):
        ratios = [
            nll(reference, pair.prompt_ids_T, side).sum().detach()
            - nll(student, pair.prompt_ids_T, side).sum()
            for side in sides_of(pair)
        ]
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (ratios[0] - ratios[1])))
    loss = loss_of(DpoConfig(beta=0.3), batch, step_of(student))
    assert_same(student, loss, torch.stack(losses).mean())


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau", "exact"])
def test_dckd_is_both_kls_and_the_chosen_nll(
    data: PreferenceData, student: Any, encoding: str
) -> None:
    """Means over each response's tokens, then over pairs."""
    dataset, rows = rows_of(data.dckd(encoding))
    batch = DckdCollator(Collator(encoding_of(dataset), VOCAB_SIZE))(rows)
    heads = [LanguageHead.load(data.root / "signals_exact", device="cpu")]
    config = DckdConfig(sft_weight=0.8, alpha=0.5, chosen_weight=0.6, rejected_weight=1.5)
    probs_NV = dense_teacher(batch, heads[0])
    entropies_N = batch["entropies_N"].double()
    wanted, start = torch.zeros((), dtype=F64), 0
    pairs = [PAIRS[row["sample_id"]] for row in rows]
    for side, weight in ((0, 0.3), (1, 0.75)):
        for pair in pairs:
            response = sides_of(pair)[side]
            own_PV = response_logprobs(student, pair.prompt_ids_T, response)
            at = slice(start, start + len(response))
            kl_P = -(probs_NV[at] * own_PV).sum(-1) - entropies_N[at]
            wanted = wanted + weight * kl_P.mean() / len(pairs)
            if side == 0:
                wanted = wanted - 0.8 * gathered(own_PV, response).mean() / len(pairs)
            start = at.stop
    assert start == len(batch["positions_N"])
    step = step_of(student, heads if encoding == "exact" else ())
    assert_same(student, loss_of(config, batch, step), wanted)


def dense_teacher(batch: dict[str, Tensor], head: LanguageHead) -> Tensor:
    """[N, V] what a batch says the teacher is."""
    if "hidden_ND" in batch:
        return head.logits(batch["hidden_ND"]).double().softmax(-1)
    probs_NV = torch.zeros(len(batch["positions_N"]), VOCAB_SIZE, dtype=F64)
    return probs_NV.scatter_add_(1, batch["token_ids_NK"].long(), batch["weights_NK"].double())


def test_dckd_reads_the_live_teacher_from_the_exact_table(data: PreferenceData) -> None:
    """What the batch holds at each position is the teacher after the right tokens."""
    _, rows = rows_of(data.dckd("exact"))
    batch = DckdCollator(Collator("exact", VOCAB_SIZE))(rows)
    head = LanguageHead.load(data.root / "signals_exact", device="cpu")
    teacher = wide_model(data.teacher)
    found_NV = head.logits(batch["hidden_ND"]).log_softmax(-1).double()
    pairs = [PAIRS[row["sample_id"]] for row in rows]
    with torch.no_grad():
        live = [
            response_logprobs(teacher, pair.prompt_ids_T, sides_of(pair)[side])
            for side in (0, 1)
            for pair in pairs
        ]
    torch.testing.assert_close(found_NV, torch.cat(live), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "support", ["exact", "threshold", "threshold_tau", "union_top_k", "as_released"]
)
def test_adpa_is_the_expected_advantage_on_the_students_responses(
    data: PreferenceData, student: Any, support: str
) -> None:
    """Response by response; a prompt with two responses counts once."""
    dataset, rows = rows_of(data.adpa(support))
    batch = AdpaCollator.of(dataset, VOCAB_SIZE)(rows)
    heads = [
        LanguageHead.load(data.root / "advantages_exact" / name, device="cpu") for name in HEADS
    ]
    mode: Any = "as_released" if support == "as_released" else "paper"
    config = AdpaConfig(mode=mode, sft_weight=0.7, gamma=1.3)
    wanted = torch.zeros((), dtype=F64)
    for row in rows:
        pair = PAIRS[row["sample_id"]]
        answers = responses_of(wide_model(data.student), pair)
        values_PV, rest_P = dense_advantages(data, row, answers, support)
        wanted = wanted + 0.7 * nll(student, pair.prompt_ids_T, pair.chosen_ids_C).mean() / 3
        start = 0
        for response in split_responses(answers):
            probs_PV = response_logprobs(student, pair.prompt_ids_T, response).exp()
            at = slice(start, start + len(response))
            inner_P = (probs_PV * values_PV[at]).sum(-1) + rest_P[at]
            wanted = wanted - 1.3 * inner_P.mean() / len(split_responses(answers)) / 3
            start = at.stop
    step = step_of(student, heads if support == "exact" else ())
    assert_same(student, loss_of(config, batch, step), wanted)


def dense_advantages(
    data: PreferenceData, row: Any, answers: Any, support: str
) -> tuple[Tensor, Tensor]:
    """[P, V] what each token's probability is multiplied with, and what is added [P]."""
    num_positions = len(answers.response_ids_A)
    dense_PV = torch.zeros(num_positions, VOCAB_SIZE, dtype=F64)
    rest_P = torch.zeros(num_positions, dtype=F64)
    if support == "exact":
        with torch.no_grad():
            parts = [
                torch.cat(
                    [
                        response_logprobs(model, answers.prompt_ids_T, response)
                        for response in split_responses(answers)
                    ]
                )
                for model in (wide_model(data.teacher), wide_model(data.reference))
            ]
        return BETA * (parts[0] - parts[1]), rest_P
    if support == "threshold_tau":
        entry = 0
        for p, count in enumerate(row["num_entries_P"].tolist()):
            rest_P[p], token = float(row["rest_advantages_P"][p]), 0
            for _ in range(count):
                token += 256 * int(row["id_gaps_high_E"][entry]) + int(row["id_gaps_low_E"][entry])
                level, is_negative = divmod(int(row["value_codes_E"][entry]), 2)
                dense_PV[p, token] += (-1) ** is_negative * 2 ** (level / 3 - 18)
                entry += 1
        return dense_PV, rest_P
    if support == "union_top_k":
        start = 0
        for p, count in enumerate(row["num_entries_P"].tolist()):
            rest = float(row["rest_advantages_P"][p])
            dense_PV[p] = rest
            for entry in range(start, start + count):
                dense_PV[p, int(row["token_ids_E"][entry])] = float(row["advantages_E"][entry])
            start += count
        return dense_PV, rest_P
    for p in range(num_positions):
        for k, token in enumerate(row["token_ids_PK"][p].tolist()):
            value = float(row["advantages_PK"][p, k])
            if support == "threshold":
                value /= float(np.exp(np.float64(row["log_inclusions_PK"][p, k])))
            else:
                value = min(max(value, 1e-8), 1 - 1e-8)
            dense_PV[p, token] += value
    return dense_PV, rest_P


def sparse_loss(logprobs_PV: Tensor, values_PK: Tensor, config: AdpaConfig) -> Tensor:
    """Loss of positions that each keep the first K tokens."""
    num_positions, k = values_PK.shape
    advantages = {
        "token_ids_MK": torch.arange(k).expand(num_positions, k),
        "values_MK": values_PK,
        "rest_M": torch.zeros(num_positions),
    }
    support = support_of(advantages, None, clipped=config.mode == "as_released")
    objective = Advantage(support, torch.full((num_positions,), 1.0 / num_positions))
    return objective.reduce_(logprobs_PV, slice(0, num_positions), with_grad=True)


def test_the_worked_vector_in_both_modes() -> None:
    """Aligned {.6, .3, .05}, reference {.5, .4, missing}, student {.4, .3, .1}: unlike signs."""
    pi = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=F64)
    paper = torch.log(torch.tensor([[0.6 / 0.5, 0.3 / 0.4, 1.0]], dtype=F64))
    assert paper[0].tolist() == pytest.approx([0.18232, -0.28768, 0.0], abs=5e-6)
    found = sparse_loss(pi.log(), paper, AdpaConfig(mode="paper"))
    assert float(found[1]) == pytest.approx(-0.013376, abs=1e-6)
    found = sparse_loss(pi.log(), paper, AdpaConfig(mode="as_released"))
    assert float(found[1]) == pytest.approx(0.072929, abs=1e-6)
    assert float(found[0]) == -float(found[1])


distributions = st.lists(st.floats(-4, 4), min_size=5, max_size=5).map(
    lambda logits: torch.tensor([logits], dtype=F64).log_softmax(-1)
)


@settings(max_examples=60, deadline=None)
@given(distributions, distributions, distributions, st.floats(0.05, 3))
def test_the_sum_is_a_difference_of_two_kls(
    pi: Tensor, aligned: Tensor, reference: Tensor, beta: float
) -> None:
    """beta [KL(pi || reference) - KL(pi || aligned)], the closed form."""
    found = sparse_loss(pi.clone(), beta * (aligned - reference), AdpaConfig())[1]
    kls = [(pi.exp() * (pi - other)).sum() for other in (reference, aligned)]
    assert float(found) == pytest.approx(float(beta * (kls[0] - kls[1])), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(distributions, distributions, st.floats(-5, 5))
def test_a_shift_of_all_advantages_moves_no_gradient(
    pi: Tensor, values: Tensor, shift: float
) -> None:
    """Over the whole vocabulary; over a part of it the same shift is a push."""
    plain, shifted = pi.clone(), pi.clone()
    sparse_loss(plain, values, AdpaConfig())
    sparse_loss(shifted, values + shift, AdpaConfig())
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-9)
    if abs(shift) > 0.1:
        part, moved = pi.clone(), pi.clone()
        sparse_loss(part, values[:, :3], AdpaConfig())
        sparse_loss(moved, values[:, :3] + shift, AdpaConfig())
        assert float((part - moved).abs().max()) > 1e-7


@settings(max_examples=40, deadline=None)
@given(distributions, distributions)
def test_the_gradient_is_that_of_finite_differences(logits: Tensor, values: Tensor) -> None:
    work = logits.clone()
    sparse_loss(work, values, AdpaConfig())

    def loss(at: Tensor) -> float:
        return float(sparse_loss(at.log_softmax(-1), values, AdpaConfig())[0])

    for token in range(5):
        step = torch.zeros(1, 5, dtype=F64)
        step[0, token] = 1e-5
        slope = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert float(work[0, token]) == pytest.approx(slope, abs=1e-8)


def test_a_token_kept_twice_counts_twice() -> None:
    pi = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64)
    support = SparseSupport(torch.tensor([[1, 1]]), torch.tensor([[2.0, 3.0]]), torch.zeros(1))
    expected = support.expected_(pi.log(), slice(0, 1), with_grad=False)
    assert float(expected) == pytest.approx(0.3 * 5.0)


def test_signals_of_other_responses_are_refused(data: PreferenceData) -> None:
    _, rows = rows_of(data.dpo)
    row = rows[0] | {"rejected_ids_R": np.append(rows[0]["rejected_ids_R"], 3)}
    with pytest.raises(StoreError, match="reference log-probs of responses of"):
        DpoCollator(VOCAB_SIZE)([row])
    dataset, rows = rows_of(data.adpa("threshold"))
    row = rows[0] | {"token_advantages_P": rows[0]["token_advantages_P"][1:]}
    with pytest.raises(StoreError, match="advantages at"):
        AdpaCollator.of(dataset, VOCAB_SIZE)([row])
    with pytest.raises(StoreError, match=r"token_ids holds id 302, the student has 300"):
        AdpaCollator(300, 1.0)._advantages([rows[0] | {"token_ids_PK": np.array([[302]])}])


def test_dckd_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValidationError, match="are both 0: use loss sft"):
        DckdConfig(chosen_weight=0.0, rejected_weight=0.0)
