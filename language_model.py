"""The language model: loads it by hub name or from a local folder, and runs it up to a hook point and from there on.

It exists in two forms that share their weights. transformer_lens' TransformerBridge defines the hook points, but is
slower, because its attention is not fused. So the plain transformers model, with fused attention, is run where
possible: up to the module at the hook point to harvest activations, and from there on for evaluation. If it has no such
module, or its output differs from the bridge's, the bridge is run instead.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.activations import FastGELUActivation, NewGELUActivation

from config import post_init_cfg
from console import InputError, one_line, tell
from hub import StreamError, is_hub_name, is_transient, offline_hint, set_timeouts
from sparse_ops import full_precision, screen_dtype

if TYPE_CHECKING:  # importing transformer_lens takes seconds, and commands that load no model do without it
    from transformer_lens.model_bridge import TransformerBridge

LOCAL_FILES = {  # a model's folder must have one file of each kind
    "config.json": ("config.json",),
    "weights (model.safetensors)": ("*.safetensors", "pytorch_model*.bin"),
    "tokenizer (tokenizer.json)": ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"),
}

UNFUSED_GELU = NewGELUActivation, FastGELUActivation


def load_model(cfg: dict) -> TransformerBridge:
    """The language model of a config in its model_dtype and in eval mode. `model.plain` is the plain transformers
    model, `model.plain_tokenizer` the tokenizer as saved (the bridge's has a BOS even if the model has none).

    Code in a model's repository is never run. Raises InputError if the model does not exist, needs such code, or has
    no weights or tokenizer, or if the hub is unreachable; StreamError after a transient error of the hub.
    """
    name = hub_name(cfg["model_name"])
    where = f"model_name = {cfg['model_name']!r}"
    if Path(name).is_dir():
        for kind, patterns in LOCAL_FILES.items():
            if not any(any(Path(name).glob(pattern)) for pattern in patterns):
                raise InputError(f"{where}: this folder is not a Hugging Face model: it has no {kind}")
    elif not is_hub_name(name):
        raise InputError(f"{where}: no such folder, and not a hub name")
    else:
        set_timeouts()
    from transformer_lens.model_bridge import TransformerBridge

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if slow := slow_dtype(cfg["device"], cfg["model_dtype"]):
        tell(f"model_dtype = {cfg['model_dtype']} is slow on this CPU, {slow}: float32 can be 4 to 70 times faster")
    loader, dtype = Loader(), getattr(torch, cfg["model_dtype"])
    options = dict(device=cfg["device"], dtype=dtype, model_class=loader, trust_remote_code=False)
    try:
        model = TransformerBridge.boot_transformers(model_source(name), **options)
        tokenizer_of(model, cfg)
    except Exception as error:  # the libraries raise errors of any type; the user gets one line
        if "trust_remote_code" in str(error):
            raise InputError(f"{where} needs Python code from its repository, and such code is never run") from error
        hint = offline_hint(name)
        if "/" in name and not Path(name).exists():
            where += f" (there is no folder {Path(name).absolute()})"
        kind = StreamError if is_transient(error) and not hint else InputError
        raise kind(f"{where} cannot be loaded: {one_line(error)}{hint}") from error
    if model.tokenizer is None:
        raise InputError(f"{where} has no tokenizer")
    model.requires_grad_(False).eval()
    # Not a submodule: it shares the bridge's parameters.
    object.__setattr__(model, "plain", loader.plain.to(cfg["device"]).requires_grad_(False).eval())
    return model


def model_source(name: str) -> str:
    """A hub name, or a folder's path with "./" before it, which transformer_lens cannot mistake for an alias."""
    return os.path.join(".", name) if Path(name).is_dir() else name


def tokenizer_of(model: TransformerBridge, cfg: dict):
    """The tokenizer of cfg["model_name"] as saved, which is then `model.plain_tokenizer`."""
    if not hasattr(model, "plain_tokenizer"):
        source = model_source(hub_name(cfg["model_name"]))
        model.plain_tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return model.plain_tokenizer


def slow_dtype(device: str, dtype: str) -> str | None:
    """Why a dtype is slow on this device, or None. A CPU without instructions for it converts every value."""
    if not device.startswith("cpu"):
        return None
    if dtype == "bfloat16" and screen_dtype(torch.device("cpu")) != torch.bfloat16:
        return "which has no bf16 instructions"
    if dtype == "float16" and not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_fp16"):
        return "which has no fp16 instructions"
    return None


def hub_name(model_name: str) -> str:
    """A model's name on the hub; aliases of transformer_lens are resolved. A local folder keeps its name."""
    if Path(model_name).exists():
        return model_name
    from transformer_lens.supported_models import MODEL_ALIASES

    return next((name for name, aliases in MODEL_ALIASES.items() if model_name in aliases), model_name)


def complete_cfg(cfg: dict, model: TransformerBridge) -> dict:
    """A completed config with values of seq_len and bos_per_context that the model allows, and exclude_tokens as a list
    of ids. `asked` holds the requested values of the changed keys, and the run keeps the name of the requested config.
    has_bos is False if the model has no BOS.

    Raises InputError if exclude_tokens contains tokens that the model does not have, or if nothing is left to evaluate.
    """
    has_bos = tokenizer_of(model, cfg).bos_token_id is not None
    effective = {"seq_len": min(cfg["seq_len"], model.cfg.n_ctx), "bos_per_context": cfg["bos_per_context"] and has_bos}
    effective["exclude_tokens"] = excluded_ids(cfg, model)
    asked = {key: cfg[key] for key in effective if cfg[key] != effective[key]} | cfg.get("asked", {})
    return post_init_cfg(cfg | effective | {"has_bos": has_bos, "asked": asked})


def excluded_ids(cfg: dict, model: TransformerBridge) -> list[int] | None:
    """exclude_tokens of a completed config as token ids."""
    excluded = cfg["exclude_tokens"]
    if excluded is None:
        return None
    if excluded == "bos":
        bos = tokenizer_of(model, cfg).bos_token_id
        excluded = [] if bos is None else [bos]
    elif excluded == "special":
        excluded = sorted({i for i in tokenizer_of(model, cfg).all_special_ids if i < model.cfg.d_vocab})
    if not excluded or max(excluded) >= model.cfg.d_vocab:
        has = "has no such token" if not excluded else f"has tokens 0 to {model.cfg.d_vocab - 1}"
        raise InputError(f"exclude_tokens = {cfg['exclude_tokens']!r} is not possible: {cfg['model_name']} {has}")
    return excluded


class Loader:
    """Loads the model for the bridge, which replaces some of its modules. `plain` is a copy with the same weights and
    the original modules, except that attention and GELU are fused.
    """

    def from_pretrained(self, name: str, **options) -> transformers.PreTrainedModel:
        """Raises ValueError if weights are missing: transformers would initialize them at random."""
        # By default transformers asks on the terminal whether to run a model's own code.
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, **options | {"output_loading_info": True, "trust_remote_code": False}
        )
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.plain = copy.deepcopy(model, shared)
        with suppress(ValueError):  # not supported by this architecture: the attention stays as loaded
            self.plain.set_attn_implementation("sdpa")
        for name, module in list(self.plain.named_modules()):
            if isinstance(module, UNFUSED_GELU):  # GPT-2's: eight passes over the MLP's activations
                self.plain.set_submodule(name, torch.nn.GELU("tanh"))
        return model


