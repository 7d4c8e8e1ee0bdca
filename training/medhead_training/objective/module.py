"""One training step as a module: a pass of the target, the heads along the text, the loss. What DDP and FSDP wrap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from medhead.heads import Heads
from medhead.model.target import Target
from medhead_training.objective.losses import chunked_loss, depth_weights, mean_output, soft_by_mean
from medhead_training.objective.unroll import Level, PackedBatch, choose_anchors, unroll
from medhead_training.trainer.options import TrainOptions

PROBES = 64  # anchors a level whose first guess is looked at, for the progress bar


class HeadsModule(nn.Module):
    """Loss of heads on a batch of packed texts.

    Args:
        model: the PEFT model that holds target and heads.
        target: its target.
        heads: the heads that are trained, part of `model`.
        options: of the run.
    """

    output: Tensor
    bias: Tensor | None
    draft_index: Tensor

    def __init__(self, model: Any, target: Target, heads: Heads, options: TrainOptions) -> None:
        super().__init__()
        self.model = model
        self._target, self._heads, self.options = [target], [heads], options  # lists: they are part of `model` already
        self.packs = keeps_texts_apart(target)
        weight, bias = target.output.weight.detach(), getattr(target.output, "bias", None)
        index = torch.zeros(weight.shape[0], dtype=torch.long, device=weight.device)
        if heads.draft_tokens is None:
            index = torch.arange(weight.shape[0], device=weight.device)
        else:
            tokens = heads.draft_tokens.to(weight.device)
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
            index = index.fill_(-1).scatter(0, tokens, torch.arange(len(tokens), device=weight.device))
        # buffers: a copy (or a view) of the frozen rows that FSDP does not shard
        self.register_buffer("output", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.register_buffer("draft_index", index, persistent=False)

    @property
    def target(self) -> Target:
        """The target."""
        return self._target[0]

    @property
    def heads(self) -> Heads:
        """The heads."""
        return self._heads[0]

    def train(self, mode: bool = True) -> HeadsModule:
        """Only the adapter's dropout is ever on: the target is read as it decodes, without dropout of its own."""
        super().train(mode)
        self.model.eval()
        if mode and self.options.recipe != "heads":
            for name, part in self.model.named_modules():
                # layers are recomputed in training mode only
                if "lora_dropout" in name or isinstance(part, GradientCheckpointingLayer):
                    part.training = True
        return self

    def forward(
        self, input_ids: Tensor, mask: Tensor, document: Tensor, position_ids: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """The loss, a scalar, and what the progress bar shows.

        Args:
            input_ids: `[rows, length]`.
            mask: `[rows, length]` bool, tokens to guess.
            document: `[rows, length]`, see `PackedBatch`.
            position_ids: `[rows, length]`, from 0 in each document; keeps documents apart in the target's attention.
            seed: of anchors and depth.
        """
        options, texts = self.options, PackedBatch(input_ids, mask, document)
        generator = torch.Generator().manual_seed(seed)
        adapted = options.recipe != "heads"
        with torch.set_grad_enabled(adapted and torch.is_grad_enabled()):
            hidden, features = self.read(texts, position_ids)
        teacher = hidden.detach()
        depth, weights = self._depth(generator)
        anchors, real = choose_anchors(texts, options.share, generator)
        dtype = next(self.heads.parameters()).dtype  # the target's may be another
        levels = unroll(
            self.heads, texts, features.to(dtype), lambda ids: self.target.embed(ids).to(dtype), anchors, real, depth
        )
        loss, hits, tried = self._heads_loss(levels, texts, teacher, weights)
        result = {"heads_loss": loss.detach(), "hits": hits, "tried": tried}
        if adapted and options.preserve:
            kept = self._preservation(texts, hidden, position_ids)
            result["preservation"] = kept.detach()
            loss = loss + options.preserve * kept
        result["loss"] = loss
        return result

    def read(self, texts: PackedBatch, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The target's last hidden states and features `[rows, length, ...]`; logits are not computed."""
        with self.target.listening(self.heads.config.feature_layers):
            if self.packs:
                return self.target.read_hidden(self.model, texts.ids, position_ids)
            places = places_of_documents(texts)
            inside, order = places >= 0, torch.arange(places.shape[1], device=places.device)
            found = self.target.read_hidden(
                self.model, texts.ids.flatten()[places.clamp(min=0)], order.expand(places.shape)
            )
            empty = (part.new_zeros(texts.ids.numel(), part.shape[-1]) for part in found)
            packed = [e.index_put((places[inside],), part[inside]) for e, part in zip(empty, found, strict=True)]
            return packed[0].view(*texts.ids.shape, -1), packed[1].view(*texts.ids.shape, -1)

    def _depth(self, generator: torch.Generator) -> tuple[int, Tensor]:
        """Levels of this step and their weights, which sum to 1 over steps."""
        full, decay = self.heads.config.depth, self.options.decay
        if not self.options.random_depth:
            return full, depth_weights(full, decay)
        chance = float(torch.rand((), generator=generator))
        depth = next((d for d in range(1, full) if chance >= decay**d), full)
        return depth, torch.full((depth,), 1.0 / sum(decay**d for d in range(full)))

    def _heads_loss(
        self, levels: Iterator[Level], texts: PackedBatch, teacher: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = teacher.new_zeros((), dtype=torch.float32)
        hits, tried = torch.zeros(2, self.heads.config.depth, device=teacher.device)
        mean = self._mean(texts, teacher) if self.options.loss == "soft" else None
        for depth, level in enumerate(levels):
            truth = texts.ids[level.rows, level.at + 1]
            labels = self.draft_index[truth]
            kept = labels >= 0  # what lies outside the draft vocabulary cannot be guessed
            rows, at, said = level.rows, level.at, level.features
            per_token = kept.float() / kept.sum().clamp(min=1)
            if mean is not None:
                loss = soft_by_mean(said, mean[rows, at], self.output, bias=self.bias, weights=per_token)
            else:
                loss = chunked_loss(
                    self.options.loss, said, self.output, bias=self.bias, teacher_hidden=teacher[rows, at],
                    teacher_weight=self.output, teacher_bias=self.bias, labels=labels.clamp(min=0), weights=per_token,
                )  # fmt: skip
            total = total + weights[depth].item() * loss
            with torch.no_grad():
                few = slice(None, None, max(1, len(said) // PROBES))
                guess = F.linear(said[few].to(self.output.dtype), self.output, self.bias).argmax(-1)
                hits[depth] += (guess == labels[few]).sum()
                tried[depth] += len(guess)
        return total, hits, tried

    def _mean(self, texts: PackedBatch, teacher: Tensor) -> Tensor:
        """`[rows, length, hidden]`: the mean output row of the target's distribution where one is to be guessed."""
        needed = texts.guessable(1)
        mean = torch.zeros_like(teacher)
        mean[needed] = mean_output(teacher[needed], self.output, self.bias).to(mean.dtype)
        return mean

    def _preservation(self, texts: PackedBatch, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """KL(target without its adapter || with it) per answer token."""
        with torch.no_grad(), self.model.disable_adapter():
            original, _ = self.read(texts, position_ids)
        needed = texts.guessable(1)
        weight, bias = self.target.output.weight.detach(), getattr(self.target.output, "bias", None)
        count = needed.sum().clamp(min=1)
        return chunked_loss(
            "kl", hidden[needed], weight, bias=bias, teacher_hidden=original[needed], teacher_weight=weight,
            teacher_bias=bias, weights=torch.ones_like(hidden[needed][:, 0], dtype=torch.float32) / count,
        )  # fmt: skip


def places_of_documents(texts: PackedBatch) -> Tensor:
    """`[documents, longest]`: where in all rows behind each other every document's tokens are; -1 behind its end."""
    index = torch.arange(texts.ids.shape[1], device=texts.ids.device)
    place = (index - texts.begins()).flatten()  # of a token in its document
    real = texts.document.flatten() >= 0
    number = ((place == 0) & real).cumsum(0) - 1
    longest = int(place[real].max()) + 1 if bool(real.any()) else 1
    found = torch.full((max(1, int(number[-1]) + 1), longest), -1, device=place.device)
    found[number[real], place[real]] = real.nonzero()[:, 0]
    return found


@torch.no_grad()
def keeps_texts_apart(target: Target) -> bool:
    """Whether the target reads a text behind another one as it reads it alone, by their positions (most models do)."""
    generator = torch.Generator().manual_seed(0)
    high = min(target.vocab_size, int(target.embedding.num_embeddings))
    ids = torch.randint(0, high, (1, 12), generator=generator).to(target.device)
    positions = torch.arange(6, device=target.device).repeat(2)[None]
    with evaluating(target.model), target.listening():
        packed, _ = target.read_hidden(target.model, ids, positions)
        alone, _ = target.read_hidden(target.model, ids[:, 6:], positions[:, 6:])
    return bool((packed[:, 6:] - alone).abs().max() <= 0.05 * alone.abs().max())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)
