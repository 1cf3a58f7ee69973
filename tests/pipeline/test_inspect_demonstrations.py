"""``inspect`` of what teacher and distiller read, and of what the teacher says of its tokens."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.cache.row_views import Look, scored_tokens, view_of
from schemas.dataset import open_dataset
from schemas.distribution import weighted_tokens
from schemas.errors import ConfigError
from schemas.tables.documents import Document
from schemas.tables.teacher_logits import ThresholdLogits
from tests.fixtures.demonstration_data import MendData, make_mend_data
from tests.fixtures.tiny_recipe import teachercache


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MendData:
    encodings = ("threshold", "threshold_tau")
    return make_mend_data(tmp_path_factory.mktemp("mend"), encodings, ("episodes",))


def printed(*parts: Any) -> str:
    """What a wide console shows of them."""
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in parts:
        console.print(part)
    return console.export_text()


def lines_of(text: str) -> list[list[str]]:
    """The cells of each line of a table."""
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]


def test_a_row_is_shown_part_by_part(data: MendData) -> None:
    """Which of the two reads each demonstration, and where it lies."""
    rows = [row for row in data.rows("episodes").values() if row.gold >= 0]
    unlike = lambda row: row.num_teacher_demonstrations > row.num_distiller_demonstrations  # noqa: E731
    row = next(filter(unlike, rows))
    look = Look(lambda ids: " ".join(map(str, np.asarray(ids).tolist())), 5, 3)
    found = lines_of(printed(*view_of("demonstrations", row, look)))
    cells = {line[0]: line[1:] for line in found if len(line) == 4}
    ends = [0, *row.demonstration_ends_M.tolist()]
    for m in range(row.num_teacher_demonstrations):
        text = " ".join(map(str, row.input_ids_T[ends[m] : ends[m + 1]].tolist()))
        both = m < row.num_distiller_demonstrations
        readers = "teacher, distiller" if both else "teacher"
        assert cells[f"demonstration {m}"] == [f"{ends[m]}..{ends[m + 1]}", readers, f"'{text}'"]
    query = " ".join(map(str, row.input_ids_T[row.query_start : row.answer_start].tolist()))
    assert cells["query"] == [
        f"{row.query_start}..{row.answer_start}", "teacher, reader", f"'{query}'"
    ]  # fmt: skip
    assert {"answer", f"candidate {row.gold} (right)"} < set(cells)


@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau"])
def test_scored_tokens_stand_beside_the_teachers(
    data: MendData, tmp_path: Path, encoding: str
) -> None:
    """Each by its place and text, with the teacher's likeliest tokens, found by sample_id."""
    shown, signals = data.tables("episodes", encoding)
    said = teachercache("inspect", shown, "--signals", signals, "--rows", "2", "--top", "1")
    assert said.code == 0, said.err
    joined = open_dataset([shown, signals], verify=False)
    (row,) = (
        joined[index]
        for index in range(len(joined))
        if joined[index]["sample_id"] == re.findall("sample_id ([0-9a-f]+)", said.out)[0]
    )
    first = said.out.partition("row 1 ")[0]
    places = [int(place) for place in re.findall(r"token (\d+) '(?:\d+)'", first)]
    assert places == list(range(row["query_start"] + 1, len(row["input_ids_T"])))
    ids_PK, weights_PK = weighted_tokens(row)
    best = ids_PK[0][weights_PK[0].argmax()]
    token = row["input_ids_T"][places[0]]
    assert re.search(rf"token {places[0]} '{token}'.*'{best}' {weights_PK[0].max():.3f}", first)
    wrong = teachercache("inspect", shown, "--signals", shown)
    assert wrong.code == 2 and "is a table of demonstrations, expected" in wrong.error
    other = teachercache("inspect", signals, "--signals", signals)
    assert other.code == 2 and "has no input_ids_T" in other.error
    nothing = make_mend_data(tmp_path, ("threshold",), ("documents",))
    apart = teachercache("inspect", shown, "--signals", nothing.tables("documents", "threshold")[1])
    assert apart.code == 0 and "has no row of it: rejected there" in " ".join(apart.out.split())


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    """rich takes ``[/x]`` in a plain cell for a closing tag, and ends in an error."""
    ids_PK = np.array([[5, 6], [5, 6]])
    signal = ThresholdLogits(
        sample_id="0" * 24,
        first_target=1,
        next_token_logprobs_P=np.full(2, -1.0),
        entropies_P=np.ones(2),
        token_ids_PK=ids_PK,
        num_head_P=np.zeros(2, np.int64),
        head_codes_E=np.zeros(0, np.int64),
    )
    look = Look(lambda ids: "[/x]", 5, 3)
    text = Document(sample_id="0" * 24, split="train", input_ids_T=np.array([1, 2, 3]))
    shown = printed(scored_tokens(text, signal, look), *view_of("teacher_logits", signal, look))
    assert shown.count("token 1 ") == 2 and shown.count("'[/x]' 0.5") > 3
    longer = Document(sample_id="0" * 24, split="train", input_ids_T=np.arange(5))
    with pytest.raises(ConfigError, match="has 4 scored tokens from 1, its signal 2 from 1"):
        scored_tokens(longer, signal, look)
