"""Key/value rows of earlier requests by their tokens, so that a prompt that begins like one of them is not read again.

A tree of blocks: a block holds the rows of at most 64 tokens that follow those of its parent. Texts with the same beginning
share blocks. A text that leaves another one in the middle of a block uses the block's first rows and gets a block of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from medhead.core.joining import StoredPrefix
from medhead.model.packed_linear import free_bytes

BLOCK = 64  # most tokens of a block
_SHARE = 0.1  # of the free memory that is used by default
CopyTokens = Callable[[int, int], list[Tensor]]


@dataclass(eq=False)
class _Block:
    tokens: list[int]
    parent: _Block | None = None
    children: list[_Block] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)  # of the target, `[..., tokens, size]`
    # by `Proposer.draft_key`, the entries of the draft cache that depend on these tokens and no later ones: an entry depends
    # on the token after its own, so they are those of the tokens one place before
    drafts: dict[Hashable, list[Tensor]] = field(default_factory=dict)
    states: dict[Any, Tensor] = field(default_factory=dict)  # of the target after the last token; empty where unknown
    nbytes: int = 0


class PrefixCache:
    """Bounded storage; the blocks that were used the longest time ago are dropped first.

    Args:
        limit: most bytes that are held.
        has_states: whether the target's layers hold states; a prefix then ends where states are known.

    Attributes:
        nbytes: what is held.
    """

    def __init__(self, limit: int, has_states: bool = False) -> None:
        self.limit, self.nbytes, self._has_states = limit, 0, has_states
        self._roots = WeakValueDictionary[str | None, _Block]()  # by salt; their children keep them
        self._order: OrderedDict[_Block, None] = OrderedDict()  # the oldest first; a block comes after its children

    def __len__(self) -> int:
        return len(self._order)

    def clear(self) -> None:
        """Drop everything."""
        for block in self._order:
            assert block.parent is not None
            block.parent.children.clear()  # what refers to each other would stay until a garbage collection
        self._order.clear()
        self.nbytes = 0

    def find(self, text: list[int], draft_key: Hashable = None, salt: str | None = None) -> StoredPrefix:
        """Return what is known of the beginning of a prompt.

        Its last token is never part of it: the pass over it gives the first token of the text.

        Args:
            text: the prompt.
            draft_key: of the proposer if it has a draft cache, whose entries must be known too; else None.
            salt: texts that were stored with another one are not looked at.
        """
        path, inside = self._walk(self._roots.get(salt), text[:-1])
        self._touch(path)
        sizes = [len(block.tokens) for block in path[:-1]] + [inside] * bool(path)
        if draft_key is not None:
            known = next((at for at, block in enumerate(path) if draft_key not in block.drafts), len(path))
            path, sizes = path[:known], sizes[:known]
        length = sum(sizes) - (draft_key is not None)
        if self._has_states:
            while path and not (path[-1].states and sizes[-1] == len(path[-1].tokens) and sum(sizes) <= length):
                path, sizes = path[:-1], sizes[:-1]
            length = sum(sizes)
        if length < 1:
            return StoredPrefix()
        drafts = [] if draft_key is None else _first_tokens([block.drafts[draft_key] for block in path], length)
        return StoredPrefix(length, _first_tokens([block.rows for block in path], length), drafts, path[-1].states)

    def store(
        self,
        text: list[int],
        copy_rows: CopyTokens,
        draft_key: Hashable = None,
        copy_drafts: CopyTokens | None = None,
        states: dict[Any, Tensor] | None = None,
        salt: str | None = None,
    ) -> None:
        """Keep what is new of a text; its end is left out where it is larger than the limit.

        Args:
            text: tokens whose rows are known.
            copy_rows: returns the target's rows from one token up to another.
            draft_key: see `find`.
            copy_drafts: returns the entries of the draft cache in the same way; None without one.
            states: the target's after the last token, where they are known.
            salt: see `find`.
        """
        root = self._roots.setdefault(salt, _Block([]))
        path, inside = self._walk(root, text)
        at = sum(len(block.tokens) for block in path[:-1]) + inside
        if path and inside < len(path[-1].tokens) and (at < len(text) or states):
            at -= inside
            path = path[:-1]
        self._touch(path)
        if copy_drafts is not None:
            self._add_drafts(path, at, draft_key, copy_drafts)
        while at < len(text):
            block = _Block(text[at : at + BLOCK], path[-1] if path else root)
            end = at + len(block.tokens)
            block.rows = copy_rows(at, end)
            if copy_drafts is not None:
                block.drafts[draft_key] = copy_drafts(max(0, at - 1), end - 1)
            if not self._make_room(_nbytes(block), len(path)):
                break
            block.parent.children.append(block)  # type: ignore[union-attr]
            path.append(block)
            self._order[block] = None
            self._count(block)
            at = end
        if path and states and at == len(text):
            path[-1].states = states
            self._count(path[-1])
        self._touch(path)
        self._make_room(0, 0)

    def _add_drafts(self, path: list[_Block], length: int, draft_key: Hashable, copy_drafts: CopyTokens) -> None:
        """Add the entries of a draft cache to whole blocks of a text of which `length` tokens are known."""
        at = 0
        for block in path:
            end = at + len(block.tokens)
            if draft_key not in block.drafts and end <= length:
                block.drafts[draft_key] = copy_drafts(max(0, at - 1), end - 1)
                self._count(block)
            at = end

    def _walk(self, block: _Block | None, tokens: list[int]) -> tuple[list[_Block], int]:
        """Return the blocks below a root that hold a text's beginning, and how many tokens of the last one are part of it."""
        path, inside, at = list[_Block](), 0, 0
        while block is not None and block.children:
            rest = tokens[at : at + BLOCK]
            shared = [(_shared(child.tokens, rest), child) for child in block.children]
            # of several the whole ones first, which may have further blocks below them
            count, child = max(shared, key=lambda one: (one[0] == len(one[1].tokens), one[0]))
            if not count:
                break
            path.append(child)
            inside, block, at = count, child, at + count
            if count < len(child.tokens):
                break
        return path, inside

    def _touch(self, path: list[_Block]) -> None:
        for block in reversed(path):
            self._order.move_to_end(block)

    def _count(self, block: _Block) -> None:
        now = _nbytes(block)
        self.nbytes, block.nbytes = self.nbytes + now - block.nbytes, now

    def _make_room(self, size: int, keep: int) -> bool:
        """Drop the oldest blocks, but for the `keep` newest, until there is room for `size` bytes; return whether there is."""
        while self.nbytes + size > self.limit and len(self._order) > keep:
            block, _ = self._order.popitem(last=False)
            assert block.parent is not None
            block.parent.children.remove(block)
            self.nbytes -= block.nbytes
        return self.nbytes + size <= self.limit


def default_limit(device: torch.device) -> int:
    """Return a tenth of the free memory of a device, in bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
    return int(_SHARE * free)


def _nbytes(block: _Block) -> int:
    return sum(part.nbytes for part in chain(block.rows, block.states.values(), *block.drafts.values()))


def _shared(first: list[int], second: list[int]) -> int:
    """Return how many tokens two lists have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _first_tokens(parts: list[list[Tensor]], length: int) -> list[Tensor]:
    """Concatenate the tensors `[..., tokens, size]` of blocks, and return the first `length` tokens."""
    return [torch.cat(part, -2)[..., :length, :] for part in zip(*parts, strict=True)]