def model_fingerprint(model: TransformerBridge) -> str:
    """SHA-256 of the names and values of all weights."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return weights.hexdigest()


def check_hook_point(model: TransformerBridge, cfg: dict) -> int:
    """The width of the activations at the hook point, from a forward pass on one token.

    Raises InputError if the model has no such hook point, or if the width differs from act_size.
    """
    hook_point = cfg["hook_point"]
    if hook_point not in model.hook_dict:
        layers = f"its layers are 0 to {model.cfg.n_layers - 1}" if "." not in cfg["site"] else "see model.hook_dict"
        raise InputError(f"{cfg['model_name']} has no hook point {hook_point!r} (site, layer): {layers}")
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=cfg["device"])
    acts = run_bridge_to_hook(model, tokens, hook_point)
    if acts.ndim != 3:
        raise InputError(f"hook point {hook_point!r} gives {acts.ndim} dimensions; it must give [context, position, d]")
    if cfg["act_size"] not in (None, acts.shape[-1]):
        raise InputError(
            f"act_size = {cfg['act_size']} does not fit {cfg['model_name']}: the width of {hook_point} is "
            f"{acts.shape[-1]} (act_size=None takes it from the model)"
        )
    return acts.shape[-1]


class HookReached(Exception):
    """Ends a forward pass at the hook point. Its argument is the activations."""


class Harvester:
    """Runs the model up to a hook point: `harvester(tokens [n, seq_len])` -> activations [n, seq_len, d]."""

    def __init__(self, model: TransformerBridge, hook_point: str):
        self.model, self.hook_point = model, hook_point
        self.module, self.side = plain_module(model, hook_point)
        from_bridge = partial(run_bridge_to_hook, model, hook_point=hook_point)
        if self.module is None or not matches_bridge(model, self.run_plain, from_bridge):
            self.module = None
            tell(f"{hook_point} is harvested with transformer_lens' TransformerBridge, which is slower")

    @torch.no_grad()
    @full_precision("tf32")
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.module is None:
            return run_bridge_to_hook(self.model, tokens, self.hook_point)
        return self.run_plain(tokens)

    def run_plain(self, tokens: torch.Tensor) -> torch.Tensor:
        def stop(module, args, kwargs, output=None):
            acts = output if self.side == "out" else args or kwargs["hidden_states"]
            raise HookReached(acts[0] if isinstance(acts, tuple) else acts)

        register = self.module.register_forward_hook if self.side == "out" else self.module.register_forward_pre_hook
        with register(stop, with_kwargs=True):
            try:
                self.model.plain(tokens, use_cache=False)
            except HookReached as reached:
                return reached.args[0]
        raise RuntimeError(f"{self.hook_point} is not reached")


class Predictor:
    """Logits with given activations at a hook point: `predictor(tokens [n, seq_len], acts [n, seq_len, d])` ->
    [n, seq_len, d_vocab].

    If the hook point is the residual stream before or after a block, the plain model is run, and each block below the
    hook point returns `acts` instead of computing. At other hook points, or if the plain model's logits differ, the
    bridge runs the whole model.
    """

    def __init__(self, model: TransformerBridge, hook_point: str):
        self.model, self.hook_point, self.below = model, hook_point, []
        module, side = plain_module(model, hook_point)
        if module is not None:
            blocks = list(model.plain.get_submodule(model.adapter.component_mapping["blocks"].name))
            if module in blocks:
                self.below = blocks[: blocks.index(module) + (side == "out")]
        if self.below and not matches_bridge(model, self.predict_own, partial(model, return_type="logits")):
            self.below = []

    @torch.no_grad()
    @full_precision("tf32")
    def __call__(self, tokens: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        acts = acts.to(self.model.cfg.dtype)
        if not self.below:
            hooks = [(self.hook_point, lambda _, hook: acts)]
            return self.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        try:
            for block in self.below:
                block.forward = lambda *args, **kwargs: self.as_output(acts)
            return self.model.plain(tokens, use_cache=False).logits
        finally:
            for block in self.below:
                del block.forward

    def as_output(self, acts: torch.Tensor):
        return (acts,) if self.returns_tuple else acts

    def predict_own(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits with the bridge's own activations. Also finds out what the blocks return."""
        outputs = []
        with self.below[-1].register_forward_hook(lambda module, args, output: outputs.append(output)):
            self.model.plain(tokens, use_cache=False)
        self.returns_tuple = isinstance(outputs[0], tuple)
        return self(tokens, run_bridge_to_hook(self.model, tokens, self.hook_point))


