"""The stages of a model one by one: what each gives for the inputs that an engine had there, and how exactly.

Each stage is computed in float64 from the *engine's own* inputs to it, so that an error shows where it is made and
nowhere else. The bound is not a tolerance but the largest error that float32 rounding can make in any order of
additions (`_bound`). Rows of any format are what they decode to; MLPs are fp32 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import LOG_SHIFTS
from dlrm_deploy.formats import decode
from dlrm_deploy.model.keys import DENSE_VECTORS, WIDE_BIAS, WIDE_DENSE, bottom_keys, branch_keys, cross_keys, top_keys
from dlrm_deploy.model.stage_names import (
    DENSE_LOG,
    INTERACTIONS,
    LOGITS,
    PROBABILITIES,
    cross_name,
    mlp_name,
    path_name,
    pooled_name,
    run_name,
)
from dlrm_deploy.model.vectors import Run, path_features, runs, wide_places
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.ops.reference import table_rows
from dlrm_deploy.tables import TablePart

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

BLOCK_VALUES = 1 << 20
"""Table values that are added up at a time: 8 MiB in float64."""

_UNIT = 2.0**-24
_TINY = 1.2e-38  # no less than the smallest normal float32: what is smaller may be taken for zero
_MOST = float(np.finfo(np.float32).max)

Seen = Mapping[str, FloatArray]
"""The graph's tensors by name."""

Value = tuple[DoubleArray, DoubleArray]
"""What a stage should give, and the largest error of float32 rounding, of one shape."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the model, and the tensor of the graph that holds what it gives."""

    name: str
    """For people: "feature user, table users", "bottom MLP, layer 1", "interaction", "top MLP, layer 0", ..."""

    tensor: str
    reference: Callable[[Seen], Value]
    """From the graph's tensors to the value; samples are the first axis. A bound that is not finite says nothing."""

    part: tuple[slice, ...] = ()
    """Which part of the tensor belongs to this stage, behind the first axis."""


