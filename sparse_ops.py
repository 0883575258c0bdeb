"""The fast exact path: only about B·k of the B·F pre-activations are active, and only these are computed in full.

    z = x W_enc [B, F] is screened in bfloat16 (half the time of float32 on a CPU with bf16 instructions). Each screened
    value has a bound on its error. The entries that the bound cannot rule out, the candidates, are computed in the
    precision of the weights, and the selection is made among them. It equals the selection from the dense product, up
    to the rounding of the dense product itself.

    The bound. Let x16 and w16 be the rounded operands, and δx = x − x16 and δw = w − w16 the rounding errors, which are
    known exactly. From x·w − x16·w16 = δx·w + x16·δw, Cauchy–Schwarz, and float32 accumulation over d terms:

        |z_ij − p_ij| ≤ e_i = ‖δx_i‖ max_j‖w_j‖ + ‖x16_i‖ max_j‖δw_j‖ + d·2⁻²³ ‖x16_i‖ max_j‖w16_j‖

    where p is the screened product before its last rounding, to bfloat16, which has a relative error of at most 2⁻⁸.

    The k largest. Divide each row into groups, and take the largest rounded p of each group, m. It belongs to an entry
    z ≥ m (1 − 2⁻⁸) − e. The groups have different entries, so if t is the k-th largest of these bounds, at least k
    entries of z are ≥ t, and every selected entry is. Its p is then ≥ t − e, and its rounded p ≥ round(t − e), because
    rounding is monotone. The entries with such a value are the candidates.

The selected entries are stored as a SparsityPattern: their places (row = token, column = feature) in row-major order,
and a vector of values. All further products are over these entries. On a CPU they use two kernels that torch has: sums
of weighted rows (embedding_bag) and dot products of pairs of rows (its gradient for the weights). Both are much faster
if neighbouring entries share a row of the larger matrix, so a pattern also keeps a feature-major order.

On CUDA the same algorithm runs in the kernels of triton_ops.py, without waiting for the device.

Where bfloat16 is not fast, the screen is in float32 (screen_dtype). The results are bit-identical, because the values
always come from the second computation.
"""

import os
import threading
import warnings
from contextlib import contextmanager
from functools import cached_property, lru_cache, wraps
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

# Page faults of 4 KiB take a fifth of a step on a CPU; torch can ask for pages of 2 MiB. It reads this variable when it
# first allocates memory, which importing it does not.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch 2.11 warns unless it is set

# Where the sparse form becomes cheaper than the dense one, as measured on CPUs.
DENSE_FROM = 16  # the dot product of one entry costs about as much as this many entries of a dense product
FEATURES_PER_ACTIVE = 32  # TopK, BatchTopK: lowest dictionary size over k
GOES_SPARSE, GOES_DENSE = 48, 24  # vanilla, JumpReLU: dictionary size over L0; two values, so that it does not flip


NOT_FINITE, OVERFLOW = 1, 2  # bits of `failure`, for steps that do not wait for the device


