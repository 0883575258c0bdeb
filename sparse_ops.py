"""The fast exact path: of B·F pre-activations only about B·k survive, so only they are computed in full.

    z = x W_enc [B, F] is screened in bfloat16 (half the time of float32 on a CPU with bf16 instructions, far less on a
    GPU). Each screened value comes with a bound on its error, so the entries that can possibly be selected are known
    for certain; they alone are computed in the weights' own precision, and the selection is made among those. It is the
    selection that the dense product would give, up to the rounding of the dense product itself.

    The bound. Let x16 and w16 be the rounded operands and δx = x − x16, δw = w − w16 what the rounding took away, known
    exactly. From x·w − x16·w16 = δx·w + x16·δw (Cauchy–Schwarz), and float32 accumulation over d terms:

        |z_ij − p_ij| ≤ e_i = ‖δx_i‖ max_j‖w_j‖ + ‖x16_i‖ max_j‖δw_j‖ + d·2⁻²³ ‖x16_i‖ max_j‖w16_j‖

    p being the screened product before it is rounded to bfloat16 (half a unit in the last place: a factor 1 ± 2⁻⁸).

    The k largest. The maxima of disjoint groups of entries are entries themselves, so that if t is the k-th largest of
    (maximum · (1 − 2⁻⁸) − e), k entries of z reach t. Every winner then has z ≥ t, p ≥ t − e and, rounding being
    monotone, screened value ≥ round(t − e): these are the candidates. No guess is involved, and no retry.

What survives is held as Entries: the places (row = token, column = feature) in row-major order, and a vector of values.
All further products are over the entries alone, by two kernels that every backend has: sums of weighted rows
(embedding_bag) and dot products of pairs of rows (its gradient for the weights). Both are far faster where neighbouring
entries share a row of the larger matrix, hence the feature-major order that Entries keeps beside the other.

A float32 screen takes the place of the bfloat16 one where that is not fast (see screen_dtype), with the same results to
the last bit: values are always those of the second computation.
"""

import os
from contextlib import contextmanager
from functools import cached_property, lru_cache

# Fresh memory costs a page fault per 4 KiB, a fifth of a step on a CPU; torch can ask for pages of 2 MiB. It looks here
# when it first allocates, so this comes before.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

# A dot product of an entry costs about as much as this many entries of a dense product.
DENSE_FROM = 16


