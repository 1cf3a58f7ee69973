"""Every kind of wrong signal, made for real: which command finds it, and what the audit says."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.state.audit_verdict import AuditVerdict, verdict_of
from schemas.dataset import open_dataset
from schemas.errors import TeacherCacheError
from schemas.storage.files import sha256_of
from schemas.storage.manifest import read_manifest, write_manifest
from tests.conftest import save_tiny_model
from tests.fixtures.tiny_recipe import Said, TinyRecipe, edit_recipe, make_recipe, teachercache
from tests.fixtures.wrong_signals import (
    Shards,
    at_rows,
    captured,
    rewrite,
    shard_of,
    shifted,
    stored_rows,
    swapped,
)

EACH = [
    "signals",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("by_tau", "top", "states")),
]
STEPS = {
    "by_tau": {"kind": "threshold"},
    "top": {"kind": "top_k", "k": 8},
    "states": {"kind": "exact"},
}


@dataclass(frozen=True)
class Teachers:
    """A teacher and a finished recipe of it, and folders of what may be taken for it."""

    folder: Path
    recipe: TinyRecipe

    def another(self, name: str, change: Callable[[Any], None]) -> Path:
        """A folder of the same architecture and tokenizer with other weights."""
        place = self.folder / name
        if not place.exists():
            save_tiny_model(place, vocab_size=512, tie=False)
            model = AutoModelForCausalLM.from_pretrained(self.folder / "teacher")
            change(model)
            model.save_pretrained(place)
        return place


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str]) -> Teachers:
    """A tiny teacher with a head of its own over real text, in every encoding."""
    folder = tmp_path_factory.mktemp("teachers")
    model = save_tiny_model(folder / "teacher", vocab_size=512, tie=False)
    more = {
        name: {
            "stage": "teacher_logits",
            "input": "documents",
            "model": "teacher",
            "encoding": encoding,
        }
        for name, encoding in STEPS.items()
    }
    recipe = make_recipe(folder / "made", model, paragraphs[:8], more_steps=more)
    recipe.run("execution.engine.head_check=off")
    return Teachers(folder, recipe)


@pytest.fixture
def copied(teachers: Teachers, tmp_path: Path) -> TinyRecipe:
    """The recipe with a copy of all that was made."""
    return teachers.recipe.copy(tmp_path)


def audit(recipe: TinyRecipe, step: str) -> Said:
    return teachercache("audit", recipe.path, "--step", step, "--engine", "transformers")


def verdict(recipe: TinyRecipe, step: str) -> AuditVerdict:
    folder = recipe.step(step).folder
    found = verdict_of(folder, read_manifest(folder).dataset_id)
    assert found is not None
    return found


def finds_it(recipe: TinyRecipe, step: str) -> AuditVerdict:
    """The audit refuses the table; nothing else does, as every checksum and place is right."""
    folders = [recipe.step("documents").folder, recipe.step(step).folder]
    assert teachercache("verify", *folders).code == 0
    open_dataset(folders)
    said = audit(recipe, step)
    assert said.code == 1, said.out + said.err
    found = verdict(recipe, step)
    assert found.outcome == "unfaithful" and found.failures
    assert found.failures[0] in said.out.replace("\n  ", "\n")
    return found


@pytest.mark.parametrize("step", EACH)
def test_a_sound_table_is_faithful(copied: TinyRecipe, step: str) -> None:
    said = audit(copied, step)
    assert (said.code, said.err) == (0, ""), said.out
    found = verdict(copied, step)
    assert found.outcome == "faithful" and not found.failures
    assert found.num_rows == read_manifest(copied.step(step).folder).num_rows
    assert all(m["most"] <= m["allowed"] < 1e-3 for m in found.measures.values())
    assert found.truncation


def test_a_flipped_byte(copied: TinyRecipe) -> None:
    """Found by all three, each in its words; a verdict of before is not left to stand."""
    folder = copied.step("signals").folder
    assert audit(copied, "signals").code == 0
    path = shard_of(folder, 1)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    assert teachercache("verify", folder).code == 1
    with pytest.raises(TeacherCacheError, match="sha256"):
        open_dataset([copied.step("documents").folder, folder])
    said = audit(copied, "signals")
    assert said.code == 1 and path.name in said.out and "sha256" in said.out
    assert verdict(copied, "signals").outcome == "unfaithful"


def test_a_truncated_file(copied: TinyRecipe) -> None:
    folder = copied.step("signals").folder
    path = shard_of(folder, 2)
    path.write_bytes(path.read_bytes()[:-100])
    assert teachercache("verify", folder).code == 1
    with pytest.raises(TeacherCacheError, match="sha256"):
        open_dataset([copied.step("documents").folder, folder])
    said = audit(copied, "signals")
    assert said.code == 1 and path.name in said.out and "bytes, the manifest says" in said.out


@pytest.mark.parametrize("step", EACH)
@pytest.mark.parametrize("other", [(0, 3), (2, 1)])
def test_signals_of_two_rows_swapped(copied: TinyRecipe, step: str, other: tuple[int, int]) -> None:
    """Within a shard and between two; the audit names both rows and whose values they have."""
    folder = copied.step(step).folder
    before = stored_rows(folder)
    rewrite(folder, lambda shards: swapped(shards, (0, 1), other))
    found = finds_it(copied, step)
    keys = [before[shard][row].sample_id for shard, row in ((0, 1), other)]
    named = {line.split()[0] for line in found.failures}
    assert named == set(keys)
    said = found.settings["diagnosis"]
    assert any(keys[0] in line and keys[1] in line and "swapped" in line for line in said), said


@pytest.mark.parametrize("step", EACH)
def test_a_shift_by_one_position(copied: TinyRecipe, step: str) -> None:
    rewrite(copied.step(step).folder, lambda shards: at_rows(shards, shifted, [(1, 2)]))
    found = finds_it(copied, step)
    assert len(found.failures) == 1 and "row 2" in found.failures[0]
    assert any("a shift by one" in line for line in found.settings["diagnosis"])


@pytest.mark.slow
@pytest.mark.parametrize("step", ["signals", *STEPS])
def test_a_teacher_of_one_more_step_of_training(
    teachers: Teachers, copied: TinyRecipe, step: str
) -> None:
    """AdamW at 1e-4 moves every weight by as much: less than that no training run does."""

    def one_step(model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids_1T = torch.arange(5, 45)[None]
        model(input_ids=ids_1T, labels=ids_1T).loss.backward()
        optimizer.step()

    found = of_another(teachers, copied, step, "one_step", one_step)
    assert any("another teacher" in line for line in found.settings["diagnosis"])


def of_another(
    teachers: Teachers, copied: TinyRecipe, name: str, called: str, change: Callable[[Any], None]
) -> AuditVerdict:
    step = copied.step(name)
    other = teachers.another(called, change)
    out = copied.root / "scratch"
    out.mkdir(exist_ok=True)
    rows = captured(step, {"teacher": other}, out=out)
    rewrite(step.folder, lambda _: rows)
    return finds_it(copied, name)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["signals", "by_tau", "top"])
def test_a_head_of_another_checkpoint(teachers: Teachers, copied: TinyRecipe, step: str) -> None:
    def other_head(model: Any) -> None:
        with torch.no_grad():
            model.lm_head.weight += 0.02 * torch.randn_like(model.lm_head.weight)

    of_another(teachers, copied, step, "other_head", other_head)


@pytest.mark.slow
def test_a_head_of_another_checkpoint_beside_exact_states(copied: TinyRecipe) -> None:
    """The states are right; the head that they are read with is not."""
    folder = copied.step("states").folder
    file = folder / "head.safetensors"
    tensors = load_file(file)
    tensors["weight"] = tensors["weight"] * 1.01
    save_file(tensors, file)
    manifest = read_manifest(folder)
    files = {**manifest.files, file.name: sha256_of(file)}
    write_manifest(folder, replace(manifest, files=files))
    found = finds_it(copied, "states")
    assert "by the stored head" in found.failures[0]


def other_tokenizer(folder: Path, paragraphs: list[str]) -> Path:
    """As many tokens, learnt from other text: the same ids mean other pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.upper() for text in paragraphs[:100]], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_signals_of_the_same_text_by_another_tokenizer(
    teachers: Teachers, copied: TinyRecipe, paragraphs: list[str], tmp_path: Path
) -> None:
    """Rows of as many tokens, of ids of the same range, joined under the keys of the right ones."""
    other = teachers.another("other_tokenizer", lambda model: None)
    other_tokenizer(other, paragraphs)
    made = make_recipe(tmp_path / "other", other, paragraphs[:40])
    made.run("execution.engine.head_check=off")
    folder = copied.step("signals").folder
    wrong = [row for rows in stored_rows(made.step("signals").folder) for row in rows]

    def taken(shards: Shards) -> Shards:
        source = iter([row for row in wrong if row.num_positions == 47])
        return [
            [
                replace(next(source), sample_id=r.sample_id) if r.num_positions == 47 else r
                for r in rows
            ]
            for rows in shards
        ]

    rewrite(folder, taken)
    finds_it(copied, "signals")