class SparsityPattern:
    """Places in a [B, F] matrix, in row-major order: rows [n] and cols [n], int64.

    products [n], where they are known: x W_enc at these places. x [B, d]: the inputs of these products (minus b_dec, if
    the SAE subtracts it); None in a pattern made by `of`.
    """

    def __init__(self, rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int], products=None, x=None):
        self.rows, self.cols, self.shape, self.products, self.x = rows, cols, shape, products, x

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "SparsityPattern":
        """The nonzero entries of a matrix [B, F], whose values are the products."""
        flat = matrix.detach().flatten()
        index, num_features = nonzero(flat != 0), matrix.shape[1]
        rows = index // num_features
        return cls(rows, index - rows * num_features, matrix.shape, flat.index_select(0, index))

    def __len__(self):
        return len(self.rows)

    @cached_property
    def row_offsets(self) -> torch.Tensor:
        """[B]: where each row's entries begin."""
        return first_positions(self.rows, self.shape[0])

    @cached_property
    def by_feature(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Feature-major: (order [n] that sorts the entries, rows [n], cols [n], where each feature's begin [F])."""
        # Small integers sort several times as fast, and on a CPU NumPy has a radix sort for them.
        cols = self.cols.to(torch.int16 if self.shape[1] < 2**15 else torch.int32)
        if cols.device.type == "cpu" and cols.dtype == torch.int16:
            order = torch.from_numpy(np.argsort(cols.numpy(), kind="stable"))
        else:
            order = cols.sort(stable=True).indices
        cols = self.cols.index_select(0, order)
        return order, self.rows.index_select(0, order), cols, first_positions(cols, self.shape[1])

    def filter(self, keep: torch.Tensor) -> "SparsityPattern":
        """The entries where the mask keep [n] is True."""
        index = nonzero(keep)
        rows, cols, products = (of.index_select(0, index) for of in (self.rows, self.cols, self.products))
        return SparsityPattern(rows, cols, self.shape, products, self.x)

    def by_group(self, ends: list[int]) -> "SparsityPattern":
        """The places in [B·P, F] where row i·P + g has the entries of row i in the g-th of P groups of neighbouring
        features, which end before the features `ends`. Their order does not change.
        """
        group = sum(self.cols >= end for end in ends[:-1])
        P = len(ends)
        pattern = SparsityPattern(self.rows * P + group, self.cols, (self.shape[0] * P, self.shape[1]))
        order, _, *rest = self.by_feature
        pattern.by_feature = order, pattern.rows[order], *rest
        return pattern

    def sparse_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """values [n] as a sparse (COO, coalesced) tensor [B, F]."""
        index = torch.stack([self.rows, self.cols])
        return torch.sparse_coo_tensor(index, values, self.shape, is_coalesced=True, check_invariants=False)

    def sddmm(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[n]: a[row] · b[col] of a [B, d] and b [F, d]."""
        order, rows, cols, feature_offsets = self.by_feature
        by_feature = torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, cols, feature_offsets, rows, 0)
        return torch.empty_like(by_feature).index_copy_(0, order, by_feature)

    def spmm(self, values: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[B, d]: of each row, Σ value · b[col], of b [F, d]."""
        return weighted_sums(values, self.cols, self.row_offsets, b)

    def decode_gradients(self, values, W_dec, grad) -> tuple[torch.Tensor, torch.Tensor]:
        """(grad[row] · W_dec[col] [n], [F, d] of each feature Σ value · grad[row]), of grad [B, d]."""
        return self.sddmm(grad, W_dec), self.spmm_t(values, grad)

    def spmm_t(self, values: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """[F, d]: of each feature, Σ value · a[row], of a [B, d]."""
        order, rows, _, feature_offsets = self.by_feature
        return weighted_sums(values[order], rows, feature_offsets, a)

    def feature_sums(self, values: torch.Tensor) -> torch.Tensor:
        """[F]: of each feature, Σ value."""
        order, rows, _, feature_offsets = self.by_feature
        # The same kernel with a table of ones. Unlike an atomic sum, it always adds in the same order.
        return weighted_sums(values[order], rows * 0, feature_offsets, values.new_ones(1, 1)).squeeze(-1)


def first_positions(sorted_index: torch.Tensor, n: int) -> torch.Tensor:
    """[n]: where each of 0 … n − 1 begins in a sorted vector of them."""
    return torch.searchsorted(sorted_index, torch.arange(n, device=sorted_index.device))


def nonzero(mask: torch.Tensor) -> torch.Tensor:
    """The indices where the mask [n] is True. On a CPU NumPy is several times as fast as torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(-1)


def weighted_sums(weights, index, bag_offsets, table):
    return F.embedding_bag(index, table, bag_offsets, mode="sum", per_sample_weights=weights)


def normalise(x: torch.Tensor, out=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x̂ [..., d], μ [..., 1], σ [..., 1]) of x [..., d]: x̂ = (x − μ)/(σ + 1e-5), σ unbiased over d. x̂ is written to
    `out` if that is given.
    """
    if uses_triton(x) and not (x.requires_grad and torch.is_grad_enabled()):
        import triton_ops

        return triton_ops.normalise(x, out)
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    # torch.std_mean is several times slower on a CPU.
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5
    return torch.div(centred, std + 1e-5, out=out), mean, std


# Differentiable operations. `pattern` None means the dense form: all of [B, F].


def pre_activations(x, b_dec, W_enc, pattern=None) -> torch.Tensor:
    """(x − b_dec) W_enc, [B, F], or the pattern's products [n]. b_dec may be None."""
    return PreActivation.apply(x, b_dec, W_enc, pattern)


def decode(acts, W_dec, pattern=None) -> torch.Tensor:
    """[B, d] = f W_dec of activations [B, F], or [n] at the places of the pattern."""
    return Decode.apply(acts, W_dec, pattern)


def decode_groups(acts, W_dec, ends: list[int], pattern=None) -> list[torch.Tensor]:
    """The part [B, d] of f W_dec of each group of neighbouring features; the groups end before the features `ends`."""
    if pattern is not None:
        return list(decode(acts, W_dec, pattern.by_group(ends)).view(-1, len(ends), W_dec.shape[1]).unbind(1))
    sizes = [end - start for start, end in pairwise([0, *ends])]
    return [decode(*group) for group in zip(acts.split(sizes, 1), W_dec.split(sizes))]


def at_features(vector, pattern=None) -> torch.Tensor:
    """A vector [F] as it is, to broadcast over [B, F]; or its values [n] at the features of the pattern."""
    return vector if pattern is None else AtFeatures.apply(vector, pattern)


# Passes over [B, F]: a CPU needs several times as long to make or read a mask of bool as one of floats.


@torch.no_grad()
def count_active(acts: torch.Tensor, pattern=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The number [] and the sum [] of the positive activations ([B, F], or [n] at the pattern), and the mask [F] of
    their features.
    """
    if uses_triton(acts):
        import triton_ops

        cols, num_features = (None, acts.shape[1]) if pattern is None else (pattern.cols, pattern.shape[1])
        return triton_ops.count_active(acts, cols, num_features)
    if pattern is None:
        return acts.sign().sum(-1).sum(dtype=torch.int64), acts.sum(), acts.amax(0) > 0
    active, num_features = acts > 0, pattern.shape[1]
    found = torch.zeros(num_features + 1, dtype=torch.bool, device=acts.device)  # the last one is a dummy
    found.index_fill_(0, torch.where(active, pattern.cols, num_features), True)
    return active.count_nonzero(), acts.sum(), found[:num_features]


def smallest_positive(acts: torch.Tensor) -> torch.Tensor:
    """[]: the smallest of the positive activations (strided or sparse); infinity if there is none."""
    values = F.pad(acts._values(), (0, 1)) if acts.is_sparse else acts  # there may be none, and amin needs one
    if values.ndim == 1 and uses_triton(values):
        import triton_ops

        return triton_ops.smallest_positive(values)
    return F.threshold(values, 0, torch.inf).amin()


def total(acts: torch.Tensor, pattern=None) -> torch.Tensor:
    """[]: the sum of activations [B, F], or [n] at the pattern."""
    if pattern is None or not uses_triton(acts):
        return acts.sum()
    import triton_ops

    return triton_ops.Total.apply(acts)


def mean_squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[]: the mean of (a − b)² of two [B, d]."""
    if not uses_triton(a):
        return F.mse_loss(a, b)
    import triton_ops

    return triton_ops.MeanSquaredError.apply(a, b)


def dead_index(dead: torch.Tensor, x: torch.Tensor, upper_bound) -> torch.Tensor:
    """The features where the mask dead [F] is True, in order. Where the kernels are used, the length is
    room_for(upper_bound()), which is known without waiting for the device, and unused places hold F.
    """
    if not uses_triton(x):
        return nonzero(dead)
    import triton_ops

    return triton_ops.packed_index(dead, room_for(upper_bound(), len(dead)))


def room_for(num_dead: int, num_features: int) -> int:
    """The length of a dead_index on CUDA. Few lengths are possible, since each needs its own CUDA graph."""
    unit = max(256, 2 ** num_dead.bit_length() // 8)
    return min(-(-num_dead // unit) * unit, num_features)


def take(matrix: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """The rows (dim 0) or columns (dim 1) of a matrix at a dead_index; zeros where the index is F."""
    if not uses_triton(matrix):
        return matrix.index_select(dim, index)
    n = matrix.shape[dim]
    used = index < n
    return matrix.index_select(dim, index.clamp(max=n - 1)) * (used if dim else used[:, None])


def aux_is_sparse(num_dead: int, k: int, x: torch.Tensor) -> bool:
    """Whether the aux loss's gradients are cheaper in the sparse form. On a GPU they never are."""
    return num_dead >= 6 * k and not uses_triton(x)


def failure(pattern, loss: torch.Tensor) -> torch.Tensor:
    """[] int64: not 0 if the results of a step that did not wait for the device are invalid (triton_ops.py)."""
    not_finite = ~(loss.abs() < torch.inf)  # isfinite takes more kernels
    return not_finite * NOT_FINITE | (0 if pattern is None else pattern.failure)


def keep_top_k(z: torch.Tensor, k: int) -> torch.Tensor:
    """relu(z), z [n] or [B, n], with all but the k largest of the last dimension set to 0; ties go to the first."""
    return KeepTopK.apply(z, k)


class KeepTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, k):
        if z.ndim == 2 and k < z.shape[1] and uses_triton(z):
            import triton_ops

            acts = triton_ops.keep_row_top_k(z, k)
            ctx.save_for_backward(acts)
            return acts
        acts = torch.relu(z)
        if k < acts.shape[-1]:
            # A threshold is several times as fast as topk on a CPU. It is taken from z, because NumPy's partition is
            # five times as slow on relu(z), which is mostly zeros.
            t = kth_largest(z, k).unsqueeze(-1)
            kept = torch.ge(acts, t, out=torch.empty_like(acts))
            # Of several values that equal the threshold, keep the first. A GPU always does this, since to ask whether
            # it is necessary would make the host wait.
            count = kept.sum(-1) if k < 2**23 else kept.count_nonzero(-1)  # float32 is exact to 2²⁴, and faster
            if acts.device.type != "cpu" or ((count > k) & (t.squeeze(-1) > 0)).any():
                more, tied = acts > t, acts == t
                kept.copy_(more | (tied & (tied.cumsum(-1) <= k - more.sum(-1, keepdim=True))))
            acts = kept.mul_(acts)
        ctx.save_for_backward(acts)
        return acts

    @staticmethod
    def backward(ctx, grad):
        (acts,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, acts, 0), None


class PreActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_dec, W_enc, pattern):
        ctx.save_for_backward(x, b_dec, W_enc)
        ctx.pattern = pattern
        return matmul(centred(x, b_dec), W_enc) if pattern is None else pattern.products.clone()

    @staticmethod
    def backward(ctx, grad):
        x, b_dec, W_enc = ctx.saved_tensors
        pattern = ctx.pattern
        grad_x = grad_b_dec = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul(grad, W_enc.T) if pattern is None else pattern.spmm(grad, W_enc.T)
        if b_dec is not None:
            # −Σ_i grad_x_i. Summing over tokens first leaves one product with W_enc instead of B.
            grad_b_dec = -(W_enc @ (grad.sum(0) if pattern is None else pattern.feature_sums(grad)))
        x = centred(x, b_dec) if pattern is None or pattern.x is None else pattern.x
        grad_W_enc = (matmul(grad.T, x) if pattern is None else pattern.spmm_t(grad, x)).T
        return grad_x, grad_b_dec, grad_W_enc, None


def centred(x, b_dec):
    return x if b_dec is None else x - b_dec


class Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, acts, W_dec, pattern):
        ctx.save_for_backward(acts, W_dec)
        ctx.pattern = pattern
        return matmul(acts, W_dec) if pattern is None else pattern.spmm(acts, W_dec)

    @staticmethod
    def backward(ctx, grad):
        acts, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.pattern is not None:
            return *ctx.pattern.decode_gradients(acts, W_dec, grad), None
        # In this order, because the first product takes more memory of its own, and the second returns [B, F].
        grad_W_dec = matmul(acts.T, grad) if ctx.needs_input_grad[1] else None
        grad_acts = matmul(grad, W_dec.T) if ctx.needs_input_grad[0] else None
        return grad_acts, grad_W_dec, None


class AtFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vector, pattern):
        ctx.pattern = pattern
        # A padded pattern has places with column F at its end.
        return F.pad(vector, (0, 1))[pattern.cols.long()]

    @staticmethod
    def backward(ctx, grad):
        return ctx.pattern.feature_sums(grad.contiguous()), None


# Selection


@torch.no_grad()
def select_topk(x: torch.Tensor, W_enc: torch.Tensor, k: int, per_row: bool, wait: bool = True):
    """The pattern of the largest positive entries of z = x W_enc: k of each row, or B·k of the whole batch.

    x [B, d], W_enc [d, F]. Ties at the threshold go to the first in row-major order, so exactly k (B·k) entries are
    selected, or all positive ones if there are fewer. Returns None if there are so many candidates that the dense form
    is cheaper. Raises FloatingPointError if x or W_enc holds NaN or infinity.

    On CUDA with wait=False the result is a triton_ops.PaddedPattern, whose `failure` reports too many candidates and
    NaN or infinity.
    """
    B = len(x)
    if uses_triton(x):
        import triton_ops

        size = B, W_enc.shape[1], k
        return within_capacity(
            size, wait, lambda capacity: triton_ops.select_topk(x, W_enc, k, per_row, capacity),
            lambda: what_is_not_finite(x, W_enc.T, None),
        )  # fmt: skip
    p, error = screen(x, W_enc)
    maxima = group_maxima(p, at_least=4 * k)
    reached = maxima.to(x.dtype) * (1 - relative_error(p.dtype)) - error[:, None]
    if per_row:
        t = kth_largest(reached, k)
    else:
        t = kth_largest(reached.flatten(), B * k).expand(B)
    t = t.clamp(min=0)
    pattern = candidates(p, maxima, t - error)
    if pattern is None:
        return None
    pattern.x, pattern.products = x.detach(), pattern.sddmm(x, W_enc.T)
    values = pattern.products
    keep = topk_mask(values, pattern, k) if per_row else topk_mask(values, None, B * k)
    return pattern.filter(keep & (values > 0))


@torch.no_grad()
def select_above(x: torch.Tensor, W_enc: torch.Tensor, b_enc, theta, margin: float, wait: bool = True):
    """The pattern of the entries of z = x W_enc + b_enc with z > θ − margin; its products are without b_enc.

    x [B, d], W_enc [d, F], b_enc [F], θ [F] or a number. Otherwise as select_topk.
    """
    offset = b_enc - theta
    if uses_triton(x):
        import triton_ops

        size = len(x), W_enc.shape[1], None
        return within_capacity(
            size, wait, lambda capacity: triton_ops.select_above(x, W_enc, offset, margin, capacity),
            lambda: what_is_not_finite(x, W_enc.T, offset),
        )  # fmt: skip
    p, error = screen(x, W_enc, offset)
    maxima = group_maxima(p, at_least=1)
    pattern = candidates(p, maxima, -margin - error)
    if pattern is None:
        return None
    pattern.x, pattern.products = x.detach(), pattern.sddmm(x, W_enc.T)
    return pattern.filter(pattern.products + offset[pattern.cols] > -margin)


_grown = {}  # capacities by (B, F, k)


def candidate_capacity(B: int, num_features: int, k: int | None) -> int:
    """How many candidates there is room for on CUDA; k is None for select_above. It grows after an overflow. Results do
    not depend on it.
    """
    first = B * (4 * k if k else 128)
    return _grown.get((B, num_features, k), min(first, B * num_features // DENSE_FROM))


def within_capacity(size: tuple, wait: bool, select, what_is_wrong):
    """select(candidate_capacity(*size)), a PaddedPattern. With wait, it is repeated with more capacity as needed, and
    trimmed; None if the dense form is cheaper.
    """
    most = size[0] * size[1] // DENSE_FROM
    while True:
        capacity = candidate_capacity(*size)
        pattern = select(capacity)
        if not wait:
            return pattern
        failure, found = torch.stack([pattern.failure, pattern.num_candidates]).tolist()
        if failure & NOT_FINITE:
            raise FloatingPointError(what_is_wrong())
        if found <= capacity:
            return pattern.trimmed()
        if found > most:
            return None
        _grown[size] = min(most, found + found // 4)


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    if values.device.type == "cpu":  # there NumPy is several times as fast
        smaller = values.shape[-1] - k
        return torch.as_tensor(np.partition(values.numpy(), smaller)[..., smaller])
    return values.topk(k, dim=-1, sorted=False).values.amin(-1)


def topk_mask(values: torch.Tensor, pattern: SparsityPattern | None, k: int) -> torch.Tensor:
    """Mask [n] of the k largest values [n] in each row of the pattern, or of all values without a pattern.

    Ties go to the first.
    """
    n = len(values)
    if pattern is None:
        rows, table = values.new_zeros(n, dtype=torch.int64), values[None]
        first = rows[:1]
    else:
        rows, first = pattern.rows, pattern.row_offsets
        place = torch.arange(n, device=rows.device) - first.index_select(0, rows)
        width = int(place.max()) + 1 if n else 0
        table = values.new_full((len(first), width), -torch.inf)
        table.view(-1).index_copy_(0, rows * width + place, values)
    if table.shape[1] <= k:
        return torch.ones_like(values, dtype=torch.bool)
    t = kth_largest(table, k).index_select(0, rows)
    keep = values >= t
    lengths = first.diff(append=first.new_full((1,), n))
    if keep.count_nonzero() > lengths.clamp(max=k).sum():  # several values equal the threshold
        tied = values == t
        nth_tie = tied.cumsum(0)
        nth_tie -= (nth_tie - tied.long())[first.clamp(max=n - 1)][rows]
        keep &= ~tied | (nth_tie <= k - rows[values > t].bincount(minlength=len(first))[rows])
    return keep


# The screen


def screen(x: torch.Tensor, W_enc: torch.Tensor, offset: torch.Tensor | None = None):
    """(x W_enc + offset) [B, F] in low precision and the bound e [B] on the error of each row before its last rounding.

    The matrix is in scratch memory, which the next call on this device and thread overwrites.
    """
    dtype = screen_dtype(x.device)
    W = W_enc.T
    num_features, d = W.shape
    offsets = split(offset, dtype) if offset is not None else []
    width = d + len(offsets)
    x16 = scratch("x", (len(x), width), dtype, x.device)
    W16 = scratch("W", (num_features, width), dtype, x.device)
    x16[:, :d], x16[:, d:] = x, 1  # extra inputs of 1, whose weights are the offset
    for i, part in enumerate(offsets):
        W16[:, d + i] = part
    block_size = 512 if x.device.type == "cpu" else num_features  # small enough to stay in the cache
    norms = []
    for block, block16 in zip(W.split(block_size), W16.split(block_size)):
        block16[:, :d] = block
        norms.append(torch.stack([row_norms(block), row_norms(block - block16[:, :d]), row_norms(block16)]).amax(1))
    w, dw, w16 = torch.stack(norms).amax(0)
    dx, x_norm = row_norms(x - x16[:, :d]), row_norms(x16)
    accumulation = width * 2.0**-23 * x_norm * w16
    offset_error = (offset - sum(part.to(x.dtype) for part in offsets)).abs().amax() if offsets else 0
    error = (dx * w + x_norm * dw + accumulation + offset_error) * (1 + 1e-4)  # 1e-4 for the rounding of the norms
    if not torch.isfinite(error.sum()):
        raise FloatingPointError(what_is_not_finite(x, W, offset))
    p = scratch("p", (len(x), num_features), dtype, x.device)
    with full_precision():
        torch.mm(x16, W16.T, out=p)
    return p, error


def split(offset: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Up to three vectors of `dtype` whose sum is the offset, to about 24 bits."""
    parts, rest = [], offset
    for _ in range(1 if dtype == torch.float32 else 3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return parts


def row_norms(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=None if matrix.dtype.itemsize > 2 else torch.float32)


def relative_error(dtype: torch.dtype) -> float:
    """Relative error of rounding to `dtype`: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2


def group_maxima(p: torch.Tensor, at_least: int) -> torch.Tensor:
    """[B, G]: the maxima of G groups of neighbouring columns, G ≥ at_least if there are as many columns.

    If all entries of a group are negative, the result is some negative number.
    """
    B, num_features = p.shape
    size = 64
    while size > 1 and (num_features % size or num_features // size < at_least):
        size //= 2
    groups = p.view(B, num_features // size, size)
    if p.dtype == torch.bfloat16:
        # Compared as integers, which is much faster on CPUs and gives the same order for positive numbers.
        return groups.view(torch.int16).amax(-1).view(torch.bfloat16)
    return groups.amax(-1)


def candidates(p: torch.Tensor, maxima: torch.Tensor, floor: torch.Tensor) -> SparsityPattern | None:
    """The entries whose screened value p [B, F] reaches floor [B] of their row; None if more than 1/DENSE_FROM do."""
    num_features, groups = p.shape[1], maxima.shape[1]
    size = num_features // groups
    floor = floor.to(p.dtype)
    # The maximum of a group without positive numbers is unknown (group_maxima), so a negative floor includes it.
    flagged = maxima >= torch.where(floor > 0, floor, -torch.inf)[:, None]
    group = nonzero(flagged.flatten())
    row = group // groups
    members, level = p.view(-1, size).index_select(0, group), floor.index_select(0, row)[:, None]
    if p.dtype == torch.bfloat16 and (floor > 0).all():  # positive numbers compare as integers, which is faster
        members, level = members.view(torch.int16), level.view(torch.int16)
    hits = members >= level
    if hits.count_nonzero() > p.numel() // DENSE_FROM:  # sum would convert to int64 first
        return None
    hit = nonzero(hits.flatten())
    nth = hit >> size.bit_length() - 1  # size is a power of 2
    first = (group - row * groups) * size
    return SparsityPattern(row.index_select(0, nth), first.index_select(0, nth) + (hit & size - 1), p.shape)


def what_is_not_finite(x, W, offset) -> str:
    for name, tensor in (("activations", x), ("encoder weights", W), ("encoder biases or thresholds", offset)):
        if tensor is not None and not tensor.isfinite().all():
            return f"NaN or infinity in the {name}"
    return "the activations or encoder weights are too large: their norms overflow"


# What the device can do


def sparse_is_cheaper(num_features: int, k: int, device: torch.device) -> bool:
    """Whether the sparse form of a TopK costs less than the dense one."""
    return num_features >= FEATURES_PER_ACTIVE * k and has_sparse_kernels(device)


@lru_cache
def has_sparse_kernels(device: torch.device) -> bool:
    """Whether torch has the two kernels on this device. Tries them."""
    try:
        one, zero = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        pattern = SparsityPattern(zero, zero, (1, 1))
        return bool(pattern.sddmm(one, one) == 1) and bool(pattern.spmm(one[0], one) == 1)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        return False


def uses_triton(x: torch.Tensor) -> bool:
    """Whether the kernels of triton_ops.py are used for this tensor: float32, CUDA, compute capability ≥ 8.0."""
    return x.is_cuda and x.dtype == torch.float32 and triton_works(x.device)


@lru_cache
def triton_works(device: torch.device) -> bool:
    """Tests the kernels on a small problem. If they fail, warns, and torch's own kernels are used."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        import triton_ops

        with torch.cuda.device(device):
            triton_ops.self_test(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton for this torch, no C compiler, an unknown driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        warnings.warn(f"the Triton kernels do not work on {device} ({reason}): steps will be slower", stacklevel=2)
        return False
    return True


_scratch = threading.local()  # each thread has its own


def scratch(name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised matrix in memory that is reused: allocating it costs a CPU a tenth of the product."""
    kept, key = _scratch.__dict__, (name, dtype, device)
    size = shape[0] * shape[1]
    if key not in kept or kept[key].numel() < size:
        kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(shape)


@lru_cache
def screen_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:  # is_bf16_supported() would count emulation
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


# Precision


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b. Where the kernels are used, the error is at most 2⁻¹⁵ ‖a_i‖ ‖b_j‖ (triton_ops.matmul)."""
    if not uses_triton(a) or 0 in (*a.shape, *b.shape):  # a shard may have no dead feature, or none of a prefix
        return a @ b
    import triton_ops

    return triton_ops.matmul(a, b)


def sae_arithmetic(function):
    """Decorator for functions whose first argument is an SAE: full_precision, with the SAE's CUDA device as the current
    one (Triton launches kernels there).
    """

    @wraps(function)
    def wrapped(sae, *args, **options):
        device = sae.W_enc.device
        with full_precision(), torch.cuda.device(device if device.type == "cuda" else -1):
            return function(sae, *args, **options)

    return wrapped


_precision = threading.local()  # active: the precision that a running call of full_precision has set in this thread


@contextmanager
def full_precision(float32: str = "ieee"):
    """Sets the precision of matrix products, and restores the user's settings afterwards. float32 operands are not
    rounded to bfloat16, nor to TF32 unless float32="tf32"; products of 16-bit operands accumulate in float32. Setting
    them takes a while, so a call within another one for the same `float32` does nothing.
    """
    outer, cuda = getattr(_precision, "active", None), torch.backends.cuda.matmul
    if outer == float32:
        yield
        return
    sums = [name for name in SUMS_IN_16_BITS if hasattr(cuda, name)]
    sums_before = [getattr(cuda, name) for name in sums]
    if hasattr(cuda, "fp32_precision"):
        modules = cuda, torch.backends.mkldnn.matmul
        before = [module.fp32_precision for module in modules]
    else:  # torch before 2.9
        modules, before = (), torch.get_float32_matmul_precision()
    try:
        for name in sums:
            setattr(cuda, name, False)
        for module in modules:
            module.fp32_precision = float32 if module is cuda else "ieee"
        if not modules:
            torch.set_float32_matmul_precision("highest" if float32 == "ieee" else "high")
        _precision.active = float32
        yield
    finally:
        _precision.active = outer
        for name, value in zip(sums, sums_before):
            setattr(cuda, name, value)
        for module, precision in zip(modules, before):
            module.fp32_precision = precision
        if not modules:
            torch.set_float32_matmul_precision(before)


SUMS_IN_16_BITS = (
    "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip
