"""Preference students measured on tiny models, held to a plain float64 forward a token.

Dimensions: P = prompts, V = vocabulary.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

from pipeline.planning.plan import Model, PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.reports.results_report import print_results
from pipeline.steps.run import run_plan
from schemas.errors import ConfigError, IdentityMismatch, StoreError, TeacherCacheError
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from schemas.tables.prompted.response_logprobs import RESPONSE_LOGPROBS, ResponseLogprobs
from stages.models.causal_lm.response_measures import without_repeats
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.stage import TableRef
from stages.student.evaluate_preferences.results import PreferenceReport
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.evaluate_preferences.work import Judge, PreferenceOptions, evaluate_preferences
from tests.fixtures.cached_data import VOCAB_SIZE, save_model, write_table
from tests.fixtures.episode_data import slow_logprob, whole_logprobs
from tests.fixtures.tiny_recipe import Events, teachercache

MODELS = ("sft", "dpo", "teacher", "reference")
MAX_TOKENS, WINDOW, BETA = 6, 64, 0.5
CLOSE: dict[str, Any] = {"rel": 1e-4, "abs": 1e-4}  # float32 forwards of other batches


@dataclass(frozen=True)
class Made:
    """Folders of four models and of tables, and what a slow loop makes of them."""

    root: Path
    end: int
    pairs: list[PreferencePair]

    def folder(self, name: str) -> Path:
        return self.root / name

    @property
    def students(self) -> dict[str, Path]:
        return {name: self.folder(name) for name in ("sft", "dpo")}

    @property
    def judge(self) -> Judge:
        return Judge(self.folder("teacher"), self.folder("reference"), BETA)

    @property
    def held_out(self) -> list[PreferencePair]:
        return [pair for pair in self.pairs if pair.split == "heldout"]

    @cached_property
    def models(self) -> dict[str, Any]:
        """The models in float64."""
        return {name: plain(self.folder(name)) for name in MODELS}

    @cached_property
    def responses(self) -> dict[str, list[list[int]]]:
        """What each student says to the held-out prompts, one plain forward a token."""
        ends = {0, self.end}
        return {
            name: [
                slow_greedy(self.models[name], pair.prompt_ids_T, ends) for pair in self.held_out
            ]
            for name in self.students
        }

    def logprob(self, name: str, prompt: Any, response: Any) -> float:
        with torch.no_grad():
            return float(slow_logprob(self.models[name], list(map(int, prompt)), list(response)))

    def reward(self, at: int, response: Any) -> float:
        """The judge's reward of a response to a held-out prompt."""
        asked = self.held_out[at].prompt_ids_T, response
        return BETA * (self.logprob("teacher", *asked) - self.logprob("reference", *asked))

    def measure(self, *tables: str, **changes: Any) -> PreferenceReport:
        settings: dict[str, Any] = {
            "students": self.students,
            "data": [self.folder("pairs"), *map(self.folder, tables)],
            "baseline": "sft",
            "judge": self.judge,
            "options": PreferenceOptions(max_tokens=MAX_TOKENS, batch_size=3),
            **changes,
        }
        return evaluate_preferences(settings.pop("students"), settings.pop("data"), **settings)


