"""Metrics on held-out tokens, for all SAEs of a group at once.

    python evaluation.py RUN [--eval-tokens N] [--dataset-path TEXT]

prints the metrics as a table and writes them to RUN/evaluation.json. RUN is a run's folder, runs/<sweep>/<name>. It
uses the run's held-out tokens. With --eval-tokens it uses only the first N of them and writes to
RUN/evaluation_first_<N>.json. With --dataset-path it uses the first tokens of another dataset instead, as many as the
run holds out, also prints the run's own L0, and writes to RUN/evaluation_<TEXT>_<hash of its tokens>.json. With x an
activation and r its reconstruction, both in the units of the hook point:

    nmse            mean over tokens of ‖x − r‖² / ‖x − mean_d(x)‖²   (mean over the token's own d coordinates)
    fvu             Σ ‖x − r‖² / Σ ‖x − x_mean‖²                      (x_mean: mean over the held-out set);
                    the explained variance is 1 − fvu, with the same standard error
    cosine_similarity  mean over tokens of the cosine between x and r
    l0              mean number of active features per token
    dead_fraction   fraction of features that are never active on the held-out set
    dense_fraction  fraction of features that are active on more than DENSE of its tokens
    decoder_similarity  mean over pairs of features of |cosine| of their decoder rows (c_dec of arXiv 2508.16560);
                    not measured while feature_shards is more than 1
    ce_original, ce_reconstructed, ce_zero_ablated, ce_mean_ablated
                    cross-entropy in nats per token: of the model, and with x replaced by r, by 0, by x_mean
    ce_degradation  ce_reconstructed − ce_original: 0 is perfect, larger is worse
    kl_divergence   mean over tokens of KL(p ‖ q) in nats; p is the model's prediction, q that with r in place of x
    recovery_from_zero, recovery_from_mean
                    (CE ablated − CE reconstructed) / (CE ablated − CE original): 1 is perfect
    threshold       inference threshold of a BatchTopK or Matryoshka SAE

The first eval_skip_positions of a context and the tokens in exclude_tokens are skipped: the model keeps its own
activations there, and neither these positions nor the predictions made from them count in any metric. Metrics are
measured in eval(). For BatchTopK and Matryoshka the suffix _batch marks the same metrics with the top k of the batch.
For Matryoshka the suffix _prefix_<m> marks the same metrics of the first m features alone, in eval(); m are its
matryoshka_sizes below dict_size. These are measured on the whole held-out set only.

With at least two documents, each metric but decoder_similarity and threshold has a standard error over documents,
<metric>_se. A context belongs to the document in which it begins. All metrics but the fractions of features are ratios
of sums over tokens. Their standard error is by the delta method, std(a − ratio·b) / (mean(b)·√n), where a and b are
numerator and denominator of each of n documents. For the fractions of features it is by the jackknife, which omits each
of MAX_PARTS parts of the documents in turn. It estimates the variation over documents, not over seeds; from few
documents it is a rough estimate. The last held-out document continues in the training set.

On the whole held-out set, results also contain `histograms`, in eval():

    l0                   number of tokens with 0, 1, 2, ... active features
    log10_density        number of features per bin of log10 of the density (fraction of tokens on which a feature is
                         active)
    log10_density_edges  the edges of these bins, DENSITY_EDGES
    never_active         number of features with density 0, which are in no bin
"""

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import distributed
from activation_store import ActivationsStore
from checkpoint import load_sae, saved_sae
from config import BATCH_TOP_K_TYPES, KEYS, best_device, device_problem, prefix_sizes
from console import InputError, count_of, one_line, run_command, tell, text_table
from files import read_json, write_json
from hub import stay_offline_without_network
from language_model import complete_cfg, load_model
from sae import BaseAutoencoder
from shards import Shards
from sparse_ops import full_precision, sae_arithmetic

