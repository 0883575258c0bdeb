"""The training step of the published scripts (github.com/bartbussmann/BatchTopK), in dense tensors. Matryoshka's is
theirs with a loss over the prefixes.

A baseline for benchmarks, written from the definitions. Losses and gradients are those of sae.py, except for the
differences listed in the README. Products and selections are over all of [B, F], and Adam is torch's default.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from config import TOP_K_TYPES, prefix_sizes


def rectangle(z, threshold, bandwidth):
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        grad_threshold = -(threshold / ctx.bandwidth) * rectangle(z, threshold, ctx.bandwidth) * grad
        return grad * (z > threshold), grad_threshold, None


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        return None, -rectangle(z, threshold, ctx.bandwidth) * grad / ctx.bandwidth, None


class DenseReference:
    """A copy of the weights of an SAE from sae.py."""

    def __init__(self, sae):
        self.cfg = sae.cfg
        self.p = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in sae.named_parameters()}
        for p in self.p.values():
            p.requires_grad_()
        self.num_batches_not_active = sae.num_batches_not_active.clone()
        cfg = self.cfg
        self.optimizer = torch.optim.Adam(self.p.values(), lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]))

    def loss(self, x):
        p, cfg = self.p, self.cfg
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        if cfg["sae_type"] == "jumprelu":
            threshold = p["jumprelu.log_threshold"].exp()
            z = F.relu(x @ p["W_enc"] + p["b_enc"])
            acts = JumpReLU.apply(z, threshold.expand_as(z), cfg["bandwidth"])
            sparsity = cfg["l1_coeff"] * Step.apply(z, threshold.expand_as(z), cfg["bandwidth"]).sum(-1).mean()
        elif cfg["sae_type"] == "vanilla":
            acts = F.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
            sparsity = cfg["l1_coeff"] * acts.abs().sum(-1).mean()
        else:
            z = F.relu((x - p["b_dec"]) @ p["W_enc"])
            values, k = (z, cfg["top_k"]) if cfg["sae_type"] == "topk" else (z.flatten(), cfg["top_k"] * len(x))
            top = values.topk(k, dim=-1)
            acts = torch.zeros_like(values).scatter(-1, top.indices, top.values).view_as(z)
            sparsity = cfg["l1_coeff"] * acts.abs().sum(-1).mean()
        if cfg["sae_type"] == "matryoshka":
            reconstruction, losses = p["b_dec"], []
            for start, end in pairwise([0, *prefix_sizes(cfg)]):
                reconstruction = acts[:, start:end] @ p["W_dec"][start:end] + reconstruction
                losses.append((reconstruction - x).pow(2).mean())
            loss = sum(losses) / len(losses) + sparsity
        else:
            reconstruction = acts @ p["W_dec"] + p["b_dec"]
            loss = (reconstruction - x).pow(2).mean() + sparsity

        active = (acts > 0).any(0)
        self.num_batches_not_active = torch.where(active, 0, self.num_batches_not_active + 1)
        dead = self.num_batches_not_active >= cfg["n_batches_to_dead"]
        if cfg["sae_type"] in TOP_K_TYPES and dead.any():
            top = z[:, dead].topk(min(cfg["top_k_aux"], int(dead.sum())), dim=-1)
            acts_aux = torch.zeros_like(z[:, dead]).scatter(-1, top.indices, top.values)
            residual = x - reconstruction
            loss = loss + cfg["aux_penalty"] * (acts_aux @ p["W_dec"][dead] - residual).pow(2).mean()
        return loss

    def step(self, x):
        p = self.p
        loss = self.loss(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), self.cfg["max_grad_norm"])
        with torch.no_grad():
            rows = p["W_dec"] / p["W_dec"].norm(dim=-1, keepdim=True)
            p["W_dec"].grad -= (p["W_dec"].grad * rows).sum(-1, keepdim=True) * rows
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            p["W_dec"] /= p["W_dec"].norm(dim=-1, keepdim=True)
        return loss