class Stages:
    """The stages of a bundle's model for one batch, from the tables to the probabilities."""

    def __init__(self, bundle: Bundle, batch: Batch) -> None:
        self._config = bundle.config
        self._batch = batch
        self._weights = {key: array.astype(np.float64) for key, array in bundle.dense_weights().items()}
        self._tables = bundle.map_groups()
        self._layouts = bundle.manifest.layouts
        self._formats = bundle.manifest.table_formats
        self._runs = runs(self._config)
        self._groups = self._config.groups
        paths = [path_name(self._config.features[f].name) for f, _ in path_features(self._config)]
        self._outputs = [*(pooled_name(group.name) for group in self._groups), *paths]

    def __iter__(self) -> Iterator[Stage]:
        config = self._config
        yield from self._table_stages()
        yield from self._path_stages()
        dense = "dense"
        if config.dense_transform != "none":
            dense = DENSE_LOG
            yield Stage("dense transform", dense, lambda _: self._transform())
        x = dense
        for i, keys in enumerate(bottom_keys(config)):
            x, source = mlp_name("bottom", i), x
            yield Stage(f"bottom MLP, layer {i}", x, partial(self._layer, source, keys))
        yield from self._run_stages()
        yield from self._interaction_stages(x)
        x = INTERACTIONS
        *hidden, last = top_keys(config) or (None,)
        for i, hidden_keys in enumerate(keys for keys in hidden if keys):
            x, source = mlp_name("top", i), x
            yield Stage(f"top MLP, layer {i}", x, partial(self._layer, source, hidden_keys))
        name = f"top MLP, layer {len(config.top_mlp) - 1}" if last else "first-order terms"
        if config.wide and last:
            name += ", and first-order terms"
        if last or config.wide:
            yield Stage(name, LOGITS, partial(self._logits, x, dense, last))
            x = LOGITS
        yield Stage("sigmoid", PROBABILITIES, lambda seen: _sigmoid(seen[x].astype(np.float64)[:, 0]))

    # Tables

    def _table_stages(self) -> Iterator[Stage]:
        for g, group in enumerate(self._groups):
            if not group.slots:
                continue
            attributes = BagAttributes.of(self._config, group, self._formats)
            for t, slot in enumerate(group.slots):
                feature = self._config.features[slot.feature].name
                yield Stage(
                    f"feature {feature}, table {slot.part.name}",
                    self._outputs[g],
                    partial(self._pool, g, t, attributes),
                    (slice(t, t + 1),),
                )

    def _pool(self, g: int, t: int, attributes: BagAttributes, _: Seen) -> Value:
        """[B, 1, D] of a slot."""
        feature, width = attributes.features[t], self._groups[g].width
        bags = self._bags(feature, width)
        for ids in self._blocks(feature, width):
            vectors, weights = self._looked_up(g, t, attributes, ids)
            bags.add(ids, vectors, weights)
        return bags.value()

    def _bounds(self, feature: int) -> npt.NDArray[np.int64]:
        """[B + 1]: where the ids of a feature's bags begin and end."""
        B = self._batch.batch_size
        return self._batch.offsets[feature * B : (feature + 1) * B + 1].astype(np.int64)

    def _bags(self, feature: int, width: int) -> _Bags:
        return _Bags(self._bounds(feature), width, self._config.features[feature].pooling == "mean")

    def _blocks(self, feature: int, width: int) -> Iterator[slice]:
        """The ids of a feature in blocks that hold up to `BLOCK_VALUES` table values."""
        bounds = self._bounds(feature)
        first, last = int(bounds[0]), int(bounds[-1])
        step = max(1, BLOCK_VALUES // width)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last))

    def _looked_up(
        self, g: int, t: int, attributes: BagAttributes, ids: slice
    ) -> tuple[DoubleArray, DoubleArray | None]:
        """The row [n, D] that each id reads, zeros where it reads none, and its weight [n], if there are any."""
        batch = self._batch
        rows, kept = table_rows(batch.indices[ids].astype(np.int64), attributes, t)
        kind = attributes.slot_formats[t]
        vectors = decode(kind, self._tables[g][kind][rows], self._groups[g].width).astype(np.float64)
        vectors[~kept] = 0
        return vectors, None if batch.weights is None else batch.weights[ids].astype(np.float64)

    def _path_stages(self) -> Iterator[Stage]:
        for feature, table in path_features(self._config):
            name = self._config.features[feature].name
            reference = partial(self._path, feature, table.parts, table.path_hidden)
            yield Stage(f"feature {name}, table {table.name}", path_name(name), reference)

    def _path(self, feature: int, parts: Sequence[TablePart], hidden: int, _: Seen) -> Value:
        """[B, 1, W] of a feature of a path table: the MLPs of its ids one by one, in the rows of all parts but one."""
        places = []
        for part in parts:
            g = next(g for g, group in enumerate(self._groups) if part in group.parts)
            kind, row_start = self._layouts[g].place(part.name)
            places.append((g, BagAttributes.of_ids(self._config, feature, part, row_start, kind)))
        W = parts[0].width
        bags = self._bags(feature, W)
        for ids in self._blocks(feature, max(part.width for part in parts)):
            looked_up = [self._looked_up(g, 0, attributes, ids) for g, attributes in places]
            (x, weights), *banks = looked_up
            error = np.zeros_like(x)
            for bank, _weights in banks:
                w1, b1, w2, b2 = np.split(bank, np.cumsum([hidden * W, hidden, W * hidden]), axis=1)
                x, error = _relu(_times_each(w1.reshape(-1, hidden, W), x, error, b1))
                x, error = _times_each(w2.reshape(-1, W, hidden), x, error, b2)
            bags.add(ids, x, weights, error)
        return bags.value()

    # Vectors and interaction

    def _run_stages(self) -> Iterator[Stage]:
        for run in self._runs:
            if len(run.parts) == 1 and run.projection is None:
                continue
            first, last = (self._config.features[f].name for f in (run.first, run.first + run.count - 1))
            names = f"feature {first}" if run.count == 1 else f"features {first} to {last}"
            how = f"{run.combine} of parts" if len(run.parts) > 1 else ""
            how += (" and " if how and run.projection else "") + ("projection" if run.projection else "")
            yield Stage(f"{names}, {how}", run_name(run), partial(self._run, run))

    def _parts(self, run: Run, seen: Seen) -> list[DoubleArray]:
        return [
            seen[self._outputs[output]][:, slot : slot + run.count].astype(np.float64) for output, slot in run.parts
        ]

    def _run(self, run: Run, seen: Seen) -> Value:
        x, *others = self._parts(run, seen)
        error = np.zeros_like(x)
        if run.combine == "concat":
            x = np.concatenate([x, *others], axis=2)
            error = np.zeros_like(x)
        for other in others if run.combine != "concat" else ():
            if run.combine == "add":
                size = np.abs(x) + error + np.abs(other)
                x, error = x + other, error + _bound(1, size, size)
            else:
                product = (np.abs(x) + error) * np.abs(other)
                inputs = np.abs(x) + error + np.abs(other)
                x, error = x * other, error * np.abs(other) + _bound(1, product, inputs)
        return (x, error) if run.projection is None else _times(self._weights[run.projection], x, error)

    def _vectors(self, seen: Seen) -> list[DoubleArray]:
        """[B, count, W] of each run, as the engine had them."""
        return [
            self._parts(run, seen)[0]
            if len(run.parts) == 1 and run.projection is None
            else seen[run_name(run)].astype(np.float64)
            for run in self._runs
        ]

    def _interaction_stages(self, dense: str) -> Iterator[Stage]:
        config = self._config
        if config.interaction in ("dot", "fm"):
            yield Stage("interaction", INTERACTIONS, partial(self._dot, dense))
            return
        if config.interaction == "projection":
            for b, keys in enumerate(branch_keys(config), start=1):
                for i, layer in enumerate(keys):
                    name = mlp_name(f"branch{b}", i)
                    before = mlp_name(f"branch{b}", i - 1)
                    reference = partial(self._layer, before, layer) if i else partial(self._flat_layer, dense, layer)
                    yield Stage(f"interaction, branch {b}, layer {i}", name, reference)
            yield Stage("interaction", INTERACTIONS, partial(self._products, dense))
            return
        if config.interaction == "concat":
            yield Stage("interaction", INTERACTIONS, lambda seen: _exact(self._flat(seen, dense)))
            return
        for i in range(config.cross_layers):
            tensor = INTERACTIONS if i + 1 == config.cross_layers else cross_name(i)
            yield Stage(f"interaction, cross layer {i}", tensor, partial(self._cross, dense, i))

    def _flat(self, seen: Seen, dense: str) -> DoubleArray:
        flat = [v.reshape(v.shape[0], v.shape[1] * v.shape[2]) for v in self._vectors(seen)]
        if not self._config.dense_features:
            return np.concatenate(flat, axis=1)
        return np.concatenate([seen[dense].astype(np.float64), *flat], axis=1)

    def _dot(self, dense: str, seen: Seen) -> Value:
        config = self._config
        pieces = [_exact(x) for x in self._vectors(seen)]
        dense_values = seen[dense].astype(np.float64) if config.dense_features else None
        if dense_values is not None and config.has_dense_vector:
            pieces.insert(0, _exact(dense_values[:, None]))
        elif dense_values is not None:
            each, scaled = np.abs(dense_values)[:, :, None], np.abs(self._weights[DENSE_VECTORS])
            made = dense_values[:, :, None] * self._weights[DENSE_VECTORS]
            pieces.insert(0, (made, _bound(1, each * scaled, each + scaled)))
        x, error = (np.concatenate(arrays, axis=1) for arrays in zip(*pieces, strict=True))
        size = np.abs(x) + error
        row, column = np.tril_indices(x.shape[1], 0 if config.self_interaction else -1)

        def pairs(left: DoubleArray, right: DoubleArray) -> DoubleArray:
            """[B, P]: what each pair's vectors give in a product of all with all [B, V, V]."""
            products: DoubleArray = (left @ right.swapaxes(1, 2))[:, row, column]
            return products

        width = x.shape[2]
        sums = size.sum(axis=2)
        products, sizes, inputs = pairs(x, x), pairs(size, size), sums[:, row] + sums[:, column]
        bound = _bound(width, sizes, inputs)
        if error.any():
            bound += pairs(error, size) + pairs(size, error)
        if config.interaction == "fm":
            total = sizes.sum(1, keepdims=True)
            carried = bound.sum(1, keepdims=True)
            return products.sum(1, keepdims=True), carried + _bound(products.shape[1], total + carried, total)
        if dense_values is None or not config.has_dense_vector:
            return products, bound
        return (
            np.concatenate([dense_values, products], axis=1),
            np.concatenate([np.zeros_like(dense_values), bound], axis=1),
        )

    def _products(self, dense: str, seen: Seen) -> Value:
        config = self._config
        width = config.vector_widths[0]
        ends = (len(config.branch1) - 1, len(config.branch2) - 1)
        one, two = (seen[mlp_name(f"branch{b}", end)].astype(np.float64) for b, end in zip((1, 2), ends, strict=True))
        B = len(one)
        one, two = one.reshape(B, one.shape[1] // width, width), two.reshape(B, width, two.shape[1] // width)
        products = one @ two
        inputs = np.abs(one).sum(2, keepdims=True) + np.abs(two).sum(1, keepdims=True)
        bound = _bound(width, np.abs(one) @ np.abs(two), inputs)
        dense_values = seen[dense].astype(np.float64)
        flat = (B, products.shape[1] * products.shape[2])
        return (
            np.concatenate([dense_values, products.reshape(flat)], axis=1),
            np.concatenate([np.zeros_like(dense_values), bound.reshape(flat)], axis=1),
        )

    def _cross(self, dense: str, layer: int, seen: Seen) -> Value:
        first = self._flat(seen, dense)
        x = seen[cross_name(layer - 1)].astype(np.float64) if layer else first
        *kernels, bias_key = cross_keys(self._config)[layer]
        bias = self._weights[bias_key]
        if self._config.interaction == "dcn":
            w, v = (self._weights[key] for key in kernels)
            low, low_error = _times(v, x, np.zeros_like(x))
            inner, error = _times(w, low, low_error, bias)
            bias = np.zeros_like(bias)
        else:
            inner, error = _times(self._weights[kernels[0]], x, np.zeros_like(x))
        value = first * inner + bias + x
        largest = np.abs(inner) + error
        size = np.abs(first) * largest + np.abs(bias) + np.abs(x)
        inputs = np.abs(first) + largest + np.abs(bias) + np.abs(x)
        return value, np.abs(first) * error + _bound(3, size, inputs)

    # Layers

    def _transform(self) -> Value:
        shifted = np.maximum(self._batch.dense.astype(np.float64) + LOG_SHIFTS[self._config.dense_transform], 1)
        value = np.log(shifted)
        return value, 2 * _UNIT + 8 * _UNIT * np.abs(value)  # one rounding before the logarithm, a few units in it

    def _layer(self, source: str, keys: tuple[str, str], seen: Seen) -> Value:
        return _relu(self._linear(seen[source].astype(np.float64), keys))

    def _flat_layer(self, dense: str, keys: tuple[str, str], seen: Seen) -> Value:
        return _relu(self._linear(self._flat(seen, dense), keys))

    def _linear(self, x: DoubleArray, keys: tuple[str, str]) -> Value:
        weight, bias = (self._weights[key] for key in keys)
        return _times(weight, x, np.zeros_like(x), bias)

    def _logits(self, source: str, dense: str, last: tuple[str, str] | None, seen: Seen) -> Value:
        x = seen[source].astype(np.float64)
        value, error = self._linear(x, last) if last else _exact(x)
        if not self._config.wide:
            return value, error
        group, first = wide_places(self._config)
        features = len(self._config.features)
        terms = [value, seen[self._outputs[group]][:, first : first + features, 0].astype(np.float64)]
        inputs = np.zeros((len(x), 1))
        if self._config.dense_features:
            dense_values, weight = seen[dense].astype(np.float64), self._weights[WIDE_DENSE][0]
            terms.append(dense_values * weight)
            inputs += (np.abs(dense_values) + np.abs(weight)).sum(1, keepdims=True)
        terms.append(np.broadcast_to(self._weights[WIDE_BIAS], (len(x), 1)))
        every = np.concatenate(terms, axis=1)
        size = np.abs(every).sum(1, keepdims=True) + error
        return every.sum(1, keepdims=True), error + _bound(every.shape[1] + 1, size, inputs + size)


class _Bags:
    """The sums of one feature's bags and their bounds, from the vectors of its ids in blocks of any size."""

    def __init__(self, bounds: npt.NDArray[np.int64], width: int, mean: bool) -> None:
        self._bounds = bounds  # [B + 1]
        self._mean = mean
        shape = (bounds.size - 1, width)
        self._sum, self._size, self._error, self._inputs = (np.zeros(shape) for _ in range(4))

    def add(
        self, ids: slice, vectors: DoubleArray, weights: DoubleArray | None, errors: DoubleArray | None = None
    ) -> None:
        """The vectors [n, W] of the ids in a slice, their weights [n], and how far off each vector is at most."""
        bags = np.searchsorted(self._bounds, np.arange(ids.start, ids.stop), side="right") - 1
        starts = np.flatnonzero(np.diff(bags, prepend=-1))  # bags without ids are not among them

        def put(into: DoubleArray, terms: DoubleArray) -> None:
            into[bags[starts]] += np.add.reduceat(terms, starts)

        largest = np.abs(vectors)
        if errors is not None:
            largest += errors
            put(self._error, errors if weights is None else errors * np.abs(weights)[:, None])
        if weights is None:
            put(self._sum, vectors)
            put(self._size, largest)
            return
        put(self._inputs, largest + np.abs(weights)[:, None])
        put(self._sum, vectors * weights[:, None])
        put(self._size, largest * np.abs(weights)[:, None])

    def value(self) -> Value:
        """[B, 1, W] after pooling."""
        lengths = np.diff(self._bounds)[:, None]
        value, error = self._sum, self._error + _bound(lengths, self._size, self._inputs + self._size)
        if self._mean:
            length = np.maximum(lengths, 1)
            value, error = value / length, error / length
            # The division, and the length as a float32 number.
            error = error + _bound(2, np.abs(value) + error, np.abs(value) + error)
        return value[:, None], error[:, None]


def _times(weight: DoubleArray, x: DoubleArray, error: DoubleArray, bias: DoubleArray | None = None) -> Value:
    """x @ weight.T + bias for x [..., in] that is off by `error` at most, and weight [out, in]."""
    matrix = np.abs(weight).T
    largest = np.abs(x) + error
    size = largest @ matrix
    inputs = largest.sum(-1, keepdims=True) + matrix.sum(0)
    value, terms = x @ weight.T, weight.shape[1]
    if bias is not None:
        value, size, inputs, terms = value + bias, size + np.abs(bias), inputs + np.abs(bias), terms + 1
    carried = error @ matrix if error.any() else 0.0
    return value, carried + _bound(terms, size, inputs)


def _times_each(matrices: DoubleArray, x: DoubleArray, error: DoubleArray, bias: DoubleArray) -> Value:
    """`_times` for vectors [n, in] that have a matrix [n, out, in] and a bias [n, out] each."""
    sizes = np.abs(matrices)
    largest = np.abs(x) + error
    size = np.einsum("nij,nj->ni", sizes, largest) + np.abs(bias)
    inputs = largest.sum(1, keepdims=True) + sizes.sum(2) + np.abs(bias)
    value = np.einsum("nij,nj->ni", matrices, x) + bias
    return value, np.einsum("nij,nj->ni", sizes, error) + _bound(x.shape[1] + 1, size, inputs)


def _exact(x: DoubleArray) -> Value:
    return x, np.zeros_like(x)


def _relu(value: Value) -> Value:
    return np.maximum(value[0], 0), value[1]


def _sigmoid(logits: DoubleArray) -> Value:
    value = np.exp(-np.logaddexp(0, -logits))
    return value, np.full_like(value, 16 * _UNIT)  # libraries approximate it to some units in the last place of 1


def _bound(terms: npt.ArrayLike, size: DoubleArray, inputs: DoubleArray) -> DoubleArray:
    """Largest error of a sum of products in float32, in any order.

    gamma(n) = n u / (1 - n u) times the sum of the products' sizes, u = 2^-24 (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), n one more than `terms`. Below the normal numbers rounding is absolute, and
    some libraries take such numbers for zero: each result may be off by `_TINY`, and each factor too, which the other
    one multiplies. Infinite where n u is 1 or more, and where a sum may be larger than the largest float32.

    Args:
        terms: products that are added up.
        size: the sum of their sizes.
        inputs: the sum of the sizes of their factors.
    """
    n = np.asarray(terms, np.float64) + 1
    gamma = np.where(n * _UNIT < 1, n * _UNIT / np.maximum(1 - n * _UNIT, _UNIT), np.inf)
    bound = gamma * size + _TINY * (2 * n + inputs)
    return np.where(np.isfinite(size) & (size + bound > _MOST), np.inf, bound)