DENSITY_EDGES = [-8 + i / 4 for i in range(33)]  # the same in every run, so that runs can be compared and averaged
DENSE = 0.1
OF_PREFIXES = ("nmse", "fvu", "l0", "dead_fraction", "ce_degradation")  # printed for each prefix of a Matryoshka SAE
MAX_PARTS = 64  # of consecutive documents; with fewer documents, one part per document
CHUNK = 2**22  # maximum size of [tokens, F] in calibrate_threshold and of [rows, F] in decoder_similarity


@torch.no_grad()
def heldout_baseline(activation_store: ActivationsStore) -> dict:
    """What evaluate needs that does not depend on the SAE:

    acts [n, seq_len, d]                  the held-out activations, float32 in main memory
    mean [d]                              their mean over the positions that count
    ce_zero_ablated, ce_mean_ablated [n]  CE of each context, in nats per token, with activations set to 0 or `mean`
    seconds_per_prediction                the time of one such forward pass for one context
    """
    batches = eval_batches(activation_store)
    acts = torch.empty(*activation_store.eval_contexts.shape, activation_store.act_size, dtype=torch.float32)
    acts_of_batches = acts.split(len(batches[0]))
    total, count = 0, 0
    for tokens, part in zip(batches, acts_of_batches):
        part.copy_(activation_store.get_activations(tokens))
        x = part.to(tokens.device)[position_mask(activation_store, tokens)]
        total, count = total + x.double().sum(0), count + len(x)
    mean = (total / count).float()
    replacements = {"ce_zero_ablated": torch.zeros_like(mean), "ce_mean_ablated": mean}
    ce, started = {key: [] for key in replacements}, time.time()
    for tokens, part in zip(progress("model", batches), acts_of_batches):
        x, mask = part.to(tokens.device), position_mask(activation_store, tokens)
        for key, replacement in replacements.items():
            logits = predict(activation_store, tokens, torch.where(mask[..., None], replacement, x))
            ce[key].append(prediction_losses(logits, tokens, mask)[0].double().cpu())
    seconds = (time.time() - started) / len(acts) / len(replacements)
    baseline = {"acts": acts, "mean": mean, "seconds_per_prediction": seconds}
    return baseline | {key: torch.cat(losses) for key, losses in ce.items()}


def evaluation_cost(saes: list[BaseAutoencoder]) -> float:
    """Estimated time of evaluate per context of the whole set; the unit is a prediction in heldout_baseline. With the
    SAE and the KL divergence, a prediction was measured to take 1.4 to 1.9 times as long.
    """
    return 1.5 * (1 + sum(len(variants_of(sae.cfg, whole=True)) for sae in saes))


def progress(what: str, batches: list) -> tqdm:
    """The batches, with a progress bar that appears after 2 s."""
    return tqdm(batches, desc=f"evaluating: {what}", unit="batch", leave=False, delay=2, disable=distributed.rank() > 0)


