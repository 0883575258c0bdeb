"""Writes a self-contained HTML page that shows what an SAE's features respond to and which tokens they promote.

    python features.py RUN [--num N] [--features I I ...]      RUN is a run's folder, runs/<sweep>/<name>

RUN/features.html has the requested features I first, then the N top-ranked ones (default: 2048). With --features alone,
only those are shown, in RUN/requested_features.html. Activations f are computed in eval() on the held-out tokens, and
are 0 at the positions and tokens that evaluation skips.

Features are ranked by energy, Σ f² ‖W_dec row‖² over the held-out tokens. Those active on fewer than RARE of these
tokens, or on more than the fraction DENSE of them, come last.

The logit effects of a feature are those of its decoder row alone: scaled to RMS 1, passed through the final norm and
the unembedding, minus the mean over the vocabulary, which softmax ignores. This is the direct path: it ignores the
layers between the hook point and the final norm. It also ignores the norm of the rest of the residual stream, which
scales all effects of a feature by the same factor. So compare effects within a feature, not between features.
"""

import argparse
import html
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

from config import SITES
from console import InputError, run_command
from evaluation import DENSE, open_run, position_mask, recorded_metrics
from files import replace

EXAMPLES = 8  # top contexts of a feature
WINDOW, BEFORE = 32, 22  # tokens shown per context, and how many of them precede its peak
BINS = 32  # of a feature's histogram, from 0 to the next power of 2 above its maximum
TOKENS, NEAREST = 10, 6  # promoted and suppressed tokens, and nearest features, per feature
RARE = 10  # tokens
CHUNK = 2**24  # maximum number of activations [tokens, F] in memory
TEMPLATE = Path(__file__).with_suffix(".html")
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # the characters of byte-level tokenizers


