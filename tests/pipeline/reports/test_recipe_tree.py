"""``teachercache show``: every step once, below what it is made of, with what lies on the disk."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from pipeline.planning.fingerprint import fingerprint_of
from pipeline.planning.plan import make_plan, needs
from pipeline.planning.recipe_file import load_recipe
from pipeline.reports.results_report import print_results
from schemas.storage.manifest import read_manifest, write_manifest
from tests.fixtures.example_recipes import EXAMPLES, tiny_example
from tests.fixtures.tiny_recipe import (
    EVERY_KIND,
    TinyRecipe,
    edit_recipe,
    make_recipe,
    stamps,
    teachercache,
)

GUIDES = re.compile(r"^[│├└─ ]*")

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def fresh(tiny_model: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    return make_recipe(tmp_path / "fresh", tiny_model, paragraphs[:30], more_steps=EVERY_KIND)


@pytest.fixture
def finished(every_kind: TinyRecipe) -> TinyRecipe:
    return every_kind


@pytest.fixture
def copied(finished: TinyRecipe, tmp_path: Path) -> TinyRecipe:
    return finished.copy(tmp_path / "copied")


def shown(recipe: TinyRecipe | Path, *flags: str) -> list[str]:
    """Return the lines that ``show`` prints; none may be wider than a log's 120 columns."""
    said = teachercache("show", recipe if isinstance(recipe, Path) else recipe.path, *flags)
    assert said.code == 0 and not said.err, said.err
    assert "\x1b[" not in said.out
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 120
    return lines


