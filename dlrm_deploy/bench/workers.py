"""Workers: threads that answer queries, each with an engine of its own, from one queue in between.

Engines are not for several threads at once. Those of ONNX Runtime map the same table files, so that further
workers cost little memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.queries import merge


class Scorer(Protocol):
    """What a worker needs of an engine."""

    def predict(self, batch: Batch) -> npt.NDArray[np.float32]: ...


class Query(NamedTuple):
    ticket: int
    """What the answer is for."""

    place: int
    """In the library of queries."""


class Workers:
    """A queue of queries and one thread an engine. To be used in a `with` block, which ends the threads."""

    def __init__(
        self,
        engines: Sequence[Scorer],
        library: Sequence[Batch],
        answer: Callable[[Sequence[int]], None],
        *,
        coalesce_pairs: int = 0,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """No thread runs yet.

        Args:
            engines: one a worker.
            library: what a query's place is in.
            answer: called by a worker with the tickets of queries whose scores are there.
            coalesce_pairs: a worker takes further waiting queries into its batch as long as it has at most so many
                pairs; 0: each query is a batch.
            failed: called once, with what the first engine that failed raised. From then on all queries are answered at
                once and unscored, so that whoever waits for answers comes to an end.
        """
        self._engines = engines
        self._library = library
        self._answer = answer
        self._coalesce_pairs = coalesce_pairs
        self._failed = failed
        self._waiting: deque[Query] = deque()
        self._changed = Condition()
        self._ended = False
        self._threads: list[Thread] = []
        self.error: Exception | None = None
        """What the first engine that failed raised."""

        self.queries = 0
        """Queries scored so far."""

        self.pairs = 0
        """Pairs scored so far."""

    def __enter__(self) -> Self:
        for engine in self._engines:
            thread = Thread(target=self._work, args=(engine,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def put(self, queries: Sequence[Query]) -> None:
        """Queue some queries."""
        with self._changed:
            self._waiting.extend(queries)
            self._changed.notify(len(queries))

    def _work(self, engine: Scorer) -> None:
        while taken := self._take():
            pairs = 0
            if self.error is None:
                try:
                    batch = merge([self._library[query.place] for query in taken])
                    engine.predict(batch)
                    pairs = batch.batch_size
                except Exception as err:  # whatever an engine raises: the others must not wait for its answers
                    self._fail(err)
            with self._changed:
                self.pairs += pairs
                self.queries += len(taken) if pairs else 0
            self._answer([query.ticket for query in taken])

    def _take(self) -> list[Query]:
        """The next queries to score as one batch; none at the end."""
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            if not self._waiting:
                return []
            taken = [self._waiting.popleft()]
            pairs = self._size(taken[0])
            while self._waiting and pairs + self._size(self._waiting[0]) <= self._coalesce_pairs:
                taken.append(self._waiting.popleft())
                pairs += self._size(taken[-1])
            return taken

    def _size(self, query: Query) -> int:
        return self._library[query.place].batch_size

    def _fail(self, error: Exception) -> None:
        with self._changed:
            first = self.error is None
            self.error = self.error or error
        if first:
            self._failed(error)
