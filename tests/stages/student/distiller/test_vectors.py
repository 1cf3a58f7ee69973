"""Vectors that are kept: for one reader, and served by transformers and by vLLM alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError, IdentityMismatch, StoreError
from schemas.tables.demonstrations import DEMONSTRATIONS
from stages.models.engines.vllm_engine import common_arguments, free_vllm, start_vllm
from stages.models.spec import EngineOptions
from stages.student.distiller.distiller import load_distiller
from stages.student.distiller.vectors import make_task_vectors, read_vectors
from tests.conftest import save_tiny_model
from tests.fixtures.cached_data import VOCAB_SIZE, save_model, write_table
from tests.fixtures.demonstration_data import MendData, make_mend_data, make_models
from tests.fixtures.tiny_recipe import teachercache

TASK = "made up"  # what the fixture's episodes are called
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    return make_mend_data(tmp_path_factory.mktemp("mend"), ())


@pytest.fixture(scope="module")
def file(data: MendData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task's vectors, as the command makes them."""
    folder = tmp_path_factory.mktemp("vectors")
    place = "mend", "vectors", data.models.distiller, folder, "--data", data.root / "episodes"
    said = teachercache(*place, "--task", TASK)
    assert said.code == 0, said.err
    assert '"file"' in said.out
    return folder / "made_up.safetensors"


def test_a_file_has_the_vectors_of_one_row_and_says_of_which(data: MendData, file: Path) -> None:
    found = read_vectors(file, reader=data.models.teacher)
    heldout = [row for row in data.rows("episodes").values() if row.split == "heldout"]
    row = min(heldout, key=lambda one: one.sample_id)
    distiller = load_distiller(data.models.distiller, device=torch.device("cpu")).eval()
    ids_L = torch.tensor(row.distiller_ids_L.tolist())
    with torch.no_grad():
        expected = distiller(ids_L[None], torch.tensor([len(ids_L)]))[0]
    assert torch.equal(found, expected)
    with safe_open(file, framework="pt") as tensors:
        notes = json.loads(tensors.metadata()["vectors_of"])
    assert (notes["task"], notes["sample_id"]) == (TASK, row.sample_id)


def test_making_them_again_gives_the_same_bytes(data: MendData, file: Path, tmp_path: Path) -> None:
    (made,) = make_task_vectors(data.models.distiller, data.root / "episodes", [], tmp_path)
    assert made.file.read_bytes() == file.read_bytes()


def test_any_row_may_be_the_one_that_is_read(data: MendData, tmp_path: Path) -> None:
    """By its sample_id: another draw of a task, or a row that is a document's and has none."""
    train = [row for row in data.rows("episodes").values() if row.split == "train"]
    documents = [row for row in data.rows("documents").values() if row.split == "heldout"]
    distiller = load_distiller(data.models.distiller, device=torch.device("cpu")).eval()
    for row, source, name in (
        (max(train, key=lambda one: one.sample_id), "episodes", "made_up"),
        (documents[0], "documents", documents[0].sample_id),
    ):
        place = ("mend", "vectors", data.models.distiller, tmp_path, "--data", data.root / source)
        said = teachercache(*place, "--sample", row.sample_id, "--split", row.split)
        assert said.code == 0, said.err
        found = read_vectors(tmp_path / f"{name}.safetensors", reader=data.models.teacher)
        ids_L = torch.tensor(row.distiller_ids_L.tolist())
        with torch.no_grad():
            assert torch.equal(found, distiller(ids_L[None], torch.tensor([len(ids_L)]))[0])
    said = teachercache(*place, "--sample", train[0].sample_id)
    assert said.code == 2 and f"no heldout row with sample_id {train[0].sample_id}" in said.error
    said = teachercache(*place, "--sample", documents[0].sample_id, "--task", TASK)
    assert said.code == 2 and "--sample names a row and its task: leave --task out" in said.error


