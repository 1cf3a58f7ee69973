"""Whatever class a folder names, its tokenizer makes of a text what its tokenizer.json says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto
from transformers.models.qwen2 import tokenization_qwen2 as qwen2

from schemas.errors import ConfigError
from stages.models.checkpoints import tokenizer_as_built as as_built
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.models.checkpoints.tokenizer_identity import first_tokens, tokenizer_fingerprint
from stages.sources.reading.tokens import TextTokenizer
from tests.fixtures.tokenizer_kinds import BOS, EOS, KINDS, save_kind

pytestmark = pytest.mark.slow

# The class that real folders of each kind name first, then ones that they should not.
DECLARED = [
    *(("byte_level", name) for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast")),
    *(("byte_level", name) for name in ("GemmaTokenizer", "XLMRobertaTokenizer")),
    *(("digit_by_digit", name) for name in ("GPT2TokenizerFast", "Qwen2Tokenizer")),
    *(("metaspace", name) for name in ("LlamaTokenizer", "GPT2Tokenizer")),
    *(("prepended", name) for name in ("LlamaTokenizer", "LlamaTokenizerFast")),
    *(("replaced", name) for name in ("GemmaTokenizerFast", "LlamaTokenizer")),
]
OPENED_BY_CLASS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaTokenizerFast", {}),
    ("LlamaTokenizer", {"legacy": True}),
    ("LlamaTokenizer", {"add_prefix_space": False}),
    ("CodeLlamaTokenizer", {"legacy": True}),
    ("GemmaTokenizer", {}),
    ("GPT2Tokenizer", {}),
    ("GPT2TokenizerFast", {"add_prefix_space": True}),
    ("GPTNeoXTokenizerFast", {}),
    ("CodeGenTokenizer", {}),
    ("Qwen2Tokenizer", {}),
    ("BloomTokenizerFast", {}),
]
TEXTS = [
    "hello world we need to add",
    "  twice\n\n\ttabs  and 1234567 digits 12 1",
    " déjà vu, n\u0303 \u2581 日本語 \U0001f600",
    f"{BOS}a {EOS} b{EOS}{BOS} c",
    "def f(x):\n    return x + 12\n",
    "",
]


@pytest.mark.parametrize(("kind", "name"), DECLARED)
def test_ids_are_those_of_the_file(kind: str, name: str, tmp_path: Path) -> None:
    folder = save_kind(tmp_path, kind, name, adds_bos=True, chat_template="{{ messages }}")
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer, texts = open_tokenizer(folder), TextTokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text).ids, text
        bare = expected.encode(text, add_special_tokens=False).ids
        assert texts.encode([text])[0].tolist() == bare, text
        assert tokenizer.decode(bare) == expected.decode(bare, skip_special_tokens=False), text
    assert texts.prefix_ids.tolist() == [expected.token_to_id(BOS)]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.chat_template == "{{ messages }}"


def test_no_space_is_lost_in_a_folder_of_the_deepseek_kind(tmp_path: Path) -> None:
    text = "hello world we need to add"
    tokenizer = open_tokenizer(save_kind(tmp_path, "byte_level", "LlamaTokenizerFast"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_end_of_text_that_its_file_does_not_call_special_is_no_difference(
    tmp_path: Path,
) -> None:
    folder = save_kind(tmp_path, "byte_level", "LlamaTokenizerFast")
    body = json.loads((folder / "tokenizer.json").read_text())
    for token in body["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(body))
    assert open_tokenizer(folder).encode(f"hello{EOS}")[-1] == body["model"]["vocab"][EOS]


def test_special_tokens_that_the_class_alone_names_are_kept(tmp_path: Path) -> None:
    folder = save_kind(tmp_path, "digit_by_digit", "GPT2Tokenizer")
    body = (folder / "tokenizer.json").read_text().replace(EOS, "<|endoftext|>")
    (folder / "tokenizer.json").write_text(body)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_token_id == Tokenizer.from_str(body).token_to_id("<|endoftext|>")
    assert len(tokenizer("12")["input_ids"]) == 2  # by digit, as the file says


def test_a_folder_without_the_file_is_opened_as_before(tmp_path: Path) -> None:
    save_kind(tmp_path / "whole", "byte_level", "GPT2Tokenizer")
    body = json.loads((tmp_path / "whole/tokenizer.json").read_text())
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(tmp_path / "whole" / name, folder)
    (folder / "vocab.json").write_text(json.dumps(body["model"]["vocab"]))
    merges = [" ".join(merge) for merge in body["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert open_tokenizer(folder).tokenize("hello world") == ["hello", "Ġworld"]
    assert first_tokens(folder) is None
    prints = set()
    for name in ("GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"):
        settings = {"tokenizer_class": name, "bos_token": BOS, "eos_token": EOS}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        prints.add(tokenizer_fingerprint(folder))
    assert len(prints) == 1, "there is no file that it could have been opened otherwise than"


def test_what_cannot_be_made_to_agree_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_kind(tmp_path, "byte_level", "GPT2Tokenizer", split_special_tokens=True)
    with pytest.raises(ConfigError, match=r"as its tokenizer\.json says: they part on 'a <bos>"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read: "):
        open_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_first_is_read_off_the_files(kind: str, tmp_path: Path) -> None:
    for adds_bos in (False, True):
        folder = save_kind(tmp_path, kind, "PreTrainedTokenizerFast", adds_bos=adds_bos)
        assert first_tokens(folder) == [BOS] * adds_bos
        assert len(TextTokenizer(folder).prefix_ids) == adds_bos


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("said", [False, True, None])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_the_post_processor_says_what_stands_first_and_no_setting(
    name: str, said: bool | None, adds_bos: bool, tmp_path: Path
) -> None:
    """As transformers 5 has it: a folder with ``add_bos_token: true`` may put nothing first."""
    settings = {} if said is None else {"add_bos_token": said}
    folder = save_kind(tmp_path, "metaspace", name, adds_bos=adds_bos, **settings)
    live = AutoTokenizer.from_pretrained(folder)
    bare = live.encode("we add", add_special_tokens=False)
    assert live.encode("we add") == [live.bos_token_id] * adds_bos + bare
    texts = TextTokenizer(folder)
    assert texts.first_ids("tokenizer").tolist() == [live.bos_token_id] * adds_bos
    assert texts.first_ids("always").tolist() == [live.bos_token_id]
    assert open_tokenizer(folder).encode("we add") == live.encode("we add")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_opened_otherwise_has_another_fingerprint(
    kind: str, model_type: str, tmp_path: Path
) -> None:
    """Then the ids of old tables are wrong: they have to be made again, and no others."""
    texts = [*TEXTS, "e\u0301 we add 2026 words", f"  a{BOS} b"]
    for name, settings in OPENED_BY_CLASS:
        folder = save_kind(tmp_path, kind, name, **settings)
        config = {"model_type": model_type, "vocab_size": 400}
        (folder / "config.json").write_text(json.dumps(config))
        opened = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        found = tokenizer_fingerprint(folder)
        # The same folder without a class to build it by.
        body = json.loads((folder / "tokenizer_config.json").read_text())
        body["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(body))
        (folder / "config.json").unlink()
        file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        is_wrong = any(_ids(opened, text) != _ids(file, text) for text in texts)
        assert (found != tokenizer_fingerprint(folder)) == is_wrong, (name, settings)


def _ids(backend: Tokenizer, text: str) -> list[int] | str:
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except Exception:  # noqa: BLE001  the class has no token for what it meets
        return "none"


def test_model_types_that_transformers_opens_by_their_file() -> None:
    for model_type in as_built._BY_FILE:
        registered = str(tokenization_auto.TOKENIZER_MAPPING_NAMES[model_type])
        assert registered in ("TokenizersBackend", "MistralCommonBackend"), model_type


def test_a_qwen2_folder_with_its_own_pattern_is_as_it_was(tmp_path: Path) -> None:
    prints = []
    for pattern in (qwen2.PRETOKENIZE_REGEX, r"\d+|\D+"):
        folder = save_kind(tmp_path, "byte_level", "Qwen2Tokenizer")
        file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        apart = pre_tokenizers.Split(Regex(pattern), "isolated")
        file.pre_tokenizer = pre_tokenizers.Sequence([apart, bytes_alone])
        file.normalizer = normalizers.NFC()
        file.save(str(folder / "tokenizer.json"))
        found = tokenizer_fingerprint(folder)
        save = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
        (folder / "tokenizer_config.json").write_text(json.dumps(save))
        prints.append(found == tokenizer_fingerprint(folder))
    assert prints == [True, False]
