"""Fetch another family's tokenizer: Mistral 7B's, of sentencepiece's kind, out of a PyPI package.

    python examples/fetch_tokenizer.py [--cache DIR]

gives, under DIR (default: $TEACHERCACHE_CACHE, or ~/.cache/teachercache):

    models/mistral-v1-tokenizer/    tokenizer.json and its settings: 32,000 tokens, byte fallback

The package ``mistral-common`` (Apache-2.0) is fetched with ``pip download`` and checked by sha256;
its one file ``tokenizer.model.v1`` is converted by transformers. Nothing of it is installed. The
folder holds a ``config.json`` that states the size of the vocabulary, and no weights.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.fetch_assets import FetchError, Package, download, scratch_folder, take_members

TOKENIZER = Package(
    requirement="mistral-common==1.13.1",
    sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    pip_options=("--only-binary=:all:",),
    members={"mistral_common/data/tokenizer.model.v1": "tokenizer.model"},
)
FOLDER = Path("models/mistral-v1-tokenizer")
TOKENS = 32_000


def main(arguments: Sequence[str] | None = None) -> int:
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(description="Fetch the tokenizer of another family.")
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    cache: Path = parser.parse_args(arguments).cache.expanduser().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fetch_tokenizer(cache)
    except (FetchError, OSError) as error:
        print(f"fetch_tokenizer: {error}", file=sys.stderr)
        return 1
    return 0


def fetch_tokenizer(cache: Path) -> None:
    folder = cache / FOLDER
    if (folder / "config.json").is_file():
        print(f"tokenizer: ready in {folder}")
        return
    with scratch_folder(cache) as scratch:
        archive = download(TOKENIZER, scratch)
        (scratch / "model").mkdir()
        take_members(archive, TOKENIZER.members, scratch / "model")
        convert(scratch / "model", scratch / "converted")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        os.rename(scratch / "converted", folder)
    print(f"tokenizer: Mistral 7B's -> {folder}")


def convert(model: Path, folder: Path) -> None:
    """Save the ``tokenizer.model`` of a folder as a fast tokenizer, ``config.json`` last."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(model, local_files_only=True)
    if len(tokenizer) != TOKENS:
        raise FetchError(f"{model} has {len(tokenizer)} tokens, expected {TOKENS}")
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": TOKENS}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