def test_a_table_that_names_another_tokenizer(
    teachers: Teachers, copied: TinyRecipe, paragraphs: list[str], tmp_path: Path
) -> None:
    """Its vocabulary is as large: the audit and whoever joins the tables say so in one line."""
    folder = copied.step("signals").folder
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, tokenizer="0" * 64, vocabulary="1" * 64))
    assert teachercache("verify", folder).code == 0
    with pytest.raises(TeacherCacheError):
        open_dataset([copied.step("documents").folder, folder])
    said = audit(copied, "signals")
    assert said.code == 2 and "another tokenizer" in said.error


@pytest.mark.slow
def test_an_adapter_left_out(teachers: Teachers, copied: TinyRecipe, tmp_path: Path) -> None:
    """The recipe's teacher has an adapter, and the rows are those of its base alone."""
    base = teachers.folder / "teacher"
    torch.manual_seed(0)
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    edit_recipe(copied, "models", "teacher", "adapter", value=str(tmp_path / "adapter"))
    only = copied.only("documents", "signals")
    only.run("execution.engine.head_check=off")
    assert audit(only, "signals").code == 0
    step = only.step("signals")
    rewrite(step.folder, lambda _: captured(step, {"teacher": base}))
    found = finds_it(only, "signals")
    assert any("another teacher" in line for line in found.settings["diagnosis"])


