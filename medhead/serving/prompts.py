"""The prompts of a batch that are being read, in turns, and what is kept of them for later ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from medhead.core.joining import Joining, StoredPrefix
from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence
from medhead.errors import MedheadError
from medhead.serving.prefix_store import PrefixStore


class UnreadablePromptError(MedheadError):
    """The model cannot read a prompt with its images; `sequences` are those that have it."""

    def __init__(self, message: str, sequences: list[Sequence]) -> None:
        super().__init__(message)
        self.sequences = sequences


class PromptQueue:
    """Reads prompts chunk by chunk; their sequences then join a decode loop.

    Args:
        loop: what they join; its sequences are kept in `prefixes` as they leave.
        prefixes: the beginnings of texts that need not be read.
    """

    def __init__(self, loop: DecodeLoop, prefixes: PrefixStore) -> None:
        self._loop, self._prefixes = loop, prefixes
        self._waiting: deque[Joining] = deque()
        loop.on_leave = lambda one, buffers, row: prefixes.store(
            loop.proposer, one, buffers.cache, buffers.draft_cache, row, len(one.token_ids) - 1
        )

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences whose prompts are being read."""
        return [one for joining in self._waiting for one in joining.sequences]

    def add(self, sequences: list[Sequence], chunk: int) -> list[int]:
        """Take more prompts; return how many tokens of each are known.

        Prompts of more than `chunk` unknown tokens, and those that hold images, are read on their own, the others together.
        """
        groups: dict[int, list[tuple[Sequence, StoredPrefix]]] = {}
        lengths = []
        for one in sequences:
            prefix = self._prefixes.find(self._loop.proposer, one)
            is_alone = one.has_images or len(one.token_ids) - prefix.length > chunk
            groups.setdefault(id(one) if is_alone else prefix.length > 0, []).append((one, prefix))
            lengths.append(prefix.length)
        for group in groups.values():
            together, prefixes = [one for one, _ in group], [prefix for _, prefix in group]
            proposer, inputs = self._loop.proposer.fork(), together[0].prompt_inputs
            together[0].prompt_inputs = None  # `Joining` frees the images once they are read
            self._waiting.append(Joining(self._loop.target, proposer, together, prefixes, inputs))
        return lengths

    def read(self, tokens: int) -> list[Sequence]:
        """Read at most so many tokens of the prompts whose turn it is; return their sequences.

        Raises:
            UnreadablePromptError: the model cannot read a prompt with its images; the others are as before.
        """
        joining = self._waiting.popleft()
        try:
            joining.advance(max(1, tokens // len(joining.sequences)))
        except MedheadError as error:
            if not joining.sequences[0].has_images:
                raise
            raise UnreadablePromptError(str(error), joining.sequences) from error
        if joining.left:
            self._waiting.append(joining)
        else:
            self._store(joining)
            self._loop.add(joining)
        return joining.sequences

    def drop(self, goes_on: Callable[[Sequence], bool]) -> list[Sequence]:
        """Give up the prompts that are not wanted any more, and return their sequences.

        Such a prompt that is read with others stays until all are read.
        """
        dropped = [joining for joining in self._waiting if not any(map(goes_on, joining.sequences))]
        for joining in dropped:
            self._waiting.remove(joining)
            self._store(joining)
        return [one for joining in dropped for one in joining.sequences]

    def _store(self, joining: Joining) -> None:
        for row, one in enumerate(joining.sequences):
            self._prefixes.store(joining.proposer, one, joining.cache, joining.draft_cache, row, joining.known(row))
