"""Attention backends and kernels: tensors in, tensors out; nothing here imports medhead."""
