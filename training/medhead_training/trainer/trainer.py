"""transformers' `Trainer` for draft heads: learning rates, checkpoints that survive a kill, logs and a progress bar."""

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
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medhead.errors import MedheadError
from medhead_training.objective.module import HeadsModule
from medhead_training.trainer.best_update import BestUpdate
from medhead_training.trainer.optim import muon_and_adamw
from medhead_training.trainer.options import TrainOptions

WEIGHTS, COMPLETE = "trained.safetensors", "complete"


def training_arguments(options: TrainOptions, folder: Path, device: torch.device) -> TrainingArguments:
    """Return transformers' arguments for these options."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the dataset holds all epochs
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size or 1,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_grad_norm=options.max_grad_norm,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_steps or options.save_steps,
        report_to=[],
        seed=options.seed,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,  # none changes
        ddp_timeout=6 * 3600,  # one process tokenizes for all
        disable_tqdm=True,
        log_level="error",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs need as many processes; `DataParallel` is not supported
    return arguments


class HeadsTrainer(Trainer):
    """Train a `HeadsModule` on packed rows, all epochs in order; `evaluate_heads` measures it on held-out text."""

    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl
    _seeded_step, _micro_batch = -1, 0  # the step of the last loss, and the batch within it

    def __init__(
        self, module: HeadsModule, arguments: TrainingArguments, options: TrainOptions, dataset: Dataset[Any],
        evaluate_heads: Callable[[], dict[str, float]],
    ) -> None:  # fmt: skip
        self.module, self.options, self.evaluate_heads = module, options, evaluate_heads
        self.metrics, self.bar, self.best = StepMetrics(), ProgressBar(), BestUpdate(Path(str(arguments.output_dir)))
        super().__init__(model=module, args=arguments, train_dataset=dataset, eval_dataset=dataset)
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # `disable_tqdm` puts it in the place of transformers' progress bar
        self.add_callback(self.bar)

    def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
        """Train to the end; if the checkpoint is the end, only load its weights."""
        try:
            if resume_from_checkpoint is not None:
                state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
                if state.global_step >= state.max_steps or state.global_step == self.best.stopped:
                    self.state = state  # transformers would train one more step
                    return self._load_from_checkpoint(resume_from_checkpoint)
            elif self.args.should_save:
                self.best.forget()
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)
        finally:
            self.bar.close()

    # ---------------------------------------------------------------- one step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one batch; its randomness depends only on the seed, the step and the batch within it."""
        step = self.state.global_step
        self._micro_batch = self._micro_batch + 1 if self._seeded_step == step else 0
        self._seeded_step = step
        place = (step * self.args.gradient_accumulation_steps + self._micro_batch) * self.args.world_size
        seed = (self.options.seed << 32) + place + self.args.process_index
        found = model(**inputs, seed=seed)
        loss = found["loss"]
        if not bool(torch.isfinite(loss.detach())):
            raise self._diverged(f"the loss is {float(loss.detach())} at step {step + 1}")
        self.metrics.add(found)
        return (loss, found) if return_outputs else loss

    def _diverged(self, what: str) -> MedheadError:
        found = last_checkpoint(Path(str(self.args.output_dir)))
        return MedheadError(f"{what}: start again with lower --lr and --adamw-lr; the run resumes from {_name(found)}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the heads' metrics together with transformers' numbers."""
        super().log(logs | self.metrics.take() if "loss" in logs else logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the heads on held-out text."""
        self._check_weights()
        found = {f"eval_{name}": value for name, value in self.evaluate_heads().items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        if self.keeps_best and "eval_predicted_accepted_length" in found:  # not without held-out text
            limit = self.options.patience * int(self.args.eval_steps or 1)
            length = found["eval_predicted_accepted_length"]
            step = self.state.global_step
            try:
                stop = self.best.offer(step, length, self._trained_state, limit, self.args.should_save)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise self._not_written(f"the heads of step {step}", error) from error
            self.control.should_training_stop |= stop
        return found

    @property
    def keeps_best(self) -> bool:
        """Whether the heads of the best evaluation are kept; where the target is trained, the last ones are."""
        return bool(self.options.patience) and self.options.recipe == "heads"

    def load_best(self) -> int:
        """Load the weights of the best evaluation, if there is one, and return the number of the loaded update."""
        weights = self.best.weights() if self.keeps_best else None
        if weights is None:
            return self.state.global_step
        self.module.load_state_dict(weights, strict=False)
        return self.best.step

    # ---------------------------------------------------------------- optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return Muon and AdamW for the heads, AdamW for an adapter."""
        if self.optimizer is None:
            options, scale = self.options, (256 / self.module.heads.config.hidden_size) ** 0.5
            adamw_lr = options.adamw_lr or 0.003 * scale
            heads = dict(self.module.heads.named_parameters())
            if options.optimizer == "muon":
                self.optimizer = muon_and_adamw(
                    heads.items(), options.lr or 0.02 * scale, adamw_lr, options.weight_decay or 0.0
                )
            else:
                self.optimizer = torch.optim.AdamW(heads.values(), lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
            of_heads = {id(p) for p in heads.values()}
            adapter = [p for p in self.module.parameters() if p.requires_grad and id(p) not in of_heads]
            if adapter:
                extra = {"params": adapter, "lr": options.lora_lr, "weight_decay": 0.0, "muon": False, "adapter": True}
                self.optimizer.add_param_group(extra)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Return warm-up and cosine decay to 2 %; an adapter starts later."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None

            def factor(step: int, start: float) -> float:
                step_of_group = step - start * num_training_steps
                if step_of_group < 0:
                    return 0.0
                total = max(1.0, (1 - start) * num_training_steps)
                rise = max(1.0, self.options.warmup_ratio * num_training_steps)
                cosine = 0.5 + 0.5 * math.cos(math.pi * step_of_group / total)
                return min(1.0, (step_of_group + 1) / rise) * (0.02 + 0.98 * cosine)

            starts = [self.options.lora_start_ratio if g.get("adapter") else 0.0 for g in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, [lambda s, b=b: factor(s, b) for b in starts])  # type: ignore[misc]
        return self.lr_scheduler

    # ---------------------------------------------------------------- data and checkpoints

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # the dataset is shuffled already

    def _trained_names(self) -> set[str]:
        return {name for name, p in self.module.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save only the trained parameters."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._trained_state(state_dict), folder / WEIGHTS)

    def _trained_state(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        state = self.module.state_dict() if state_dict is None else state_dict
        return {name: state[name].detach().cpu().contiguous() for name in sorted(self._trained_names())}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if self._trained_names() != weights.keys():
            written = f"{resume_from_checkpoint} was written by a run with other heads or another recipe"
            raise MedheadError(f"{written}; use another --output")
        self.module.load_state_dict(weights, strict=False)  # names were compared above; the frozen target is not stored

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load everything but the learning rates, which may have changed since."""
        assert self.optimizer is not None
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        scheduler.base_lrs = rates
        for group, rate, factor in zip(self.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _check_weights(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):  # before the next loss shows it
                raise self._diverged(f"{name} is not finite after step {self.state.global_step}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint and mark it when it is complete; on a full disk the last complete one remains."""
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        self._check_weights()
        new = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (new / COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            raise self._not_written(f"the checkpoint of step {step}", error) from error

    def _not_written(self, what: str, error: Exception) -> MedheadError:
        folder, reason = Path(str(self.args.output_dir)), " ".join(str(error).split())[:120]
        return MedheadError(
            f"{what} cannot be written to {str(folder)!r} ({reason}); free some space and start again: the run resumes from "
            f"{_name(last_checkpoint(folder))}"
        )


class StepMetrics:
    """Metrics of the steps since the last log entry; they are read from the device only when they are logged."""

    def __init__(self) -> None:
        self._found: list[dict[str, Tensor]] = []

    def add(self, found: dict[str, Tensor]) -> None:
        """Add the output of one batch."""
        self._found.append({name: value.detach() for name, value in found.items() if name != "loss"})

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        if not self._found:
            return {}
        hits, tried = (torch.stack([f[name] for f in self._found]).sum(0).tolist() for name in ("hits", "tried"))
        top1 = [h / t if t else 0.0 for h, t in zip(hits, tried, strict=True)]
        numbers = {f"top1/depth_{d + 1}": value for d, value in enumerate(top1)}
        numbers["predicted_accepted_length"] = 1 + sum(math.prod(top1[: d + 1]) for d in range(len(top1)))
        for name in ("heads_loss", "preservation"):
            if name in self._found[0]:
                numbers[name] = float(torch.stack([f[name] for f in self._found]).mean())
        self._found = []
        return numbers


class ProgressBar(TrainerCallback):
    """A progress bar with the loss, top-1 accuracy by depth and the accepted length that a chain of these would have."""

    bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        state.compute_steps(args, state.max_steps)  # a resumed state has the intervals of its checkpoint
        if state.is_world_process_zero:
            look = {"unit": "step", "dynamic_ncols": True, "mininterval": 1}
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, **look)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance by one step; the last one is evaluated, too."""
        control.should_evaluate |= state.global_step >= state.max_steps
        if self.bar is not None:
            self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the logged numbers."""
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            top1 = " ".join(f"{v:.2f}" for k, v in logs.items() if k.startswith("top1/"))
            length = logs.get("predicted_accepted_length", 0.0)
            self.bar.set_postfix_str(f"loss {logs['heads_loss']:.3f}, top-1 {top1}, accepted length {length:.2f}")
        elif "eval_predicted_accepted_length" in logs:
            top1, length = logs["eval_top1_depth_1"], logs["eval_predicted_accepted_length"]
            line = f"held-out text: top-1 {top1:.3f}, predicted accepted length {length:.2f} with 32 nodes"
            self.bar.write(f"step {state.global_step}: {line}", file=sys.stderr)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    complete = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints that a kill left incomplete."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and not (path / COMPLETE).exists():
            shutil.rmtree(path)


def _name(path: Path | None) -> str:
    return "the beginning (there is none yet)" if path is None else path.name
