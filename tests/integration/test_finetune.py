"""The training command end to end: what it writes, that a killed run ends in the same bits, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import noise_heads, tiny_llama
from medhead import Decoder
from medhead.errors import MedheadError
from medhead.heads import build_heads, load_adapted, load_heads, save_heads
from medhead.heads.adapter import attach, heads_of
from medhead.heads.config import read_config
from medhead.model.target import Target
from medhead_training import finetune
from medhead_training.data import token_store as store
from medhead_training.objective import builders
from medhead_training.objective.module import HeadsModule
from medhead_training.trainer import trainer
from medhead_training.trainer.optim import MuonAdamW
from medhead_training.trainer.options import read_options
from medhead_training.trainer.report import UNCHANGED
from medhead_training.trainer.run_folder import OPTIONS_FILE, check_same_data, claim_folder
from medhead_training.trainer.trainer import COMPLETE, HeadsTrainer, last_checkpoint

ROOT = Path(__file__).parents[2]
QUICK = ["--seq-len", "48", "--batch-size", "4", "--depth", "3", "--inner-size", "24", "--correction-size", "20"]
QUICK += ["--save-steps", "3", "--logging-steps", "1", "--held-out", "0.1", "--save-dtype", "float32"]
HEADS = ["--kind", "block", "--draft-vocab", "40", "--blocks", "1", "--feature-layers", "0", "1", "--max-steps", "8"]
JOINT = [
    "--recipe",
    "joint",
    "--kind",
    "recurrent",
    "--lora-rank",
    "4",
    "--lora-lr",
    "0.02",
    "--lora-start-ratio",
    "0.2",
]
JOINT += ["--lora-dropout", "0.2", "--max-steps", "8"]
RECIPES = {"heads": HEADS, "joint": JOINT}
FILES = {"adapter_config.json", "adapter_model.safetensors", "medhead_config.json", "README.md", "training.json"}
RUNNING = {"checkpoint-3", "best-3.safetensors", "best.json", "features", "logs", "tokens", "options.json", "data.json"}
MEASURED = {"accuracies.json", "accuracy.png"}


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few sentences, often."""
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    answers = ["She went home.", "The dragon said: small.", "Once upon a time there was a small dragon."]
    records = [{"prompt": f"A {n % 4}?", "answer": answers[n % 3]} for n in range(48)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def command(folders: dict[str, Path], data: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(folders["model"]), "--data", str(data), "--output", str(output), *QUICK, *more]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error, a bar's states as lines."""
    code = finetune.main(arguments)
    return code, capsys.readouterr().err.replace("\r", "\n")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refuses to go on."""
    code, err = run(arguments, capsys)
    line = err.rstrip("\n").rpartition("\n")[2]
    assert code == 2, err
    assert line.startswith("medhead finetune: error: ")
    assert "Traceback" not in err
    return line


def model_of(folders: dict[str, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folders["model"], dtype=torch.float32).eval()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in output.glob(f"run/checkpoint-*/{COMPLETE}"))


def history(output: Path) -> list[dict[str, float]]:
    found = last_checkpoint(output / "run")
    assert found is not None
    return json.loads((found / "trainer_state.json").read_text())["log_history"]


@contextlib.contextmanager
def calls_of(owner: Any, name: str, act: Callable[[int], Any]) -> Iterator[list[int]]:
    """For a while, `act` comes before every call of a function, and is told how many there were."""
    real, made = getattr(owner, name), [0]

    def instead(*arguments: Any, **named: Any) -> Any:
        made[0] += 1
        act(made[0])
        return real(*arguments, **named)

    setattr(owner, name, instead)
    try:
        yield made
    finally:
        setattr(owner, name, real)


def raising(error: BaseException, at: int) -> Callable[[int], None]:
    def act(number: int) -> None:
        if number == at:
            raise error

    return act


# ---------------------------------------------------------------- what is written


def test_training_ends_with_the_epochs(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--kind", "medusa", "--epochs", "2", "--held-out", "0"]
    steps, said = {}, {}
    for name, most in (("whole", "0"), ("more", "1000"), ("less", "2")):
        code, err = run(command(folders, data, tmp_path / name, *more, "--max-steps", most), capsys)
        assert code == 0, err
        facts = json.loads((tmp_path / name / "training.json").read_text())
        steps[name], said[name] = facts["steps"], "--max-steps 1000 is a limit, not a target" in err
        assert f"{facts['answer_tokens']:,} answer tokens ({steps['whole']} steps) are far too few" in err
        assert facts["epochs"] == (2 if name != "less" else pytest.approx(2 * 2 / steps["whole"], abs=0.3))
        assert facts["documents"] == 48
        assert 0 < facts["answer_tokens"] < facts["tokens"]
    assert steps["whole"] == steps["more"] > steps["less"] == 2
    assert said == {"whole": False, "more": True, "less": False}


@pytest.mark.parametrize("kind", ["block", "attention", "recurrent", "medusa", "sequential"])
def test_from_text_to_heads(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:  # fmt: skip
    targets: list[Any] = []
    real = builders.load_model
    monkeypatch.setattr(builders, "load_model", lambda *a, **k: targets.append(real(*a, **k)) or targets[-1])
    output = tmp_path / "heads"
    code, err = run(command(folders, data, output, "--kind", kind, "--epochs", "3", "--eval-steps", "6"), capsys)
    assert code == 0, err
    assert names_in(output) == FILES | MEASURED | {"run"}
    assert list((output / "run" / "logs").glob("events.out.tfevents*"))
    assert re.search(r"loss \d\.\d{3}, top-1( \d\.\d\d){3}, accepted length \d\.\d\d", err)
    assert re.search(r"step 6: held-out text: top-1 [01]\.\d{3}, predicted accepted length \d\.\d\d with 32 nodes", err)
    assert "48 documents" in err
    assert "5 documents held out" in err
    losses = [entry["loss"] for entry in history(output) if "loss" in entry]
    assert len(losses) >= 9
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])

    config, model = read_config(output), model_of(folders)
    accuracies = json.loads((output / "accuracies.json").read_text())
    assert (config.kind, config.depth, config.target_type) == (kind, 3, "llama")
    assert config.accuracies == accuracies["accuracies"]
    assert config.trees == accuracies["trees"]
    facts = json.loads((output / "training.json").read_text())
    assert (facts["recipe"], facts["documents"], facts["resumed"]) == ("heads", 43, False)
    assert facts["steps"] == len(losses)
    card = (output / "README.md").read_text()
    assert UNCHANGED.format(model=folders["model"]) in card
    assert "library_name: peft" in card

    trained = targets[0].state_dict()  # the target that heads were trained on has the weights it had
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())
    prompt = torch.tensor([[5, 17, 40, 9], [80, 7, 7, 21]])
    expected = model.generate(prompt, max_new_tokens=40, do_sample=False)
    with Decoder(model, heads=output) as decoder:
        assert torch.equal(decoder.generate(prompt, max_new_tokens=40, do_sample=False), expected)

    heads = load_heads(output, Target(model))
    logits = model(prompt).logits
    attach(model, build_heads(config))
    wrapped = PeftModel.from_pretrained(model, str(output)).eval()
    loaded = heads_of(wrapped).state_dict()
    assert loaded.keys() == heads.state_dict().keys()
    assert all(torch.equal(tensor, heads.state_dict()[name]) for name, tensor in loaded.items())
    assert torch.equal(wrapped(prompt).logits, logits)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(prompt).logits, logits)


def test_nothing_held_out(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(
        folders, data, tmp_path / "heads", *HEADS, "--held-out", "0", "--max-steps", "2", "--no-tensorboard"
    )
    code, err = run(arguments, capsys)
    assert code == 0, err
    assert "0 documents held out" in err
    assert names_in(tmp_path / "heads") == FILES | {"run"}
    assert not (tmp_path / "heads" / "run" / "logs").exists()
    assert read_config(tmp_path / "heads").accuracies == []
    assert "No text was held out" in (tmp_path / "heads" / "README.md").read_text()
    model = model_of(folders)
    prompt = torch.tensor([[5, 17, 40, 9]])
    expected = model.generate(prompt, max_new_tokens=30, do_sample=False)
    with Decoder(model, heads=tmp_path / "heads") as decoder:
        assert torch.equal(decoder.generate(prompt, max_new_tokens=30, do_sample=False), expected)


def test_held_out_text_of_its_own(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "A 9?", "answer": "There was a small home."}\n{"text": "x"}\n')
    arguments = command(folders, data, tmp_path / "heads", *HEADS, "--max-steps", "1", "--eval-data", str(held))
    code, err = run(arguments, capsys)
    assert code == 0, err
    assert (
        json.loads((tmp_path / "heads" / "training.json").read_text())["documents"] == 48
    )  # all of the data is trained on
    assert "2 documents held out" in err


def test_a_target_in_half_precision(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe in (HEADS, JOINT):
        output = tmp_path / str(len(recipe))
        arguments = command(
            folders, data, output, *recipe, "--dtype", "bfloat16", "--max-steps", "2", "--save-dtype", "bfloat16"
        )
        code, err = run(arguments, capsys)
        assert code == 0, err
        stored = load_file(output / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} <= {torch.bfloat16, torch.int64}


def test_a_draft_vocabulary_of_the_most_frequent_tokens(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(
        folders, data, tmp_path / "heads", "--kind", "medusa", "--draft-vocab", "12", "--max-steps", "1"
    )
    code, err = run(arguments, capsys)
    assert code == 0, err
    cache = store.TokenStore(next(path for path in (tmp_path / "heads" / "run" / "tokens").iterdir()))
    tokens, mask = cache.read(0, cache.tokens)
    counts = torch.bincount(torch.from_numpy(tokens[mask].astype("int64")), minlength=300)
    chosen = load_heads(tmp_path / "heads", Target(model_of(folders))).draft_tokens
    assert chosen is not None
    assert len(chosen) == 12
    assert chosen.tolist() == sorted(chosen.tolist())
    others = counts.clone()
    others[chosen] = 0
    assert counts[chosen].min() >= others.max()


def test_heads_to_start_from(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(MuonAdamW, "step", lambda self, closure=None: None)  # what comes in goes out
    more = ["--kind", "attention", "--init-from", str(folders["attention"]), "--max-steps", "1"]
    code, err = run(command(folders, data, tmp_path / "heads", *more), capsys)
    assert code == 0, err
    assert read_config(tmp_path / "heads").depth == 4  # the checkpoint's
    assert f"| initialised from | `{folders['attention']}` |" in (tmp_path / "heads" / "README.md").read_text()
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (folders["attention"], tmp_path / "heads")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- killed and started again


@pytest.fixture(scope="module", params=sorted(RECIPES))
def straight(
    request: pytest.FixtureRequest, folders: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """A recipe's options, and the folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp(request.param) / "straight"
    assert finetune.main(command(folders, data, output, *RECIPES[request.param])) == 0
    return RECIPES[request.param], output


def assert_same_end(output: Path, straight: Path) -> None:
    """Weights, measurements, optimiser, learning rates and random numbers are the same, bit for bit."""
    for name in ("adapter_model.safetensors", "accuracies.json", "medhead_config.json"):
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name
    ours, theirs = (last_checkpoint(folder / "run") for folder in (output, straight))
    assert ours is not None
    assert theirs is not None
    assert ours.name == theirs.name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        a, b = (torch.load(folder / name, weights_only=False) for folder in (ours, theirs))
        assert str(_plain(a)) == str(_plain(b)), name
    assert (ours / trainer.WEIGHTS).read_bytes() == (theirs / trainer.WEIGHTS).read_bytes()
    a, b = (json.loads((folder / "training.json").read_text()) for folder in (output, straight))
    assert {**a, "minutes": 0, "resumed": 0} == {**b, "minutes": 0, "resumed": 0}
    a, b = ([(e["step"], e["loss"], e["learning_rate"]) for e in history(o) if "loss" in e] for o in (output, straight))
    assert a == b


def _plain(value: Any) -> Any:
    """With tensors and arrays as lists, so that comparing and printing compares every number."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "before the first checkpoint": (HeadsTrainer, "compute_loss", 2),
    "after a checkpoint": (HeadsTrainer, "compute_loss", 4),
    "between two": (HeadsTrainer, "compute_loss", 6),
    "in the first checkpoint": (HeadsTrainer, "_save_rng_state", 1),
    "in a later checkpoint": (HeadsTrainer, "_save_rng_state", 2),
    "in the last checkpoint": (HeadsTrainer, "_save_optimizer_and_scheduler", 3),
    "while it measures at the end": (finetune, "write_results", 1),
    "while it writes the heads": (finetune, "write_card", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_in_the_same_bits(
    folders: dict[str, Path], data: Path, tmp_path: Path, straight: tuple[list[str], Path], moment: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe, expected = straight
    output = tmp_path / "killed"
    owner, name, at = MOMENTS[moment]
    with calls_of(owner, name, raising(Killed(), at)), pytest.raises(Killed):
        finetune.main(command(folders, data, output, *recipe))
    complete = checkpoints(output)
    torn = [path for path in (output / "run").glob("checkpoint-*") if not (path / COMPLETE).exists()]
    assert len(torn) == (1 if "in the" in moment or "in a" in moment else 0)
    with calls_of(HeadsTrainer, "compute_loss", lambda number: None) as steps:
        code, err = run(command(folders, data, output, *recipe), capsys)
    assert code == 0, err
    assert steps[0] == 8 - max(complete, default=0)  # the rest is trained, and nothing twice
    assert all((path / COMPLETE).exists() for path in (output / "run").glob("checkpoint-*"))
    assert_same_end(output, expected)


def test_a_finished_run_does_nothing(
    folders: dict[str, Path], data: Path, straight: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = straight
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != OPTIONS_FILE}
    with calls_of(builders, "load_model", raising(AssertionError(), 1)):
        code, err = run(command(folders, data, output, *recipe), capsys)
    assert (code, err) == (0, f"finished already: {output}\n")
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != OPTIONS_FILE}
    assert {**after, output / "run": 0} == {**before, output / "run": 0}


def test_what_may_change_when_a_run_goes_on(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "heads"
    with calls_of(HeadsTrainer, "compute_loss", raising(Killed(), 5)), pytest.raises(Killed):
        finetune.main(command(folders, data, output, *HEADS))
    more = ["--save-steps", "2", "--logging-steps", "2", "--lr", "0.001", "--adamw-lr", "0.002"]
    code, err = run(command(folders, data, output, *HEADS, *more), capsys)
    assert code == 0, err
    assert checkpoints(output) == [6, 8]
    logged = {entry["step"]: entry["learning_rate"] for entry in history(output) if "loss" in entry}
    assert sorted(logged) == [1, 2, 3, 4, 6, 8]
    assert min(logged[step] for step in (1, 2, 3)) > 0.01
    assert max(logged[step] for step in (4, 6, 8)) < 0.001
    last = last_checkpoint(output / "run")
    assert last is not None
    groups = torch.load(last / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.001, 0.002]


@pytest.mark.slow
def test_sigkill(
    folders: dict[str, Path], data: Path, tmp_path: Path, straight: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Once right after a checkpoint appeared, once at any moment; and a checkpoint that is half there besides."""
    recipe, expected = straight
    if recipe is not JOINT:
        pytest.skip("one recipe is enough")
    output = tmp_path / "killed"
    arguments = command(folders, data, output, *recipe)
    slow = f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_finetune as t\n"
    slow += (
        "with t.calls_of(t.HeadsTrainer, 'compute_loss', lambda n: time.sleep(0.3)): t.finetune.main(sys.argv[1:])\n"
    )

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", slow, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL, env=_alone()
        )

    first = start()
    while not checkpoints(output):
        assert first.poll() is None
        time.sleep(0.002)
    _kill(first)
    assert checkpoints(output) == [3]
    second = start()
    while not len(list((output / "run" / "logs").glob("events*"))) > 1:  # it trains again
        assert second.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.2))
    _kill(second)
    kept = checkpoints(output)
    assert kept in ([3], [3, 6])
    torn = output / "run" / "checkpoint-7"
    shutil.copytree(output / "run" / f"checkpoint-{kept[-1]}", torn)
    (torn / COMPLETE).unlink()
    (torn / trainer.WEIGHTS).write_bytes((torn / trainer.WEIGHTS).read_bytes()[:100])
    code, err = run(arguments, capsys)
    assert code == 0, err
    assert not torn.exists()
    assert_same_end(output, expected)


