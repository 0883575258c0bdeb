"""The sparse training step on CUDA: Triton kernels with the same algorithm and the same results as sparse_ops.py.

Nothing here waits for the device. Only the device knows the numbers of candidates, active features and ties, so arrays
have a fixed capacity and their lengths stay on the device. Too many candidates, NaN and infinity set a failure flag
(OVERFLOW, NOT_FINITE). A step whose flag is set changes nothing; training_step.py reads it and repeats the step
with more capacity, or reports what is not finite. All sums have a fixed order, so steps are deterministic.

The screen is in float16. Tensor cores multiply it as fast as bfloat16, and with 3 more bits the bound is 8 times as
tight, so there are fewer candidates. Scaling by powers of 2 keeps the numbers in float16's narrow range: each row of x
is scaled to a norm of 8 to 16, and W by W_SCALE. If weights are so large that a product might overflow (LARGEST), the
step is dense.

A selection, over z [B, F] in float16 (see sparse_ops.py for the bound on its error):

    round_rows         x and W in float16, and what bounds their rounding errors
    group_maxima       the maxima of groups of GROUP columns of z, and the value that each group reaches for certain
    threshold_key      a threshold that at least B·k entries of z reach: a radix selection over these values
    find_candidates,   which entries may reach it, in row-major order: marked per group and counted per row, summed,
    place_candidates,  written
    write_candidates
    refine             the candidates' values in float32
    threshold_key or   the exact threshold, over the batch or of every row
    row_threshold_keys
    count_kept,        the selected entries, ties to the first, in row-major order
    place_rows,
    write_kept

Products over the selected entries are row-major (spmm) or feature-major (decode_gradients, spmm_t). A feature with more
than CHUNK entries is split, and its parts are added in order.

With TRITON_INTERPRET=1 the kernels run on CPU tensors. The tests use that where there is no GPU.
"""

import math
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from console import InputError
from sparse_ops import NOT_FINITE, OVERFLOW, full_precision

CHUNK = 64  # entries of a feature that one program sums
DIGITS = (8, 8, 8, 7)  # bits per round of a radix selection: the 31 bits of a nonnegative float
LARGEST_INDEX = 2**31 - 2**12  # places in [B, n] are 32-bit integers, and a program computes some after its last
GROUP = 64  # columns of a group, at most: their candidates are the bits of an int64
W_SCALE = tl.constexpr(8.0)
# Norm of an encoder column, and offset: 16 · 8 · 250 + 8 · 8 · 250 is below the largest float16, 65504.
LARGEST = tl.constexpr(250.0)
ROUND_DOWN = tl.constexpr(1 - 2.0**-11)  # half a unit in the last place of float16
SUBNORMAL = tl.constexpr(2.0**-24)  # the smallest float16: twice the largest rounding error near 0


# Selection


