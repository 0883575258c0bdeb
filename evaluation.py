"""Metrics on held-out tokens, of all the SAEs of a group at once.

With x an activation and r its reconstruction, both in the residual stream's own units:

    nmse            mean over tokens of ‖x − r‖² / ‖x − mean_d(x)‖²   (mean over the token's own d coordinates)
    fvu             Σ ‖x − r‖² / Σ ‖x − x_mean‖²                      (x_mean over the held-out set)
    l0              mean number of active features per token
    dead_fraction   share of features that are never active on the held-out set
    ce_degradation  CE with the reconstruction − CE of the model: 0 is perfect, larger is worse
    recovery_from_zero, recovery_from_mean
                    (CE ablated − CE reconstructed) / (CE ablated − CE original): 1 is perfect

The first eval_skip_positions of a context are left alone: the model keeps its own activations there, and they
count in no metric, nor do the predictions made from them. Everything is measured in eval(); the same metrics
of a BatchTopK's batch top-k have the suffix _batch.

On the whole held-out set there are also `histograms`, of the SAE in eval():

    l0                   number of tokens with 0, 1, 2, ... active features
    log10_density        number of features whose density (share of tokens on which it is active) has its log10
                         between two neighbours of DENSITY_EDGES, which stand beside it as log10_density_edges
    never_active         number of features of density 0: they are in no bin
"""

import torch
import torch.nn.functional as F

DENSITY_EDGES = [-8 + i / 4 for i in range(33)]  # the same in every run, so that runs can be compared and averaged


@torch.no_grad()
def heldout_baseline(model, activation_store) -> dict:
    """What no SAE changes: the held-out mean activation [d], and per context [n] the CE of the model as it is
    (ce_original), with its activations set to 0 (ce_zero_ablated) and to the mean (ce_mean_ablated), in nats per token.
    """
    cfg = activation_store.cfg
    total, count = 0, 0
    for tokens in eval_batches(activation_store):
        acts = heldout_activations(activation_store, tokens)
        total, count = total + acts.flatten(0, 1).double().sum(0), count + acts.shape[0] * acts.shape[1]
    mean = (total / count).float()
    ce = {"ce_original": None, "ce_zero_ablated": torch.zeros_like(mean), "ce_mean_ablated": mean}
    batches = eval_batches(activation_store)
    return {"mean": mean} | {
        key: torch.cat([cross_entropy(model, tokens, cfg, value) for tokens in batches]) for key, value in ce.items()
    }


