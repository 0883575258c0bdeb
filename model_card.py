"""The model card of an exported SAE: README.md, with metadata for the Hugging Face hub.

It has the equations of the SAE, code that loads it from the exported format, its held-out metrics and its training
config, or says that metrics and training are not recorded.
"""

from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from config import BATCH_TOP_K_TYPES, KEYS, TOP_K_TYPES, prefix_sizes
from dataset import file_kind
from evaluation import read_record, with_error
from language_model import hub_name
from sae import BaseAutoencoder

KINDS = {
    "vanilla": "Vanilla (L1)", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka BatchTopK",
}  # fmt: skip
PAPERS = {"matryoshka": "2503.17547"}  # else 2412.06410
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
LIBRARIES = {"saelens": "saelens", "dictionary_learning": "dictionary_learning"}  # library_name; else ours
LOADING = {  # what is needed, imports, and code
    "saelens": (
        "SAELens 6 (`pip install sae-lens`)",
        "from sae_lens import SAE",
        """sae = SAE.load_from_disk(folder)
features = sae.encode(x)  # [n, {dict_size}]
reconstruction = sae.decode(features)  # [n, {act_size}]""",
    ),
    "dictionary_learning": (
        "dictionary_learning 0.1 (`pip install dictionary-learning`)",
        "from dictionary_learning.utils import load_dictionary",
        """sae, config = load_dictionary(folder, device="cpu")
features = sae.encode(x)  # [n, {dict_size}]
reconstruction = sae.decode(features)  # [n, {act_size}]""",
    ),
    "published": (
        "the scripts published with the paper (run in their folder)",
        "import json\nfrom sae import {class_name}",
        """cfg = json.load(open(f"{{folder}}/config.json"))
sae = {class_name}(cfg | {{"dtype": torch.{dtype}}})
sae.load_state_dict(torch.load(f"{{folder}}/sae.pt", weights_only=True))
output = sae(x)
features, reconstruction = output["feature_acts"], output["sae_out"]  # [n, {dict_size}], [n, {act_size}]""",
    ),
    "safetensors": (
        "the program that exported it (run in its folder)",
        "from checkpoint import load_sae",
        """sae = load_sae(folder)
features = sae.encode(x)  # [n, {dict_size}]
reconstruction = sae.decode(features, like=x)  # [n, {act_size}]""",
    ),
}
CARD = """---
{metadata}
# license: choose one of the hub's license identifiers, such as mit or apache-2.0
---

# {kind} SAE with {dict_size} features, {hook_point} of {model_name}

A sparse autoencoder ([arXiv {paper}](https://arxiv.org/abs/{paper})) for the activations x [{act_size}] at
`{hook_point}` (a transformer_lens hook point) of `{hub_name}`. It maps x to sparse features f [{dict_size}] and a
reconstruction r [{act_size}]:

{equations}

{training}

## Usage

With {needs}:

```python
{imports}

{where}
x = torch.randn(4, {act_size}{x_dtype})  # replace with activations [n, {act_size}] of the language model

{loading}
```

## Held-out metrics

{metrics}

## Config

{config}
"""


