"""The last step of a language model: final hidden states to logits over the vocabulary.

Engines return final hidden states (after the last norm), so the head is ours. It holds the output
matrix, its bias, and what the model's configuration does after the product:

    logits = softcap * tanh((W h + b) * scale / softcap)

``scale`` is Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``, MiniCPM's ``dim_model_base
/ hidden_size``, Falcon-H1's ``lm_head_multiplier``, the older T5's ``d_model ** -0.5`` (the newer
has none; transformers keeps the switch as ``scale_decoder_outputs``); ``softcap`` is Gemma's. Where
we differ from the models: products of half-precision inputs are kept in float32, while transformers
rounds them to bfloat16 first, which moves a logit of 20 by up to 0.06.

Rows of the matrix at or beyond ``config.vocab_size`` are padding of the weight file, no part of
the model's softmax, and are cut off; rows below it that no token uses are part of it and stay. A
loss leaves those out of a teacher's distribution (``num_token_ids`` says where they begin).

Dimensions: P = positions, V = vocabulary, D = hidden width.
Cost: 2 P D V multiply-adds and a float32 [P, V] block, which ``positions_per_chunk`` bounds.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from schemas.errors import ConfigError, StoreError, first_line
from schemas.storage.files import Folder, atomic_file, write_text
from stages.models.checkpoints.own_code import is_pickle_refused, more_than_tensors, open_pretrained
from stages.models.checkpoints.rotary_scaling import fixed_window

HEAD_TENSORS = "head.safetensors"
HEAD_SETTINGS = "head.json"

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_KNOWN = {*_SOFTCAPS, *_MULTIPLIERS, *_DIVISORS}
# Settings that speak of logits and are no head: routers, attention scores, what forward returns.
_NO_HEAD = re.compile(r"router|att|auxiliary|to_keep|lm_head_bias|chunk_size|freeze|_init")

_OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight", "head.weight")  # the last is RWKV's
_INPUT_NAMES = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "embeddings.weight",
)  # fmt: skip


class HeadFeatures(NamedTuple):
    """What a model does with its logits after the product."""

    scale: float
    softcap: float | None


def head_features(config: PretrainedConfig) -> HeadFeatures:
    """Read the head's settings from a model's configuration.

    Raises ConfigError on a setting that changes logits in a way this file does not know.
    """
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        about_logits = re.search("logit|lm_head|output_mult", name)
        if about_logits and name not in _KNOWN and not _NO_HEAD.search(name):
            _refuse_setting(name, value)
    softcap = next((cap for cap in (_number(text, name) for name in _SOFTCAPS) if cap), None)
    return HeadFeatures(_scale(text), softcap)


@dataclass(frozen=True, slots=True, eq=False)
class LanguageHead:
    """Final hidden states to float32 logits. On the CPU the matrix is held in float32.

    ``dtype`` is the model's: hidden states are rounded to it, as the model itself rounds them.
    Ids from ``num_token_ids`` on are no token's; None where that is not known.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype
    num_token_ids: int | None = None

    @classmethod
    def from_model_folder(
        cls, path: Path, *, device: torch.device | str, dtype: torch.dtype
    ) -> "LanguageHead":
        """Load the head of an ordinary transformers folder without loading the model.

        Raises ConfigError if the folder has no such head, or one that cannot be reproduced.
        """
        config = read_config(path)
        weight_VD, bias_V = _read_head(path, config)
        vocab_size = int(config.get_text_config().vocab_size)
        if weight_VD.ndim != 2 or len(weight_VD) < vocab_size or not _is_plain(weight_VD):
            raise ConfigError(
                f"{path}: the head matrix is {weight_VD.dtype} {list(weight_VD.shape)}, expected "
                f"unquantised floats [>= {vocab_size}, width]: use a model with an ordinary head"
            )
        bias_V = None if bias_V is None else bias_V[:vocab_size]
        return cls._placed(weight_VD[:vocab_size], bias_V, head_features(config), device, dtype)

    @classmethod
    def load(
        cls, folder: Path, *, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> "LanguageHead":
        """Read what ``save`` wrote; ``dtype`` defaults to the saved one. Raises StoreError."""
        try:
            settings = json.loads((folder / HEAD_SETTINGS).read_text())
            features = HeadFeatures(settings["scale"], settings["softcap"])
            tensors = _read_tensors(folder / HEAD_TENSORS, ("weight", "bias"))
            weight_VD = tensors["weight"]
        except (OSError, ValueError, KeyError, ConfigError, SafetensorError) as error:
            raise StoreError(
                f"cannot read the language-model head in {folder} ({error}): expected "
                f"{HEAD_TENSORS} and {HEAD_SETTINGS}; write the table again"
            ) from error
        return cls._placed(weight_VD, tensors.get("bias"), features, device, dtype)

    @classmethod
    def _placed(
        cls,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        features: HeadFeatures,
        device: torch.device | str,
        dtype: torch.dtype | None,
    ) -> "LanguageHead":
        dtype = dtype or weight_VD.dtype
        # The CPU has no half-precision product with a float32 result; widened rows give the same.
        held = torch.float32 if torch.device(device).type == "cpu" else dtype
        weight_VD = weight_VD.to(dtype).to(device, held).contiguous()
        if bias_V is not None:
            bias_V = bias_V.to(dtype).to(device, torch.float32)
        return cls(weight_VD, bias_V, features.scale, features.softcap, dtype)

    @property
    def vocab_size(self) -> int:
        """Number of logits of a position."""
        return len(self.weight_VD)

    def positions_per_chunk(self, budget_bytes: int) -> int:
        """Return how many positions' float32 logits fit in ``budget_bytes``; at least one."""
        return max(1, budget_bytes // (4 * self.vocab_size))

    @torch.no_grad()
    def logits(self, hidden_PD: Tensor, *, out_PV: Tensor | None = None) -> Tensor:
        """Return [P, V] float32 logits, on the head's device.

        With ``out_PV`` (at least P rows, on a CPU) they lie in its first rows.
        """
        hidden_PD = hidden_PD.to(self.weight_VD.device).to(self.dtype)
        if hidden_PD.is_cuda and self.dtype != torch.float32:
            logits_PV = torch.mm(hidden_PD, self.weight_VD.t(), out_dtype=torch.float32)
        else:
            out_PV = None if out_PV is None else out_PV[: len(hidden_PD)]
            wide_PD = hidden_PD.to(self.weight_VD.dtype)
            logits_PV = torch.mm(wide_PD, self.weight_VD.t(), out=out_PV)
        if self.bias_V is not None:
            logits_PV += self.bias_V
        if self.scale != 1.0:
            logits_PV *= self.scale
        if self.softcap is not None:
            logits_PV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_PV

    def save(self, folder: Folder) -> None:
        """Write the head to ``folder``: equal heads give equal bytes; several may save at once."""
        tensors = {"weight": self.weight_VD.to("cpu", self.dtype).contiguous()}
        if self.bias_V is not None:
            tensors["bias"] = self.bias_V.to("cpu", self.dtype)
        settings = {"scale": self.scale, "softcap": self.softcap, "vocab_size": self.vocab_size}
        with atomic_file(folder / HEAD_TENSORS) as stream:
            stream.write(save(tensors))
        write_text(folder / HEAD_SETTINGS, json.dumps(settings, sort_keys=True) + "\n")


def read_config(path: Path) -> PretrainedConfig:
    """Return a model folder's configuration. Raises ConfigError if it has none."""
    try:
        config = open_pretrained(AutoConfig, path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a transformers model folder: {first_line(error)}"
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def max_positions(config: Any) -> int | None:
    """Return the tokens that a text config says a sequence may have, None where it says none.

    No more than those for which a model's rotary frequencies are fixed.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = [getattr(config, name, None) for name in names] + [fixed_window(config.to_dict())]
    return min((int(limit) for limit in found if limit), default=None)


def _scale(text: PretrainedConfig) -> float:
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(text, name) or 1.0
    for name in _DIVISORS:
        divisor = _number(text, name) or 1.0
        # HyperCLOVA X multiplies by what Granite and MiniCPM divide by.
        scale *= divisor if text.model_type.startswith("hyperclovax") else 1.0 / divisor
    if getattr(text, "scale_decoder_outputs", False):
        scale *= text.d_model**-0.5
    base = _number(text, "dim_model_base")
    if base and not hasattr(text, "logits_scaling"):
        scale *= base / text.hidden_size
    return scale


def _number(text: PretrainedConfig, name: str) -> float | None:
    value = getattr(text, name, None)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ConfigError(f"the model's config has {name} = {value!r}, expected a number: correct it")


def _refuse_setting(name: str, value: Any) -> None:
    if value not in (None, False, 0, 1):
        raise ConfigError(
            f"the model's config has {name} = {value!r}, which may change logits in a way that is "
            f"not known here (known: {', '.join(sorted(_KNOWN))}): use another model"
        )


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize >= 2


def _read_head(path: Path, config: PretrainedConfig) -> tuple[Tensor, Tensor | None]:
    """Return the output matrix and bias as stored, following tied embeddings."""
    files = _tensor_files(path)
    output, inputs = _shortest(files, _OUTPUT_NAMES), _shortest(files, _INPUT_NAMES)
    tied = getattr(config, "tie_word_embeddings", False)
    name = (inputs or output) if tied else output
    if getattr(config, "is_encoder_decoder", False):  # T5 says tied of both kinds: files know
        name = output or _shortest(files, ("shared.weight",))
    if name is None:
        wanted = _INPUT_NAMES if tied else _OUTPUT_NAMES
        raise ConfigError(
            f"{path}: no head matrix in the weight files, expected a tensor ending in one of "
            f"{', '.join(wanted)} (tie_word_embeddings is {bool(tied)}): use a full checkpoint, or "
            f"another model where a '{config.model_type}' calls its head otherwise"
        )
    bias = f"{(output or 'lm_head.weight').removesuffix('weight')}bias"
    weight = _read_tensors(files[name], (name,))[name]
    return weight, _read_tensors(files[bias], (bias,))[bias] if bias in files else None


def _shortest(files: dict[str, Path], endings: tuple[str, ...]) -> str | None:
    """Return the tensor with one of ``endings``; extra prediction layers have longer names."""
    found = [n for n in files if any(n == e or n.endswith(f".{e}") for e in endings)]
    return min(found, key=len, default=None)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return {tensor: path / file for tensor, file in weight_map.items()}
        if (path / name).is_file():
            return dict.fromkeys(_tensor_names(path / name), path / name)
    raise ConfigError(
        f"{path} has no model.safetensors or pytorch_model.bin (or their index): expected an "
        f"ordinary transformers model folder"
    )


def _loaded(file: Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(file, mmap=True, weights_only=True))
    except Exception as error:
        if is_pickle_refused(error):
            raise more_than_tensors(file) from error
        raise


def _tensor_names(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_loaded(file))
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return those of ``names`` that ``file`` has. Raises ConfigError if there is no file."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: the weight files of {file.parent} are incomplete")
    if file.suffix == ".bin":
        loaded = _loaded(file)
        return {name: loaded[name] for name in names if name in loaded}
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names if name in tensors.keys()}  # noqa: SIM118
