"""Reading a prompt of 2,048 and of 16,384 tokens, and of lengths that no prompt had before."""

from __future__ import annotations

import torch
from measure import CONTEXT, kernels, milliseconds, say, target

read = target()
with torch.inference_mode(), read.active():

    def prefill(tokens: int) -> None:
        """Read one prompt."""
        read.prefill(read.new_cache(1, tokens), [[0] * tokens])

    for tokens in (CONTEXT, 8 * CONTEXT):
        ms = milliseconds(lambda tokens=tokens: prefill(tokens), 3, 1)
        say(prefill=tokens, ms=ms, tokens_per_second=round(1e3 * tokens / ms))
        if tokens > CONTEXT:
            kernels(lambda tokens=tokens: prefill(tokens), f"prefill {tokens}", 8)
    for tokens in range(CONTEXT + 1, CONTEXT + 4):  # a kernel that is planned for every length would show here
        say(prefill=tokens, first_ms=milliseconds(lambda tokens=tokens: prefill(tokens), 1, 0))