def model_card(sae: BaseAutoencoder, to: str, run: Path | None = None, repo: str | None = None) -> str:
    """The card of an SAE in the format `to` (a key of export.EXPORTS). The metrics are from the run's folder `run`:
    from evaluation.json, else from result.json, which is older. With `repo`, the code loads the SAE from that hub
    repository.

    Raises InputError if one of these records is corrupt.
    """
    result, evaluation = (read_record(run / f"{name}.json") if run else {} for name in ("result", "evaluation"))
    cfg = sae.cfg | {key: plain(value) for key, value in sae.cfg.items() if isinstance(value, str)}
    num_tokens = result.get("tokens")  # an imported SAE has no result.json: its training is unknown
    in_batch = to == "published" and cfg["sae_type"] in BATCH_TOP_K_TYPES  # the scripts have no threshold
    model_name, dataset = hub_name(sae.cfg["model_name"]), sae.cfg["dataset_path"]
    metadata = ModelCardData(
        library_name=LIBRARIES.get(to, "batchtopk"),
        tags=["sparse-autoencoder", "interpretability", cfg["sae_type"]],
        base_model=model_name if may_be_on_hub(model_name) else None,
        datasets=[dataset] if num_tokens and may_be_on_hub(dataset) else None,
    )
    keys = {"sae_type", "act_size", "dict_size", "input_unit_norm", "dtype", "model_name", "hook_point"}
    training = "Its training is not recorded, and the config in this folder may differ from the one in training."
    if num_tokens:
        keys |= {key.name for key in KEYS.values() if key.in_name and cfg["sae_type"] in key.types}
        keys -= {"bad_documents", "site", "layer"}
        training = f"It was trained on {num_tokens:,} tokens of `{cfg['dataset_path']}`, in contexts of "
        training += f"{cfg['seq_len']} tokens"
        separator = "each preceded by BOS" if cfg.get("has_bos", True) else "without BOS, as the model has none"
        packing = f" (concatenated documents, {separator})."
        training += ", each starting with BOS." if cfg["bos_per_context"] else packing
        if cfg["exclude_tokens"] is not None:
            training += f" Tokens with the ids {cfg['exclude_tokens']} were excluded."
    if cfg["sae_type"] in BATCH_TOP_K_TYPES and not in_batch:
        training += f" In training, f kept the {cfg['top_k']}·B largest z > 0 of each batch of B tokens."
    if cfg["sae_type"] == "matryoshka":
        training += " The dictionary is nested: its first m features were trained to reconstruct x alone too, for m = "
        training += f"{', '.join(map(str, prefix_sizes(cfg)[:-1]))}."
    class_name = "BatchTopKSAE" if in_batch else type(sae).__name__  # the scripts have no Matryoshka
    needs, imports, loading = (text.format(**cfg, class_name=class_name) for text in LOADING[to])
    where = 'folder = "."  # the folder of this file; huggingface_hub.snapshot_download downloads it from the hub'
    if repo:
        imports += "\nfrom huggingface_hub import snapshot_download"
        where = f'folder = snapshot_download("{repo}")'
    return CARD.format(
        **{key: cfg[key] for key in ("dict_size", "act_size", "hook_point")},
        model_name=cfg["model_name"],
        hub_name=plain(model_name),
        metadata=metadata.to_yaml(),
        kind=KINDS[cfg["sae_type"]],
        paper=PAPERS.get(cfg["sae_type"], "2412.06410"),
        equations="\n".join(f"    {line}" for line in equations(sae, in_batch)),
        training=training,
        needs=needs,
        imports=f"import torch\n{imports}",
        where=where,
        x_dtype="" if cfg["dtype"] == "float32" else f", dtype=torch.{cfg['dtype']}",
        loading=loading,
        metrics=metrics_section(cfg, evaluation or result, "_batch" if in_batch else ""),
        config=markdown_table(("key", "value"), [(f"`{key}`", f"`{cfg[key]}`") for key in cfg if key in keys]),
    )


def equations(sae: BaseAutoencoder, in_batch: bool) -> list[str]:
    cfg, norm = sae.cfg, sae.cfg["input_unit_norm"]
    x = "x̂" if norm else "x"
    z = f"{x} W_enc" if cfg["sae_type"] == "jumprelu" else f"({x} − b_dec) W_enc"
    f = {
        "vanilla": "relu(z)",
        "topk": f"relu(z) where z is among the {cfg['top_k']} largest of the token, else 0",
        "batchtopk": "z where z > threshold, else 0",
        "matryoshka": "z where z > threshold, else 0",
        "jumprelu": "z where z > threshold, else 0, with one threshold > 0 per feature",
    }[cfg["sae_type"]]
    if in_batch:
        f = f"relu(z) where z is among the {cfg['top_k']}·B largest of a batch of B tokens, else 0"
    elif cfg["sae_type"] in BATCH_TOP_K_TYPES and sae.threshold_num_batches > 0:
        f = f.replace("threshold", f"{sae.threshold.item():.6g}")
    return [
        *(["x̂ = (x − mean(x)) / (std(x) + 1e-5), over the coordinates of x (input_unit_norm)"] if norm else []),
        f"z = {z}" if cfg["sae_type"] in TOP_K_TYPES else f"z = {z} + b_enc",
        f"f = {f}",
        "r = (f W_dec + b_dec) · std(x) + mean(x)" if norm else "r = f W_dec + b_dec",
    ]


def metrics_section(cfg: dict, metrics: dict, suffix: str) -> str:
    known = {key: text for key, text in METRIC_DEFINITIONS.items() if key + suffix in metrics}
    rows = [(f"`{key}`", with_error(metrics, key + suffix), text) for key, text in known.items()]
    if not rows:
        return "No metrics are recorded."
    num_tokens = metrics.get("eval_tokens", -(-cfg["eval_tokens"] // cfg["seq_len"]) * cfg["seq_len"])
    skip = cfg["eval_skip_positions"]
    skipped = f", from position {skip} of each context on" if skip else ""
    skipped += ", without the excluded tokens" if cfg["exclude_tokens"] is not None else ""
    return (
        f"On the first {num_tokens:,} tokens of `{cfg['dataset_path']}`, which were held out from training{skipped}; "
        f"± one standard error over documents.\n\n{markdown_table(('metric', 'value', 'meaning'), rows)}"
    )


def plain(text: str) -> str:
    """Text of a config, which may be untrusted, without HTML, Markdown and control characters."""
    return "".join(char if char.isprintable() and char not in "<>`|[]" else "\ufffd" for char in text)


def markdown_table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def may_be_on_hub(name: str) -> bool:
    """Whether `name` is a valid hub name and not a local path. The hub is not queried."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists() and not file_kind(Path(name))
