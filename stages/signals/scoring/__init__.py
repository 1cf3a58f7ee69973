"""What signals share: logits in blocks, responses after their prompts, encodings."""
