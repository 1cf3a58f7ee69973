"""The ``advantages`` stage against plain float64 passes: every support, alignment, rejections."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.errors import ConfigError
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.storage.shards import write_shard
from schemas.tables.prompted.advantages import (
    HEAD_FOLDERS,
    ExactAdvantages,
    ReleasedAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from schemas.tables.prompted.responses import Responses
from stages.models.available_memory import available_memory
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine import Engine, open_engine
from stages.models.engines.engine_pair import (
    EnginePair,
    OneAfterTheOther,
    SideBySide,
    fit_together,
)
from stages.models.engines.memory import weight_bytes
from stages.models.spec import EngineOptions, ModelSpec
from stages.signals.advantages.stage import AdvantagesStage
from stages.signals.advantages.work import Asked, score_row, score_shard
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.responses import prompted_of
from stages.stage import Rejected, StageContext
from tests.conftest import save_tiny_model
from tests.fixtures.cached_data import VOCAB_SIZE, save_model
from tests.fixtures.episode_data import successor_model
from tests.fixtures.tiny_responses import (
    as_shard,
    context_of,
    make_row,
    plain_logprobs_of_row,
    random_rows,
)

SUPPORTS = ("exact", "threshold", "threshold_tau", "union_top_k", "as_released")
BETA = {**dict.fromkeys(SUPPORTS, 0.1), "as_released": 1.0}
K = 6


def stage_of(kind: str, **changes: Any) -> AdvantagesStage:
    support = {"kind": kind} if kind == "exact" else {"kind": kind, "k": K}
    if kind == "threshold_tau":
        support = {"kind": "threshold", "tau": 0.02}
    body = {"stage": "advantages", "input": "responses", "model": "dpo", "reference": "sft"}
    return AdvantagesStage.model_validate(
        {**body, "beta": BETA[kind], "support": support, **changes}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two unlike models with one vocabulary; windows of 64 tokens."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("dpo", "sft"), start=1):
        # vLLM on a CPU takes heads of 32 and more.
        save_model(root / name, seed=seed, num_layers=seed, head_dim=32)
    return {name: root / name for name in ("dpo", "sft")}


@pytest.fixture(scope="module")
def rows() -> list[Responses]:
    """One to three responses a prompt; the last row has a single response of a single token."""
    made = random_rows(np.random.default_rng(7), VOCAB_SIZE, (1, 3, 2))
    return [*made, make_row([5, 6, 7], [[8]], VOCAB_SIZE)]


Engines = tuple[Engine, Engine]


@pytest.fixture(scope="module")
def engines(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """Both models, open for all tests that do not ask how they are opened."""
    context = context_of(tmp_path_factory.mktemp("engines"), VOCAB_SIZE, folders)
    dpo, sft = (
        open_engine("transformers", model.path, dtype="float32", options=context.engine)
        for model in context.models.values()
    )
    with dpo as first, sft as second:
        yield first, second


def scored(stage: AdvantagesStage, rows: Sequence[Responses], engines: Engines) -> list[Any]:
    """Give the stage's work one shard."""
    shard = as_shard(rows, VOCAB_SIZE)
    return list(score_shard(stage, SideBySide(*engines), shard, EngineOptions(device="cpu")))


def run(
    stage: AdvantagesStage, rows: Sequence[Responses], out: Path, folders: dict[str, Path]
) -> list[Any]:
    """Run the stage as a worker does: open it, give it one shard."""
    with stage.open(context_of(out, VOCAB_SIZE, folders)) as work:
        return list(work(as_shard(rows, VOCAB_SIZE)))


@pytest.fixture(scope="module")
def made(engines: Engines, rows: list[Responses]) -> dict[str, list[Any]]:
    return {kind: scored(stage_of(kind), rows, engines) for kind in SUPPORTS}


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path], rows: list[Responses]) -> list[tuple[Any, Any]]:
    """Log-probs [P, V] of both models for each row."""
    both = folders["dpo"], folders["sft"]
    return [
        (plain_logprobs_of_row(both[0], row), plain_logprobs_of_row(both[1], row)) for row in rows
    ]


