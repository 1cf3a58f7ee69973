#!/usr/bin/env bash
# polars 2.1.0 (pyarrow 26.0.1): sums of Float16 are added up in half precision, lists and columns alike.
#
# Teachers' log-probs are commonly kept as float16. A sequence's log-prob, their sum, is then taken with 11 bits of mantissa at every
# addition: beyond 2,048 the step between two numbers is 2, so small terms are lost; below -65,504 a sum is -inf.
# `list.sum()` and `sum()` of Float16 give Float16. pyarrow refuses: it has no `sum` of halffloat. numpy keeps float16 too, but adds pairwise.
#
# Seen: a list of 4,096 times -0.75 sums to -2048 (polars list.sum), a column of 100,000 such values to -inf.
# Expected: -3072 and -75000, which a wider accumulator gives (as for Int8 and Int16, which polars widens to Int64).
# Fails when polars widens.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "polars==2.1.0" "pyarrow==26.0.1" "numpy>=2,<3"

cat >"$folder/sums.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import polars as pl
import pyarrow as pa

print("polars", version("polars"), "pyarrow", version("pyarrow"))
logprob = np.float16(-0.75)  # exact in float16
lists = pl.from_arrow(pa.table({"logprobs": [np.full(4096, logprob)]}))
column = pa.table({"logprob": np.full(100_000, logprob)})
seen = {
    "list.sum() of 4,096 values": lists["logprobs"].list.sum()[0],
    "sum() of 100,000 values": pl.from_arrow(column)["logprob"].sum(),
    "sum() of 100,000 values after a cast to Float64": pl.from_arrow(column)["logprob"].cast(pl.Float64).sum(),
    "sum() of 200 times 100 as Int8": pl.Series([100] * 200, dtype=pl.Int8).sum(),
}
for name, value in seen.items():
    print(f"{name}: {value}")
values = list(seen.values())
assert values[2:] == [-75000.0, 20000]
sys.exit(0 if values[0] != -3072.0 and values[1] != -75000.0 else "polars adds Float16 up in a wider type now: it has changed")
PYTHON
"$folder/venv/bin/python" "$folder/sums.py"
