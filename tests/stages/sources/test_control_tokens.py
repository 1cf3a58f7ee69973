"""Text that spells a control token: counted, and kept as that token, split or rejected as asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from schemas.errors import ConfigError
from stages.sources.documents.stage import IngestStage
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.reading.control_tokens import REJECTED, ControlTokenRule
from stages.sources.reading.tokens import TextTokenizer
from tests.fixtures.tokenizer_kinds import BOS, EOS, save_kind

PLAIN = [f"hello world {number} we need to add" for number in range(6)]
SPELLED = f"hello world{EOS}we need {EOS} to{BOS} add"
RULES = ("keep", "split", "reject")


@pytest.fixture(params=["byte_level", "prepended"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_kind(tmp_path / "model", request.param, "LlamaTokenizerFast")


def ingest_of(model: Path, path: Path, **changes: Any) -> IngestStage:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*PLAIN, SPELLED]))
    settings: dict[str, Any] = {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(path)]},
        "tokenizer": str(model),
        "length": 100,
        "mode": "truncate",
        "heldout_fraction": 0.0,
    }
    return IngestStage.model_validate(settings | changes)


@pytest.mark.parametrize("rule", RULES)
def test_a_document_is_kept_split_or_rejected(model: Path, rule: str, tmp_path: Path) -> None:
    stage = ingest_of(model, tmp_path / "a.jsonl", control_tokens=rule)
    prepared = stage.work.prepare(stage, tmp_path / "work")
    rows = [row.input_ids_T.tolist() for row in stage.read(tmp_path / "work", 0)]
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    marks = {own.token_to_id(BOS), own.token_to_id(EOS)}
    spelled = own.encode(SPELLED).ids
    own.encode_special_tokens = True
    split = own.encode(SPELLED).ids
    assert marks <= set(spelled) and not marks & set(split)
    counted = {"keep": "control_tokens_kept", "split": "control_tokens_split", "reject": REJECTED}
    extra = {"keep": [spelled], "split": [split], "reject": []}
    assert prepared.rejects == {counted[rule]: 1}
    assert sorted(rows) == sorted([*(own.encode(text).ids for text in PLAIN), *extra[rule]])
    if rule == "split":
        assert SPELLED in {own.decode(row, skip_special_tokens=False) for row in rows}


def test_what_the_tokenizer_cannot_split_is_rejected(tmp_path: Path) -> None:
    """Its pieces are unknown, and unknown pieces are that very token."""
    words = Tokenizer(models.WordLevel({EOS: 0, BOS: 1, "a": 2, "bos": 3}, unk_token=EOS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS, bos_token=BOS)
    wrapped.save_pretrained(tmp_path)
    rule = ControlTokenRule(TextTokenizer(tmp_path), "split")
    assert rule.outcome([f"a {EOS}"]) == REJECTED
    assert rule.outcome(["a", "unknown"]) is None


def test_a_token_that_only_its_class_calls_special_is_split_too(tmp_path: Path) -> None:
    folder = save_kind(tmp_path, "byte_level", "PreTrainedTokenizerFast")
    body = json.loads((folder / "tokenizer.json").read_text())
    for token in body["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(body))
    tokenizer = TextTokenizer(folder)
    assert ControlTokenRule(tokenizer, "split").outcome([f"a{EOS}"]) == "control_tokens_split"
    assert tokenizer.eos_id not in tokenizer.encode([f"a{EOS}"])[0]


def episodes_of(model: Path, path: Path, **changes: Any) -> EpisodesStage:
    rows = [{"task": "t", "input": text, "output": f"it's {i}"} for i, text in enumerate(PLAIN * 2)]
    rows = [row | {"input": f"{row['input']} {i}"} for i, row in enumerate(rows)]
    rows.append({"task": "t", "input": SPELLED, "output": "twice"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "stage": "episodes",
        "sources": [{"kind": "metaicl", "paths": [str(path)]}],
        "tokenizer": str(model),
        "paradigm": "multitask",
        "targets": ["t"],
        "demonstrations": 1,
        "draw": "resample",
        "support": 4,
        "max_length": 400,
    }
    return EpisodesStage.model_validate(settings | changes)


@pytest.mark.parametrize("rule", RULES)
def test_an_example_is_kept_split_or_rejected(model: Path, rule: str, tmp_path: Path) -> None:
    stage = episodes_of(model, tmp_path / "t.jsonl", control_tokens=rule)
    prepared = stage.prepare(tmp_path / "work")
    rows = [row for i in range(len(prepared.shards)) for row in stage.read(tmp_path / "work", i)]
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    marks = {own.token_to_id(BOS), own.token_to_id(EOS)}
    with_marks = [row for row in rows if marks & set(row.input_ids_T.tolist())]
    texts = [own.decode(row.input_ids_T.tolist(), skip_special_tokens=False) for row in rows]
    counted = {"keep": "control_tokens_kept", "split": "control_tokens_split", "reject": REJECTED}
    assert prepared.rejects[counted[rule]] == 1
    assert bool(with_marks) == (rule == "keep")
    if rule != "keep":
        assert any(SPELLED in text for text in texts) == (rule == "split")


def test_a_template_that_spells_one_cannot_be_split(model: Path, tmp_path: Path) -> None:
    template = {"demonstration": f"{{input}}{EOS}{{output}}", "separator": "\n"}
    path = tmp_path / "t.jsonl"
    stage = episodes_of(model, path, control_tokens="split", template=template)
    with pytest.raises(
        ConfigError, match="control_tokens: split would split those of the template"
    ):
        stage.prepare(tmp_path / "work")


def test_keeping_them_keeps_the_names_of_before(model: Path, tmp_path: Path) -> None:
    for stage in (ingest_of, episodes_of):
        assert "control_tokens" not in stage(model, tmp_path / "a").hashed()["config"]
        split = stage(model, tmp_path / "a", control_tokens="split").hashed()["config"]
        assert split["control_tokens"] == "split"
