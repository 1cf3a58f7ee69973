"""A model's rows for the tokens of another tokenizer: its own where they are one, else their mean.

Fast Vocabulary Transfer (arXiv 2402.09977): a token whose bytes are one token of the model's own
tokenizer takes that token's embedding, another one the mean of the embeddings of the tokens that
its text is made of there. We differ for bytes that are no text, such as half a character: theirs is
the mean of the single bytes' tokens. The tokens for the beginning and the end of a text take each
other's place, and whatever is left (other special tokens, ids without a token) the mean of all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas.errors import ConfigError
from stages.models.checkpoints.token_bytes import ByteTokenizer, UnknownBytes


@torch.no_grad()
def take_vocabulary(model: Any, teacher: Path, tokenizer: Path) -> None:
    """Give ``model``, of the tokenizer in ``teacher``, rows for that in ``tokenizer``, in place.

    Raises ConfigError for a tokenizer whose tokens' bytes are not known.
    """
    old, new = ByteTokenizer(teacher), ByteTokenizer(tokenizer)
    num_rows = 1 + max(*new.bytes_of, *new.special, *new.named.values())
    sources = _sources(old, new, num_rows)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and getattr(outputs, "bias", None) is not None:
        raise ConfigError(
            f"tokenizer: {teacher} has a bias for each token of its head, which has no rows for "
            f"another tokenizer's: use a model without one"
        )
    weights = {id(layer.weight): layer.weight.detach().clone() for layer in (inputs, outputs)}
    made = {key: _rows(weight_VD, sources) for key, weight_VD in weights.items()}
    keys = [id(inputs.weight), id(outputs.weight)]
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    for layer, key in zip(layers, keys, strict=True):
        layer.weight.copy_(made[key])
    for config in (model.config, model.generation_config):
        for role in ("bos", "eos", "pad"):
            setattr(config, f"{role}_token_id", new.named.get(role))


def _sources(old: ByteTokenizer, new: ByteTokenizer, num_rows: int) -> list[list[int]]:
    """Return for each new id the old ones whose mean it takes; none: that of all."""
    id_of = {part: index for index, part in old.bytes_of.items()}
    roles = {new.named[role]: [old.named[role]] for role in new.named if role in old.named}
    sources = []
    for index in range(num_rows):
        part = new.bytes_of.get(index)
        if part is None:
            sources.append(roles.get(index, []))
        else:
            sources.append([id_of[part]] if part in id_of else _pieces(part, old, id_of))
    return sources


def _pieces(part: bytes, old: ByteTokenizer, id_of: dict[bytes, int]) -> list[int]:
    try:
        ids, _ = old.encode(part)
    except (UnicodeDecodeError, UnknownBytes):
        singles = (bytes([byte]) for byte in part)
        return [id_of[single] for single in singles if single in id_of]
    return [int(index) for index in ids]


def _rows(weight_VD: Tensor, sources: list[list[int]]) -> Tensor:
    """Return [U, D] means of rows."""
    lengths = np.array([len(source) for source in sources])
    flat = torch.tensor([index for source in sources for index in source])
    owners = torch.from_numpy(np.repeat(np.arange(len(sources)), lengths))
    sums_UD = weight_VD.new_zeros(len(sources), weight_VD.shape[1], dtype=torch.float32)
    sums_UD.index_add_(0, owners, weight_VD[flat].float())
    means_UD = sums_UD / torch.from_numpy(lengths).clamp(min=1)[:, None]
    means_UD[torch.from_numpy(lengths == 0)] = weight_VD.float().mean(dim=0)
    return means_UD.to(weight_VD.dtype)
