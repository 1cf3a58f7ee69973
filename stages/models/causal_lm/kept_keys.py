"""Whether a model keeps the keys and values of what it has read, or a state in their place.

Keys and values can be cut, shared between sequences and masked, so prompts of unlike lengths may
stand in one batch. A state (of RWKV, xLSTM, Mamba, and the layers without attention of hybrid
models) can be neither cut nor shared, and many such models read the padding on the left of a
prompt into it: their prompts stand together where they are equally long, and unpadded. Models that
keep nothing but a state are run anew on all tokens for each new one: transformers 5.19 mixes the
states of RWKV's prompts that stand together, and cannot go on from xLSTM's at all.
"""

import inspect
from collections.abc import Sequence
from itertools import groupby
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_KNOWN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def keeps_keys(model: PreTrainedModel) -> bool:
    """Return whether each layer keeps the keys and values of the tokens it has seen, no state.

    A model is tried once, on one token.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _tried(model)
    return _KNOWN[model]


def _tried(model: PreTrainedModel) -> bool:
    if not keeps_some_keys(model):
        return False
    one_token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        output = model(input_ids=one_token, use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    kinds = {type(layer) for layer in layers}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def keeps_some_keys(model: PreTrainedModel) -> bool:
    """Return whether some layers keep keys and values: those of hybrid models, too."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def equally_long(indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Return the indices in groups of equal lengths, each in the order given."""
    ordered = sorted(indices, key=lambda index: lengths[index])
    return [list(group) for _, group in groupby(ordered, key=lambda index: lengths[index])]
