"""The formula for a pass's operations against torch's own counter."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.mend.query_pass import answered, counted_flops, pass_flops

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(("before", "new"), [(0, 17), (17, 1), (16, 5)])
def test_the_formula_is_what_torch_counts(before: int, new: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    past = DynamicCache(config=CONFIG)
    if before:
        with torch.no_grad():
            answered(model, torch.randn(before, 32), past)
    counted = counted_flops(lambda: answered(model, torch.randn(new, 32), past))
    assert counted == pass_flops(CONFIG, before + new, new=new)
