"""The five SAEs: the four of arXiv 2412.06410 and Matryoshka BatchTopK; and splicing them into a language model.

Shapes throughout: B tokens in a batch, d = act_size, F = dict_size, k = top_k.

    W_enc [d, F]   W_dec [F, d], rows of unit norm   b_enc [F]   b_dec [d]

A subclass of BaseAutoencoder defines `select`, `pre_activation` and `activation`. It may override the sparsity penalty
(`sparsity`) and what the loss compares with the input (`reconstructions`). BaseAutoencoder has the rest.

Pre-activations z and activations f have two forms: dense [B, F], or a vector [n] of the values at the places of a
`pattern` (sparse_ops.py), which are all places where f can be positive. `select` returns the pattern if the sparse form
is cheaper, else None.

With feature_shards, an SAE holds a slice of the features, and F is its length (shards.py). All ranks of its team must
then call the same methods. Reconstructions and the numbers in the output are those of the whole SAE.
"""

from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import sparse_ops
from config import prefix_sizes
from console import InputError
from shards import WHOLE, Shards
from sparse_ops import GOES_DENSE, GOES_SPARSE, SparsityPattern, at_features, sae_arithmetic

SPARSE_AFTER = 10  # batches in a row with few active features after which the sparse form is used again


class Counts(NamedTuple):
    """Two numbers on the device that the host must know before it can launch a step."""

    until_sparse: int  # batches until the sparse form is used
    most_dead: int  # upper bound on the number of dead features in the next batch