def plain(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def slow_greedy(model: Any, prompt: Any, ends: set[int]) -> list[int]:
    new: list[int] = []
    while len(new) < MAX_TOKENS and not (new and new[-1] in ends):
        ids = torch.tensor([[*map(int, prompt), *new]])
        new.append(int(model(input_ids=ids).logits[0, -1].argmax()))
    return new


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Pairs whose end of turn is a token the students do say: some end with it, some are cut."""
    root = tmp_path_factory.mktemp("preferences")
    for seed, name in enumerate(MODELS):
        save_model(root / name, seed=seed, num_layers=1 + seed % 2)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, VOCAB_SIZE, length) for length in (5, 9, 3, 7, 7, 4, 8, 6, 2, 5)]
    end = often_said([plain(root / name) for name in ("sft", "dpo")], prompts)
    made = Made(root, end, [as_pair(rng, prompt, end, "heldout") for prompt in prompts])
    train = as_pair(rng, rng.integers(1, VOCAB_SIZE, 5), end, "train")
    long = as_pair(rng, rng.integers(1, VOCAB_SIZE, WINDOW - MAX_TOKENS + 1), end, "heldout")
    bound = PREFERENCE_PAIRS.bind(vocab_size=VOCAB_SIZE)
    write_table(root / "pairs", bound, [train, *made.pairs, long], made.folder("sft"))
    for name in ("teacher", "reference"):
        write_scores(made, f"{name}_scores", name, made.held_out)
    return made


def often_said(models: Sequence[Any], prompts: Sequence[Any]) -> int:
    """The token that most of the free responses hold, but not all: so that both ways to end occur.

    Zero ends the text by the model folder's own files and is not chosen.
    """
    said = [set(slow_greedy(model, x, set())) for model in models for x in prompts]
    counts = Counter(token for tokens in said for token in tokens if token)
    return max((t for t, n in counts.items() if n <= len(said) * 2 // 3), key=counts.__getitem__)


def as_pair(rng: np.random.Generator, prompt_T: Any, end: int, split: str) -> PreferencePair:
    chosen, rejected = (rng.integers(1, VOCAB_SIZE, rng.integers(1, 5)) for _ in range(2))
    finished = bool(rng.integers(2))
    row = PreferencePair(
        sample_id="",
        split=split,
        prompt_ids_T=prompt_T,
        chosen_ids_C=np.append(chosen, end),
        rejected_ids_R=np.append(rejected, end) if finished else rejected,
        chosen_finished=True,
        rejected_finished=finished,
    )
    return replace(row, sample_id=row.hashed_id)


def write_scores(
    made: Made, table: str, model: str, pairs: Sequence[PreferencePair], *, shift: float = 0.0
) -> None:
    """Write ``response_logprobs`` in another row order; ``shift`` is added to chosen scores."""
    rows = [
        ResponseLogprobs(
            sample_id=pair.sample_id,
            response_logprobs_N=np.array(
                [
                    made.logprob(model, pair.prompt_ids_T, pair.chosen_ids_C) + shift,
                    made.logprob(model, pair.prompt_ids_T, pair.rejected_ids_R),
                ]
            ),
            response_num_tokens_N=np.array([len(pair.chosen_ids_C), len(pair.rejected_ids_R)]),
        )
        for pair in reversed(pairs)
    ]
    bound = RESPONSE_LOGPROBS.bind(vocab_size=VOCAB_SIZE)
    splits = {pair.sample_id: pair.split for pair in pairs}
    write_table(made.folder(table), bound, rows, made.folder("sft"), splits=splits)


@pytest.fixture(scope="module")
def report(made: Made) -> PreferenceReport:
    return made.measure()


def mean(values: Any) -> float:
    return float(np.mean(values))


def test_responses_end_with_the_stop_token_or_are_cut(made: Made, report: PreferenceReport) -> None:
    """The data's end of turn stops a student too, though no file of its folder names it."""
    for name, numbers in report.students.items():
        said = made.responses[name]
        ended = [ids[-1] in (0, made.end) for ids in said]
        assert numbers["response_tokens"] == mean([len(ids) for ids in said])
        assert numbers["finished"] == mean(ended)
        assert numbers["empty"] == mean(
            [len(ids) == 1 and e for ids, e in zip(said, ended, strict=True)]
        )
        assert all(len(ids) == MAX_TOKENS for ids, e in zip(said, ended, strict=True) if not e)
    every = [ids for said in made.responses.values() for ids in said]
    assert {ids[-1] == made.end for ids in every} == {True, False}
    assert all(made.end not in ids[:-1] for ids in every)


def test_rewards_are_those_of_slow_forwards(made: Made, report: PreferenceReport) -> None:
    """The stop token of a finished response is scored; a cut one has none to score."""
    pairs = made.held_out
    columns = {**made.responses, "chosen": [p.chosen_ids_C.tolist() for p in pairs]}
    columns["rejected"] = [p.rejected_ids_R.tolist() for p in pairs]
    slow = {
        name: [made.reward(*item) for item in enumerate(said)] for name, said in columns.items()
    }
    found = {**report.students, **report.data}
    for name, rewards in slow.items():
        lengths = [len(ids) for ids in columns[name]]
        per_token = [r / n for r, n in zip(rewards, lengths, strict=True)]
        assert found[name]["reward"] == pytest.approx(mean(rewards), **CLOSE)
        assert found[name]["reward_per_token"] == pytest.approx(mean(per_token), **CLOSE)
        assert found[name]["response_tokens"] == mean(lengths)
    assert report.data["chosen"]["finished"] == 1.0
    assert report.data["rejected"]["finished"] == mean([p.rejected_finished for p in pairs])
    won = [a > b for a, b in zip(slow["dpo"], slow["sft"], strict=True)]
    assert report.students["dpo"]["win_rate"] == mean(won) and 0 < mean(won) < 1
    (comparison,) = report.win_rates
    assert (comparison.first, comparison.second) == ("sft", "dpo")
    assert comparison.result.rate == pytest.approx(1 - mean(won))
    margins = np.subtract(slow["chosen"], slow["rejected"])
    assert report.judge is not None and not report.judge.cached
    assert report.judge.accuracy == mean(margins > 0)
    assert report.judge.margin == pytest.approx(margins.mean(), **CLOSE)


def test_a_students_own_view_is_that_of_slow_forwards(made: Made, report: PreferenceReport) -> None:
    pairs = made.held_out
    sums_P2 = {
        name: np.array(
            [
                [made.logprob(name, p.prompt_ids_T, y) for y in (p.chosen_ids_C, p.rejected_ids_R)]
                for p in pairs
            ]
        )
        for name in made.students
    }
    lengths_P2 = np.array([[len(p.chosen_ids_C), len(p.rejected_ids_R)] for p in pairs])
    for name, logprobs_P2 in sums_P2.items():
        numbers = report.students[name]
        margins_P = logprobs_P2[:, 0] - logprobs_P2[:, 1]
        means_P2 = logprobs_P2 / lengths_P2
        assert numbers["accuracy"] == mean(margins_P > 0)
        assert numbers["margin"] == pytest.approx(margins_P.mean(), **CLOSE)
        assert numbers["accuracy_per_token"] == mean(means_P2[:, 0] > means_P2[:, 1])
        loss = -logprobs_P2[:, 0].sum() / lengths_P2[:, 0].sum()
        assert numbers["cross_entropy"] == pytest.approx(loss, **CLOSE)
    ratios_P = np.subtract(*(sums_P2["dpo"] - sums_P2["sft"]).T)
    assert report.students["dpo"]["relative_accuracy"] == mean(ratios_P > 0)
    assert report.students["dpo"]["relative_margin"] == pytest.approx(ratios_P.mean(), **CLOSE)
    absent = {"relative_accuracy", "relative_margin", "win_rate", "win_rate_low", "win_rate_high"}
    assert set(report.students["dpo"]) - set(report.students["sft"]) == absent


def test_kl_to_the_baseline_against_dense_float64(made: Made, report: PreferenceReport) -> None:
    """Mean over all positions of the responses, position j predicted at len(prompt) - 1 + j."""
    kls: list[float] = []
    for pair, ids in zip(made.held_out, made.responses["dpo"], strict=True):
        whole = [*pair.prompt_ids_T.tolist(), *ids]
        start = len(whole) - len(ids) - 1
        with torch.no_grad():
            p, q = (whole_logprobs(made.models[name], whole)[start:] for name in ("dpo", "sft"))
        kls += (p.exp() * (p - q)).sum(dim=1).tolist()
    assert len(kls) == sum(map(len, made.responses["dpo"]))
    assert report.students["dpo"]["kl_to_baseline"] == pytest.approx(mean(kls), rel=1e-4)
    assert report.students["dpo"]["kl_to_baseline"] > 0.1
    assert report.students["sft"]["kl_to_baseline"] == 0.0


def test_only_held_out_rows_that_fit_are_measured(made: Made, report: PreferenceReport) -> None:
    assert report.num_prompts == len(made.held_out) == 10
    assert (report.num_too_long, report.num_missing) == (1, 0)  # the one at the window's edge
    trained = made.measure(split="train", judge=None)
    assert (trained.num_prompts, trained.num_too_long) == (1, 0)


def test_batches_change_no_more_than_last_bits(made: Made, report: PreferenceReport) -> None:
    alone = made.measure(options=PreferenceOptions(max_tokens=MAX_TOKENS, batch_size=1))
    for name, numbers in report.students.items():
        assert alone.students[name] == pytest.approx(numbers, rel=1e-4, abs=1e-5)


def test_equal_students_tie(made: Made, tmp_path: Path) -> None:
    """A copy under another name: equal responses are scored once, so no last bit decides."""
    copied = Path(shutil.copytree(made.folder("sft"), tmp_path / "copy"))
    report = made.measure(students={**made.students, "copy": copied})
    copy = report.students["copy"]
    assert (copy["win_rate"], copy["win_rate_low"], copy["win_rate_high"]) == (0.5, 0.5, 0.5)
    assert copy["kl_to_baseline"] == 0.0 and copy["relative_margin"] == 0.0
    assert copy["relative_accuracy"] == 0.0  # ties do not help
    pairs = {(found.first, found.second): found.result for found in report.win_rates}
    assert set(pairs) == {("sft", "dpo"), ("sft", "copy"), ("dpo", "copy")}
    assert pairs["sft", "copy"].num_ties == report.num_prompts


def test_a_response_is_scored_once_whatever_the_width_of_its_ids() -> None:
    given = [np.array(ids) for ids in ([3, 4], [5], [3, 4], [3])]
    kept, places = without_repeats([*given, np.array([5], np.uint16)])
    assert [ids.tolist() for ids in kept] == [[3, 4], [5], [3]]
    assert places == [0, 1, 0, 2, 1]


def test_cached_scores_of_the_judge_give_what_live_ones_do(
    made: Made, report: PreferenceReport
) -> None:
    cached = made.measure("teacher_scores", "reference_scores")
    assert cached.judge is not None and report.judge is not None and cached.judge.cached
    assert cached.judge.accuracy == report.judge.accuracy
    assert cached.judge.margin == pytest.approx(report.judge.margin, **CLOSE)
    assert cached.data["chosen"] == pytest.approx(report.data["chosen"], **CLOSE)
    assert cached.students == report.students


@pytest.mark.slow
def test_the_first_table_is_the_teachers(made: Made) -> None:
    """Other numbers in the tables show up with the sign of their place; live ones do not move."""
    write_scores(made, "shifted_scores", "teacher", made.held_out[:7], shift=-100.0)
    live = made.measure()
    cached = made.measure("shifted_scores", "reference_scores")
    swapped = made.measure("reference_scores", "shifted_scores")
    assert cached.num_missing == 4 and cached.num_prompts == 7  # the long one has no score either
    assert cached.judge is not None and swapped.judge is not None
    assert cached.judge.accuracy == 0.0 and swapped.judge.accuracy == 1.0
    assert cached.judge.margin == pytest.approx(-swapped.judge.margin)
    assert cached.data["chosen"]["reward"] < -0.9 * BETA * 100
    assert cached.students["dpo"]["reward"] == pytest.approx(
        swapped.students["dpo"]["reward"], **CLOSE
    )
    assert live.num_prompts == 10


def test_without_judge_and_baseline_the_rest_is_measured(made: Made) -> None:
    report = made.measure(judge=None, baseline=None)
    assert report.judge is None and report.win_rates == ()
    assert not any(
        "reward" in found for found in (*report.students.values(), *report.data.values())
    )
    assert "kl_to_baseline" not in report.students["dpo"]
    assert report.students["dpo"]["response_tokens"] > 0


def test_examples_can_be_read(made: Made, report: PreferenceReport) -> None:
    decode = AutoTokenizer.from_pretrained(made.folder("sft")).decode
    known = {pair.sample_id: index for index, pair in enumerate(made.held_out)}
    assert len(report.examples) == 5
    for example in report.examples:
        at = known[example.sample_id]
        assert example.prompt == decode(made.held_out[at].prompt_ids_T)
        for name, shown in example.students.items():
            ids = made.responses[name][at]
            assert (shown.text, shown.num_tokens) == (decode(ids), len(ids))
            assert shown.reward == pytest.approx(made.reward(at, ids), **CLOSE)
        assert example.data["rejected"].finished == made.held_out[at].rejected_finished
    again = made.measure(options=PreferenceOptions(max_tokens=MAX_TOKENS, seed=1))
    assert [e.sample_id for e in again.examples] != [e.sample_id for e in report.examples]


def refusal(kind: type[TeacherCacheError], made: Made, *tables: str, **changes: Any) -> str:
    with pytest.raises(kind) as found:
        made.measure(*tables, **changes)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_judge_that_is_one_model_twice_is_refused(made: Made, tmp_path: Path) -> None:
    """By its weights: a copy in another folder is the same model."""
    teacher = made.folder("teacher")
    copied = Path(shutil.copytree(teacher, tmp_path / "copy"))
    for reference in (teacher, copied):
        said = refusal(ConfigError, made, judge=Judge(teacher, reference))
        assert "are one model, so every reward would be 0" in said
    said = refusal(ConfigError, made, "teacher_scores", "teacher_scores")
    assert "hold one model's scores" in said


def test_models_of_other_tokens_are_refused(made: Made, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made.folder("dpo"), tmp_path / "other"))
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"w5"', '"w5x"'))
    for changes in (
        {"students": {"sft": made.folder("sft"), "other": other}},
        {"judge": Judge(other, made.folder("reference"))},
    ):
        said = refusal(IdentityMismatch, made, **changes)
        assert str(other) in said and "share the pairs' tokenizer" in said
    small = Path(shutil.copytree(made.folder("dpo"), tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB_SIZE - 7}))
    said = refusal(IdentityMismatch, made, students={"sft": made.folder("sft"), "small": small})
    assert f"has a vocabulary of {VOCAB_SIZE - 7}, the pairs' ids need {VOCAB_SIZE}" in said


