"""Equal tokenizers have equal fingerprints however they are written; different ones never."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from schemas.errors import ConfigError
from stages.models.checkpoints.tokenizer_identity import (
    copy_tokenizer,
    stated_end,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)
from tests.fixtures.cached_data import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", seed=0, num_layers=1)
    return tmp_path / "model"


def edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> str:
    body = json.loads((folder / name).read_text())
    edit(body)
    (folder / name).write_text(json.dumps(body))
    return tokenizer_fingerprint(folder)


def test_a_copy_and_a_saved_copy_are_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copy_tokenizer(folder, tmp_path / "copy")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    prints = {tokenizer_fingerprint(tmp_path / name) for name in ("model", "copy", "saved")}
    assert len(prints) == 1


def test_spelling_does_not_matter(folder: Path) -> None:
    before = tokenizer_fingerprint(folder)

    def respell(body: dict[str, Any]) -> None:
        body["padding"] = {"strategy": "BatchLongest"}
        body["model"]["vocab"] = dict(reversed(body["model"]["vocab"].items()))

    assert edited(folder, "tokenizer.json", respell) == before
    eos = {"content": "<end>", "lstrip": False}
    spelled = edited(folder, "tokenizer_config.json", lambda body: body.update(eos_token=eos))
    assert spelled == before


def test_merges_may_be_pairs_or_text(folder: Path) -> None:
    pairs = edited(folder, "tokenizer.json", lambda b: b["model"].update(merges=[["a", "b"]]))
    assert edited(folder, "tokenizer.json", lambda b: b["model"].update(merges=["a b"])) == pairs


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("tokenizer.json", lambda b: b["model"]["vocab"].update(w1=2, w2=1)),
        ("tokenizer.json", lambda b: b.update(normalizer={"type": "Lowercase"})),
        ("tokenizer.json", lambda b: b.update(pre_tokenizer=None)),
        ("tokenizer_config.json", lambda b: b.update(eos_token="w1")),
        ("tokenizer_config.json", lambda b: b.update(chat_template="{{ messages }}")),
    ],
)
def test_any_real_difference_shows(
    folder: Path, name: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    """Two ids swapped keep the vocabulary's size and still make another tokenizer."""
    before = tokenizer_fingerprint(folder)
    assert edited(folder, name, edit) != before


AROUND: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("tokenizer_config.json", lambda b: b.update(chat_template="{{ messages }}")),
    ("tokenizer_config.json", lambda b: b.update(eos_token="w1", bos_token="w2")),
    ("tokenizer.json", lambda b: b.update(post_processor={"type": "BertProcessing"})),
    ("tokenizer.json", lambda b: b.update(padding={"strategy": "BatchLongest"})),
    ("tokenizer.json", lambda b: b["added_tokens"][0].update(special=False)),
]
OF_TEXT: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("tokenizer.json", lambda b: b["model"]["vocab"].update(w1=2, w2=1)),
    ("tokenizer.json", lambda b: b["model"].update(merges=["a b"])),
    ("tokenizer.json", lambda b: b.update(normalizer={"type": "Lowercase"})),
    ("tokenizer.json", lambda b: b.update(pre_tokenizer=None)),
    ("tokenizer.json", lambda b: b["added_tokens"][0].update(content="<other>")),
    ("tokenizer.json", lambda b: b["added_tokens"][0].update(lstrip=True)),
]


@pytest.mark.parametrize(
    ("is_of_text", "change"),
    [*((False, change) for change in AROUND), *((True, change) for change in OF_TEXT)],
)
def test_a_vocabulary_is_what_decides_the_ids_of_a_text(
    folder: Path, is_of_text: bool, change: tuple[str, Callable[[dict[str, Any]], None]]
) -> None:
    before = vocabulary_fingerprint(folder)
    edited(folder, *change)
    assert (vocabulary_fingerprint(folder) != before) == is_of_text


def test_a_vocabulary_without_tokenizer_json_is_its_files_and_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {"1": {"content": "<x>"}}}))
    before = vocabulary_fingerprint(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ x }}"}))
    assert vocabulary_fingerprint(tmp_path) == before
    config.write_text("{}")
    assert vocabulary_fingerprint(tmp_path) != before


def test_the_chat_template_counts_wherever_it_lies(folder: Path) -> None:
    inline = edited(folder, "tokenizer_config.json", lambda b: b.update(chat_template="{{ x }}"))
    edited(folder, "tokenizer_config.json", lambda b: b.pop("chat_template"))
    (folder / "chat_template.jinja").write_text("{{ x }}")
    assert tokenizer_fingerprint(folder) == inline


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer: no tokenizer\.json"):
        tokenizer_fingerprint(tmp_path)


def test_a_stated_end_is_the_one_that_transformers_finds(folder: Path) -> None:
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened.eos_token_id is not None
    assert stated_end(folder, length=16) == opened.eos_token_id
    spelled = {"__type": "AddedToken", "content": "<end>"}
    edited(folder, "tokenizer_config.json", lambda b: b.update(eos_token=spelled))
    assert stated_end(folder, length=16) == AutoTokenizer.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("tokenizer_config.json", lambda b: b.pop("eos_token")),
        ("tokenizer_config.json", lambda b: b.update(eos_token=None)),
        ("tokenizer_config.json", lambda b: b.update(eos_token="w1")),  # no added token
        ("tokenizer_config.json", lambda b: b.update(auto_map={"AutoTokenizer": ["a.B", None]})),
        ("tokenizer_config.json", lambda b: b.update(model_max_length=15)),
        ("tokenizer_config.json", lambda b: b.pop("model_max_length")),
        (
            "tokenizer_config.json",
            lambda b: b.update(added_tokens_decoder={"9": {"content": "<end>"}}),
        ),
        ("tokenizer.json", lambda b: b.update(added_tokens=[])),
        ("config.json", lambda b: b.update(auto_map={"AutoTokenizer": ["a.B", None]})),
    ],
)
def test_an_end_is_not_stated_where_anything_else_has_a_say(
    folder: Path, name: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    assert stated_end(folder, length=16) is not None
    edited(folder, name, edit)
    assert stated_end(folder, length=16) is None


def test_an_end_is_not_stated_where_two_files_name_two(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "w1"}')
    assert stated_end(folder, length=16) is None
