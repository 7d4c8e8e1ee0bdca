"""Targets whose weights are not all in the memory of one device: offloaded ones, and tensor parallelism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.model.target import Target

PROMPT, MASK = torch.tensor([[5, 9, 3, 12, 7], [0, 0, 8, 9, 10]]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
LENGTH = {"max_new_tokens": 24, "attention_mask": MASK}
WHERE = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(params=["layer and output matrix on disk", "embedding on disk", "all in memory of the CPU"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_llama()
    if request.param.startswith("all"):
        return accelerate.cpu_offload(model, torch.device("cpu"))
    model.save_pretrained(tmp_path / "model")
    on_disk = (
        ("model.embed_tokens", "model.norm") if request.param.startswith("embed") else ("model.layers.1", "lm_head")
    )
    device_map = {part: "disk" if part in on_disk else "cpu" for part in WHERE}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()


def test_an_offloaded_model(offloaded: Any) -> None:
    assert "meta" in {weight.device.type for weight in offloaded.parameters()}
    expected = tiny_llama().generate(PROMPT, do_sample=False, **LENGTH)
    target = Target(offloaded)
    assert target.device == torch.device("cpu")
    for name in ("block_recurrent", "attention_last"):
        decoder = Decoder(target, heads=noise_heads(target, name, draft_vocab=20), tree_size=12)
        assert decoder.generate(PROMPT, do_sample=False, **LENGTH).tolist() == expected.tolist()
    for step in ("recorded", "compiled"):
        with pytest.raises(
            MedheadError, match=r"needs all weights in the memory of one device.* are offloaded"
        ) as refusal:
            Decoder(target, "heads", heads=noise_heads(target), step=step)
        assert "\n" not in str(refusal.value)


PROCESS = """
import os
import sys
import torch
from transformers import AutoModelForCausalLM
from conftest import noise_heads, tiny_llama
from medhead import Decoder, MedheadError
from medhead.model.target import Target
from medhead.serving import Engine
from test_spread_models import LENGTH, PROMPT

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
expected = tiny_llama().generate(PROMPT, do_sample=False, **LENGTH).tolist()
target = Target(model)
torch.manual_seed(rank)  # sampling noise, and heads that draft something else in each process
sampled = []
for name, draft_vocab in (("block_recurrent", 0), ("attention_last", 20), ("block_recurrent", 20)):
    for proposer, tree_size in (("heads", 12), ("hybrid", None)):
        heads = noise_heads(target, name, seed=rank, draft_vocab=draft_vocab)
        decoder = Decoder(target, proposer, tree_size=tree_size, heads=heads)
        assert decoder.generate(PROMPT, do_sample=False, **LENGTH).tolist() == expected, (rank, name, proposer)
        sampled.append(decoder.generate(PROMPT, do_sample=True, **LENGTH).tolist())
everywhere = [None] * 2
torch.distributed.all_gather_object(everywhere, sampled)
assert everywhere[0] == everywhere[1]
for refused in (lambda: Decoder(target, "heads", heads=noise_heads(target), step="recorded"), lambda: Engine(decoder, None)):
    try:
        refused()
    except MedheadError as error:
        assert "split over processes" in str(error)
    else:
        raise AssertionError("not refused")
torch.distributed.destroy_process_group()
os.write(1, f"the same text {rank}\\n".encode())
"""


@pytest.mark.slow
def test_tensor_parallel_processes_write_the_same_text(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "process.py").write_text(PROCESS, encoding="utf-8")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run(
        [*launch, str(tmp_path / "process.py"), str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert {"the same text 0", "the same text 1"} <= set(run.stdout.splitlines())
