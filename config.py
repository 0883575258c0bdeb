"""Config dicts: the keys and their defaults (those of arXiv 2412.06410), and their completion and validation.

A config is a plain dict. Take `get_default_cfg()`, edit it, and pass it through `post_init_cfg`, which checks every key
and derives `hook_point` and `name`. `python config.py` prints the keys as a Markdown table.
"""

import difflib
import hashlib
import json
import math
import re
from dataclasses import KW_ONLY, dataclass
from functools import partial

from console import CONTROL, InputError

SAE_TYPES = {  # with their names in tables and figures
    "vanilla": "Vanilla (L1)", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
}  # fmt: skip
BATCH_TOP_K_TYPES = ("batchtopk", "matryoshka")
TOP_K_TYPES = ("topk", *BATCH_TOP_K_TYPES)
DTYPES = ("float32", "bfloat16", "float16")
SITES = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")


@dataclass(frozen=True)
class Key:
    """A config key: its default, one line on its meaning, the values that it allows, and what it affects."""

    name: str
    default: bool | int | float | str | None
    doc: str
    _: KW_ONLY
    optional: type | None = None  # if None is allowed: the type of the other values
    choices: tuple[str, ...] = ()
    at_least: int | None = None
    above: int | None = None
    below: int | None = None
    types: tuple[str, ...] = tuple(SAE_TYPES)  # the SAE types that use it
    in_name: bool = True  # it changes the weights or the final figures, so the run's name depends on it
    in_point: bool = True  # a point of a plot is the mean over runs with the same value of it
    in_group: bool = True  # runs trained as one group have the same value: the same batches, the same evaluations
    in_cache: bool = False  # it identifies a cache of activations
    added_later: bool = False  # at its default it is left out of names and caches, so that older ones stay valid
    portable: bool = True  # it means something on other machines


PerSAE = partial(Key, in_group=False)  # each SAE of a group may have its own
Neutral = partial(Key, in_name=False, in_point=False)  # changes no result (another device only rounds differently)

