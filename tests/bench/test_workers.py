from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from bundles import CONFIGS

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.workers import Query, Workers
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.errors import EngineError

SECONDS = 20


class Recorder:
    """An engine that notes what it is asked for, after doing `before`."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.before = before
        self.sizes: list[int] = []
        self.threads: set[int] = set()

    def predict(self, batch: Batch) -> np.ndarray:
        self.before()
        self.sizes.append(batch.batch_size)
        self.threads.add(threading.get_ident())
        return np.zeros(batch.batch_size, np.float32)


class Answers:
    """Waits for the answers to a number of queries."""

    def __init__(self, expected: int) -> None:
        self.tickets: list[int] = []
        self.all = threading.Event()
        self.expected = expected
        self._lock = threading.Lock()

    def __call__(self, tickets: list[int]) -> None:
        with self._lock:
            self.tickets += tickets
            if len(self.tickets) == self.expected:
                self.all.set()


@pytest.fixture(scope="module")
def library() -> list[Batch]:
    """Batches of 1 to 4 samples."""
    rng = np.random.default_rng(0)
    return [random_batch(CONFIGS["dot"], size, rng) for size in (1, 2, 3, 4)]


def test_every_query_is_answered_once_and_each_engine_stays_on_its_thread(library):
    engines, answers = [Recorder(), Recorder()], Answers(200)
    with Workers(engines, library, answers) as workers:
        workers.put([Query(ticket, ticket % 4) for ticket in range(200)])
        assert answers.all.wait(SECONDS)
    assert sorted(answers.tickets) == list(range(200))
    assert sorted(engines[0].sizes + engines[1].sizes) == sorted([1, 2, 3, 4] * 50)
    assert all(len(engine.threads) <= 1 for engine in engines)
    assert (workers.queries, workers.pairs) == (200, 500)


def test_waiting_queries_are_taken_together_up_to_the_pairs_asked_for(library):
    free, answers = threading.Event(), Answers(6)
    engine = Recorder(lambda: free.wait(SECONDS))
    with Workers([engine], library, answers, coalesce_pairs=7) as workers:
        workers.put([Query(0, 0)])
        while workers._waiting:  # the worker has taken the first one, and waits
            pass
        workers.put([Query(ticket, place) for ticket, place in ((1, 3), (2, 2), (3, 0), (4, 1), (5, 3))])
        free.set()
        assert answers.all.wait(SECONDS)
    assert engine.sizes == [1, 4 + 3, 1 + 2 + 4]
    assert answers.tickets == [0, 1, 2, 3, 4, 5]
    assert workers.queries == 6


def test_a_query_larger_than_what_is_taken_together_is_scored_alone(library):
    engine, answers = Recorder(), Answers(2)
    with Workers([engine], library, answers, coalesce_pairs=2) as workers:
        workers.put([Query(0, 3), Query(1, 3)])
        assert answers.all.wait(SECONDS)
    assert engine.sizes == [4, 4]


def test_an_engine_that_fails_is_remembered_and_nobody_waits(library):
    def fail() -> None:
        raise EngineError("broken")

    told: list[Exception] = []
    answers = Answers(50)
    with Workers([Recorder(fail), Recorder(fail)], library, answers, failed=told.append) as workers:
        workers.put([Query(ticket, 0) for ticket in range(50)])
        assert answers.all.wait(SECONDS)
    assert [str(error) for error in told] == ["broken"]
    assert workers.error is told[0]
    assert (workers.queries, workers.pairs) == (0, 0)


def test_queries_still_waiting_at_the_end_are_answered(library):
    answers = Answers(30)
    with Workers([Recorder()], library, answers) as workers:
        workers.put([Query(ticket, 0) for ticket in range(30)])
    assert len(answers.tickets) == 30
