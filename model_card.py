"""The model card of an exported SAE: README.md, with metadata that the Hugging Face hub reads.

It says what the SAE computes, how to load it from that format, its held-out metrics, and what it was trained with; of
an SAE without a run's records, that there are none.
"""

from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from config import KEYS
from dataset import file_kind
from evaluation import read_record, with_error
from language_model import hub_name
from sae import BaseAutoencoder

KINDS = {"vanilla": "Vanilla (L1)", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
METRICS = {  # evaluation.py's, in its definitions
    "nmse": "mean over tokens of ‖x − r‖² / ‖x − mean(x)‖², the mean over the token's own coordinates",
    "fvu": "fraction of variance unexplained; that explained is 1 − fvu",
    "cosine_similarity": "mean over tokens of the cosine between x and r",
    "l0": "mean number of active features per token",
    "dead_fraction": "share of features active on none of the tokens",
    "dense_fraction": "share of features active on more than 10 % of the tokens",
    "ce_original": "cross-entropy of the language model as it is, nats per token",
    "ce_degradation": "cross-entropy with r in place of x, minus without; larger is worse",
    "kl_divergence": "mean over tokens of KL(p ‖ q), the prediction q being that with r in place of x, nats",
    "recovery_from_zero": "share of the loss of zero ablation that the SAE wins back",
    "recovery_from_mean": "share of the loss of mean ablation that the SAE wins back",
}
LIBRARIES = {"saelens": "saelens", "dictionary_learning": "dictionary_learning"}  # to the hub; else our own
LOADING = {  # with what, its imports, and what follows
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
        "the scripts published with the paper, in their folder",
        "import json\nfrom sae import {class_name}",
        """cfg = json.load(open(f"{{folder}}/config.json"))
sae = {class_name}(cfg | {{"dtype": torch.{dtype}}})
sae.load_state_dict(torch.load(f"{{folder}}/sae.pt", weights_only=True))
output = sae(x)
features, reconstruction = output["feature_acts"], output["sae_out"]  # [n, {dict_size}], [n, {act_size}]""",
    ),
    "safetensors": (
        "the code that wrote this, in its folder",
        "from checkpoint import load_sae",
        """sae = load_sae(folder)
features = sae.encode(x)  # [n, {dict_size}]
reconstruction = sae.decode(features, like=x)  # [n, {act_size}]""",
    ),
}
CARD = """---
{metadata}
# license: yours to choose; the hub knows a list of names, such as mit or apache-2.0
---

# {kind} SAE of {dict_size} features, {hook_point} of {model_name}

A sparse autoencoder ([arXiv 2412.06410](https://arxiv.org/abs/2412.06410)) of the activations x of width {act_size} at
the hook point `{hook_point}` (as transformer_lens names it) of `{hub_name}`. Its features f, {dict_size} of them and
few of them not 0 at a time, and its reconstruction r of x:

{equations}

{training}

## Load it

With {needs}:

```python
{imports}

{where}
x = torch.randn(4, {act_size}{x_dtype})  # put activations [n, {act_size}] of the language model here

{loading}
```

## Held-out metrics

{metrics}

## Config

{config}
"""


