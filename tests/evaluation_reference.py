"""A slow reference of the held-out metrics: loops over tokens and contexts, with the GPT-2 of transformers."""

import functools
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


@functools.lru_cache(maxsize=256)
def plain_forward(hf_model, tokens: tuple[int, ...]):
    """forward_by_hand without replacements, once per context: it is the same for all SAEs."""
    return forward_by_hand(hf_model, list(tokens))


def kept_positions(tokens: list[int], skip: int, excluded: tuple) -> list[int]:
    return [t for t in range(skip, len(tokens)) if tokens[t] not in excluded]


def ce_by_hand(
    hf_model, tokens: list[int], skip: int, rows: list | None = None, excluded: tuple = ()
) -> tuple[float, float]:
    """Mean −log p and mean Σ p (log p − log q) over the predictions from positions >= `skip` without an excluded token,
    or 0 if there are none. `rows` replace the activations at these positions; q is with, p without the replacement.
    """
    kept = kept_positions(tokens, skip, excluded)

    def replace(hidden):
        for t, row in zip(kept, rows):
            hidden[t] = row
        return hidden

    _, losses, log_p = plain_forward(hf_model, tuple(tokens))
    log_q = log_p
    if rows is not None:
        _, losses, log_q = forward_by_hand(hf_model, tokens, replace)
    divergences = [(log_p[t].exp() * (log_p[t] - log_q[t])).sum().item() for t in range(len(losses))]
    losses, divergences = ([values[t] for t in kept if t < len(values)] for values in (losses, divergences))
    return sum(losses) / max(1, len(losses)), sum(divergences) / max(1, len(divergences))


@torch.no_grad()
def reconstruct_by_hand(sae, batch: list[torch.Tensor], batch_top_k: bool) -> tuple[list, list]:
    """Reconstruction and features of each token of a batch by the definitions, in float64."""
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
    """Σa / Σb over documents, and its standard error by the delta method."""
    n, ratio = len(a), sum(a) / sum(b)
    squares = sum((x - ratio * y) ** 2 for x, y in zip(a, b))
    return ratio, math.sqrt(squares / (n - 1) / n) / (sum(b) / n)


def share_by_hand(of, parts: list[list]) -> tuple[float, float]:
    """of(all contexts), and its standard error by the jackknife over the parts."""
    n = len(parts)
    without = [of([context for j in range(n) if j != i for context in parts[j]]) for i in range(n)]
    squares = sum((value - sum(without) / n) ** 2 for value in without)
    return of([context for part in parts for context in part]), math.sqrt((n - 1) / n * squares)


def metrics_by_hand(hf_model, sae, store, skip: int, batch_top_k: bool, measured: int, excluded: tuple = ()) -> dict:
    """All metrics as (value, standard error) on the first `measured` contexts; the held-out mean is over all."""
    contexts, documents = store.eval_contexts.tolist(), store.eval_documents[:measured].tolist()
    num_documents = len(set(documents))
    kept = [kept_positions(tokens, skip, excluded) for tokens in contexts]
    acts = [[plain_forward(hf_model, tuple(tokens))[0][t] for t in at] for tokens, at in zip(contexts, kept)]
    held_out = [x.double() for rows in acts for x in rows]
    x_mean = sum(held_out) / len(held_out)
    sums = {key: [0.0] * measured for key in ("nmse", "error", "variance", "cosine", "l0")}  # of each context
    times_active = [[0] * sae.cfg["dict_size"] for _ in range(measured)]
    ce = {key: [] for key in ("original", "reconstructed", "zero", "mean", "kl")}
    each_prediction = []
    for start in range(0, measured, CONTEXTS_PER_BATCH):
        part = acts[start : min(start + CONTEXTS_PER_BATCH, measured)]
        reconstructions, features = reconstruct_by_hand(sae, [x for rows in part for x in rows], batch_top_k)
        context_of = [start + n for n, rows in enumerate(part) for _ in rows]
        for i, x in enumerate(x for rows in part for x in rows):
            x, r, context = x.double(), reconstructions[i].double(), context_of[i]
            error = ((x - r) ** 2).sum().item()
            sums["nmse"][context] += error / ((x - x.mean()) ** 2).sum().item()
            sums["error"][context] += error
            sums["variance"][context] += ((x - x_mean) ** 2).sum().item()
            sums["cosine"][context] += (x @ r / (x.norm() * r.norm())).item()
            for j in features[i].nonzero().flatten().tolist():
                sums["l0"][context] += 1
                times_active[context][j] += 1
        for i in range(len(part)):
            tokens, length = contexts[start + i], len(part[i])
            predictions = sum(t < len(tokens) - 1 for t in kept[start + i])
            rows, reconstructions = reconstructions[:length], reconstructions[length:]
            of_rows = {"original": None, "zero": [torch.zeros(128)] * length, "mean": [x_mean.float()] * length}
            for key, replacement in ({"reconstructed": rows} | of_rows).items():
                mean, kl = ce_by_hand(hf_model, tokens, skip, replacement, excluded)
                ce[key].append(predictions * mean)
                if key == "reconstructed":
                    ce["kl"].append(predictions * kl)
            each_prediction.append(predictions)

    def dead(counts):
        return sum(sum(column) == 0 for column in zip(*(times for times, _ in counts))) / sae.cfg["dict_size"]

    def dense(counts):
        tokens = sum(length for _, length in counts)
        return sum(sum(c) > 0.1 * tokens for c in zip(*(times for times, _ in counts))) / sae.cfg["dict_size"]

    def lost(key, other="original"):
        return [x - y for x, y in zip(ce[key], ce[other])]

    def of_documents(a: list, b: list) -> tuple[float, float]:
        a, b = ([sum(x for x, j in zip(of, documents) if i == j) for i in range(num_documents)] for of in (a, b))
        return ratio_by_hand(a, b)

    each = [len(rows) for rows in acts[:measured]]
    parts = [[] for _ in range(min(num_documents, evaluation.MAX_PARTS))]
    for i in range(measured):
        parts[documents[i] * len(parts) // num_documents].append((times_active[i], each[i]))
    return {
        "nmse": of_documents(sums["nmse"], each),
        "fvu": of_documents(sums["error"], sums["variance"]),
        "cosine_similarity": of_documents(sums["cosine"], each),
        "l0": of_documents(sums["l0"], each),
        "dead_fraction": share_by_hand(dead, parts),
        "dense_fraction": share_by_hand(dense, parts),
        "ce_original": of_documents(ce["original"], each_prediction),
        "ce_zero_ablated": of_documents(ce["zero"], each_prediction),
        "ce_mean_ablated": of_documents(ce["mean"], each_prediction),
        "ce_reconstructed": of_documents(ce["reconstructed"], each_prediction),
        "ce_degradation": of_documents(lost("reconstructed"), each_prediction),
        "kl_divergence": of_documents(ce["kl"], each_prediction),
        "recovery_from_zero": of_documents(lost("zero", "reconstructed"), lost("zero")),
        "recovery_from_mean": of_documents(lost("mean", "reconstructed"), lost("mean")),
    }
