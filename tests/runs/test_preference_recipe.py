"""The example recipes of preference alignment, whole chains, on a tiny chat model.

Every step of the three YAML files runs as it is written there: other models, fewer rows and steps
are set as a user would. The engine is transformers; vLLM's own tests hold it to the same numbers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.planning.plan import PlannedStep, make_plan
from pipeline.planning.recipe_file import load_recipe
from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch
from schemas.storage.manifest import read_manifest
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import Said, teachercache, write_jsonl
from tests.stages.sources.test_preference_pairs import CHATML

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDENTS = {
    "dckd": ("sft", "dpo", "dckd"),
    "adpa": ("sft", "dpo", "adpa", "adpa_as_released"),
    "adpa_plus": ("sft", "dpo", "dckd", "adpa", "adpa_as_released", "adpa_plus"),
}


@pytest.fixture(scope="module")
def world(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder as the fetchers leave it: a chat model, text, and pairs in ShareGPT's form."""
    cache = tmp_path_factory.mktemp("world")
    model = save_tiny_model(cache / "models" / "smollm2-135m-instruct", vocab_size=640)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    write_jsonl(cache / "text" / "c4_demo.jsonl", paragraphs[:60])
    words = [paragraph.split() for paragraph in paragraphs[60:110]]
    pairs = [
        {
            "conversations": [{"from": "human", "value": " ".join(text[:5]) + f" {number}?"}],
            "chosen": {"from": "gpt", "value": " ".join(text[5:9]) + "."},
            "rejected": {"from": "gpt", "value": " ".join(text[9:16]) + "."},
        }
        for number, text in enumerate(words)
    ]
    path = cache / "pairs" / "dpo_en_demo.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return cache


@pytest.fixture(autouse=True)
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHERCACHE_CACHE", str(world))


def settings(name: str, root: Path) -> list[str]:
    """What a user would set to run an example on a tiny model within seconds."""
    small = {
        "execution.root": root,
        "execution.engine.max_model_len": 256,
        "execution.engine.num_threads": 1,
        "models.teacher.engine": "transformers",
        "steps.pairs.max_rows": 24,
        "steps.pairs.max_prompt_length": 64,
        "steps.pairs.max_response_length": 48,
        "steps.aligned_teacher.max_steps": 2,
        "steps.text.length": 48,
        "steps.text.max_rows": 16,
        "steps.pruned.layers": "[0]",
    }
    made = {"aligned": "aligned_teacher", "sft": "sft", "dckd": "dckd"}
    for model, step in made.items():
        if model != "dckd" or name == "adpa_plus":
            place = f"{{step: {step}, dtype: float32, engine: transformers}}"
            small[f"models.{model}"] = place
    for step in ("student", *STUDENTS[name]):
        small[f"steps.{step}.max_steps"] = 2
    if name != "dckd":
        small["steps.sft_responses.max_tokens"] = 8
    if name == "adpa_plus":
        small["steps.dckd_responses.max_tokens"] = 8
    small["steps.results.max_tokens"] = 8
    return [f"{path}={value}" for path, value in small.items()]


def run_example(name: str, root: Path) -> Said:
    flags = [part for setting in settings(name, root) for part in ("--set", setting)]
    return teachercache("run", EXAMPLES / f"{name}.yaml", *flags)


def plan_of(name: str, root: Path, *more: str) -> dict[str, PlannedStep]:
    recipe = load_recipe(EXAMPLES / f"{name}.yaml", [*settings(name, root), *more])
    return {step.name: step for step in make_plan(recipe)}


