"""One SAE over several ranks (config key feature_shards): each holds a contiguous slice of the features.

With S = feature_shards, the ranks 0 … S − 1 are a team, the next S ranks another. A team trains its SAEs together. Each
rank has its slice of W_enc, W_dec, the biases, the thresholds, the counters and Adam's state; all have b_dec. All see
the same batches. What they exchange in a step:

    selection        histograms of the bits of activations, until the B·k-th largest of all shards is known (`largest`)
    reconstructions  each rank's part [B, d], which are added in the order of the shards (`add`)
    gradients        the part of b_dec's gradient that comes from the encoder (`copy`), and the norm of the whole
    numbers          counts, sums, the smallest activation, and whether any rank found NaN or needs the dense form

No rank sends candidates, and the selected set is that of one process whenever the values have the same bits. The
reconstruction is that of one process up to the rounding of a sum in another order.

`add` and `copy` are a pair: one sums over shards forward, the other backward (arXiv 1909.08053, section 3).
"""

from functools import lru_cache, reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F

import distributed
from console import InputError
from sparse_ops import keep_top_k

MAX_COUNTS = 2**16  # bins of a round's histograms, all rows together


class Shards:
    """The team of this rank: `count` ranks, in the order of their slices. With one rank, nothing is exchanged."""

    def __init__(self, count: int = 1, group=None):
        self.count, self.group = count, group

    @property
    def index(self) -> int:
        """The index of this rank's slice."""
        return distributed.rank() % self.count

    @property
    def team_index(self) -> int:
        """The index of this rank's team."""
        return distributed.rank() // self.count

    def num_before(self, feature: int, dict_size: int) -> int:
        """How many of this rank's features come before `feature`."""
        size = dict_size // self.count
        return min(max(feature - self.index * size, 0), size)

    def features(self, dict_size: int) -> slice:
        """This rank's features."""
        size = dict_size // self.count
        return slice(self.index * size, (self.index + 1) * size)

    # Exchange

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[count, …]: the tensors of all shards, which have the same shape."""
        if self.count == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        with distributed.connection():
            dist.all_gather(found, tensor.contiguous(), group=self.group)
        return torch.stack(found)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over shards, in their order: the same bits on every rank. Each rank adds up a part of the tensor."""
        if self.count == 1:
            return tensor
        part = -(-tensor.numel() // self.count)
        sent = F.pad(tensor.flatten(), (0, part * self.count - tensor.numel()))
        received = torch.empty_like(sent)
        with distributed.connection():
            dist.all_to_all_single(received, sent, group=self.group)
        total = self.gather(reduce(torch.add, received.view(self.count, part)))
        return total.flatten()[: tensor.numel()].view(tensor.shape)

    def minimum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.gather(tensor).amin(0)

    def on(self, index: int, function) -> None:
        """function() on the rank of this index, while the others wait. An OSError is raised on all of them."""
        if self.count == 1:
            function()
        else:
            distributed.on_all(function if self.index == index else lambda: None, self.group)

    def any(self, flag: bool) -> bool:
        return flag if self.count == 1 else bool(self.gather(torch.tensor([flag])).any())

    def agree_on_pattern(self, function):
        """The pattern that function() returns, or None, for the dense form, if it returns None on any rank.

        Raises FloatingPointError on every rank if any does.
        """
        if self.count == 1:
            return function()
        pattern = error = None
        try:
            pattern = function()
        except FloatingPointError as raised:
            error = raised
        if self.any(error is not None):
            raise next(filter(None, distributed.gather(error, self.group)))
        return None if self.any(pattern is None) else pattern

    # Differentiable

    def add(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over shards. Its gradient is that of each part."""
        return part if self.count == 1 else Add.apply(part, self)

    def copy(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that all shards hold, for use with a slice. Its gradient is summed over shards."""
        return parameter if self.count == 1 else Copy.apply(parameter, self)

    # Selection

    def keep_top_k(self, z: torch.Tensor, k: int, per_row: bool) -> torch.Tensor:
        """relu(z) [B, F] with all but the k largest of each row, or the B·k of the batch, set to 0: counted over all
        shards.
        """
        acts = keep_top_k(z, k) if per_row else keep_top_k(z.flatten(), k * len(z)).view_as(z)
        if self.count == 1:
            return acts
        rows, cols = acts.detach().nonzero(as_tuple=True)
        keep = torch.zeros_like(acts)
        keep[rows, cols] = self.largest(acts.detach()[rows, cols], rows, len(acts), k, per_row).to(acts.dtype)
        return acts * keep

    @torch.no_grad()
    def largest(self, values: torch.Tensor, rows: torch.Tensor, num_rows: int, k: int, per_row: bool) -> torch.Tensor:
        """Mask [n] of the k largest of each row, or the k · num_rows of the batch, among the values of all shards.

        values [n] are positive and in row-major order, as are their rows [n]. Ties go to the first in row-major order
        of the whole dictionary.

        A radix select over the bits of the values, which for positive floats have the same order. Each round finds the
        next `digit` bits of the k-th largest value, from a histogram of them over the values with the same higher bits.
        """
        num_groups = num_rows if per_row else 1
        group = rows if per_row else torch.zeros_like(rows)
        wanted = torch.full((num_groups,), k if per_row else k * num_rows, device=values.device)
        bits = values.view({4: torch.int32, 8: torch.int64}[values.itemsize]).long()
        kth = torch.zeros_like(wanted)  # the bits found so far
        left = 8 * values.itemsize - 1  # the number of bits still to be found; the sign is 0
        digit = min(11, max(1, (MAX_COUNTS // max(num_groups, 1)).bit_length() - 1))
        while left:
            digit = min(digit, left)
            found = (bits >> left) == (kth[group] >> left)  # equal to the k-th in the bits found so far
            left -= digit
            place = (group[found] << digit) + (bits[found] >> left & (1 << digit) - 1)
            counts = self.sum(place.bincount(minlength=num_groups << digit)).view(num_groups, -1)
            at_least = counts.flip(1).cumsum(1).flip(1)  # per digit, how many have it or a higher one
            highest = ((at_least >= wanted[:, None]).sum(1) - 1).clamp(min=0)[:, None]  # 0: there are not enough
            counts = counts.gather(1, highest)[:, 0]
            wanted -= at_least.gather(1, highest)[:, 0] - counts  # those above are selected
            kth |= highest[:, 0] << left
        tied = bits == kth[group]
        keep = (bits > kth[group]) | tied
        if (counts <= wanted).all():  # the same on every rank
            return keep
        of_shards = self.gather(rows[tied].bincount(minlength=num_rows))
        before = of_shards[: self.index].sum(0)  # of each row, the ties in the shards before
        if not per_row:
            of_rows = of_shards.sum(0)
            before += of_rows.cumsum(0) - of_rows
        nth = tied.cumsum(0)
        of_own = of_shards[self.index]
        nth += (before - (of_own.cumsum(0) - of_own))[rows]
        return keep & ~(tied & (nth > wanted[group]))


WHOLE = Shards()  # of an SAE that is not split


@lru_cache
def team(count: int) -> Shards:
    """This rank's team of `count` ranks. Every rank must call it. Raises InputError unless they divide all ranks."""
    if count == 1:
        return WHOLE
    if distributed.size() % count:
        raise InputError(
            f"feature_shards = {count} is not allowed with {distributed.size()} of torchrun's ranks: their number must "
            f"be a multiple of it (torchrun --nproc-per-node {count})"
        )
    firsts = range(0, distributed.size(), count)
    with distributed.connection():
        groups = [dist.new_group(range(first, first + count), timeout=distributed.TIMEOUT) for first in firsts]
    return Shards(count, groups[distributed.rank() // count])


class Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, shards):
        return shards.sum(part)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, shards):
        ctx.shards = shards
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad):
        return ctx.shards.sum(grad), None