class BaseAutoencoder(nn.Module):
    """x̂ = (x − μ)/(σ + 1e-5);  f = activation(pre_activation(x̂));  reconstruction = f W_dec + b_dec.

    `cfg` is a completed config (config.post_init_cfg). The initial weights are drawn from a generator seeded with
    cfg["seed"]; torch's global generator is neither read nor set. `shards` says which features this rank holds.
    """

    def __init__(self, cfg: dict, shards: Shards = WHOLE):
        super().__init__()
        self.cfg, self.shards = cfg, shards
        d, dict_size, dtype = cfg["act_size"], cfg["dict_size"], getattr(torch, cfg["dtype"])
        if d is None:
            raise InputError("act_size is None: set it to the width of the activations before building an SAE")
        # The published code's Kaiming initialisation of a [d, F] matrix uses F as the fan-in: U(±√(6/F)).
        bound = (6 / dict_size) ** 0.5
        generator = torch.Generator().manual_seed(cfg["seed"])
        own = shards.features(dict_size)
        weights = torch.empty(d, own.stop - own.start, dtype=dtype)
        for row in weights:  # row by row: no rank holds the weights of all shards
            row.copy_(torch.rand(dict_size, generator=generator, dtype=dtype)[own])
        weights = ((weights * 2 - 1) * bound).T.contiguous()
        num_own = len(weights)
        self.W_enc = nn.Parameter(weights.T)  # shape [d, F], feature-major in memory: the sparse form reads columns
        self.W_dec = nn.Parameter(F.normalize(weights, dim=-1))
        self.b_enc = nn.Parameter(torch.zeros(num_own, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        # Training batches since each feature was last active.
        self.register_buffer("num_batches_not_active", torch.zeros(num_own, dtype=torch.int64))
        self.to(cfg["device"])

    # What the subclasses define

    def select(self, x: torch.Tensor, wait: bool) -> SparsityPattern | None:
        """The places where f or its gradient can be nonzero, for normalised inputs [B, d]; None if dense is cheaper.

        wait: whether to wait for the device (sparse_ops.select_topk).
        """
        raise NotImplementedError

    def pre_activation(self, x: torch.Tensor, pattern: SparsityPattern | None = None) -> torch.Tensor:
        """z of normalised inputs [B, d]: [B, F], or [n] at the pattern."""
        raise NotImplementedError

    def activation(self, z: torch.Tensor, pattern: SparsityPattern | None = None) -> torch.Tensor:
        """f, non-negative and sparse, in the shape of z."""
        raise NotImplementedError

    def sparsity(self, z: torch.Tensor, acts: torch.Tensor, pattern: SparsityPattern | None) -> torch.Tensor:
        """The penalty, summed over the batch: by default the sum of the activations. The loss adds l1_coeff / B times
        this.
        """
        return sparse_ops.total(acts, pattern)

    def reconstructions(self, acts: torch.Tensor, pattern: SparsityPattern | None) -> list[torch.Tensor]:
        """The reconstructions [B, d] whose mean squared errors the loss averages. The last uses all features."""
        return [self.shards.add(sparse_ops.decode(acts, self.W_dec, pattern)) + self.b_dec]

    aux_loss_on_dead_features = False  # whether the loss includes aux_loss

    # What they share

    def preprocess_input(
        self, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[B, d] in the language model's units -> (x̂ [B, d], μ [B, 1], σ [B, 1]); σ is unbiased over d.

        x may have any device and float dtype; the results have the SAE's. x̂ is written to `out` if that is given.
        """
        x = x.to(self.W_enc)
        if not self.cfg["input_unit_norm"]:
            return x if out is None else out.copy_(x), None, None
        return sparse_ops.normalise(x, out)

    def postprocess_output(self, reconstruction, mean, std) -> torch.Tensor:
        """[B, d] back in the language model's units."""
        return reconstruction if mean is None else torch.addcmul(mean, reconstruction, std)

    @sae_arithmetic
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations [..., F], dense, of the language model's activations [..., d].

        In train() a BatchTopK selects among all of x. Raises RuntimeError in eval() if its threshold has never been
        estimated.
        """
        tokens = self.preprocess_input(x.reshape(-1, x.shape[-1]))[0]
        acts = self.activation(self.pre_activation(tokens))
        return acts.view(*x.shape[:-1], acts.shape[-1])

    @sae_arithmetic
    def decode(self, acts: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction [..., d] of feature activations [..., F].

        If the SAE normalises its input (input_unit_norm), the reconstruction is normalised too. With `like`, the
        vectors [..., d] that were encoded, it is rescaled with their mean and standard deviation to their units.
        """
        tokens = acts.reshape(-1, acts.shape[-1])
        reconstruction = self.shards.add(sparse_ops.decode(tokens, self.W_dec)) + self.b_dec
        reconstruction = reconstruction.view(*acts.shape[:-1], len(self.b_dec))
        if like is None:
            return reconstruction
        _, mean, std = self.preprocess_input(like)
        return self.postprocess_output(reconstruction, mean, std)

    @sae_arithmetic
    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations of the language model [..., d] -> (their reconstruction, in the same units, and f [..., F])."""
        acts = self.encode(x)
        return self.decode(acts, like=x), acts

    @contextmanager
    def splice(self, model):
        """Context manager in which `model` (a TransformerBridge, e.g. from language_model.load_model) uses this SAE's
        reconstructions instead of its activations at cfg["hook_point"]. The first eval_skip_positions of each context
        and tokens of exclude_tokens keep their activations. Whole contexts only: generate with use_past_kv_cache=False.
        """
        from language_model import excluded_ids  # here, because it imports this module

        skip = self.cfg["eval_skip_positions"]
        seen = []  # the tokens of the current forward pass, from a hook on the embedding
        excluded = torch.tensor(excluded_ids(self.cfg, model) or [], dtype=torch.int64)

        def replace(acts, hook):
            x = acts[:, skip:]
            replaced = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            if len(excluded):
                replaced = ~torch.isin(seen.pop()[:, skip:], excluded.to(x.device))
            reconstruction = self.reconstruct(x[replaced])[0].to(acts)
            return torch.cat([acts[:, :skip], x.masked_scatter(replaced[..., None], reconstruction)], 1)

        with model.hooks(fwd_hooks=[(self.cfg["hook_point"], replace)]), ExitStack() as stack:
            if len(excluded):
                handle = model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
                stack.callback(handle.remove)
            yield model

    @sae_arithmetic
    def forward(self, x: torch.Tensor) -> dict:
        """Reconstruct B activations [..., d] of the language model; returns a dict of tensors:

            sae_out                    [..., d], in the units of x
            feature_acts               [B, F], dense or sparse COO (`.to_dense()` works on both)
            loss                       l2_loss + l1_loss + aux_loss; with several `reconstructions`, the mean of their
                                       errors instead of l2_loss
            l2_loss                    mean over B and d of the squared error of normalised inputs, from all features
            l1_loss, aux_loss          with their coefficients; aux_loss only if the SAE has one
            l0_norm, l1_norm           number and sum of the active features of a token, on average
            num_dead_features          not active for n_batches_to_dead batches, this one included
            num_batches_not_active     [F], the counters after this batch

        The SAE does not change: a training loop of your own must call update_statistics(output), as
        training_step.training_step does.
        Raises FloatingPointError if x, W_enc or l2_loss hold NaN or infinity.
        """
        tokens, mean, std = self.preprocess_input(x.reshape(-1, x.shape[-1]))
        output, reconstruction = self.forward_normalised(tokens)
        return {"sae_out": self.postprocess_output(reconstruction, mean, std).view(x.shape)} | output

    def forward_normalised(self, tokens: torch.Tensor, wait: bool = True) -> tuple[dict, torch.Tensor]:
        """forward of normalised inputs [B, d]: its output without sae_out, and the normalised reconstruction [B, d].
        The caller sets the precision (sae_arithmetic).

        With wait=False, which is for training_step, the host does not wait for a CUDA device. The output then has the
        scalar `failure`. If it is not 0, the rest is invalid (triton_ops.py).
        """
        wait = wait or not sparse_ops.uses_triton(tokens) or self.shards.count > 1
        if wait:
            self.known_counts = None
        pattern = self.select(tokens, wait)
        z = self.pre_activation(tokens, pattern)
        acts = self.activation(z, pattern)
        reconstructions = self.reconstructions(acts, pattern)
        reconstruction = reconstructions[-1]

        l2_losses = [sparse_ops.mean_squared_error(each, tokens) for each in reconstructions]
        l2_loss = l2_losses[-1]
        loss = sum(l2_losses[1:], start=l2_losses[0]) / len(l2_losses)
        if wait and not loss.isfinite():
            where = "the loss" if tokens.isfinite().all() else "the activations"
            raise FloatingPointError(f"NaN or infinity in {where}")
        l1_loss = loss.new_zeros(())
        if self.cfg["l1_coeff"]:
            l1_loss = self.cfg["l1_coeff"] * self.shards.add(self.sparsity(z, acts, pattern)) / len(tokens)
            loss = loss + l1_loss
        with torch.no_grad():
            num_active, total, active_features = sparse_ops.count_active(acts, pattern)
            not_active = torch.where(active_features, 0, self.num_batches_not_active + 1)
            dead = not_active >= self.cfg["n_batches_to_dead"]
            output = {
                "l0_norm": self.shards.sum(num_active).to(acts.dtype) / len(tokens),
                "l1_norm": self.shards.sum(total) / len(tokens),
                "num_dead_features": self.shards.sum(dead.sum()),
                "num_batches_not_active": not_active,
            }
        if not wait:
            output["failure"] = sparse_ops.failure(pattern, loss)
        if self.aux_loss_on_dead_features:
            index = sparse_ops.dead_index(dead, tokens, lambda: self.counts().most_dead)
            output["aux_loss"] = self.aux_loss(tokens, z if pattern is None else None, reconstruction, index)
            loss = loss + output["aux_loss"]
            if not wait:
                output["failure"] |= (output["num_dead_features"] > len(index)) * sparse_ops.OVERFLOW
        output = {
            "feature_acts": acts if pattern is None else pattern.sparse_tensor(acts),
            "loss": loss,
            "l2_loss": l2_loss,
            "l1_loss": l1_loss,
            **output,
        }
        return output, reconstruction

    def aux_loss(self, x, z: torch.Tensor | None, reconstruction: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """aux_penalty · mean (e − ê)² of the residual e = x − reconstruction [B, d] and its own reconstruction ê from
        the top_k_aux largest dead features of each row (the paper, section 2, after arXiv 2406.04093). As published, e
        is not detached. index: the dead features (sparse_ops.dead_index).
        """
        if not self.shards.any(len(index) > 0):
            return x.new_zeros(())
        residual = x - reconstruction
        k, pattern = self.cfg["top_k_aux"], None
        W_dec = sparse_ops.take(self.W_dec, index, 0)
        if z is not None:
            acts = self.shards.keep_top_k(sparse_ops.take(z, index, 1), k, per_row=True)
        else:
            b_dec = self.shards.copy(self.b_dec)
            W_enc = sparse_ops.take(self.W_enc.T, index, 0).T
            acts = self.shards.keep_top_k(sparse_ops.pre_activations(x, b_dec, W_enc), k, per_row=True)
            if sparse_ops.aux_is_sparse(len(index), k, x):
                pattern = SparsityPattern.of(acts)
                acts = sparse_ops.pre_activations(x, b_dec, W_enc, pattern)
        own = self.shards.add(sparse_ops.decode(acts, W_dec, pattern))
        return self.cfg["aux_penalty"] * sparse_ops.mean_squared_error(own, residual)

    known_counts = None  # the Counts, once they have been read for the next step

    def counts(self) -> Counts:
        """What the host needs to choose a form and sizes. Waits for a CUDA device unless known_counts is set."""
        return self.known_counts or Counts(*self.counts_on_device().tolist())

    def counts_on_device(self) -> torch.Tensor:
        """The Counts as a tensor [2]."""
        until_sparse = getattr(self, "batches_until_sparse", self.num_batches_not_active.new_zeros(()))
        most_dead = (self.num_batches_not_active + 1 >= self.cfg["n_batches_to_dead"]).sum()
        return torch.stack([until_sparse, most_dead])

    @torch.no_grad()
    def update_statistics(self, output: dict) -> None:
        """Store a training forward's counters (and thresholds), unless it failed. Does not wait for the device."""
        self.known_counts = None
        counters = self.num_batches_not_active
        counters.copy_(unless_failed(output, output["num_batches_not_active"], counters))

    @torch.no_grad()
    def make_decoder_weights_and_grad_unit_norm(self) -> None:
        """Before the optimizer's step: remove from each decoder row's gradient the part parallel to the row.

        The rows are unit vectors here. normalize_decoder normalises them again after the step.
        """
        grad, rows = self.W_dec.grad, self.W_dec
        parallel = torch.bmm(grad[:, None], rows[:, :, None])[:, 0]  # [F, 1], without a temporary [F, d]
        grad.addcmul_(parallel, rows, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """After the optimizer's step: give the decoder rows unit norm."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)


class AdaptiveSparseSAE(BaseAutoencoder):
    """An SAE whose number of active features depends on its weights, so recent batches decide between the two forms.

    The buffer `batches_until_sparse` counts down while few features are active, and restarts when many are. At 0, as in
    a new SAE, the sparse form is tried. It depends on counts alone and is saved with the weights.
    """

    def __init__(self, cfg: dict, shards: Shards = WHOLE):
        super().__init__(cfg, shards)
        self.register_buffer("batches_until_sparse", self.num_batches_not_active.new_zeros(()))

    @torch.no_grad()
    def update_statistics(self, output):
        super().update_statistics(output)
        is_sparse = output["feature_acts"].is_sparse
        few = output["l0_norm"] < self.cfg["dict_size"] / (GOES_DENSE if is_sparse else GOES_SPARSE)
        if not is_sparse:
            few &= self.batches_until_sparse > 0  # dense at 0 means that there were too many candidates: restart
        left = (self.batches_until_sparse - 1).clamp(min=0)
        left = torch.where(few, left, SPARSE_AFTER)
        self.batches_until_sparse.copy_(unless_failed(output, left, self.batches_until_sparse))

    def select_above(self, x, theta, margin: float, wait: bool) -> SparsityPattern | None:
        """The places of x W_enc + b_enc > θ − margin; None for the dense form."""
        if not sparse_ops.has_sparse_kernels(x.device) or self.counts().until_sparse > 0:
            return None
        return self.shards.agree_on_pattern(
            lambda: sparse_ops.select_above(x, self.W_enc, self.b_enc, theta, margin, wait)
        )


class VanillaSAE(AdaptiveSparseSAE):
    """f = relu((x̂ − b_dec) W_enc + b_enc);  loss = L2 + l1_coeff · mean_B Σ_j f_j."""

    def select(self, x, wait):
        return self.select_above(x - self.b_dec, 0, 0, wait)

    def pre_activation(self, x, pattern=None):
        z = sparse_ops.pre_activations(x, self.shards.copy(self.b_dec), self.W_enc, pattern)
        return z.add_(at_features(self.b_enc, pattern))

    def activation(self, z, pattern=None):
        return F.relu(z, inplace=True)  # from here on z holds f, also in `sparsity`


class TopKSAE(BaseAutoencoder):
    """z = (x̂ − b_dec) W_enc;  f = the k largest of relu(z) in each row;  loss = L2 + aux (arXiv 2406.04093)."""

    aux_loss_on_dead_features = True
    per_row = True

    def select(self, x, wait):
        k = self.cfg["top_k"]
        if not sparse_ops.sparse_is_cheaper(len(self.W_dec), k, x.device):
            return None
        x = x - self.b_dec
        pattern = self.shards.agree_on_pattern(lambda: sparse_ops.select_topk(x, self.W_enc, k, self.per_row, wait))
        if pattern is None or self.shards.count == 1:
            return pattern
        return pattern.filter(self.shards.largest(pattern.products, pattern.rows, len(x), k, self.per_row))

    def pre_activation(self, x, pattern=None):
        return sparse_ops.pre_activations(x, self.shards.copy(self.b_dec), self.W_enc, pattern)

    def activation(self, z, pattern=None):
        return self.shards.keep_top_k(z, self.cfg["top_k"], self.per_row) if pattern is None else z


class BatchTopKSAE(TopKSAE):
    """z = (x̂ − b_dec) W_enc;  f = the B·k largest of relu(z) in the whole batch (arXiv 2412.06410, eq. 3).

    In eval() f = z · 1[z > θ] (eq. 4), so that a token's features do not depend on the rest of its batch. θ is the
    buffer `threshold`, a running mean over training batches of the smallest positive activation kept (eq. 5), in which
    each new batch has a weight of at least 1 %.
    """

    per_row = False

    def __init__(self, cfg: dict, shards: Shards = WHOLE):
        super().__init__(cfg, shards)
        self.register_buffer("threshold", torch.zeros((), dtype=self.W_enc.dtype, device=self.W_enc.device))
        self.register_buffer("threshold_num_batches", torch.zeros((), dtype=torch.int64, device=self.W_enc.device))

    def select(self, x, wait):
        return super().select(x, wait) if self.training else None

    def activation(self, z, pattern=None):
        if self.training:
            return super().activation(z, pattern)
        if self.threshold_num_batches == 0:
            raise RuntimeError("this BatchTopK has no inference threshold yet: train it, or encode in train() mode")
        return keep_above(z, z, self.threshold)

    @torch.no_grad()
    def update_statistics(self, output):
        super().update_statistics(output)
        smallest = self.shards.minimum(sparse_ops.smallest_positive(output["feature_acts"].detach()))
        found = unless_failed(output, smallest < torch.inf, False)  # a batch without activations does not count
        self.threshold_num_batches += found
        weight = (1 / self.threshold_num_batches.clamp(min=1)).clamp(min=0.01)
        self.threshold += torch.where(found, (smallest - self.threshold) * weight, 0)


class MatryoshkaSAE(BatchTopKSAE):
    """f as BatchTopK;  loss = mean over m of L2(f[:, :m] W_dec[:m] + b_dec) + aux  (arXiv 2503.17547).

    m are the sizes of the nested prefixes of the dictionary (`matryoshka_sizes`); the last is F. Each prefix is an SAE
    with the same threshold, and `decode(f[..., :m])` is its reconstruction. With F alone this is BatchTopK.

    The mean, rather than a sum, gives aux_penalty and lr the meaning they have for BatchTopK. Other implementations
    weigh L2 against aux differently: the authors' scripts also average in the loss of b_dec alone, SAELens 6 adds the
    prefixes' losses, and dictionary_learning 0.1 divides by the number of prefixes twice. As for BatchTopK, aux is of
    the dead features of the whole dictionary and the error of the whole reconstruction.
    """

    def reconstructions(self, acts, pattern):
        ends = [self.shards.num_before(size, self.cfg["dict_size"]) for size in prefix_sizes(self.cfg)]
        parts = map(self.shards.add, sparse_ops.decode_groups(acts, self.W_dec, ends, pattern))
        return list(accumulate(parts, initial=self.b_dec))[1:]

    def decode(self, acts, like=None):
        """As BaseAutoencoder.decode, or the reconstruction by the first m features from acts [..., m]."""
        return super().decode(F.pad(acts, (0, len(self.W_dec) - acts.shape[-1])), like)


class JumpReLUSAE(AdaptiveSparseSAE):
    """z = x̂ W_enc + b_enc;  f = z · 1[z > θ], θ = exp(log_threshold);  loss = L2 + l1_coeff · mean_B Σ_j 1[z_j > θ_j].

    Gradients with respect to θ are the pseudo-derivatives of arXiv 2407.14435 (eqs. 11, 12).
    """

    def __init__(self, cfg: dict, shards: Shards = WHOLE):
        super().__init__(cfg, shards)
        self.jumprelu = nn.Module()  # gives the parameter its published name, jumprelu.log_threshold
        self.jumprelu.log_threshold = nn.Parameter(torch.zeros_like(self.b_enc))

    def select(self, x, wait):
        # θ has a gradient down to half a bandwidth below θ, where f is 0.
        return self.select_above(x, self.jumprelu.log_threshold.exp(), self.cfg["bandwidth"] / 2, wait)

    def pre_activation(self, x, pattern=None):
        return sparse_ops.pre_activations(x, None, self.W_enc, pattern).add_(at_features(self.b_enc, pattern))

    def theta(self, pattern):
        """θ: [F], or [n] at the pattern."""
        return at_features(self.jumprelu.log_threshold.exp(), pattern)

    def activation(self, z, pattern=None):
        return JumpReLU.apply(z, self.theta(pattern), self.cfg["bandwidth"])

    def sparsity(self, z, acts, pattern):
        """The number of active features, differentiable in θ alone."""
        return NumActive.apply(z, self.theta(pattern), self.cfg["bandwidth"])


def unless_failed(output: dict, value: torch.Tensor, otherwise) -> torch.Tensor:
    """value, or `otherwise` if the output has a `failure` that is not 0."""
    return torch.where(output["failure"] == 0, value, otherwise) if "failure" in output else value


def keep_above(values: torch.Tensor, z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """values · 1[z > θ]. The mask has the dtype of the values: CPUs are slow at products with a bool mask."""
    return torch.gt(z, threshold, out=torch.empty_like(values)).mul_(values)


def near(z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Mask K((z − θ)/ε) with K(u) = 1[|u| < 1/2], in the dtype of z."""
    distance = (z - threshold).abs_()
    return torch.lt(distance, bandwidth / 2, out=distance)


class JumpReLU(torch.autograd.Function):
    """z · 1[z > θ];  ∂/∂z = 1[z > θ],  ∂/∂θ := −(θ/ε) K((z − θ)/ε)  (arXiv 2407.14435, eq. 11).

    z [B, F] with θ [F], or both [n].
    """

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return keep_above(z, z, threshold)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        grad_threshold = near(z, threshold, ctx.bandwidth).mul_(grad).sum_to_size(threshold.shape)
        return keep_above(grad, z, threshold), grad_threshold * (-threshold / ctx.bandwidth), None


class NumActive(torch.autograd.Function):
    """Σ 1[z > θ];  ∂/∂z := 0,  ∂/∂θ := −(1/ε) Σ K((z − θ)/ε)  (arXiv 2407.14435, eq. 12). Shapes as in JumpReLU."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.gt(z, threshold, out=torch.empty_like(z)).sum()

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        count = near(z, threshold, ctx.bandwidth).sum_to_size(threshold.shape)
        return None, count * (-grad / ctx.bandwidth), None


# The dimension of features in each parameter and buffer that has one. Others are the same on all shards.
FEATURE_DIM = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "jumprelu.log_threshold": 0, "num_batches_not_active": 0}

SAE_CLASSES = {
    "vanilla": VanillaSAE, "topk": TopKSAE, "batchtopk": BatchTopKSAE, "jumprelu": JumpReLUSAE,
    "matryoshka": MatryoshkaSAE,
}  # fmt: skip
