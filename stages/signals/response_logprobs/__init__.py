"""Stage ``response_logprobs``: a model's log-prob of each response to a prompt."""