def _alone() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


# ---------------------------------------------------------------- what breaks while it runs


def test_a_loss_that_is_no_number(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output, real = tmp_path / "heads", HeadsModule.heads_loss

    def breaking(self: Any, *arguments: Any) -> Any:
        loss, hits, tried = real(self, *arguments)
        made.append(1)
        return (loss * float("nan") if len(made) == 5 else loss), hits, tried

    made: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(HeadsModule, "heads_loss", breaking)
        line = refusal(command(folders, data, output, *HEADS), capsys)
    assert (
        "the loss is nan at step 5: start again with lower --lr and --adamw-lr; the run resumes from checkpoint-3"
        in line
    )
    assert checkpoints(output) == [3]
    assert names_in(output) == {"run"}
    code, err = run(command(folders, data, output, *HEADS, "--lr", "0.002"), capsys)  # as it was told
    assert code == 0, err


def test_weights_that_are_no_numbers_are_never_saved(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient of step 6 breaks, and its checkpoint comes before the next loss."""
    output, real, made = tmp_path / "heads", MuonAdamW.step, []

    def breaking(self: Any, closure: Any = None) -> Any:
        made.append(1)
        if len(made) == 6:
            self.param_groups[0]["params"][0].grad.fill_(float("inf"))
        return real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MuonAdamW, "step", breaking)
        line = refusal(command(folders, data, output, *HEADS), capsys)
    assert re.search(r"weight is not finite after step 6: .* resumes from checkpoint-3", line)
    assert names_in(output / "run") == RUNNING
    assert run(command(folders, data, output, *HEADS), capsys)[0] == 0


FULL_DISK: dict[str, tuple[Any, str, int, BaseException]] = {
    "weights": (trainer, "save_file", 2, SafetensorError("I/O error: No space left on device (os error 28)")),
    "optimiser": (torch, "save", 5, RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")),
    "state": (torch, "save", 4, OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("part", FULL_DISK)
def test_a_disk_that_is_full_at_a_checkpoint(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    output = tmp_path / "heads"
    owner, name, at, error = FULL_DISK[part]
    with calls_of(owner, name, raising(error, at)):
        line = refusal(command(folders, data, output, *HEADS), capsys)
    assert "the checkpoint of step 6 cannot be written" in line
    assert "free some space and start again: the run resumes from checkpoint-3" in line
    names = names_in(output / "run")
    best = {name for name in names if name.startswith("best-")}  # measured before the checkpoint was to be written
    assert len(best) == 1
    assert names - best == RUNNING - {"best-3.safetensors"}


def test_a_disk_that_is_full_at_the_end(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "heads"
    arguments = command(folders, data, output, *HEADS, "--max-steps", "2")
    for owner, name in ((sys.modules["medhead.heads.adapter"], "save_file"), (finetune, "plot_accuracy")):
        with calls_of(owner, name, raising(OSError(errno.ENOSPC, "No space left on device"), 1)):
            line = refusal(arguments, capsys)
        assert f"the heads cannot be written to '{output}' ([Errno 28] No space left on device)" in line
        assert names_in(output) == {"run"}
    with calls_of(HeadsTrainer, "compute_loss", lambda number: None) as steps:
        code, err = run(arguments, capsys)
    assert code == 0, err
    assert steps == [0]  # nothing is trained again
    assert names_in(output) == FILES | MEASURED | {"run"}


def test_a_disk_that_is_full_elsewhere(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with calls_of(store, "write_tokens", raising(OSError(errno.ENOSPC, "No space left on device"), 1)):
        line = refusal(command(folders, data, tmp_path / "heads", *HEADS), capsys)
    assert "no space is left ([Errno 28] No space left on device): free some and start again" in line


@pytest.mark.slow
def test_a_file_that_the_system_does_not_let_grow(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The kernel refuses the write itself: no file may be larger than 24 kB, and the optimiser's state is."""
    output = tmp_path / "heads"
    arguments = command(folders, data, output, *HEADS, "--no-tensorboard", "--features", "recompute", "--patience", "0")
    ended = subprocess.run(
        [sys.executable, "-m", "medhead_training.finetune", *arguments], cwd=ROOT, env=_alone(), capture_output=True,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000)), check=False,
    )  # fmt: skip
    line = ended.stderr.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    assert ended.returncode == 2, ended.stderr
    assert "the checkpoint of step 3 cannot be written" in line
    assert "the run resumes from the beginning (there is none yet)" in line
    assert not list((output / "run").glob("checkpoint-*"))