def test_padding_rows_of_a_student_are_no_tokens_of_the_baseline_or_the_judge(
    made: Made, tmp_path: Path
) -> None:
    """A head with more rows than its tokens, of which it writes one."""
    model = plain(made.folder("dpo"))
    model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    with torch.no_grad():
        likely = made.responses["dpo"][0][0]
        model.lm_head.weight[VOCAB_SIZE + 2] = 2 * model.lm_head.weight[likely]
    wide = Path(shutil.copytree(made.folder("dpo"), tmp_path / "wide"))
    model.float().save_pretrained(wide)
    students = {"sft": made.folder("sft"), "wide": wide}
    assert "no KL is between them" in refusal(IdentityMismatch, made, students=students)
    said = refusal(IdentityMismatch, made, students=students, baseline=None)
    assert f"wrote token {VOCAB_SIZE + 2}, the judge" in said


def test_rows_that_are_not_there_are_refused(made: Made, tmp_path: Path) -> None:
    bound = PREFERENCE_PAIRS.bind(vocab_size=VOCAB_SIZE)
    train = [replace(pair, split="train") for pair in made.held_out]
    write_table(tmp_path / "train", bound, train, made.folder("sft"))
    said = refusal(ConfigError, made, data=[tmp_path / "train"])
    assert "has no row in split 'heldout': give the step that reads the text a heldout_f" in said
    options = PreferenceOptions(max_tokens=WINDOW)
    said = refusal(StoreError, made, options=options)
    assert "none of 11 'heldout' pairs can be measured" in said
    assert f"11 do not fit a window of {WINDOW} tokens with {WINDOW} to write" in said