@torch.no_grad()
def evaluate(saes: list, model, activation_store, baseline: dict, num_contexts: int | None = None) -> list[dict]:
    """The metrics above for each SAE, on the first `num_contexts` held-out contexts (all of them by default; the
    share of dead features and the histograms are told of all only). Leaves the SAEs as they were.
    """
    cfg = activation_store.cfg
    variants = [(i, "", False) for i in range(len(saes))]
    variants += [(i, "_batch", True) for i, sae in enumerate(saes) if sae.cfg["sae_type"] == "batchtopk"]
    sums = {variant: torch.zeros(5, dtype=torch.float64) for variant in variants}
    times_active = {variant: 0 for variant in variants}  # of each feature [F]
    token_l0 = {variant: [] for variant in variants}

    for tokens in eval_batches(activation_store, num_contexts):
        acts = heldout_activations(activation_store, tokens)
        x = acts.flatten(0, 1)
        for variant in variants:
            sae = saes[variant[0]]
            reconstruction, features = in_mode(sae, variant[2], sae.reconstruct, x)
            reconstruction = reconstruction.float()
            error = (x - reconstruction).double().pow(2).sum(-1)
            own_variance = (x - x.mean(-1, keepdim=True)).double().pow(2).sum(-1)
            active = features > 0
            times_active[variant] = times_active[variant] + active.sum(0)
            token_l0[variant].append(active.sum(1))
            ce = cross_entropy(model, tokens, cfg, reconstruction.view_as(acts))
            sums[variant] += torch.stack([
                (error / own_variance).sum(), error.sum(), (x - baseline["mean"]).double().pow(2).sum(),
                active.sum().double(), ce.double().sum() * acts.shape[1],
            ]).cpu()  # fmt: skip

    metrics = [{} for _ in saes]
    contexts = len(activation_store.eval_contexts[:num_contexts])
    ces = {key: values[:contexts].double().mean().item() for key, values in baseline.items() if key != "mean"}
    num_tokens = contexts * (activation_store.seq_len - cfg["eval_skip_positions"])
    for i, suffix, training in variants:
        nmse, error, variance, active, ce = sums[i, suffix, training].tolist()
        ce /= num_tokens
        values = {"nmse": nmse / num_tokens, "fvu": error / variance, "l0": active / num_tokens}
        if num_contexts is None:
            values["dead_fraction"] = (times_active[i, suffix, training] == 0).double().mean().item()
        values |= {
            "ce_reconstructed": ce,
            "ce_degradation": ce - ces["ce_original"],
            "recovery_from_zero": (ces["ce_zero_ablated"] - ce) / (ces["ce_zero_ablated"] - ces["ce_original"]),
            "recovery_from_mean": (ces["ce_mean_ablated"] - ce) / (ces["ce_mean_ablated"] - ces["ce_original"]),
        }
        metrics[i] |= {key + suffix: value for key, value in values.items()}
        if num_contexts is None and not training:
            l0 = torch.cat(token_l0[i, suffix, training])
            metrics[i]["histograms"] = histograms(l0, times_active[i, suffix, training])
    for sae, values in zip(saes, metrics):
        values |= ces
        if sae.cfg["sae_type"] == "batchtopk":
            values["threshold"] = sae.threshold.item()
    return metrics


def histograms(token_l0: torch.Tensor, times_active: torch.Tensor) -> dict:
    """The histograms above, as plain lists, from each token's L0 [n] and each feature's number of active tokens [F]."""
    ever = times_active[times_active > 0].double().cpu()
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    log10_density = (ever / len(token_l0)).log10().clamp(min=DENSITY_EDGES[0])
    return {
        "l0": token_l0.cpu().bincount().tolist(),
        "log10_density": torch.histogram(log10_density, edges).hist.int().tolist(),
        "log10_density_edges": DENSITY_EDGES,
        "never_active": len(times_active) - len(ever),
    }


def eval_batches(activation_store, num_contexts: int | None = None) -> list[torch.Tensor]:
    """The held-out contexts in batches of about batch_size tokens, so that a batch top-k is over a usual batch."""
    cfg = activation_store.cfg
    contexts = activation_store.eval_contexts[:num_contexts].to(cfg["device"])
    return list(contexts.split(max(1, cfg["batch_size"] // activation_store.seq_len)))


def heldout_activations(activation_store, tokens: torch.Tensor) -> torch.Tensor:
    """[contexts, seq_len - eval_skip_positions, d]"""
    return activation_store.get_activations(tokens)[:, activation_store.cfg["eval_skip_positions"] :]


def cross_entropy(model, tokens: torch.Tensor, cfg: dict, replacement: torch.Tensor | None = None) -> torch.Tensor:
    """Nats per predicted token of each context [n], with the activations at the hook point replaced if asked."""
    skip = cfg["eval_skip_positions"]

    def splice(acts, hook):
        acts = acts.clone()
        acts[:, skip:] = replacement.to(acts.dtype)
        return acts

    hooks = [] if replacement is None else [(cfg["hook_point"], splice)]
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    loss = F.cross_entropy(logits[:, skip:-1].flatten(0, 1).float(), tokens[:, skip + 1 :].flatten(), reduction="none")
    return loss.view(len(tokens), -1).mean(-1)


def in_mode(sae, training: bool, function, *args):
    """Call `function` with the SAE in train() or eval() mode, and put it back in the mode it was in."""
    before = sae.training
    sae.train(training)
    try:
        return function(*args)
    finally:
        sae.train(before)