# fmt: off
TABLE = (  # the keys under the titles of their sections
    "The SAE",
    PerSAE("sae_type", "batchtopk", '"vanilla", "topk", "batchtopk", "jumprelu" or "matryoshka"',
        choices=tuple(SAE_TYPES)),
    PerSAE("dict_size", 12288, "F, number of features", at_least=1),
    PerSAE("top_k", 32, "k: active features per token (topk), or on average over the batch (batchtopk, matryoshka)",
        at_least=1, types=TOP_K_TYPES),
    PerSAE("top_k_aux", 512, "dead features per token that the aux loss revives (topk, batchtopk, matryoshka)",
        at_least=1, types=TOP_K_TYPES),
    PerSAE("aux_penalty", 1 / 32, "coefficient of the aux loss (topk, batchtopk, matryoshka)",
        at_least=0, types=TOP_K_TYPES),
    PerSAE("matryoshka_sizes", None, "sizes of the nested prefixes of the dictionary, as [64, 256, 1024], increasing "
        "to dict_size (matryoshka); None: 1/32, 3/32, 7/32, 15/32 and all of it",
        optional=list, types=("matryoshka",), added_later=True),
    PerSAE("l1_coeff", 0.0, "coefficient of the L1 penalty; of the L0 penalty for jumprelu", at_least=0),
    PerSAE("bandwidth", 0.001, "width of the kernel that estimates the gradient of the thresholds (jumprelu)",
        above=0, types=("jumprelu",)),
    PerSAE("n_batches_to_dead", 5, "a feature inactive for this many batches is dead", at_least=1),
    Neutral("feature_shards", 1, "ranks of torchrun that share an SAE, each with a slice of its features", at_least=1,
        added_later=True, portable=False),
    PerSAE("input_unit_norm", True, "normalise each activation vector to mean 0, standard deviation 1"),
    PerSAE("dtype", "float32", "of the SAE's weights: \"float32\" or \"float64\"", choices=("float32", "float64")),
    "Its training",
    PerSAE("seed", 49, "draws the initial weights", at_least=0, in_point=False),
    PerSAE("b_dec_init", "zero", 'initial b_dec: "zero", or "mean": the mean normalised activation of the first buffer',
        choices=("zero", "mean"), added_later=True),
    Key("batch_size", 4096, "tokens per training step", at_least=1),
    Key("num_tokens", 1_000_000_000, "tokens to train on, rounded up to whole batches", at_least=1),
    PerSAE("lr", 3e-4, "Adam's learning rate", above=0),
    PerSAE("lr_warmup_steps", 0, "linear warm-up steps: the rate rises from 0 to lr", at_least=0),
    PerSAE("lr_decay_steps", 0, "linear decay steps at the end: the rate falls to 0", at_least=0),
    PerSAE("beta1", 0.9, "Adam's decay of the mean gradient", at_least=0, below=1),
    PerSAE("beta2", 0.99, "Adam's decay of the mean squared gradient", at_least=0, below=1),
    PerSAE("max_grad_norm", 100_000.0, "the norm of the whole gradient is clipped to this", above=0),
    "The language model and where it is read",
    Key("model_name", "gpt2-small", "hub name, short name of transformer_lens, or local Hugging Face directory",
        in_cache=True),
    Key("site", "resid_pre", "resid_pre, resid_mid, resid_post, mlp_out, attn_out, or a full hook name"),
    Key("layer", 8, "block whose site is read (a full hook name overrides it)", at_least=0),
    Key("act_size", 768, "d, width of the activations; None: read it from the model",
        optional=int, at_least=2, in_name=False),
    Key("model_dtype", "float32", 'the model is run in "float32" (on CUDA with TF32 products), "bfloat16" or "float16"',
        choices=DTYPES, in_cache=True),
    Neutral("device", "best present", '"cuda" or "cpu"; the default is cuda if it is there'),
    "The stream of activations",
    Key("dataset_path", "Skylion007/openwebtext", "hub name, or a local file, folder or saved dataset", in_cache=True),
    Key("dataset_config", None, 'configuration of a hub dataset, e.g. "en"', optional=str, in_cache=True),
    Key("dataset_split", "train", "split of the dataset", in_cache=True),
    Key("dataset_revision", None, "branch, tag or commit of a hub dataset", optional=str, in_cache=True),
    Key("dataset_column", None, "column that holds text, tokens or chats; None: tokens, input_ids or text",
        optional=str, in_cache=True, added_later=True),
    Key("num_epochs", 1, "times that the dataset is read, at most", at_least=1),
    Key("bad_documents", "stop", 'corrupt or unusable data: "stop", or "skip" and report it',
        choices=("stop", "skip"), in_cache=True),
    Neutral("stream_retries", 8, "retries after a network failure, after 1, 2, 4, ... 60 s", at_least=0),
    Key("bos_per_context", False, "begin every context with BOS, not only every document", in_cache=True),
    Key("seq_len", 128, "tokens per context; cut to what the model can take", at_least=2, in_cache=True),
    Key("model_batch_size", 512, "contexts per forward of the language model", at_least=1, in_cache=True),
    Key("num_batches_in_buffer", 10, "forwards of the language model whose activations are shuffled together",
        at_least=1),
    Key("activation_dtype", "float32", 'activations are stored in the buffer as "float32", "bfloat16" or "float16"',
        choices=DTYPES, in_cache=True),
    Neutral("activation_cache", None, "folder that stores activations for later runs", optional=str, portable=False),
    Key("shuffle_seed", 49, "seed of the shuffle; only runs with the same seed share a stream", at_least=0),
    Key("exclude_tokens", None, 'tokens left out of training and evaluation: "bos", "special", or a list of ids',
        optional=list, in_cache=True, added_later=True),
    "Evaluation: the first documents of the dataset are held out and never trained on",
    Key("eval_tokens", 65_536, "held-out tokens, rounded up to whole contexts", at_least=1, in_cache=True),
    Key("eval_skip_positions", 1, "first positions of each context that evaluation ignores (attention sink)",
        at_least=0),
    "Records",
    Neutral("log_freq", 50, "steps between lines of training metrics", at_least=1),
    Neutral("perf_log_freq", 1000, "steps between evaluations on the first batch_size held-out tokens", at_least=1),
    Neutral("checkpoint_freq", 10_000, "steps between checkpoints; also every 15 minutes", at_least=1),
    Neutral("keep_checkpoints", 2, "number of checkpoints to keep", at_least=1),
    Neutral("save_errors", "stop", 'if a checkpoint or log line cannot be written: "stop", or "go_on" without it',
        choices=("stop", "go_on")),
    Neutral("output_dir", "runs", "folder for records, in output_dir/sweep/name", in_group=False, portable=False),
    Neutral("sweep", "single", "name of the sweep; main.py sets it", in_group=False),
    Neutral("wandb_project", "sparse_autoencoders", "Weights & Biases project", in_group=False),
    Neutral("wandb_mode", None, '"online", "offline" or "disabled"; None: online if logged in, or WANDB_MODE',
        optional=str, choices=("online", "offline", "disabled"), in_group=False),
)
# fmt: on
KEYS = {key.name: key for key in TABLE if isinstance(key, Key)}

