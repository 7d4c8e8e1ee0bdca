"""A cache for layers that hold states, such as recurrent and convolutional ones: a state of every node beside keys and values.

The state after a token is a function of the token and the state before it, so the state of a node follows from that of its
parent. A pass splits its tokens into groups (`StateGroup`). A layer runs once for each group, and the tokens of a group read
states that are known by then: one group for each depth of a tree, or one for each number of tokens in a chunk of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medhead.core.tree import TokenTree
from medhead.model.kv_cache import CacheLayout, TreeCache
from medhead.model.state_groups import Ancestors, StateGroup, prompt_groups, tree_groups

# what the state is, the layer or attribute that holds it, its number in the layer
StateKey = tuple[str, int | str, int]


class StateCall:
    """The states of one call of a layer: those that it read, or after the call those that it left.

    Args:
        read: returns a copy of the state to start from, `[items, ...]`, or None where there is none yet.
    """

    def __init__(self, read: Callable[[StateKey], Tensor | None]) -> None:
        self.states: dict[StateKey, Tensor] = {}
        self._read = read

    def get(self, key: StateKey) -> Tensor | None:
        """Return a state; the layer may change it in place."""
        if key not in self.states and (past := self._read(key)) is not None:
            self.states[key] = past
        return self.states.get(key)

    def put(self, key: StateKey, state: Tensor) -> None:
        """Keep a state."""
        self.states[key] = state

    def append(self, key: StateKey, inputs: Tensor, size: int | None) -> Tensor:
        """Keep the last `size` inputs of a convolution (as many as before if None); return all that are known, in order."""
        past = self.get(key)
        size = size or (inputs if past is None else past).shape[-1]
        full = inputs if past is None else torch.cat([past, inputs], -1)
        full = nn.functional.pad(full, (max(0, size - full.shape[-1]), 0))
        self.states[key] = full[..., -size:].clone()
        return full


class DenseCall(StateCall):
    """One call of a layer for all nodes of a tree: it reads the committed states, and leaves how they advance.

    Attributes:
        tree: what dense forms know of the tree.
        advances: by state, a function from an accepted path and its numbers of nodes to the state after it.
        heads: by state, the `advances` of each head, for layers that run head by head (Zamba).
    """

    def __init__(self, states: dict[StateKey, Tensor], tree: Ancestors, advances: dict[StateKey, Any]) -> None:
        super().__init__(states.get)
        self.tree, self.advances = tree, advances
        self.heads: dict[StateKey, list[Any]] = {}
        self._asked: dict[str, StateKey] = {}

    def get(self, key: StateKey) -> Tensor | None:
        """Return a committed state, which the layer must not change."""
        self._asked[key[0]] = key
        return super().get(key)

    def put(self, key: StateKey, state: Tensor) -> None:
        """Do nothing: `advances` has the states."""

    def append(self, key: StateKey, inputs: Tensor, size: int | None) -> Tensor:
        """Return the inputs of the nodes alone."""
        self._asked[key[0]] = key
        return inputs

    def asked(self, kind: str) -> tuple[StateKey, Tensor]:
        """Return the state of a kind that the layer asked for last."""
        key = self._asked[kind]
        state = self.get(key)
        assert state is not None, "dense forms start from committed states"
        return key, state


class StateCache(TreeCache):
    """See `TreeCache`. A layer may ask for its states inside `call` only.

    Attributes:
        states: `[batch, ...]` of every state, after the committed tokens; empty before the first token.
        node_states: `[batch * nodes, ...]` of every state, after each node of the last tree, of layers that run by depth.
        advances: by state, how it advances along a path of the last tree, of layers that run over all nodes at once.
        ancestors: of the running pass over a tree, if every row has states; else None.
        running: the running call of a layer.
    """

    def __init__(self, layout: CacheLayout, batch: int, capacity: int) -> None:
        super().__init__(layout, batch, capacity)
        self.states: dict[StateKey, Tensor] = {}
        self.node_states: dict[StateKey, Tensor] = {}
        self.advances: dict[StateKey, Callable[[Tensor, Tensor], Tensor]] = {}
        self.ancestors: Ancestors | None = None
        self.running: StateCall | None = None
        self._places = 0  # nodes of all rows of the running pass; 0 while prompts are read
        self._groups: list[StateGroup] | None = None
        self._tree: TokenTree | None = None  # of the running pass

    # ---------------------------------------------------------------- one pass

    def begin_tree(self, tree: TokenTree) -> None:
        """Prepare a pass over a tree: the committed states stay as they are, those of the nodes are kept beside them."""
        self._tree, self._groups, self._places = tree, None, tree.batch * tree.nodes
        self._drop_nodes()
        assert self.lengths.host is not None
        is_dense = bool(self.states) and min(self.lengths.host) > 0
        self.ancestors = Ancestors(tree) if is_dense else None

    def begin_prompts(self, counts: list[int], nodes: int) -> None:
        """Prepare a pass over prompts, of which `counts[row]` of `nodes` tokens are real: the committed states advance."""
        self._groups, self._places = prompt_groups(counts, nodes, self.lengths.device.device), 0
        self.ancestors = None

    @property
    def groups(self) -> list[StateGroup]:
        """The groups of the running pass."""
        if self._groups is None:
            assert self._tree is not None
            assert self.lengths.host is not None
            self._groups = tree_groups(self._tree, self.lengths.host)
        return self._groups

    @contextmanager
    def dense_call(self) -> Iterator[None]:
        """Serve one call of a layer for all nodes of a tree; `advances` then says how its states advance."""
        assert self.ancestors is not None
        self.running = DenseCall(self.states, self.ancestors, self.advances)
        try:
            yield
        finally:
            self.running = None

    @contextmanager
    def call(self, group: StateGroup) -> Iterator[StateCall]:
        """Serve one call of a layer for the tokens of a group, and keep the states that it leaves."""

        def read(key: StateKey) -> Tensor | None:
            known = (self.node_states if group.of_nodes else self.states).get(key)
            return None if known is None or group.is_first else known[group.sources.to(known.device)]

        self.running = StateCall(read)
        try:
            yield self.running
            for key, state in self.running.states.items():
                self._keep(key, state, group)
        finally:
            self.running = None

    def _keep(self, key: StateKey, state: Tensor, group: StateGroup) -> None:
        known = self.node_states if self._places else self.states
        if group.is_whole:
            known[key] = state
            return
        if key not in known:
            known[key] = state.new_zeros(self._places or self.batch_size, *state.shape[1:])
        places = group.tokens[:, -1] if self._places else group.sources
        known[key][places.to(state.device)] = state.to(known[key].dtype)

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """See `TreeCache.commit`; the state of a row becomes that of its last accepted node."""
        super().commit(path, counts)
        nodes, counts = self._places // len(path), counts.clamp(min=1)
        last = path.gather(1, counts[:, None] - 1)[:, 0]
        places = last + nodes * torch.arange(len(path), device=path.device)
        for key, states in self.node_states.items():
            self.states[key] = states if nodes == 1 else states[places.to(states.device)]
        if self.advances and counts.device.type == "cpu":  # a GPU would wait for the host
            path = path[:, : int(counts.max())]
        for key, advance in self.advances.items():
            self.states[key] = advance(path, counts).to(self.states[key].dtype)
        self._drop_nodes()

    def _drop_nodes(self) -> None:
        self.node_states.clear()
        self.advances.clear()

    # ---------------------------------------------------------------- rows

    def keep_rows(self, rows: list[int]) -> None:
        """See `TreeCache.keep_rows`."""
        super().keep_rows(rows)
        self.states = {key: state[torch.tensor(rows, device=state.device)] for key, state in self.states.items()}

    def join(self, other: TreeCache) -> None:
        """See `TreeCache.join`."""
        assert isinstance(other, StateCache)
        rows, more = self.batch_size, other.batch_size
        super().join(other)
        for key, like in (other.states | self.states).items():
            parts = [(self.states, rows), (other.states, more)]
            self.states[key] = torch.cat([s[key] if key in s else like.new_zeros(n, *like.shape[1:]) for s, n in parts])

    def copy_states(self, row: int) -> dict[StateKey, Tensor]:
        """Return copies of the states of a row."""
        return {key: state[row].clone() for key, state in self.states.items()}

    def load_states(self, row: int, states: dict[StateKey, Tensor]) -> None:
        """Take what `copy_states` returned as the states of a row."""
        for key, state in states.items():
            held = self.states.setdefault(key, state.new_zeros(self.batch_size, *state.shape))
            held[row] = state

    def nbytes(self) -> int:
        """See `TreeCache.nbytes`."""
        return super().nbytes() + sum(state.nbytes for state in self.states.values())

    # ---------------------------------------------------------------- what transformers asks of a cache

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of a convolution, `[items, channels, width]`, or None before the first token."""
        return self._current().get(("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Append inputs of a convolution; return them after those that were kept, and keep the last `conv_kernel_size`."""
        return self._current().append(("conv", layer_idx, state_idx), conv_states, conv_kernel_size)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a recurrent state `[items, ...]`, or None before the first token."""
        return self._current().get(("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        """Keep a recurrent state, and return it."""
        self._current().put(("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Return the recurrent state of a lightning attention layer (MiniMax)."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keep the recurrent state of a lightning attention layer (MiniMax)."""
        self.update_recurrent_state(linear_cache, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether any token was committed."""
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: several tokens in a call follow each other."""
        return False

    def __len__(self) -> int:
        return max(super().__len__(), 1)

    def _current(self) -> StateCall:
        assert self.running is not None, "a layer that is not known to hold states asked for one"
        return self.running


def cache_class(own: type[Any]) -> type[StateCache]:
    """Return a `StateCache` for a model that makes caches of type `own`; some models accept no other type (MiniMax)."""
    if issubclass(StateCache, own) or own.__name__ == "DynamicCache":
        return StateCache
    return type(StateCache.__name__, (StateCache, own), {})