def test_other_tables_are_refused(made: Made, tmp_path: Path) -> None:
    document = Document(sample_id="0" * 24, split="heldout", input_ids_T=np.array([1, 2]))
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "documents", bound, [document], made.folder("sft"))
    said = refusal(ConfigError, made, data=[tmp_path / "documents"])
    assert "is table documents, expected preference_pairs first" in said
    said = refusal(ConfigError, made, "teacher_scores")
    assert "has 1 tables beside the preference pairs, expected none or two" in said
    said = refusal(ConfigError, made, "teacher_scores", "reference_scores", judge=None)
    assert "which only a judge would read" in said
    other = replace(made.held_out[0], chosen_ids_C=np.array([3, 4, 5, 6, 7, 8]))
    write_scores(made, "other_scores", "teacher", [other, *made.held_out[1:]])
    said = refusal(StoreError, made, "other_scores", "reference_scores")
    assert f"sample {other.sample_id}: " in said and "make it with these pairs as input" in said


STEP: dict[str, Any] = {
    "stage": "evaluate_preferences",
    "students": ["dpo", "adpa"],
    "baseline": "sft",
    "data": ["pairs"],
    "judge": {"teacher": "teacher", "reference": "sft", "beta": 0.5},
}


def models_of(stage: PreferenceEvaluationStage) -> list[str]:
    """The models that a step loads, each once."""
    return list(dict.fromkeys(name for _, name in stage.named(stage.RUNS)))