def test_what_does_not_fit_is_one_line(data: MendData, file: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", seed=9, num_layers=1)
    with pytest.raises(ConfigError, match=r"has vectors for reader \w+, .*other is"):
        read_vectors(file, reader=tmp_path / "other")
    with pytest.raises(StoreError, match="cannot read vectors from"):
        read_vectors(tmp_path / "none.safetensors", reader=data.models.teacher)
    place = "mend", "vectors", data.models.distiller, tmp_path / "out", "--data"
    said = teachercache(*place, data.root / "episodes", "--task", "nothing")
    assert said.code == 2 and "no heldout row of task 'nothing'; there are: made up" in said.error
    said = teachercache(*place, data.root / "documents")
    assert said.code == 2 and "no tasks, it was made of documents" in said.error


def test_rows_that_the_distiller_cannot_read_are_one_line(data: MendData, tmp_path: Path) -> None:
    """Of another tokenizer, or longer than its window of 64 leaves room for before 62 vectors."""
    save_tiny_model(tmp_path / "strange", vocab_size=512)
    rows = list(data.rows("episodes").values())
    bound = DEMONSTRATIONS.bind(vocab_size=VOCAB_SIZE)
    write_table(tmp_path / "table", bound, rows, tmp_path / "strange")
    with pytest.raises(IdentityMismatch, match="has tokenizer"):
        make_task_vectors(data.models.distiller, tmp_path / "table", [], tmp_path / "out")
    many = make_models(tmp_path / "many", distiller_width=24, num_vectors=62)
    with pytest.raises(ConfigError, match="tokens of demonstrations, the distiller has room for 2"):
        make_task_vectors(many.distiller, data.root / "episodes", [], tmp_path / "out")


def prompts_of(data: MendData, file: Path, reader: Any) -> list[Tensor]:
    """[T, R] of a few held-out queries after the task's vectors, as the guide says."""
    vectors_MR = read_vectors(file, reader=data.models.teacher)
    rows = [row for row in data.rows("episodes").values() if row.split == "heldout"]
    queries = [row.input_ids_T[row.query_start : row.answer_start].tolist() for row in rows]
    embed = reader.get_input_embeddings()
    return [torch.cat([vectors_MR, embed(torch.tensor(query))]).detach() for query in queries]


def generated(reader: Any, prompt_TR: Tensor) -> list[int]:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones(1, len(prompt_TR), dtype=torch.long)
    found = reader.generate(
        inputs_embeds=prompt_TR[None], attention_mask=mask, pad_token_id=0, **options
    )
    answer: list[int] = found[0].tolist()
    return answer


@torch.no_grad()
def greedy(reader: Any, prompt_TR: Tensor) -> list[int]:
    """A forward a token, the end-of-text token (0) left out as above."""
    answer: list[int] = []
    for _ in range(NEW_TOKENS):
        logits_V = reader(inputs_embeds=prompt_TR[None]).logits[0, -1]
        answer.append(int(logits_V[1:].argmax()) + 1)
        prompt_TR = torch.cat([prompt_TR, reader.get_input_embeddings()(torch.tensor(answer[-1:]))])
    return answer


def test_generate_goes_on_from_vectors(data: MendData, file: Path) -> None:
    reader = AutoModelForCausalLM.from_pretrained(data.models.teacher).eval()
    prompts = prompts_of(data, file, reader)
    assert len(prompts) == 3
    for prompt_TR in prompts:
        assert generated(reader, prompt_TR) == greedy(reader, prompt_TR)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_serves_vectors_as_prompt_embeddings(tmp_path: Path) -> None:
    """The same greedy tokens as transformers; heads of 32, as vLLM takes none of 8 on a CPU."""
    data = make_mend_data(tmp_path / "data", (), head_dim=32)
    (made,) = make_task_vectors(data.models.distiller, data.root / "episodes", [], tmp_path)
    reader = AutoModelForCausalLM.from_pretrained(data.models.teacher).eval()
    prompts = prompts_of(data, made.file, reader)
    device, options = torch.device("cpu"), EngineOptions(device="cpu")
    arguments = common_arguments(data.models.teacher, torch.float32, device, options)
    arguments["enable_prompt_embeds"] = True
    vllm, llm = start_vllm(data.models.teacher, arguments, device=device, options=options)
    try:
        greedily = vllm.SamplingParams(
            temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS
        )
        outputs = llm.generate([{"prompt_embeds": one} for one in prompts], greedily)
        found = [list(output.outputs[0].token_ids) for output in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()
        free_vllm()
    assert found == [generated(reader, one) for one in prompts]
    assert found != [generated(reader, one[3:]) for one in prompts]  # without the vectors
