"""Metrics on held-out tokens, of all the SAEs of a group at once.

    python evaluation.py RUN [--eval-tokens N]      RUN is a run's folder, runs/<sweep>/<name>

prints them as a table and writes RUN/evaluation.json, on the run's held-out tokens or the first N of them.

With x an activation and r its reconstruction, both in the residual stream's own units:

    nmse            mean over tokens of ‖x − r‖² / ‖x − mean_d(x)‖²   (mean over the token's own d coordinates)
    fvu             Σ ‖x − r‖² / Σ ‖x − x_mean‖²                      (x_mean over the held-out set);
                    the explained variance is 1 − fvu, with the same standard error
    cosine_similarity  mean over tokens of the cosine between x and r
    l0              mean number of active features per token
    dead_fraction   share of features that are never active on the held-out set
    dense_fraction  share of features that are active on more than DENSE of its tokens
    ce_original, ce_reconstructed, ce_zero_ablated, ce_mean_ablated
                    cross-entropy in nats per token: of the model, and with x replaced by r, by 0, by x_mean
    ce_degradation  CE with the reconstruction − CE of the model: 0 is perfect, larger is worse
    kl_divergence   mean over tokens of KL(p ‖ q), p the model's prediction and q that with the reconstruction, in nats
    recovery_from_zero, recovery_from_mean
                    (CE ablated − CE reconstructed) / (CE ablated − CE original): 1 is perfect
    threshold       BatchTopK's; l0 is what it gives

The first eval_skip_positions of a context, and tokens of exclude_tokens, are left alone: the model keeps its own
activations there, and they count in no metric, nor do the predictions made from them. Everything is measured in eval();
the same metrics of a BatchTopK's batch top-k have the suffix _batch.

Each metric has a standard error over contexts, <metric>_se (from two contexts on): of a mean over tokens that of the
mean of the contexts' means; of a ratio by the delta method, std(a − ratio·b) / (mean(b)·√n) with a context's a over b;
of the shares of features, which are of the set as a whole, by the jackknife that leaves out one of MOST_PARTS parts of
it in turn. It tells how far other contexts would move the figure, not how far another seed would. It treats contexts as
independent. Contexts cut from one long document are not: where the held-out set has few documents, the standard errors
are too small. And the document at the end of the held-out set continues in the training set.

On the whole held-out set there are also `histograms`, of the SAE in eval():

    l0                   number of tokens with 0, 1, 2, ... active features
    log10_density        number of features whose density (share of tokens on which it is active) has its log10
                         between two neighbours of DENSITY_EDGES, which stand beside it as log10_density_edges
    never_active         number of features of density 0: they are in no bin
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from activation_store import ActivationsStore
from checkpoint import load_sae, write_json
from config import best_device
from console import InputError, one_line, run_command, tell
from hub import stay_offline_without_network
from language_model import complete_cfg, load_model

DENSITY_EDGES = [-8 + i / 4 for i in range(33)]  # the same in every run, so that runs can be compared and averaged
DENSE = 0.1
MOST_PARTS = 64  # consecutive contexts each; fewer where there are fewer contexts
IGNORED = -100  # in place of a target whose prediction does not count
CHUNK = 2**24  # pre-activations in memory at a time in calibrate_threshold, [tokens, F]


@torch.no_grad()
def heldout_baseline(activation_store) -> dict:
    """What no SAE changes: the held-out mean activation [d], and per context [n] the CE of the model as it is
    (ce_original), with its activations set to 0 (ce_zero_ablated) and to the mean (ce_mean_ablated), in nats per token.
    """
    total, count = 0, 0
    for tokens in eval_batches(activation_store):
        x = heldout_activations(activation_store, tokens)[kept(activation_store, tokens)]
        total, count = total + x.double().sum(0), count + len(x)
    mean = (total / count).float()
    replacements = {"ce_original": None, "ce_zero_ablated": torch.zeros_like(mean), "ce_mean_ablated": mean}
    ce = {key: [] for key in replacements}
    for tokens in eval_batches(activation_store):
        acts, keep = activation_store.get_activations(tokens), kept(activation_store, tokens)
        for key, replacement in replacements.items():
            logits = predict(activation_store, tokens, acts, replacement, keep)
            ce[key].append(prediction_losses(logits, tokens, keep)[0])
    return {"mean": mean} | {key: torch.cat(losses) for key, losses in ce.items()}


@torch.no_grad()
def evaluate(saes: list, activation_store, baseline: dict, num_contexts: int | None = None) -> list[dict]:
    """The metrics above for each SAE, on the first `num_contexts` held-out contexts (all of them by default; the
    shares of dead and dense features and the histograms are told of all only). Leaves the SAEs as they were.

    In memory are the activations and features of one batch of contexts (eval_batches), two tensors of its logits (the
    model's and one SAE's), and MOST_PARTS counts per feature.
    """
    cfg = activation_store.cfg
    variants = [(i, "", False) for i in range(len(saes))]
    variants += [(i, "_batch", True) for i, sae in enumerate(saes) if sae.cfg["sae_type"] == "batchtopk"]
    per_context = {variant: [] for variant in variants}  # of each batch, the means of its contexts [8, contexts]
    contexts = len(activation_store.eval_contexts[:num_contexts])
    keep = kept(activation_store, activation_store.eval_contexts[:num_contexts].to(cfg["device"]))
    part = torch.arange(contexts, device=cfg["device"]) * min(contexts, MOST_PARTS) // contexts  # of each context
    times_active = {variant: 0 for variant in variants}  # in each part, of each feature [parts, F]
    token_l0 = {variant: [] for variant in variants}

    done = 0
    for tokens in eval_batches(activation_store, num_contexts):
        acts = activation_store.get_activations(tokens)
        here = keep[done : done + len(tokens)]
        x = acts[:, cfg["eval_skip_positions"] :][here]
        variance = (x - baseline["mean"]).double().pow(2).sum(-1)
        own_variance = (x - x.mean(-1, keepdim=True)).double().pow(2).sum(-1)
        log_p = predict(activation_store, tokens, acts).float().log_softmax(-1)
        parts = part[done : done + len(tokens), None].expand_as(here)[here]
        done += len(tokens)
        for variant in variants:
            sae = saes[variant[0]]
            reconstruction, features = in_mode(sae, variant[2], sae.reconstruct, x)
            reconstruction = reconstruction.float()
            error = (x - reconstruction).double().pow(2).sum(-1)
            active = features > 0
            del features
            l0 = active.sum(1)
            cosine = F.cosine_similarity(x, reconstruction, dim=-1)
            per_token = torch.stack([error / own_variance, error, variance, cosine.double(), l0.double()])
            if num_contexts is None:
                zeros = parts.new_zeros(min(contexts, MOST_PARTS), active.shape[1], dtype=torch.int32)
                times_active[variant] = times_active[variant] + zeros.index_add_(0, parts, active.int())
                token_l0[variant].append(l0)
            del active
            spliced = x.new_empty(*here.shape, x.shape[1]).masked_scatter_(here[..., None], reconstruction)
            logits = predict(activation_store, tokens, acts, spliced, here)
            losses = prediction_losses(logits, tokens, here, log_p)
            means = per_token.new_zeros(5, *here.shape).masked_scatter_(here, per_token).mean(-1)
            per_context[variant].append(torch.cat([means, losses.double()]).cpu())

    metrics = [{} for _ in saes]
    ces = {key: values[:contexts].double().cpu() for key, values in baseline.items() if key != "mean"}
    original, zero, mean = ces["ce_original"], ces["ce_zero_ablated"], ces["ce_mean_ablated"]
    # Of each context, the share of its tokens and of its predictions that count: 1 without exclude_tokens.
    tokens, predictions = keep.double().mean(-1).cpu(), keep[:, :-1].double().mean(-1).cpu()
    for variant in variants:
        i, suffix, training = variant
        nmse, error, variance, cosine, l0, ce, kl = torch.cat(per_context[variant], 1)
        ratios = {
            "nmse": (nmse, tokens), "fvu": (error, variance), "cosine_similarity": (cosine, tokens),
            "l0": (l0, tokens), "ce_reconstructed": (ce, predictions), "ce_degradation": (ce - original, predictions),
            "kl_divergence": (kl, predictions),
            "recovery_from_zero": (zero - ce, zero - original), "recovery_from_mean": (mean - ce, mean - original),
        }  # fmt: skip
        for key, (a, b) in ratios.items():
            metrics[i] |= ratio_with_error(key + suffix, a, b)
        if num_contexts is None:
            tokens_in_part = part.new_zeros(min(contexts, MOST_PARTS)).index_add_(0, part, keep.sum(1))
            metrics[i] |= shares_with_errors(suffix, times_active[variant], tokens_in_part)
            if not training:
                l0 = torch.cat(token_l0[variant])
                metrics[i]["histograms"] = histograms(l0, times_active[variant].sum(0))
    for sae, values in zip(saes, metrics):
        for key, ce in ces.items():
            values |= ratio_with_error(key, ce, predictions)
        if sae.cfg["sae_type"] == "batchtopk":
            values["threshold"] = sae.threshold.item()
    return metrics


def ratio_with_error(key: str, a: torch.Tensor, b: torch.Tensor) -> dict:
    """Σa / Σb over contexts [n] and its standard error by the delta method. For a mean over tokens a is a context's
    mean with 0 for tokens that are left out, and b the share of its tokens that are not.
    """
    ratio = a.sum() / b.sum()
    values = {key: ratio.item()}
    if len(a) > 1:
        values[f"{key}_se"] = ((a - ratio * b).std() / b.mean().abs() / len(a) ** 0.5).item()
    return values


def shares_with_errors(suffix: str, times_active: torch.Tensor, tokens: torch.Tensor) -> dict:
    """dead_fraction and dense_fraction of counts [parts, F] in parts of so many tokens [parts]; jackknife errors."""
    n, total, values = len(tokens), times_active.sum(0), {}
    left = torch.stack([tokens.sum(), *(tokens.sum() - tokens)])  # of the set, and without each part
    counts = torch.cat([total[None], total - times_active])
    for key, share in [("dead_fraction", counts == 0), ("dense_fraction", counts > DENSE * left.double()[:, None])]:
        share = share.double().mean(1)
        values[key + suffix] = share[0].item()
        if n > 1:
            values[f"{key}{suffix}_se"] = (share[1:].std() * (n - 1) / n**0.5).item()
    return values


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


def kept(activation_store, tokens: torch.Tensor) -> torch.Tensor:
    """Of contexts [n, seq_len], which of the positions that evaluation does not skip are not of exclude_tokens either:
    [n, seq_len - skip], bool."""
    return activation_store.kept(tokens[:, activation_store.cfg["eval_skip_positions"] :])


def predict(activation_store, tokens: torch.Tensor, acts: torch.Tensor, replacement=None, keep=None) -> torch.Tensor:
    """Logits [n, predictions, d_vocab] of the predictions made from the positions that evaluation does not skip.

    `acts` [n, seq_len, d] are the model's activations at the hook point. A replacement (what [n, seq_len - skip, d]
    broadcasts from) takes their place wherever `keep` [n, seq_len - skip] is True. The model is computed from the hook
    point on (language_model.Predictor).
    """
    skip = activation_store.cfg["eval_skip_positions"]
    if replacement is not None:
        acts = torch.cat([acts[:, :skip], torch.where(keep[..., None], replacement, acts[:, skip:])], 1)
    return activation_store.predict(tokens, acts)[:, skip:-1]


def prediction_losses(
    logits: torch.Tensor, tokens: torch.Tensor, keep: torch.Tensor, log_p: torch.Tensor | None = None
) -> torch.Tensor:
    """CE of each context, and with log_p [n, predictions, d_vocab] the KL divergence from it: [1 or 2, n], in nats.
    They are means over all predictions, with 0 for those that are not made from positions that `keep` [n, predictions
    + 1] has.

    A context at a time: what is as large as its logits fits the memory beside those of the batch.
    """
    losses = []
    for i, targets in enumerate(tokens[:, -logits.shape[1] :]):
        log_q, counts = logits[i].float().log_softmax(-1), keep[i, :-1]
        targets = targets.where(counts, IGNORED)
        losses.append([F.nll_loss(log_q, targets, reduction="sum", ignore_index=IGNORED) / len(targets)])
        if log_p is not None:
            kl = F.kl_div(log_q, log_p[i], reduction="none", log_target=True).sum(-1)
            losses[-1].append(kl.where(counts, 0).mean())
    return torch.stack([torch.stack(of_context) for of_context in losses], 1)


def in_mode(sae, training: bool, function, *args):
    """Call `function` with the SAE in train() or eval() mode, and put it back in the mode it was in."""
    before = sae.training
    sae.train(training)
    try:
        return function(*args)
    finally:
        sae.train(before)


@torch.no_grad()
def calibrate_threshold(sae, activations, target_l0: float | None = None) -> float:
    """Set a BatchTopK's inference threshold so that on these activations its mean L0 is `target_l0` (its top_k by
    default): for other text, another L0, or an SAE imported without a threshold. Returns the mean L0 that it then has.
    Where it is then saved (checkpoint.save_sae), the run's result.json and evaluation.json are still of the old one.

    `activations`: residual-stream vectors [n, d] on any device, or an iterable of such batches, gone through once.
    They should be like those that the SAE is to be used on. One pass fills a histogram with 4096 bins for each power of
    2, so the memory is bounded, and the threshold is exact to 1 part in 4096, at an edge of a bin.

    Raises InputError, with nothing changed, for an SAE that has no threshold, a target that cannot be reached, and
    activations that are none or hold NaN.
    """
    target = sae.cfg["top_k"] if target_l0 is None else target_l0
    if sae.cfg["sae_type"] != "batchtopk":
        raise InputError(f"only a batchtopk SAE has a threshold to calibrate; this one is {sae.cfg['sae_type']}")
    if not target > 0:
        raise InputError(f"target_l0 = {target} is not allowed: it must be above 0")
    # The bits of a positive float32, read as an integer, have its order: the upper 20 of 31 are the bin.
    histogram, num_tokens = torch.zeros(2**20, dtype=torch.int64, device=sae.W_enc.device), 0
    for batch in [activations] if isinstance(activations, torch.Tensor) else activations:
        for x in batch.flatten(0, -2).split(max(1, CHUNK // sae.cfg["dict_size"])):
            z = sae.pre_activation(sae.preprocess_input(x)[0]).float()
            if not z.isfinite().all():
                raise InputError("there is NaN or infinity in the activations, or in what the SAE makes of them")
            histogram += (z[z > 0].view(torch.int32) >> 11).bincount(minlength=2**20)
            num_tokens += len(x)
    if num_tokens == 0:
        raise InputError("there are no activations to calibrate the threshold on")
    l0 = histogram.flip(0).cumsum(0).flip(0).double() / num_tokens  # of a threshold just below each bin
    if target > l0[0]:
        raise InputError(f"target_l0 = {target} cannot be reached: {l0[0]:.1f} features per token are positive")
    edge = (l0 - target).abs().argmin()
    sae.threshold.copy_(((edge << 11) - 1).clamp(min=0).int().view(torch.float32))  # z > θ holds from the edge on
    sae.threshold_num_batches.clamp_(min=100)  # it counts as the mean of long training, should this one be trained on
    return l0[edge].item()


# The command


def open_run(run: Path) -> tuple:
    """A run's SAE, on the device of its training if there is such a one here, its language model, and a store that has
    its held-out tokens and no room to train.

    Raises InputError if that is no run, or it cannot be opened, or its BatchTopK has no threshold; tells if the text
    has changed since the training.
    """
    if not run.is_dir():
        raise InputError(f"{run} is no folder; RUN must be a run's folder, runs/<sweep>/<name>")
    record = read_record(run / "config.json")
    device = str(record.get("device"))
    sae = load_sae(run, device if device.startswith(("cpu", best_device())) else best_device())
    if sae.cfg["sae_type"] == "batchtopk" and sae.threshold_num_batches == 0:
        raise InputError(
            f"{run}: this BatchTopK has no inference threshold yet (evaluation.calibrate_threshold sets it)"
        )
    stay_offline_without_network(sae.cfg["model_name"], sae.cfg["dataset_path"])
    model = load_model(sae.cfg)
    sae.cfg = complete_cfg(sae.cfg, model)
    little = {"num_tokens": 1, "batch_size": 1, "num_batches_in_buffer": 1, "activation_cache": None}
    activation_store = ActivationsStore(model, sae.cfg | little)
    activation_store.cfg = sae.cfg  # the evaluation's batches are as large as those of the training
    trained_on = record.get("_provenance", {}).get("heldout_tokens_sha256")
    if trained_on not in (None, activation_store.fingerprint()):
        tell(f"warning: {sae.cfg['dataset_path']} has changed since the training: the SAE may have seen held-out text")
    return sae, model, activation_store


def read_record(file: Path) -> dict:
    """The JSON of a run's record; {} where there is none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} is damaged: it is a {type(record).__name__}, not a dict")
    return record


