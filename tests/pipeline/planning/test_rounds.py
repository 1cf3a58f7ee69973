"""``rounds`` of a training step: which steps there are then, what each reads, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from teachercache_recipes import RecipeError, read_recipe

from pipeline.planning.plan import PlannedStep, make_plan, needs
from pipeline.planning.recipe_file import load_recipe
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, error_of, make_recipe

ANSWER = {"stage": "responses", "input": "chats", "model": "writer", "max_tokens": 4}
STEPS: dict[str, Any] = {
    "chats": {
        "stage": "conversations",
        "tokenizer": "teacher",
        "source": {"kind": "jsonl", "paths": ["chats.jsonl"]},
        "max_length": 64,
        "heldout_fraction": 0.2,
    },
    "first": {"stage": "student_init", "model": "teacher", "layers": [0]},
    "said": ANSWER,
    "scored": {
        "stage": "response_logprobs",
        "input": "said",
        "model": "teacher",
        "per_token": True,
    },
    "student": {
        "stage": "train",
        "student": "first",
        "data": ["said", "scored"],
        "objective": {"loss": "opd"},
        "max_steps": 1,
        "rounds": 3,
    },
    "results": {"stage": "evaluate", "students": ["first", "student"], "data": ["said", "scored"]},
}
ROUND = ("said", "scored", "student")

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def recipe(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    made = make_recipe(tmp_path, tiny_model, paragraphs[:2], more_steps=STEPS)
    edit_recipe(made, "models", "writer", value={"step": "first", "engine": "transformers"})
    edit_recipe(made, "steps", "chats", "source", "paths", value=[str(chats)])
    return made.only(*STEPS)


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model of the same tokenizer, of other weights."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    doubled = {name: 2 * weight for name, weight in weights.items()}
    save_file(doubled, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_name(recipe: TinyRecipe, *overrides: str) -> dict[str, PlannedStep]:
    return {step.name: step for step in recipe.plan(*overrides)}


def test_each_round_reads_what_the_student_of_the_round_before_says(recipe: TinyRecipe) -> None:
    plan = by_name(recipe)
    rounds = [f"{name}{number}" for number in ("-r1", "-r2", "") for name in ROUND]
    assert list(plan) == ["chats", "first", *rounds, "results"]
    before = "first"
    for number in ("-r1", "-r2", ""):
        said, scored, student = (plan[f"{name}{number}"] for name in ROUND)
        (writer,) = said.models.values()
        assert (writer.base, writer.engine) == (plan[before].place, "transformers")
        assert said.inputs == (plan["chats"],) and scored.inputs == (said,)
        assert [str(model.base) for model in scored.models.values()] == [
            load_recipe(recipe.path).models["teacher"].path
        ]
        assert student.inputs == (said, scored)
        assert next(iter(student.models.values())).base == plan[before].place
        before = student.name
    results = plan["results"]
    assert [model.base for model in results.models.values()] == [
        plan["first"].place,
        plan["student"].place,
    ]
    assert results.inputs == (plan["said"], plan["scored"])
    assert len({step.fingerprint for step in plan.values()}) == len(plan)


def test_one_round_more_leaves_the_others_where_they_lie(recipe: TinyRecipe) -> None:
    places = {}
    for rounds in (1, 2, 3):
        plan = by_name(recipe, f"steps.student.rounds={rounds}")
        numbers = [*(f"-r{number}" for number in range(1, rounds)), ""]
        places[rounds] = [[plan[f"{name}{n}"].place for name in ROUND] for n in numbers]
    assert places[2][:1] == places[1] and places[3][:2] == places[2]
    plain = recipe.path.read_text().replace("    rounds: 3\n", "")
    assert "rounds" not in plain
    recipe.path.write_text(plain)
    assert [by_name(recipe)[name].place for name in ROUND] == places[1][0]


def test_a_student_by_a_models_name_is_run_in_every_round_as_the_recipe_says(
    recipe: TinyRecipe, other_model: Path
) -> None:
    """Of a model folder, too; a student that the recipe names as a step needs no entry."""
    where = load_recipe(recipe.path).models["teacher"].path
    of_folder = {"path": where, "dtype": "bfloat16", "engine": "transformers"}
    edit_recipe(recipe, "models", "start", value={**of_folder, "dtype": "float32"})
    edit_recipe(recipe, "models", "teacher", value={**of_folder, "path": str(other_model)})
    edit_recipe(recipe, "models", "writer", value=of_folder)
    edit_recipe(recipe, "steps", "student", "student", value="start")
    plan = by_name(recipe)
    second = plan["said-r2"].models["writer-r2"]
    assert (second.base, second.dtype) == (plan["student-r1"].place, "bfloat16")
    assert plan["student-r2"].models["start-r2"].dtype == "float32"
    edit_recipe(recipe, "steps", "student", "student", value="first")
    edit_recipe(recipe, "steps", "said", "model", value="first")
    assert list(by_name(recipe)["said-r2"].models) == ["student-r1"]


def test_rounds_that_would_be_no_others_are_refused(recipe: TinyRecipe) -> None:
    body = yaml.safe_load(recipe.path.read_text())

    def refused(**changes: Any) -> str:
        steps = {**body["steps"], **changes}
        path = recipe.path.with_name("refused.yaml")
        path.write_text(yaml.safe_dump({**body, "steps": steps}, sort_keys=False))
        return str(error_of(TinyRecipe(path, recipe.root)))

    by_teacher = {**ANSWER, "model": "teacher"}
    assert "none of the tables that lead to its data is made by its student 'first'" in refused(
        said=by_teacher
    )
    steps = body["steps"]
    early = {"early": {"stage": "evaluate", "students": ["first"], "data": ["said", "scored"]}}
    order = {name: steps[name] for name in ("chats", "first", "said", "scored")}
    path = recipe.path.with_name("early.yaml")
    order |= early | {"student": steps["student"]}
    path.write_text(yaml.safe_dump({**body, "steps": order}, sort_keys=False))
    problem = str(error_of(TinyRecipe(path, recipe.root)))
    assert problem.startswith("steps.early: reads 'said', which every round of 'student' makes")
    taken = {"said-r2": steps["first"], **{name: steps[name] for name in steps}}
    path.write_text(yaml.safe_dump({**body, "steps": taken}, sort_keys=False))
    assert "a step of the recipe is called 'said-r2'" in str(error_of(TinyRecipe(path, path)))
    wrong = {**steps["student"], "rounds": 0}
    assert "steps.student.rounds: got 0, expected at least 1" in refused(student=wrong)
    with pytest.raises(RecipeError, match=r"line \d+: rounds is '0', expected a number of at"):
        read_recipe(recipe.path.with_name("refused.yaml"))


@pytest.mark.parametrize("student", ["first", "writer"])
def test_the_graph_of_airflow_has_the_same_steps(recipe: TinyRecipe, student: str) -> None:
    edit_recipe(recipe, "steps", "student", "student", value=student)
    theirs = read_recipe(recipe.path)
    plan = make_plan(load_recipe(recipe.path))
    assert list(theirs.steps) == [step.name for step in plan]
    for step in plan:
        expected = {needed.name for needed in needs(plan, step)}
        assert set(theirs.steps[step.name].needs) == expected, step.name


def test_teacher_and_writer_have_to_be_two_models_and_scores_of_the_same_responses(
    recipe: TinyRecipe,
) -> None:
    edit_recipe(recipe, "steps", "scored", "model", value="writer")
    assert "steps.student.data: 'said-r1' was written and 'scored-r1' scored by one" in str(
        error_of(recipe)
    ).replace("steps.student-r1", "steps.student")
    edit_recipe(recipe, "steps", "scored", "model", value="teacher")
    edit_recipe(recipe, "steps", "again", value={**ANSWER, "seed": 1})
    body = yaml.safe_load(recipe.path.read_text())
    body["steps"] = {
        "chats": body["steps"]["chats"],
        "first": body["steps"]["first"],
        **{"again": body["steps"]["again"]},
        **body["steps"],
    }
    body["steps"]["scored"]["input"] = "again"
    recipe.path.write_text(yaml.safe_dump(body, sort_keys=False))
    assert "scores other responses than those of step 'said-r1'" in str(error_of(recipe))
    edit_recipe(recipe, "steps", "scored", "per_token", value=False)
    assert "set per_token to true" in str(error_of(recipe))
