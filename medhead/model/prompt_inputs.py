"""Prompts that hold more than text: the arguments that a processor made of images, and the pass that reads them.

The model's own forward reads such a prompt in one pass, because an image's tokens may see each other. The text after it is
verified as any other: its positions follow the prompt's last one, which in some models (Qwen-VL) is smaller than its index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError, UnsupportedTargetError, one_line
from medhead.model.layout import cache_argument
from medhead.model.probe import HALF_TOLERANCE, TOLERANCE

if TYPE_CHECKING:
    from medhead.model.kv_cache import TreeCache
    from medhead.model.target import Target

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_OF_EVERY_PASS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "cache_position",
    "logits_to_keep", "return_dict", *_TOKEN_TYPES,
}  # fmt: skip


# what models raise where images do not fit the text
READING_ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError)


def cannot_read(name: str, arguments: Mapping[str, Any], error: Exception) -> MedheadError:
    """Return the error for a prompt that a model called `name` cannot read with these arguments."""
    return MedheadError(f"{name} cannot read a prompt with {', '.join(sorted(arguments))}: {one_line(error, 200)}")


def why_no_images(target: Target) -> str | None:
    """Return why no prompt of a target can hold images while others are served; None if one can, as far as is known."""
    if "image" not in modalities(target.model):
        return f"{target.name} reads text only"
    if target.state_layers is not None:
        return f"{target.name} reads images and its layers hold states; give it text alone"
    if (length := target.length_rope.rereads_at) is not None:
        return f"{target.name} reads texts anew at {length} tokens, which is not done for texts with images"
    return None


def modalities(model: Any) -> set[str]:
    """Return what a model reads: `text`, `image`, ..."""
    found = getattr(model, "input_modalities", None) or "text"
    return {found} if isinstance(found, str) else set(found)


def _tells_sizes(name: str) -> bool:
    """Return whether an argument tells the sizes of images (`image_grid_thw`), which later passes do not need."""
    return "grid" in name or "size" in name


def asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether an argument of the model's forward may be left out: None, an empty container, token types of text."""
    if isinstance(value, Tensor):
        return name in _TOKEN_TYPES and not value.any()
    if isinstance(value, dict):
        return all(item is None for item in value.values())
    return value is None or (isinstance(value, (list, tuple)) and not value)


