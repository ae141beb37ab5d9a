"""The operators for PyTorch: plain functions, and `torch.library` custom ops with gradients over two of them.

`pool_bags`, `interact` and `mlp` are the implementation. The custom ops `dlrm_deploy::table_batched_embedding_bag` and
`dlrm_deploy::dot_interaction` wrap them, so that `torch.export` keeps each as one node and training gets a sparse
gradient for the whole table group; they read fp32 rows. Where neither is needed, calling the functions saves the
dispatch. The gradients run in eager mode; `torch.compile` is served forwards only.

All bags of a group go through one `embedding_bag` call over the group's fp32 matrix: 26 calls cost 8 to 12 times as
much. Rows of other formats are gathered and decoded first, some bags at a time.
The contract is docs/operators.md; suffixes: B samples, F features, T slots, N ids, D width, V = T + 1 vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dlrm_deploy.errors import BatchError
from dlrm_deploy.formats import RowFormat
from dlrm_deploy.ops.contract import SCHEMA_FIELDS, BagAttributes, by_format, check_interaction, check_mlp

_DECODED_VALUES = 1 << 20
"""Values of rows that are gathered and decoded at a time: 4 MiB of float32."""


class _Bags(NamedTuple):
    """What to read from the group's matrices, slot-major."""

    rows: Tensor
    """[N] rows of the matrix of their slot's format, int64."""

    offsets: Tensor
    """[T * B + 1] int64."""

    positions: Tensor | None
    """[N] where each row's id stands in `indices`; None where that is 0, 1, 2, ..."""

    divisors: Tensor | None
    """[T * B, 1] ids in each averaged bag, at least 1, and 1 for each summed bag; None where all are summed."""


@lru_cache(maxsize=256)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a later backward pass
        return torch.tensor(values, dtype=torch.int64, device=device)


def _resolve_bags(indices: Tensor, offsets: Tensor | None, attributes: BagAttributes) -> _Bags:
    """Turn ids into rows of the group's matrices, following modulus, index policy and quotient of each slot."""
    a = attributes
    num_features, features = a.num_features, a.features
    device = indices.device
    ids_N = indices.long()  # rows are addressed in 64 bits
    if offsets is None:
        offsets = _fixed_offsets(ids_N, num_features, a.pooling_factors)
    offsets = offsets.long()
    B = (offsets.numel() - 1) // num_features
    T = len(features)

    bounds = offsets[::B].tolist() if B else [0] * (num_features + 1)
    positions_N = None
    if features != tuple(range(num_features)):
        spans = [torch.arange(bounds[f], bounds[f + 1], device=device) for f in features]
        positions_N = torch.cat(spans) if spans else ids_N.new_empty(0)
        ids_N = ids_N[positions_N]
        lengths_TB = offsets.diff().view(num_features, B)[_constant(features, device)]
        offsets = F.pad(lengths_TB.reshape(-1).cumsum(0), (1, 0))

    counts = [bounds[f + 1] - bounds[f] for f in features]
    if len(set(counts)) == 1:  # broadcasting is cheaper than repeating
        ids_N = ids_N.view(T, counts[0])
        slots_N = _Slots(device, None, ids_N.numel())
    else:
        slots_N = _Slots(device, torch.tensor(counts, dtype=torch.int64, device=device), ids_N.numel())

    divisor_TB1 = None
    if any(a.mean):
        averaged_T = _constant(a.mean, device)
        lengths_TB = offsets.diff().view(T, B)
        divisor_TB1 = torch.where(averaged_T[:, None] > 0, lengths_TB, 1).clamp(min=1).view(-1, 1)

    given_N = ids_N
    if any(a.moduli):
        moduli_N = slots_N(a.moduli)
        ids_N = torch.where(moduli_N > 0, ids_N.remainder(moduli_N.clamp(min=1)), ids_N)
    limits_N, kept = slots_N(a.ids), None
    if a.index_policy == "clamp":
        ids_N = torch.minimum(ids_N.clamp(min=0), limits_N - 1)
    elif a.index_policy == "modulo":
        ids_N = torch.remainder(ids_N, limits_N)
    else:
        outside_N = ((ids_N < 0) | (ids_N >= limits_N)).view(-1)
        if a.index_policy == "error":
            if outside_N.any():
                _raise_bad_id(given_N, outside_N, positions_N, offsets, a)
        else:
            kept = (~outside_N).nonzero().view(-1)
            positions_N = kept if positions_N is None else positions_N[kept]
            offsets = F.pad((~outside_N).cumsum(0), (1, 0))[offsets]
    if not a.plain:
        ids_N = _quotients(ids_N, slots_N, a)
    rows_N = (ids_N + slots_N(a.row_starts)).view(-1)
    return _Bags(rows_N if kept is None else rows_N[kept], offsets, positions_N, divisor_TB1)


