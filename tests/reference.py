"""A slow reference of the SAEs and of one training step, for the tests to compare with.

Written from the definitions, one token or one feature at a time where that is clearer; it shares no code with sae.py.
`p` is a dict of tensors under the parameters' names: W_enc [d, F], W_dec [F, d], b_enc [F], b_dec [d], and
jumprelu.log_threshold [F] for JumpReLU. `counters` [F] are the training batches since each feature was last active.
"""

import math

import torch


def normalise(x, cfg):
    """Each token to mean 0 and standard deviation 1 -> (x̂, means, standard deviations), lists of floats per token."""
    if not cfg["input_unit_norm"]:
        return x, [0.0] * len(x), [1.0] * len(x)
    rows, means, stds = [], [], []
    for token in x:
        mean = token.sum() / len(token)
        std = ((token - mean).square().sum() / (len(token) - 1)).sqrt()
        rows.append((token - mean) / (std + 1e-5))
        means.append(mean)
        stds.append(std)
    return torch.stack(rows), means, stds


def pre_activation(p, x_hat, cfg):
    if cfg["sae_type"] == "vanilla":
        return (x_hat - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if cfg["sae_type"] == "jumprelu":
        return x_hat @ p["W_enc"] + p["b_enc"]
    return (x_hat - p["b_dec"]) @ p["W_enc"]


def top_k_mask(values, k):
    """1.0 at the k largest entries of a vector, 0.0 elsewhere."""
    order = sorted(range(len(values)), key=lambda i: values[i].item(), reverse=True)
    mask = torch.zeros_like(values)
    for i in order[:k]:
        mask[i] = 1.0
    return mask


def activation(p, z, cfg, threshold=None):
    """f [B, F]. `threshold` is BatchTopK's inference threshold; None means training."""
    positive = torch.where(z > 0, z, 0.0)
    if cfg["sae_type"] == "vanilla":
        return positive
    if cfg["sae_type"] == "topk":
        return torch.stack([row * top_k_mask(row, cfg["top_k"]) for row in positive])
    if cfg["sae_type"] in ("batchtopk", "matryoshka") and threshold is None:
        return positive * top_k_mask(positive.flatten(), cfg["top_k"] * len(z)).reshape(z.shape)
    if cfg["sae_type"] in ("batchtopk", "matryoshka"):
        return torch.where(z > threshold, z, 0.0)
    return torch.where(z > p["jumprelu.log_threshold"].exp(), z, 0.0)


def new_counters(acts, counters):
    """Training batches since each feature was last active, this batch included."""
    result = []
    for feature, count in enumerate(counters.tolist()):
        result.append(0 if any(row[feature] > 0 for row in acts.tolist()) else count + 1)
    return torch.tensor(result)


def dead_features(acts, counters, cfg):
    counts = new_counters(acts, counters).tolist()
    return [feature for feature, count in enumerate(counts) if count >= cfg["n_batches_to_dead"]]


def aux_loss(p, z, residual, dead, cfg):
    """aux_penalty · mean square of (residual − its reconstruction by each token's largest dead features)."""
    if not dead:
        return residual.new_zeros(())
    total = 0.0
    for row, target in zip(z, residual):
        values = torch.where(row[dead] > 0, row[dead], 0.0)
        values = values * top_k_mask(values, cfg["top_k_aux"])
        total = total + (values @ p["W_dec"][dead] - target).square().sum()
    return cfg["aux_penalty"] * total / residual.numel()


def prefix_sizes(cfg):
    """The nested prefixes of the dictionary, of 1/32, then 1/16, 1/8, 1/4 and 17/32 more."""
    fractions = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)
    return cfg["matryoshka_sizes"] or sorted({math.ceil(fraction * cfg["dict_size"]) for fraction in fractions})


