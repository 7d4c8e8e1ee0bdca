"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from medhead.config import SamplingParams, check_tree_size
from medhead.errors import MedheadError
from medhead.serving.logprobs import MAX_TOP_LOGPROBS, TokenLogprobs

Reason = Literal["stop", "length", "cancelled", "timeout", "error"]


class EngineError(MedheadError):
    """The engine could not do what it was asked for; the message is for the person who asked."""


class QueueFullError(EngineError):
    """Too many requests wait already, or the images of those that wait are too large; try again later."""


class Stopped(EngineError):
    """The engine is not running (any more)."""


@dataclass(frozen=True)
class Request:
    """One text to be produced.

    Attributes:
        prompt: token ids.
        params: sampling parameters; with a seed the output does not depend on other requests; without one the
            engine draws it (see `Result.seed`). `max_new_tokens` is cut to what the model's context leaves.
        proposer: name of a registered proposer; None for the engine's own. `none` is plain decoding.
        tree_size: nodes of a tree; None for what the proposer chooses.
        time_limit: seconds from submission after which it ends with what there is; None for the engine's limit.
        trace: fill `StepOutput.sources` and `StepOutput.tree`, which takes a little time.
        cache_salt: requests use the prefixes of requests with the same salt alone; None is a salt too.
        logprobs: fill `StepOutput.logprobs` with so many of the most probable tokens, from 0 to 20; None fills nothing.
        special_tokens: ids of special tokens that are part of the text; the others are left out.
        model_inputs: what the model's processor made of the prompt besides `input_ids` and `attention_mask`: `pixel_values` for
            example, tensors with a batch size of 1. The prompt is read on its own and in one pass; it neither uses nor leaves
            a prefix for other requests.

    Raises:
        MedheadError: a value is out of range.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    proposer: str | None = None
    tree_size: int | None = None
    time_limit: float | None = None
    trace: bool = False
    logprobs: int | None = None
    special_tokens: tuple[int, ...] = ()
    cache_salt: str | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        limit = self.time_limit
        if limit is not None and not (isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0):
            raise MedheadError(f"time_limit must be a number of seconds above 0, got {limit!r}")
        if self.tree_size is not None:
            check_tree_size(self.tree_size)
        top = self.logprobs
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_TOP_LOGPROBS):
            raise MedheadError(f"logprobs must be a whole number from 0 to {MAX_TOP_LOGPROBS}, got {top!r}")
        if extra := sorted({"input_ids", "attention_mask"} & set(self.model_inputs)):
            raise MedheadError(f"model_inputs must not hold {' and '.join(extra)}: give the token ids as prompt")


def input_bytes(requests: Iterable[Request]) -> int:
    """Return the bytes of the tensors in the model inputs of requests; one that several share counts once."""
    values = [value for one in requests for value in one.model_inputs.values()]
    items = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return sum({id(item): item.nbytes for item in items if isinstance(item, Tensor)}.values())


@dataclass(frozen=True)
class TreeView:
    """The token tree of one pass, for display.

    Attributes:
        tokens: token id of every node; node 0 is the root, the newest token before this pass.
        parents: index of every node's parent, smaller than its own; 0 for the root itself.
        sources: name of the proposer of every node: `heads`, `ngram`, `recycling`, `lookahead`; `grammar` for tokens
            that a grammar forces, `root` for node 0.
        accepted: the accepted nodes in order, the root first.
    """

    tokens: list[int]
    parents: list[int]
    sources: list[str]
    accepted: list[int]


@dataclass(frozen=True)
class StepOutput:
    """The output of one pass for one request.

    Attributes:
        tokens: new token ids, at least one.
        text: new text that is final now; may be empty (half a character, the beginning of a stop string), and may belong to
            tokens of earlier outputs. The texts of all outputs joined are the text of the request.
        texts: the text of every token of `tokens` on its own, for display; a character of several tokens is shown at the
            last of them. Empty without `trace`.
        sources: the proposer of every token: `heads 1`, `heads 2`, ... by depth, `ngram`, `recycling`, `lookahead`, `grammar`, or
            `bonus` for the target's own token. Empty without `trace`.
        tree: the tree of this pass, with `trace`.
        seconds: of this pass; 0 for that over the prompt.
        logprobs: of every token of `tokens`, if the request asks for them.
    """

    tokens: list[int]
    text: str
    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    tree: TreeView | None = None
    seconds: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Result:
    """How a request ended, and its statistics.

    Attributes:
        reason: `stop` (end token or stop string), `length` (limit or context), `cancelled`, `timeout`, or `error`.
        prompt_tokens: of the prompt.
        cached_tokens: of the prompt that were known from earlier requests and not read again.
        new_tokens: that were produced.
        passes: verify passes it took part in, and that over the prompt; `new_tokens` for plain decoding.
        lengths: tokens of every pass, in order.
        seed: of its noise (0 for greedy decoding).
        proposer: name of the proposer that served it.
        queued: seconds it waited.
        first_token: seconds from submission to the first token; None if there was none.
        seconds: from submission to its end.
        busy: seconds of prefill and passes it took part in, without those of other batches between them.
    """

    reason: Reason = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    lengths: list[int] = field(default_factory=list)
    seed: int = 0
    proposer: str = "none"
    queued: float = 0.0
    first_token: float | None = None
    seconds: float = 0.0
    busy: float = 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per verify pass, bonus token included; 1.0 is plain decoding."""
        return self.new_tokens / self.passes if self.passes else 0.0
