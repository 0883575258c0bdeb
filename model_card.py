"""The model card of an exported SAE: README.md, with metadata for the Hugging Face hub.

It has the equations of the SAE, code that loads it from the exported format, its held-out metrics and its training
config. If metrics or training are not recorded, it says so.
"""

import textwrap
from pathlib import Path

from huggingface_hub import ModelCardData

from config import BATCH_TOP_K_TYPES, KEYS, SAE_TYPES, TOP_K_TYPES, prefix_sizes
from console import markdown_table
from dataset import file_kind
from evaluation import recorded_metrics, with_error
from files import read_json
from hub import is_hub_name
from language_model import hub_name
from sae import BaseAutoencoder

METRIC_DEFINITIONS = {  # as in evaluation.py
    "nmse": "mean over tokens of ‖x − r‖² / ‖x − mean(x)‖², where mean(x) is over the token's own coordinates",
    "fvu": "fraction of variance unexplained; the explained variance is 1 − fvu",
    "cosine_similarity": "mean over tokens of the cosine similarity of x and r",
    "l0": "mean number of active features per token",
    "dead_fraction": "fraction of features that are never active on these tokens",
    "dense_fraction": "fraction of features that are active on more than 10 % of these tokens",
    "ce_original": "cross-entropy of the unmodified language model, in nats per token",
    "ce_degradation": "increase of the cross-entropy if r replaces x, in nats per token",
    "kl_divergence": "mean over tokens of KL(p ‖ q) in nats; p is the model's prediction, q that with r in place of x",
    "recovery_from_zero": "fraction of the increase in cross-entropy from zero ablation that r recovers",
    "recovery_from_mean": "fraction of the increase in cross-entropy from mean ablation that r recovers",
}


def model_card(sae: BaseAutoencoder, to: str, run: Path | None = None, repo: str | None = None) -> str:
    """The card of an SAE in the format `to` (a key of export.EXPORTS). The metrics are those in evaluation.json of the
    run's folder `run`, or else in its older result.json. With `repo`, the code loads the SAE from that hub repository.

    Raises InputError if one of these records is corrupt.
    """
    metrics = recorded_metrics(run) if run else {}
    # An imported SAE has no result.json: its training is unknown.
    num_tokens = read_json(run / "result.json").get("tokens") if run else None
    cfg = sae.cfg | {key: plain(value) for key, value in sae.cfg.items() if isinstance(value, str)}
    in_batch = to == "published" and cfg["sae_type"] in BATCH_TOP_K_TYPES  # the scripts have no threshold
    model_name, dataset = hub_name(sae.cfg["model_name"]), sae.cfg["dataset_path"]
    metadata = ModelCardData(
        library_name=to if to in ("saelens", "dictionary_learning") else "batchtopk",
        tags=["sparse-autoencoder", "interpretability", cfg["sae_type"]],
        base_model=model_name if may_be_on_hub(model_name) else None,
        datasets=[dataset] if num_tokens and may_be_on_hub(dataset) else None,
    )
    keys = {"sae_type", "act_size", "dict_size", "input_unit_norm", "dtype", "model_name", "hook_point"}
    if num_tokens:
        keys |= {key.name for key in KEYS.values() if key.in_name and cfg["sae_type"] in key.types}
        keys -= {"bad_documents", "site", "layer"}
    d, F = cfg["act_size"], cfg["dict_size"]
    paper = "2503.17547" if cfg["sae_type"] == "matryoshka" else "2412.06410"
    needs, imports, loading = usage(cfg, to, "BatchTopKSAE" if in_batch else type(sae).__name__)
    where = 'folder = "."  # the folder of this file; huggingface_hub.snapshot_download downloads it from the hub'
    if repo:
        imports += "\nfrom huggingface_hub import snapshot_download"
        where = f'folder = snapshot_download("{repo}")'
    x_dtype = "" if cfg["dtype"] == "float32" else f", dtype=torch.{cfg['dtype']}"
    return f"""---
{metadata.to_yaml()}
# license: choose one of the hub's license identifiers, such as mit or apache-2.0
---

# {SAE_TYPES[cfg["sae_type"]]} SAE with {F} features, {cfg["hook_point"]} of {cfg["model_name"]}

A sparse autoencoder ([arXiv {paper}](https://arxiv.org/abs/{paper})) for the activations x [{d}] at
`{cfg["hook_point"]}` (a transformer_lens hook point) of `{plain(model_name)}`. It maps x to sparse features
f [{F}] and a reconstruction r [{d}]:

{equations(sae, in_batch)}

{training_section(cfg, num_tokens, in_batch)}

## Usage

With {needs}:

```python
import torch
{imports}

{where}
x = torch.randn(4, {d}{x_dtype})  # replace with activations [n, {d}] of the language model

{loading}
```

## Metrics

{metrics_section(cfg, metrics, "_batch" if in_batch else "", held_out=bool(num_tokens))}

## Config

{markdown_table([("key", "value"), *((f"`{key}`", f"`{cfg[key]}`") for key in cfg if key in keys)])}
"""