@pytest.mark.parametrize("kind", SUPPORTS)
def test_what_every_support_carries(
    kind: str, made: dict[str, list[Any]], rows: list[Responses], plain: list[tuple[Any, Any]]
) -> None:
    for found, row, (aligned_PV, reference_PV) in zip(made[kind], rows, plain, strict=True):
        assert found.sample_id == row.sample_id
        places_P = np.arange(len(row.response_ids_A))
        aligned_P, reference_P = (
            logprobs_PV[places_P, row.response_ids_A] for logprobs_PV in (aligned_PV, reference_PV)
        )
        expected_P = BETA[kind] * (aligned_P - reference_P)
        rounding = 1 / 128 if kind == "threshold_tau" else 0
        np.testing.assert_allclose(found.token_advantages_P, expected_P, rounding, atol=1e-4)
        starts_N = np.cumsum([0, *row.response_lengths_N[:-1]])
        for name, logprobs_P in (("teacher", aligned_P), ("reference", reference_P)):
            sums_N = getattr(found, f"{name}_logprobs_N")
            np.testing.assert_allclose(sums_N, np.add.reduceat(logprobs_P, starts_N), atol=2e-4)
            assert sums_N.dtype == np.float32


def test_exact_keeps_all_that_the_heads_need(
    folders: dict[str, Path], rows: list[Responses], plain: list[tuple[Any, Any]], tmp_path: Path
) -> None:
    found = run(stage_of("exact"), rows, tmp_path, folders)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_head/*")}
    assert files == set(stage_of("exact").side_files)
    heads = [LanguageHead.load(tmp_path / name, device="cpu") for name in HEAD_FOLDERS]
    for row, logprobs in zip(found, plain, strict=True):
        assert isinstance(row, ExactAdvantages)
        hidden = row.teacher_hidden_PD, row.reference_hidden_PR
        for head, states_PD, expected_PV in zip(heads, hidden, logprobs, strict=True):
            got_PV = head.logits(torch.from_numpy(states_PD)).log_softmax(dim=1)
            np.testing.assert_allclose(got_PV, expected_PV, atol=1e-4)


def test_kept_tokens_carry_their_advantage(
    made: dict[str, list[Any]], rows: list[Responses], plain: list[tuple[Any, Any]]
) -> None:
    for p, (row, (aligned_PV, reference_PV)) in enumerate(zip(rows, plain, strict=True)):
        full_PV = 0.1 * (aligned_PV - reference_PV)
        drawn, union = made["threshold"][p], made["union_top_k"][p]
        assert isinstance(drawn, ThresholdAdvantages) and isinstance(union, UnionAdvantages)
        expected_PK = np.take_along_axis(full_PV, drawn.token_ids_PK, axis=1)
        # 7 significant bits are stored: 1/128 of the value at most.
        np.testing.assert_allclose(drawn.advantages_PK, expected_PK, rtol=1 / 128, atol=1e-4)
        position_E = np.repeat(np.arange(len(full_PV)), union.num_entries_P)
        expected_E = full_PV[position_E, union.token_ids_E]
        np.testing.assert_allclose(union.advantages_E, expected_E, atol=1e-4)
        ends = np.cumsum([0, *union.num_entries_P])
        for j in range(len(full_PV)):
            likeliest = [np.argsort(-logits_PV[j])[:K] for logits_PV in (aligned_PV, reference_PV)]
            expected = {*likeliest[0], *likeliest[1], *row.top_ids_AK[j, :K]}
            assert set(union.token_ids_E[ends[j] : ends[j + 1]]) == expected


def test_released_rows_are_the_published_code_in_float64(
    made: dict[str, list[Any]], plain: list[tuple[Any, Any]]
) -> None:
    for row, (aligned_PV, reference_PV) in zip(made["as_released"], plain, strict=True):
        assert isinstance(row, ReleasedAdvantages)
        for j, ids_K in enumerate(row.token_ids_PK):
            aligned_V, reference_V = np.exp(aligned_PV[j]), np.exp(reference_PV[j])
            assert ids_K.tolist() == np.argsort(-aligned_V)[:K].tolist()
            known = np.argsort(-reference_V)[:K]
            floor = max(aligned_V[ids_K].min(), 1e-7)
            ratios = [aligned_V[a] / (reference_V[a] if a in known else floor) for a in ids_K]
            np.testing.assert_allclose(row.advantages_PK[j], np.log(ratios), atol=1e-4)


def save_crafted(folder: Path, model: Any) -> None:
    """Save a model of ours under the tokenizer of no one: engines read ids."""
    model.save_pretrained(folder)


def test_entry_j_is_about_token_j(tmp_path: Path) -> None:
    """A teacher sure that v + 1 follows v, a reference sure of nothing: one position off shows."""
    save_crafted(tmp_path / "dpo", successor_model())
    uniform = successor_model()
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    save_crafted(tmp_path / "sft", uniform)
    row = make_row([50, 10], [[11, 12, 13], [11], [30, 31]], 64)
    stage = stage_of("as_released", support={"kind": "as_released", "k": 2})
    crafted = {name: tmp_path / name for name in ("dpo", "sft")}
    context = context_of(tmp_path / "out", 64, crafted)
    with stage.open(context) as work:
        (found,) = work(as_shard([row], 64))
    assert isinstance(found, ReleasedAdvantages)
    assert found.token_ids_PK[:, 0].tolist() == [11, 12, 13, 11, 11, 31]
    np.testing.assert_allclose(found.token_advantages_P[[0, 1, 2, 3, 5]], np.log(64), atol=1e-3)
    assert found.token_advantages_P[4] < -10  # 30 does not follow 10
    np.testing.assert_allclose(found.teacher_logprobs_N[:2], [0.0, 0.0], atol=1e-3)
    np.testing.assert_allclose(found.reference_logprobs_N, -np.log(64) * np.array([3, 1, 2]))


def test_models_changed_over_flip_every_sign(
    made: dict[str, list[Any]], engines: Engines, rows: list[Responses]
) -> None:
    """The mean that ``threshold`` draws from is the same, so the very tokens are."""
    for kind in ("threshold", "threshold_tau", "union_top_k"):
        flipped = scored(stage_of(kind), rows, engines[::-1])
        for a, b in zip(made[kind], flipped, strict=True):
            for name in (field.name for field in fields(a)):
                ours, theirs = getattr(a, name), getattr(b, name)
                if "advantages" in name:
                    np.testing.assert_array_equal(ours, -theirs)
                elif name == "value_codes_E":  # the sign is the lowest bit
                    np.testing.assert_array_equal(ours, theirs ^ 1)
                elif name not in ("sample_id", "teacher_logprobs_N", "reference_logprobs_N"):
                    np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(a.teacher_logprobs_N, b.reference_logprobs_N)


def test_equal_models_have_no_advantages(engines: Engines, rows: list[Responses]) -> None:
    for row in scored(stage_of("threshold"), rows, (engines[0], engines[0])):
        assert not row.advantages_PK.any() and not row.token_advantages_P.any()
    for row in scored(stage_of("threshold_tau"), rows, (engines[0], engines[0])):
        assert not row.num_entries_P.any() and not row.rest_advantages_P.any()


@pytest.mark.parametrize("kind", SUPPORTS)
def test_rows_do_not_depend_on_their_neighbours_order(
    kind: str, made: dict[str, list[Any]], rows: list[Responses], engines: Engines
) -> None:
    again = scored(stage_of(kind), rows[::-1], engines)[::-1]
    for a, b in zip(made[kind], again, strict=True):
        for field in fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def shard_bytes(stage: AdvantagesStage, pair: EnginePair, context: StageContext, shard: Any) -> str:
    """Write the shard that a pair of engines makes of ``shard``, and return its sha256."""
    made = score_shard(stage, pair, shard, context.engine)
    return write_shard(context.folder / "s.arrow", stage.bind(context), made).sha256


@pytest.mark.slow
def test_side_by_side_and_one_after_the_other_give_the_same_bytes(
    engines: Engines, folders: dict[str, Path], rows: list[Responses], tmp_path: Path
) -> None:
    """One after the other, the second shard begins with the model that the first ended with."""
    context = context_of(tmp_path, VOCAB_SIZE, folders)
    shards = [as_shard(part, VOCAB_SIZE) for part in (rows[:2], rows[2:])]
    stage, ran = stage_of("threshold"), []
    pair: EnginePair = SideBySide(*engines)
    together = [shard_bytes(stage, pair, context, shard) for shard in shards]
    models = context.models["dpo"], context.models["sft"]
    with OneAfterTheOther.opened(models, context.engine) as pair:
        apart = [shard_bytes(stage, pair, context, shards[0])]
        pair.each(lambda engine: ran.append((0, id(engine))))
        pair.each(lambda engine: ran.append((1, id(engine))))
        apart.append(shard_bytes(stage, pair, context, shards[1]))
    assert together == apart and together[0] != together[1]
    assert [call for call, _ in ran] == [0, 0, 1, 1]
    assert ran[1][1] == ran[2][1], "the one that was open last goes first"


def test_the_seed_moves_the_draws_and_nothing_else(
    made: dict[str, list[Any]], engines: Engines, rows: list[Responses]
) -> None:
    other = scored(stage_of("threshold", seed=1), rows, engines)
    pairs = list(zip(made["threshold"], other, strict=True))
    assert any((a.token_ids_PK != b.token_ids_PK).any() for a, b in pairs)
    for a, b in pairs:
        np.testing.assert_array_equal(a.token_advantages_P, b.token_advantages_P)


def test_rows_that_cannot_be_scored_are_rejected_one_by_one(
    engines: Engines, rows: list[Responses]
) -> None:
    long = make_row(list(range(1, 61)), [list(range(1, 7))], VOCAB_SIZE)  # 65 tokens are fed
    fits = make_row(list(range(1, 61)), [list(range(1, 6))], VOCAB_SIZE)
    in_response = make_row([1, 2], [[3, 400]], VOCAB_SIZE)
    in_prompt = make_row([1, 500], [[3, 4]], VOCAB_SIZE)
    given = [long, in_response, rows[0], in_prompt, fits]
    found = scored(stage_of("threshold"), given, engines)
    assert found[0] == Rejected(long.sample_id, "longer than the model's window of 64 tokens")
    for place, token in ((1, 400), (3, 500)):
        reason = f"token id {token} outside the teacher's vocabulary of {VOCAB_SIZE}"
        assert found[place] == Rejected(given[place].sample_id, reason)
    assert [found[place].sample_id for place in (2, 4)] == [rows[0].sample_id, fits.sample_id]


@pytest.mark.slow
def test_the_shorter_window_of_the_two_counts(
    folders: dict[str, Path], rows: list[Responses], tmp_path: Path
) -> None:
    config = LlamaConfig.from_pretrained(folders["sft"], max_position_embeddings=16)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "short")
    long = make_row(list(range(1, 13)), [[1, 2, 3, 4, 5, 6]], VOCAB_SIZE)
    mixed = {"dpo": folders["dpo"], "sft": tmp_path / "short"}
    found = run(stage_of("threshold"), [long, rows[-1]], tmp_path, mixed)
    assert found[0] == Rejected(long.sample_id, "longer than the model's window of 16 tokens")
    assert isinstance(found[1], ThresholdAdvantages)


def test_numbers_that_cannot_be_kept_are_rejected(engines: Engines, rows: list[Responses]) -> None:
    blocks = LogitBlocks(engines[0].head), LogitBlocks(engines[1].head)
    row, (prompted,) = rows[0], prompted_of(as_shard(rows[:1], VOCAB_SIZE))
    finite_PD = torch.randn(len(row.response_ids_A), 32)
    bad_PD = finite_PD.clone()
    bad_PD[-1, 3] = torch.nan
    for hidden in ((finite_PD, bad_PD), (bad_PD, finite_PD)):
        for kind in SUPPORTS:
            found = score_row(stage_of(kind), blocks, Asked(row, prompted, hidden))
            assert found == Rejected(row.sample_id, "non-finite logits")
    huge = stage_of("threshold", beta=1e6)
    found = score_row(huge, blocks, Asked(row, prompted, (finite_PD, finite_PD.flip(0) * 3)))
    assert found == Rejected(row.sample_id, "an advantage that float16 cannot hold")


def test_a_window_set_too_small_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """To reject by a setting that is no part of a table's name would give one name two contents."""
    context = context_of(tmp_path, VOCAB_SIZE, folders, max_model_len=4)
    shard = as_shard([make_row([1, 2, 3], [[4, 5, 6]], VOCAB_SIZE)], VOCAB_SIZE)
    with (
        stage_of("threshold").open(context) as work,
        pytest.raises(ConfigError, match="max_model_len is 4, a row has 5 tokens"),
    ):
        list(work(shard))


def test_unlike_vocabularies_are_refused_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "other", vocab_size=300)
    mixed = {"dpo": folders["dpo"], "sft": tmp_path / "other"}
    with (
        pytest.raises(
            ConfigError,
            match=r"'dpo' has 307 logits and reference 'sft' 300, the tokenizer uses 307",
        ),
        stage_of("threshold").open(context_of(tmp_path, VOCAB_SIZE, mixed)),
    ):
        pass


@pytest.mark.slow
def test_models_of_two_heights_are_compared_on_the_ids_that_tokens_use(
    folders: dict[str, Path], rows: list[Responses], tmp_path: Path
) -> None:
    """The reference has 13 rows of padding; a response with such an id has no advantage."""
    save_model(tmp_path / "tall", seed=2, num_layers=2, head_dim=32, rows=VOCAB_SIZE + 13)
    mixed = {"dpo": folders["dpo"], "sft": tmp_path / "tall"}
    for kind in ("threshold", "exact"):
        out = tmp_path / kind
        padded = make_row([5, 6], [[VOCAB_SIZE + 3]], VOCAB_SIZE + 13)
        with stage_of(kind).open(context_of(out, VOCAB_SIZE + 13, mixed)) as work:
            *found, last = work(as_shard([*rows, padded], VOCAB_SIZE + 13))
        assert isinstance(last, Rejected) and "token id 310 outside" in last.reason
        for row, made_row in zip(rows, found, strict=True):
            aligned_PV, reference_PV = (
                torch.from_numpy(plain_logprobs_of_row(folder, row)[:, :VOCAB_SIZE])
                .log_softmax(1)
                .numpy()
                for folder in mixed.values()
            )
            places_P = np.arange(len(row.response_ids_A))
            full_PV = BETA[kind] * (aligned_PV - reference_PV)
            expected_P = full_PV[places_P, row.response_ids_A]
            np.testing.assert_allclose(made_row.token_advantages_P, expected_P, atol=1e-4)
            if kind == "threshold":
                expected_PK = np.take_along_axis(full_PV, made_row.token_ids_PK, axis=1)
                np.testing.assert_allclose(
                    made_row.advantages_PK, expected_PK, rtol=1 / 128, atol=1e-4
                )


def test_what_the_configuration_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    body = {"stage": "advantages", "input": "r", "model": "dpo", "reference": "sft"}
    with pytest.raises(ValidationError, match="beta\n  Field required"):
        AdvantagesStage.model_validate(body)
    for beta in (0.0, -0.1, float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="beta"):
            AdvantagesStage.model_validate({**body, "beta": beta})
    with pytest.raises(ValidationError, match=r"beta is 0.1, support 'as_released' .* has none"):
        stage_of("as_released", beta=0.1)
    context = context_of(tmp_path, VOCAB_SIZE, folders)
    with pytest.raises(ConfigError, match=r"support\.k is 308, the vocabulary has 307 tokens"):
        stage_of("threshold", support={"kind": "threshold", "k": 308}).bind(context)


def test_what_the_plan_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    stage = stage_of("exact")
    assert list(stage.named(stage.RUNS)) == [("model", "dpo"), ("reference", "sft")]
    names = {"input", "model", "reference", "max_rejected_fraction", "allow_equal_models"}
    assert names == set(stage.NOT_HASHED)
    context = context_of(tmp_path, VOCAB_SIZE, folders)
    assert stage.bind(context).sizes == {"D": 32, "R": 32}
    assert stage_of("threshold").bind(context).sizes == {"K": K}
    assert [stage_of(kind).table.variant for kind in SUPPORTS] == list(SUPPORTS)
    assert not stage_of("threshold").side_files


@pytest.mark.parametrize(
    ("support", "measured"),
    [
        ({"kind": "threshold"}, 31.5),
        ({"kind": "threshold", "tau": 0.006}, 18.9),
        ({"kind": "threshold", "k": 8}, 39.4),
        ({"kind": "threshold", "k": 16}, 73.4),
        ({"kind": "union_top_k", "k": 16}, 65.2),
        ({"kind": "as_released", "k": 50}, 171.7),
        ({"kind": "exact"}, 4278.0),
    ],
)
def test_estimates_are_near_what_the_benchmark_measured(
    support: dict[str, Any], measured: float
) -> None:
    """Bytes a response position of docs/measured/advantages.md."""
    record = ShardRecord(
        name="shard-00000-of-00001",
        split="train",
        num_rows=10,
        num_tokens=900,
        num_positions=400,
        num_bytes=1,
        sha256="0" * 64,
    )
    source = Manifest(
        table="responses",
        version=1,
        variant="",
        fingerprint="",
        tokenizer="",
        vocab_size=49_152,
        identity={},
        shards=(record,),
    )
    stage = stage_of(support["kind"], support=support)
    found = stage.estimate(source, hidden_size=576)
    assert found.num_positions == 400
    assert found.num_bytes / 400 == pytest.approx(measured, rel=0.1)


def test_two_models_fit_together_while_memory_is_free(folders: dict[str, Path]) -> None:
    spec = ModelSpec(folders["dpo"], "float32", "transformers", 32)
    stored = (folders["dpo"] / "model.safetensors").stat().st_size
    assert weight_bytes(folders["dpo"], torch.float32) == stored
    assert weight_bytes(folders["dpo"], torch.bfloat16) == stored // 2
    tiny, large = (EngineOptions(device="cpu", kv_cache_memory_bytes=n) for n in (1, 1 << 50))
    assert fit_together((spec, spec), tiny) and not fit_together((spec, spec), large)


def test_free_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 0  # a system that does not say
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert available_memory(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    assert available_memory(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 7\ninactive_file 400000\n")
    assert available_memory(tmp_path) == 3_000_000 - 1_000_000 + 400_000
    assert available_memory() > 1 << 20


@pytest.mark.slow
@pytest.mark.vllm
def test_two_vllm_engines_live_in_one_process(
    folders: dict[str, Path], rows: list[Responses], tmp_path: Path, made: dict[str, list[Any]]
) -> None:
    """Side by side and one after the other give equal bytes, and transformers' numbers."""
    context = context_of(tmp_path, VOCAB_SIZE, folders, "vllm", kv_cache_memory_bytes=1 << 28)
    models, options = (context.models["dpo"], context.models["sft"]), context.engine
    shards = [as_shard(part, VOCAB_SIZE) for part in (rows[:2], rows[2:])]
    found = []
    for way in (SideBySide, OneAfterTheOther):
        with way.opened(models, options) as pair:
            found.append([shard_bytes(stage_of("threshold"), pair, context, s) for s in shards])
            union = list(score_shard(stage_of("union_top_k"), pair, shards[0], options))
    assert found[0] == found[1]
    for ours, theirs in zip(union, made["union_top_k"], strict=False):
        assert isinstance(ours, UnionAdvantages)
        np.testing.assert_allclose(ours.token_advantages_P, theirs.token_advantages_P, atol=1e-3)
