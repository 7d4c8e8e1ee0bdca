"""CPU seconds that a process spends on the compiled passes of a model: python measure.py MODEL DTYPE [WEIGHTS]

Run it twice with a `MEDHEAD_CACHE` of its own: the first process compiles, the second one loads. One thread. A line of JSON
is printed: seconds of the process and of its children (the C++ compiler) until the first verify of a tree and of one node
are done, and the median of 8 later ones in milliseconds of CPU time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch

from medhead import load_model
from medhead.compile import CompiledTarget
from medhead.core.tree import TokenTree
from medhead.model.target import Target


def main(name: str, dtype: str, weights: str = "full") -> None:
    """Print the measurements."""
    torch.set_num_threads(1)
    model = load_model(name, device="cpu", dtype=dtype, weights=weights)
    target, said = CompiledTarget(model, probe=False), list[str]()
    target.on_progress = said.append
    found: dict[str, object] = {
        "model": name,
        "dtype": dtype,
        "weights": weights,
        "torch": torch.__version__,
        "seconds_until_the_model_is_loaded": round(time.process_time(), 2),
    }
    for one in (target, Target(model, probe=False, packed=False)):
        kind = "compiled" if one is target else "ordinary"
        with torch.inference_mode(), one.active():
            cache = one.new_cache(1, 256)
            one.prefill(cache, [list(range(5, 205))])
            for nodes in (9, 1):
                tree = TokenTree.from_parents(torch.arange(3, 3 + nodes), (torch.arange(nodes) - 1).clamp(min=0) // 2)
                before = os.times()
                one.verify(cache, tree)
                after = os.times()
                own = after.user + after.system - before.user - before.system
                children = after.children_user + after.children_system - before.children_user - before.children_system
                times = []
                for _ in range(8):
                    began = time.thread_time()
                    one.verify(cache, tree)
                    times.append(1000 * (time.thread_time() - began))
                found[f"{kind}, {nodes} nodes"] = {
                    "first_seconds": round(own, 2),
                    "first_seconds_of_children": round(children, 2),
                    "later_milliseconds": round(statistics.median(times), 1),
                }
    print(json.dumps(found | {"compiled_now": said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
