"""Multi-token-prediction layers that a checkpoint brings (DeepSeek-V3, GLM-4.5, ...), as heads; nothing is trained.

At every token, layer k reads the token's embedding and what layer k - 1 said at the token before (layer 1: the target's
last hidden state there), looks back with keys and values of its own, and names the token behind. So a node d below the
root, d tokens beyond what the target has read, has its children named by layer d + 1, which has to run over the node's
path as well: it has not seen those tokens before. Below the last layer that layer goes on with what it said itself, as
engines do with checkpoints of one layer. On a chain this is what `generate(use_mtp=True)` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import DynamicCache, modeling_layers
from transformers.utils import logging

from medhead.core.lengths import Lengths
from medhead.errors import MedheadError
from medhead.heads.base import Heads, HeadsConfig
from medhead.heads.draft_cache import EncodeCacheEntry
from medhead.model.attention import NAME, TreePass, tree_pass
from medhead.model.kv_cache import CacheLayout, KVSpec, TreeCache

if TYPE_CHECKING:
    from medhead.model.target import Target

MTP = "mtp"  # given instead of a folder: the layers in the target's own checkpoint
DEPTH = 8  # deepest tree that may be asked for; the last layer speaks for all depths beyond it
TREE_DEPTH = 4  # deepest tree by default, if the checkpoint has no more layers than that


def load_mtp(target: Target) -> MtpHeads:
    """The multi-token-prediction layers of the target's checkpoint.

    Raises:
        MedheadError: transformers is too old, the model has no such layers, or its checkpoint does not hold them.
    """
    model_class: Any = getattr(modeling_layers, "MtpModel", None)
    if not hasattr(model_class, "forward_layer"):
        raise MedheadError(f"heads {MTP!r} need transformers 5.24 or newer, this is {transformers.__version__}")
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
        reason = " ".join(str(error).split())[:200]
        raise MedheadError(f"the multi-token-prediction layers of {target.name} cannot be used: {reason}") from error
    finally:
        logging.enable_progress_bar()


class MtpHeads(Heads):
    """The state is a node's index among all nodes that were expanded in this proposal, 0 for the root.

    Args:
        mtp: transformers' `MtpModel`.
        target: the model whose layers they are.
    """

    has_tensor_cache = False

    def __init__(self, mtp: Any, target: Target) -> None:
        layers = len(mtp.layers)
        config = HeadsConfig(
            kind=MTP,
            depth=max(DEPTH, layers),
            tree_depth=max(TREE_DEPTH, layers),
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            num_target_layers=target.layers,
            target_type=target.config.model_type,
        )
        super().__init__(config)
        self.layers = layers
        mtp.layers.eval().requires_grad_(False)
        mtp.config._attn_implementation = NAME
        self._mtp = (mtp,)  # a tuple: the target's embedding is in there, which `to` and `state_dict` must not reach
        self.dtype = mtp.layers[0].eh_proj.weight.dtype
        self.layout = self._find_layout(target.device)

    def new_draft_cache(self, dtype: torch.dtype, lengths: Lengths, capacity: int) -> MtpDraftCache:
        """Return the layers' key/value cache."""
        return MtpDraftCache(self, lengths, capacity)

    def init_state(
        self, features: Tensor, root: Tensor, memory: Any, depth: int | None = None
    ) -> tuple[Tensor, Growth]:
        """Nothing to compute: every layer has already run over the root."""
        index = torch.zeros(*root.shape[:2], 1, dtype=torch.long, device=root.device)
        return index, Growth(memory, index.shape[0])

    def step(self, state: Tensor, token: Tensor, depth: int, context: Growth) -> tuple[Tensor, Tensor]:
        """One pass of one layer over all nodes so far; none for the root."""
        if depth == 0:
            return state, context.said.to(token.dtype)
        index, said = context.extend(state[..., 0], token.to(self.dtype), depth)
        return index[..., None], said.to(token.dtype)

    def run(
        self, layer: int, cache: TreeCache, token: Tensor, hidden: Tensor, depth: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """What a layer says at nodes behind the committed tokens of every row.

        Args:
            layer: which one, from 0.
            cache: holds keys and values of the token at position i + 1 in column i; the first token has none.
            token: `[batch, nodes, size]`, embeddings.
            hidden: `[batch, nodes, size]`, what the layer before said at the nodes' parents.
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

    @torch.inference_mode()
    def _find_layout(self, device: torch.device) -> CacheLayout:
        """Shapes of what every layer caches, from a pass over two tokens."""
        cache: Any = DynamicCache()
        nothing = torch.zeros(1, 2, self.config.hidden_size, dtype=self.dtype, device=device)
        positions = torch.arange(1, 3, device=device)[None]
        found: dict[int, Any] = {}
        for layer in range(self.layers):
            self._mtp[0].forward_layer(layer, nothing, positions, cache, inputs_embeds=nothing)
            kept = cache.layers[layer].keys, cache.layers[layer].values
            found[layer] = tuple(KVSpec(t.shape[1], t.shape[3], t.dtype, t.device) for t in kept)
        return CacheLayout(found)


class MtpDraftCache:
    """The layers' keys and values of the text up to the root, and their outputs at the root; see `DraftCache`.

    Attributes:
        cache: keys and values.
        last: for every layer `[batch, size]`, its output at the last token.
    """

    def __init__(self, heads: MtpHeads, lengths: Lengths, capacity: int) -> None:
        batch, device = len(lengths.device), lengths.device.device
        self.heads = heads
        self.cache = TreeCache(heads.layout, batch, capacity)
        self.cache.lengths = lengths
        self.last = [torch.zeros(batch, heads.config.hidden_size, dtype=heads.dtype, device=device)] * heads.layers

    @property
    def lengths(self) -> Lengths:
        """Tokens of every row, the first one not counted."""
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

    def view(self) -> MtpDraftCache:
        """Return the cache itself: a proposal writes behind the text and commits nothing."""
        return self


class Growth:
    """The nodes of one proposal in the order in which they were expanded.

    Attributes:
        memory: of the text.
        said: `[batch, 1 + nodes, size]`, what the layer that ran last said at the root and at the nodes.
    """

    def __init__(self, memory: MtpDraftCache, batch: int) -> None:
        self.memory, self.said = memory, memory.last[0][:, None]
        self._token = self._hidden = self.said[:, :0]  # input of the layer that ran last
        self._parents = torch.zeros(batch, 0, dtype=torch.long, device=self.said.device)  # 0 is the root
        self._depth = self._parents[:1]  # 0 for the root's children
        self._visible = torch.zeros(batch, 1, 0, dtype=torch.bool, device=self.said.device)  # [batch, 1 + nodes, nodes]

    def extend(self, parents: Tensor, token: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Add nodes of a depth >= 1, by their parents' indices `[batch, width]` and their own embeddings.

        Returns:
            Their indices `[batch, width]`, and what is said at them `[batch, width, size]`.
        """
        heads, (batch, width), before = self.memory.heads, parents.shape, self._token.shape[1]
        self._token = torch.cat([self._token, token], 1)
        self._parents = torch.cat([self._parents, parents], 1)
        self._depth = F.pad(self._depth, (0, width), value=depth - 1)
        above = self._visible.gather(1, parents[..., None].expand(-1, -1, before))
        itself = torch.eye(width, dtype=torch.bool, device=above.device).expand(batch, -1, -1)
        self._visible = torch.cat([F.pad(self._visible, (0, width)), torch.cat([above, itself], 2)], 1)
        if depth < heads.layers:  # a layer's first turn: it reads what the layer before said
            layer, self._hidden = depth, _pick(self.said, self._parents)
        else:
            layer, self._hidden = heads.layers - 1, torch.cat([self._hidden, _pick(self.said, parents)], 1)
        said = heads.run(layer, self.memory.cache, self._token, self._hidden, self._depth, self._visible[:, 1:])
        self.said = torch.cat([self.memory.last[layer][:, None], said], 1)
        index = torch.arange(before + 1, before + 1 + width, device=parents.device)
        return index.expand(batch, -1), said[:, before:]


@dataclass
class LayerPass(TreePass):
    """A pass of one layer.

    Attributes:
        hides: columns at the beginning that hold nothing: layer k begins with token k, it needs layer k - 1 before it.
    """

    hides: int = 0

    def bias(self, rule: Callable, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """As `TreePass.bias`, without the hidden columns."""
        if not self.hides:
            return super().bias(rule, window, dtype, device)

        def later(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return rule(row, head, query, key) & (key >= self.hides)

        return super().bias(later, None, dtype, device)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """`[batch, n, size]` at `[batch, m]`: `[batch, m, size]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
