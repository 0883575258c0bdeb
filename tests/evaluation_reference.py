"""The held-out metrics by their definitions, slowly: loops over tokens and contexts, and transformers' own GPT-2."""

import math

import torch

import evaluation

LAYER, SEQ_LEN, CONTEXTS_PER_BATCH = 2, 16, 4


@torch.no_grad()
def forward_by_hand(hf_model, tokens: list[int], replace=None) -> tuple[torch.Tensor, list[float], torch.Tensor]:
    """Activations [T, d] before block LAYER, −log p of tokens[1], tokens[2], …, and log p [T, d_vocab]; `replace` maps
    the activations.
    """
    seen = []

    def splice(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden[0].clone())
        if replace is None:
            return None
        hidden = replace(hidden[0].clone())[None]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = hf_model.transformer.h[LAYER].register_forward_pre_hook(splice, with_kwargs=True)
    logits = hf_model(torch.tensor([tokens])).logits[0].double()
    handle.remove()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return seen[0], [-log_p[t, tokens[t + 1]].item() for t in range(len(tokens) - 1)], log_p


def ce_by_hand(hf_model, tokens: list[int], skip: int, rows: list | None = None) -> tuple[float, float]:
    """Over the predictions made from positions `skip` on, whose activations are replaced by `rows`: mean −log p, and
    mean Σ p (log p − log q), q with and p without the replacement.
    """

    def replace(hidden):
        for t in range(skip, len(tokens)):
            hidden[t] = rows[t - skip]
        return hidden

    _, losses, log_q = forward_by_hand(hf_model, tokens, replace if rows is not None else None)
    _, _, log_p = forward_by_hand(hf_model, tokens)
    divergences = [(log_p[t].exp() * (log_p[t] - log_q[t])).sum().item() for t in range(len(losses))]
    return sum(losses[skip:]) / len(losses[skip:]), sum(divergences[skip:]) / len(divergences[skip:])