def steps_of(lines: list[str]) -> dict[str, tuple[int, str, str]]:
    """Return of each step, in the order shown: its depth, its own line, and the text below it."""
    found: dict[str, tuple[int, str, str]] = {}
    for line in lines[next(i for i, line in enumerate(lines) if " -> " in line) - 1 :]:
        indent = len(GUIDES.match(line)[0])  # type: ignore[index]
        text = line[indent:].rstrip()
        if "─" in line[:indent]:
            name = text.split()[0]
            assert name not in found, f"{name} is shown twice"
            found[name] = (indent // 4, text, "")
        else:
            depth, own, below = found[name]
            found[name] = (depth, own, f"{below} {text}".strip())
    return found


def test_before_a_run_all_is_pending_and_nothing_is_written(fresh: TinyRecipe) -> None:
    lines = shown(fresh)
    assert lines[0].startswith("tiny  0 of 6 steps done, in")
    steps = steps_of(lines)
    assert {own.split()[1] for _, own, _ in steps.values()} == {"pending"}
    assert not fresh.root.exists()


def test_a_line_says_what_a_step_does_leaves_and_is_made_of(fresh: TinyRecipe) -> None:
    below = {name: text for name, (_, _, text) in steps_of(shown(fresh)).items()}
    short = {step.name: step.fingerprint[:12] for step in fresh.plan()}
    assert below == {
        "documents": f"ingest -> documents/{short['documents']} (v1); tokenizer of teacher",
        "signals": f"teacher_logits -> teacher_logits/{short['signals']} (v1, threshold) "
        f"from documents; model teacher",
        "states": f"teacher_logits -> teacher_logits/{short['states']} (v1, exact) "
        f"from documents; model teacher",
        "student": f"student_init -> checkpoints/{short['student']}; model teacher",
        "distilled": f"train -> checkpoints/{short['distilled']} from documents, signals; "
        f"model student",
        "results": f"evaluate -> evaluations/{short['results']} from documents, signals; "
        f"model distilled",
    }


def test_models_stand_at_the_root(fresh: TinyRecipe, tiny_model: Path, tmp_path: Path) -> None:
    small = {"step": "student", "dtype": "bfloat16", "engine": "transformers"}
    edit_recipe(fresh, "models", "small", value=small)
    edit_recipe(fresh, "models", "spare", value={"path": str(tmp_path / "nowhere")})
    again = {"stage": "teacher_logits", "input": "documents", "model": "small"}
    edit_recipe(fresh, "steps", "again", value=again)
    said = " ".join(GUIDES.sub("", line) for line in shown(fresh)).split()
    start = said.index("models") + 1
    teacher, made = fresh.step("signals").models["teacher"], fresh.step("again").models["small"]
    named = [fingerprint_of(model.identity)[:12] for model in (teacher, made)]
    expected = f"""
    teacher {named[0]} float32 transformers {tiny_model}
    small {named[1]} bfloat16 transformers made by student
    spare run by none bfloat16 vllm {tmp_path / "nowhere"}
    """.split()
    assert said[start : start + len(expected)] == expected


@pytest.mark.slow
def test_during_a_run_it_counts_shards_and_foretells_the_rest(fresh: TinyRecipe) -> None:
    for flags in (("--step", "documents"), ("--step", "signals", "--shards", "0:2")):
        assert teachercache("run", fresh.path, *flags).code == 0
    documents = read_manifest(fresh.step("documents").folder)
    steps = steps_of(shown(fresh))
    rows = f"{documents.num_rows} rows"
    assert re.fullmatch(rf"documents +done +{rows} +[\d.]+ kB", steps["documents"][1])
    state = f"partial, 2 of {len(documents.shards)} shards"
    expected = rf"signals +{state} +about {rows} +about [\d.]+ kB"
    assert re.fullmatch(expected, steps["signals"][1]), steps["signals"][1]
    assert re.fullmatch("student +pending", steps["student"][1])


def test_after_a_run_all_is_done_with_its_rows_and_bytes(finished: TinyRecipe) -> None:
    before = stamps(finished.root)
    lines = shown(finished)
    assert lines[0].startswith("tiny  6 of 6 steps done, ")
    steps = steps_of(lines)
    assert {own.split()[1] for _, own, _ in steps.values()} == {"done"}
    signals, states = (read_manifest(finished.step(s).folder) for s in ("signals", "states"))
    assert f" {signals.num_rows} rows " in steps["signals"][1]
    assert steps["signals"][1].endswith(f" {signals.num_bytes / 1000:.1f} kB")
    head = sum((finished.step("states").folder / name).stat().st_size for name in states.files)
    assert head and steps["states"][1].endswith(f" {(states.num_bytes + head) / 1000:.1f} kB")
    weights = (finished.step("distilled").folder / "model.safetensors").stat().st_size
    size = re.fullmatch(r"distilled +done +([\d.]+) kB", steps["distilled"][1])
    assert size and float(size[1]) > weights / 1000
    assert stamps(finished.root) == before


def test_what_has_gone_of_a_finished_step_is_told(copied: TinyRecipe) -> None:
    table, trained = copied.step("signals").folder, copied.step("distilled").folder
    shards = sorted(table.glob("*.arrow"))
    for path in (*shards[1:3], table / "shards.feather", trained / "model.safetensors"):
        path.unlink()
    lines = shown(copied)
    assert " steps done" in lines[0] and ", 2 with files missing, in" in lines[0]
    steps = steps_of(lines)
    assert " done, 3 files missing " in steps["signals"][1]
    assert f"missing: {shards[1].name} and 2 more; `teachercache verify`" in steps["signals"][2]
    assert steps["distilled"][1].endswith("pending, 1 file missing")
    assert "missing: model.safetensors; " in steps["distilled"][2]
    assert "missing" not in steps["documents"][1] + steps["documents"][2]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_step_of_an_example_stands_once_below_all_that_it_names(
    path: Path, tiny_model: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    copy = tiny_example(path, tmp_path, tiny_model, tiny_encoder)
    plan = make_plan(load_recipe(copy))
    steps = steps_of(shown(copy))
    assert set(steps) == {step.name for step in plan}
    above: list[str] = []
    order = list(steps)
    for step in plan:
        depth, _, below = steps[step.name]
        above = order[: order.index(step.name)]
        needed = {other.name for other in needs(plan, step)}
        assert needed <= set(above)
        for name in (*(source.name for source in step.inputs), *step.models):
            assert re.search(rf"[ ,]{name}\b", below), (step.name, name)
        parent = next((name for name in reversed(above) if steps[name][0] < depth), None)
        if step.kind == "report" or not needed:
            assert parent is None and depth == 1
        else:
            assert parent == max(needed, key=order.index)


def test_equal_steps_are_shown_each_and_weigh_once(copied: TinyRecipe) -> None:
    """Two names of one content share a folder; whoever reads one of them stands below both."""
    size = shown(copied)[0].split(", ")[1]
    body = yaml.safe_load(copied.path.read_text())
    edit_recipe(copied, "steps", "twin", value=body["steps"]["documents"])
    lines = shown(copied)
    assert lines[0].startswith(f"tiny  7 of 7 steps done, {size}, in")
    steps = steps_of(lines)
    assert steps["twin"][2] == steps["documents"][2]
    assert list(steps) == [
        "documents",
        "student",
        "twin",
        *("signals", "distilled", "states", "results"),
    ]
    assert steps["twin"][0] == 1 and steps["signals"][0] == 2


def test_set_changes_what_is_shown(finished: TinyRecipe) -> None:
    steps = steps_of(shown(finished, "--set", "steps.signals.encoding.k=4"))
    assert " done " in steps["documents"][1]
    assert " pending " in steps["signals"][1] and " about " in steps["signals"][1]
    assert steps["distilled"][1].endswith(" pending")


def test_what_cannot_be_planned_is_one_line(fresh: TinyRecipe, tmp_path: Path) -> None:
    for command in ("plan", "show"):
        asked = ("--set", f"models.teacher.path={tmp_path / 'gone'}")
        said = teachercache(command, fresh.path, *asked)
        assert said.code == 2 and "gone does not exist: give the path of a model" in said.error
    said = teachercache("show", tmp_path / "none.yaml")
    assert said.code == 2 and "cannot read the recipe" in said.error


def test_a_folder_of_another_fingerprint_is_one_line(copied: TinyRecipe) -> None:
    manifest = copied.step("signals").folder / "manifest.json"
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(body | {"fingerprint": "0" * 64}))
    said = teachercache("show", copied.path)
    assert said.code == 1 and "move that folder away" in said.error


def _flipped(content: bytes) -> Iterator[bytes]:
    """Yield the bytes with one of them inverted, from the last to the first."""
    for index in reversed(range(len(content))):
        yield content[:index] + bytes([content[index] ^ 0xFF]) + content[index + 1 :]


def _is_of_a_type_that_nobody_reads(content: bytes) -> bool:
    """Whether pyarrow 26.0 says neither ArrowInvalid nor OSError: integers of 255 bits, say."""
    try:
        pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except (OSError, pa.ArrowInvalid):
        return False
    except pa.ArrowException:
        return True
    return False


def test_a_list_of_shards_that_is_garbage_is_one_line_wherever_it_is_read(
    copied: TinyRecipe,
) -> None:
    path = copied.step("documents").folder / "shards.feather"
    whole = path.read_bytes()
    strange = next(filter(_is_of_a_type_that_nobody_reads, _flipped(whole)))
    changed = "steps.signals.seed=1"  # a step that is not done asks for more of its input
    for garbage in (b"", b"garbage", whole[:-1], strange, b"ARROW1\0\0" + bytes(2000)):
        path.write_bytes(garbage)
        for command in (("show",), ("show", "--set", changed), ("status",), ("plan",)):
            said = teachercache(command[0], copied.path, *command[1:])
            assert said.code == 0 or "is not the list of shards" in said.error, said
        said = teachercache("inspect", path.parent)
        assert said.code == 1 and f"{path} is not the list of shards" in said.error, said


def test_a_chain_of_forty_steps_is_shown_whole(fresh: TinyRecipe) -> None:
    steps = {"student": EVERY_KIND["student"]}
    names = ["student", *(f"trained_{index:02d}" for index in range(40))]
    for before, name in pairwise(names):
        steps[name] = {**EVERY_KIND["distilled"], "student": before}
    body = yaml.safe_load(fresh.path.read_text())
    kept = {name: body["steps"][name] for name in ("documents", "signals")}
    edit_recipe(fresh, "steps", value=kept | steps)
    found = steps_of(shown(fresh))
    assert [name for name in found if name in names] == names
    for before, name in pairwise(names):
        assert f"model {before}" in found[name][2]


def test_results_of_a_step_whose_rows_were_all_rejected(copied: TinyRecipe) -> None:
    folder = copied.step("signals").folder
    manifest = read_manifest(folder)
    emptied = [
        replace(shard, num_rows=0, num_tokens=0, num_positions=0, rejects={"too long": 3})
        for shard in manifest.shards
    ]
    write_manifest(folder, replace(manifest, shards=emptied))
    out = io.StringIO()
    print_results(Console(file=out, width=200), copied.plan())
    (line,) = (line for line in out.getvalue().splitlines() if "signals (threshold)" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[1:3] == ["0", "0"] and cells[4] == "-"
    assert cells[-1] == f"{3 * len(emptied)} too long"