@torch.no_grad()
def feature_statistics(sae, activation_store) -> dict:
    """Statistics from one pass over the held-out tokens, at most CHUNK activations (or one context) at a time.

        num_tokens                    number of tokens that count
        active [F]                    number of tokens on which a feature is active
        energy [F]                    Σ f² (float64)
        histogram [F, BINS]           of its activations, from 0 to 2^exponent, with exponent [F]

    For the EXAMPLES contexts with the highest peaks, in descending order (ties in text order):

        value [n, F]                  the peak, which may be 0; n is EXAMPLES, or fewer if there are fewer contexts
        context, position             the numbers of the context and of the peak's position in it
        start                         the first position shown
        shown [n, window, F]          the activations from there on
    """
    contexts, skip = activation_store.eval_contexts, activation_store.cfg["eval_skip_positions"]
    seq_len, dict_size, device = contexts.shape[1], sae.cfg["dict_size"], sae.W_dec.device
    window = min(WINDOW, seq_len)
    energy = torch.zeros(dict_size, dtype=torch.float64, device=device)
    histogram = torch.zeros(dict_size, BINS, dtype=torch.int64, device=device)
    exponent = torch.full((dict_size,), -100, device=device)  # below any activation
    best = {}

    bar = tqdm(total=contexts.numel(), unit="tok", unit_scale=True, desc="held-out activations")
    size = max(1, CHUNK // (dict_size * seq_len))
    for first in range(0, len(contexts), size):
        tokens = contexts[first : first + size]
        x = activation_store.get_activations(tokens)[:, skip:]
        acts = F.pad(sae.encode(x).float(), (0, 0, skip, 0))  # [contexts, seq_len, F]
        acts[~position_mask(activation_store, tokens).to(device)] = 0
        energy += acts[:, skip:].flatten(0, 1).pow(2).sum(0)

        # Merge the best contexts so far with those of this chunk.
        value, position = acts.max(1)
        start = (position - BEFORE).clamp(0, seq_len - window)
        offsets = start[:, None] + torch.arange(window, device=device)[:, None]  # [contexts, window, F]
        shown = torch.take_along_dim(acts, offsets, 1)
        context = torch.arange(len(tokens), device=device)[:, None] + first
        new = dict(value=value, position=position, start=start, context=context.expand_as(value), shown=shown)
        found = {key: torch.cat([best[key], tensor]) if best else tensor for key, tensor in new.items()}
        order = found["value"].argsort(dim=0, descending=True, stable=True)[:EXAMPLES]
        for key, tensor in found.items():
            best[key] = torch.take_along_dim(tensor, order[:, None] if key == "shown" else order, 0)

        # A new maximum doubles the bin width until it fits. This is exact: bins merge in pairs.
        peak = value.amax(0)
        if not peak.isfinite().all():
            raise InputError("NaN or infinity in the activations of this SAE")
        grown = torch.where(peak > 0, torch.maximum(exponent, torch.frexp(peak).exponent), exponent)
        bins = torch.arange(BINS, device=device) >> (grown - exponent).clamp(max=31)[:, None]
        histogram, exponent = torch.zeros_like(histogram).scatter_add_(1, bins, histogram), grown
        acts = acts.flatten(0, 1)
        rows, features = acts.nonzero(as_tuple=True)
        bins = (acts[rows, features] * torch.exp2(-exponent.float())[features] * BINS).long()
        histogram += torch.bincount(features * BINS + bins, minlength=dict_size * BINS).view_as(histogram)
        bar.update(tokens.numel())
    bar.close()
    totals = {"num_tokens": int(position_mask(activation_store, contexts).sum()), "active": histogram.sum(1)}
    return best | totals | {"energy": energy, "histogram": histogram, "exponent": exponent}


def rank_features(statistics: dict, W_dec: torch.Tensor) -> list[int]:
    """The features that are ever active, in the order that the module docstring defines."""
    active = statistics["active"]
    last = (active < RARE) | (active > DENSE * statistics["num_tokens"])
    energy = statistics["energy"] * W_dec.detach().double().pow(2).sum(-1)
    order = np.lexsort([-energy.cpu().numpy(), last.cpu().numpy()])
    return [i for i in order.tolist() if active[i] > 0]


@torch.no_grad()
def logit_effects(model, directions: torch.Tensor) -> torch.Tensor:
    """Directions [n, d] in the residual stream -> logit effects [n, d_vocab] (see the module docstring)."""
    directions = directions / directions.pow(2).mean(-1, keepdim=True).sqrt()
    with_zero = F.pad(directions, (0, 0, 0, 1))  # the last row, 0, gives the effect of the biases
    logits = model.unembed(model.ln_final(with_zero[None].to(model.cfg.dtype)))[0].float()
    effects = logits[:-1] - logits[-1]
    return effects - effects.mean(-1, keepdim=True)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token in printable characters: incomplete UTF-8 as \\xe2, a newline as ↵."""
    vocabulary = tokenizer.get_vocab()
    byte_level = sum(token[0] == "Ġ" for token in vocabulary if token) > sum("▁" in token for token in vocabulary)
    texts = []
    for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids)):
        if token is None:
            text = f"[{i}]"
        elif byte_level and all(character in BYTES for character in token):
            text = bytes(BYTES[character] for character in token).decode("utf-8", "backslashreplace")
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            text = bytes([int(token[3:5], 16)]).decode("utf-8", "backslashreplace")
        else:
            text = token if byte_level else token.replace("▁", " ")
        text = text.replace("\n", "↵")
        texts.append("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
    return texts


def rounded(values: torch.Tensor) -> list:
    """Values rounded to three significant digits; 0 as an int."""
    return [int(value) if value == 0 else float(f"{value:.3g}") for value in values.flatten().tolist()]


@torch.no_grad()
def page_data(sae, model, activation_store, statistics: dict, features: list[int]) -> dict:
    """The data of the page for these features, as JSON values. Tokens are ids, with their texts in `vocab`."""
    cfg, contexts = sae.cfg, activation_store.eval_contexts
    writes_to_residual = cfg["hook_point"].rpartition("hook_")[2] in SITES and hasattr(model, "ln_final")
    unit_rows = F.normalize(sae.W_dec.float(), dim=-1)
    pages = []
    for chunk in torch.tensor(features, dtype=torch.int64, device=sae.W_dec.device).split(256):
        similarity = unit_rows[chunk] @ unit_rows.T
        similarity[torch.arange(len(chunk)), chunk] = -2  # not itself
        ranked = {"near": similarity.topk(min(NEAREST, cfg["dict_size"] - 1))}
        if writes_to_residual:
            # A padded vocabulary has logits without a token.
            effects = logit_effects(model, sae.W_dec[chunk].float())[:, : len(model.tokenizer)]
            for key, largest in (("up", True), ("down", False)):
                ranked[key] = effects.topk(min(TOKENS, effects.shape[1]), largest=largest)
        for row, i in enumerate(chunk.tolist()):
            found = int((statistics["value"][:, i] > 0).sum())
            examples = zip(*(statistics[key][:found, i].tolist() for key in ("context", "start", "position")))
            page = {
                "i": i,
                "active": int(statistics["active"][i]),
                "max": rounded(statistics["value"][0, i])[0],
                "range": 2.0 ** int(statistics["exponent"][i]),
                "histogram": statistics["histogram"][i].tolist(),
                "examples": [[*at, rounded(statistics["shown"][n, :, i])] for n, at in enumerate(examples)],
                **{key: list(zip(top.indices[row].tolist(), rounded(top.values[row]))) for key, top in ranked.items()},
            }
            pages.append(page)

    # Only the contexts and tokens that are shown.
    shown = {i: contexts[i].tolist() for i in sorted({example[0] for page in pages for example in page["examples"]})}
    ids = {token for page in pages for token, _ in page.get("up", []) + page.get("down", [])}
    ids = sorted(ids.union(*shown.values()))
    density = statistics["active"].double().cpu().numpy() / statistics["num_tokens"]
    edges = np.linspace(-6, 0, 25)
    return {
        "dict_size": cfg["dict_size"],
        "num_tokens": statistics["num_tokens"],
        "never_active": int((density == 0).sum()),
        "dense": int((density > DENSE).sum()),
        "densities": np.histogram(np.log10(density[density > 0]).clip(-6, 0), edges)[0].tolist(),
        "vocab": dict(zip(ids, token_texts(model.tokenizer, ids))),
        "contexts": shown,
        "features": pages,
    }


def write_page(path: Path, title: str, data: dict) -> None:
    """Insert the title and the data into the template. Both are escaped, so no text in them is parsed as HTML."""
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(), "DATA": content}
    page = re.sub("{{(TITLE|DATA)}}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    replace(path, page.encode())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, runs/<sweep>/<name>")
    parser.add_argument("--num", type=int, metavar="N", help="the N top-ranked features (default: 2048)")
    parser.add_argument(
        "--features", nargs="+", type=int, default=[], metavar="I",
        help="show these first; without --num only these, in requested_features.html",
    )  # fmt: skip
    args = parser.parse_args(argv)
    num = args.num
    if num is None:
        num = 0 if args.features else 2048
    if num < 0:
        raise InputError(f"--num {num} is not allowed: it must be at least 0")
    if num == 0 and not args.features:
        raise InputError("--num 0 is not allowed without --features: there is nothing to show")
    metrics = recorded_metrics(args.run)
    sae, model, activation_store = open_run(args.run)
    for feature in args.features:
        if not 0 <= feature < sae.cfg["dict_size"]:
            raise InputError(f"--features {feature} is not allowed: it must be 0 to {sae.cfg['dict_size'] - 1}")

    statistics = feature_statistics(sae, activation_store)
    ranked = rank_features(statistics, sae.W_dec)
    requested = list(dict.fromkeys(args.features))
    features = requested + [i for i in ranked if i not in requested][:num]
    data = page_data(sae, model, activation_store, statistics, features)
    data["cfg"] = {key: sae.cfg[key] for key in ("sae_type", "model_name", "hook_point", "dataset_path")}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    data["result"] = {key: value for key, value in numbers.items() if math.isfinite(value)}
    page = args.run / ("features.html" if num else "requested_features.html")
    write_page(page, sae.cfg["name"], data)
    print(f"Wrote {len(features)} of {sae.cfg['dict_size']} features to {page}")


if __name__ == "__main__":
    run_command(main)
