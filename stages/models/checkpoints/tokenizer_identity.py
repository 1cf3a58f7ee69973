"""What a tokenizer is: a hash of all that decides how text becomes ids, and one of what ids mean.

Two folders share a fingerprint when vocabulary, merges, added and special tokens, normaliser,
pre-tokeniser, post-processor and chat template are the same, however the files spell it. They share
a vocabulary fingerprint when a piece of text has the same ids: an instruct model and its base model
do, whatever they put around it. Equal vocabulary sizes say nothing: a student fed another
tokenizer's ids trains on noise without error.

Files are read as JSON, so this needs neither transformers nor tokenizers, and an upgrade of
either moves no fingerprint.
"""

import hashlib
import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from schemas.storage.checksums import remembered_of
from schemas.storage.files import sha256_of
from stages.models.checkpoints.tokenizer_as_built import was_built_otherwise

TOKENIZER_JSON = "tokenizer.json"
# Vocabularies of tokenizers that are saved without tokenizer.json; hashed as bytes.
_VOCABULARY_FILES = (
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)
_RULES = 1  # raise it when the same files are read otherwise
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_CONFIG = "config.json"  # its model_type decides, too, how transformers opens a tokenizer
_TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
_RUN_TIME_KEYS = ("truncation", "padding")  # of tokenizer.json: how a caller last used it
_SPECIAL_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
    "add_bos_token",
    "add_eos_token",
)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the sha256 of the tokenizer in a model folder; raises ConfigError if there is none."""
    return str(_known(folder)["tokenizer"])


def vocabulary_fingerprint(folder: Path) -> str:
    """Return the sha256 of what decides which ids a piece of text has; raises as above.

    That is vocabulary, merges, normaliser, pre-tokeniser and added tokens. What stands around it
    (a BOS, an EOS, a chat template) is in the rows of a table already.
    """
    return str(_known(folder)["vocabulary"])


def _known(folder: Path) -> dict[str, Any]:
    """Return what ``_read_of`` says, from memory where these very files were read before."""
    found = [folder / name for name in (*_tokenizer_files(), _CONFIG)]
    found += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    files = [path for path in found if path.is_file()]
    line = remembered_of("tokenizers", _RULES, files, lambda: json.dumps(_read_of(folder)))
    known: dict[str, Any] = json.loads(line)
    return known


def _read_of(folder: Path) -> dict[str, Any]:
    """Return both fingerprints, and what the tokenizer puts first."""
    settings, vocabulary = _settings(folder), _vocabulary(folder)
    body = {
        "vocabulary": vocabulary,
        "special": {key: _token(settings[key]) for key in _SPECIAL_KEYS if settings.get(key)},
        "chat_templates": _chat_templates(folder, settings),
    }
    first = None
    if (folder / TOKENIZER_JSON).is_file():
        first = _put_first(_read_json(folder / TOKENIZER_JSON).get("post_processor") or {})
        if was_built_otherwise(settings, vocabulary, _model_type(folder)):
            body["ids"] = TOKENIZER_JSON
    meaning = _meaning_of_ids(folder, settings, vocabulary)
    return {"tokenizer": _hash_of(body), "vocabulary": _hash_of(meaning), "first_tokens": first}


def _tokenizer_files() -> tuple[str, ...]:
    return (TOKENIZER_JSON, *_VOCABULARY_FILES, *_SETTINGS_FILES, _TEMPLATE_FILE)


def _meaning_of_ids(
    folder: Path, settings: dict[str, Any], vocabulary: dict[str, Any]
) -> dict[str, Any]:
    if not (folder / TOKENIZER_JSON).is_file():
        added = settings.get("added_tokens_decoder", {})
        return vocabulary | {"added_tokens": {key: _token(added[key]) for key in added}}
    body = {key: vocabulary.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    added_tokens = sorted(vocabulary.get("added_tokens", ()), key=lambda token: token["id"])
    return body | {
        "added_tokens": [
            {key: value for key, value in token.items() if key != "special"}
            for token in added_tokens
        ]
    }


def _hash_of(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def first_tokens(folder: Path) -> list[str] | None:
    """Return the special tokens that a tokenizer itself puts before a text: a BOS, or none.

    The post-processor of tokenizer.json decides, as in transformers 5: ``add_bos_token`` counts
    where that file is missing, and None is returned there.
    """
    first: list[str] | None = _known(folder)["first_tokens"]
    return first


def _put_first(processor: dict[str, Any]) -> list[str]:
    """Return what a post-processor puts before a text; of several, the last one comes first."""
    if processor.get("type") == "Sequence":
        parts = [_put_first(part) for part in processor["processors"]]
        return [token for part in reversed(parts) for token in part]
    if processor.get("type") == "TemplateProcessing":
        pieces = takewhile(lambda piece: "SpecialToken" in piece, processor["single"])
        named = processor["special_tokens"]
        return [token for piece in pieces for token in named[piece["SpecialToken"]["id"]]["tokens"]]
    return [processor["cls"][0]] if "cls" in processor else []


def stated_end(folder: Path, *, length: int) -> int | None:
    """Return the id of the end-of-sequence token, where the files leave nothing to be opened for.

    That is where every settings file that names the token names the same, and it has one id in all
    lists of added tokens; rows of ``length`` tokens are within the maximum that the settings state.
    None where a class, code of the folder's own or transformers' defaults would have a say.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        return None
    files = [folder / name for name in (*_SETTINGS_FILES, _CONFIG)]
    bodies = [_read_json(path) for path in files if path.is_file()]
    settings = _settings(folder)
    longest = settings.get("model_max_length")
    if any("auto_map" in body for body in bodies) or longest is None or length > longest:
        return None
    named = [_token(body["eos_token"]) for body in bodies if "eos_token" in body]
    if not named or named[0] is None or named != named[:1] * len(named):
        return None
    added = _read_json(folder / TOKENIZER_JSON).get("added_tokens") or ()
    again = settings.get("added_tokens_decoder") or {}
    ids = [token["id"] for token in added if token["content"] == named[0]]
    ids += [int(key) for key, token in again.items() if ids and _token(token) == named[0]]
    return int(ids[0]) if len(set(ids)) == 1 else None


