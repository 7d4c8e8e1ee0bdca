"""Whose turn it is: batches of requests share the time, not the number of steps."""

from __future__ import annotations

from collections import Counter

import pytest

from conftest import tiny_llama
from medhead import Decoder
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker
from medhead.serving import Request
from medhead.serving.prefix_store import PrefixStore
from medhead.serving.scheduler import MAX_BATCHES, DecodeBatch, Scheduler


@pytest.fixture
def scheduler() -> Scheduler:
    decoder = Decoder(tiny_llama(), "ngram", probe=False)
    return Scheduler(decoder, None, PrefixStore(decoder.target, 0))


def busy(scheduler: Scheduler, proposer: str) -> DecodeBatch:
    """A batch with a running sequence."""
    batch = scheduler.batch_for(Request([5], proposer=proposer))
    scheduler.admit(batch)
    batch.loop.sequences = [Sequence([5], [5], StopChecker(9))]
    return batch


def turns(scheduler: Scheduler, seconds: dict[str, float], steps: int) -> Counter[str]:
    """How many of the next turns each proposer gets, if a step of it takes so many seconds."""
    found: Counter[str] = Counter()
    for _ in range(steps):
        batch = scheduler.next_batch()
        assert batch is not None
        scheduler.charge(batch, seconds[batch.loop.proposer.name])
        found[batch.loop.proposer.name] += 1
    return found


def test_batches_share_the_time(scheduler: Scheduler) -> None:
    """A batch whose steps take three times as long gets a third of the turns."""
    busy(scheduler, "none"), busy(scheduler, "recycling")
    assert turns(scheduler, {"none": 1.0, "recycling": 3.0}, 400) == {"none": 300, "recycling": 100}


def test_time_that_a_batch_did_not_use_is_no_credit(scheduler: Scheduler) -> None:
    busy(scheduler, "none")
    turns(scheduler, {"none": 1.0}, 100)
    busy(scheduler, "recycling")  # was idle all the while
    found = turns(scheduler, {"none": 1.0, "recycling": 1.0}, 40)
    assert abs(found["none"] - found["recycling"]) <= 2


def test_a_batch_that_comes_back_keeps_what_it_has_used(scheduler: Scheduler) -> None:
    """Else a batch whose requests come one by one would always be first."""
    slow = busy(scheduler, "none")
    scheduler.charge(slow, 50.0)
    slow.loop.sequences = []
    other = busy(scheduler, "recycling")
    scheduler.charge(other, 20.0)
    slow = busy(scheduler, "none")
    assert slow.service_time == 50.0
    assert scheduler.next_batch() is other


def test_idle_batches_are_dropped(scheduler: Scheduler) -> None:
    for size in range(1, MAX_BATCHES + 5):
        scheduler.batch_for(Request([5], tree_size=size))
    assert len(list(scheduler)) == MAX_BATCHES
    assert scheduler.next_batch() is None


def test_requests_of_one_proposer_and_tree_size_share_a_batch(scheduler: Scheduler) -> None:
    batch = scheduler.batch_for(Request([5]))
    assert scheduler.batch_for(Request([6], proposer="ngram")) is batch  # the decoder's own
    assert scheduler.batch_for(Request([6], tree_size=4)) is not batch
    assert scheduler.batch_for(Request([6], proposer="none")) is not batch
