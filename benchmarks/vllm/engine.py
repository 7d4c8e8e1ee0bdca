"""Decode prompts greedily with vLLM and note every pass; `check.py` runs this in vLLM's own environment.

usage: python engine.py JOB.json RESULT.json

A job holds `model`, `prompts` (token ids), `max_new_tokens`, `max_model_len` and `speculative_config` or null. The result holds
the version, and for every prompt its `tokens` and `passes`: how many tokens the text had, and the draft tokens after them. It
holds `error` instead where vLLM does not load or run the job.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

SWITCHES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where its passes can be noted
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Passes:
    """Notes what the engine emits and drafts for the one request that runs."""

    def __init__(self) -> None:
        self.emitted = 0
        self.noted: list[tuple[int, list[int]]] = []

    def watch(self) -> None:
        """Wrap vLLM's scheduler, which is told of the emitted tokens and then of the draft tokens of every pass."""
        from vllm.v1.core.sched.scheduler import Scheduler

        update_from_output, update_drafts = Scheduler.update_from_output, Scheduler.update_draft_token_ids

        def on_output(scheduler: Any, scheduled: Any, output: Any) -> Any:
            self.emitted += sum(map(len, output.sampled_token_ids))
            return update_from_output(scheduler, scheduled, output)

        def on_drafts(scheduler: Any, drafts: Any) -> Any:
            self.noted += [(self.emitted, list(tokens)) for tokens in drafts.draft_token_ids]
            return update_drafts(scheduler, drafts)

        Scheduler.update_from_output, Scheduler.update_draft_token_ids = on_output, on_drafts

    def take(self) -> list[tuple[int, list[int]]]:
        """Return what was noted, and forget it."""
        noted, self.noted, self.emitted = self.noted, [], 0
        return noted


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """Decode the prompts one by one."""
    import vllm

    passes = Passes()
    passes.watch()
    engine = vllm.LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=job["max_model_len"],
        max_num_seqs=1,
        async_scheduling=False,
        enable_prefix_caching=False,
        speculative_config=job["speculative_config"],
        seed=0,
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
    answers = []
    for prompt in job["prompts"]:
        passes.take()
        output = engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
        answers.append({"tokens": list(output.token_ids), "passes": passes.take()})
    return {"version": vllm.__version__, "answers": answers}


def main(job: Path, result: Path) -> None:
    """Run a job; the cause of a failure is the result then."""
    os.environ.update(SWITCHES)
    try:
        found = decode(json.loads(job.read_text()))
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
