"""Which tokenizer folders transformers 5 opened otherwise than their files say.

transformers 5 builds the tokenizers of most classes anew from the vocabulary, with the normaliser
and pre-tokenizer of the class. Before tokenizers were held to their files (``tokenizer``), tables
were made of what it had built; where that is not what the file says, ids have moved since, and the
tokenizer has a fingerprint of its own, so that such a table is made again. All others keep theirs.

What is written here is what transformers 5.19 builds, as fingerprints stay what they are; a test
holds it to the installed version.
"""

from collections.abc import Mapping
from typing import Any

Part = Any  # of tokenizer.json: a normaliser, a pre-tokenizer or None

# Model types whose folders are opened by their file when they name a class of those below.
_BY_FILE = frozenset(
    """
    arctic aria chameleon chatlm deepseek_ocr deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deepseek_vl deepseek_vl_hybrid deepseek_vl_v2 ernie4_5 ernie4_5_moe flex_olmo
    fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe gpt_bigcode granite granitemoe
    granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm internlm2 jamba
    janus kimi_k25 kimi_linear llava llava_next mimo_v2_flash minicpm3 minicpmv minicpmv4_6
    minicpmv4_7 minimax_m2 ministral ministral3 mistral mistral3 mixtral modernbert
    modernbert-decoder molmo molmo2 nemotron nvfp4 olmo2 olmo3 olmo_hybrid opencua openvla
    paddleocr_vl persimmon phi3 phi3_v phimoe pixtral smolvlm stablelm step3_vl step3p5 vipllava
    voxtral voxtral_realtime
    """.split()  # noqa: SIM905  a list would be a page long
)
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def was_built_otherwise(
    settings: Mapping[str, Any], body: Mapping[str, Any], model_type: str
) -> bool:
    """Whether other ids were made than ``body``, a folder's tokenizer.json, says.

    ``settings`` is its tokenizer_config.json, ``model_type`` that of its config.json ("" without).
    """
    named = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if model_type == "qwen2" and named != "None":  # whatever class is named
        named = "Qwen2Tokenizer"
    elif model_type in _BY_FILE:
        return False
    built = _built(named, settings)
    return built is not None and built != _plain(body.get("normalizer"), body.get("pre_tokenizer"))


def _built(named: str, settings: Mapping[str, Any]) -> tuple[Part, Part] | None:
    """Return what a class makes, as ``_plain`` has it; None for a class that keeps the file's."""
    prefix = settings.get("add_prefix_space")
    bytes_alone = ("ByteLevel", bool(prefix), True)
    match named:
        case "LlamaTokenizer":
            scheme = "always" if settings.get("legacy") else "first"
            return None, ("Metaspace", "\u2581", "never" if prefix is False else scheme, False)
        case "CodeLlamaTokenizer":
            return None, ("Metaspace", "\u2581", "never" if prefix is False else "first", False)
        case "GemmaTokenizer":
            return _MARKED_SPACES
        case "GPT2Tokenizer" | "CodeGenTokenizer":
            return None, bytes_alone
        case "GPTNeoXTokenizer":
            return {"type": "NFC"}, bytes_alone
        case "Qwen2Tokenizer":
            pattern = {"Regex": _QWEN2_PATTERN}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            return {"type": "NFC"}, [split, ("ByteLevel", bool(prefix), False)]
    return None


_MARKED_SPACES = (None, ("Metaspace", "\u2581", "never", False))
_SPACES_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_SPLIT_AT_SPACES = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def _plain(normalizer: Part, pre_tokenizer: Part) -> tuple[Part, Part]:
    """Return both without what moves no id, and with defaults in the place of what is left out."""
    if normalizer == _SPACES_REPLACED and pre_tokenizer in (None, _SPLIT_AT_SPACES):
        return _MARKED_SPACES  # there is no space left to split at
    return normalizer, _plain_part(pre_tokenizer)


def _plain_part(part: Part) -> Part:
    match (part or {}).get("type"):
        case "Sequence":
            parts = [_plain_part(item) for item in part["pretokenizers"]]
            return parts if len(parts) > 1 else parts[0]
        case "ByteLevel":
            return "ByteLevel", part.get("add_prefix_space", True), part.get("use_regex", True)
        case "Metaspace":
            older = "always" if part.get("add_prefix_space", True) else "never"
            scheme = part.get("prepend_scheme", older)
            return "Metaspace", part.get("replacement"), scheme, part.get("split", True)
    return part
