"""One causal LM in torch, whoever it is: head, log-probs with gradient, decoding."""