# What a config also holds: post_init_cfg derives hook_point and name. language_model.complete_cfg adds `asked`, the
# requested values of keys that the model changes (the run's name follows from these), and has_bos = False. A run's
# config.json has _provenance (logs.py).
DERIVED = ("hook_point", "name", "asked", "has_bos", "_provenance")
SET_BY_MODEL = {"seq_len", "bos_per_context", "exclude_tokens"}  # the keys that may be in `asked`
MIN_L0 = 0.1  # a mean L0 below this means that the features died


def get_default_cfg() -> dict:
    """The paper's BatchTopK run on GPT-2 small, layer 8, as a config dict to edit."""
    return {key.name: key.default for key in KEYS.values()} | {"device": best_device()}


def values_of(cfg: dict, role: str) -> dict:
    """The values in `cfg` of the keys with a role: "in_name", "in_group" or "in_cache"."""
    keys = [key for key in KEYS.values() if getattr(key, role)]
    return {key.name: cfg[key.name] for key in keys if not (key.added_later and cfg[key.name] == key.default)}


def post_init_cfg(cfg: dict) -> dict:
    """Check a config and return a completed copy: missing keys get their default, `hook_point` and `name` are derived.

    Pure and idempotent. Two configs that differ in a key that changes the result get different names. What
    language_model.complete_cfg recorded is kept, `asked` only while the name follows from it.
    Raises InputError for an unknown key, a wrong type or an impossible value.
    """
    for key in cfg:
        if key not in KEYS and key not in DERIVED:
            nearest = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(KEYS)}"
            raise InputError(f"unknown config key {key!r}; {hint}")
    asked, name, has_bos = cfg.get("asked"), cfg.get("name"), cfg.get("has_bos", True)
    cfg = {key: check_value(KEYS[key], cfg.get(key, default)) for key, default in get_default_cfg().items()}

    if cfg["top_k"] > cfg["dict_size"] and cfg["sae_type"] in TOP_K_TYPES:
        raise InputError(f"top_k = {cfg['top_k']} is impossible: at most dict_size = {cfg['dict_size']}")
    if cfg["sae_type"] == "matryoshka" and (sizes := prefix_sizes(cfg))[-1] != cfg["dict_size"]:
        raise InputError(
            f"matryoshka_sizes = {sizes} is not allowed: it must end at dict_size = {cfg['dict_size']}, the whole "
            f"dictionary"
        )
    if cfg["dict_size"] % cfg["feature_shards"]:
        raise InputError(
            f"feature_shards = {cfg['feature_shards']} is not allowed: it must divide dict_size = {cfg['dict_size']}"
        )
    if cfg["eval_skip_positions"] > cfg["seq_len"] - 2:
        raise InputError(
            f"eval_skip_positions = {cfg['eval_skip_positions']} leaves nothing to evaluate in contexts of seq_len = "
            f"{cfg['seq_len']} tokens: at most {cfg['seq_len'] - 2}"
        )
    if cfg["lr_warmup_steps"] + cfg["lr_decay_steps"] > num_steps(cfg):
        raise InputError(
            f"lr_warmup_steps = {cfg['lr_warmup_steps']} and lr_decay_steps = {cfg['lr_decay_steps']} are impossible: "
            f"num_tokens and batch_size make {num_steps(cfg)} steps, and together they may be as many"
        )

    if "." in cfg["site"]:
        cfg["hook_point"] = cfg["site"]
        if block := re.search(r"blocks\.(\d+)\.", cfg["site"]):
            cfg["layer"] = int(block[1])
    else:
        cfg["hook_point"] = f"blocks.{cfg['layer']}.hook_{cfg['site']}"
    cfg["name"] = run_name(cfg)
    if asked and isinstance(asked, dict) and asked.keys() <= SET_BY_MODEL and run_name(cfg | asked) == name:
        cfg |= {"asked": asked, "name": name}
    return cfg if has_bos else cfg | {"has_bos": False}