def model_card(sae: BaseAutoencoder, to: str, run: Path | None = None, repo: str | None = None) -> str:
    """The card of an SAE in the format `to`, a key of export.EXPORTS. The metrics are those of its run's folder, `run`:
    of evaluation.json, which can only be newer, else of result.json. It is loaded from `repo`, if it is to go there.

    Raises InputError if one of these records is damaged.
    """
    result, evaluation = (read_record(run / f"{name}.json") if run else {} for name in ("result", "evaluation"))
    cfg = sae.cfg | {key: plain(value) for key, value in sae.cfg.items() if isinstance(value, str)}
    num_tokens = result.get("tokens")  # an imported SAE has no result: how it was trained is not known
    in_batch = to == "published" and cfg["sae_type"] == "batchtopk"  # the scripts know no threshold
    model_name, dataset = hub_name(sae.cfg["model_name"]), sae.cfg["dataset_path"]
    metadata = ModelCardData(
        library_name=LIBRARIES.get(to, "batchtopk"),
        tags=["sparse-autoencoder", "interpretability", cfg["sae_type"]],
        base_model=model_name if may_be_on_hub(model_name) else None,
        datasets=[dataset] if num_tokens and may_be_on_hub(dataset) else None,
    )
    keys = {"sae_type", "act_size", "dict_size", "input_unit_norm", "dtype", "model_name", "hook_point"}
    training = "How it was trained is not recorded here, and the config in this folder may not be what it was."
    if num_tokens:
        keys |= {key.name for key in KEYS.values() if key.in_name and cfg["sae_type"] in key.types}
        keys -= {"bad_documents", "site", "layer"}
        training = f"It was trained on {num_tokens:,} tokens of `{cfg['dataset_path']}`, in contexts of "
        training += f"{cfg['seq_len']} tokens"
        separator = "BOS before each" if cfg.get("has_bos", True) else "without BOS, which the model does not have"
        training += ", each beginning with BOS." if cfg["bos_per_context"] else f" (documents joined, {separator})."
        if cfg["exclude_tokens"] is not None:
            training += f" Tokens with the ids {cfg['exclude_tokens']} were left out."
    if cfg["sae_type"] == "batchtopk" and not in_batch:
        training += f" In training, f kept the {cfg['top_k']}·B largest z > 0 of each batch of B tokens."
    needs, imports, loading = (text.format(**cfg, class_name=type(sae).__name__) for text in LOADING[to])
    where = 'folder = "."  # where this file is; huggingface_hub.snapshot_download gets a repository of the hub'
    if repo:
        imports += "\nfrom huggingface_hub import snapshot_download"
        where = f'folder = snapshot_download("{repo}")'
    return CARD.format(
        **{key: cfg[key] for key in ("dict_size", "act_size", "hook_point")},
        model_name=cfg["model_name"],
        hub_name=plain(model_name),
        metadata=metadata.to_yaml(),
        kind=KINDS[cfg["sae_type"]],
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
    top_k = cfg["sae_type"] in ("topk", "batchtopk")
    z = f"{x} W_enc" if cfg["sae_type"] == "jumprelu" else f"({x} − b_dec) W_enc"
    f = {
        "vanilla": "relu(z)",
        "topk": f"relu(z) where z is among the {cfg['top_k']} largest of its token, else 0",
        "batchtopk": "z where z > threshold, else 0",
        "jumprelu": "z where z > threshold, else 0, with a threshold above 0 for each feature",
    }[cfg["sae_type"]]
    if in_batch:
        f = f"relu(z) where z is among the {cfg['top_k']}·B largest of a batch of B tokens, else 0"
    elif cfg["sae_type"] == "batchtopk" and sae.threshold_num_batches > 0:
        f = f.replace("threshold", f"{sae.threshold.item():.6g}")
    return [
        *(["x̂ = (x − mean(x)) / (std(x) + 1e-5), of each vector x its own (input_unit_norm)"] if norm else []),
        f"z = {z}" if top_k else f"z = {z} + b_enc",
        f"f = {f}",
        "r = (f W_dec + b_dec) · std(x) + mean(x)" if norm else "r = f W_dec + b_dec",
    ]


def metrics_section(cfg: dict, metrics: dict, suffix: str) -> str:
    rows = [(f"`{key}`", with_error(metrics, key + suffix), METRICS[key]) for key in METRICS if key + suffix in metrics]
    if not rows:
        return "It has not been evaluated: there are no numbers."
    num_tokens = metrics.get("eval_tokens", -(-cfg["eval_tokens"] // cfg["seq_len"]) * cfg["seq_len"])
    skip = cfg["eval_skip_positions"]
    skipped = f", at their positions from {skip} on" if skip else ""
    skipped += " but for the tokens left out in training" if cfg["exclude_tokens"] is not None else ""
    return (
        f"On the contexts of the first {num_tokens:,} tokens of `{cfg['dataset_path']}`, on which it was not trained"
        f"{skipped}; "
        f"± one standard error over contexts.\n\n{markdown_table(('metric', 'value', 'meaning'), rows)}"
    )


def plain(text: str) -> str:
    """A text of a config, which may come from elsewhere, without HTML, Markdown or control characters of its own."""
    return "".join(char if char.isprintable() and char not in "<>`|[]" else "\ufffd" for char in text)


def markdown_table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def may_be_on_hub(name: str) -> bool:
    """Whether it is a hub name as far as can be told without asking: a possible one, and nothing local."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists() and not file_kind(Path(name))