def test_a_step_says_which_models_it_loads_and_in_which_roles() -> None:
    stage = PreferenceEvaluationStage.model_validate(STEP)
    assert stage.measured == ("dpo", "adpa", "sft")
    assert models_of(stage) == ["dpo", "adpa", "sft", "teacher"]
    judge = {"teacher": 3, "reference": 2, "beta": 0.5}
    roles = {"students": [0, 1], "baseline": 2, "judge": judge}
    assert stage.hashed()["config"]["roles"] == roles
    inside = PreferenceEvaluationStage.model_validate({**STEP, "baseline": "adpa", "judge": None})
    assert models_of(inside) == ["dpo", "adpa"]
    assert inside.hashed()["config"]["roles"] == {"students": [0, 1], "baseline": 1}
    assert {"data", "judge"} == set(stage.NOT_HASHED)


def test_a_student_of_another_name_makes_the_report_anew() -> None:
    """A report names its students: one from the cache would say the names they had."""
    stage = PreferenceEvaluationStage.model_validate(STEP)
    renamed = PreferenceEvaluationStage.model_validate({**STEP, "students": ["dpo", "best"]})
    assert renamed.hashed() != stage.hashed()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"judge": {"teacher": "a", "reference": "a"}}, "are both 'a'"),
        ({"judge": {"teacher": "a", "reference": "b", "beta": 0.0}}, "greater than 0"),
        ({"data": ["pairs", "one"]}, "expected none or two"),
        ({"data": ["pairs", "one", "two"], "judge": None}, "which only a judge would read"),
        ({"students": []}, "at least 1 item"),
    ],
)
def test_steps_that_mean_nothing_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PreferenceEvaluationStage.model_validate({**STEP, **changes})