def forward(p, x, cfg, counters, threshold=None):
    """All that an SAE's forward returns. Differentiable by autograd, except JumpReLU in its threshold."""
    x_hat, means, stds = normalise(x, cfg)
    z = pre_activation(p, x_hat, cfg)
    acts = activation(p, z, cfg, threshold)
    reconstruction = acts @ p["W_dec"] + p["b_dec"]
    dead = dead_features(acts, counters, cfg)

    l0_norm = x.new_tensor(sum(value > 0 for row in acts.tolist() for value in row) / len(x))
    l1_norm = sum(row.sum() for row in acts) / len(x)
    output = {
        "sae_out": torch.stack([row * std + mean for row, mean, std in zip(reconstruction, means, stds)]),
        "feature_acts": acts,
        "l2_loss": (reconstruction - x_hat).square().sum() / x.numel(),
        "l1_loss": cfg["l1_coeff"] * (l0_norm if cfg["sae_type"] == "jumprelu" else l1_norm),
        "l0_norm": l0_norm,
        "l1_norm": l1_norm,
        "num_dead_features": torch.tensor(len(dead)),
    }
    losses = [output["l2_loss"]]
    if cfg["sae_type"] == "matryoshka":
        prefixes = [acts[:, :m] @ p["W_dec"][:m] + p["b_dec"] for m in prefix_sizes(cfg)]
        losses = [(prefix - x_hat).square().sum() / x.numel() for prefix in prefixes]
    output["loss"] = sum(losses) / len(losses) + output["l1_loss"]
    if cfg["sae_type"] in ("topk", "batchtopk", "matryoshka"):
        output["aux_loss"] = aux_loss(p, z, x_hat - reconstruction, dead, cfg)
        output["loss"] = output["loss"] + output["aux_loss"]
    return output


def gradients(p, x, cfg, counters):
    """d loss / d parameter in training, a tensor for every parameter (0 where the loss does not depend on it)."""
    if cfg["sae_type"] == "jumprelu":
        return jumprelu_gradients(p, x, cfg)
    p = {name: value.clone().requires_grad_() for name, value in p.items()}
    forward(p, x, cfg, counters)["loss"].backward()
    return {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in p.items()}


def jumprelu_gradients(p, x, cfg):
    """By hand: backpropagation, with the pseudo-derivatives of arXiv 2407.14435 for the threshold."""
    B, d = x.shape
    x_hat, _, _ = normalise(x, cfg)
    z = pre_activation(p, x_hat, cfg)
    theta = p["jumprelu.log_threshold"].exp()
    acts = activation(p, z, cfg)
    grad_out = 2 * (acts @ p["W_dec"] + p["b_dec"] - x_hat) / (B * d)
    grad_acts = grad_out @ p["W_dec"].T
    grad_z = torch.where(z > theta, grad_acts, 0.0)

    grad_log_threshold = torch.zeros_like(theta)
    for j in range(len(theta)):
        for i in range(B):
            d_act, d_step = pseudo_derivatives(z[i, j].item(), theta[j].item(), cfg["bandwidth"])
            d_theta = grad_acts[i, j].item() * d_act + cfg["l1_coeff"] / B * d_step
            grad_log_threshold[j] += d_theta * theta[j].item()  # dθ / d log θ = θ
    return {
        "W_enc": x_hat.T @ grad_z,
        "W_dec": acts.T @ grad_out,
        "b_enc": grad_z.sum(0),
        "b_dec": grad_out.sum(0),
        "jumprelu.log_threshold": grad_log_threshold,
    }


def pseudo_derivatives(z, theta, bandwidth):
    """With respect to θ, of z · 1[z > θ] and of 1[z > θ], at a pre-activation z (of any sign)."""
    inside = abs(z - theta) / bandwidth < 0.5
    return (-theta / bandwidth, -1 / bandwidth) if inside else (0.0, 0.0)


def smallest_positive(acts):
    """A float, or None if nothing is positive."""
    positive = [value for row in acts.tolist() for value in row if value > 0]
    return min(positive) if positive else None


def training_step(p, optimizer, x, cfg, counters):
    """Change p, a dict of leaf tensors that `optimizer` holds, in place; returns the counters after the step."""
    values = {name: value.detach().clone() for name, value in p.items()}
    acts = forward(values, x, cfg, counters)["feature_acts"]
    grads = gradients(values, x, cfg, counters)

    norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
    scale = min(1.0, cfg["max_grad_norm"] / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
    for name in p:
        p[name].grad = grads[name] * scale
    for row, grad in zip(values["W_dec"], p["W_dec"].grad):
        grad -= (grad @ row) / (row @ row) * row
    optimizer.step()
    with torch.no_grad():
        for row in p["W_dec"]:
            row /= row.square().sum().sqrt()
    return new_counters(acts, counters)
