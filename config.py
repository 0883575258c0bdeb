"""Config dicts: the defaults (those of arXiv 2412.06410), and their completion and validation.

A config is a plain dict. Take `get_default_cfg()`, edit it, pass it through `post_init_cfg`, which checks
every key and derives `hook_point` and `name`.
"""

import difflib
import hashlib
import json
import math
import re
import sys
import warnings

import torch
from tqdm import tqdm

from common import RECORDED, quiet_on_closed_pipe
from sae import SAE_CLASSES

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # control characters


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, the value, what is allowed."""

    exit_code = 2


def tell(line: str) -> None:
    """A line (or a table) for the user, above any progress bar."""
    tqdm.write(printable(line), file=sys.stderr)


def printable(text: str) -> str:
    """Control characters but for the ends of lines escaped: a message may hold a file's text, such as a name."""
    return CONTROL.sub(lambda match: match[0] if match[0] == "\n" else repr(match[0])[1:-1], text)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a device's, or the machine's, where torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def run_command(main, interrupted: str = "Stopped") -> None:
    """main(arguments of the command line). An error with an exit_code, which is one line, ends the program with both;
    Ctrl-C with the line `interrupted` and code 4; memory that runs out with a line and code 3. See
    common.quiet_on_closed_pipe for a closed pipe.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        with quiet_on_closed_pipe():
            main(sys.argv[1:])
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(4)
    except Exception as error:
        if out_of_memory(error):
            print(f"error: out of memory: {one_line(error)}", file=sys.stderr)
            sys.exit(3)
        if not hasattr(error, "exit_code"):
            raise
        print(f"error: {printable(str(error))}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(error.exit_code)


def one_line(error: Exception) -> str:
    """The first line of an error of another library, cut to a readable length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else line[:200] + " …"


def get_default_cfg() -> dict:
    """The paper's BatchTopK run on GPT-2 small, layer 8, as a config dict to edit."""
    return {
        # The SAE
        "sae_type": "batchtopk",  # "vanilla", "topk", "batchtopk" or "jumprelu"
        "dict_size": 12288,  # F, number of features
        "top_k": 32,  # k: active features per token (topk), or on average over the batch (batchtopk)
        "top_k_aux": 512,  # dead features per token that the aux loss revives (topk, batchtopk)
        "aux_penalty": 1 / 32,  # coefficient of the aux loss (topk, batchtopk)
        "l1_coeff": 0.0,  # coefficient of the L1 penalty; of the L0 penalty for jumprelu
        "bandwidth": 0.001,  # width of the kernel that estimates the gradient of the thresholds (jumprelu)
        "n_batches_to_dead": 5,  # a feature inactive for this many batches is dead
        "input_unit_norm": True,  # normalise each activation vector to mean 0, standard deviation 1
        "dtype": "float32",  # of the SAE's weights: "float32" or "float64"
        # Its training
        "seed": 49,  # draws the initial weights
        "batch_size": 4096,  # tokens per training step
        "num_tokens": 1_000_000_000,  # tokens to train on, rounded up to whole batches
        "lr": 3e-4,  # Adam's learning rate
        "lr_warmup_steps": 0,  # over the first so many steps the rate rises from 0 to lr, in a straight line
        "lr_decay_steps": 0,  # over the last so many steps it falls to 0, in a straight line
        "beta1": 0.9,  # Adam's decay of the mean gradient
        "beta2": 0.99,  # Adam's decay of the mean squared gradient
        "max_grad_norm": 100_000.0,  # the norm of the whole gradient is clipped to this
        # The language model and where it is read
        "model_name": "gpt2-small",  # hub name, short name of transformer_lens, or local Hugging Face directory
        "site": "resid_pre",  # resid_pre, resid_mid, resid_post, mlp_out, attn_out, or a full hook name
        "layer": 8,  # block whose site is read (a full hook name overrides it)
        "act_size": 768,  # d, width of the activations; None: read it from the model
        "model_dtype": "float32",  # the model is run in "float32" (on CUDA with TF32 products), "bfloat16" or "float16"
        "device": best_device(),  # "cuda" or "cpu"; the default is cuda if it is there
        # The stream of activations
        "dataset_path": "Skylion007/openwebtext",  # hub name, or a local file, folder or saved dataset
        "dataset_config": None,  # configuration of a hub dataset, e.g. "en"
        "dataset_split": "train",  # split of the dataset
        "dataset_revision": None,  # branch, tag or commit of a hub dataset
        "dataset_column": None,  # column that holds text, tokens or chats; None: tokens, input_ids or text
        "num_epochs": 1,  # times that the dataset may be gone through
        "bad_documents": "stop",  # data that cannot be read or used: "stop", or "skip" it with a line that names it
        "stream_retries": 8,  # tries to open a hub dataset again where the network fails, after 1, 2, 4, ... 60 s
        "bos_per_context": False,  # begin every context with BOS, not only every document
        "seq_len": 128,  # tokens per context; cut to what the model can take
        "model_batch_size": 512,  # contexts per forward of the language model
        "num_batches_in_buffer": 10,  # forwards whose activations are shuffled together
        "activation_dtype": "float32",  # they wait in the buffer as "float32", "bfloat16" or "float16"
        "activation_cache": None,  # folder that keeps the activations, so that later runs need not harvest them
        "shuffle_seed": 49,  # of that shuffle; runs share a stream only if they agree on it
        "exclude_tokens": None,  # tokens left out of training and evaluation: "bos", "special", or a list of ids
        # Evaluation: the first documents of the dataset are held out and never trained on
        "eval_tokens": 65_536,  # held-out tokens, rounded up to whole contexts
        "eval_skip_positions": 1,  # first positions of a context that evaluation leaves alone (attention sink)
        # Records
        "log_freq": 50,  # steps between lines of training metrics
        "perf_log_freq": 1000,  # steps between evaluations on the first batch_size held-out tokens
        "checkpoint_freq": 10_000,  # steps between checkpoints (every 15 minutes there is one anyway)
        "keep_checkpoints": 2,  # the newest checkpoints that are kept
        "save_errors": "stop",  # where a checkpoint or record cannot be written: "stop", or "go_on" without
        "output_dir": "runs",  # where records go: output_dir/sweep/name
        "sweep": "single",  # folder of the runs that belong together; main.py sets it
        "wandb_project": "sparse_autoencoders",  # Weights & Biases project
        "wandb_mode": None,  # "online", "offline" or "disabled"; None: online if logged in, or WANDB_MODE
    }


