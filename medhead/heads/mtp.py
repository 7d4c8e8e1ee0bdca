"""Multi-token-prediction layers that a checkpoint brings (DeepSeek-V3, GLM-4.5, Qwen3.5, ...), as heads; nothing is trained.

At every token, layer k reads the token's embedding and the output of layer k - 1 at the token before (layer 1: the
target's last hidden state there), attends to keys and values of its own, and predicts the next token. So layer d + 1
predicts the children of a node at depth d, and runs over the node's whole path, which it has not read before. At greater
depths the last layer continues from its own outputs, as engines do with checkpoints of one layer. On a chain this is what
`generate(use_mtp=True)` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache, modeling_layers
from transformers.utils import logging

from medhead.core.lengths import Lengths
from medhead.errors import MedheadError, one_line
from medhead.heads.base import Heads
from medhead.heads.config import fitting_config
from medhead.heads.draft_cache import EncodeCacheEntry
from medhead.model.attention import TreePass, attention_name, tree_pass
from medhead.model.kv_cache import CacheLayout, KVSpec, TreeCache

if TYPE_CHECKING:
    from medhead.model.target import Target

MTP = "mtp"  # given instead of a folder: the layers in the target's own checkpoint
DEPTH = 8  # deepest tree that may be asked for; the last layer predicts all depths beyond it
TREE_DEPTH = 4  # deepest tree by default, if the checkpoint has no more layers than that


def load_mtp(target: Target) -> MtpHeads:
    """Return the multi-token-prediction layers of the target's checkpoint; raise `MedheadError` where it holds none."""
    model_class: Any = getattr(modeling_layers, "MtpModel", None)
    if not hasattr(model_class, "forward_layer"):
        raise MedheadError(f"heads {MTP!r} need transformers 5.24 or newer, this is {transformers.__version__}")
    with _known_fields(target.config):
        return _load(target, model_class)


@contextmanager
def _known_fields(config: Any) -> Iterator[None]:
    """Inside the context the configuration of Qwen3.5 has the fields from which transformers builds these layers."""
    count = getattr(config, "mtp_num_hidden_layers", None)
    if not count or getattr(config, "num_mtp_layers", None):
        yield
        return
    config.num_mtp_layers, config.mtp_layer_types = count, ["full_attention"] * count
    try:
        yield
    finally:
        del config.num_mtp_layers, config.mtp_layer_types


def _load(target: Target, model_class: Any) -> MtpHeads:
    if not getattr(target.config, "num_mtp_layers", None):
        raise MedheadError(
            f"{target.name} has no multi-token-prediction layers that transformers knows (no num_mtp_layers in its "
            f"configuration); heads {MTP!r} need them, give the folder of a heads checkpoint instead"
        )
    if not target.model.config.name_or_path:
        raise MedheadError(
            f"heads {MTP!r} are read from the model's checkpoint, but {target.name} was not loaded from one"
        )
    logging.disable_progress_bar()
    try:
        mtp = model_class.from_pretrained(target.model, device_map={"": target.device})
        return MtpHeads(mtp, target)
    except Exception as error:  # whatever transformers raises on files that are missing, damaged or of another layout
        reason = one_line(error, 200)
        raise MedheadError(f"the multi-token-prediction layers of {target.name} cannot be used: {reason}") from error
    finally:
        logging.enable_progress_bar()