def test_out_of_memory(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of")
    for owner, name in ((HeadsModule, "forward"), (builders, "load_model")):
        with calls_of(owner, name, raising(error, 1)):
            line = refusal(command(folders, data, tmp_path / "heads", *HEADS), capsys)
        assert "out of memory: lower --batch-size (4), --seq-len (48) or --anchor-fraction (0.5)" in line
        assert "raise --gradient-accumulation-steps instead" in line
        assert "Tried to allocate 2.00 GiB" in line
    code, err = run(command(folders, data, tmp_path / "heads", *HEADS, "--batch-size", "2", "--max-steps", "1"), capsys)
    assert code == 0, err  # it was told to change them, and nothing was trained yet


# ---------------------------------------------------------------- the target is adapted too


def test_heads_and_adapter_together(folders: dict[str, Path], straight: tuple[list[str], Path]) -> None:
    recipe, output = straight
    if recipe is not JOINT:
        pytest.skip("the other recipe")
    original = model_of(folders)
    prompt = torch.tensor([[5, 17, 40, 9], [80, 7, 7, 21]])
    logits = original(prompt).logits
    with pytest.raises(MedheadError, match="load_adapted"):
        load_heads(output, Target(original))
    adapted = load_adapted(model_of(folders), output)
    changed = adapted(prompt).logits
    assert not torch.allclose(changed, logits, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(adapted(prompt).logits, logits)
    expected = adapted.generate(input_ids=prompt, max_new_tokens=40, do_sample=False)
    assert not torch.equal(expected, original.generate(prompt, max_new_tokens=40, do_sample=False))
    with Decoder(adapted, heads=heads_of(adapted)) as decoder:
        assert torch.equal(decoder.generate(prompt, max_new_tokens=40, do_sample=False), expected)
    assert "**The text is not that of" in (output / "README.md").read_text()
    stored = load_file(output / "adapter_model.safetensors")
    assert not [name for name in stored if "lora_" in name and ".medhead." in name]
    assert sum("lora_" in name for name in stored) == 2 * 7 * 2  # two matrices for each linear layer
    assert {entry["preservation"] > 0 for entry in history(output)[-4:] if "loss" in entry} == {True}


def test_an_incomplete_adapter_is_refused(
    folders: dict[str, Path], straight: tuple[list[str], Path], tmp_path: Path
) -> None:
    recipe, output = straight
    if recipe is not JOINT:
        pytest.skip("the other recipe")
    shutil.copytree(output, tmp_path / "part", ignore=shutil.ignore_patterns("run"))
    path = tmp_path / "part" / "adapter_model.safetensors"
    stored = load_file(path)
    for part in ("lora_B", "medhead"):
        name = next(name for name in sorted(stored) if part in name)
        save_file({n: t for n, t in stored.items() if n != name}, path)
        with pytest.raises(MedheadError, match=f"is incomplete: {re.escape(name)} is missing"):
            load_adapted(model_of(folders), tmp_path / "part")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(MedheadError, match="cannot be loaded"):
        load_adapted(model_of(folders), tmp_path / "part")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("lm_head", "names the embedding or the output matrix"),
        ("c_attn", "cannot be adapted: No modules were targeted"),
    ],
)
def test_modules_that_cannot_be_adapted(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], modules: str, message: str
) -> None:
    line = refusal(command(folders, data, tmp_path / "heads", *JOINT, "--lora-targets", modules), capsys)
    assert re.search(message, line)


