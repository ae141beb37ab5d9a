"""The stages of a model one by one: what each gives for the inputs that an engine had there, and how exactly.

Each stage is computed in float64 from the *engine's own* inputs to it, so that an error shows where it is made and
nowhere else. The bound is not a tolerance but the largest error that float32 rounding can make in any order of
additions: a sum of n products is off by at most gamma(n) = n u / (1 - n u) times the sum of their sizes, u = 2^-24
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import LOG_SHIFTS
from dlrm_deploy.export import blocks
from dlrm_deploy.model.keys import DENSE_VECTORS, WIDE_BIAS, WIDE_DENSE, bottom_keys, branch_keys, cross_keys, top_keys
from dlrm_deploy.model.vectors import Run, path_features, runs, wide_places
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.ops.reference import table_rows
from dlrm_deploy.tables import TablePart

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

_UNIT = 2.0**-24
_TINY = 1e-37  # products that are flushed to zero

Value = tuple[DoubleArray, DoubleArray]
"""What a stage should give, and the largest error of float32 rounding, of one shape."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the model, and the tensor of the graph that holds what it gives."""

    name: str
    """For people: "feature user, table users", "bottom MLP, layer 1", "interaction", "top MLP, layer 0", ..."""

    tensor: str
    reference: Callable[[Mapping[str, FloatArray]], Value]
    """From the graph's tensors to the value; samples are the first axis."""

    part: tuple[slice, ...] = ()
    """Which part of the tensor belongs to this stage, behind the first axis."""