def training_section(cfg: dict, num_tokens: int | None, in_batch: bool) -> str:
    """How the SAE was trained; num_tokens is None if that is unknown."""
    text = "Its training is not recorded, and the config in this folder may differ from the one in training."
    if num_tokens:
        bos = "each preceded by BOS" if cfg.get("has_bos", True) else "without BOS, as the model has none"
        bos = ", each starting with BOS." if cfg["bos_per_context"] else f" (concatenated documents, {bos})."
        text = f"It was trained on {num_tokens:,} tokens of `{cfg['dataset_path']}`, in contexts of "
        text += f"{cfg['seq_len']} tokens{bos}"
        if cfg["exclude_tokens"] is not None:
            text += f" Tokens with the ids {cfg['exclude_tokens']} were excluded."
    if cfg["sae_type"] in BATCH_TOP_K_TYPES and not in_batch:
        text += f" In training, f kept the {cfg['top_k']}·B largest z > 0 of each batch of B tokens."
    if cfg["sae_type"] == "matryoshka":
        text += " The dictionary is nested: its first m features were trained to reconstruct x alone too, for m = "
        text += f"{', '.join(map(str, prefix_sizes(cfg)[:-1]))}."
    return text


def usage(cfg: dict, to: str, class_name: str) -> tuple[str, str, str]:
    """For a format: the software that it needs, the imports, and code that loads the SAE and applies it to x."""
    d, F = cfg["act_size"], cfg["dict_size"]
    apply = f"features = sae.encode(x)  # [n, {F}]\nreconstruction = sae.decode(features)  # [n, {d}]"
    return {
        "saelens": (
            "SAELens 6 (`pip install sae-lens`)",
            "from sae_lens import SAE",
            f"sae = SAE.load_from_disk(folder)\n{apply}",
        ),
        "dictionary_learning": (
            "dictionary_learning 0.1 (`pip install dictionary-learning`)",
            "from dictionary_learning.utils import load_dictionary",
            f'sae, config = load_dictionary(folder, device="cpu")\n{apply}',
        ),
        "published": (
            "the scripts published with the paper (run in their folder)",
            f"import json\nfrom sae import {class_name}",
            f"""cfg = json.load(open(f"{{folder}}/config.json"))
sae = {class_name}(cfg | {{"dtype": torch.{cfg["dtype"]}}})
sae.load_state_dict(torch.load(f"{{folder}}/sae.pt", weights_only=True))
output = sae(x)
features, reconstruction = output["feature_acts"], output["sae_out"]  # [n, {F}], [n, {d}]""",
        ),
        "safetensors": (
            "the program that exported it (run in its folder)",
            "from checkpoint import load_sae",
            f"sae = load_sae(folder)\n{apply.replace('decode(features)', 'decode(features, like=x)')}",
        ),
    }[to]


def equations(sae: BaseAutoencoder, in_batch: bool) -> str:
    cfg, norm = sae.cfg, sae.cfg["input_unit_norm"]
    x = "x̂" if norm else "x"
    z = f"{x} W_enc" if cfg["sae_type"] == "jumprelu" else f"({x} − b_dec) W_enc"
    threshold = "threshold"
    if cfg["sae_type"] in BATCH_TOP_K_TYPES and sae.threshold_num_batches > 0:
        threshold = f"{sae.threshold.item():.6g}"
    f = {
        "vanilla": "relu(z)",
        "topk": f"relu(z) where z is among the {cfg['top_k']} largest of the token, else 0",
        "batchtopk": f"z where z > {threshold}, else 0",
        "matryoshka": f"z where z > {threshold}, else 0",
        "jumprelu": "z where z > threshold, else 0, with one threshold > 0 per feature",
    }[cfg["sae_type"]]
    if in_batch:
        f = f"relu(z) where z is among the {cfg['top_k']}·B largest of a batch of B tokens, else 0"
    lines = [
        f"z = {z}" if cfg["sae_type"] in TOP_K_TYPES else f"z = {z} + b_enc",
        f"f = {f}",
        "r = (f W_dec + b_dec) · std(x) + mean(x)" if norm else "r = f W_dec + b_dec",
    ]
    if norm:
        lines = ["x̂ = (x − mean(x)) / (std(x) + 1e-5), over the coordinates of x (input_unit_norm)", *lines]
    return textwrap.indent("\n".join(lines), "    ")


def metrics_section(cfg: dict, metrics: dict, suffix: str, held_out: bool) -> str:
    rows = []
    for key, text in METRIC_DEFINITIONS.items():
        name = key if key == "ce_original" else key + suffix  # the model's own loss has no suffix
        if name in metrics:
            rows.append((f"`{key}`", with_error(metrics, name), text))
    if not rows:
        return "No metrics are recorded."
    table = markdown_table([("metric", "value", "meaning"), *rows])
    num_tokens = metrics.get("eval_tokens", -(-cfg["eval_tokens"] // cfg["seq_len"]) * cfg["seq_len"])
    skip = cfg["eval_skip_positions"]
    skipped = f", from position {skip} of each context on" if skip else ""
    skipped += ", without the excluded tokens" if cfg["exclude_tokens"] is not None else ""
    text = f"On the first {num_tokens:,} tokens of `{cfg['dataset_path']}`{', held out from training' * held_out}"
    return f"{text}{skipped}; ± one standard error over documents.\n\n{table}"


def plain(text: str) -> str:
    """Text from a config, which may be untrusted, with HTML, Markdown and control characters replaced."""
    return "".join(char if char.isprintable() and char not in "<>`|[]" else "\ufffd" for char in text)


def may_be_on_hub(name: str) -> bool:
    """Whether `name` is a valid hub name and not a local path. The hub is not queried."""
    return is_hub_name(name) and not Path(name).exists() and not file_kind(Path(name))
