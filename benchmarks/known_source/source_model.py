"""The known source as a transformers model that brings its own code: a teacher that is the truth.

What its head reads are the log-probs themselves and the head is the identity, so every stage that
runs a model runs the source. ``source`` has the formula; a folder takes this file as it is.

Dimensions: B = sequences, T = tokens, M = topics, G = groups, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class KnownSourceConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """Sizes; a hidden state is a log-prob for each token, so its width is the vocabulary's."""

    model_type = "known_source"

    def __init__(
        self,
        vocab_size: int = 256,
        num_topics: int = 1,
        num_groups: int = 1,
        window: int = 8,
        max_position_embeddings: int = 256,
        **others: Any,
    ) -> None:
        self.vocab_size = self.hidden_size = vocab_size
        self.num_topics, self.num_groups, self.window = num_topics, num_groups, window
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 1
        others["tie_word_embeddings"] = False
        super().__init__(**others)


class KnownSourceBase(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped
    """What both classes share: there are no weights to draw."""

    config_class = KnownSourceConfig
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything as it is loaded."""


class KnownSourceModel(KnownSourceBase):
    """Token ids to log-probs of the next token."""

    def __init__(self, config: KnownSourceConfig) -> None:
        super().__init__(config)
        shape = (config.num_topics, config.num_groups, config.vocab_size)
        self.register_buffer("ngrams_MGV", torch.full(shape, 1.0 / config.vocab_size))
        self.register_buffer("group_V", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.register_buffer("copy_M", torch.zeros(config.num_topics))
        self.embed_tokens = nn.Embedding(1, 1)  # transformers asks for input embeddings
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> BaseModelOutputWithPast:
        """Return [B, T, V] log-probs as ``last_hidden_state``; padding stands on the right."""
        counts_BTV = nn.functional.one_hot(input_ids, self.config.vocab_size).float().cumsum(1)
        window = self.config.window
        counts_BTV[:, window:] -= counts_BTV[:, :-window].clone()
        copied_BT1V = (counts_BTV / counts_BTV.sum(-1, keepdim=True)).unsqueeze(2)
        ngrams_BTMV = self.ngrams_MGV[:, self.group_V[input_ids]].permute(1, 2, 0, 3)
        copy_M1 = self.copy_M[:, None]
        logprobs_BTMV = ((1.0 - copy_M1) * ngrams_BTMV + copy_M1 * copied_BT1V).log()
        next_BTM1 = input_ids[:, 1:, None, None].expand(-1, -1, len(self.copy_M), 1)
        told_BTM = logprobs_BTMV[:, :-1].gather(3, next_BTM1)[..., 0].cumsum(1)
        told_BTM = torch.cat([torch.zeros_like(logprobs_BTMV[:, :1, :, 0]), told_BTM], dim=1)
        posterior_BTM1 = told_BTM.log_softmax(-1).unsqueeze(-1)
        logprobs_BTV = (posterior_BTM1 + logprobs_BTMV).logsumexp(2)
        return BaseModelOutputWithPast(
            last_hidden_state=logprobs_BTV, hidden_states=(logprobs_BTV, logprobs_BTV)
        )


class KnownSourceForCausalLM(KnownSourceBase):
    """The same with a head, the identity."""

    def __init__(self, config: KnownSourceConfig) -> None:
        super().__init__(config)
        self.model = KnownSourceModel(config)
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V], which are log-probs; ``logits_to_keep`` of the last ones."""
        output = self.model(input_ids)
        hidden_BTV = output.last_hidden_state
        logits_BTV = self.lm_head(hidden_BTV[:, -logits_to_keep:])  # of -0: all
        return CausalLMOutputWithPast(logits=logits_BTV, hidden_states=output.hidden_states)