# Keys that do not change the trained weights or the final figures, so they are no part of a run's name.
# (Another device rounds differently; the run is still the same run. act_size follows from model and hook point.)
NOT_IN_NAME = {
    "act_size", "device", "log_freq", "perf_log_freq", "checkpoint_freq", "keep_checkpoints", "save_errors",
    "output_dir", "sweep", "wandb_project", "wandb_mode", "name", "hook_point", "stream_retries", "activation_cache",
}  # fmt: skip

# Keys that came after runs had been named: part of a name only where they differ from their default.
ADDED_LATER = {"dataset_column", "exclude_tokens"}

# Runs that agree on these keys are trained in one group: they see the same batches and report at the same steps.
GROUP_KEYS = (
    "model_name", "site", "layer", "act_size", "model_dtype", "device", "dataset_path", "dataset_config",
    "dataset_split", "dataset_revision", "dataset_column", "num_epochs", "bad_documents", "stream_retries",
    "bos_per_context", "seq_len", "model_batch_size", "num_batches_in_buffer", "activation_dtype", "activation_cache",
    "shuffle_seed", "exclude_tokens", "batch_size", "num_tokens", "eval_tokens", "eval_skip_positions", "perf_log_freq",
    "checkpoint_freq", "keep_checkpoints", "save_errors", "log_freq",
)  # fmt: skip

DERIVED = ("hook_point", "name")  # written by post_init_cfg, always anew
SET_BY_MODEL = ("seq_len", "bos_per_context", "exclude_tokens")  # the keys that `asked` may hold
NONE_ALLOWED = {
    "act_size": int,
    "dataset_config": str,
    "dataset_revision": str,
    "dataset_column": str,
    "activation_cache": str,
    "wandb_mode": str,
    "exclude_tokens": list,
}
DTYPES = ("float32", "bfloat16", "float16")
SITES = ("resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out")
CHOICES = {
    "sae_type": tuple(SAE_CLASSES),
    "dtype": ("float32", "float64"),
    "model_dtype": DTYPES,
    "activation_dtype": DTYPES,
    "bad_documents": ("stop", "skip"),
    "save_errors": ("stop", "go_on"),
    "wandb_mode": ("online", "offline", "disabled"),
}
AT_LEAST = {
    "dict_size": 1, "top_k": 1, "top_k_aux": 1, "aux_penalty": 0, "l1_coeff": 0, "n_batches_to_dead": 1, "seed": 0,
    "batch_size": 1, "num_tokens": 1, "beta1": 0, "beta2": 0, "layer": 0, "act_size": 2, "seq_len": 2,
    "model_batch_size": 1, "num_batches_in_buffer": 1, "num_epochs": 1, "stream_retries": 0, "shuffle_seed": 0,
    "eval_tokens": 1, "eval_skip_positions": 0, "log_freq": 1, "perf_log_freq": 1, "checkpoint_freq": 1,
    "keep_checkpoints": 1, "lr_warmup_steps": 0, "lr_decay_steps": 0,
}  # fmt: skip
BELOW = {"beta1": 1, "beta2": 1, "seed": 2**63, "shuffle_seed": 2**63}
POSITIVE = ("lr", "bandwidth", "max_grad_norm")