@torch.no_grad()
@full_precision("tf32")
def matches_bridge(model: TransformerBridge, run_plain: Callable, run_bridge: Callable) -> bool:
    """Whether run_plain(tokens) equals run_bridge(tokens) on two short contexts, up to the rounding of attention and
    matrix products. The relative error of a wrong module is about 1.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (2, min(16, model.cfg.n_ctx)), generator=generator)
    tokens = tokens.to(next(model.parameters()).device)
    try:
        plain = run_plain(tokens)
    except Exception:  # in other architectures the modules may have other signatures
        return False
    bridge = run_bridge(tokens)
    eps = 2.0**-10 if bridge.is_cuda and bridge.dtype == torch.float32 else torch.finfo(bridge.dtype).eps  # TF32's
    return plain.shape == bridge.shape and bool((plain - bridge).norm() <= max(1e-4, 6 * eps) * bridge.norm())


def plain_module(model: TransformerBridge, hook_point: str) -> tuple[torch.nn.Module | None, str]:
    """The module of model.plain whose input ("in") or output ("out") is the hook point; None if there is none."""
    # The bridge's own name, e.g. blocks.8.hook_in for blocks.8.hook_resid_pre, blocks.8.ln2.hook_in for resid_mid.
    match = re.fullmatch(r"blocks\.(\d+)\.(?:(\w+)\.)?hook_(in|out)", str(model.hook_dict[hook_point].name))
    if match is None:
        return None, ""
    layer, part, side = match.groups()
    blocks = model.adapter.component_mapping["blocks"]
    try:
        path = f"{blocks.name}.{layer}" + (f".{blocks.submodules[part].name}" if part else "")
        return model.plain.get_submodule(path), side
    except (KeyError, AttributeError):  # this architecture has no such module, or the bridge is not from load_model
        return None, ""


@torch.no_grad()
def run_bridge_to_hook(model: TransformerBridge, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
    """Activations of contexts [n, seq_len] at the hook point, from the bridge, which is stopped there."""

    def stop(acts, hook):
        raise HookReached(acts)

    try:
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(hook_point, stop)])
    except HookReached as reached:
        return reached.args[0]
    except ValueError as error:  # the bridge rejects hook points that need one of its modes
        raise InputError(f"hook point {hook_point!r} cannot be read: {one_line(error)}") from error
    raise InputError(f"hook point {hook_point!r} is never reached in a forward pass of this model")