def num_token_ids(folder: Path) -> int | None:
    """Return how many ids the tokenizer's tokens take: the largest one and one more.

    A model's rows from there on are padding, whatever their number: models of one tokenizer may
    differ in it. None where there is no tokenizer.json to tell.
    """
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        return None
    body = _read_json(path)
    vocabulary = body.get("model", {}).get("vocab", {})
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
    ids += [token["id"] for token in body.get("added_tokens") or ()]
    ids += map(int, _settings(folder).get("added_tokens_decoder") or ())
    return max(ids) + 1 if ids else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files byte for byte, so that the copy has the same fingerprint."""
    for name in _tokenizer_files():
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER, dirs_exist_ok=True)


def _vocabulary(folder: Path) -> Any:
    path = folder / TOKENIZER_JSON
    if path.is_file():
        return _canonical(_read_json(path))
    files = [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    if not files:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(
                f"{folder} {what}: give the path of a model folder, or with 'revision' in a "
                f"recipe's models a name of the hub"
            )
        raise ConfigError(
            f"{folder} has no tokenizer: no {TOKENIZER_JSON} and none of "
            f"{', '.join(_VOCABULARY_FILES)}; save the model's tokenizer there"
        )
    return {path.name: sha256_of(path) for path in files}


def _canonical(body: dict[str, Any]) -> dict[str, Any]:
    """Drop what does not tokenise, and write merges one way: older files hold "a b", not a pair."""
    kept = {key: value for key, value in body.items() if key not in _RUN_TIME_KEYS}
    model = {key: value for key, value in kept.get("model", {}).items() if value is not None}
    if "merges" in model:
        model["merges"] = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
        ]
    return kept | {"model": model}


def _settings(folder: Path) -> dict[str, Any]:
    """Merge the settings files; older folders keep special tokens in a file of their own."""
    config, special = [
        _read_json(folder / name) if (folder / name).is_file() else {} for name in _SETTINGS_FILES
    ]
    return special | config


def _model_type(folder: Path) -> str:
    """Return what config.json calls the model, "" where it does not; who opens it says why."""
    try:
        body = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError):
        return ""
    return str(body.get("model_type", "")) if isinstance(body, dict) else ""


def _token(value: Any) -> Any:
    """Return a token as text: it is saved bare or as a record of its flags."""
    if isinstance(value, list):
        return [_token(item) for item in value]
    return value["content"] if isinstance(value, dict) else value


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return templates by name, wherever this folder keeps them."""
    inline = settings.get("chat_template") or {}
    templates = {"default": inline} if isinstance(inline, str) else dict(_named(inline))
    if (folder / _TEMPLATE_FILE).is_file():
        templates["default"] = (folder / _TEMPLATE_FILE).read_text()
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        templates[path.stem] = path.read_text()
    return templates


def _named(inline: Any) -> list[tuple[str, str]]:
    if isinstance(inline, dict):
        return list(inline.items())
    return [(item["name"], item["template"]) for item in inline]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; save the tokenizer again") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path} holds no JSON object; save the tokenizer again")
    return body
