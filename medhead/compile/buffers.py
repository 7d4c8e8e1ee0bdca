"""What a captured step reads and writes: tensors that stay where they are, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medhead.core.gumbel import halves
from medhead.model.kv_cache import KVBuffers, TreeCache
from medhead.model.target import Target


@dataclass(eq=False)
class Buffers:
    """The state of a batch between two steps.

    Attributes:
        stores: the target's keys and values, as `TreeCache.stores`.
        memory: `[batch, columns, size]` what the proposer keeps of committed tokens, or None.
        lengths: `[batch]` int64, committed tokens of every row; 0 for a row that has ended.
        alive: `[batch]` int64, 1 for a row that runs, else 0.
        roots: `[batch]` int64, the newest token of every row.
        features: `[batch, size]` of the target at the token before the root.
        index: `[batch]` int64, row of the user's batch, for the sampling noise.
        seed: `[2]` int64, the halves of the sampling seed.
        out: `[batch, 1 + steps]` int64, what the last step emitted: how many tokens, then the tokens.
    """

    stores: KVBuffers
    memory: Tensor | None
    lengths: Tensor
    alive: Tensor
    roots: Tensor
    features: Tensor
    index: Tensor
    seed: Tensor
    out: Tensor

    @classmethod
    def empty(
        cls, target: Target, batch: int, columns: int, steps: int, features: Tensor, memory: Tensor | None
    ) -> Buffers:
        """Buffers for rows of up to `columns` tokens and nodes; features and memory say in which size and type."""
        device, cache = target.device, target.new_cache(batch, columns)
        if memory is not None:
            memory = memory.new_zeros(batch, cache.capacity, memory.shape[2])
        numbers = torch.zeros(4, batch, dtype=torch.long, device=device)
        lengths, alive, roots, index = numbers.unbind()
        return cls(
            cache.stores,
            memory,
            lengths,
            alive,
            roots,
            features.new_zeros(batch, features.shape[1]),
            index,
            torch.zeros(2, dtype=torch.long, device=device),
            torch.zeros(batch, 1 + steps, dtype=torch.long, device=device),
        )

    @property
    def columns(self) -> int:
        """Tokens and nodes of a row that there is room for."""
        return int(next(iter(self.stores.values()))[0].shape[2])

    def cache(self, target: Target) -> TreeCache:
        """The target's cache over these stores."""
        return TreeCache.over(target.layout, self.stores)

    def tensors(self, apart: bool = False) -> list[Tensor]:
        """All of them in a fixed order, as `over` takes them; with every layer's keys and values on their own if `apart`."""
        stores = [part for store in self.stores.values() for part in (store if apart else [store])]
        memory = [] if self.memory is None else [self.memory]
        rest = [self.lengths, self.alive, self.roots, self.features, self.index, self.seed, self.out]
        return [*stores, *memory, *rest]

    def over(self, tensors: list[Tensor], apart: bool = False) -> Buffers:
        """The same form over other tensors."""
        left, stores = iter(tensors), {}
        for slot, store in self.stores.items():
            stores[slot] = [next(left) for _ in range(len(store))] if apart else next(left)
        return Buffers(stores, None if self.memory is None else next(left), *left)

    def load(
        self,
        cache: TreeCache,
        memory: Tensor | None,
        roots: Tensor,
        features: Tensor,
        index: list[int],
        seed: int,
    ) -> None:
        """Take over running rows, as many as there are buffers for."""
        used = max(cache.lengths)
        for slot, store in self.stores.items():
            store[:, :, :, :used].copy_(cache.stores[slot][:, :, :, :used])
        if self.memory is not None:
            assert memory is not None, "the proposer had a memory when the buffers were made"
            self.memory[:, :used].copy_(memory[:, :used])
        self.lengths.copy_(torch.tensor(cache.lengths))
        self.alive.fill_(1)
        self.index.copy_(torch.tensor(index))
        self.seed.copy_(torch.tensor(halves(seed)))
        self.roots.copy_(roots)
        self.features.copy_(features)

    def end(self, place: int) -> None:
        """This row has ended: it stays where it is and costs as little as it can."""
        self.alive[place].zero_()
        self.lengths[place].zero_()

    def unload(self, cache: TreeCache, places: list[int], lengths: list[int]) -> tuple[Tensor | None, Tensor, Tensor]:
        """Give the rows at these places, with these committed lengths, to an empty cache.

        Returns:
            Their memory, roots and features.
        """
        picked, used = torch.tensor(places, device=self.lengths.device), max(lengths)
        for slot, store in self.stores.items():
            cache.stores[slot][:, :, :, :used].copy_(store[:, picked.to(store.device), :, :used])
        cache.lengths = list(lengths)
        return None if self.memory is None else self.memory[picked], self.roots[picked], self.features[picked]