class Entries:
    """Places in a [B, F] matrix, in row-major order: rows [n] and cols [n], int64."""

    def __init__(self, rows: torch.Tensor, cols: torch.Tensor, shape: tuple[int, int]):
        self.rows, self.cols, self.shape = rows, cols, shape

    @classmethod
    def of(cls, matrix: torch.Tensor) -> tuple["Entries", torch.Tensor]:
        """Those of a matrix [B, F] that are not 0, and their values [n]."""
        rows, cols = matrix.detach().nonzero(as_tuple=True)
        return cls(rows, cols, matrix.shape), matrix.detach()[rows, cols]

    def __len__(self):
        return len(self.rows)

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """[B]: where each row's entries begin."""
        return starts(self.rows, self.shape[0])

    @cached_property
    def by_feature(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Feature-major: (order [n] that sorts the entries, rows [n], cols [n], where each feature's begin [F])."""
        # Small integers are sorted several times as fast.
        narrow = torch.int16 if self.shape[1] < 2**15 else torch.int32
        order = self.cols.to(narrow).sort(stable=True).indices
        cols = self.cols[order]
        return order, self.rows[order], cols, starts(cols, self.shape[1])

    def select(self, keep: torch.Tensor) -> tuple["Entries", torch.Tensor]:
        """The entries where the mask keep [n] is True, and their numbers."""
        index = keep.nonzero().squeeze(-1)
        return Entries(self.rows[index], self.cols[index], self.shape), index

    def sparse_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """values [n] as a sparse (COO, coalesced) tensor [B, F]."""
        index = torch.stack([self.rows, self.cols])
        return torch.sparse_coo_tensor(index, values, self.shape, is_coalesced=True, check_invariants=False)

    def features_with(self, mask: torch.Tensor) -> torch.Tensor:
        """[F]: whether a feature has an entry where the mask [n] is True."""
        found = torch.zeros(self.shape[1], dtype=torch.bool, device=mask.device)
        return found.index_fill_(0, self.cols[mask], True)

    def dots(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[n]: a[row] · b[col] of a [B, d] and b [F, d]."""
        order, rows, cols, feature_starts = self.by_feature
        by_feature = torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, cols, feature_starts, rows, 0)
        return torch.empty_like(by_feature).index_copy_(0, order, by_feature)

    def sum_into_rows(self, values: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[B, d]: of each row, Σ value · b[col], of b [F, d]."""
        return weighted_sums(values, self.cols, self.row_starts, b)

    def sum_into_features(self, values: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """[F, d]: of each feature, Σ value · a[row], of a [B, d]."""
        order, rows, _, feature_starts = self.by_feature
        return weighted_sums(values[order], rows, feature_starts, a)

    def feature_sums(self, values: torch.Tensor) -> torch.Tensor:
        """[F]: of each feature, Σ value."""
        order, rows, _, feature_starts = self.by_feature
        # The same kernel with a table of ones: unlike an atomic sum it always adds in the same order.
        return weighted_sums(values[order], rows * 0, feature_starts, values.new_ones(1, 1)).squeeze(-1)


def starts(sorted_index: torch.Tensor, n: int) -> torch.Tensor:
    """[n]: where each of 0 … n − 1 begins in a sorted vector of them."""
    return torch.searchsorted(sorted_index, torch.arange(n, device=sorted_index.device))


def weighted_sums(weights, index, bag_starts, table):
    return F.embedding_bag(index, table, bag_starts, mode="sum", per_sample_weights=weights)


# What is differentiable


class PreActivation(torch.autograd.Function):
    """z = (x − b_dec) W_enc, [n] at the entries, whose values are known already, or [B, F] if there are none given.

    b_dec may be None.
    """

    @staticmethod
    def forward(ctx, x, b_dec, W_enc, entries=None, values=None):
        ctx.save_for_backward(x, b_dec, W_enc)
        ctx.entries = entries
        return inputs(x, b_dec) @ W_enc if entries is None else values.clone()

    @staticmethod
    def backward(ctx, grad):
        x, b_dec, W_enc = ctx.saved_tensors
        entries = ctx.entries
        grad_x = grad_b_dec = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ W_enc.T if entries is None else entries.sum_into_rows(grad, W_enc.T)
        if b_dec is not None:
            # Σ_i of −grad_x, but the sum over tokens first: one vector instead of B.
            grad_b_dec = -(W_enc @ (grad.sum(0) if entries is None else entries.feature_sums(grad)))
        x = inputs(x, b_dec)
        grad_W_enc = (grad.T @ x if entries is None else entries.sum_into_features(grad, x)).T
        return grad_x, grad_b_dec, grad_W_enc, None, None


def inputs(x, b_dec):
    return x if b_dec is None else x - b_dec


class Decode(torch.autograd.Function):
    """[B, d] = f W_dec of activations [n] at the entries."""

    @staticmethod
    def forward(ctx, acts, W_dec, entries):
        ctx.save_for_backward(acts, W_dec)
        ctx.entries = entries
        return entries.sum_into_rows(acts, W_dec)

    @staticmethod
    def backward(ctx, grad):
        acts, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        return ctx.entries.dots(grad, W_dec), ctx.entries.sum_into_features(acts, grad), None


class AtFeatures(torch.autograd.Function):
    """[n]: a vector [F] at the features of the entries."""

    @staticmethod
    def forward(ctx, vector, entries):
        ctx.entries = entries
        return vector[entries.cols]

    @staticmethod
    def backward(ctx, grad):
        return ctx.entries.feature_sums(grad.contiguous()), None


# Selection


@torch.no_grad()
def largest(x: torch.Tensor, W_enc: torch.Tensor, k: int, per_row: bool) -> tuple[Entries, torch.Tensor] | None:
    """The largest positive entries of z = x W_enc, and their values [n]: k of each row, or B·k of the whole batch.

    x [B, d], W_enc [d, F]. Ties at the threshold go to the first in row-major order, so that exactly k (B·k) are
    selected, less where fewer are positive. None if there are too many candidates for this to pay. Raises
    FloatingPointError if x or W_enc holds NaN or infinity.
    """
    B = len(x)
    z, error = screen(x, W_enc)
    maxima = group_maxima(z, at_least=4 * k)
    reached = maxima.to(x.dtype) * (1 - relative_error(z.dtype)) - error[:, None]
    if per_row:
        t = kth_largest(reached, k)
    else:
        t = kth_largest(reached.flatten(), B * k).expand(B)
    t = t.clamp(min=0)
    entries = candidates(z, maxima, t - error)
    if entries is None:
        return None
    values = entries.dots(x, W_enc.T)
    keep = among_largest(values, entries, k) if per_row else among_largest(values, None, B * k)
    entries, index = entries.select(keep & (values > 0))
    return entries, values[index]


@torch.no_grad()
def above(x: torch.Tensor, W_enc: torch.Tensor, b_enc, theta, margin: float) -> tuple[Entries, torch.Tensor] | None:
    """The entries of z = x W_enc + b_enc with z > θ − margin, and their values [n] without b_enc.

    x [B, d], W_enc [d, F], b_enc [F], θ [F] or a number. None if there are too many candidates for this to pay. Raises
    FloatingPointError if x or a weight holds NaN or infinity.
    """
    offset = b_enc - theta
    z, error = screen(x, W_enc, offset)
    maxima = group_maxima(z, at_least=1)
    entries = candidates(z, maxima, -margin - error)
    if entries is None:
        return None
    values = entries.dots(x, W_enc.T)
    entries, index = entries.select(values + offset[entries.cols] > -margin)
    return entries, values[index]


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.kthvalue(values.shape[-1] - k + 1, dim=-1).values


def among_largest(values: torch.Tensor, entries: Entries | None, k: int) -> torch.Tensor:
    """Mask [n] of the k largest of values [n] in each row of the entries, or of all where entries is None.

    Ties go to the first.
    """
    if entries is None:
        table, rows, row_starts = values[None], torch.zeros_like(values, dtype=torch.int64), None
    else:
        rows, row_starts = entries.rows, entries.row_starts
        place = torch.arange(len(rows), device=rows.device) - row_starts[rows]
        width = int(place.max()) + 1 if len(rows) else 0
        table = values.new_full((entries.shape[0], width), -torch.inf)
        table[rows, place] = values
    if table.shape[1] <= k:
        return torch.ones_like(values, dtype=torch.bool)
    t = kth_largest(table, k)
    more, tied = values > t[rows], values == t[rows]
    still_wanted = k - (table > t[:, None]).sum(-1)
    nth_tie = tied.cumsum(0)
    if entries is not None:
        first = row_starts.clamp(max=len(rows) - 1)
        nth_tie = nth_tie - (nth_tie - tied.long())[first][rows]
    return more | (tied & (nth_tie <= still_wanted[rows]))


# The screen


def screen(x: torch.Tensor, W_enc: torch.Tensor, offset: torch.Tensor | None = None):
    """(x W_enc + offset) [B, F] in low precision and the bound e [B] on the error of each row before its last rounding.

    The matrix is scratch memory: the next call on this device overwrites it.
    """
    dtype = screen_dtype(x.device)
    W = W_enc.T
    num_features, d = W.shape
    offsets = split(offset, dtype) if offset is not None else []
    width = d + len(offsets)
    x16 = scratch("x", (len(x), width), dtype, x.device)
    W16 = scratch("W", (num_features, width), dtype, x.device)
    x16[:, :d], x16[:, d:] = x, 1  # the offset is a product with further inputs that are 1
    for i, part in enumerate(offsets):
        W16[:, d + i] = part
    block_size = 512 if x.device.type == "cpu" else num_features  # the cache then holds what is read again
    norms = []
    for block, block16 in zip(W.split(block_size), W16.split(block_size)):
        block16[:, :d] = block
        norms.append(torch.stack([row_norms(block), row_norms(block - block16[:, :d]), row_norms(block16)]).amax(1))
    w, dw, w16 = torch.stack(norms).amax(0)
    dx, x_norm = row_norms(x - x16[:, :d]), row_norms(x16)
    accumulation = width * 2.0**-23 * x_norm * w16
    left_over = (offset - sum(part.to(x.dtype) for part in offsets)).abs().amax() if offsets else 0
    error = (dx * w + x_norm * dw + accumulation + left_over) * (1 + 1e-4)  # the norms are rounded, too
    if not torch.isfinite(error.sum()):
        raise FloatingPointError(what_is_not_finite(x, W, offset))
    z = scratch("z", (len(x), num_features), dtype, x.device)
    with full_precision_sums():
        torch.mm(x16, W16.T, out=z)
    return z, error


def split(offset: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Up to three vectors of `dtype` whose sum is the offset, to about 24 bits."""
    parts, rest = [], offset
    for _ in range(3 if dtype == torch.bfloat16 else 1):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    return parts


def row_norms(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=None if matrix.dtype.itemsize > 2 else torch.float32)


def relative_error(dtype: torch.dtype) -> float:
    """Of one rounding to `dtype`: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2


def group_maxima(z: torch.Tensor, at_least: int) -> torch.Tensor:
    """[B, G]: the maxima of G groups of neighbouring columns, G ≥ at_least if there are as many columns.

    Where all of a group are negative the result is some negative number.
    """
    B, num_features = z.shape
    size = 64
    while size > 1 and (num_features % size or num_features // size < at_least):
        size //= 2
    groups = z.view(B, num_features // size, size)
    if z.dtype == torch.bfloat16:
        # Compared as integers, which CPUs are much better at: the same order among positive numbers.
        return groups.view(torch.int16).amax(-1).view(torch.bfloat16)
    return groups.amax(-1)


def candidates(z: torch.Tensor, maxima: torch.Tensor, floor: torch.Tensor) -> Entries | None:
    """The entries whose screened value z [B, F] reaches floor [B] of their row; None if more than 1/DENSE_FROM do."""
    B, num_features = z.shape
    groups = maxima.shape[1]
    size = num_features // groups
    floor = floor.to(z.dtype)
    # A group without positive numbers has no true maximum (group_maxima), so a negative floor lets it pass.
    flagged = maxima >= torch.where(floor > 0, floor, -torch.inf)[:, None]
    group = flagged.flatten().nonzero().squeeze(-1)
    members, level = z.view(-1, size).index_select(0, group), floor[group // groups][:, None]
    if z.dtype == torch.bfloat16 and (floor > 0).all():  # among positive numbers integers compare the same, and faster
        members, level = members.view(torch.int16), level.view(torch.int16)
    hits = members >= level
    if hits.count_nonzero() > z.numel() // DENSE_FROM:  # sum would make it int64 first
        return None
    hit = hits.flatten().nonzero().squeeze(-1)
    flat = group[hit // size] * size + hit % size
    return Entries(flat // num_features, flat % num_features, z.shape)


def what_is_not_finite(x, W, offset) -> str:
    for name, tensor in (("activations", x), ("encoder weights", W), ("encoder biases or thresholds", offset)):
        if tensor is not None and not tensor.isfinite().all():
            return f"NaN or infinity in the {name}"
    return "the activations or encoder weights are too large: their norms overflow"


def pays(num_features: int, k: int, device: torch.device) -> bool:
    """Whether the sparse form of a TopK costs less than the dense one."""
    return num_features >= 32 * k and possible(device)


@lru_cache
def possible(device: torch.device) -> bool:
    """Whether this device has the two kernels, found out by trying."""
    try:
        one, zero = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        entries = Entries(zero, zero, (1, 1))
        return bool(entries.dots(one, one) == 1) and bool(entries.sum_into_rows(one[0], one) == 1)
    except (NotImplementedError, RuntimeError):
        return False


_scratch = {}


def scratch(name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised matrix in memory that is kept: fresh memory of this size costs a CPU a tenth of the product."""
    key = (name, dtype, device)
    size = shape[0] * shape[1]
    if key not in _scratch or _scratch[key].numel() < size:
        _scratch[key] = torch.empty(size, dtype=dtype, device=device)
    return _scratch[key][:size].view(shape)


@lru_cache
def screen_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def full_precision_sums():
    """CUDA may otherwise sum a bfloat16 product in bfloat16, and a float32 one in TF32, which the bound excludes."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32 = False, False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32 = before
