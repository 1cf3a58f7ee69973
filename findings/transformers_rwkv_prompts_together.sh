#!/usr/bin/env bash
# transformers 5.19.0 (torch 2.13.0, CPU): RWKV answers a prompt differently when another, equally long one is beside it in the batch.
#
# From the second generated token on, RwkvForCausalLM reads one token of each row, [B, 1, H], and mixes it with the token before, which its
# state holds as [B, H]: the sum is [B, B, H]. Each row's token is then read B times, mixed with every row's past in turn, and the logits of
# one step are [B, B, V]; `generate()` takes the last. There is no error and no warning. It is so for any B > 1 with the cache, which is the
# default; one prompt at a time, or `use_cache=False`, is right. There is no padding here: all prompts have eleven tokens.
#
# Seen: the logits of one token after two prompts are [2, 2, 50]; of two prompts together, both are answered with other tokens than alone.
# Expected: [2, 1, 50], and the tokens of each prompt alone, which are those without the cache.
# Fails when prompts together are answered as each alone.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.19.0" "torch==2.13.0"

cat >"$folder/together.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import RwkvConfig, RwkvForCausalLM

print("transformers", version("transformers"), "torch", version("torch"))
torch.manual_seed(0)
config = RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, context_length=64, eos_token_id=None)
model = RwkvForCausalLM(config).eval()
with torch.no_grad():
    for weights in model.parameters():
        weights += 0.1 * torch.randn_like(weights)  # fresh ones repeat one token whatever the prompt is
prompts = torch.randint(1, 50, (2, 11))


def answers(rows: torch.Tensor, *, use_cache: bool) -> list[list[int]]:
    ids = model.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=8, use_cache=use_cache, pad_token_id=0
    )
    return ids[:, rows.shape[1] :].tolist()


with torch.no_grad():
    state = model(prompts, use_cache=True).state
    step = model(prompts[:, :1], state=state, use_cache=True).logits
print("logits of one token after two prompts:", list(step.shape))
alone = [answers(prompt[None], use_cache=True)[0] for prompt in prompts]
together = answers(prompts, use_cache=True)
uncached = answers(prompts, use_cache=False)
for name, found in (("each alone", alone), ("together, no cache", uncached), ("together, cache", together)):
    print(f"{name}: {found}")
assert alone == uncached
different = sum(one != other for one, other in zip(together, alone))
sys.exit(0 if different == 2 else f"{different} of 2 prompts are answered otherwise together than alone, seen before 2: transformers has changed")
PYTHON
"$folder/venv/bin/python" "$folder/together.py"
