"""Divergences by choice: float64 definitions, finite differences, a live teacher, TRL's own loss.

Dimensions: N = positions, V = rows of the student, U = rows of the teacher, T = tokens of a row.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.dataset import open_dataset
from stages.models.causal_lm.chunked_loss import LossSums, StudentHead, chunked_loss, logits_loss
from stages.models.causal_lm.language_head import LanguageHead
from stages.student.batches.signals import Collator
from stages.student.batches.training_data import teacher_head_of
from stages.student.losses.kl import ExactTeacher
from stages.student.losses.step import Step, Term
from stages.student.objectives.kd import KdConfig
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig
from stages.student.train.work import train
from tests.fixtures.cached_data import VOCAB_SIZE, CachedData, make_cached_data

N, U, NUM_TOKENS = 11, 37, 31
STUDENT_ROWS = (31, 34, 37, 43)  # no padding, some, the teacher's, more
KINDS: dict[str, dict[str, Any]] = {
    "forward": {"kind": "forward_kl"},
    "reverse": {"kind": "reverse_kl"},
    "skewed 0.1": {"kind": "skewed_kl", "alpha": 0.1},
    "skewed 0.8": {"kind": "skewed_kl", "alpha": 0.8},
    "skewed reverse 0.1": {"kind": "skewed_reverse_kl", "alpha": 0.1},
    "skewed reverse 0.8": {"kind": "skewed_reverse_kl", "alpha": 0.8},
    "jensen-shannon 0.5": {"kind": "jensen_shannon", "beta": 0.5},
    "jensen-shannon 0.1": {"kind": "jensen_shannon", "beta": 0.1},
    "total variation": {"kind": "total_variation"},
}
SMOOTH = [name for name in KINDS if name != "total variation"]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def teacher_of_logits(logits_NU: Tensor, num_token_ids: int | None = NUM_TOKENS) -> ExactTeacher:
    """A head whose logits these are."""
    weight_UD = logits_NU.T.contiguous()
    head = LanguageHead(weight_UD, None, 1.0, None, logits_NU.dtype, num_token_ids)
    eye = torch.eye(len(logits_NU), dtype=logits_NU.dtype)
    logprobs_NU = logits_NU.log_softmax(-1)
    return ExactTeacher(eye, -(logprobs_NU.exp() * logprobs_NU).sum(-1), head)


def xlogx_over(one: Tensor, other: Tensor) -> Tensor:
    """``sum one log(one / other)`` over the last axis, nothing where the one is 0."""
    over, under = (torch.where(one > 0, values, 1.0) for values in (one, other))
    return (one * (over / under).log()).sum(-1)


def defined(settings: dict[str, Any], q: Tensor, s: Tensor) -> Tensor:
    """[N] by the papers' definitions, of probabilities [N, V]; q is 0 on the student's padding."""
    match settings["kind"]:
        case "forward_kl":
            return xlogx_over(q, s)
        case "reverse_kl":
            of_tokens = s * (q > 0)
            mass_N1: Tensor = of_tokens.sum(-1, keepdim=True)
            return xlogx_over(of_tokens / mass_N1, q) - mass_N1[:, 0].log()
        case "skewed_kl":
            alpha = settings["alpha"]
            return xlogx_over(q, alpha * q + (1 - alpha) * s)
        case "skewed_reverse_kl":
            alpha = settings["alpha"]
            return xlogx_over(s, (1 - alpha) * q + alpha * s)
        case "jensen_shannon":
            beta: float = settings["beta"]
            m = beta * q + (1 - beta) * s
            return beta * xlogx_over(q, m) + (1 - beta) * xlogx_over(s, m)
        case _:
            apart: Tensor = (q - s).abs().sum(-1) / 2
            return apart


def probabilities(logits_NU: Tensor, rows: int, temperature: float) -> Tensor:
    """[N, rows] of the teacher: the softmax over tokens alone, and nothing elsewhere."""
    q = (logits_NU[:, :NUM_TOKENS] / temperature).softmax(-1)
    return torch.nn.functional.pad(q, (0, rows - NUM_TOKENS))


def expected_loss(
    settings: dict[str, Any],
    teacher_NU: Tensor,
    logits: Tensor,
    next_N: Tensor,
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> Tensor:
    """[N], the whole objective, for autograd."""
    q = probabilities(teacher_NU, logits.shape[1], temperature)
    factor = temperature if settings["kind"] == "total_variation" else temperature**2
    found_N = defined(settings, q, (logits / temperature).softmax(-1))
    cross_N = -logits.log_softmax(-1).gather(1, next_N[:, None])[:, 0]
    return weight * factor * found_N + (1 - weight) * cross_N


class OnLogits:
    """The part of a step that the objective uses: logits are there, or states and a head."""

    def __init__(self, logits: Tensor, head: LanguageHead | None = None) -> None:
        self.logits, self.teacher_head = logits, head

    def over_positions(self, batch: dict[str, Any], objective: Any) -> Term:
        result: LossSums = logits_loss(self.logits, objective)
        return Term(result.loss, result.sums, "tokens")


def found_of(config: KdConfig, teacher: ExactTeacher, logits: Tensor, next_N: Tensor) -> Term:
    columns = {"hidden_ND": teacher.hidden_ND, "entropies_N": teacher.entropies_N}
    batch = columns | {"next_token_ids_N": next_N}
    (term,) = config.terms(batch, OnLogits(logits, teacher.head))  # type: ignore[arg-type]
    return term


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.4])
@pytest.mark.parametrize("rows", STUDENT_ROWS)
def test_loss_and_gradient_are_those_of_the_definition(
    name: str, temperature: float, rows: int
) -> None:
    """Padding of both sides in all sizes; with cross-entropy and without."""
    teacher_NU, logits = 2 * normal(1, N, U), normal(2, N, rows).requires_grad_()
    next_N = torch.arange(N)
    for weight in (1.0, 0.3):
        config = KdConfig(divergence=KINDS[name], temperature=temperature, weight=weight)
        term = found_of(config, teacher_of_logits(teacher_NU), logits, next_N)
        wanted = expected_loss(
            KINDS[name], teacher_NU, logits, next_N, temperature=temperature, weight=weight
        ).sum()
        torch.testing.assert_close(term.total, wanted, rtol=1e-9, atol=1e-9)
        found, expected = (torch.autograd.grad(3.0 * x, logits)[0] for x in (term.total, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        lost = teacher_NU.softmax(-1)[:, NUM_TOKENS:].sum()
        torch.testing.assert_close(term.sums["dropped_mass"], lost)
    if not config.is_plain:
        q = probabilities(teacher_NU, rows, temperature)
        apart = defined(KINDS[name], q, (logits / temperature).softmax(-1)).sum()
        torch.testing.assert_close(term.sums["divergence"], apart)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_match_finite_differences(name: str) -> None:
    teacher_NU, logits = normal(3, 3, U), normal(4, 3, NUM_TOKENS + 2).requires_grad_()
    config = KdConfig(divergence=KINDS[name], temperature=1.7, weight=0.6)
    teacher, next_N = teacher_of_logits(teacher_NU), torch.tensor([5, 0, 9])
    assert torch.autograd.gradcheck(lambda z: found_of(config, teacher, z, next_N).total, (logits,))


@pytest.mark.parametrize("name", KINDS)
def test_chunks_and_weights_of_positions(name: str) -> None:
    """Any chunk gives the same; each position's loss and gradient are multiplied by its weight."""
    teacher_NU, hidden_ND = normal(5, N, U), normal(6, N, 5).requires_grad_()
    weight_VD = normal(7, U + 4, 5).requires_grad_()
    next_N, weights_N = torch.arange(N), normal(8, N).abs()
    config = KdConfig(divergence=KINDS[name], temperature=0.7, weight=0.4)
    objective = weighted_objective(config, teacher_of_logits(teacher_NU), next_N, weights_N)
    head = StudentHead(weight_VD, scale=0.8, softcap=4.0)
    logits = 4.0 * torch.tanh(0.8 * (hidden_ND @ weight_VD.T) / 4.0)
    wanted_N = expected_loss(KINDS[name], teacher_NU, logits, next_N, temperature=0.7, weight=0.4)
    expected = torch.autograd.grad((wanted_N * weights_N).sum(), (hidden_ND, weight_VD))
    for chunk_bytes in (1, 5000, 1 << 30):
        result = chunked_loss(
            hidden_ND, head, objective, dtype=torch.float64, chunk_bytes=chunk_bytes
        )
        torch.testing.assert_close(result.loss, (wanted_N * weights_N).sum())
        for found, wanted in zip(
            torch.autograd.grad(result.loss, (hidden_ND, weight_VD)), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted)


