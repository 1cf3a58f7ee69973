#!/usr/bin/env bash
# transformers 5.19.0 (tokenizers 0.23.3): opening a folder can add tokens that its tokenizer.json lacks, with ids past its vocabulary.
#
# A folder whose tokenizer_config.json names GPT2Tokenizer, Qwen2Tokenizer or CodeGenTokenizer and its own bos and eos tokens (and no
# unk or pad) gets the class's default `<|endoftext|>` as one more special token. Text that spells it becomes that id: one past the
# last row of an embedding matrix that was made for the file. RobertaTokenizer adds three, and puts a BOS and an EOS around every
# text though the file has no post-processor.
#
# Seen: 279 tokens in the file, 280 after opening; "a <|endoftext|>" ends in id 279. Expected: the file's 279, and 15 ordinary ids.
# Fails when no token is added.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.19.0" "tokenizers==0.23.3"

cat >"$folder/open.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

FOLDER, TEXT = Path(sys.argv[1]), "a <|endoftext|>"
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
file = Tokenizer(models.BPE())
file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
file.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
file.train_from_iterator(["hello world we need to add words to a world"] * 20, trainer)
file.save(str(FOLDER / "tokenizer.json"))
size = file.get_vocab_size()
print(f"the file: {size} tokens, {TEXT!r} -> {file.encode(TEXT).ids}")
beyond = {}
for name in ("GPT2Tokenizer", "Qwen2Tokenizer", "CodeGenTokenizer", "RobertaTokenizer", "PreTrainedTokenizerFast"):
    body = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(body))
    opened = AutoTokenizer.from_pretrained(FOLDER)
    beyond[name] = len(opened) - size
    print(f"{name}: {len(opened)} tokens, {TEXT!r} -> {opened.encode(TEXT)}")
expected = {"GPT2Tokenizer": 1, "Qwen2Tokenizer": 1, "CodeGenTokenizer": 1, "RobertaTokenizer": 3, "PreTrainedTokenizerFast": 0}
sys.exit(0 if beyond == expected else f"added {beyond}, seen before {expected}: transformers has changed")
PYTHON
"$folder/venv/bin/python" "$folder/open.py" "$folder"
