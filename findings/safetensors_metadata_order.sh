#!/usr/bin/env bash
# safetensors 0.8.0 (numpy 2): equal tensors with equal metadata of several keys are saved as other bytes each time.
#
# The metadata of a file's header is written in the order of a hash map that is seeded anew for every call. Readers see no difference;
# a checksum of the file, a cache that is addressed by content, or a test for equal bytes does. One key, or none, is safe: put one
# JSON text under it.
#
# Seen: five saves of one array with six metadata keys gave five sha256; with one key, one. Expected: one, as for equal input.
# Fails when five saves with six keys give one sha256 (by chance once in 720^4).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "safetensors==0.8.0" "numpy>=2,<3"

"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import save

print("safetensors", version("safetensors"))
array = {"weight": np.zeros(3, np.float32)}
found = {}
for count in (0, 1, 6):
    metadata = {f"key{i}": "value" for i in range(count)}
    found[count] = {hashlib.sha256(save(array, metadata=metadata)).hexdigest()[:12] for _ in range(5)}
    print(f"{count} metadata keys, five saves: {sorted(found[count])}")
assert len(found[0]) == len(found[1]) == 1
sys.exit(0 if len(found[6]) > 1 else "five saves gave equal bytes: safetensors has changed")
PYTHON
