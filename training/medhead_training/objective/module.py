"""One training step as a module: target pass, draft unrolling, loss. DDP and FSDP wrap this module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from medhead.heads import Heads
from medhead.model.eval_mode import eval_mode
from medhead.model.output_rows import output_rows
from medhead.model.target import Target
from medhead_training.objective.chunked import chunked_loss, mean_output, soft_by_mean
from medhead_training.objective.losses import depth_weights
from medhead_training.objective.unroll import DraftLevel, PackedBatch, sample_anchors, unroll
from medhead_training.trainer.options import TrainOptions

ACCURACY_SAMPLES = 64  # anchors per depth whose top-1 draft token is compared with the text, for the progress bar


class HeadsModule(nn.Module):
    """Compute the loss of draft heads on a batch of packed documents; target and heads are parts of the PEFT `model`."""

    target: Target
    heads: Heads
    output: Tensor
    bias: Tensor | None
    draft_index: Tensor

    def __init__(self, model: Any, target: Target, heads: Heads, options: TrainOptions) -> None:
        super().__init__()
        self.model = model
        self.__dict__.update(target=target, heads=heads)  # not as submodules: they are part of `model` already
        self.options = options
        self.supports_packing = separates_documents(target)
        tokens = None if heads.draft_tokens is None else heads.draft_tokens.to(target.device)
        weight, bias = output_rows(target, tokens)
        index = draft_columns(tokens, target.vocab_size, weight.device)
        # buffers hold a copy (or a view) of the frozen rows that FSDP does not shard
        self.register_buffer("output", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("draft_index", index, persistent=False)

    def train(self, mode: bool = True) -> HeadsModule:
        """Switch only the adapter's dropout on: the target always runs as it decodes, in evaluation mode."""
        super().train(mode)
        self.model.eval()
        if mode and self.options.recipe != "heads":
            for name, part in self.model.named_modules():
                # layers are recomputed in training mode only
                if "lora_dropout" in name or isinstance(part, GradientCheckpointingLayer):
                    part.training = True
        return self

    def forward(
        self, input_ids: Tensor, mask: Tensor, document: Tensor, position_ids: Tensor, seed: int,
        features: Tensor | None = None, teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return `loss` (a scalar) and the numbers of the progress bar; anchors and depth depend on `seed`.

        The tensors are a `PackedBatch` and its position ids, which separate documents in the target's attention. With
        `features` `[rows, length, feature_size]` and `teacher` (see `teacher_of`), which is the same as `features` if not
        given, the target is not run.
        """
        options, batch = self.options, PackedBatch(input_ids, mask, document)
        generator = torch.Generator().manual_seed(seed)
        trains_target = options.recipe != "heads"
        if features is None:
            with torch.set_grad_enabled(trains_target and torch.is_grad_enabled()):
                hidden, features = self.target_states(batch, position_ids)
            teacher = self.teacher_of(hidden.detach(), batch)
        teacher = features if teacher is None else teacher
        depth, weights = self.sample_depth(generator)
        anchors, valid = sample_anchors(batch, options.anchor_fraction, generator)
        dtype = next(self.heads.parameters()).dtype  # the target's may differ
        # with autocast, projections of several layers' outputs read these as they are, in half the memory
        keeps = self.heads.fuses_layers and torch.is_autocast_enabled(features.device.type)
        features, embed = features if keeps else features.to(dtype), self.target.embed
        levels = unroll(self.heads, batch, features, lambda ids: embed(ids).to(dtype), anchors, valid, depth)
        loss, hits, tried = self.heads_loss(levels, batch, teacher, weights)
        result = {"heads_loss": loss.detach(), "hits": hits, "tried": tried}
        if trains_target and options.preservation_weight:
            divergence = self._preservation(batch, hidden, position_ids)
            result["preservation"] = divergence.detach()
            loss = loss + options.preservation_weight * divergence
        result["loss"] = loss
        return result

    def target_states(self, batch: PackedBatch, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's last hidden states and features, each `[rows, length, size]`, without computing logits."""
        with self.target.listening(self.heads.config.feature_layers):
            if self.supports_packing:
                return self.target.read_hidden(self.model, batch.ids, position_ids)
            places = unpacked_positions(batch)
            inside, order = places >= 0, torch.arange(places.shape[1], device=places.device)
            ids = batch.ids.flatten()[places.clamp(min=0)]
            unpacked = self.target.read_hidden(self.model, ids, order.expand(places.shape))
            empty = (part.new_zeros(batch.ids.numel(), part.shape[-1]) for part in unpacked)
            packed = [e.index_put((places[inside],), part[inside]) for e, part in zip(empty, unpacked, strict=True)]
            return packed[0].view(*batch.ids.shape, -1), packed[1].view(*batch.ids.shape, -1)

    def teacher_of(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Return what the loss needs of the target at every position, `[rows, length, hidden]`.

        It is the mean output row for the loss `soft`, zero where no token is to be predicted, else the last hidden state.
        """
        if self.options.loss != "soft":
            return hidden
        mean, needed = torch.zeros_like(hidden), batch.predictable(1)
        mean[needed] = mean_output(hidden[needed], self.output, self.bias)
        return mean

    def sample_depth(self, generator: torch.Generator) -> tuple[int, Tensor]:
        """Return the number of levels of this step and their weights, which sum to 1 in the mean over steps."""
        full, decay = self.heads.config.depth, self.options.depth_decay
        if not self.options.random_depth:
            return full, depth_weights(full, decay)
        draw = float(torch.rand((), generator=generator))
        depth = next((d for d in range(1, full) if draw >= decay**d), full)
        return depth, torch.full((depth,), 1.0 / sum(decay**d for d in range(full)))

    def heads_loss(
        self, levels: Iterator[DraftLevel], batch: PackedBatch, teacher: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted loss over depths, and per depth the top-1 hits and how many anchors were compared.

        `teacher` is that of `teacher_of`.
        """
        total = teacher.new_zeros((), dtype=torch.float32)
        hits, tried = torch.zeros(2, self.heads.config.depth, device=teacher.device)
        for depth, level in enumerate(levels):
            rows, at, drafted = level.rows, level.at, level.features
            labels = self.draft_index[batch.ids[rows, at + 1]]
            kept = labels >= 0  # a token outside the draft vocabulary cannot be predicted
            per_token = kept.float() / kept.sum().clamp(min=1)
            if self.options.loss == "soft":
                loss = soft_by_mean(drafted, teacher[rows, at], self.output, bias=self.bias, weights=per_token)
            else:
                loss = chunked_loss(
                    self.options.loss, drafted, self.output, bias=self.bias, teacher_hidden=teacher[rows, at],
                    teacher_weight=self.output, teacher_bias=self.bias, labels=labels.clamp(min=0), weights=per_token,
                )  # fmt: skip
            total = total + weights[depth].item() * loss
            with torch.no_grad():
                few = slice(None, None, max(1, len(drafted) // ACCURACY_SAMPLES))
                top1 = F.linear(drafted[few].to(self.output.dtype), self.output, self.bias).argmax(-1)
                hits[depth] += (top1 == labels[few]).sum()
                tried[depth] += len(top1)
        return total, hits, tried

    def _preservation(self, batch: PackedBatch, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Return KL(target without adapter || target with it), the mean over answer tokens in nats."""
        with torch.no_grad(), self.model.disable_adapter():
            original, _ = self.target_states(batch, position_ids)
        needed = batch.predictable(1)
        weight, bias = output_rows(self.target)
        count = needed.sum().clamp(min=1)
        return chunked_loss(
            "kl", hidden[needed], weight, bias=bias, teacher_hidden=original[needed], teacher_weight=weight,
            teacher_bias=bias, weights=torch.ones_like(hidden[needed][:, 0], dtype=torch.float32) / count,
        )  # fmt: skip


def unpacked_positions(batch: PackedBatch) -> Tensor:
    """Return each document's positions in the flattened batch, `[documents, longest]`, padded with -1."""
    index = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    place = (index - batch.document_starts()).flatten()  # of a token in its document
    real = batch.document.flatten() >= 0
    number = ((place == 0) & real).cumsum(0) - 1
    longest = int(place[real].max()) + 1 if bool(real.any()) else 1
    result = torch.full((max(1, int(number[-1]) + 1), longest), -1, device=place.device)
    result[number[real], place[real]] = real.nonzero()[:, 0]
    return result


@torch.no_grad()
def separates_documents(target: Target) -> bool:
    """Return whether position ids that restart at 0 keep packed documents apart in this target, as in most models.

    They do not in layers that hold states.
    """
    if target.state_layers is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    high = min(target.vocab_size, target.num_embeddings)
    ids = torch.randint(0, high, (1, 12), generator=generator).to(target.device)
    positions = torch.arange(6, device=target.device).repeat(2)[None]
    with eval_mode(target.model), target.listening():
        packed, _ = target.read_hidden(target.model, ids, positions)
        alone, _ = target.read_hidden(target.model, ids[:, 6:], positions[:, 6:])
    return bool((packed[:, 6:] - alone).abs().max() <= 0.05 * alone.abs().max())


def draft_columns(tokens: Tensor | None, vocab: int, device: torch.device) -> Tensor:
    """Return each token's column in the heads' logits `[vocab]`, -1 outside the draft vocabulary (None: all tokens)."""
    columns = torch.arange(vocab, device=device)
    return columns if tokens is None else torch.full_like(columns, -1).scatter(0, tokens, columns[: len(tokens)])
