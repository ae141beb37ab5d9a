"""Traffic with the reuse of recorded traffic: profiles of stack distances, and streams of ids drawn from them.

How well a cache does depends on how soon ids come again. The stack distance of an id is the number of different ids
since it came last, itself included; 0 where it never came before. An LRU cache of c rows hits exactly where the
distance is 1 to c. A profile is the distribution of the distances in recorded traffic, as in section 4 of the DLRM
paper, and holds nothing of the ids themselves: it can be handed on where traffic cannot.

`profile_batches` makes profiles, `Trace.read` and `Trace.write` keep them, `TraceStream` draws ids from them.

Each feature's ids are one endless stream, whose distances are drawn independently, cut into bags afterwards: reuse
crosses bags, samples and batches, as it does in traffic. The paper's own generator starts anew at every sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import read_npz
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.hashed import DoubleArray, LongArray, scatter, uniform
from dlrm_deploy.errors import BundleError, DataError
from dlrm_deploy.files import atomic_file

if TYPE_CHECKING:
    from dlrm_deploy.engines.lru_stack import LruStack

EVERY_FEATURE = "*"
"""Name of a profile that stands for all features."""

_FORMAT = "dlrm-deploy trace 1"
_ARRAYS = ("format", "features", "lines", "accesses", "sizes", "distances", "cumulative")
_MOST_LINES = 1 << 31
_WHOLE = 1e-6  # how far from 1 a distribution may end, where it was written with few digits
_DRAW = 11  # what the numbers are for: the first word of every hash


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StackProfile:
    """Distribution of the stack distances of one feature's ids.

    Raises:
        DataError: distances that do not rise or that `lines` ids cannot have, or probabilities that do not rise to 1.
    """

    feature: str
    """Its name, its number where names are unknown, or `EVERY_FEATURE`."""

    lines: int
    """Different ids seen, L."""

    distances: LongArray
    """[K] int64, rising, from 0 (an id's first occurrence) to at most L."""

    cumulative: DoubleArray
    """[K] float64: probability of a distance of at most `distances[k]`. The last is 1."""

    accesses: int = 0
    """Ids that were profiled; 0 where that is unknown."""

    def __post_init__(self) -> None:
        owner = f"trace of feature {self.feature!r}"
        distances, cumulative = self.distances, self.cumulative
        if not 1 <= self.lines <= _MOST_LINES:
            raise DataError(f"{owner}: lines must be 1 to 2^31, got {self.lines}.")
        if distances.ndim != 1 or distances.shape != cumulative.shape or distances.size == 0:
            raise DataError(
                f"{owner}: distances of shape {distances.shape} and probabilities of shape {cumulative.shape}, "
                "expected one list of each, of the same length and not empty."
            )
        if distances[0] < 0 or np.any(np.diff(distances) <= 0):
            raise DataError(f"{owner}: distances must rise and not be negative.")
        if distances[-1] > self.lines:
            raise DataError(f"{owner}: a distance of {distances[-1]} is impossible among {self.lines} different ids.")
        rises = np.diff(cumulative, prepend=0.0)
        if not (np.all(rises >= 0) and abs(cumulative[-1] - 1) <= _WHOLE):  # false for NaN, as it should be
            raise DataError(f"{owner}: cumulative probabilities must rise from 0 to 1, and end at {cumulative[-1]}.")
        whole = np.minimum(cumulative, 1.0)
        whole[-1] = 1.0
        object.__setattr__(self, "cumulative", whole)

    @classmethod
    def of_distances(cls, feature: str, lines: int, distances: LongArray) -> StackProfile:
        """The profile of a recorded trace's distances [N], N at least 1, over `lines` different ids."""
        values, counts = np.unique(distances, return_counts=True)
        return cls(
            feature=feature,
            lines=lines,
            distances=values.astype(np.int64),
            cumulative=np.cumsum(counts) / distances.size,
            accesses=int(distances.size),
        )

    @property
    def first_share(self) -> float:
        """Share of accesses to ids that had not come before."""
        return float(self.cumulative[0]) if self.distances[0] == 0 else 0.0

    def hit_rate(self, rows: int) -> float:
        """Share of all accesses that an LRU cache of `rows` rows, empty at first, answers."""
        below = int(np.searchsorted(self.distances, rows, side="right"))
        return float(self.cumulative[below - 1]) - self.first_share if rows > 0 and below else 0.0

    def squeezed(self, rows: int) -> StackProfile:
        """This profile over at most `rows` ids: longer distances become `rows`. Hit rates of smaller caches stay."""
        if self.lines <= rows:
            return self
        kept = int(np.searchsorted(self.distances, rows, side="left"))
        return replace(
            self,
            lines=rows,
            distances=np.append(self.distances[:kept], rows) if kept < self.distances.size else self.distances,
            cumulative=np.append(self.cumulative[:kept], 1.0) if kept < self.distances.size else self.cumulative,
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Profiles of the features of a model."""

    profiles: tuple[StackProfile, ...]

    def __post_init__(self) -> None:
        names = [profile.feature for profile in self.profiles]
        if not names or len(set(names)) < len(names):
            raise DataError(f"a trace has one profile a feature, and at least one, got {', '.join(names) or 'none'}.")

    def for_model(self, config: ModelConfig, *, squeeze: bool = False) -> tuple[StackProfile, ...]:
        """The profile of each feature of a model: by name, or by number where the trace has numbers for names.

        Args:
            config: the model.
            squeeze: cut profiles to the rows of the model's tables where they have more ids.

        Raises:
            DataError: a feature without a profile, or with more ids than its table has rows.
        """
        by_name = {profile.feature: profile for profile in self.profiles}
        chosen = []
        for f, (feature, rows) in enumerate(zip(config.features, config.feature_rows, strict=True)):
            profile = by_name.get(feature.name) or by_name.get(str(f)) or by_name.get(EVERY_FEATURE)
            if profile is None:
                raise DataError(
                    f"the trace has no profile of feature {feature.name!r}: it has {', '.join(list(by_name)[:8])}"
                    f"{', ...' if len(by_name) > 8 else ''}. Profile traffic of model {config.name!r}."
                )
            if profile.lines > rows and not squeeze:
                raise DataError(
                    f"feature {feature.name!r}: the trace goes over {profile.lines} ids, and the table has {rows} "
                    "rows. Profile traffic of this very model, or cut the trace to it with `dlrm-deploy trace squeeze`."
                )
            chosen.append(profile.squeezed(rows))
        return tuple(chosen)

    def squeezed(self, config: ModelConfig) -> Trace:
        """The trace for a model with fewer rows: `StackProfile.squeezed` for each of its features."""
        profiles = self.for_model(config, squeeze=True)
        named = zip(profiles, config.features, strict=True)
        return Trace(tuple(replace(profile, feature=feature.name) for profile, feature in named))

    def write(self, out: Path) -> None:
        """Write an .npz file; see docs/traffic.md.

        Raises:
            OutputError: it cannot be written.
        """
        with atomic_file(out) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                features=np.array([profile.feature for profile in self.profiles]),
                lines=np.array([profile.lines for profile in self.profiles], np.int64),
                accesses=np.array([profile.accesses for profile in self.profiles], np.int64),
                sizes=np.array([profile.distances.size for profile in self.profiles], np.int64),
                distances=np.concatenate([profile.distances for profile in self.profiles]),
                cumulative=np.concatenate([profile.cumulative for profile in self.profiles]),
            )

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read what `write` wrote, or the text files of facebookresearch/dlrm.

        Those hold one table each, in three lines: its ids, the distances, their cumulative probabilities. In the name
        of the file the last `j` stands for the number of the table, from 0 on; without a `j` the one file stands for
        every feature.

        Raises:
            DataError: there is no such file, or it is no trace.
        """
        if path.suffix == ".npz":
            return cls._read_npz(path)
        before, j, after = path.name.rpartition("j")
        if not j or path.is_file():
            return cls((_read_text(path, EVERY_FEATURE),))
        profiles: list[StackProfile] = []
        for number in count():
            of_table = path.with_name(f"{before}{number}{after}")
            if number and not of_table.is_file():
                return cls(tuple(profiles))
            profiles.append(_read_text(of_table, str(number)))
        raise AssertionError("count() does not end")

    @classmethod
    def _read_npz(cls, path: Path) -> Trace:
        try:
            arrays = read_npz(path)
        except BundleError as err:
            raise DataError(str(err)) from err
        missing = [name for name in _ARRAYS if name not in arrays]
        if missing or str(arrays["format"]) != _FORMAT:
            raise DataError(
                f"{path} is no trace: it lacks {', '.join(missing) or 'a format that this release knows'}. Make one "
                "with `dlrm-deploy trace profile`."
            )
        _, features, lines, accesses, sizes, distances, cumulative = (arrays[name] for name in _ARRAYS)
        whole = all(array.dtype == np.int64 for array in (lines, accesses, sizes, distances))
        fits = features.ndim == 1 and lines.shape == accesses.shape == sizes.shape == features.shape
        if not (whole and fits and cumulative.dtype == np.float64 and np.all(sizes > 0)) or not (
            distances.shape == cumulative.shape == (sizes.sum(),)
        ):
            raise DataError(f"{path} is a damaged trace: its arrays do not fit one another. Profile the traffic again.")
        ends = np.cumsum(sizes)
        try:
            return cls(
                tuple(
                    StackProfile(
                        feature=str(features[f]),
                        lines=int(lines[f]),
                        accesses=int(accesses[f]),
                        distances=distances[end - sizes[f] : end],
                        cumulative=cumulative[end - sizes[f] : end],
                    )
                    for f, end in enumerate(ends)
                )
            )
        except DataError as err:
            raise DataError(f"{path}: {err}") from err


def _read_text(path: Path, feature: str) -> StackProfile:
    try:
        # Later releases of NumPy write np.int64(3) and np.float64(0.5) where the format says 3 and 0.5.
        text = re.sub(r"np\.\w+\(([^()]*)\)", r"\1", path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"cannot read the trace {path}: {err}.") from err
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 3:
        raise DataError(
            f"{path} has {len(lines)} lines, and a trace has three: ids, stack distances, cumulative probabilities."
        )
    try:
        ids, distances = (np.array([int(word) for word in line.split(",")], np.int64) for line in lines[:2])
        cumulative = np.array([float(word) for word in lines[2].split(",")])
        return StackProfile(feature=feature, lines=np.unique(ids).size, distances=distances, cumulative=cumulative)
    except (ValueError, OverflowError) as err:
        raise DataError(f"{path} is no trace: {err}. Its three lines are numbers with commas between them.") from err
    except DataError as err:
        raise DataError(f"{path}: {err}") from err


def profile_batches(batches: Iterable[Batch], config: ModelConfig | None = None) -> Trace:
    """Profile recorded traffic: consecutive batches of one model.

    Args:
        batches: at least one id of each feature that is to have a profile; a feature without ids gets none.
        config: the model, for the names of its features and their modulo. None: features are numbers.

    Raises:
        BatchError: a batch does not fit the model.
        DataError: no ids at all, or batches with different numbers of features.
        EngineError: the native library is not there.
    """
    from dlrm_deploy.engines.lru_stack import stack_distances

    pieces: list[list[npt.NDArray[np.int32] | LongArray]] = []
    for batch in batches:
        if batch.batch_size == 0:
            continue
        if config is not None:
            batch.check_fits(config)
        bounds = batch.offsets[:: batch.batch_size]
        pieces = pieces or [[] for _ in bounds[1:]]
        if len(pieces) != bounds.size - 1:
            raise DataError(f"a batch has {bounds.size - 1} features, and those before it {len(pieces)}.")
        ids = batch.indices if config is None else batch.reduced_ids(config)
        for f, of_feature in enumerate(pieces):
            of_feature.append(ids[bounds[f] : bounds[f + 1]])
    profiles = []
    for f, of_feature in enumerate(pieces):
        distinct, lines = np.unique(np.concatenate(of_feature), return_inverse=True)
        of_feature.clear()
        if distinct.size:
            name = str(f) if config is None else config.features[f].name
            distances = stack_distances(lines.astype(np.int64), distinct.size)
            profiles.append(StackProfile.of_distances(name, distinct.size, distances))
    if not profiles:
        raise DataError("there are no ids to profile: give batches with at least one id.")
    return Trace(tuple(profiles))


class TraceStream:
    """Endless traffic of one model: ids of each feature whose stack distances have the profile's distribution."""

    def __init__(self, trace: Trace, config: ModelConfig, seed: int, *, warm: bool = True) -> None:
        """Begin a stream. Nothing is drawn yet.

        Args:
            trace: profiles, see `Trace.for_model`.
            config: the model.
            seed: the same seed gives the same ids, however many are asked for at a time.
            warm: every id has come before, so that the distances are the profile's from the first one on; what was an
                id's first occurrence in the profile is here the one that has not come for longest. False: begin with
                nothing; an id at a distance that is not possible yet comes for the first time.

        Raises:
            DataError: a feature without a profile, or with more ids than its table has rows.
        """
        self._profiles = trace.for_model(config)
        self._signature = _signature(config)
        self._seed = seed
        self._warm = warm
        self._stacks: list[LruStack | None] = [None] * len(self._profiles)
        self._drawn = [0] * len(self._profiles)

    def fits(self, config: ModelConfig) -> bool:
        """Whether a model has the features and table sizes of the one that the stream was begun for."""
        return _signature(config) == self._signature

    def ids(self, f: int, count: int) -> LongArray:
        """The next `count` ids of feature f, each within its table.

        Raises:
            EngineError: the native library is not there, or no memory (9 bytes an id of the profile).
        """
        from dlrm_deploy.engines.lru_stack import LruStack

        profile, rows = self._profiles[f], self._signature[f][1]
        stack = self._stacks[f]
        if stack is None:
            stack = self._stacks[f] = LruStack(profile.lines, warm=self._warm)
        u = uniform(self._seed, _DRAW, f, np.arange(self._drawn[f], self._drawn[f] + count))
        self._drawn[f] += count
        distances = profile.distances[np.searchsorted(profile.cumulative, u, side="right")]
        return scatter(stack.replay(distances)[0], rows)


def _signature(config: ModelConfig) -> Sequence[tuple[str, int]]:
    return [(feature.name, rows) for feature, rows in zip(config.features, config.feature_rows, strict=True)]