class Stages:
    """The stages of a bundle's model for one batch, from the tables to the probabilities."""

    def __init__(self, bundle: Bundle, batch: Batch) -> None:
        self._config = bundle.config
        self._batch = batch
        self._weights = {key: array.astype(np.float64) for key, array in bundle.dense_weights().items()}
        self._tables = bundle.map_tables()
        self._runs = runs(self._config)
        self._groups = self._config.groups
        paths = [blocks.path_name(self._config.features[f].name) for f, _ in path_features(self._config)]
        self._outputs = [*(blocks.pooled_name(group.name) for group in self._groups), *paths]

    def __iter__(self) -> Iterator[Stage]:
        config = self._config
        yield from self._table_stages()
        yield from self._path_stages()
        dense = "dense"
        if config.dense_transform != "none":
            dense = "dense_log"
            yield Stage("dense transform", dense, lambda _: self._transform())
        x = dense
        for i, keys in enumerate(bottom_keys(config)):
            x, source = blocks.mlp_name("bottom", i), x
            yield Stage(f"bottom MLP, layer {i}", x, self._layer(source, keys))
        yield from self._run_stages()
        yield from self._interaction_stages(x)
        x = blocks.INTERACTIONS
        *hidden, last = top_keys(config) or (None,)
        for i, hidden_keys in enumerate(keys for keys in hidden if keys):
            x, source = blocks.mlp_name("top", i), x
            yield Stage(f"top MLP, layer {i}", x, self._layer(source, hidden_keys))
        name = f"top MLP, layer {len(config.top_mlp) - 1}" if last else "first-order terms"
        if config.wide and last:
            name += ", and first-order terms"
        if last or config.wide:
            yield Stage(name, blocks.LOGITS, lambda seen, x=x: self._logits(seen, x, dense, last))  # type: ignore[misc]
            x = blocks.LOGITS
        yield Stage("sigmoid", "probabilities", lambda seen: _sigmoid(seen[x].astype(np.float64)[:, 0]))

    # Tables

    def _table_stages(self) -> Iterator[Stage]:
        for g, group in enumerate(self._groups):
            if not group.slots:
                continue
            attributes = BagAttributes.of(self._config, group)
            for t, slot in enumerate(group.slots):
                feature = self._config.features[slot.feature].name
                yield Stage(
                    f"feature {feature}, table {slot.part.name}",
                    self._outputs[g],
                    lambda _, g=g, t=t, a=attributes: self._pool(g, t, a),  # type: ignore[misc]
                    (slice(t, t + 1),),
                )

    def _pool(self, g: int, t: int, attributes: BagAttributes) -> Value:
        """[B, 1, D] of a slot."""
        feature = attributes.features[t]
        rows, kept, weights, bag = self._ids(feature, attributes, t)
        vectors = np.where(kept[:, None], self._tables[g][rows], 0).astype(np.float64)
        return self._add_up(vectors * weights[:, None], np.abs(vectors * weights[:, None]), bag, feature)

    def _ids(
        self, feature: int, attributes: BagAttributes, t: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], DoubleArray, npt.NDArray[np.int64]]:
        """Of each id of a feature: its row, whether it is read at all, its weight, and its sample."""
        batch = self._batch
        B = batch.batch_size
        bounds = batch.offsets[feature * B : (feature + 1) * B + 1].astype(np.int64)
        ids = slice(int(bounds[0]), int(bounds[-1]))
        rows, kept = table_rows(batch.indices[ids].astype(np.int64), attributes, t)
        weights = np.ones(rows.size) if batch.weights is None else batch.weights[ids].astype(np.float64)
        return rows, kept, weights, np.repeat(np.arange(B), np.diff(bounds))

    def _add_up(self, terms: DoubleArray, sizes: DoubleArray, bag: npt.NDArray[np.int64], feature: int) -> Value:
        B = self._batch.batch_size
        value, size = np.zeros((B, terms.shape[1])), np.zeros((B, terms.shape[1]))
        np.add.at(value, bag, terms)
        np.add.at(size, bag, sizes)
        lengths = np.bincount(bag, minlength=B)[:, None]
        bound = _gamma(lengths + 3) * size
        if self._config.features[feature].pooling == "mean":
            value, bound = value / np.maximum(lengths, 1), bound / np.maximum(lengths, 1)
        return value[:, None], bound[:, None]

    def _path_stages(self) -> Iterator[Stage]:
        for feature, table in path_features(self._config):
            name = self._config.features[feature].name
            yield Stage(
                f"feature {name}, table {table.name}",
                blocks.path_name(name),
                lambda _, f=feature, parts=table.parts, h=table.path_hidden: self._path(f, parts, h),  # type: ignore[misc]
            )

    def _path(self, feature: int, parts: Sequence[TablePart], hidden: int) -> Value:
        looked_up = []
        for part in parts:
            g, group = next((g, group) for g, group in enumerate(self._groups) if part in group.parts)
            attributes = BagAttributes.of_ids(self._config, feature, part, group.rows_of(part.name).start)
            rows, kept, weights, bag = self._ids(feature, attributes, 0)
            looked_up.append(np.where(kept[:, None], self._tables[g][rows], 0).astype(np.float64))
        x, *banks = looked_up
        N, W = x.shape
        error = np.zeros_like(x)
        for bank in banks:
            cuts = np.cumsum([hidden * W, hidden, W * hidden])
            w1, b1, w2, b2 = np.split(bank, cuts, axis=1)
            for matrix, bias, shape in ((w1, b1, (hidden, W)), (w2, b2, (W, hidden))):
                m = matrix.reshape(N, *shape)
                error = np.einsum("nij,nj->ni", np.abs(m), error + _gamma(shape[1] + 1) * np.abs(x)) + _UNIT * np.abs(
                    bias
                )
                x = np.einsum("nij,nj->ni", m, x) + bias
                error += 2 * _UNIT * np.abs(x)
                if shape[0] == hidden and matrix is w1:
                    x = np.maximum(x, 0)
        value, bound = self._add_up(x * weights[:, None], np.abs(x * weights[:, None]), bag, feature)
        carried, _ = self._add_up(error * np.abs(weights)[:, None], error, bag, feature)
        return value, bound + carried

    # Vectors and interaction

    def _run_stages(self) -> Iterator[Stage]:
        for run in self._runs:
            if len(run.parts) == 1 and run.projection is None:
                continue
            first, last = (self._config.features[f].name for f in (run.first, run.first + run.count - 1))
            names = f"feature {first}" if run.count == 1 else f"features {first} to {last}"
            how = f"{run.combine} of parts" if len(run.parts) > 1 else ""
            how += (" and " if how and run.projection else "") + ("projection" if run.projection else "")
            tensor = blocks.run_name(run)
            yield Stage(f"{names}, {how}", tensor, lambda seen, run=run: self._run(run, seen))  # type: ignore[misc]

    def _parts(self, run: Run, seen: Mapping[str, FloatArray]) -> list[DoubleArray]:
        return [
            seen[self._outputs[output]][:, slot : slot + run.count].astype(np.float64) for output, slot in run.parts
        ]

    def _run(self, run: Run, seen: Mapping[str, FloatArray]) -> Value:
        parts = self._parts(run, seen)
        if run.combine == "concat":
            x = np.concatenate(parts, axis=2)
            bound = np.zeros_like(x)
        elif run.combine == "add":
            x, bound = np.sum(parts, axis=0), _gamma(len(parts)) * np.sum(np.abs(parts), axis=0)
        else:
            x = np.prod(parts, axis=0)
            bound = _gamma(len(parts)) * np.abs(x)
        if run.projection is None:
            return x, bound
        weight = self._weights[run.projection]
        return x @ weight.T, bound @ np.abs(weight).T + _gamma(weight.shape[1] + 1) * (np.abs(x) @ np.abs(weight).T)

    def _vectors(self, seen: Mapping[str, FloatArray]) -> list[DoubleArray]:
        """[B, count, W] of each run, as the engine had them."""
        return [
            self._parts(run, seen)[0]
            if len(run.parts) == 1 and run.projection is None
            else seen[blocks.run_name(run)].astype(np.float64)
            for run in self._runs
        ]

    def _interaction_stages(self, dense: str) -> Iterator[Stage]:
        config = self._config
        if config.interaction in ("dot", "fm"):
            yield Stage("interaction", blocks.INTERACTIONS, lambda seen: self._dot(seen, dense))
            return
        if config.interaction == "projection":
            for b, keys in enumerate(branch_keys(config), start=1):
                for i, layer in enumerate(keys):
                    source = blocks.mlp_name(f"branch{b}", i - 1) if i else None
                    reference = self._layer(source, layer) if source else self._flat_layer(dense, layer)
                    yield Stage(f"interaction, branch {b}, layer {i}", blocks.mlp_name(f"branch{b}", i), reference)
            yield Stage("interaction", blocks.INTERACTIONS, lambda seen: self._products(seen, dense))
            return
        if config.interaction == "concat":
            yield Stage("interaction", blocks.INTERACTIONS, lambda seen: _exact(self._flat(seen, dense)))
            return
        for i in range(config.cross_layers):
            last = i + 1 == config.cross_layers
            before = f"cross_{i - 1}" if i else None
            yield Stage(
                f"interaction, cross layer {i}",
                blocks.INTERACTIONS if last else f"cross_{i}",
                lambda seen, i=i, before=before: self._cross(seen, dense, i, before),  # type: ignore[misc]
            )

    def _flat(self, seen: Mapping[str, FloatArray], dense: str) -> DoubleArray:
        flat = [vectors.reshape(len(vectors), -1) for vectors in self._vectors(seen)]
        return np.concatenate([seen[dense].astype(np.float64), *flat], axis=1)

    def _dot(self, seen: Mapping[str, FloatArray], dense: str) -> Value:
        config = self._config
        x = self._vectors(seen)
        dense_values = seen[dense].astype(np.float64)
        inexact = 1
        if config.has_dense_vector:
            x.insert(0, dense_values[:, None])
        elif config.dense_features:
            x.insert(0, dense_values[:, :, None] * self._weights[DENSE_VECTORS])
            inexact = 3  # two rounded vectors and their product
        vectors = np.concatenate(x, axis=1)
        row, column = np.tril_indices(vectors.shape[1], 0 if config.self_interaction else -1)
        products = np.einsum("bpd,bpd->bp", vectors[:, row], vectors[:, column])
        sizes = np.einsum("bpd,bpd->bp", np.abs(vectors[:, row]), np.abs(vectors[:, column]))
        bound = _gamma(vectors.shape[2] + inexact) * sizes
        if config.interaction == "fm":
            terms = products.shape[1] + vectors.shape[2] + inexact
            return products.sum(1, keepdims=True), _gamma(terms) * sizes.sum(1, keepdims=True)
        if not config.has_dense_vector:
            return products, bound
        return (
            np.concatenate([dense_values, products], axis=1),
            np.concatenate([np.zeros_like(dense_values), bound], axis=1),
        )

    def _products(self, seen: Mapping[str, FloatArray], dense: str) -> Value:
        width = self._config.vector_widths[0]
        ends = (len(self._config.branch1) - 1, len(self._config.branch2) - 1)
        one, two = (
            seen[blocks.mlp_name(f"branch{b}", end)].astype(np.float64) for b, end in zip((1, 2), ends, strict=True)
        )
        B = len(one)
        one, two = one.reshape(B, one.shape[1] // width, width), two.reshape(B, width, two.shape[1] // width)
        products, sizes = one @ two, np.abs(one) @ np.abs(two)
        dense_values = seen[dense].astype(np.float64)
        flat = (B, products.shape[1] * products.shape[2])
        return (
            np.concatenate([dense_values, products.reshape(flat)], axis=1),
            np.concatenate([np.zeros_like(dense_values), _gamma(width + 1) * sizes.reshape(flat)], axis=1),
        )

    def _cross(self, seen: Mapping[str, FloatArray], dense: str, layer: int, before: str | None) -> Value:
        first = self._flat(seen, dense)
        x = first if before is None else seen[before].astype(np.float64)
        *kernels, bias_key = cross_keys(self._config)[layer]
        bias = self._weights[bias_key]
        if self._config.interaction == "dcn":
            w, v = (self._weights[key] for key in kernels)
            low, low_error = x @ v.T, _gamma(v.shape[1] + 1) * (np.abs(x) @ np.abs(v).T)
            inner = low @ w.T + bias
            error = low_error @ np.abs(w).T + _gamma(w.shape[1] + 2) * (np.abs(low) @ np.abs(w).T + np.abs(bias))
            value = first * inner + x
            return value, np.abs(first) * error + 3 * _UNIT * (np.abs(first * inner) + np.abs(x))
        weight = self._weights[kernels[0]]
        inner = x @ weight.T
        error = _gamma(weight.shape[1] + 1) * (np.abs(x) @ np.abs(weight).T)
        value = first * inner + bias + x
        return value, np.abs(first) * error + 4 * _UNIT * (np.abs(first * inner) + np.abs(x) + np.abs(bias))

    # Layers

    def _transform(self) -> Value:
        shifted = np.maximum(self._batch.dense.astype(np.float64) + LOG_SHIFTS[self._config.dense_transform], 1)
        value = np.log(shifted)
        return value, 2 * _UNIT + 8 * _UNIT * np.abs(value)  # one rounding before the logarithm, a few units in it

    def _layer(self, source: str, keys: tuple[str, str]) -> Callable[[Mapping[str, FloatArray]], Value]:
        return lambda seen: _relu(self._linear(seen[source].astype(np.float64), keys))

    def _flat_layer(self, dense: str, keys: tuple[str, str]) -> Callable[[Mapping[str, FloatArray]], Value]:
        return lambda seen: _relu(self._linear(self._flat(seen, dense), keys))

    def _linear(self, x: DoubleArray, keys: tuple[str, str]) -> Value:
        weight, bias = (self._weights[key] for key in keys)
        value = x @ weight.T + bias
        return value, _gamma(weight.shape[1] + 2) * (np.abs(x) @ np.abs(weight).T + np.abs(bias))

    def _logits(self, seen: Mapping[str, FloatArray], source: str, dense: str, last: tuple[str, str] | None) -> Value:
        x = seen[source].astype(np.float64)
        value, bound = self._linear(x, last) if last else _exact(x)
        if not self._config.wide:
            return value, bound
        size = np.abs(value)
        group, first = wide_places(self._config)
        features = len(self._config.features)
        terms = [seen[self._outputs[group]][:, first : first + features, 0].astype(np.float64)]
        if self._config.dense_features:
            terms.append(seen[dense].astype(np.float64) * self._weights[WIDE_DENSE][0])
        terms.append(np.broadcast_to(self._weights[WIDE_BIAS], (len(x), 1)))
        every = np.concatenate(terms, axis=1)
        size += np.abs(every).sum(1, keepdims=True)
        return value + every.sum(1, keepdims=True), bound + _gamma(every.shape[1] + 3) * size


def _exact(x: DoubleArray) -> Value:
    return x, np.zeros_like(x)


def _relu(value: Value) -> Value:
    return np.maximum(value[0], 0), value[1]


def _sigmoid(logits: DoubleArray) -> Value:
    value = np.exp(-np.logaddexp(0, -logits))
    return value, np.full_like(value, 16 * _UNIT)  # libraries approximate it to some units in the last place of 1


def _gamma(terms: npt.ArrayLike) -> DoubleArray:
    n = np.asarray(terms, np.float64) * _UNIT
    bound: DoubleArray = n / (1 - n) + _TINY
    return bound