def without_first(content: pa.Table) -> pa.Table:
    """Rows less their first token, under the same keys."""
    at = content.schema.get_field_index("input_ids_T")
    field = content.schema.field(at)
    ids = [ids_T[1:] for ids_T in content.column(at).to_pylist()]
    return content.set_column(at, field, pa.array(ids, field.type))


def with_first(row: Any) -> Any:
    """A row of one position fewer, made as long as it should be: its first position twice."""
    columns = {
        name: np.concatenate([getattr(row, name)[:1], getattr(row, name)])
        for name in ("token_ids_PK", "num_head_P", "next_token_logprobs_P", "entropies_P")
    }
    first = int(row.num_head_P[0])
    columns["head_codes_E"] = np.concatenate([row.head_codes_E[:first], row.head_codes_E])
    return replace(row, **columns)


@pytest.mark.slow
def test_a_bos_that_the_teacher_did_not_read(copied: TinyRecipe) -> None:
    """The rows' first token is their BOS: without it a position is missing, or all are others."""
    step = copied.step("signals")
    model = copied.load().models["teacher"].folder
    dropped = captured(step, {"teacher": model}, rows=without_first)
    rewrite(step.folder, lambda _: [[with_first(row) for row in rows] for rows in dropped])
    finds_it(copied, "signals")
    rewrite(step.folder, lambda _: dropped)
    assert teachercache("verify", step.folder).code == 1
    said = audit(copied, "signals")
    assert said.code == 1 and "number of positions is 46, its input asks for 47" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("step", ["signals", *STEPS])
def test_a_shard_of_another_dtype(teachers: Teachers, copied: TinyRecipe, step: str) -> None:
    """One shard made in bfloat16 among those in float32: its rows are named, and that it is it."""
    planned = copied.step(step)
    out = copied.root / "scratch"
    out.mkdir()
    half = captured(planned, {"teacher": teachers.folder / "teacher"}, dtype="bfloat16", out=out)
    rewrite(planned.folder, lambda shards: [*shards[:1], half[1], *shards[2:]])
    found = finds_it(copied, step)
    file = shard_of(planned.folder, 1).name
    assert all(file in line for line in found.failures)
    assert len(found.failures) >= 6  # of 8