def table(metrics: dict) -> str:
    """The metrics, one a line: with its standard error, and what the batch top-k gives beside it."""
    suffixes = ["", "_batch"] if "l0_batch" in metrics else [""]
    lines = [["", "as used", "batch top-k"][: 1 + len(suffixes)]]
    for key in metrics:
        if not isinstance(metrics[key], float) or key.endswith(("_se", "_batch")):
            continue
        lines.append([key])
        for name in (key + suffix for suffix in suffixes if key + suffix in metrics):
            lines[-1].append(with_error(metrics, name))
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def with_error(metrics: dict, key: str) -> str:
    """A metric, with its standard error where it has one."""
    error = f" ± {metrics[f'{key}_se']:.4f}" if f"{key}_se" in metrics else ""
    return f"{metrics[key]:.4f}{error}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/<sweep>/<name>")
    parser.add_argument("--eval-tokens", type=int, metavar="N", help="measure on the first N held-out tokens alone")
    args = parser.parse_args(argv)
    sae, _, activation_store = open_run(args.run)
    contexts, seq_len = activation_store.eval_contexts, activation_store.seq_len
    if args.eval_tokens is not None:
        most = contexts.numel()
        if not 1 <= args.eval_tokens <= most:
            raise InputError(
                f"--eval-tokens {args.eval_tokens} is not allowed: it must be 1 to {most}, what is held out"
            )
        contexts = activation_store.eval_contexts = contexts[: -(-args.eval_tokens // seq_len)]
    (metrics,) = evaluate([sae], activation_store, heldout_baseline(activation_store))
    print(f"{sae.cfg['name']} on {len(contexts)} held-out contexts of {seq_len} tokens")
    print(table(metrics))
    try:
        write_json(args.run / "evaluation.json", {"eval_tokens": contexts.numel()} | metrics)
    except OSError as error:
        raise InputError(f"{args.run / 'evaluation.json'} cannot be written: {one_line(error)}") from error


if __name__ == "__main__":
    run_command(main)