def post_init_cfg(cfg: dict) -> dict:
    """Check a config and return a completed copy: missing keys get their default, `hook_point` and `name` are derived.

    Pure and idempotent. Two configs that differ in a key that changes the result get different names. What
    language_model.complete_cfg recorded is kept, `asked` only while the name follows from it.
    Raises InputError for an unknown key, a wrong type or an impossible value.
    """
    defaults = get_default_cfg()
    for key in cfg:
        if key not in defaults and key not in (*DERIVED, *RECORDED):
            nearest = difflib.get_close_matches(str(key), defaults, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(defaults)}"
            raise InputError(f"unknown config key {key!r}; {hint}")
    asked, name, has_bos = cfg.get("asked"), cfg.get("name"), cfg.get("has_bos", True)
    cfg = {key: check_value(key, cfg.get(key, default), default) for key, default in defaults.items()}

    if cfg["top_k"] > cfg["dict_size"] and cfg["sae_type"] in ("topk", "batchtopk"):
        raise InputError(f"top_k = {cfg['top_k']} is impossible: at most dict_size = {cfg['dict_size']}")
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
    if cfg["l1_coeff"] == 0 and cfg["sae_type"] in ("vanilla", "jumprelu"):
        warnings.warn(f"l1_coeff is 0: nothing makes this {cfg['sae_type']} SAE sparse", stacklevel=2)

    if "." in cfg["site"]:
        cfg["hook_point"] = cfg["site"]
        block = re.search(r"blocks\.(\d+)\.", cfg["site"])
        cfg["layer"] = int(block.group(1)) if block else cfg["layer"]
    else:
        cfg["hook_point"] = f"blocks.{cfg['layer']}.hook_{cfg['site']}"
    cfg["name"] = run_name(cfg)
    if asked and isinstance(asked, dict) and asked.keys() <= set(SET_BY_MODEL) and run_name(cfg | asked) == name:
        cfg |= {"asked": asked, "name": name}
    return cfg if has_bos else cfg | {"has_bos": False}


def check_value(key: str, value, default):
    """The value in the type of its key, or InputError naming the key, the value and what is allowed."""
    if value is None and key in NONE_ALLOWED:
        return None
    if key == "exclude_tokens":
        return check_exclude_tokens(value)
    kind = NONE_ALLOWED.get(key, type(default))
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # num_tokens = 1e9
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{key} = {value!r} is of type {type(value).__name__}; it must be of type {kind.__name__}")

    allowed = None
    if key in CHOICES and value not in CHOICES[key]:
        allowed = "one of " + ", ".join(CHOICES[key])
    elif kind is float and not math.isfinite(value):
        allowed = "a finite number"
    elif key in AT_LEAST and value < AT_LEAST[key]:
        allowed = f"at least {AT_LEAST[key]}"
    elif key in BELOW and value >= BELOW[key]:
        allowed = f"below {BELOW[key]}"
    elif key in POSITIVE and value <= 0:
        allowed = "above 0"
    elif key == "site" and "." not in value and value not in SITES:
        allowed = f"one of {', '.join(SITES)}, or a full hook name such as blocks.8.hook_resid_pre"
    elif kind is str and not value.strip():
        allowed = "not empty"
    elif kind is str and CONTROL.search(value):
        allowed = "without control characters"
    elif key == "sweep" and (value in (".", "..") or "/" in value or "\\" in value):
        allowed = "a plain folder name"
    elif key == "device":
        allowed = device_problem(value)
    if allowed:
        nearest = difflib.get_close_matches(value, CHOICES.get(key, ()), n=1) if kind is str else []
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise InputError(f"{key} = {value!r} is not allowed: it must be {allowed}{hint}")
    return value


def check_exclude_tokens(value) -> str | list[int]:
    """The words as they are; ids, or a single one, as a sorted list."""
    ids = list(value) if isinstance(value, list | tuple) else [value]
    if value in ("bos", "special"):
        return value
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise InputError(
            f"exclude_tokens = {value!r} is not allowed: it must be None, 'bos', 'special' or a list of token ids"
        )
    return sorted(set(ids))


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def num_steps(cfg: dict) -> int:
    """Training steps: num_tokens in whole batches."""
    return -(-cfg["num_tokens"] // cfg["batch_size"])


def run_name(cfg: dict) -> str:
    """Readable parts, then a hash over every key that changes the result."""
    sparsity = f"k{cfg['top_k']}" if cfg["sae_type"] in ("topk", "batchtopk") else f"l1_{cfg['l1_coeff']:g}"
    defaults = get_default_cfg()
    unused = NOT_IN_NAME | {key for key in ADDED_LATER if cfg[key] == defaults[key]}
    counted = {key: value for key, value in sorted(cfg.items()) if key not in unused}
    digest = hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:8]
    return f"{cfg['sae_type']}_{cfg['dict_size']}_{sparsity}_seed{cfg['seed']}_{digest}"


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_problem(device: str) -> str | None:
    """What `device` should have been, or None if torch can use it here."""
    try:
        torch.ones(1, device=device, dtype=torch.float64).item()  # metrics are in float64, which Apple's mps has not
    except Exception:  # torch raises whatever its backend does (RuntimeError, AssertionError, NotImplementedError)
        return f"a device with float64 that torch can use on this machine, such as {best_device()!r}"
    return None