@pytest.mark.slow
def test_the_examples_run_from_pairs_to_a_table(tmp_path: Path) -> None:
    """All three on one root: what one made the next one finds done."""
    for name, students in STUDENTS.items():
        said = run_example(name, tmp_path)
        assert said.code == 0, said.err
        steps = plan_of(name, tmp_path)
        report = json.loads((steps["results"].folder / "evaluation.json").read_text())
        assert set(report["students"]) == set(students)
        for word in ("wins", "reward", *students):
            assert word in said.out, (word, said.out)
        assert "sft, before " in said.out and "sft, untrained" not in said.out
        if name != "dckd":
            assert "[pairs] done already" in said.out
            assert "[aligned_teacher] done already" in said.out
    assert teachercache("verify", tmp_path).code == 0

    steps = plan_of("adpa_plus", tmp_path)
    tables = [steps[name].folder for name in ("pairs", "dckd_responses", "dckd_advantages")]
    joined = open_dataset(tables)
    row = joined[0]
    assert len(row["response_ids_A"]) == len(row["token_advantages_P"])
    assert np.abs(row["token_advantages_P"]).max() > 0
    assert read_manifest(tables[2]).variant == "threshold_tau"

    shown = {
        "pairs": "<|im_start|>assistant",
        "sft_responses": "finish reason",
        "sft_logprobs": "log p (nats)",
        "sft_advantages": "A - rest",
        "sft_advantages_released": "aligned",
        "pair_signals": "the teacher's tokens",
    }
    teacher = steps["sft_advantages"].models["teacher"].folder
    for name, words in shown.items():
        said = teachercache("inspect", steps[name].folder, "--tokenizer", teacher)
        assert said.code == 0 and words in said.out, (name, said.err, said.out)

    student, baseline = steps["dckd"].folder, steps["sft"].folder
    asked: list[str | Path] = [
        "--data",
        steps["pairs"].folder,
        "--baseline",
        baseline,
        "--max-tokens",
        "4",
    ]
    judge: list[str | Path] = [
        "--judge",
        steps["aligned_teacher"].folder,
        "--judge-reference",
        teacher,
    ]
    said = teachercache("evaluate", student, *asked, *judge, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["students"]["student"]["kl_to_baseline"] > 0


def test_a_retrained_student_answers_anew(tmp_path: Path) -> None:
    """DCKD's checkpoint is part of every later name; who reads none of it keeps its own."""
    before = plan_of("adpa_plus", tmp_path)
    after = plan_of("adpa_plus", tmp_path, "steps.dckd.seed=1")
    moved = {name for name in before if before[name].fingerprint != after[name].fingerprint}
    assert moved == {"dckd", "dckd_responses", "dckd_advantages", "adpa_plus", "results"}


def test_swapped_teachers_are_another_table_and_equal_ones_are_refused(tmp_path: Path) -> None:
    plain = plan_of("adpa", tmp_path)["sft_advantages"].fingerprint
    swapped = ("steps.sft_advantages.model=teacher", "steps.sft_advantages.reference=aligned")
    assert plan_of("adpa", tmp_path, *swapped)["sft_advantages"].fingerprint != plain
    same = "steps.sft_advantages.reference=aligned"
    with pytest.raises(ConfigError, match=r"sft_advantages.reference: 'aligned' is the aligned te"):
        plan_of("adpa", tmp_path, same)
    copied = "models.copy={step: aligned_teacher, dtype: float32, engine: transformers}"
    with pytest.raises(ConfigError, match="so all advantages would be 0"):
        plan_of("adpa", tmp_path, copied, "steps.sft_advantages.reference=copy")
    assert plan_of("adpa", tmp_path, same, "steps.sft_advantages.allow_equal_models=true")
    with pytest.raises(ConfigError, match=r"sft_advantages.reference: 'nobody' is neither"):
        plan_of("adpa", tmp_path, "steps.sft_advantages.reference=nobody")


def test_models_of_another_tokenizer_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    """The vocabulary sizes agree; the tiny model's tokenizer knows no chat tokens."""
    other = f"models.other={{path: '{tiny_model}', dtype: float32, engine: transformers}}"
    for place in ("sft_advantages.reference", "sft_advantages.model", "sft_responses.model"):
        with pytest.raises(IdentityMismatch, match=r"of vocabulary .*, model 'other' has"):
            plan_of("adpa", tmp_path, other, f"steps.{place}=other")


def test_pairs_without_a_chat_template_are_one_line(tmp_path: Path, tiny_model: Path) -> None:
    recipe: Any = settings("dckd", tmp_path)
    flags = [part for setting in recipe for part in ("--set", setting)]
    said = teachercache(
        *("run", EXAMPLES / "dckd.yaml", *flags),
        *("--set", f"models.teacher.path={tiny_model}"),
    )
    assert said.code == 2
    assert "has no chat template" in said.error and "template: plain" in said.error
