"""transformers' Trainer for heads: two kinds of learning rates, checkpoints that survive a kill, a bar that says what matters."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medhead.errors import MedheadError
from medhead_training.objective.module import HeadsModule
from medhead_training.trainer.optim import muon_and_adamw
from medhead_training.trainer.options import TrainOptions

WEIGHTS, COMPLETE = "trained.safetensors", "complete"


class HeadsTrainer(Trainer):
    """Trains a `HeadsModule`.

    Args:
        module: what to train.
        arguments: of transformers.
        options: of the run.
        dataset: packed rows, all epochs in order.
        evaluate_heads: measures the heads on held-out text; returns numbers to log.
    """

    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl
    _micro: int  # batch of an accumulated step

    def __init__(
        self,
        module: HeadsModule,
        arguments: TrainingArguments,
        options: TrainOptions,
        dataset: Dataset[Any],
        evaluate_heads: Callable[[], dict[str, float]],
    ) -> None:
        self.module, self.options, self.evaluate_heads = module, options, evaluate_heads
        self.recent = Recent(module.heads.config.depth)
        self.bar = Bar()
        super().__init__(model=module, args=arguments, train_dataset=dataset, eval_dataset=dataset)
        self.model_accepts_loss_kwargs = False
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(self.bar)

    def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
        """Train to the end; of a run that was there already only the weights are loaded."""
        try:
            if resume_from_checkpoint is not None:
                state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
                if state.global_step >= state.max_steps:  # transformers would train one step more
                    self.state = state
                    return self._load_from_checkpoint(resume_from_checkpoint)
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)
        finally:
            self.bar.close()

    # ---------------------------------------------------------------- one step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch; what is random in it depends on the seed, the step and the place in it alone."""
        step = self.state.global_step
        self._micro = self._micro + 1 if getattr(self, "_at", None) == step else 0
        self._at = step
        place = (step * self.args.gradient_accumulation_steps + self._micro) * self.args.world_size
        seed = (self.options.seed << 32) + place + self.args.process_index
        found = model(**inputs, seed=seed)
        loss = found["loss"]
        if not bool(torch.isfinite(loss.detach())):
            raise self._diverged(f"the loss is {float(loss.detach())} at step {step + 1}")
        self.recent.add(found)
        return (loss, found) if return_outputs else loss

    def _diverged(self, what: str) -> MedheadError:
        found = last_checkpoint(Path(str(self.args.output_dir)))
        return MedheadError(f"{what}: start again with lower --lr and --adamw-lr; the run goes on from {_name(found)}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the heads do to transformers' own numbers."""
        super().log(logs | self.recent.take() if "loss" in logs else logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the heads on held-out text."""
        found = {f"eval_{name}": value for name, value in self.evaluate_heads().items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # ---------------------------------------------------------------- optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Muon and AdamW for the heads, AdamW for an adapter."""
        if self.optimizer is None:
            o, size = self.options, self.module.heads.config.hidden_size
            scale = (256 / size) ** 0.5
            lr, adamw_lr = o.lr or 0.02 * scale, o.adamw_lr or 0.003 * scale
            heads = dict(self.module.heads.named_parameters())
            of_heads = {id(p) for p in heads.values()}
            if o.optimizer == "muon":
                self.optimizer = muon_and_adamw(heads.items(), lr, adamw_lr)
            else:
                self.optimizer = torch.optim.AdamW(heads.values(), lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
            adapter = [p for p in self.module.parameters() if p.requires_grad and id(p) not in of_heads]
            if adapter:
                extra = {"params": adapter, "lr": o.lora_lr, "weight_decay": 0.0, "muon": False, "adapter": True}
                self.optimizer.add_param_group(extra)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Warm-up, then a cosine down to 2 %; an adapter starts later."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None

            def factor(step: int, begin: float) -> float:
                late = step - begin * num_training_steps
                if late < 0:
                    return 0.0
                total = max(1.0, (1 - begin) * num_training_steps)
                rise = max(1.0, self.options.warmup * num_training_steps)
                return min(1.0, (late + 1) / rise) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * late / total)))

            begins = [self.options.lora_warmup if group.get("adapter") else 0.0 for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [lambda s, b=b: factor(s, b) for b in begins])  # type: ignore[misc]
        return self.lr_scheduler

    # ---------------------------------------------------------------- data and checkpoints

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """In order: the data set is shuffled already."""
        return SequentialSampler(self.train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only what is trained."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name for name, p in self.module.named_parameters() if p.requires_grad}
        state = self.module.state_dict() if state_dict is None else state_dict
        weights = {name: state[name].detach().cpu().contiguous() for name in sorted(trained)}
        save_file(weights, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The opposite of `_save`."""
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        names = {name for name, p in self.module.named_parameters() if p.requires_grad}
        if names != weights.keys():
            raise MedheadError(
                f"{resume_from_checkpoint} was written by a run with other heads or another recipe; use another --output"
            )
        self.module.load_state_dict(weights, strict=False)  # names were compared above; the frozen target is not stored

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Everything but the learning rates, which are those of this start."""
        assert self.optimizer is not None
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        scheduler.base_lrs = rates
        for group, rate, factor in zip(self.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Mark it when all of it is written. A full disk is one clear line; the last good checkpoint stays."""
        folder = Path(str(self.args.output_dir))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):  # the next loss would have told
                raise self._diverged(f"{name} is not finite after step {self.state.global_step}")
        new = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (new / COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            reason = " ".join(str(error).split())[:120]
            raise MedheadError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {str(folder)!r} ({reason}); free some "
                f"space and start again: the run goes on from {_name(last_checkpoint(folder))}"
            ) from error


class Recent:
    """What the steps since the last log entry found; read by the host only when something is logged."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._found: list[dict[str, Tensor]] = []

    def add(self, found: dict[str, Tensor]) -> None:
        """One batch."""
        self._found.append({name: value.detach() for name, value in found.items() if name != "loss"})

    def take(self) -> dict[str, float]:
        """Numbers since the last call."""
        if not self._found:
            return {}
        hits, tried = (torch.stack([f[name] for f in self._found]).sum(0).tolist() for name in ("hits", "tried"))
        top1 = [h / t if t else 0.0 for h, t in zip(hits, tried, strict=True)]
        numbers = {f"top1/depth_{d + 1}": value for d, value in enumerate(top1)}
        numbers["predicted_accepted_length"] = 1 + sum(math.prod(top1[: d + 1]) for d in range(self.depth))
        for name in ("heads_loss", "preservation"):
            if name in self._found[0]:
                numbers[name] = float(torch.stack([f[name] for f in self._found]).mean())
        self._found = []
        return numbers


class Bar(TrainerCallback):
    """A progress bar with loss, accuracy by depth and the accepted length that a chain of first guesses would reach."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        state.compute_steps(args, state.max_steps)  # a resumed state has the intervals of its checkpoint
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, mininterval=1
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step."""
        if self.bar is not None:
            self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Refresh what stands behind the bar."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            top1 = " ".join(f"{v:.2f}" for k, v in logs.items() if k.startswith("top1/"))
            length = logs.get("predicted_accepted_length", 0.0)
            self.bar.set_postfix_str(f"loss {logs['heads_loss']:.3f}, top-1 {top1}, tokens/pass {length:.2f}")
        elif "eval_predicted_accepted_length" in logs:
            self.bar.write(
                f"step {state.global_step}: held-out text: top-1 {logs['eval_top1_depth_1']:.3f}, "
                f"{logs['eval_predicted_accepted_length']:.2f} tokens a pass predicted with 32 nodes",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Leave the line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    complete = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(complete, key=_step, default=None)


def remove_torn(folder: Path) -> None:
    """Delete checkpoints that a kill left half-written."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and not (path / COMPLETE).exists():
            shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def _name(path: Path | None) -> str:
    return "the beginning (there is none yet)" if path is None else path.name