@torch.no_grad()
def reconstruct_by_hand(sae, batch: list[torch.Tensor], batch_top_k: bool) -> tuple[list, list]:
    """Reconstruction and features of each token of a batch: the definitions, in float64, a token at a time."""
    kind, k = sae.cfg["sae_type"], sae.cfg["top_k"]
    W_enc, W_dec, b_enc, b_dec = (getattr(sae, name).double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    normalised, pre_activations = [], []
    for x in batch:
        mean, scale = torch.zeros(1).double(), torch.ones(1).double()
        if sae.cfg["input_unit_norm"]:
            mean = x.double().mean()
            scale = ((x.double() - mean) ** 2).sum().div(len(x) - 1).sqrt() + 1e-5
        normalised.append((mean, scale - 1e-5 if sae.cfg["input_unit_norm"] else scale))
        x = (x.double() - mean) / scale
        if kind == "jumprelu":
            z = x @ W_enc + b_enc
        elif kind == "vanilla":
            z = (x - b_dec) @ W_enc + b_enc
        else:
            z = (x - b_dec) @ W_enc
        pre_activations.append(z.clamp(min=0))
    if batch_top_k:
        lowest = torch.cat(pre_activations).sort(descending=True).values[len(batch) * k - 1]
    features = []
    for z in pre_activations:
        if kind == "jumprelu":
            kept = z > sae.jumprelu.log_threshold.double().exp()
        elif kind == "topk":
            kept = z >= z.sort(descending=True).values[k - 1]
        elif kind == "batchtopk":
            kept = z >= lowest if batch_top_k else z > sae.threshold.double()
        else:
            kept = z > 0
        features.append(z * kept)
    reconstructions = [(f @ W_dec + b_dec) * scale + mean for f, (mean, scale) in zip(features, normalised)]
    return [row.float() for row in reconstructions], features


def ratio_by_hand(a: list[float], b: list[float]) -> tuple[float, float]:
    """Σa / Σb over contexts, and its standard error by the delta method."""
    n, ratio = len(a), sum(a) / sum(b)
    squares = sum((x - ratio * y) ** 2 for x, y in zip(a, b))
    return ratio, math.sqrt(squares / (n - 1) / n) / (sum(b) / n)


def share_by_hand(of, parts: list[list]) -> tuple[float, float]:
    """of(all contexts), and its standard error by the jackknife over the parts."""
    n = len(parts)
    without = [of([context for j in range(n) if j != i for context in parts[j]]) for i in range(n)]
    squares = sum((value - sum(without) / n) ** 2 for value in without)
    return of([context for part in parts for context in part]), math.sqrt((n - 1) / n * squares)


def metrics_by_hand(hf_model, sae, contexts: list[list[int]], skip: int, batch_top_k: bool, measured: int) -> dict:
    """All metrics, (value, standard error), on the first `measured` contexts; the held-out mean is over all."""
    acts = [list(forward_by_hand(hf_model, tokens)[0][skip:]) for tokens in contexts]
    held_out = [x.double() for rows in acts for x in rows]
    x_mean, length = sum(held_out) / len(held_out), SEQ_LEN - skip
    sums = {key: [0.0] * measured for key in ("nmse", "error", "variance", "cosine", "l0")}  # of each context
    times_active = [[0] * sae.cfg["dict_size"] for _ in range(measured)]
    ce = {key: [] for key in ("original", "reconstructed", "zero", "mean", "kl")}
    for start in range(0, measured, CONTEXTS_PER_BATCH):
        part = acts[start : min(start + CONTEXTS_PER_BATCH, measured)]
        reconstructions, features = reconstruct_by_hand(sae, [x for rows in part for x in rows], batch_top_k)
        for i, x in enumerate(x for rows in part for x in rows):
            x, r, context = x.double(), reconstructions[i].double(), start + i // length
            error = ((x - r) ** 2).sum().item()
            sums["nmse"][context] += error / ((x - x.mean()) ** 2).sum().item()
            sums["error"][context] += error
            sums["variance"][context] += ((x - x_mean) ** 2).sum().item()
            sums["cosine"][context] += (x @ r / (x.norm() * r.norm())).item()
            for j in features[i].nonzero().flatten().tolist():
                sums["l0"][context] += 1
                times_active[context][j] += 1
        for i in range(len(part)):
            tokens = contexts[start + i]
            reconstructed, kl = ce_by_hand(hf_model, tokens, skip, reconstructions[i * length : (i + 1) * length])
            ce["reconstructed"].append(reconstructed)
            ce["kl"].append(kl)
            ce["original"].append(ce_by_hand(hf_model, tokens, skip)[0])
            ce["zero"].append(ce_by_hand(hf_model, tokens, skip, [torch.zeros(128)] * length)[0])
            ce["mean"].append(ce_by_hand(hf_model, tokens, skip, [x_mean.float()] * length)[0])

    def dead(counts):
        return sum(sum(column) == 0 for column in zip(*counts)) / sae.cfg["dict_size"]

    def dense(counts):
        return sum(sum(column) > 0.1 * len(counts) * length for column in zip(*counts)) / sae.cfg["dict_size"]

    def lost(key, other="original"):
        return [x - y for x, y in zip(ce[key], ce[other])]

    one, each = [1.0] * measured, [length] * measured
    parts = [[] for _ in range(min(measured, evaluation.MOST_PARTS))]
    for i in range(measured):
        parts[i * len(parts) // measured].append(times_active[i])
    return {
        "nmse": ratio_by_hand(sums["nmse"], each),
        "fvu": ratio_by_hand(sums["error"], sums["variance"]),
        "cosine_similarity": ratio_by_hand(sums["cosine"], each),
        "l0": ratio_by_hand(sums["l0"], each),
        "dead_fraction": share_by_hand(dead, parts),
        "dense_fraction": share_by_hand(dense, parts),
        "ce_original": ratio_by_hand(ce["original"], one),
        "ce_zero_ablated": ratio_by_hand(ce["zero"], one),
        "ce_mean_ablated": ratio_by_hand(ce["mean"], one),
        "ce_reconstructed": ratio_by_hand(ce["reconstructed"], one),
        "ce_degradation": ratio_by_hand(lost("reconstructed"), one),
        "kl_divergence": ratio_by_hand(ce["kl"], one),
        "recovery_from_zero": ratio_by_hand(lost("zero", "reconstructed"), lost("zero")),
        "recovery_from_mean": ratio_by_hand(lost("mean", "reconstructed"), lost("mean")),
    }
