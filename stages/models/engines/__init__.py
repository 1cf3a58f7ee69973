"""vLLM and transformers, run for a stage."""
