"""Constrained decoding: the state of a sequence's grammar along every path of a token tree.

A node's allowed tokens are a function of the tokens before it. Where the grammar leaves one text only, that is the first token
of the text as the tokenizer writes it; elsewhere, all tokens that the grammar can go on from, end tokens included where a text
may end. The target's logits of all other tokens become -inf before any processor sees them, at every node, so each draw is
that of plain constrained decoding. Draft tokens that are not allowed leave the tree, and forced tokens join it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from medhead.config import MAX_TREE_SIZE
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.grammar import Grammar, compile_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from medhead.core.sequence import Sequence
    from medhead.proposers.base import Proposer

LOG = logging.getLogger(__name__)
MAX_FORCED, MIN_FORCED = 32, 4  # forced tokens below the root; a batch has MAX_FORCED_NODES of them together
MAX_FORCED_NODES = 64
_MAX_FORCED_BELOW_DRAFT = 8  # forced tokens below a draft token, which may be wrong
_Row = tuple[list[int], list[int], list[int]]  # tokens, parents and depth of a row's nodes
_tokenizers: WeakKeyDictionary[Any, dict[Any, LLTokenizer]] = WeakKeyDictionary()


class Constraint:
    """The grammar of one sequence, in the state after its output.

    Args:
        matcher: llguidance's matcher at the beginning of a text; it is copied.
        end_tokens: tokens that end the sequence.
    """

    def __init__(self, matcher: LLMatcher, end_tokens: Iterable[int]) -> None:
        self._first, self._end_tokens = matcher, frozenset(end_tokens)
        self._matcher, self._output = matcher.deep_copy(), list[int]()
        self._ended = self._failed = False

    def advance(self, output_ids: list[int]) -> None:
        """Go on to the state after these new tokens of the sequence, which begin with those of the last call."""
        if self._ended or self._failed:
            return
        new = output_ids[len(self._output) :]
        self._output = list(output_ids)
        self._ended = bool(new) and new[-1] in self._end_tokens
        # at a limit of the matcher's resources, or in lockstep, where rows that have ended go on with padding
        self._failed = bool(new) and not self._ended and not self._matcher.consume_tokens(new)

    def fit(
        self, tokens: list[int], parents: list[int], depth: list[int], max_depth: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the nodes of a tree that the grammar allows, and token and parent of nodes to append, which it forces.

        Args:
            tokens: of all nodes.
            parents: of all nodes.
            depth: of all nodes.
            max_depth: no node is deeper; also the largest number of nodes to append.
        """
        children: dict[tuple[int, int], int] = {}
        for node in range(len(tokens) - 1, 0, -1):  # the first of equal children wins
            children[parents[node], tokens[node]] = node
        kept, added = list[int](), list[tuple[int, int]]()

        def append(node: int, forced: list[int]) -> None:
            kept.append(node)
            room = max(0, max_depth - depth[node])
            for token in forced[: room if node == 0 else min(_MAX_FORCED_BELOW_DRAFT, room)]:
                child = children.get((node, token))
                if child is None:
                    if len(added) >= max_depth:
                        return
                    child = children[node, token] = len(tokens) + len(added)
                    added.append((token, node))
                node = child

        self._walk(tokens, parents, append)
        return (list(range(len(tokens))) if self._ended else sorted(kept)), added

    def allowed(self, tokens: list[int], parents: list[int]) -> list[tuple[int, bytes | int]]:
        """Return the nodes whose path the grammar allows, each with its allowed tokens as bits, or its one allowed token."""
        found: list[tuple[int, bytes | int]] = []

        def read(node: int, forced: list[int]) -> None:
            found.append((node, forced[0] if forced else self._matcher.compute_bitmask()))

        self._walk(tokens, parents, read)
        return sorted(found, key=lambda one: one[0])

    def _walk(self, tokens: list[int], parents: list[int], visit: Callable[[int, list[int]], None]) -> None:
        """Call `visit` with every node on an allowed path, in its state, and with the tokens that are forced there."""
        if self._failed:
            visit(0, [min(self._end_tokens)])
        if self._ended or self._failed:
            return
        children: list[list[int]] = [[] for _ in tokens]
        for node in range(1, len(tokens)):
            if tokens[node] not in self._end_tokens:  # nothing is drawn after an end token
                children[parents[node]].append(node)

        def enter(node: int, path: list[int]) -> None:
            forced = self._matcher.compute_ff_tokens()
            visit(node, forced)
            for child in children[node]:
                token = tokens[child]
                if self._matcher.is_error():  # a limit of the matcher's resources; it stays in this state
                    self._restore(path)
                if forced and token != forced[0]:
                    continue
                if self._matcher.try_consume_tokens([token]) == 1:
                    enter(child, [*path, token])
                    if self._matcher.is_error() or not self._matcher.rollback(1):
                        self._restore(path)

        enter(0, [])
        if self._matcher.is_error():
            LOG.warning("a grammar ends its text early: %s", self._matcher.get_error()[:200])
            self._restore([])

    def _restore(self, path: list[int]) -> None:
        self._matcher = self._first.deep_copy()
        self._matcher.consume_tokens([*self._output, *path])