def weighted_objective(
    config: KdConfig, teacher: ExactTeacher, next_N: Tensor, weights_N: Tensor
) -> Any:
    """The loss that the objective makes, with weights, which no recipe gives ``kd`` today."""
    made: list[Any] = []

    class Kept(OnLogits):
        def over_positions(self, batch: dict[str, Any], objective: Any) -> Term:
            made.append(objective)
            return Term(torch.zeros(()), {}, "tokens")

    columns = {"hidden_ND": teacher.hidden_ND, "entropies_N": teacher.entropies_N}
    batch = columns | {"next_token_ids_N": next_N}
    config.terms(batch, Kept(torch.zeros(0), teacher.head))  # type: ignore[arg-type]
    return replace(made[0], weights_N=weights_N)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_float32_holds_where_probabilities_do_not(name: str, temperature: float) -> None:
    """Logits hundreds of nats apart, on either side, both or neither: e^-300 is 0 in float32."""
    teacher_NU, logits = normal(9, N, NUM_TOKENS), normal(10, N, NUM_TOKENS + 3)
    teacher_NU[0, 3], logits[0, 4] = 300.0, 300.0  # each sure of another token
    teacher_NU[1, 5], logits[1, 5] = 200.0, 250.0  # of the same
    teacher_NU[2, 7] = -400.0
    logits[3, 8] = -400.0
    teacher_NU[4, :20] -= 150.0
    logits[5, NUM_TOKENS:] += 90.0  # a student that says padding alone
    next_N = torch.arange(N)
    config = KdConfig(divergence=KINDS[name], temperature=temperature, weight=0.9)
    wide = logits.clone().requires_grad_()
    wanted_N = expected_in_logs(KINDS[name], teacher_NU, wide, next_N, temperature)
    narrow = logits.float().requires_grad_()
    term = found_of(config, teacher_of_logits(teacher_NU.float()), narrow, next_N)
    (expected,) = torch.autograd.grad(wanted_N.sum(), wide)
    (found,) = torch.autograd.grad(term.total, narrow)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(term.total.double(), wanted_N.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


def expected_in_logs(
    settings: dict[str, Any], teacher_NU: Tensor, logits: Tensor, next_N: Tensor, temperature: float
) -> Tensor:
    """The definitions once more in float64 logs: ``p / q`` overflows where q is e^-600."""
    rows = logits.shape[1]
    t = (teacher_NU / temperature).log_softmax(-1)
    s = (logits / temperature).log_softmax(-1)
    known = s[:, : t.shape[1]]
    rest_N = s.exp()[:, t.shape[1] :].sum(-1)

    def mix(share: float) -> Tensor:
        return torch.logaddexp(t + math.log(share), known + math.log1p(-share))

    match settings["kind"]:
        case "forward_kl":
            found_N = (t.exp() * (t - known)).sum(-1)
        case "reverse_kl":
            inside = known.log_softmax(-1)
            found_N = (inside.exp() * (inside - t)).sum(-1) - known.logsumexp(-1)
        case "skewed_kl":
            found_N = (t.exp() * (t - mix(settings["alpha"]))).sum(-1)
        case "skewed_reverse_kl":
            found_N = (known.exp() * (known - mix(1 - settings["alpha"]))).sum(-1)
            found_N = found_N - math.log(settings["alpha"]) * rest_N
        case "jensen_shannon":
            beta = settings["beta"]
            first_N = (t.exp() * (t - mix(beta))).sum(-1)
            second_N = (known.exp() * (known - mix(beta))).sum(-1) - math.log1p(-beta) * rest_N
            found_N = beta * first_N + (1 - beta) * second_N
        case _:
            found_N = ((t.exp() - known.exp()).abs().sum(-1) + rest_N) / 2
    factor = temperature if settings["kind"] == "total_variation" else temperature**2
    cross_N = -logits.log_softmax(-1).gather(1, next_N[:, None])[:, 0]
    assert rows >= t.shape[1]
    return 0.9 * factor * found_N + 0.1 * cross_N


@pytest.mark.parametrize("name", SMOOTH)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(name: str) -> None:
    teacher_NU = 3 * normal(11, N, NUM_TOKENS)
    logits = (teacher_NU + 5.0).requires_grad_()  # a softmax knows no shift
    config = KdConfig(divergence=KINDS[name], temperature=2.0)
    term = found_of(config, teacher_of_logits(teacher_NU), logits, torch.arange(N))
    assert term.total.item() == pytest.approx(0.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(term.total, logits)
    assert float(gradient.abs().max()) < 1e-12


def test_each_is_the_limit_that_its_paper_names() -> None:
    """Skews towards 0 give the plain KLs; JSD over beta, or over 1 - beta, does at its ends."""
    teacher_NU, logits, next_N = normal(12, N, U), normal(13, N, NUM_TOKENS), torch.arange(N)

    def total(**divergence: Any) -> float:
        config = KdConfig(divergence=divergence, temperature=1.3)
        return found_of(config, teacher_of_logits(teacher_NU), logits, next_N).total.item()

    forward, reverse = total(kind="forward_kl"), total(kind="reverse_kl")
    small = 1e-6
    assert total(kind="skewed_kl", alpha=small) == pytest.approx(forward, rel=1e-4)
    assert total(kind="skewed_reverse_kl", alpha=small) == pytest.approx(reverse, rel=1e-4)
    assert total(kind="jensen_shannon", beta=small) / small == pytest.approx(forward, rel=1e-3)
    last = total(kind="jensen_shannon", beta=1 - small) / small
    assert last == pytest.approx(reverse, rel=1e-3)
    assert 0 < total(kind="jensen_shannon") < N * math.log(2) * 1.3**2
    assert 0 < total(kind="total_variation") < N * 1.3


def test_gradients_keep_their_size_at_high_temperatures() -> None:
    """T squared, and T of total variation: at 100 and 200 they are nearly the same."""
    teacher_NU, logits = normal(14, N, NUM_TOKENS), normal(15, N, NUM_TOKENS).requires_grad_()
    for name, settings in KINDS.items():
        norms = []
        for temperature in (100.0, 200.0):
            config = KdConfig(divergence=settings, temperature=temperature)
            term = found_of(config, teacher_of_logits(teacher_NU), logits, torch.arange(N))
            norms.append(float(torch.autograd.grad(term.total, logits)[0].norm()))
        assert norms[0] == pytest.approx(norms[1], rel=0.1), name
        assert norms[0] > 1e-2, name


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_trls_loss_of_gkd_is_ours(beta: float, temperature: float) -> None:
    """Its ends are the forward and the reverse KL; it has no factor for temperature."""
    from trl.experimental.gkd import GKDTrainer

    teacher_NU, logits = normal(16, N, NUM_TOKENS), normal(17, N, NUM_TOKENS).requires_grad_()
    settings = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}
    divergence = settings.get(beta, {"kind": "jensen_shannon", "beta": beta})
    config = KdConfig(divergence=divergence, temperature=temperature)
    term = found_of(config, teacher_of_logits(teacher_NU), logits, torch.arange(N))
    theirs = GKDTrainer.generalized_jsd_loss(
        logits[None], teacher_NU[None], beta=beta, temperature=temperature, reduction="sum"
    )
    theirs = theirs * temperature**2
    torch.testing.assert_close(term.total, theirs)
    found, expected = (torch.autograd.grad(x, logits)[0] for x in (term.total, theirs))
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedData:
    return make_cached_data(tmp_path_factory.mktemp("cache"))


def step_of(data: CachedData, config: KdConfig, *, packing: bool) -> tuple[Tensor, Any]:
    """Return the loss of the first rows of the cache and the model with its gradients."""
    dataset = open_dataset(data.tables("exact"), split="train")
    rows = [dataset[index] for index in range(6)]
    batch = Collator("exact", VOCAB_SIZE, VOCAB_SIZE, packing=packing)(rows)
    model = LlamaForCausalLM.from_pretrained(data.student)
    head = teacher_head_of(dataset, torch.device("cpu"), VOCAB_SIZE)
    step = Step(model, model, torch.float32, head, None, 1000, 0.0)
    (term,) = config.terms(batch, step)
    torch.autograd.backward(term.total)
    return term.total, model


@pytest.mark.parametrize("name", KINDS)
def test_cached_is_live(name: str, data: CachedData) -> None:
    """Both models whole by transformers, dense [T, V] and autograd, row by row; then packed.

    Stored states are float16: 11 significant bits of logits that reach 10.
    """
    config = KdConfig(divergence=KINDS[name], temperature=1.5, weight=0.7)
    live = LlamaForCausalLM.from_pretrained(data.student)
    teacher = LlamaForCausalLM.from_pretrained(data.teacher).eval()
    dataset = open_dataset(data.tables("exact"), split="train")
    total = torch.zeros(())
    for index in range(6):
        ids_1T = torch.from_numpy(dataset[index]["input_ids_T"].astype("int64"))[None]
        with torch.no_grad():
            teacher_TV = teacher(ids_1T).logits[0, :-1]
        logits_TV = live(ids_1T).logits[0, :-1]
        q, s = ((z / 1.5).softmax(-1) for z in (teacher_TV, logits_TV))
        factor = 1.5 if name == "total variation" else 1.5**2
        cross_T = torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum")
        total = total + 0.7 * factor * defined(KINDS[name], q, s).sum() + 0.3 * cross_T
    torch.autograd.backward(total)
    for packing in (False, True):
        loss, model = step_of(data, config, packing=packing)
        torch.testing.assert_close(loss, total, rtol=1e-3, atol=0.0)
        for (what, p), expected in zip(model.named_parameters(), live.parameters(), strict=True):
            apart = (p.grad - expected.grad).norm() / expected.grad.norm()
            assert float(apart) < 5e-3, what


def test_a_changed_state_moves_its_position_alone() -> None:
    teacher_NU, logits = normal(18, N, U), normal(19, N, U).requires_grad_()
    for name, settings in KINDS.items():
        config = KdConfig(divergence=settings, temperature=2.0)
        gradients = []
        for change in (0.0, 4.0):  # so much that signs change, of which total variation is
            other_NU = teacher_NU.clone()
            other_NU[4, 3] += change
            term = found_of(config, teacher_of_logits(other_NU), logits, torch.arange(N))
            gradients.append(torch.autograd.grad(term.total, logits)[0])
        moved = (gradients[0] != gradients[1]).any(dim=1)
        assert moved.nonzero()[:, 0].tolist() == [4], name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse", "skewed reverse 0.1", "total variation"])
def test_a_run_brings_the_student_to_its_teacher(
    name: str, data: CachedData, tmp_path: Path
) -> None:
    """What is measured is the KL at temperature 1, whatever was trained on."""
    objective = KdConfig(divergence=KINDS[name], temperature=1.5)
    config = TrainConfig(objective=objective, lr=1e-2, max_steps=40, per_device_batch_size=6)
    result = train(
        config,
        student=data.student,
        data=data.tables("exact"),
        output=tmp_path / "out",
        options=TrainOptions(num_workers=0, log_every=1),
    )
    divergences = [entry["divergence"] for entry in result.history if "divergence" in entry]
    assert len(divergences) == 40 and divergences[-1] < 0.8 * divergences[0]
    before, after = (result.metrics[when]["kl_to_teacher"] for when in ("before", "after"))
    assert after < before
