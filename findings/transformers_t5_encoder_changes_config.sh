#!/usr/bin/env bash
# transformers 5.19.0 (torch 2.13.0, CPU): making a T5EncoderModel changes the config it is given, and with it every model that shares it.
#
# T5EncoderModel writes `is_encoder_decoder = False` and `use_cache = False` into the caller's config (MT5EncoderModel too; UMT5EncoderModel
# and T5ForConditionalGeneration work on copies). A T5ForConditionalGeneration whose `config` made the encoder no longer generates: it is
# taken for a decoder, and the error speaks of missing inputs. `save_pretrained` writes the changed config, so the folder is broken as well,
# for whoever opens it later. There is no warning. Give the encoder `copy.deepcopy(config)`.
#
# Seen: is_encoder_decoder True before and False after; `generate()` of the first model: "ValueError: You must specify exactly one of
# input_ids or inputs_embeds", as of its folder, saved and opened again. Expected: the config as it was, and six tokens each time.
# Fails when the config is left alone.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.19.0" "torch==2.13.0"

cat >"$folder/encoder.py" <<'PYTHON'
import copy
import sys
from importlib.metadata import version

import torch
from transformers import (
    MT5Config,
    MT5EncoderModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

FOLDER = sys.argv[1]
SIZES = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
PROMPT = torch.arange(3, 11)[None]
print("transformers", version("transformers"), "torch", version("torch"))


def generated(model: T5ForConditionalGeneration) -> str:
    try:
        ids = model.generate(PROMPT, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    except ValueError as error:
        return f"ValueError: {error}"
    return f"{ids.shape[1] - 1} tokens"


changed = {}
for config_class, encoder_class in ((T5Config, T5EncoderModel), (MT5Config, MT5EncoderModel), (UMT5Config, UMT5EncoderModel)):
    config = config_class(**SIZES)
    before = config.to_dict()
    encoder_class(config)
    after = config.to_dict()
    changed[encoder_class.__name__] = [name for name in before if before[name] != after[name]]
    print(f"{encoder_class.__name__} changed of its config: {changed[encoder_class.__name__]}")

torch.manual_seed(0)
model = T5ForConditionalGeneration(T5Config(**SIZES, decoder_start_token_id=0)).eval()
T5EncoderModel(copy.deepcopy(model.config))
results = [generated(model)]
print(f"with an encoder of a copy of its config: is_encoder_decoder {model.config.is_encoder_decoder}, generate: {results[0]}")
T5EncoderModel(model.config)
results.append(generated(model))
print(f"with an encoder of its config: is_encoder_decoder {model.config.is_encoder_decoder}, generate: {results[1]}")
model.save_pretrained(FOLDER)
opened = T5ForConditionalGeneration.from_pretrained(FOLDER)
results.append(generated(opened))
print(f"saved and opened again: is_encoder_decoder {opened.config.is_encoder_decoder}, generate: {results[2]}")
assert results[0] == "6 tokens" and not changed["UMT5EncoderModel"]
error = "ValueError: You must specify exactly one of input_ids or inputs_embeds"
same = "is_encoder_decoder" in changed["T5EncoderModel"] and "is_encoder_decoder" in changed["MT5EncoderModel"]
sys.exit(0 if same and results[1:] == [error, error] else "the config is left alone, or its change does no harm: transformers has changed")
PYTHON
"$folder/venv/bin/python" "$folder/encoder.py" "$folder/saved"