@dataclass
class PromptInputs:
    """What `model.generate` was given for its prompts besides token ids.

    Attributes:
        input_ids: `[batch, length]` prompts as the user gave them.
        attention_mask: `[batch, length]`; None if no row is padded.
        position_ids: `[..., batch, length]` as transformers prepared them, or None.
        arguments: of the model's forward, `pixel_values` for example.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    arguments: dict[str, Any]

    def without_padding(self) -> PromptInputs:
        """Return the same prompts with every row's padding after its text."""
        if self.attention_mask is None:
            return self
        mask = self.attention_mask.bool()
        order = torch.argsort((~mask).long(), dim=1, stable=True)[:, : int(mask.sum(1).max())]
        kept = mask.gather(1, order)

        def moved(tensor: Tensor) -> Tensor:
            index = order.to(tensor.device).expand(*tensor.shape[:-2], *order.shape)
            return tensor.gather(-1, index) * kept.to(tensor.device, tensor.dtype)

        arguments = {name: moved(one) if self._is_per_token(name, one) else one for name, one in self.arguments.items()}
        positions = None if self.position_ids is None else moved(self.position_ids)
        return PromptInputs(moved(self.input_ids), None, positions, arguments)

    def lengths(self) -> list[int]:
        """Return the tokens of every row without padding."""
        if self.attention_mask is None:
            return [self.input_ids.shape[1]] * len(self.input_ids)
        return self.attention_mask.long().sum(1).tolist()

    def last_tokens(self) -> Tensor:
        """Return the last token `[batch]` of every row."""
        if self.attention_mask is None:
            return self.input_ids[:, -1]
        packed = self.without_padding().input_ids
        return packed[range(len(packed)), [length - 1 for length in self.lengths()]]

    def _is_per_token(self, name: str, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.is_floating_point() or _tells_sizes(name):
            return False
        return value.shape == self.input_ids.shape

    def prepared(self, target: Target, cache: Any) -> dict[str, Any]:
        """Return the arguments of the model's forward for the pass over the prompts, as `generate` prepares them."""
        given = {"attention_mask": self.attention_mask, "position_ids": self.position_ids, **self.arguments}
        given = {name: value.copy() if isinstance(value, dict) else value for name, value in given.items()}
        given |= {} if cache is None else {cache_argument(target.model): cache}
        found = target.model.prepare_inputs_for_generation(
            self.input_ids, is_first_iteration=True, use_cache=cache is not None, **given
        )
        found.pop("logits_to_keep", None)
        return {name: value for name, value in found.items() if value is not None}


def check_later_passes(target: Target, inputs: PromptInputs) -> None:
    """Refuse a model that reads the images again in every later pass (through cross attention).

    Raises:
        UnsupportedTargetError: names the argument.
    """
    ids, given = inputs.input_ids[:, -1:], inputs.arguments
    later = target.model.prepare_inputs_for_generation(ids, is_first_iteration=False, use_cache=True, **given)
    left = sorted(
        name for name, value in later.items() if name not in _OF_EVERY_PASS and name in given and value is not None
    )
    left = [name for name in left if not isinstance(given[name], (bool, str)) and not _tells_sizes(name)]
    if left:
        raise UnsupportedTargetError(
            f"{target.name} reads {', '.join(left)} in every pass, not only with the prompt; "
            "medhead decodes images whose tokens are part of the prompt"
        )


def prefill_prompts(
    target: Target, cache: TreeCache, inputs: PromptInputs, on_chunk: Callable[[Tensor, int], None] | None
) -> tuple[Tensor, Tensor]:
    """Fill an empty cache with whole prompts of several rows, images included, in one pass.

    The first time the prompts are read twice more: their last tokens as those of a tree, and all by the model's own pass. The
    logits are compared.

    Args:
        target: the target, active.
        cache: an empty cache.
        inputs: of the prompts.
        on_chunk: called with the features `[batch, tokens, size]` of all tokens, and 0.

    Returns:
        logits `[batch, vocab]` and features `[batch, size]` of the last token of every row.

    Raises:
        UnsupportedTargetError: the model cannot decode after such prompts.
    """
    if target.state_layers is not None:
        raise UnsupportedTargetError(f"{target.name} reads images and its layers hold states; give it text alone")
    check_later_passes(target, inputs)
    if not target.checked_inputs:
        expected, _ = _read_prompts(target, cache, inputs)
        cache.lengths.set([length - 1 for length in inputs.lengths()])
        logits, _ = target.verify(cache, TokenTree.root(inputs.last_tokens()))
        check_prompt_logits(target, inputs, expected, logits[:, 0])
        with target.own_attention():
            own = own_logits(target, inputs)
        check_prompt_logits(target, inputs, own, logits[:, 0])
        target.checked_inputs = True
    logits, features = _read_prompts(target, cache, inputs)
    if on_chunk is not None:
        on_chunk(features, 0)
    lengths = torch.tensor(inputs.lengths(), device=features.device)
    cache.lengths.set(inputs.lengths())
    return logits, features[torch.arange(len(lengths), device=features.device), lengths - 1]


def _read_prompts(target: Target, cache: TreeCache, inputs: PromptInputs) -> tuple[Tensor, Tensor]:
    """Read prompts; return logits `[batch, vocab]` of the last token of every row, and features `[batch, tokens, size]`.

    The caller sets the cache's lengths, which are 0.
    """
    packed = inputs.without_padding()
    lengths = torch.tensor(inputs.lengths(), device=packed.input_ids.device)
    cache.lengths.set([0] * len(lengths))
    cache.begin(packed.input_ids.shape[1])
    arguments = packed.prepared(target, cache)
    try:
        logits, features = target.run_prompts(cache, arguments, lengths - 1)
    except MedheadError:
        raise
    except READING_ERRORS as error:
        raise cannot_read(target.name, inputs.arguments, error) from error
    rows = torch.arange(len(lengths), device=lengths.device)
    if (positions := arguments.get("position_ids")) is not None:
        last = positions[..., rows.to(positions.device), (lengths - 1).to(positions.device)]
        offset = last - (lengths - 1).to(positions.device) - target.first_position  # `[..., batch]`
        cache.position_offset = offset if bool(offset.any()) or offset.ndim > 1 else None
    return logits[:, -1], features


@torch.no_grad()
def own_logits(target: Target, inputs: PromptInputs) -> Tensor:
    """Return the logits `[batch, vocab]` of every prompt's last token by the model's own pass; rows padded on the left."""
    output = target.model(**inputs.prepared(target, None))
    return output.logits[:, -1].float()


def check_prompt_logits(target: Target, inputs: PromptInputs, expected: Tensor, found: Tensor) -> None:
    """Compare the logits of the first tree's root with the model's own, for rows that are not padded.

    Raises:
        UnsupportedTargetError: they differ.
    """
    whole = slice(None) if inputs.attention_mask is None else inputs.attention_mask.bool().all(1)
    expected, found = expected[whole], found[whole].float().to(expected.device)
    allowed = TOLERANCE.get(target.dtype, HALF_TOLERANCE) * float(expected.abs().max().clamp(min=1e-3))
    difference = float((found - expected).abs().max()) if len(expected) else 0.0
    if not difference <= allowed:
        raise UnsupportedTargetError(
            f"{target.name} cannot decode after a prompt with {', '.join(sorted(inputs.arguments))}: the logits of its last "
            f"token differ by {difference:.3g} (allowed {allowed:.3g}) from the model's own; decode this prompt without medhead"
        )