def test_four_bits_need_bitsandbytes(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = refusal(command(folders, data, tmp_path / "heads", "--recipe", "qlora"), capsys)
    assert "--recipe qlora needs bitsandbytes: pip install 'medhead[qlora]'" in line


@pytest.mark.slow
def test_a_target_in_four_bits(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, quant_type="nf4").to("cpu")
    try:
        layer(torch.randn(2, 64))
    except Exception as error:
        pytest.skip(f"bitsandbytes cannot compute in 4 bits here: {error}")
    more = ["--recipe", "qlora", "--kind", "recurrent", "--lora-rank", "4", "--max-steps", "3", "--lora-lr", "0.02"]
    more += ["--gradient-checkpointing"]
    code, err = run(command(folders, data, tmp_path / "heads", *more), capsys)
    assert code == 0, err
    assert names_in(tmp_path / "heads") == FILES | MEASURED | {"run"}
    options = read_options(finetune.parser().parse_args(command(folders, data, tmp_path / "heads", *more)))
    plain, model = (builders.load_target(options, torch.device("cpu")) for _ in range(2))
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    prompt = torch.tensor([[5, 17, 40, 9]])
    logits = plain(prompt).logits
    adapted = load_adapted(model, tmp_path / "heads")
    assert not torch.equal(adapted(prompt).logits, logits)
    with adapted.disable_adapter():
        assert torch.equal(adapted(prompt).logits, logits)
    expected = adapted.generate(input_ids=prompt, max_new_tokens=20, do_sample=False)
    with Decoder(adapted, heads=heads_of(adapted)) as decoder:
        assert torch.equal(decoder.generate(prompt, max_new_tokens=20, do_sample=False), expected)


# ---------------------------------------------------------------- several processes


def _in_two_processes(arguments: list[str]) -> str:
    """Run the command in two processes; what they wrote on standard error."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    ended = subprocess.run(
        [*launch, "medhead_training.finetune", *arguments],
        cwd=ROOT,
        env=_alone(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def test_one_process_writes(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Many processes start at once; those that are not the first only read."""
    options = read_options(finetune.parser().parse_args(command(folders, data, tmp_path / "o", *HEADS)))
    folder = claim_folder(options)
    check_same_data(folder, [])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")}
    assert claim_folder(options, main=False) == folder
    check_same_data(folder, [], main=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")} == before
    options.seed = 7
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / COMPLETE).touch()
    with pytest.raises(MedheadError, match="seed was 0, now 7"):
        claim_folder(options, main=False)


@pytest.mark.slow
def test_two_processes(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "heads"
    output_lines = _in_two_processes(command(folders, data, output, *JOINT, "--max-steps", "4", "--batch-size", "2"))
    assert names_in(output) == FILES | MEASURED | {"run"}
    assert output_lines.count("heads are in") == output_lines.count("parameters to train") == 1
    found = last_checkpoint(output / "run")
    assert found is not None
    assert found.name == "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names_in(found)
    assert load_adapted(model_of(folders), output)


@pytest.mark.slow
def test_a_spread_target_teaches_the_same(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Layers cut into pieces over two processes: the heads become what they become beside a whole target."""
    more = [*HEADS, "--batch-size", "2", "--save-dtype", "float32"]
    whole, spread = tmp_path / "whole", tmp_path / "spread"
    _in_two_processes(command(folders, data, whole, *more))
    output_lines = _in_two_processes(command(folders, data, spread, *more, "--shard"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, spread))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=name)
    measured = [json.loads((folder / "accuracies.json").read_text()) for folder in (whole, spread)]
    assert measured[0]["accuracies"] == measured[1]["accuracies"]
    layers = sum(p.numel() for p in model_of(folders).model.layers.parameters())
    found = re.search(r"sharded over 2 processes: this one holds ([\d,]+) of ([\d,]+) parameters", output_lines)
    assert found is not None
    assert found.groups() == (f"{layers // 2:,}", f"{layers:,}")


def test_a_target_to_spread_waits_on_the_cpu(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the type that its device computes in: float32 would need twice the memory of a GPU."""
    asked: list[Any] = []
    monkeypatch.setattr(builders, "pick_dtype", lambda name, device: torch.bfloat16 if device.type == "cuda" else None)
    monkeypatch.setattr(builders, "load_model", lambda *given: asked.append(given[1:3]))
    arguments = ["--model", str(folders["model"]), "--data", "d", "--output", "o"]
    for more in ([], ["--shard"]):
        builders.load_target(read_options(finetune.parser().parse_args([*arguments, *more])), torch.device("cuda"))
    assert asked == [(torch.device("cuda"), torch.bfloat16), (torch.device("cpu"), torch.bfloat16)]


def test_a_target_is_spread_over_several_processes_alone(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(command(folders, data, tmp_path / "o", *HEADS, "--shard"), capsys)
    assert line.endswith("start it with `accelerate launch` or `torchrun`, or leave it out")
    line = refusal(command(folders, data, tmp_path / "o", *JOINT, "--shard"), capsys)
    assert line.endswith("--recipe must be heads with --shard, got 'joint'")


# ---------------------------------------------------------------- what is refused


def test_an_output_that_is_something_else(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "run").mkdir(parents=True)
    (tmp_path / "folder" / "run" / "mine.txt").write_text("mine")
    line = refusal(command(folders, data, tmp_path / "file", *HEADS), capsys)
    assert line.endswith(f"--output '{tmp_path / 'file'}' is a file; give a folder")
    line = refusal(command(folders, data, tmp_path / "folder", *HEADS), capsys)
    assert line.endswith(f"--output '{tmp_path / 'folder'}' holds something else; give a new or empty folder")
    assert (tmp_path / "file").read_text() == "mine"
    assert names_in(tmp_path / "folder" / "run") == {"mine.txt"}
    line = refusal(command(folders, data, tmp_path / "file" / "deeper", *HEADS), capsys)
    assert "cannot be written: Not a directory" in line


def test_an_output_with_another_run(
    folders: dict[str, Path], data: Path, straight: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = straight
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    line = refusal(command(folders, data, output, *recipe, "--anchor-fraction", "0.25"), capsys)
    assert line.endswith(
        f"--output '{output}' holds a run with other options: anchor_fraction was 0.5, now 0.25; "
        "give the same options to resume it, or another folder"
    )
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_at_its_very_beginning(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is its own, whatever is missing in it; and options may change, as nothing was trained with them."""
    for killed_in in ("replace", "write_text"):
        with calls_of(Path, killed_in, raising(Killed(), 1)), pytest.raises(Killed):
            finetune.main(command(folders, data, tmp_path / killed_in, *HEADS))
        line = refusal(command(folders, data, tmp_path / killed_in, *HEADS, "--feature-layers", "7"), capsys)
        assert "feature_layers must be layers of the target from 0 to 1" in line
        assert run(command(folders, data, tmp_path / killed_in, *HEADS, "--max-steps", "1"), capsys)[0] == 0
    (tmp_path / "replace" / "run" / OPTIONS_FILE).write_text("{")
    line = refusal(command(folders, data, tmp_path / "replace", *HEADS), capsys)
    assert "options.json' cannot be read; give another --output" in line


def test_other_data_than_a_run_began_with(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(data, own)
    with calls_of(HeadsTrainer, "compute_loss", raising(Killed(), 5)), pytest.raises(Killed):
        finetune.main(command(folders, own, tmp_path / "heads", *HEADS))
    with own.open("a") as file:
        file.write('{"text": "Once upon a time."}\n')
    line = refusal(command(folders, own, tmp_path / "heads", *HEADS), capsys)
    assert "the data is not what this run started with: documents, tokens and tokens to predict were [[48," in line
    assert checkpoints(tmp_path / "heads") == [3]


WRONG_DATA = {
    "not JSON": ('{"text": "a b"}\n{"text": \n', "data.jsonl, line 2 is not JSON"),
    "nothing of an assistant": (
        '{"messages": [{"role": "user", "content": "Hi"}]}\n',
        "no usable text of an assistant",
    ),
    "nothing to predict": ('{"prompt_ids": [7], "answer_ids": [8]}\n', "no document holds a token to predict"),
    "empty": ("", "holds no record"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_that_heads_cannot_learn_from(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, message = WRONG_DATA[name]
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    assert message in refusal(command(folders, path, tmp_path / "heads", *HEADS), capsys)


def test_what_does_not_fit_the_model(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*more: str) -> str:
        return refusal(command(folders, data, tmp_path / "heads", *more), capsys)

    assert "--seq-len 161 is more than the 160 tokens that LlamaForCausalLM can read" in message("--seq-len", "161")
    assert "correction of 'medusa' heads must be one of none, parent, got 'recurrent'" in message(
        "--kind", "medusa", "--correction", "recurrent"
    )
    assert "read one layer of the target" in message("--kind", "recurrent", "--feature-layers", "0", "1")
    line = message("--kind", "block", "--init-from", str(folders["recurrent"]))
    assert line.endswith("--init-from holds heads of kind 'recurrent', but --kind is 'block'; give the same kind")
    other = tiny_llama(seed=4)
    save_heads(noise_heads(Target(other)), other, tmp_path / "other")
    line = message("--kind", "recurrent", "--init-from", str(tmp_path / "other"))
    assert "were trained for another model: their vocabulary size is 64" in line
    own = model_of(folders)
    save_heads(noise_heads(Target(own), "attention_own", draft_hidden_size=0), own, tmp_path / "own")
    assert "an output matrix of their own" in message("--kind", "attention", "--init-from", str(tmp_path / "own"))
    line = refusal(["--model", str(tmp_path / "none"), *command(folders, data, tmp_path / "heads")[2:]], capsys)
    assert line.endswith(f"model folder '{tmp_path / 'none'}' does not exist")
