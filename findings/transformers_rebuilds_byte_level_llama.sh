#!/usr/bin/env bash
# transformers 5.19.0 (tokenizers 0.23.3): AutoTokenizer replaces the pre-tokenizer of a folder's tokenizer.json by that of the class it names.
#
# A folder with a byte-level BPE in tokenizer.json and `"tokenizer_class": "LlamaTokenizerFast"` in tokenizer_config.json (the published
# folders of the DeepSeek kind are so) is opened with a Metaspace pre-tokenizer, whose mark for a space no piece of the vocabulary has.
# There is no error and no warning; with no unknown token named, what is not found is left out: all spaces vanish from the ids.
# A folder that names "Qwen2Tokenizer" gets Qwen2's pattern in place of its own: ids differ where the patterns do, as in digits.
#
# Seen: "hello world we need to add" comes back as "helloworldweneedtoadd"; "we add 1234" is 8 tokens in place of 4, where the file keeps numbers whole.
# Expected: the ids of `tokenizers.Tokenizer.from_file(tokenizer.json)`, which is the file that the folder brings.
# Fails when AutoTokenizer and the file agree.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.19.0" "tokenizers==0.23.3"

cat >"$folder/encode.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

FOLDER = Path(sys.argv[1])
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
file = Tokenizer(models.BPE())
file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
file.decoder = decoders.ByteLevel()
file.train_from_iterator(
    ["hello world we need to add 1234"] * 20,
    trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
file.save(str(FOLDER / "tokenizer.json"))
surprises = 0
for name, text in (
    ("PreTrainedTokenizerFast", "hello world we need to add 1234"),
    ("LlamaTokenizerFast", "hello world we need to add"),
    ("Qwen2Tokenizer", "we add 1234"),
):
    body = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(body))
    opened = AutoTokenizer.from_pretrained(FOLDER)
    ids, expected = opened.encode(text, add_special_tokens=False), file.encode(text).ids
    print(f"{name}: {text!r} -> {len(ids)} ids, decoded {opened.decode(ids)!r}; the file itself: {len(expected)} ids")
    surprises += ids != expected
    assert name != "PreTrainedTokenizerFast" or ids == expected
sys.exit(0 if surprises == 2 else f"{surprises} of 2 classes differ from the file: transformers has changed")
PYTHON
"$folder/venv/bin/python" "$folder/encode.py" "$folder" 
