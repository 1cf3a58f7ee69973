#!/usr/bin/env bash
# vl-convert-python 1.9.0.post1 (its Vega-Lite v6.4): an order of categories given by `sort` fails where a category holds U+2028 or U+2029.
#
# Vega-Lite turns a `sort` array into an expression, in which the names are JSON strings. JSON lets the two line separators stand in a
# string as they are, and Vega's parser of expressions does not: it takes them for the end of the line, inside a string that is open.
# The same order given as `scale.domain` is data, never code, and draws. Names of categories come from data, such as a sample's text.
#
# Seen: ValueError with "Unexpected token ILLEGAL" for sort with U+2028 and with U+2029; SVG for scale.domain with them, and for sort without.
# Expected: four times an SVG.
# Fails when sort draws them.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "vl-convert-python==1.9.0.post1"

"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import vl_convert

print("vl-convert-python", version("vl-convert-python"))


def drawn(names: list[str], **order: object) -> str:
    spec = {
        "data": {"values": [{"name": name, "n": n} for n, name in enumerate(names, 1)]},
        "mark": "bar",
        "encoding": {
            "x": {"field": "name", "type": "nominal", **order},
            "y": {"field": "n", "type": "quantitative"},
        },
    }
    try:
        svg = vl_convert.vegalite_to_svg(spec, vl_version="v6.4")
    except ValueError as error:
        found = "Unexpected token ILLEGAL" if "Unexpected token ILLEGAL" in str(error) else str(error)[:200]
        return f"ValueError: {found}"
    return "an SVG" if svg.startswith("<svg") else svg[:80]


plain = ["b", "a"]
results = {"sort, plain names": drawn(plain, sort=plain)}
for code in (0x2028, 0x2029):
    names = ["b", f"a{chr(code)}c"]
    results[f"sort, U+{code:04X}"] = drawn(names, sort=names)
    results[f"scale.domain, U+{code:04X}"] = drawn(names, scale={"domain": names})
for what, result in results.items():
    print(f"{what}: {result}")
assert results == {
    "sort, plain names": "an SVG",
    "sort, U+2028": "ValueError: Unexpected token ILLEGAL",
    "scale.domain, U+2028": "an SVG",
    "sort, U+2029": "ValueError: Unexpected token ILLEGAL",
    "scale.domain, U+2029": "an SVG",
}, results
PYTHON