@triton.jit
def round_rows(
    source, offset, rounded, norms, scales, n, d, width, smallest,
    OF_X: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A scaled row in float16 and five numbers in `norms` [5, n]: the norms of the scaled row, of its rounding error,
    and of the rounded row, what is left over of the offset, and the offset.

    A row of x has the power of 2 as its scale that makes its norm 8 to 16 (norms below `smallest` count as `smallest`);
    times W_SCALE, it is stored in `scales`. The offset of a row of W is written as PARTS numbers behind it, whose sum
    it is; x has its scale there.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    value = tl.load(source + row * d + col, mask=col < d, other=0.0)
    behind = tl.arange(0, 16)
    parts = tl.zeros([16], tl.float32)
    left = 0.0
    size = 0.0
    if OF_X:
        norm = tl.maximum(tl.sqrt(tl.sum(value * value, axis=0)), smallest)
        exponent = (norm.to(tl.int32, bitcast=True) >> 23) & 255
        scale = ((257 - exponent) << 23).to(tl.float32, bitcast=True)  # 2 ** (3 - (exponent - 127))
        tl.store(scales + row, scale * W_SCALE)
        value = value * scale
        parts = tl.where(behind < PARTS, scale, 0.0)
    else:
        value = value * W_SCALE
        if PARTS > 0:
            size = tl.abs(tl.load(offset + row))
            left = tl.load(offset + row) * W_SCALE
            for i in tl.static_range(PARTS):
                part = left.to(tl.float16).to(tl.float32)
                parts = tl.where(behind == i, part, parts)
                left -= part
    low = value.to(tl.float16)
    tl.store(rounded + row * width + col, low, mask=col < d)
    tl.store(rounded + row * width + d + behind, parts.to(tl.float16), mask=d + behind < width)
    low = low.to(tl.float32)
    rest = value - low
    tl.store(norms + row, tl.sqrt(tl.sum(value * value, axis=0)))
    tl.store(norms + n + row, tl.sqrt(tl.sum(rest * rest, axis=0)))
    tl.store(norms + 2 * n + row, tl.sqrt(tl.sum(low * low, axis=0) + tl.sum(parts * parts, axis=0)))
    tl.store(norms + 3 * n + row, tl.abs(left) / W_SCALE)
    tl.store(norms + 4 * n + row, size)


@triton.jit
def group_maxima(
    z, norms, scales, limits, errors, maxima, reached, num_rows, num_features, num_groups, accumulation,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Per group, the maximum of z, and a value that its largest entry reaches for certain; per row, the bound on the
    error of z before its last rounding.

    `limits` are the largest `norms` of W; accumulation · ‖x16‖ ‖w16‖ bounds the error of sums of products.
    """
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    error = tl.load(norms + num_rows + row) * tl.load(limits) + scale * tl.load(limits + 3) + SUBNORMAL
    error += tl.load(norms + 2 * num_rows + row) * (tl.load(limits + 1) + accumulation * tl.load(limits + 2))
    error *= 1 + 1e-4  # for the rounding of the norms
    tl.store(errors + row, error)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(z + row * num_features + col, mask=col < num_features, other=-float("inf")).to(tl.float32)
    top = tl.max(value, axis=1)
    at, there = row * num_groups + group, group < num_groups
    tl.store(maxima + at, top.to(tl.float16), mask=there)
    tl.store(reached + at, (top * ROUND_DOWN - error) / scale, mask=there)


@triton.jit
def find_candidates(
    z, maxima, scales, errors, threshold, stride, groups, hits, num_hot, counts, num_features, num_groups,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which entries may reach the threshold of their row. Writes for each row: the groups whose maximum may (`groups`
    [B, G], of which the first `num_hot` are used), one bit for each of their entries that may (`hits`), and the number
    of such entries (`counts`).
    """
    row = tl.program_id(0).to(tl.int64)
    level = tl.load(threshold + row * stride).to(tl.float32, bitcast=True)
    # Rounding is monotone: it costs no margin.
    level = (level * tl.load(scales + row) - tl.load(errors + row)).to(tl.float16).to(tl.float32)
    n = 0
    for first in range(0, num_groups, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)
        there = group < num_groups
        hot = there & (tl.load(maxima + row * num_groups + group, mask=there, other=0.0).to(tl.float32) >= level)
        tl.store(groups + row * num_groups + n + tl.cumsum(hot.to(tl.int32), axis=0) - 1, group, mask=hot)
        n += tl.sum(hot.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads of the program read what is stored above
    number = tl.arange(0, GROUP)[None, :]
    count = 0
    for first in range(0, n, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        col = tl.load(groups + row * num_groups + i, mask=i < n, other=0)[:, None] * GROUP + number
        inside = (i < n)[:, None] & (col < num_features)
        value = tl.load(z + row * num_features + col, mask=inside, other=-float("inf")).to(tl.float32)
        hit = inside & (value >= level)
        tl.store(hits + row * num_groups + i, tl.sum(hit.to(tl.int64) << number, axis=1), mask=i < n)
        count += tl.sum(tl.sum(hit.to(tl.int32), axis=1), axis=0)
    tl.store(num_hot + row, n)
    tl.store(counts + row, count)


@triton.jit
def place_candidates(
    counts, errors, limits, row_offsets, found, failure, num_rows, capacity,
    NOT_FINITE: tl.constexpr, OVERFLOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: where the candidates of each row begin, how many there are, and what has failed."""
    total = tl.zeros([], tl.int64)
    broken = 0
    tl.store(row_offsets, 0)
    for first in range(0, num_rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.load(counts + i, mask=i < num_rows, other=0).to(tl.int64)
        ends = tl.minimum(total + tl.cumsum(count, axis=0), capacity)
        tl.store(row_offsets + i + 1, ends.to(tl.int32), mask=i < num_rows)
        total += tl.sum(count, axis=0)
        error = tl.load(errors + i, mask=i < num_rows, other=0.0)
        broken = tl.maximum(broken, tl.max(tl.where(error < float("inf"), 0, 1), axis=0))  # NaN is not less
    # Whether no product can have overflowed.
    fits = (tl.load(limits) < LARGEST * W_SCALE) & (tl.load(limits + 4) < LARGEST)
    total = tl.where(fits, total, 1 << 62)
    tl.store(found, total)
    tl.store(failure, (broken * NOT_FINITE + tl.where(total > capacity, OVERFLOW, 0)).to(tl.int64))


@triton.jit
def number_of_bits(bits):
    bits -= (bits >> 1) & 0x5555555555555555  # sums of neighbouring bits, in the place of both; then of 4 and of 8
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((bits * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def write_candidates(
    groups, hits, num_hot, row_offsets, cols, capacity, num_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The columns of a row's candidates."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(row_offsets + row)
    n = tl.load(num_hot + row)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        group = tl.load(groups + row * num_groups + i, mask=i < n, other=0)
        bits = tl.load(hits + row * num_groups + i, mask=i < n, other=0)
        count = number_of_bits(bits)
        at = place + tl.cumsum(count, axis=0) - count
        for _ in range(tl.max(count, axis=0)):
            lowest = bits & -bits
            number = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127  # its exponent
            tl.store(cols + at, group * GROUP + number, mask=(bits != 0) & (at < capacity))
            bits ^= lowest
            at += 1
        place += tl.sum(count, axis=0)


@triton.jit
def refine(x, W, row_offsets, cols, values, d, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """x[row] · W[col] in float32 at the candidates of a row."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    o = tl.arange(0, BLOCK_D)
    x_row = tl.load(x + row * d + o, mask=o < d, other=0.0)
    for first in range(start, end, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        col = tl.load(cols + i, mask=i < end, other=0).to(tl.int64)
        w = tl.load(W + col[:, None] * d + o[None, :], mask=(i < end)[:, None] & (o < d)[None, :], other=0.0)
        tl.store(values + i, tl.sum(w * x_row[None, :], axis=1), mask=i < end)


@triton.jit
def order_key(value):
    """The value's bits, which have the order of the values; 0 if the value is not positive."""
    return tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def count_digits(values, length, state, histogram, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Histogram of the next digit of the positive keys that begin with state[0]. Integer atomics are deterministic."""
    start = tl.program_id(0) * BLOCK
    n = tl.load(length)
    if start < n:
        i = start + tl.arange(0, BLOCK)
        key = order_key(tl.load(values + i, mask=i < n, other=0.0))
        counted = (i < n) & (key > 0) & ((key >> (SHIFT + BITS)) == tl.load(state))
        counts = tl.histogram((key >> SHIFT) & ((1 << BITS) - 1), 1 << BITS, mask=counted)
        tl.atomic_add(histogram + tl.arange(0, 1 << BITS), counts, mask=counts > 0)


@triton.jit
def pick_digit(histogram, state, k, FIRST: tl.constexpr, BITS: tl.constexpr, UNUSED: tl.constexpr):
    """Find the largest digit that at least `wanted` keys reach: state[1], or k in the FIRST round. Append it to the key
    in state[0], and then UNUSED zero bits. state[1] becomes the number wanted among the keys with this digit.
    """
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + bins)
    wanted = k if FIRST else tl.load(state + 1)
    digit = tl.max(tl.where(tl.cumsum(counts, axis=0, reverse=True) >= wanted, bins, 0), axis=0)
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, counts, 0), axis=0))
    tl.store(state, ((tl.load(state) << BITS) | digit) << UNUSED)
    tl.store(histogram + bins, tl.zeros_like(counts))


@triton.jit
def row_keys_kernel(values, row_offsets, k, state, BLOCK: tl.constexpr):
    """threshold_key for each row: four digits of 8 bits, one after the other."""
    row = tl.program_id(0)
    start, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    bins = tl.arange(0, 256)
    key = 0
    wanted = k
    for digit_number in tl.static_range(4):
        shift = 24 - 8 * digit_number
        counts = tl.zeros([256], tl.int32)
        for first in range(start, end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            keys = order_key(tl.load(values + i, mask=i < end, other=0.0))
            counted = (i < end) & (keys > 0)
            if digit_number > 0:
                counted = counted & ((keys >> (shift + 8)) == key)
            counts += tl.histogram((keys >> shift) & 255, 256, mask=counted)
        digit = tl.max(tl.where(tl.cumsum(counts, axis=0, reverse=True) >= wanted, bins, 0), axis=0)
        wanted = wanted - tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        key = (key << 8) | digit
    tl.store(state + row * 2, key)
    tl.store(state + row * 2 + 1, wanted)


@triton.jit
def compare(values, cols, offset, margin, i, end, key, ABOVE: tl.constexpr):
    """Candidates -> (values, kept for certain, tied with the threshold)."""
    value = tl.load(values + i, mask=i < end, other=0.0)
    if ABOVE:
        col = tl.load(cols + i, mask=i < end, other=0)
        over = (i < end) & (value + tl.load(offset + col) > -margin)
        return value, over, over & (i < 0)
    keys = order_key(value)
    return value, (i < end) & (keys > key), (i < end) & (keys == key) & (key > 0)


@triton.jit
def count_kept(
    values, cols, offset, margin, row_offsets, state, counts,
    PER_ROW: tl.constexpr, ABOVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row, the number of candidates above the threshold and the number that tie with it."""
    row = tl.program_id(0)
    start, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    key = tl.load(state + row * 2 * PER_ROW)
    num_over = 0
    num_tied = 0
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        _, over, tied = compare(values, cols, offset, margin, i, end, key, ABOVE)
        num_over += tl.sum(over.to(tl.int32), axis=0)
        num_tied += tl.sum(tied.to(tl.int32), axis=0)
    tl.store(counts + row * 2, num_over)
    tl.store(counts + row * 2 + 1, num_tied)


@triton.jit
def place_rows(counts, state, kept_ties, kept_offsets, num_rows, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the number of ties that each row keeps, and the offset of its entries among the kept."""
    tied_before = 0
    kept_before = 0
    wanted_of_all = tl.load(state + 1)
    tl.store(kept_offsets, 0)
    for first in range(0, num_rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        over = tl.load(counts + i * 2, mask=i < num_rows, other=0)
        tied = tl.load(counts + i * 2 + 1, mask=i < num_rows, other=0)
        if PER_ROW:
            wanted = tl.load(state + i * 2 + 1, mask=i < num_rows, other=0)
        else:
            wanted = wanted_of_all - (tied_before + tl.cumsum(tied, axis=0) - tied)
        ties = tl.minimum(tied, tl.maximum(wanted, 0))
        tl.store(kept_ties + i, ties, mask=i < num_rows)
        tl.store(kept_offsets + i + 1, kept_before + tl.cumsum(over + ties, axis=0), mask=i < num_rows)
        tied_before += tl.sum(tied, axis=0)
        kept_before += tl.sum(over + ties, axis=0)


@triton.jit
def write_kept(
    values, cols, offset, margin, row_offsets, state, kept_ties, kept_offsets, out_rows, out_cols, out_values, capacity,
    num_rows, num_features, PER_ROW: tl.constexpr, ABOVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The candidates of a row above the threshold, and the first kept_ties of those that tie with it. The programs
    after the rows write the unused places.
    """
    row = tl.program_id(0)
    if row >= num_rows:
        i = (row - num_rows) * BLOCK + tl.arange(0, BLOCK)
        unused = (i >= tl.load(kept_offsets + num_rows)) & (i < capacity)
        tl.store(out_rows + i, tl.zeros_like(i) + num_rows - 1, mask=unused)
        tl.store(out_cols + i, tl.zeros_like(i) + num_features, mask=unused)
        tl.store(out_values + i, tl.zeros([BLOCK], tl.float32), mask=unused)
        return
    start, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    key = tl.load(state + row * 2 * PER_ROW)
    ties = tl.load(kept_ties + row)
    place = tl.load(kept_offsets + row)
    tied_before = 0
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value, over, tied = compare(values, cols, offset, margin, i, end, key, ABOVE)
        nth = tied_before + tl.cumsum(tied.to(tl.int32), axis=0)
        keep = (over | (tied & (nth <= ties))).to(tl.int32)
        at = place + tl.cumsum(keep, axis=0) - 1
        write = (keep > 0) & (at < capacity)
        tl.store(out_rows + at, tl.zeros_like(i) + row, mask=write)
        tl.store(out_cols + at, tl.load(cols + i, mask=i < end, other=0), mask=write)
        tl.store(out_values + at, value, mask=write)
        tied_before += tl.sum(tied.to(tl.int32), axis=0)
        place += tl.sum(keep, axis=0)


def threshold_key(values: torch.Tensor, length: torch.Tensor, k: int, rounds: int) -> torch.Tensor:
    """[2] int32: the key of the k-th largest of the first `length` [1] values, and how many of that key are wanted.

    With fewer than four rounds the key's last bits are 0: a lower bound that at least k values reach. The key is 0 if
    fewer than k values are positive.
    """
    state, histogram = torch.zeros(2 + (1 << max(DIGITS)), dtype=torch.int32, device=values.device).tensor_split((2,))
    shift, block = 31, 2048
    for i, bits in enumerate(DIGITS[:rounds]):
        shift -= bits
        count_digits[(triton.cdiv(values.numel(), block),)](
            values, length, state, histogram, SHIFT=shift, BITS=bits, BLOCK=block
        )
        unused = shift if i == rounds - 1 else 0
        pick_digit[(1,)](histogram, state, k, FIRST=i == 0, BITS=bits, UNUSED=unused)
    return state


def row_threshold_keys(values: torch.Tensor, row_offsets: torch.Tensor, k: int, block: int = 256) -> torch.Tensor:
    """[B, 2] int32: for each row what threshold_key gives. block: entries of a row that are read at once."""
    state = torch.empty(len(row_offsets) - 1, 2, dtype=torch.int32, device=values.device)
    row_keys_kernel[(len(state),)](values, row_offsets, k, state, BLOCK=block, num_warps=1 if block <= 256 else 4)
    return state


class Screen(NamedTuple):
    """z [B, F] float16: x W_enc + offset, times scales [B], and errors [B], the bounds on its error before its last
    rounding. limits [5]: the largest `norms` of W (round_rows). maxima and reached [B, G]: of group_maxima, for groups
    of `group` columns.
    """

    z: torch.Tensor
    errors: torch.Tensor
    scales: torch.Tensor
    limits: torch.Tensor
    maxima: torch.Tensor
    reached: torch.Tensor
    group: int


def screen(x: torch.Tensor, W_enc: torch.Tensor, offset: torch.Tensor | None, at_least: int) -> Screen:
    """As sparse_ops.screen, with scales and twice the accumulation term: tensor cores align and truncate what they add,
    and in known models of them that error stays below twice the bound of float32 sums. at_least: the least number of
    groups, if there are as many features.
    """
    W, x = W_enc.T.contiguous(), x.contiguous()
    (B, d), num_features = x.shape, len(W)
    parts = 0 if offset is None else 3
    width = -(-(d + parts) // 8) * 8  # what tensor cores want
    x16, W16 = (torch.empty(n, width, dtype=torch.float16, device=x.device) for n in (B, num_features))
    x_norms, W_norms = (x.new_empty(5, n) for n in (B, num_features))
    scales, errors = (x.new_empty(B) for _ in range(2))
    offset = x if offset is None else offset.contiguous()
    options = dict(PARTS=parts, BLOCK_D=triton.next_power_of_2(d))
    smallest = 1.0 if parts else 2.0**-40  # the offset is scaled as the row is
    round_rows[(B,)](x, offset, x16, x_norms, scales, B, d, width, smallest, OF_X=True, **options)
    round_rows[(num_features,)](W, offset, W16, W_norms, scales, num_features, d, width, 0.0, OF_X=False, **options)
    limits = W_norms.amax(1)
    z = torch.empty(B, num_features, dtype=torch.float16, device=x.device)
    with full_precision():
        torch.mm(x16, W16.T, out=z)
    group = GROUP
    while group > 1 and -(-num_features // group) < at_least:
        group //= 2
    num_groups = -(-num_features // group)
    if B * num_groups > LARGEST_INDEX:
        raise InputError(
            f"batch_size = {B} is too large for {num_features} features on CUDA: at most {LARGEST_INDEX // num_groups}"
        )
    maxima, reached = (torch.empty(B, num_groups, dtype=t, device=x.device) for t in (torch.float16, torch.float32))
    block = min(64, triton.next_power_of_2(num_groups))
    group_maxima[(B, triton.cdiv(num_groups, block))](
        z, x_norms, scales, limits, errors, maxima, reached, B, num_features, num_groups, width * 2.0**-22,
        GROUP=group, BLOCK_G=block,
    )  # fmt: skip
    return Screen(z, errors, scales, limits, maxima, reached, group)


class Candidates(NamedTuple):
    """cols [capacity], row-major, and row_offsets [B + 1]. found []: their number. failure []: of PaddedPattern."""

    cols: torch.Tensor
    row_offsets: torch.Tensor
    found: torch.Tensor
    failure: torch.Tensor


def candidates(screened: Screen, threshold: torch.Tensor, capacity: int) -> Candidates:
    """The entries that may reach the threshold: a float whose bits are an int32, in column 0 of [B, 2] for each row, or
    in element 0 of [2] for all rows.
    """
    z, errors, scales, limits, maxima, _, group = screened
    (B, num_features), num_groups = z.shape, maxima.shape[1]
    hits = torch.empty(B, num_groups, dtype=torch.int64, device=z.device)
    groups, num_hot, counts, row_offsets, cols = (
        torch.empty(n, dtype=torch.int32, device=z.device) for n in ((B, num_groups), B, B, B + 1, capacity)
    )
    found, failure = (torch.empty((), dtype=torch.int64, device=z.device) for _ in range(2))
    stride = 2 * (threshold.ndim - 1)
    find_candidates[(B,)](
        z, maxima, scales, errors, threshold, stride, groups, hits, num_hot, counts, num_features, num_groups,
        GROUP=group, BLOCK_G=min(256, triton.next_power_of_2(num_groups)), BLOCK_N=16,
    )  # fmt: skip
    place_candidates[(1,)](
        counts, errors, limits, row_offsets, found, failure, B, capacity,
        NOT_FINITE=NOT_FINITE, OVERFLOW=OVERFLOW, BLOCK=1024,
    )  # fmt: skip
    args = groups, hits, num_hot, row_offsets, cols, capacity, num_groups
    write_candidates[(B,)](*args, GROUP=group, BLOCK=64, num_warps=1)
    return Candidates(cols, row_offsets, found, failure)


def select_topk(x: torch.Tensor, W_enc: torch.Tensor, k: int, per_row: bool, capacity: int) -> "PaddedPattern":
    """As sparse_ops.select_topk, in arrays of B·k entries. capacity: candidates that there is room for."""
    B = len(x)
    screened = screen(x, W_enc, None, at_least=4 * k)
    reached = screened.reached
    if per_row:
        offsets = torch.arange(0, reached.numel() + 1, reached.shape[1], dtype=torch.int32, device=x.device)
        t = row_threshold_keys(reached, offsets, k)
    else:
        t = threshold_key(reached, torch.full((1,), reached.numel(), device=x.device), B * k, rounds=3)
    found = candidates(screened, t, capacity)
    del screened, reached
    values = refined(x, W_enc, found)
    if per_row:
        state = row_threshold_keys(values, found.row_offsets, k)
    else:
        state = threshold_key(values, found.row_offsets[-1:], B * k, rounds=4)
    return kept(x, values, found, state, B * k, per_row, W_enc.shape[1])


def select_above(x, W_enc, offset: torch.Tensor, margin: float, capacity: int) -> "PaddedPattern":
    """The entries with x W_enc + offset > −margin, products without the offset, in arrays of `capacity` entries."""
    offset = offset.contiguous()
    state = torch.full((2,), -margin, dtype=torch.float32, device=x.device).view(torch.int32)
    found = candidates(screen(x, W_enc, offset, at_least=1), state, capacity)
    return kept(x, refined(x, W_enc, found), found, state, capacity, False, W_enc.shape[1], offset, margin)


def refined(x, W_enc, found: Candidates) -> torch.Tensor:
    """[capacity]: x W_enc in float32 at the candidates."""
    d = x.shape[1]
    values = x.new_empty(len(found.cols))
    block_d = triton.next_power_of_2(d)
    args = x.contiguous(), W_enc.T.contiguous(), found.row_offsets, found.cols, values, d
    refine[(len(x),)](*args, **tile(block_d))
    return values


def kept(
    x, values, found: Candidates, state, length, per_row, num_features, offset=None, margin=0.0
) -> "PaddedPattern":
    """The candidates over the threshold of `state`, or with value + offset > −margin, in arrays of `length` entries."""
    B, device, cols = len(found.row_offsets) - 1, values.device, found.cols
    flags = dict(PER_ROW=int(per_row), ABOVE=offset is not None, BLOCK=256)
    args = values, cols, values if offset is None else offset, margin, found.row_offsets, state
    counts, kept_ties, kept_offsets, rows, out_cols = (
        torch.empty(n, dtype=torch.int32, device=device) for n in ((B, 2), B, B + 1, length, length)
    )
    out_values = values.new_empty(length)
    count_kept[(B,)](*args, counts, **flags)
    place_rows[(1,)](counts, state, kept_ties, kept_offsets, B, PER_ROW=int(per_row), BLOCK=1024)
    write_kept[(B + triton.cdiv(length, 256),)](
        *args, kept_ties, kept_offsets, rows, out_cols, out_values, length, B, num_features, **flags
    )
    arrays = rows, out_cols, kept_offsets, (B, num_features), out_values
    return PaddedPattern(*arrays, found.failure, found.found, x.detach())


# Products over the entries


@triton.jit
def spmm_kernel(values, row_offsets, cols, table, out, d, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[row] = Σ value · table[col]."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    o = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        col = tl.load(cols + i, mask=i < end, other=0).to(tl.int64)
        value = tl.load(values + i, mask=i < end, other=0.0)
        w = tl.load(table + col[:, None] * d + o[None, :], mask=(i < end)[:, None] & (o < d)[None, :], other=0.0)
        total += tl.sum(w * value[:, None], axis=0)
    tl.store(out + row * d + o, total, mask=o < d)


@triton.jit
def chunk_of(feature_offsets, extra_offsets, extra_feature, num_features, CHUNK: tl.constexpr):
    """Program -> (feature, start and end of its entries). The first F programs take the first CHUNK entries of each
    feature, the others the rest.
    """
    p = tl.program_id(0)
    extra = p - num_features
    feature = p
    part = 0
    if extra >= 0:
        feature = tl.load(extra_feature + extra)
        if feature < num_features:
            part = extra - tl.load(extra_offsets + feature) + 1
    start = 0
    end = 0
    if feature < num_features:
        last = tl.load(feature_offsets + feature + 1)
        start = tl.load(feature_offsets + feature) + part * CHUNK
        end = tl.minimum(start + CHUNK, last)
    return feature.to(tl.int64), start, end


@triton.jit
def decode_gradients_kernel(
    values, rows, order, feature_offsets, extra_offsets, extra_feature, W_dec, grad, grad_values, grad_W,
    d, num_features, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_value = grad[row] · W_dec[feature], and grad_W[feature] = Σ value · grad[row], in one pass."""
    feature, start, end = chunk_of(feature_offsets, extra_offsets, extra_feature, num_features, CHUNK)
    if feature < num_features:
        o = tl.arange(0, BLOCK_D)
        w = tl.load(W_dec + feature * d + o, mask=o < d, other=0.0)
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(start, end, BLOCK_N):
            i = first + tl.arange(0, BLOCK_N)
            row = tl.load(rows + i, mask=i < end, other=0).to(tl.int64)
            place = tl.load(order + i, mask=i < end, other=0)
            value = tl.load(values + place, mask=i < end, other=0.0)
            g = tl.load(grad + row[:, None] * d + o[None, :], mask=(i < end)[:, None] & (o < d)[None, :], other=0.0)
            tl.store(grad_values + place, tl.sum(g * w[None, :], axis=1), mask=i < end)
            total += tl.sum(g * value[:, None], axis=0)
        tl.store(grad_W + tl.program_id(0).to(tl.int64) * d + o, total, mask=o < d)


@triton.jit
def encode_gradients_kernel(
    values, rows, order, feature_offsets, extra_offsets, extra_feature, x, grad_W,
    d, num_features, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_W[feature] = Σ value · x[row]."""
    feature, start, end = chunk_of(feature_offsets, extra_offsets, extra_feature, num_features, CHUNK)
    if feature < num_features:
        o = tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(start, end, BLOCK_N):
            i = first + tl.arange(0, BLOCK_N)
            row = tl.load(rows + i, mask=i < end, other=0).to(tl.int64)
            value = tl.load(values + tl.load(order + i, mask=i < end, other=0), mask=i < end, other=0.0)
            x_rows = tl.load(x + row[:, None] * d + o[None, :], mask=(i < end)[:, None] & (o < d)[None, :], other=0.0)
            total += tl.sum(x_rows * value[:, None], axis=0)
        tl.store(grad_W + tl.program_id(0).to(tl.int64) * d + o, total, mask=o < d)


@triton.jit
def add_extra_chunks(extra_offsets, extra_feature, grad_W, d, num_features, BLOCK_D: tl.constexpr):
    """Add a feature's other parts to its first, in order. The program of its second part does this."""
    number = tl.program_id(0)
    feature = tl.load(extra_feature + number).to(tl.int64)
    if feature < num_features:
        if tl.load(extra_offsets + feature) == number:
            o = tl.arange(0, BLOCK_D)
            total = tl.load(grad_W + feature * d + o, mask=o < d, other=0.0)
            for extra in range(number, tl.load(extra_offsets + feature + 1)):
                part = (num_features + extra).to(tl.int64)
                total += tl.load(grad_W + part * d + o, mask=o < d, other=0.0)
            tl.store(grad_W + feature * d + o, total, mask=o < d)


@triton.jit
def sum_features(values, order, feature_offsets, out, BLOCK: tl.constexpr):
    feature = tl.program_id(0)
    start, end = tl.load(feature_offsets + feature), tl.load(feature_offsets + feature + 1)
    total = 0.0
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        place = tl.load(order + i, mask=i < end, other=0)
        total += tl.sum(tl.load(values + place, mask=i < end, other=0.0), axis=0)
    tl.store(out + feature, total)


def tile(block_d: int) -> dict:
    """Launch options of a kernel that reads several rows of up to block_d numbers at a time."""
    return dict(BLOCK_D=block_d, BLOCK_N=max(1, 4096 // block_d), num_warps=4 if block_d <= 1024 else 8)


class PaddedPattern:
    """Places in a [B, F] matrix in row-major order, like sparse_ops.SparsityPattern, in arrays of fixed length n.

    rows, cols [n] int32, products [n]: unused places have column F and product 0. row_offsets [B + 1]: where each row's
    places begin. failure []: the bits NOT_FINITE and OVERFLOW. num_candidates []: the number of candidates found.
    x [B, d] as in SparsityPattern.
    """

    is_padded = True  # whether there may be unused places

    def __init__(self, rows, cols, row_offsets, shape, products, failure, num_candidates, x=None):
        self.rows, self.cols, self.row_offsets, self.shape, self.products = rows, cols, row_offsets, shape, products
        self.failure, self.num_candidates, self.x = failure, num_candidates, x

    def trimmed(self) -> "PaddedPattern":
        """The same without unused places. Waits for the device."""
        return self.part(slice(int(self.row_offsets[-1])), self.row_offsets)

    def filter(self, keep: torch.Tensor) -> "PaddedPattern":
        """The places where the mask keep [n] is True. Waits for the device."""
        index = keep.nonzero().squeeze(-1)
        return self.part(index, offsets_of(self.rows[index], self.shape[0]))

    def part(self, index, row_offsets: torch.Tensor) -> "PaddedPattern":
        """The places at an index. None of them may be unused."""
        arrays = self.rows[index], self.cols[index], row_offsets, self.shape, self.products[index]
        pattern = PaddedPattern(*arrays, self.failure, self.num_candidates, self.x)
        pattern.is_padded = False
        return pattern

    def by_group(self, ends: list[int]) -> "PaddedPattern":
        """As SparsityPattern.by_group. Unused places have row B·P."""
        (B, num_features), P = self.shape, len(ends)
        rows = (self.rows * P + sum(self.cols >= end for end in ends)).int()
        row_offsets, shape = offsets_of(rows, B * P), (B * P, num_features)
        pattern = PaddedPattern(rows, self.cols, row_offsets, shape, None, self.failure, self.num_candidates)
        order, _, *rest = self.by_feature
        pattern.by_feature = order, rows[order], *rest
        return pattern

    @cached_property
    def by_feature(self) -> tuple[torch.Tensor, ...]:
        """Feature-major: (order [n] that sorts the places, rows [n], feature_offsets [F + 1], extra_offsets [F + 1] and
        extra_feature [n // CHUNK]: the range of each feature's chunks beyond the first, and the feature of each).
        """
        num_features = self.shape[1]
        narrow = torch.int16 if num_features < 2**15 else torch.int32  # half the passes of a radix sort
        cols, order = self.cols.to(narrow).sort(stable=True)
        feature_offsets = offsets_of(cols, num_features)
        extra = (feature_offsets.diff() - 1).clamp(min=0) // CHUNK
        extra_offsets = F.pad(extra.cumsum(0, dtype=torch.int32), (1, 0))
        numbers = torch.arange(len(cols) // CHUNK, dtype=torch.int32, device=cols.device)
        extra_feature = torch.searchsorted(extra_offsets[1:], numbers, right=True, out_int32=True)
        return order, self.rows[order], feature_offsets, extra_offsets, extra_feature

    def sparse_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """values [n] as a sparse (COO) tensor [B, F]. With unused places (zeros) it is not coalesced."""
        index = torch.stack([self.rows, self.cols.clamp(max=self.shape[1] - 1)]).long()
        coalesced = not self.is_padded
        return torch.sparse_coo_tensor(index, values, self.shape, is_coalesced=coalesced, check_invariants=False)

    def spmm(self, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[B, d]: per row Σ value · table[col], with a table [F, d]."""
        table = table.contiguous()
        d = table.shape[1]
        out = values.new_empty(self.shape[0], d)
        block_d = min(256, triton.next_power_of_2(d))
        spmm_kernel[(self.shape[0], triton.cdiv(d, block_d))](
            values.contiguous(), self.row_offsets, self.cols, table, out, d, BLOCK_D=block_d, BLOCK_N=4, num_warps=1
        )
        return out

    def decode_gradients(self, values, W_dec, grad) -> tuple[torch.Tensor, torch.Tensor]:
        """(grad[row] · W_dec[col] [n]; per feature Σ value · grad[row] [F, d]), with grad [B, d]."""
        grad_values, block_d = torch.zeros_like(values), triton.next_power_of_2(W_dec.shape[1])
        options = dict(BLOCK_D=block_d, BLOCK_N=max(1, 2048 // block_d), num_warps=max(1, block_d // 1024))
        args = W_dec.contiguous(), grad.contiguous(), grad_values
        return grad_values, self.over_chunks(decode_gradients_kernel, options, values, *args)

    def spmm_t(self, values, x) -> torch.Tensor:
        """[F, d]: per feature Σ value · x[row]."""
        options = tile(triton.next_power_of_2(x.shape[1]))
        return self.over_chunks(encode_gradients_kernel, options, values, x.contiguous())

    def over_chunks(self, kernel, options: dict, values, matrix, *more) -> torch.Tensor:
        """[F, d]: of each feature, the sum of what a feature-major kernel writes for its chunks."""
        order, rows, *features = self.by_feature
        (_, *extra), num_features, d = features, self.shape[1], matrix.shape[1]
        grad_W = matrix.new_empty(num_features + len(extra[1]), d)
        args = values.contiguous(), rows, order, *features, matrix, *more, grad_W
        kernel[(len(grad_W),)](*args, d, num_features, CHUNK=CHUNK, **options)
        if len(extra[1]):
            add_extra_chunks[(len(extra[1]),)](*extra, grad_W, d, num_features, BLOCK_D=options["BLOCK_D"])
        return grad_W[:num_features]

    def feature_sums(self, values: torch.Tensor) -> torch.Tensor:
        """[F]: per feature Σ value."""
        order, _, feature_offsets, *_ = self.by_feature
        out = values.new_empty(self.shape[1])
        sum_features[(self.shape[1],)](values.contiguous(), order, feature_offsets, out, BLOCK=64)
        return out


def offsets_of(sorted_index: torch.Tensor, n: int) -> torch.Tensor:
    """[n + 1] int32: where each of 0 … n begins in a sorted vector."""
    numbers = torch.arange(n + 1, dtype=sorted_index.dtype, device=sorted_index.device)
    return torch.searchsorted(sorted_index, numbers, out_int32=True)


# Statistics and the loss


@triton.jit
def count_active_kernel(acts, cols, n, counts, mask, BLOCK: tl.constexpr):
    """Adds the number of positive activations to counts[0], and marks their features."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(acts + i, mask=i < n, other=0.0) > 0
    tl.atomic_add(counts, tl.sum(active.to(tl.int64), axis=0))
    tl.store(mask + tl.load(cols + i, mask=active, other=0), tl.full([BLOCK], 1, tl.int8), mask=active)


@triton.jit
def count_active_dense(acts, num_rows, num_features, counts, sums, mask, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr):
    """The same for activations [B, F], which it also sums per program."""
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (row < num_rows) & (col < num_features)[None, :]
    value = tl.load(acts + row * num_features + col[None, :], mask=inside, other=0.0)
    active = tl.sum((value > 0).to(tl.int32), axis=0)
    tl.atomic_add(counts, tl.sum(active.to(tl.int64), axis=0))
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + program, tl.sum(tl.sum(value, axis=0), axis=0))
    tl.store(mask + col, tl.full([BLOCK_F], 1, tl.int8), mask=active > 0)


def count_active(acts, cols: torch.Tensor | None, num_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sparse_ops.count_active of activations [n] of the features cols [n], or [B, F] if cols is None."""
    numbers = torch.zeros(8 + num_features, dtype=torch.int8, device=acts.device)
    count, mask, acts = numbers[:8].view(torch.int64), numbers[8:], acts.contiguous()
    if cols is None:
        grid, blocks = (triton.cdiv(len(acts), 64), triton.cdiv(num_features, 128)), dict(BLOCK_B=64, BLOCK_F=128)
        sums = acts.new_empty(math.prod(grid))
        count_active_dense[grid](acts, len(acts), num_features, count, sums, mask, **blocks)
        return count[0], sums.sum(), mask.view(torch.bool)
    if len(acts):
        count_active_kernel[(triton.cdiv(len(acts), 256),)](acts, cols, len(acts), count, mask, BLOCK=256)
    return count[0], Total.apply(acts), mask.view(torch.bool)


@triton.jit
def sum_kernel(values, n, sums, BLOCK: tl.constexpr, STEP: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * BLOCK, n, STEP):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < n, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


class Total(torch.autograd.Function):
    """The sum [] of values [n]. It does not depend on the number of zeros at their end, which torch's sum does: the
    room for candidates is not the same in a resumed run.
    """

    PROGRAMS, BLOCK = 512, 256

    @staticmethod
    def forward(ctx, values):
        ctx.n, sums = len(values), values.new_zeros(Total.PROGRAMS)
        programs = min(triton.cdiv(ctx.n, Total.BLOCK), Total.PROGRAMS)
        if programs:
            options = dict(BLOCK=Total.BLOCK, STEP=Total.BLOCK * Total.PROGRAMS)
            sum_kernel[(programs,)](values.contiguous(), ctx.n, sums, **options)
        return sums.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(ctx.n)


@triton.jit
def smallest_positive_kernel(values, n, minima, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < n, other=0.0)
    tl.store(minima + tl.program_id(0), tl.min(tl.where(value > 0, value, float("inf")), axis=0))


def smallest_positive(values: torch.Tensor) -> torch.Tensor:
    """sparse_ops.smallest_positive of at least one value [n]."""
    block = 1024
    smallest = values.new_empty(triton.cdiv(len(values), block))
    with torch.cuda.device_of(values):  # called outside of sae_arithmetic, too
        smallest_positive_kernel[(len(smallest),)](values.contiguous(), len(values), smallest, BLOCK=block)
    return smallest.amin()


@triton.jit
def squared_error_kernel(a, b, n, sums, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    error = tl.load(a + i, mask=i < n, other=0.0) - tl.load(b + i, mask=i < n, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(error * error, axis=0))


@triton.jit
def squared_error_gradient_kernel(a, b, n, grad, factor, out, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    error = tl.load(a + i, mask=i < n, other=0.0) - tl.load(b + i, mask=i < n, other=0.0)
    tl.store(out + i, error * (factor * tl.load(grad)), mask=i < n)


class MeanSquaredError(torch.autograd.Function):
    """sparse_ops.mean_squared_error, in one pass forward and one backward."""

    BLOCK = 4096

    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        n, block = a.numel(), MeanSquaredError.BLOCK
        sums = a.new_empty(triton.cdiv(n, block))
        squared_error_kernel[(len(sums),)](a, b, n, sums, BLOCK=block)
        return sums.sum() / n

    @staticmethod
    def backward(ctx, grad):
        (a, b), block = ctx.saved_tensors, MeanSquaredError.BLOCK
        n, out = a.numel(), torch.empty_like(a)
        squared_error_gradient_kernel[(triton.cdiv(n, block),)](a, b, n, grad, 2 / n, out, BLOCK=block)
        return out, -out if ctx.needs_input_grad[1] else None


@triton.jit
def normalise_rows(x, out, means, stds, d, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    value = tl.load(x + row * d + col, mask=col < d, other=0.0)
    mean = tl.sum(value, axis=0) / d
    value = tl.where(col < d, value - mean, 0.0)
    std = tl.sqrt(tl.sum(value * value, axis=0) / (d - 1))
    tl.store(out + row * d + col, value / (std + 1e-5), mask=col < d)
    tl.store(means + row, mean)
    tl.store(stds + row, std)


def normalise(x: torch.Tensor, out=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sparse_ops.normalise."""
    *shape, d = x.shape
    out = x.new_empty(x.shape) if out is None else out
    mean, std = (x.new_empty(*shape, 1) for _ in range(2))
    if mean.numel():
        with torch.cuda.device_of(x):  # called outside of sae_arithmetic, too
            normalise_rows[(mean.numel(),)](x.contiguous(), out, mean, std, d, BLOCK_D=triton.next_power_of_2(d))
    return out, mean, std


# The update of the weights


@triton.jit
def adam_scales(norm, failure, step, lr, scales, max_norm, log2_beta1, log2_beta2):
    """One program: whether to update, the step number, and the scalars for adam_rows."""
    size = tl.load(norm)
    failed = tl.load(failure) | tl.where(size < float("inf"), 0, 1)  # NOT_FINITE; NaN is not less
    count = tl.load(step) + tl.where(failed == 0, 1.0, 0.0)
    tl.store(failure, failed)
    tl.store(step, count)
    steps = tl.maximum(count, 1.0).to(tl.float64)
    tl.store(scales, tl.minimum(max_norm / (size + 1e-6), 1.0))
    tl.store(scales + 1, (1 - tl.exp2(steps * log2_beta1)).to(tl.float32))
    tl.store(scales + 2, (1 - tl.exp2(steps * log2_beta2)).to(tl.float32))
    tl.store(scales + 3, tl.load(lr))
    tl.store(scales + 4, tl.where(failed == 0, 1.0, 0.0))


@triton.jit
def adam_rows(
    weights, grads, means, squares, scales, n, d, beta1, beta2, rest1, rest2,
    DECODER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adam on one row of d numbers. scales: the gradient's factor, two bias corrections, the learning rate, and 0 if
    nothing may change. A decoder row loses the part of its gradient that is parallel to it, and gets unit norm.
    """
    if tl.load(scales + 4) > 0:
        o = tl.program_id(0).to(tl.int64) * d + tl.arange(0, BLOCK_D)
        inside = (tl.arange(0, BLOCK_D) < d) & (o < n)
        w = tl.load(weights + o, mask=inside, other=0.0)
        g = tl.load(grads + o, mask=inside, other=0.0) * tl.load(scales)
        if DECODER:
            g -= tl.sum(g * w, axis=0) * w
        mean = tl.load(means + o, mask=inside, other=0.0) * beta1 + g * rest1
        square = tl.load(squares + o, mask=inside, other=0.0) * beta2 + g * g * rest2
        w -= tl.load(scales + 3) * (mean / tl.load(scales + 1)) / (tl.sqrt(square / tl.load(scales + 2)) + 1e-8)
        if DECODER:
            w = w / tl.sqrt(tl.sum(w * w, axis=0))
        # All stores come last: if a row is narrower than the block of threads, several threads load the same numbers.
        tl.store(means + o, mean, mask=inside)
        tl.store(squares + o, square, mask=inside)
        tl.store(weights + o, w, mask=inside)


def adam_state(p: torch.Tensor) -> dict:
    """The state of torch.optim.Adam for a parameter, before its first step."""
    return {"step": p.new_zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def begin_adam(optimizer, max_grad_norm: float, failure: torch.Tensor) -> torch.Tensor:
    """The part of a step of `optimizer` (torch.optim.Adam, whose state this uses) before the weights: the clipping
    factor and the other `scales` [5] for finish_adam.

    Reads the gradients of the parameters that the optimizer holds. Nothing changes if failure [] int64 is not 0, or if
    the gradient's norm is not finite, which sets that bit of failure. The learning rate may be a device tensor.
    """
    group = optimizer.param_groups[0]
    (beta1, beta2), lr = group["betas"], group["lr"]
    parameters = [p for p in group["params"] if p.grad is not None]
    states = [optimizer.state[p] for p in parameters]
    for p, state in zip(parameters, states):
        if not state:
            state |= adam_state(p)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    lr = lr if isinstance(lr, torch.Tensor) else norm.new_full((), lr)
    steps, scales = [state["step"] for state in states], norm.new_empty(5)
    log2_betas = [math.log2(beta) if beta else -math.inf for beta in (beta1, beta2)]
    adam_scales[(1,)](norm, failure, steps[0], lr, scales, max_grad_norm, *log2_betas)
    torch._foreach_copy_(steps, steps[:1] * len(steps))
    return scales


def finish_adam(optimizer, decoder: torch.Tensor, scales: torch.Tensor) -> None:
    """The rest of the step, with decoder rows of unit norm."""
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    for p in group["params"]:
        if p.grad is None:
            continue
        state = optimizer.state[p]
        d = p.shape[1] if p.ndim == 2 else min(len(p), 1024)
        adam_rows[(triton.cdiv(p.numel(), d),)](
            p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], scales, p.numel(), d,
            beta1, beta2, 1 - beta1, 1 - beta2, DECODER=p is decoder, BLOCK_D=triton.next_power_of_2(d),
            num_warps=8 if d > 512 else 4,
        )  # fmt: skip


# Dense products


@triton.jit
def split_kernel(
    source, parts, num_cols, row_stride, part_stride, COPIES: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's high parts in bfloat16, COPIES times, the LOW-th time the low parts (the rounding errors) instead."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + row * num_cols + col, mask=col < num_cols, other=0.0)
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    out = parts + row * row_stride + col
    for i in tl.static_range(COPIES):
        tl.store(out + i * tl.cast(part_stride, tl.int64), low if i == LOW else high, mask=col < num_cols)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N], float32, as products of bfloat16: high·high + low·high + high·low.

    low·low and the rounding error of the low parts are neglected: the error is at most 2⁻¹⁵ ‖a_i‖ ‖b_j‖, besides that
    of sums in float32.

    One product, [M, 3 K] @ [3 K, N], gives the sum. If K > 2 N, two products need less memory: for them, the high parts
    of a are stored once.
    """
    K, N = b.shape
    b = parts(b, inner=0, copies=3, low=2)
    if K <= 2 * N:
        return product(parts(a, inner=1, copies=3, low=1), b)
    a = parts(a, inner=1, copies=2, low=1)
    return product(a, b[: 2 * K]).add_(product(a[:, :K], b[2 * K :]))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of bfloat16 matrices, in float32."""
    if not a.is_cuda:  # only there mm has out_dtype
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def parts(matrix: torch.Tensor, inner: int, copies: int, low: int) -> torch.Tensor:
    """The parts of a matrix (split_kernel), concatenated in dimension `inner`."""
    if not matrix.is_contiguous() and matrix.T.is_contiguous():
        return parts(matrix.T, 1 - inner, copies, low).T
    rows, cols = matrix.shape
    shape = (rows, copies * cols) if inner else (copies * rows, cols)
    out = torch.empty(shape, dtype=torch.bfloat16, device=matrix.device)
    row_stride, part_stride = (copies * cols, cols) if inner else (cols, rows * cols)
    block = min(1024, triton.next_power_of_2(cols))
    grid = rows, triton.cdiv(cols, block)
    split_kernel[grid](matrix.contiguous(), out, cols, row_stride, part_stride, COPIES=copies, LOW=low, BLOCK=block)
    return out


# Dead features


def packed_index(mask: torch.Tensor, capacity: int) -> torch.Tensor:
    """[capacity] int64: the indices where the mask [n] is True, in order, padded with n."""
    n = len(mask)
    if capacity == 0:
        return torch.empty(0, dtype=torch.int64, device=mask.device)
    place = mask.cumsum(0) - 1
    place = torch.where(mask & (place < capacity), place, capacity)
    index = torch.full((capacity + 1,), n, device=mask.device)
    return index.scatter_(0, place, torch.arange(n, device=mask.device))[:capacity]


def keep_row_top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """[B, n]: the k largest positive values of each row, and 0 elsewhere; ties go to the first."""
    n, values = values.shape[1], values.contiguous()
    out, rows_at_once = torch.empty_like(values), max(1, LARGEST_INDEX // n)
    for part, out_part in zip(values.split(rows_at_once), out.split(rows_at_once)):
        row_offsets = torch.arange(len(part) + 1, dtype=torch.int32, device=values.device) * n
        block = min(1024, triton.next_power_of_2(n))
        state = row_threshold_keys(part, row_offsets, k, block)
        write_row_top_k[(len(part),)](part, row_offsets, state, out_part, BLOCK=block)
    return out


@triton.jit
def write_row_top_k(values, row_offsets, state, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    key, ties = tl.load(state + row * 2), tl.load(state + row * 2 + 1)
    tied_before = 0
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value, over, tied = compare(values, values, values, 0.0, i, end, key, False)
        nth = tied_before + tl.cumsum(tied.to(tl.int32), axis=0)
        tl.store(out + i, tl.where(over | (tied & (nth <= ties)), value, 0.0), mask=i < end)
        tied_before += tl.sum(tied.to(tl.int32), axis=0)


@full_precision()
@torch.inference_mode(False)
@torch.enable_grad()
def self_test(device: torch.device) -> None:
    """Raises RuntimeError unless the kernels agree with dense products on a small problem. It may be called in any mode
    (no_grad, inference_mode, TF32), because the kernels may first be used there.
    """
    generator = torch.Generator().manual_seed(0)
    B, d, num_features, k = CHUNK + 6, 40, 48, 4
    x, W, table = (torch.randn(n, d, generator=generator).float().to(device) for n in (B, num_features, num_features))
    x += 1
    W[7] = 0
    W[3] = 10  # active on every token: its entries are more than a chunk
    capacity = B * num_features
    z = (x.double() @ W.double().T).float()
    kth = z.topk(k).values[:, -1:]
    found, expected = [keep_row_top_k(z, k)], [z * (z >= kth) * (z > 0)]
    products = [(z, table), (z.T, x), (x, W.T)]
    found, expected = found + [matmul(a, b) for a, b in products], expected + [a @ b for a, b in products]
    found, expected = [*found, *normalise(x)], [*expected, (x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-5)]
    expected += [x.mean(1, keepdim=True), x.std(1, keepdim=True)]
    error = x.clone().requires_grad_()
    loss = MeanSquaredError.apply(error, table[:1].expand_as(x))
    found += [loss.detach(), *torch.autograd.grad(loss, error)]
    expected += [(x - table[0]).square().mean(), (x - table[0]) * (2 / x.numel())]
    patterns = [
        (select_topk(x, W.T, k, True, capacity), z * (z >= kth) * (z > 0)),
        (select_topk(x, W.T, k, False, capacity), z * (z >= z.flatten().topk(B * k).values[-1])),
        (select_above(x, W.T, torch.full_like(W[:, 0], -3.0), 0.5, capacity), z * (z - 3 > -0.5)),
    ]
    for pattern, acts in patterns:
        grad_values, grad_W = pattern.decode_gradients(pattern.products, table, x)
        found += [pattern.sparse_tensor(pattern.products).to_dense(), pattern.spmm(pattern.products, table), grad_W]
        found += [pattern.spmm_t(pattern.products, x), pattern.feature_sums(pattern.products), grad_values.sum()]
        expected += [acts, acts @ table, acts.T @ x, acts.T @ x, acts.sum(0), ((x @ table.T) * (acts > 0)).sum()]
        values = pattern.products.clamp(min=0)
        for args in ((values, pattern.cols), (acts.relu(), None)):
            statistics = count_active(*args, num_features)
            found += [number.float() for number in (*statistics, smallest_positive(values))]
            expected += [(acts > 0).sum().float(), acts.relu().sum(), (acts > 0).any(0).float(), acts[acts > 0].min()]
    ours, theirs = (F.normalize(table).clone().requires_grad_() for _ in range(2))
    optimizers = [torch.optim.Adam([parameter], lr=0.01) for parameter in (ours, theirs)]
    for parameter in (ours, theirs):
        parameter.grad = W.clone()
    finish_adam(optimizers[0], ours, begin_adam(optimizers[0], 1e9, torch.zeros((), dtype=torch.int64, device=device)))
    theirs.grad -= (theirs.grad * theirs.detach()).sum(1, keepdim=True) * theirs.detach()
    optimizers[1].step()
    found, expected = [*found, ours.detach()], [*expected, F.normalize(theirs.detach())]
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().amax().item()) for a, b in zip(found, expected)):
        raise RuntimeError("their results are wrong")