def check_value(key: Key, value):
    """The value in the type of its key, or InputError naming the key, the value and what is allowed."""
    if value is None and key.optional:
        return None
    if key.name == "exclude_tokens":
        return check_exclude_tokens(value)
    if key.name == "matryoshka_sizes":
        return check_matryoshka_sizes(value)
    kind = key.optional or type(key.default)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # num_tokens = 1e9
    if type(value) is int and abs(value) >= 2**63:
        raise InputError(f"{key.name} is too large: it must be below 2**63")
    if kind is float and type(value) in (int, float):
        value = float(value) + 0.0  # -0.0 becomes 0.0, which has the same name
    if type(value) is not kind:
        found = type(value).__name__
        raise InputError(f"{key.name} = {value!r} is of type {found}; it must be of type {kind.__name__}")

    allowed = None
    if key.choices and value not in key.choices:
        allowed = "one of " + ", ".join(key.choices)
    elif kind is float and not math.isfinite(value):
        allowed = "a finite number"
    elif key.at_least is not None and value < key.at_least:
        allowed = f"at least {key.at_least}"
    elif key.below is not None and value >= key.below:
        allowed = f"below {key.below}"
    elif key.above is not None and value <= key.above:
        allowed = f"above {key.above}"
    elif key.name == "site" and "." not in value and value not in SITES:
        allowed = f"one of {', '.join(SITES)}, or a full hook name with a dot, such as blocks.8.hook_resid_pre"
    elif kind is str and not value.strip():
        allowed = "a non-empty string"
    elif kind is str and CONTROL.search(value):
        allowed = "text without control characters"
    elif key.name == "sweep" and (value in (".", "..") or "/" in value or "\\" in value):
        allowed = "a plain folder name"
    elif key.name == "device":
        allowed = device_problem(value)
    if allowed:
        nearest = difflib.get_close_matches(value, key.choices, n=1, cutoff=0.82) if kind is str else []
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise InputError(f"{key.name} = {value!r} is not allowed: it must be {allowed}{hint}")
    return value


def check_exclude_tokens(value) -> str | list[int]:
    """The words "bos" and "special" as they are; token ids, or a single one, as a sorted list."""
    if value in ("bos", "special"):
        return value
    ids = list(value) if isinstance(value, list | tuple) else [value]
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise InputError(
            f"exclude_tokens = {value!r} is not allowed: it must be None, 'bos', 'special' or a list of token ids"
        )
    return sorted(set(ids))


def check_matryoshka_sizes(value) -> list[int]:
    sizes = list(value) if isinstance(value, list | tuple) else []
    # They equal sorted({0, …})[1:] only if they are positive and increasing.
    if not sizes or any(type(size) is not int for size in sizes) or sizes != sorted({0, *sizes})[1:]:
        raise InputError(
            f"matryoshka_sizes = {value!r} is not allowed: it must be None or a list of increasing numbers of "
            f"features, such as [64, 256, 1024]"
        )
    return sizes


def prefix_sizes(cfg: dict) -> list[int]:
    """matryoshka_sizes or its default, the fractions of arXiv 2503.17547, rounded up. Equal ones are merged."""
    fractions_of_32 = (1, 3, 7, 15, 32)
    return cfg["matryoshka_sizes"] or sorted({-(-cfg["dict_size"] * n // 32) for n in fractions_of_32})


def num_steps(cfg: dict) -> int:
    """Training steps: num_tokens in whole batches."""
    return -(-cfg["num_tokens"] // cfg["batch_size"])


def run_name(cfg: dict) -> str:
    """Readable parts, then a hash over every key that changes the result."""
    sparsity = f"k{cfg['top_k']}" if cfg["sae_type"] in TOP_K_TYPES else f"l1_{cfg['l1_coeff']:g}"
    digest = hashlib.sha256(json.dumps(values_of(cfg, "in_name"), sort_keys=True).encode()).hexdigest()[:8]
    return f"{cfg['sae_type']}_{cfg['dict_size']}_{sparsity}_seed{cfg['seed']}_{digest}"


def best_device() -> str:
    import torch  # not at the top: results.py does without it

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_problem(device: str) -> str | None:
    """What `device` should have been, or None if torch can use it here."""
    import torch

    try:
        torch.ones(1, device=device, dtype=torch.float64).item()  # metrics are in float64, which Apple's mps lacks
    except Exception:  # torch raises whatever its backend does (RuntimeError, AssertionError, NotImplementedError)
        return f"a device that torch can use on this machine (with float64), such as {best_device()!r}"
    return None


def keys_table() -> str:
    """The keys as a Markdown table, a row each, with their defaults."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for row in TABLE:
        if isinstance(row, str):
            lines.append(f"| **{row}** | | |")
        else:
            default = f"{row.default:_}" if type(row.default) is int else row.default
            lines.append(f"| `{row.name}` | {default} | {row.doc} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(keys_table())