def planned(made: Made, *tables: tuple[str, str], folder: Path) -> PlannedStep:
    """The step of a plan whose ``tables`` (name, model that scored them) are finished."""

    def model(name: str) -> Model:
        return Model(made.folder(name), "float32", "transformers", {"weights": name}, "t")

    def source(name: str, models: dict[str, Model]) -> PlannedStep:
        stage: Any = None
        return PlannedStep(name, stage, {}, name, made.folder(name), models=models)

    names = [name for name, _ in tables]
    judge = {"teacher": "teacher", "reference": "reference", "beta": BETA}
    body = {**STEP, "students": ["dpo"], "data": ["pairs", *names], "judge": judge}
    stage: Any = PreferenceEvaluationStage.model_validate({**body, "max_tokens": MAX_TOKENS})
    inputs = (source("pairs", {}), *(source(name, {by: model(by)}) for name, by in tables))
    models = {name: model(name) for name in models_of(stage)}
    return PlannedStep("results", stage, {}, "f" * 64, folder, inputs, models)


def test_a_step_writes_numbers_win_rates_and_examples(
    made: Made, report: PreferenceReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = (("teacher_scores", "teacher"), ("reference_scores", "reference"))
    step = planned(made, *tables, folder=tmp_path / "results")
    events = Events()
    run_plan([step], Execution(root=tmp_path), events)
    assert "measuring dpo" in events.lines and events.finished == ["results"]
    body = json.loads((step.folder / "evaluation.json").read_text())
    assert list(body["students"]) == ["dpo", "sft"] and body["judge"]["cached"]
    assert body["students"]["dpo"] == pytest.approx(report.students["dpo"], **CLOSE)
    assert len(body["examples"]) == 5
    record = read_checkpoint(step.folder)
    assert record is not None and record.metrics == body["students"]
    print_results(Console(width=200), [step])
    out = capsys.readouterr().out
    for words in ("results", "dpo", "sft, baseline", "(chosen)", "(judge)", "over sft"):
        assert words in out, out


def test_a_plan_holds_the_judges_tables_to_its_models(made: Made, tmp_path: Path) -> None:
    teacher, reference = ("teacher_scores", "teacher"), ("reference_scores", "reference")

    def check(*tables: tuple[str, str], **models: Model) -> None:
        step = planned(made, *tables, folder=tmp_path / "results")
        made_by = [next((m.identity for m in s.models.values()), None) for s in step.inputs]
        refs = [
            TableRef(source.name, PREFERENCE_PAIRS, maker)
            for source, maker in zip(step.inputs, made_by, strict=True)
        ]
        identities = {name: model.identity for name, model in {**step.models, **models}.items()}
        step.stage.check(refs, identities)

    check()
    check(teacher, reference)
    with pytest.raises(ConfigError, match="'reference_scores' was not scored by 'teacher'"):
        check(reference, teacher)
    with pytest.raises(ConfigError, match="'reference_scores' was not scored by 'reference'"):
        check(teacher, ("reference_scores", "teacher"))
    same = planned(made, folder=tmp_path / "results").models["teacher"]
    with pytest.raises(ConfigError, match="'teacher' and reference 'reference' are one model"):
        check(reference=same)


def test_the_command_prints_a_table_and_json(made: Made, report: PreferenceReport) -> None:
    pairs = ("--data", str(made.folder("pairs")))
    folders = str(made.folder("teacher")), str(made.folder("reference"))
    judge = ("--judge", folders[0], "--judge-reference", folders[1], "--beta", str(BETA))
    baseline = ("--baseline", str(made.folder("sft")), "--max-tokens", str(MAX_TOKENS))
    said = teachercache("evaluate", made.folder("dpo"), *pairs, *judge, *baseline, "--json")
    assert said.code == 0, said.err
    body = json.loads(said.out)
    assert body["students"]["student"] == pytest.approx(report.students["dpo"], **CLOSE)
    shown = teachercache("evaluate", made.folder("dpo"), *pairs, *judge, *baseline)
    for words in ("wins over baseline", "KL to baseline", "(rejected)", "prompt", "1 pairs left"):
        assert words in shown.out, shown.out
    alone = teachercache("evaluate", made.folder("dpo"), *pairs, "--max-tokens", "4")
    assert alone.code == 0 and "reward" not in alone.out and "margin" in alone.out


def test_options_that_do_not_belong_together_are_one_line(made: Made, tmp_path: Path) -> None:
    student, pairs = made.folder("dpo"), ("--data", str(made.folder("pairs")))
    said = teachercache("evaluate", student, *pairs, "--judge", str(made.folder("teacher")))
    assert said.code == 2 and "--judge and --judge-reference go together" in said.error
    document = Document(sample_id="0" * 24, split="heldout", input_ids_T=np.array([1, 2]))
    bound = DOCUMENTS.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "documents", bound, [document], student)
    data = ("--data", str(tmp_path / "documents"), "--baseline", str(student))
    said = teachercache("evaluate", student, *data)
    assert said.code == 2 and "are about preference_pairs" in said.error