@torch.no_grad()
def evaluate(
    saes: list[BaseAutoencoder],
    activation_store: ActivationsStore,
    baseline: dict,
    num_contexts: int | None = None,
) -> list[dict]:
    """The metrics above for each SAE, on the first `num_contexts` held-out contexts (default: all). dead_fraction,
    dense_fraction, decoder_similarity, the histograms and the metrics of prefixes are computed on the whole set only.
    Does not change the SAEs.

    Peak memory: activations, features and three tensors of logits of one batch of contexts (eval_batches), and
    MAX_PARTS counts per feature.
    """
    if not saes:
        return []
    skip, whole = activation_store.cfg["eval_skip_positions"], num_contexts is None
    batches = eval_batches(activation_store, num_contexts)
    masks = position_mask(activation_store, torch.cat(batches))
    documents = activation_store.eval_documents[: len(masks)]  # of each context
    num_documents = int(documents[-1]) + 1
    num_parts = min(num_documents, MAX_PARTS)
    parts = documents.to(masks.device) * num_parts // num_documents  # of each context
    # Of each SAE and variant: for each batch, the means over each context [7, contexts] and the L0 of each token
    # [tokens]; and how often each feature is active in each part [parts, F].
    per_context, token_l0, times_active = defaultdict(list), defaultdict(list), defaultdict(int)
    ce_original = []  # for each batch [contexts]

    of_batches = (of.split(len(batches[0])) for of in (baseline["acts"][:num_contexts], masks, parts))
    for tokens, acts, mask, part in zip(progress(count_of(len(saes), "SAE"), batches), *of_batches):
        acts = acts.to(tokens.device)
        x, after_skip = acts[mask], mask[:, skip:]  # means are over the positions from skip on
        variance = (x - baseline["mean"]).double().pow(2).sum(-1)
        own_variance = (x - x.mean(-1, keepdim=True)).double().pow(2).sum(-1)
        logits = predict(activation_store, tokens, acts)
        ce_original.append(prediction_losses(logits, tokens, mask)[0].double().cpu())
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        original = p, log_p.mul_(p).sum(-1)
        del logits, log_p
        in_part = F.one_hot(part[:, None].expand_as(mask)[mask], num_parts)  # [tokens, parts]
        for i, sae in enumerate(saes):
            for suffix, training, size in variants_of(sae.cfg, whole):
                reconstruction, features = reconstruct(sae, x, training, size)
                reconstruction = reconstruction.float()
                error = (x - reconstruction).double().pow(2).sum(-1)
                active = features.sign()  # sums of bool are slow on CPUs
                del features
                l0 = sae.shards.sum(active.sum(1).long())
                cosine = F.cosine_similarity(x, reconstruction, dim=-1)
                per_token = torch.stack([error / own_variance, error, variance, cosine.double(), l0.double()])
                if whole:
                    times_active[i, suffix] = times_active[i, suffix] + (in_part.to(active.dtype).T @ active).int()
                    token_l0[i, suffix].append(l0)
                del active
                logits = predict(activation_store, tokens, acts.masked_scatter(mask[..., None], reconstruction))
                losses = prediction_losses(logits, tokens, mask, original)
                per_position = per_token.new_zeros(5, *after_skip.shape).masked_scatter_(after_skip, per_token)
                per_context[i, suffix].append(torch.cat([per_position.mean(-1), losses.double()]).cpu())

    ces = {"ce_original": torch.cat(ce_original)}
    ces |= {key: baseline[key][:num_contexts] for key in ("ce_zero_ablated", "ce_mean_ablated")}
    original, zero, mean = ces.values()
    # The fraction of each context's tokens and predictions that count: 1 without exclude_tokens.
    tokens, predictions = masks[:, skip:].double().mean(-1).cpu(), masks[:, skip:-1].double().mean(-1).cpu()
    tokens_in_part = parts.new_zeros(num_parts).index_add_(0, parts, masks.sum(1))
    metrics = [{} for _ in saes]
    for i, (sae, values) in enumerate(zip(saes, metrics)):
        for suffix, *_ in variants_of(sae.cfg, whole):
            nmse, error, variance, cosine, l0, ce, kl = torch.cat(per_context[i, suffix], 1)
            ratios = {
                "nmse": (nmse, tokens), "fvu": (error, variance), "cosine_similarity": (cosine, tokens),
                "l0": (l0, tokens), "ce_reconstructed": (ce, predictions),
                "ce_degradation": (ce - original, predictions), "kl_divergence": (kl, predictions),
                "recovery_from_zero": (zero - ce, zero - original), "recovery_from_mean": (mean - ce, mean - original),
            }  # fmt: skip
            for key, (a, b) in ratios.items():
                values |= ratio_with_error(key + suffix, a, b, documents)
            if whole:
                values |= fractions_with_errors(suffix, times_active[i, suffix], tokens_in_part, sae.shards)
            if whole and not suffix:
                values["histograms"] = histograms(torch.cat(token_l0[i, ""]), times_active[i, ""].sum(0), sae.shards)
        for key, ce in ces.items():
            values |= ratio_with_error(key, ce, predictions, documents)
        if whole and sae.cfg["dict_size"] > 1 and sae.shards.count == 1:
            values["decoder_similarity"] = decoder_similarity(sae.W_dec)
        if sae.cfg["sae_type"] in BATCH_TOP_K_TYPES:
            values["threshold"] = sae.threshold.item()
    return metrics