class MtpHeads(Heads):
    """Heads of transformers' `MtpModel`; the state is a node's index among all expanded nodes of a proposal, 0 for the root."""

    has_tensor_cache = False

    def __init__(self, mtp: Any, target: Target) -> None:
        layers = len(mtp.layers)
        super().__init__(fitting_config(target, MTP, depth=max(DEPTH, layers), tree_depth=max(TREE_DEPTH, layers)))
        self.layers = layers
        self.is_resumable = layers == 1  # a second layer reads the first one's output at the token before
        mtp.layers.eval().requires_grad_(False)
        mtp.config._attn_implementation = attention_name(mtp.config._attn_implementation)
        self._mtp = (mtp,)  # a tuple: the target's embedding is in there, which `to` and `state_dict` must not reach
        self.dtype = mtp.layers[0].eh_proj.weight.dtype
        self.layout = self._find_layout(target.device)

    def new_draft_cache(self, dtype: torch.dtype, lengths: Lengths, capacity: int) -> MtpDraftCache:
        """Return the layers' key/value cache."""
        return MtpDraftCache(self, lengths, capacity)

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Growth]:
        """Return index 0: every layer has already run over the root."""
        return torch.zeros(*root.shape[:2], 1, dtype=torch.long, device=root.device), Growth(cache, root.shape[0])

    def step(self, state: Tensor, token: Tensor, depth: int, context: Growth) -> tuple[Tensor, Tensor]:
        """Run one layer over all nodes so far; none for the root."""
        if depth == 0:
            return state, context.outputs.to(token.dtype)
        index, outputs = context.extend(state[..., 0], token.to(self.dtype), depth)
        return index[..., None], outputs.to(token.dtype)

    def run(
        self, layer: int, cache: TreeCache, token: Tensor, hidden: Tensor, depth: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """Return the output of a layer at nodes after the committed tokens of every row.

        Args:
            layer: which one, from 0.
            cache: holds keys and values of the token at position i + 1 in column i; the first token has none.
            token: `[batch, nodes, size]`, embeddings.
            hidden: `[batch, nodes, size]`, the outputs of the layer before at the nodes' parents.
            depth: `[1, nodes]`, columns between the node and the last committed one.
            visible: `[batch, nodes, nodes]`, node i sees node j; None for a chain.
        """
        longest, nodes = cache.lengths.longest, token.shape[1]
        lengths = None if cache.lengths.uniform else cache.lengths.device
        start = longest if lengths is None else lengths[:, None]
        cache.begin(nodes)
        with tree_pass(LayerPass(lengths, longest, depth, visible, nodes, hides=layer)):
            positions = (depth + start + 1).expand(token.shape[:2])
            return self._mtp[0].forward_layer(layer, hidden, positions, cache, inputs_embeds=token)

    @torch.no_grad()
    def _find_layout(self, device: torch.device) -> CacheLayout:
        """Return the shapes of what every layer caches, from a pass over two tokens."""
        cache: Any = DynamicCache()
        nothing = torch.zeros(1, 2, self.config.hidden_size, dtype=self.dtype, device=device)
        positions = torch.arange(1, 3, device=device)[None]
        found = {}
        for layer in range(self.layers):
            self._mtp[0].forward_layer(layer, nothing, positions, cache, inputs_embeds=nothing)
            found[layer] = KVSpec.of(cache.layers[layer].keys), KVSpec.of(cache.layers[layer].values)
        return CacheLayout(found)


class MtpDraftCache:
    """The layers' keys and values of the text up to the root, and their outputs at the root; see `DraftCache`.

    Attributes:
        cache: keys and values.
        last: for every layer `[batch, size]`, its output at the last token.
    """

    def __init__(self, heads: MtpHeads, lengths: Lengths, capacity: int) -> None:
        self.heads, self.cache = heads, TreeCache(heads.layout, len(lengths.device), capacity)
        self.cache.lengths = lengths
        size, device = (len(lengths.device), heads.config.hidden_size), lengths.device.device
        self.last = [torch.zeros(size, dtype=heads.dtype, device=device)] * heads.layers

    @property
    def lengths(self) -> Lengths:
        """Return the tokens of every row, the first one not counted."""
        return self.cache.lengths

    @lengths.setter
    def lengths(self, lengths: Lengths) -> None:
        self.cache.lengths = lengths

    def write(self, encode: EncodeCacheEntry, features: Tensor, token: Tensor, counts: Tensor) -> None:
        """Run all layers over the next tokens of every row; their keys and values are kept, `encode` is not called."""
        hidden, token = features.to(self.heads.dtype), token.to(self.heads.dtype)
        depth = torch.arange(token.shape[1], device=token.device)[None]
        rows, place = torch.arange(len(counts), device=token.device), (counts - 1).clamp(min=0)
        last_outputs = []
        for layer, last in enumerate(self.last):
            output = self.heads.run(layer, self.cache, token, hidden, depth)
            last_outputs.append(torch.where(counts[:, None] > 0, output[rows, place], last))
            hidden = torch.cat([last[:, None], output[:, :-1]], 1)
        self.last = last_outputs

    def keep_rows(self, rows: list[int]) -> None:
        """See `DraftCache.keep_rows`."""
        self.cache.keep_rows(rows)
        self.last = [last[rows] for last in self.last]

    def join(self, other: MtpDraftCache) -> None:
        """See `DraftCache.join`."""
        self.cache.join(other.cache)
        self.last = [torch.cat(pair) for pair in zip(self.last, other.last, strict=True)]

    def copy_tokens(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `DraftCache.copy_tokens`."""
        return self.cache.copy_tokens(row, begin, end)

    def load_tokens(self, row: int, parts: Iterator[Tensor]) -> None:
        """See `DraftCache.load_tokens`; the outputs at the last token are those of the tokens that are read next."""
        self.cache.load_tokens(row, parts)

    def view(self) -> MtpDraftCache:
        """Return the cache itself: a proposal writes after the text and commits nothing."""
        return self


class Growth:
    """The nodes of one proposal in the order in which they were expanded.

    Attributes:
        outputs: `[batch, 1 + nodes, size]` of the layer that ran last, at the root and at the nodes.
    """

    def __init__(self, draft_cache: MtpDraftCache, batch: int) -> None:
        self.draft_cache, self.outputs = draft_cache, draft_cache.last[0][:, None]
        self._token = self._hidden = self.outputs[:, :0]  # input of the layer that ran last
        self._parents = torch.zeros(batch, 0, dtype=torch.long, device=self.outputs.device)  # 0 is the root
        self._depth = self._parents[:1]  # 0 for the root's children
        self._visible = torch.zeros(
            batch, 1, 0, dtype=torch.bool, device=self.outputs.device
        )  # [batch, 1 + nodes, nodes]

    def extend(self, parents: Tensor, token: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Add nodes of a depth >= 1, by their parents' indices `[batch, width]` and their own embeddings.

        Returns:
            Their indices `[batch, width]` and outputs `[batch, width, size]`.
        """
        heads, (batch, width), before = self.draft_cache.heads, parents.shape, self._token.shape[1]
        self._token = torch.cat([self._token, token], 1)
        self._parents = torch.cat([self._parents, parents], 1)
        self._depth = F.pad(self._depth, (0, width), value=depth - 1)
        above = self._visible.gather(1, parents[..., None].expand(-1, -1, before))
        itself = torch.eye(width, dtype=torch.bool, device=above.device).expand(batch, -1, -1)
        self._visible = torch.cat([F.pad(self._visible, (0, width)), torch.cat([above, itself], 2)], 1)
        if depth < heads.layers:  # a layer's first turn: it reads the outputs of the layer before
            layer, self._hidden = depth, _pick(self.outputs, self._parents)
        else:
            layer, self._hidden = heads.layers - 1, torch.cat([self._hidden, _pick(self.outputs, parents)], 1)
        cache, last = self.draft_cache.cache, self.draft_cache.last[layer]
        outputs = heads.run(layer, cache, self._token, self._hidden, self._depth, self._visible[:, 1:])
        self.outputs = torch.cat([last[:, None], outputs], 1)
        index = torch.arange(before + 1, before + 1 + width, device=parents.device)
        return index.expand(batch, -1), outputs[:, before:]


@dataclass
class LayerPass(TreePass):
    """A pass of one layer."""

    hides: int = (
        0  # empty columns at the beginning: layer k begins with token k, because it needs layer k - 1 before it
    )

    def bias(self, rule: Callable, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the result of `TreePass.bias` without the hidden columns."""
        if not self.hides:
            return super().bias(rule, window, dtype, device)

        def later(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return rule(row, head, query, key) & (key >= self.hides)

        return super().bias(later, None, dtype, device)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Return the `[batch, m, size]` rows of `[batch, n, size]` at `[batch, m]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