class _Slots(NamedTuple):
    """Spreads one number a slot over the ids, as a tensor that broadcasts with them."""

    device: torch.device
    counts: Tensor | None
    """[T] ids of each slot; None where all have equally many and ids are [T, n]."""

    total: int

    def __call__(self, values: tuple[int, ...]) -> Tensor:
        values_T = _constant(values, self.device)
        if self.counts is None:
            return values_T[:, None]
        return values_T.repeat_interleave(self.counts, output_size=self.total)


def _quotients(ids_N: Tensor, slots_N: _Slots, a: BagAttributes) -> Tensor:
    """Rows of their slot's table part that valid ids read."""
    rows_N, divisors_N = slots_N(a.rows), slots_N(a.divisors)
    quotients_N = ids_N
    if any(divisor != 1 for divisor in a.divisors):
        quotients_N = ids_N // divisors_N
    if any((n - 1) // divisor >= rows for n, divisor, rows in zip(a.ids, a.divisors, a.rows, strict=True)):
        quotients_N = quotients_N.remainder(rows_N)
    if any(a.divisions):
        divisions_N = slots_N(a.divisions)
        divided_N = ids_N.float() / divisors_N.float()
        by_reciprocal_N = ids_N.float() * divisors_N.float().reciprocal()
        rounded_N = torch.where(divisions_N == 1, divided_N, by_reciprocal_N).long()
        quotients_N = torch.where(divisions_N == 0, quotients_N, torch.minimum(rounded_N, rows_N - 1))
    return quotients_N


def _fixed_offsets(indices: Tensor, num_features: int, pooling_factors: Sequence[int] | None) -> Tensor:
    assert pooling_factors is not None  # checked by the caller: one of the two forms
    B = indices.numel() // sum(pooling_factors)
    if len(set(pooling_factors)) == 1:
        step = pooling_factors[0]
        return torch.arange(0, num_features * B * step + 1, step, device=indices.device)
    lengths_FB = _constant(tuple(pooling_factors), indices.device).repeat_interleave(B)
    return F.pad(lengths_FB.cumsum(0), (1, 0))


def _raise_bad_id(
    ids_N: Tensor, outside_N: Tensor, positions_N: Tensor | None, offsets_TB: Tensor, a: BagAttributes
) -> None:
    """Raise for the lowest position in `indices`; where several slots read it, for the one with the fewest ids."""
    bad = outside_N.nonzero().view(-1)
    bad = bad[:1] if positions_N is None else bad[positions_N[bad] == positions_N[bad].min()]
    bags = torch.searchsorted(offsets_TB, bad, right=True) - 1
    B = (offsets_TB.numel() - 1) // len(a.features)
    limit, slot, i, bag = min(
        (a.ids[bag // B], bag // B, i, bag) for i, bag in zip(bad.tolist(), bags.tolist(), strict=True)
    )
    raise BatchError(
        f"feature {a.features[slot]}, sample {bag % B}, position {i - int(offsets_TB[bag])} of its bag: "
        f"id {int(ids_N.reshape(-1)[i])} is outside [0, {limit}). Hash ids to the table size before scoring, "
        "or choose the index policy clamp, modulo or zero."
    )


def pool_bags(
    weights: Tensor | Mapping[RowFormat, Tensor],
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    attributes: BagAttributes,
) -> Tensor:
    """Pool all bags of one table group, without a gradient; inputs as in docs/operators.md.

    Bags are taken to be well-formed, as those of a `Batch` are; ids are checked. `weights` is the fp32 matrix, or a
    stored matrix for each format that a slot reads, those of bf16 as bit patterns or bfloat16.

    Returns:
        [B, T, D], a view of a new slot-major tensor. Where a slot is not fp32, bit for bit what the reference gives.

    Raises:
        BatchError: an id is out of range under policy `error`.
    """
    bags = _resolve_bags(indices, offsets, attributes)
    matrices = by_format(weights)
    if any(attributes.formats):
        pooled = _pool_stored(matrices, bags, per_sample_weights, attributes)
    else:
        pooled = _pool(matrices["fp32"], bags, per_sample_weights)
    return pooled.view(len(attributes.features), -1, attributes.width_of(matrices)).transpose(0, 1)


def decode_rows(format: RowFormat, stored: Tensor, width: int) -> Tensor:
    """The float32 values [R, width] of stored rows; `dlrm_deploy.formats.decode` for tensors."""
    if format == "bf16":
        stored = stored.view(torch.bfloat16)
    if format not in ("int8", "int4"):
        return stored.float()
    codes = stored[:, :-4]
    if format == "int8":
        values = codes.float()
    else:
        halves = torch.empty(*codes.shape, 2, device=stored.device)
        halves[:, :, 0], halves[:, :, 1] = codes & 15, codes >> 4
        values = halves.flatten(1)[:, :width]
    # Not contiguous(), which leaves the end of a single row where it is: in a row of odd width, at an odd address.
    scale_bias = stored[:, -4:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    return values.mul_(scale_bias[:, :1]).add_(scale_bias[:, 1:])


def _pool_stored(
    matrices: Mapping[RowFormat, Tensor], bags: _Bags, per_sample_weights: Tensor | None, a: BagAttributes
) -> Tensor:
    """[T * B, D]. Weights are multiplied before, because embedding_bag would fuse that with the addition."""
    assert a.width is not None  # there are formats
    pooled = torch.zeros(bags.offsets.numel() - 1, a.width, device=bags.rows.device)
    for format, first_bag, end_bag, begin, end in _chunks(bags.offsets, a):
        values = decode_rows(format, matrices[format].index_select(0, bags.rows[begin:end]), a.width)
        if per_sample_weights is not None:
            positions = slice(begin, end) if bags.positions is None else bags.positions[begin:end]
            values *= per_sample_weights[positions, None]
        pooled[first_bag:end_bag] = F.embedding_bag(
            torch.arange(end - begin, device=values.device),
            values,
            bags.offsets[first_bag : end_bag + 1] - begin,
            mode="sum",
            include_last_offset=True,
        )
    return pooled if bags.divisors is None else pooled / bags.divisors


def _chunks(offsets_TB: Tensor, a: BagAttributes) -> Iterator[tuple[RowFormat, int, int, int, int]]:
    """Format, first and last bag, first and last row of consecutive bags that hold ids, of one format each.

    Each has at most `_DECODED_VALUES` values, or is one bag.
    """
    assert a.width is not None
    offsets = offsets_TB.numpy(force=True)
    formats, T = a.slot_formats, len(a.features)
    B = (len(offsets) - 1) // T
    ids = max(1, _DECODED_VALUES // a.width)
    ends = [t for t in range(1, T + 1) if t == T or formats[t] != formats[t - 1]]
    bag = 0
    for t in ends:
        while bag < t * B:
            fitting = int(offsets[: t * B + 1].searchsorted(offsets[bag] + ids, side="right")) - 1
            last = max(bag + 1, fitting)
            if offsets[last] > offsets[bag]:
                yield formats[t - 1], bag, last, int(offsets[bag]), int(offsets[last])
            bag = last


def _pool(weights: Tensor, bags: _Bags, per_sample_weights: Tensor | None) -> Tensor:
    if per_sample_weights is not None and bags.positions is not None:
        per_sample_weights = per_sample_weights[bags.positions]
    if bags.offsets.numel() == 1:  # a batch of zero samples, which embedding_bag refuses
        return weights.new_zeros(0, weights.shape[1])
    pooled = F.embedding_bag(
        bags.rows,
        weights.detach(),
        bags.offsets,
        mode="sum",
        include_last_offset=True,
        per_sample_weights=per_sample_weights,
    )
    return pooled if bags.divisors is None else pooled / bags.divisors


def interact(dense: Tensor, embeddings: Tensor, self_interaction: bool) -> Tensor:
    """Append the products of all pairs of vectors to the dense one: [B, D] and [B, T, D] to [B, D + P]."""
    x_BVD = torch.cat([dense.unsqueeze(1), embeddings], dim=1)
    V = x_BVD.shape[1]
    dots_BVV = torch.bmm(x_BVD, x_BVD.transpose(1, 2))
    pairs_BP = dots_BVV.flatten(1).index_select(1, _triangle(int(V), self_interaction, dense.device))
    return torch.cat([dense, pairs_BP], dim=1)


@lru_cache(maxsize=64)
def _triangle(V: int, self_interaction: bool, device: torch.device) -> Tensor:
    """[P] positions in the flattened [V, V] products, in the order of the contract: row by row."""
    with torch.inference_mode(False):
        i, j = torch.tril_indices(V, V, 0 if self_interaction else -1, device=device)
        flat: Tensor = i * V + j
        return flat


def mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], relu_last: bool = True) -> Tensor:
    """A chain of dense layers on bfloat16 inputs and weights, without a gradient; docs/operators.md's Mlp.

    Args:
        x: [B, K] float32.
        layers: of each layer the weight [N, K] bfloat16 and the bias [N] float32.
        relu_last: whether a ReLU stands behind the last layer too.

    Returns:
        [B, N of the last layer] float32. Products and sums are float32, in an order of the library's own.

    Raises:
        BatchError: an input breaks the contract.
    """
    check_mlp(x, layers)
    for number, (weight, bias) in enumerate(layers):
        x = F.linear(x.bfloat16().float(), weight.float(), bias)
        if relu_last or number < len(layers) - 1:
            x = x.relu()
    return x


# The custom ops

_SCHEMA = (
    "(Tensor weights, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int num_features, int[] features, "
    "int[] row_starts, int[] rows, int[] ids, int[] moduli, int[] divisors, int[] divisions, int[] mean, "
    "int[]? pooling_factors, str index_policy) -> Tensor"
)


def _attributes(values: Sequence[Any]) -> BagAttributes:
    return BagAttributes(**dict(zip(SCHEMA_FIELDS, values, strict=True)))


@torch.library.custom_op("dlrm_deploy::table_batched_embedding_bag", mutates_args=(), schema=_SCHEMA)
def table_batched_embedding_bag(
    weights: Tensor, indices: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, *attributes: Any
) -> Tensor:
    """`pool_bags` as one differentiable node that checks all of its inputs.

    `attributes` are `BagAttributes.schema_values()`. Returns [B, T, D].
    """
    node = _attributes(attributes)
    node.check(weights, indices, offsets, per_sample_weights)
    return pool_bags(weights, indices, offsets, per_sample_weights, node).contiguous()


@table_batched_embedding_bag.register_fake
def _(
    weights: Tensor, indices: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, *attributes: Any
) -> Tensor:
    node = _attributes(attributes)
    if offsets is not None:
        B = (offsets.shape[0] - 1) // node.num_features
    else:
        assert node.pooling_factors is not None
        B = indices.shape[0] // sum(node.pooling_factors)
    return weights.new_empty(B, len(node.features), weights.shape[1])


def _save_bags(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, indices, offsets, per_sample_weights, *attributes = inputs
    ctx.save_for_backward(weights, indices, offsets, per_sample_weights)
    ctx.attributes = _attributes(attributes)


def _bags_backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
    weights, indices, offsets, per_sample_weights = ctx.saved_tensors
    bags = _resolve_bags(indices, offsets, ctx.attributes)
    grad_TBD = grad_BTD.transpose(0, 1).reshape(-1, weights.shape[1])
    if bags.divisors is not None:
        grad_TBD = grad_TBD / bags.divisors
    bag_N = torch.arange(len(grad_TBD), device=indices.device).repeat_interleave(
        bags.offsets.diff(), output_size=bags.rows.numel()
    )
    grad_ND = grad_TBD.index_select(0, bag_N)  # one row per id that was read
    grad_weights = grad_per_sample = None
    if ctx.needs_input_grad[3]:
        products_N = (grad_ND * weights[bags.rows]).sum(1)
        if bags.positions is not None:
            products_N = torch.zeros_like(per_sample_weights).index_add(0, bags.positions, products_N)
        grad_per_sample = products_N
    if ctx.needs_input_grad[0]:
        if per_sample_weights is not None:
            scale_N = per_sample_weights if bags.positions is None else per_sample_weights[bags.positions]
            grad_ND = grad_ND * scale_N[:, None]
        grad_weights = torch.sparse_coo_tensor(
            bags.rows[None], grad_ND, weights.shape, check_invariants=False, is_coalesced=False
        )
    return grad_weights, None, None, grad_per_sample, *(None for _ in SCHEMA_FIELDS)


table_batched_embedding_bag.register_autograd(_bags_backward, setup_context=_save_bags)


@torch.library.custom_op(
    "dlrm_deploy::dot_interaction",
    mutates_args=(),
    schema="(Tensor dense, Tensor embeddings, bool self_interaction) -> Tensor",
)
def dot_interaction(dense: Tensor, embeddings: Tensor, self_interaction: bool) -> Tensor:
    """`interact` as one differentiable node that checks its inputs. Returns [B, D + P]."""
    check_interaction(dense, embeddings)
    return interact(dense, embeddings, self_interaction)


@dot_interaction.register_fake
def _(dense: Tensor, embeddings: Tensor, self_interaction: bool) -> Tensor:
    V = embeddings.shape[1] + 1
    pairs = V * (V + 1 if self_interaction else V - 1) // 2
    return dense.new_empty(dense.shape[0], dense.shape[1] + pairs)


def _save_vectors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, embeddings, ctx.self_interaction = inputs
    ctx.save_for_backward(dense, embeddings)


def _interaction_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dense, embeddings = ctx.saved_tensors
    x_BVD = torch.cat([dense.unsqueeze(1), embeddings], dim=1)
    B, V, D = x_BVD.shape
    # Product (i, j) sends grad * x_j to x_i and grad * x_i to x_j: one symmetric matrix, read by a gather.
    grad_pairs_BP = F.pad(grad[:, D:], (0, 1))  # the added zero stands for pairs without a product
    grad_BVV = grad_pairs_BP.index_select(1, _mirror(int(V), ctx.self_interaction, grad.device)).view(B, V, V)
    if ctx.self_interaction:
        grad_BVV = grad_BVV * (1 + torch.eye(V, dtype=grad.dtype, device=grad.device))
    grad_BVD = torch.bmm(grad_BVV, x_BVD)
    return grad[:, :D] + grad_BVD[:, 0], grad_BVD[:, 1:], None


@lru_cache(maxsize=64)
def _mirror(V: int, self_interaction: bool, device: torch.device) -> Tensor:
    """[V * V] position of each pair among the P products, P where it has none."""
    with torch.inference_mode(False):
        triangle_P = _triangle(V, self_interaction, device)
        P = triangle_P.numel()
        mirror = torch.full((V * V,), P, device=device)
        order = torch.arange(P, device=device)
        mirror[triangle_P] = order
        mirror[triangle_P % V * V + triangle_P // V] = order
        return mirror


dot_interaction.register_autograd(_interaction_backward, setup_context=_save_vectors)