def variants_of(cfg: dict, whole: bool) -> list[tuple[str, bool, int | None]]:
    """The ways in which an SAE is measured: suffix of the metrics, whether in train(), number of features (None: all).
    whole: whether on the whole held-out set.
    """
    variants = [("", False, None)]
    if cfg["sae_type"] in BATCH_TOP_K_TYPES:
        variants.append(("_batch", True, None))
    if cfg["sae_type"] == "matryoshka" and whole:
        variants += [(f"_prefix_{size}", False, size) for size in prefix_sizes(cfg)[:-1]]
    return variants


@full_precision()
def decoder_similarity(W_dec: torch.Tensor) -> float:
    """Mean of |cosine| over all pairs of rows of W_dec [F, d], F > 1. It has no standard error."""
    rows, n, total = F.normalize(W_dec, dim=-1), len(W_dec), 0
    step = max(1, CHUNK // n)
    for i in range(0, n, step):
        cosines = rows[i : i + step] @ rows[i:].T
        total += cosines.triu_(1).abs_().sum(-1).sum(dtype=torch.float64)  # each pair once
    return (total / (n * (n - 1) / 2)).item()


def ratio_with_error(key: str, a: torch.Tensor, b: torch.Tensor, documents: torch.Tensor) -> dict:
    """Σa / Σb over contexts [n] and its standard error over their documents [n], numbered from 0, by the delta method.
    For a mean over tokens, a is the mean over a context, with 0 at tokens that do not count, and b the fraction of its
    tokens that count.
    """
    ratio = a.sum() / b.sum()
    values = {key: ratio.item()}
    a, b = (of.new_zeros(int(documents[-1]) + 1).index_add_(0, documents, of) for of in (a, b))
    if len(a) > 1:
        values[f"{key}_se"] = ((a - ratio * b).std() / b.mean().abs() / len(a) ** 0.5).item()
    return values


def fractions_with_errors(suffix: str, times_active: torch.Tensor, tokens: torch.Tensor, shards: Shards) -> dict:
    """dead_fraction and dense_fraction with jackknife standard errors, from the counts `times_active` [parts, F] and
    the number of tokens in each part [parts].
    """
    n, total, values = len(tokens), times_active.sum(0), {}
    num_tokens = torch.stack([tokens.sum(), *(tokens.sum() - tokens)])  # of the set, and without each part
    counts = torch.cat([total[None], total - times_active])
    dense = counts > DENSE * num_tokens.double()[:, None]
    num_features = shards.sum(torch.tensor(counts.shape[1], device=counts.device))  # a prefix ends within a shard
    for key, features in [("dead_fraction", counts == 0), ("dense_fraction", dense)]:
        fraction = shards.sum(features.sum(1)) / num_features.double()
        values[key + suffix] = fraction[0].item()
        if n > 1:
            values[f"{key}{suffix}_se"] = (fraction[1:].std() * (n - 1) / n**0.5).item()
    return values


def histograms(token_l0: torch.Tensor, times_active: torch.Tensor, shards: Shards) -> dict:
    """The histograms above, as lists, from the L0 of each token [n] and the number of active tokens per feature [F]."""
    ever = times_active[times_active > 0].double().cpu()
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    log10_density = (ever / len(token_l0)).log10().clamp(min=DENSITY_EDGES[0])
    counts = torch.histogram(log10_density, edges).hist.int()
    *counts, never = shards.sum(torch.cat([counts, counts.new_tensor([len(times_active) - len(ever)])])).tolist()
    return {
        "l0": token_l0.cpu().bincount().tolist(),
        "log10_density": counts,
        "log10_density_edges": DENSITY_EDGES,
        "never_active": never,
    }


def eval_batches(activation_store: ActivationsStore, num_contexts: int | None = None) -> list[torch.Tensor]:
    """The held-out contexts in batches of about batch_size tokens, so that BatchTopK selects as in training."""
    cfg = activation_store.cfg
    contexts = activation_store.eval_contexts[:num_contexts].to(cfg["device"])
    return list(contexts.split(max(1, cfg["batch_size"] // activation_store.seq_len)))


def position_mask(activation_store: ActivationsStore, tokens: torch.Tensor) -> torch.Tensor:
    """Mask [n, seq_len] of the positions in contexts [n, seq_len] that count: those from eval_skip_positions on that
    hold no token of exclude_tokens.
    """
    mask = activation_store.kept(tokens)
    mask[:, : activation_store.cfg["eval_skip_positions"]] = False
    return mask


def predict(activation_store: ActivationsStore, tokens: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
    """Logits [n, predictions, d_vocab] at the positions from eval_skip_positions on, but the last, with activations
    `acts` [n, seq_len, d] at the hook point. Only the layers after it are run (language_model.Predictor).
    """
    return activation_store.predict(tokens, acts)[:, activation_store.cfg["eval_skip_positions"] : -1]


def prediction_losses(
    logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, original: tuple | None = None
) -> torch.Tensor:
    """CE of each context, and with `original` the KL divergence from it: [1 or 2, n], in nats. They are means over the
    predictions, with 0 for predictions from positions where `mask` [n, seq_len] is False.

    original: the model's own probabilities p [n, predictions, d_vocab] and Σ p log p [n, predictions]. Contexts are
    processed one at a time to save memory.
    """
    losses, predictions = [], logits.shape[1]
    for i, targets in enumerate(tokens[:, -predictions:]):
        log_q, counts = logits[i].float().log_softmax(-1), mask[i, -predictions - 1 : -1]
        targets = targets.where(counts, -100)  # which nll_loss ignores
        losses.append([F.nll_loss(log_q, targets, reduction="sum") / len(targets)])
        if original is not None:
            kl = original[1][i] - log_q.mul_(original[0][i]).sum(-1)
            losses[-1].append(kl.where(counts, 0).mean())
    return torch.stack([torch.stack(of_context) for of_context in losses], 1)


def reconstruct(
    sae: BaseAutoencoder, x: torch.Tensor, training: bool, size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction [n, d] and features of x [n, d], in train() or eval() mode. With `size`, of the first `size`
    features alone. The SAE keeps its own mode.
    """
    before = sae.training
    sae.train(training)
    try:
        reconstruction, features = sae.reconstruct(x)
    finally:
        sae.train(before)
    if size is not None:
        features = features[:, : sae.shards.num_before(size, sae.cfg["dict_size"])]
        reconstruction = sae.decode(features, like=x)
    return reconstruction, features


@torch.no_grad()
@sae_arithmetic
def calibrate_threshold(sae: BaseAutoencoder, activations, target_l0: float | None = None) -> float:
    """Set the inference threshold of a BatchTopK or Matryoshka SAE so that its mean L0 on these activations is
    `target_l0` (default: top_k). Use it for other text, another L0, or an SAE imported without a threshold. Returns the
    resulting mean L0. checkpoint.save_sae saves the SAE; result.json and evaluation.json of the run keep the metrics of
    the old threshold.

    `activations`: those of the language model [n, d], on any device, or an iterable of such batches, read once. They
    should resemble those on which the SAE will be used. A histogram with 4096 bins per power of 2 bounds the memory;
    the threshold is at the edge of a bin, so it is exact to 1 part in 4096.

    Raises InputError, and changes nothing, if the SAE type has no threshold, the target cannot be reached, or there are
    no activations or NaN or infinity in them.
    """
    target = sae.cfg["top_k"] if target_l0 is None else target_l0
    if sae.cfg["sae_type"] not in BATCH_TOP_K_TYPES:
        allowed = " or ".join(BATCH_TOP_K_TYPES)
        raise InputError(f"only a {allowed} SAE has a threshold to calibrate; this one is {sae.cfg['sae_type']}")
    if not target > 0:
        raise InputError(f"target_l0 = {target} is not allowed: it must be above 0")
    # Positive float32 values have the same order as their bits read as integers: the upper 20 of 31 bits are the bin.
    histogram, num_tokens = torch.zeros(2**20, dtype=torch.int64, device=sae.W_enc.device), 0
    for batch in [activations] if isinstance(activations, torch.Tensor) else activations:
        for x in batch.flatten(0, -2).split(max(1, CHUNK // sae.cfg["dict_size"])):
            z = sae.pre_activation(sae.preprocess_input(x)[0]).float()
            if not z.isfinite().all():
                raise InputError("NaN or infinity in the activations or in the pre-activations of the SAE")
            histogram += (z[z > 0].view(torch.int32) >> 11).bincount(minlength=2**20)
            num_tokens += len(x)
    if num_tokens == 0:
        raise InputError("there are no activations to calibrate the threshold on")
    l0 = histogram.flip(0).cumsum(0).flip(0).double() / num_tokens  # L0 with the threshold just below each bin
    if target > l0[0]:
        raise InputError(f"target_l0 = {target} cannot be reached: only {l0[0]:.1f} features per token are positive")
    edge = (l0 - target).abs().argmin()
    sae.threshold.copy_(((edge << 11) - 1).clamp(min=0).int().view(torch.float32))  # z > θ for all z >= edge
    sae.threshold_num_batches.clamp_(min=100)  # if training resumes, the running mean starts from this threshold
    return l0[edge].item()


# The command


def open_run(run: Path, dataset_path: str | None = None) -> tuple:
    """Open a run: its SAE, its language model, and an ActivationsStore that has only its held-out tokens, or as many
    tokens from the beginning of the dataset `dataset_path`. The SAE is on the device of its training, if that exists
    here.

    Raises InputError if `run` is not a run or cannot be opened, or if its BatchTopK SAE has no threshold. Warns if the
    text has changed since training.
    """
    if not run.is_dir():
        raise InputError(f"{run} is not a folder; RUN must be a run's folder, runs/<sweep>/<name>")
    record = read_json(run / "config.json")
    if not record and (names := sorted(path.parent.name for path in run.glob("*/config.json"))):
        raise InputError(f"{run} is a sweep's folder; RUN must be one of its runs, such as {run / names[0]}")
    if run.name == "sae" and (run.parent / "config.json").is_file():
        raise InputError(f"{run} is an SAE's folder; RUN must be the folder of its run, {run.parent}")
    if record and saved_sae(run / "sae") is None:
        raise InputError(f"{run} holds no SAE yet: its training has not ended")
    device = str(record.get("device"))
    sae = load_sae(run, best_device() if device_problem(device) else device)
    if sae.cfg["sae_type"] in BATCH_TOP_K_TYPES and sae.threshold_num_batches == 0:
        raise InputError(
            f"{run}: this BatchTopK SAE has no inference threshold yet (evaluation.calibrate_threshold sets it)"
        )
    cfg = sae.cfg
    if dataset_path is not None:  # its split and column are not those of the run's own dataset
        cfg = cfg | {key: KEYS[key].default for key in KEYS if key.startswith("dataset_")}
        cfg["dataset_path"] = dataset_path
    stay_offline_without_network(cfg["model_name"], cfg["dataset_path"])
    model = load_model(cfg)
    sae.cfg = complete_cfg(sae.cfg, model)
    activation_store = ActivationsStore(model, cfg, held_out_only=True)
    trained_on = record.get("_provenance", {}).get("heldout_tokens_sha256")
    if dataset_path is None and trained_on not in (None, activation_store.fingerprint()):
        tell(f"warning: {sae.cfg['dataset_path']} has changed since training: the SAE may have seen held-out text")
    return sae, model, activation_store


def recorded_metrics(run: Path) -> dict:
    """A run's metrics from evaluation.json, else from result.json; {} if it has neither."""
    return read_json(run / "evaluation.json") or read_json(run / "result.json")


def table(metrics: dict) -> str:
    """A table with one metric per line, with its standard error, and a second column for the _batch metrics. For a
    Matryoshka SAE, below it a table with the main metrics of each prefix.
    """
    rows = [["", "as used", "batch top-k"] if "l0_batch" in metrics else ["", "as used"]]
    for key, value in metrics.items():
        if isinstance(value, float) and not key.endswith(("_se", "_batch")) and "_prefix_" not in key:
            rows.append([key, *(with_error(metrics, name) for name in (key, f"{key}_batch") if name in metrics)])
    text = text_table(rows)
    sizes = [key.removeprefix("nmse_prefix_") for key in metrics if re.fullmatch(r"nmse_prefix_\d+", key)]
    if not sizes:
        return text
    rows = [["features", *OF_PREFIXES]]
    for size in sizes:
        rows.append([size, *(with_error(metrics, f"{key}_prefix_{size}") for key in OF_PREFIXES)])
    rows.append(["all", *(with_error(metrics, key) for key in OF_PREFIXES)])
    return f"{text}\n\n{text_table(rows)}"


def with_error(metrics: dict, key: str) -> str:
    """A metric, with its standard error if it has one."""
    error = f" ± {metrics[f'{key}_se']:.4f}" if f"{key}_se" in metrics else ""
    return f"{metrics[key]:.4f}{error}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/<sweep>/<name>")
    parser.add_argument("--eval-tokens", type=int, metavar="N", help="use only the first N held-out tokens")
    parser.add_argument("--dataset-path", metavar="TEXT", help="use another dataset: hub name, local file or folder")
    args = parser.parse_args(argv)
    sae, _, activation_store = open_run(args.run, args.dataset_path)
    held_out, seq_len = activation_store.eval_contexts, activation_store.seq_len
    if args.eval_tokens is not None:
        if not 1 <= args.eval_tokens <= held_out.numel():
            raise InputError(
                f"--eval-tokens {args.eval_tokens} is not allowed: it must be 1 to {held_out.numel()}, the number of "
                f"held-out tokens"
            )
        activation_store.eval_contexts = held_out[: -(-args.eval_tokens // seq_len)]
    contexts = activation_store.eval_contexts
    record, of_run = {"eval_tokens": contexts.numel()}, {}
    name, where = "evaluation.json", f"{count_of(len(contexts), 'held-out context')} of {seq_len} tokens"
    if args.dataset_path is not None:
        name = f"evaluation_{Path(args.dataset_path).stem}_{activation_store.fingerprint()[:8]}.json"  # of these tokens
        where = f"{count_of(len(contexts), 'context')} of {args.dataset_path}, each of {seq_len} tokens"
        record, of_run = {"dataset_path": args.dataset_path} | record, recorded_metrics(args.run)
    elif len(contexts) < len(held_out):  # exports show evaluation.json
        name = f"evaluation_first_{contexts.numel()}.json"
    (metrics,) = evaluate([sae], activation_store, heldout_baseline(activation_store))
    try:  # before the table is printed, which fails if stdout is closed
        write_json(args.run / name, record | metrics)
    except OSError as error:
        raise InputError(f"{args.run / name} cannot be written: {one_line(error)}") from error
    finally:
        print(f"{sae.cfg['name']} on {where}")
        print(table(metrics))
        if "l0" in of_run:
            print(f"l0 on the run's own held-out text: {with_error(of_run, 'l0')}")


if __name__ == "__main__":
    run_command(main)
