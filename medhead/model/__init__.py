"""The target: any causal language model of transformers, its key/value cache, attention and probe."""