class BatchConstraints:
    """The grammars of a batch in one step.

    Args:
        sequences: of the batch, at least one of which has a grammar.
        max_depth: largest depth of a node that tokens left and context allow.
        proposer: of the trees; those of one that fills none stay as they are.
    """

    def __init__(self, sequences: list[Sequence], max_depth: int, proposer: Proposer) -> None:
        self._constraints = [one.constraint for one in sequences]
        for one in sequences:
            if one.constraint is not None:
                one.constraint.advance(one.output_ids)
        most = max(MIN_FORCED, min(MAX_FORCED, MAX_FORCED_NODES // len(sequences)))
        self.max_depth = min(max_depth, most) if proposer.max_depth else 0
        self._prunes = not proposer.reads_nodes

    @classmethod
    def of(cls, sequences: list[Sequence], max_depth: int, proposer: Proposer) -> BatchConstraints | None:
        """Return the grammars of the sequences, None where no sequence has one."""
        if all(one.constraint is None for one in sequences):
            return None
        return cls(sequences, max_depth, proposer)

    def fit(self, tree: TokenTree) -> tuple[TokenTree, list[int]]:
        """Return the tree without nodes that the grammars ban and with nodes that they force.

        Also return how many of every row's nodes are the proposer's; those that are forced follow them.
        """
        most = min(self.max_depth, MAX_TREE_SIZE - tree.nodes)
        if most < 1:
            return tree, [tree.nodes] * tree.batch
        everything = list(range(tree.nodes))
        rows, drafted = list[_Row](), list[int]()
        trees = zip(tree.tokens.tolist(), tree.parents.tolist(), tree.depth.tolist(), strict=True)
        for one, row in zip(self._constraints, trees, strict=True):
            kept, added = (everything, []) if one is None else one.fit(*row, most)
            kept = kept if self._prunes else everything
            rows.append(_select(row, kept, added))
            drafted.append(len(kept))
        nodes = max(len(tokens) for tokens, _, _ in rows)
        for tokens, parents, depth in rows:
            missing = nodes - len(tokens)  # a copy of the root below the root changes no output
            tokens += tokens[:1] * missing
            parents += [0] * missing
            depth += [1] * missing
        parts = torch.tensor(rows, device=tree.tokens.device)
        return TokenTree(parts[:, 0], parts[:, 1], parts[:, 2], max(max(depth) for _, _, depth in rows)), drafted

    def mask(self, tree: TokenTree, logits: Tensor) -> Tensor:
        """Return the logits `[batch, nodes, vocab]` with -inf for tokens that are not allowed."""
        vocab = logits.shape[-1]
        rows, nodes, bits = [], [], []
        trees = zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        for row, (one, nodes_of_row) in enumerate(zip(self._constraints, trees, strict=True)):
            found = [] if one is None else one.allowed(*nodes_of_row)
            for node, allowed in found:
                rows.append(row)
                nodes.append(node)
                bits.append(_to_bits(allowed, vocab))
        if not rows:
            return logits
        unpacked = np.unpackbits(~np.stack(bits), axis=1, count=vocab, bitorder="little")
        banned = torch.from_numpy(unpacked).view(torch.bool).to(logits.device)
        if len(rows) == tree.batch * tree.nodes:
            return logits.masked_fill(banned.view_as(logits), -torch.inf)
        where = torch.tensor(rows, device=logits.device), torch.tensor(nodes, device=logits.device)
        masked = logits.clone()
        masked[where] = masked[where].masked_fill(banned, -torch.inf)
        return masked


def keep_banned(scores: Tensor, masked: Tensor) -> Tensor:
    """Return processed scores `[..., vocab]` without the tokens that the grammar bans.

    Where the processors ban all others, the grammar wins: the scores are the masked logits themselves.

    Args:
        scores: what processors made of the masked logits.
        masked: the masked logits, of the same shape.
    """
    scores = scores.masked_fill(masked == -torch.inf, -torch.inf)
    return torch.where(scores.amax(-1, keepdim=True) == -torch.inf, masked.to(scores.dtype), scores)


def new_constraint(grammar: Grammar, tokenizer: Any, vocab_size: int, end_tokens: Iterable[int]) -> Constraint:
    """Return the constraint of a new sequence.

    Args:
        grammar: what the text must look like.
        tokenizer: of the model, a fast one.
        vocab_size: number of the target's logits.
        end_tokens: tokens that end the sequence.

    Raises:
        MedheadError: there is no tokenizer, it is not a fast one, or no token ends a text.
    """
    ends = sorted(end_tokens)
    if not ends:
        raise MedheadError("a grammar needs an end token, and the model and its tokenizer have none: set eos_token_id")
    matcher = _matcher(_tokenizer(tokenizer, vocab_size, ends), compile_grammar(grammar.kind, grammar.text))
    if matcher.is_error():
        raise MedheadError(f"the grammar does not go with the tokenizer: {matcher.get_error()[:200]}")
    return Constraint(matcher, ends)


def _tokenizer(tokenizer: Any, vocab_size: int, ends: list[int]) -> LLTokenizer:
    """Return llguidance's form of a tokenizer; made once, which takes up to a second."""
    from llguidance import hf

    if tokenizer is None:
        raise MedheadError("a grammar needs the tokenizer: pass tokenizer=tokenizer to generate")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise MedheadError(f"a grammar needs a fast tokenizer, and {type(tokenizer).__name__} is not one")
    known = _tokenizers.setdefault(tokenizer, {})
    key = len(tokenizer), vocab_size, *ends
    if key not in known:
        size = max(vocab_size, len(tokenizer))
        known[key] = hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=[one for one in ends if one < size])
    return known[key]


@lru_cache(maxsize=32)
def _matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """Return a matcher at the beginning of a text, for copies."""
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, source, log_level=0)


def _select(row: _Row, kept: list[int], added: list[tuple[int, int]]) -> _Row:
    """Return the nodes of a row that are kept, and those that are added after all of them."""
    tokens, parents, depth = map(list, row)
    for token, parent in added:
        tokens.append(token)
        parents.append(parent)
        depth.append(depth[parent] + 1)
    chosen = kept + list(range(len(tokens) - len(added), len(tokens)))
    places = {node: place for place, node in enumerate(chosen)}
    return (
        [tokens[node] for node in chosen],
        [places[parents[node]] for node in chosen],
        [depth[node] for node in chosen],
    )


def _to_bits(allowed: bytes | int, vocab: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    size = -(-vocab // 8)
    if isinstance(allowed, int):
        bits = np.zeros(size, np.uint8)
        bits[allowed // 8] = 1 << allowed % 8
        return bits
    return np.frombuffer(allowed, np.uint8)[:size]
