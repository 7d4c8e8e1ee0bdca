"""Training data: records, prompts, encoding, token stores, packing."""
