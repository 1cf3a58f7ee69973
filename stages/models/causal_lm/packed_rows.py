"""Several rows end to end in one, each read as if it were alone.

Positions begin anew with each row; transformers keeps attention within what such positions part
(its ``find_packed_sequence_indices``). Architectures whose layers do not look at them (states that
run on, biases by distance) would read rows together, so a model is tried once before it is trusted.
"""

import torch
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from stages.models.causal_lm.model import final_hidden_states, last_layer_of

_LENGTHS = (7, 5)
_MOST_ERROR = 1e-3  # of the largest value, in the model's float32


@torch.no_grad()
def require_packs(model: PreTrainedModel, name: str) -> None:
    """Raise ConfigError unless rows end to end have the hidden states that they have alone."""
    training = model.training
    model.eval()
    rows = [torch.arange(3, 3 + length, device=model.device) for length in _LENGTHS]
    last_layer = last_layer_of(model)
    alone = [final_hidden_states(model, row_T[None], last_layer=last_layer)[0] for row_T in rows]
    places_T = torch.cat([torch.arange(len(row_T), device=model.device) for row_T in rows])
    packed_TD = final_hidden_states(
        model, torch.cat(rows)[None], last_layer=last_layer, position_ids_BT=places_T[None]
    )[0]
    model.train(training)
    alone_TD = torch.cat(alone)
    error = float((packed_TD - alone_TD).abs().max() / alone_TD.abs().max())
    if not error <= _MOST_ERROR:
        raise ConfigError(
            f"packing: {name} ({type(model).__name__}) reads rows that lie end to end as one: its "
            f"hidden states are off by {error:.2g} of the largest; set packing to false"
        )
