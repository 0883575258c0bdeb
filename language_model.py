"""The language model: loaded by hub name or from a local directory, and run up to one hook point.

There are two forms of it, with the same weights. transformer_lens' TransformerBridge names the hook points, but its
attention is written out for its hooks. Harvesting needs one tensor only, so it runs the model as transformers has it,
with fused attention, up to the module that the hook point names. Evaluation runs that form from the hook point on.
Where it has no such module, or gives something else there, the bridge is run instead.
"""

import copy
import hashlib
import os
import re
from itertools import chain
from pathlib import Path

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES

from config import post_init_cfg
from console import InputError, one_line, tell
from hub import StreamError, may_pass, never_wait_for_ever, offline_hint
from sparse_ops import full_precision, screen_dtype


def load_model(cfg: dict) -> TransformerBridge:
    """The language model of a config in its model_dtype and in eval mode; `model.plain` is its form in transformers,
    `model.plain_tokenizer` its tokenizer as saved (the bridge's own has a BOS even where the model has none).

    Code in a model's repository is never run. Raises InputError if there is no such model, it needs such code, it has
    no weights or no tokenizer, or the hub cannot be reached.
    """
    name = hub_name(cfg["model_name"])
    where = f"model_name = {cfg['model_name']!r}"
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{where}: this folder has no config.json, so it is no Hugging Face model")
        if not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("pytorch_model*.bin")):
            raise InputError(f"{where}: this folder has no weights (model.safetensors)")
        if not any(
            (Path(name) / file).is_file()
            for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
        ):
            raise InputError(f"{where}: this folder has no tokenizer (tokenizer.json)")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{where}: there is no such folder, and it is no hub name")
    else:
        never_wait_for_ever()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if slow := slow_dtype(cfg["device"], cfg["model_dtype"]):
        tell(f"model_dtype = {cfg['model_dtype']} is slow on this CPU, {slow}: float32 can be 4 to 70 times as fast")
    loader = Loader()
    source = model_source(name)
    try:
        model = TransformerBridge.boot_transformers(
            source,
            device=cfg["device"],
            dtype=getattr(torch, cfg["model_dtype"]),
            model_class=loader,
            trust_remote_code=False,
        )
        tokenizer = load_tokenizer(name)
    except Exception as error:  # the libraries below raise what they like; the user gets one line
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{where} needs Python code from its own files, and such code is never run here"
            ) from error
        hint = offline_hint(name)
        kind = StreamError if may_pass(error) and not hint else InputError
        raise kind(f"{where} cannot be loaded: {one_line(error)}{hint}") from error
    if model.tokenizer is None:
        raise InputError(f"{where} comes without a tokenizer")
    model.requires_grad_(False).eval()
    # Not a submodule: its parameters are the bridge's own.
    object.__setattr__(model, "plain", loader.plain.to(cfg["device"]).requires_grad_(False).eval())
    object.__setattr__(model, "plain_tokenizer", tokenizer)
    return model


def model_source(name: str) -> str:
    """A hub name; of a folder its path, with "./" so that none is taken for an alias."""
    return os.path.join(".", name) if Path(name).is_dir() else name


def load_tokenizer(name: str):
    return transformers.AutoTokenizer.from_pretrained(model_source(name), trust_remote_code=False)


def tokenizer_of(model: TransformerBridge, cfg: dict):
    """The model's tokenizer as saved: load_model's, or that of cfg["model_name"] for a bridge made otherwise."""
    if not hasattr(model, "plain_tokenizer"):
        object.__setattr__(model, "plain_tokenizer", load_tokenizer(hub_name(cfg["model_name"])))
    return model.plain_tokenizer


def slow_dtype(device: str, dtype: str) -> str | None:
    """Why a dtype is slow on this device, or None: a CPU without instructions for it converts every number."""
    if not device.startswith("cpu"):
        return None
    if dtype == "bfloat16" and screen_dtype(torch.device("cpu")) != torch.bfloat16:
        return "which has no bf16 instructions"
    if dtype == "float16" and not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_fp16"):
        return "which has no fp16 instructions"
    return None


def hub_name(model_name: str) -> str:
    """What the hub calls a model, also one given by a short name of transformer_lens. A local folder keeps its name."""
    if Path(model_name).exists():
        return model_name
    return next((name for name, aliases in MODEL_ALIASES.items() if model_name in aliases), model_name)


def complete_cfg(cfg: dict, model: TransformerBridge) -> dict:
    """A completed config with what only the model can tell: seq_len and bos_per_context as they will be, exclude_tokens
    as a list of ids, and has_bos = False where there is no BOS. `asked` keeps the values that this changes; the name
    stays that of the run as it was asked for.

    Raises InputError if exclude_tokens names tokens that the model does not have, or if nothing is left to evaluate.
    """
    has_bos = tokenizer_of(model, cfg).bos_token_id is not None
    effective = {"seq_len": min(cfg["seq_len"], model.cfg.n_ctx), "bos_per_context": cfg["bos_per_context"] and has_bos}
    effective["exclude_tokens"] = excluded_ids(cfg, model)
    asked = {key: cfg[key] for key in effective if cfg[key] != effective[key]} | cfg.get("asked", {})
    return post_init_cfg(cfg | effective | {"has_bos": has_bos, "asked": asked})


def excluded_ids(cfg: dict, model: TransformerBridge) -> list[int] | None:
    """The token ids that exclude_tokens of a completed config names."""
    excluded = cfg["exclude_tokens"]
    if excluded is None:
        return None
    if excluded == "bos":
        bos = tokenizer_of(model, cfg).bos_token_id
        excluded = [] if bos is None else [bos]
    elif excluded == "special":
        excluded = sorted({i for i in tokenizer_of(model, cfg).all_special_ids if i < model.cfg.d_vocab})
    if not excluded or max(excluded) >= model.cfg.d_vocab:
        has = "has none" if not excluded else f"has tokens 0 to {model.cfg.d_vocab - 1}"
        raise InputError(f"exclude_tokens = {cfg['exclude_tokens']!r} is not possible: {cfg['model_name']} {has}")
    return excluded


class Loader:
    """What the bridge loads its model with; keeps a copy as it is before the bridge replaces its modules."""

    def from_pretrained(self, name: str, **options) -> transformers.PreTrainedModel:
        """Raises ValueError if weights are missing: transformers itself makes up what is missing."""
        # By default transformers asks on the terminal whether to run a model's own code.
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, **options | {"output_loading_info": True, "trust_remote_code": False}
        )
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} others")
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.plain = copy.deepcopy(model, shared)
        try:
            self.plain.set_attn_implementation("sdpa")
        except ValueError:
            pass  # an architecture without it keeps the attention that it was loaded with
        return model


def model_fingerprint(model: TransformerBridge) -> str:
    """SHA-256 of the names and the values of all weights."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return weights.hexdigest()


def check_hook_point(model: TransformerBridge, cfg: dict) -> int:
    """The width of the activations at the hook point, by a look at one token's.

    Raises InputError if the model has no such hook point, or if the width is not act_size.
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
            f"act_size = {cfg['act_size']} does not fit {cfg['model_name']}: {hook_point} is {acts.shape[-1]} wide "
            f"(act_size=None takes it from the model)"
        )
    return acts.shape[-1]


class HookReached(Exception):
    """Ends the forward at the hook point."""


class Harvester:
    """Activations at a hook point, nothing after it computed: `harvester(tokens [n, seq_len])` -> [n, seq_len, d]."""

    def __init__(self, model: TransformerBridge, hook_point: str):
        self.model, self.hook_point = model, hook_point
        self.module, self.side = plain_module(model, hook_point)
        if self.module is not None and not self.plain_form_agrees():
            self.module = None
        if self.module is None:
            tell(f"{hook_point} is read from transformer_lens' form of the model, which is slower")

    @torch.no_grad()
    @full_precision("tf32")
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.module is None:
            return run_bridge_to_hook(self.model, tokens, self.hook_point)
        return self.run_plain(tokens)

    def run_plain(self, tokens: torch.Tensor) -> torch.Tensor:
        caught = []

        def stop_before(module, args, kwargs):
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise HookReached

        def stop_after(module, args, output):
            caught.append(output[0] if isinstance(output, tuple) else output)
            raise HookReached

        if self.side == "in":
            handle = self.module.register_forward_pre_hook(stop_before, with_kwargs=True)
        else:
            handle = self.module.register_forward_hook(stop_after)
        try:
            self.model.plain(tokens, use_cache=False)
        except HookReached:
            return caught[0]
        finally:
            handle.remove()
        raise RuntimeError(f"{self.hook_point} is not reached")

    @torch.no_grad()
    @full_precision("tf32")
    def plain_form_agrees(self) -> bool:
        """Whether both forms give the same activations on some tokens."""
        tokens = some_tokens(self.model)
        try:
            plain = self.run_plain(tokens)
        except Exception:  # another architecture's module may be called in another way: then the bridge knows how
            return False
        return nearly_equal(plain, run_bridge_to_hook(self.model, tokens, self.hook_point))


class Predictor:
    """Logits with given activations at a hook point: `predictor(tokens [n, seq_len], acts [n, seq_len, d])` ->
    [n, seq_len, d_vocab].

    At the residual stream before or after a block, the blocks below are not computed: each of them gives `acts`.
    Elsewhere, or where the model's form in transformers does not agree, the bridge computes all of the model.
    """

    def __init__(self, model: TransformerBridge, hook_point: str):
        self.model, self.hook_point, self.below = model, hook_point, []
        module, side = plain_module(model, hook_point)
        if module is not None:
            blocks = list(model.plain.get_submodule(model.adapter.component_mapping["blocks"].name))
            if module in blocks:
                self.below = blocks[: blocks.index(module) + (side == "out")]
        if self.below and not self.agrees():
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

    @torch.no_grad()
    @full_precision("tf32")
    def agrees(self) -> bool:
        """Whether the blocks above give the bridge's logits on some tokens."""
        tokens = some_tokens(self.model)
        outputs = []
        handle = self.below[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model.plain(tokens, use_cache=False)
            self.returns_tuple = isinstance(outputs[0], tuple)
            logits = self(tokens, run_bridge_to_hook(self.model, tokens, self.hook_point))
        except Exception:  # another architecture's blocks may be called in another way
            return False
        finally:
            handle.remove()
        return nearly_equal(logits, self.model(tokens, return_type="logits"))


def some_tokens(model: TransformerBridge) -> torch.Tensor:
    """Two short contexts to compare the forms of the model on."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (2, min(16, model.cfg.n_ctx)), generator=generator)
    return tokens.to(next(model.parameters()).device)


def nearly_equal(plain: torch.Tensor, bridge: torch.Tensor) -> bool:
    """Equal but for what fused attention and the products' precision round; another place differs by about 1."""
    eps = 2.0**-10 if bridge.is_cuda and bridge.dtype == torch.float32 else torch.finfo(bridge.dtype).eps  # TF32's
    return plain.shape == bridge.shape and bool((plain - bridge).norm() <= max(1e-4, 6 * eps) * bridge.norm())


def plain_module(model: TransformerBridge, hook_point: str) -> tuple[torch.nn.Module | None, str]:
    """The module of model.plain whose input ("in") or output ("out") the hook point is; None if it is neither."""
    # The bridge's name for it, e.g. blocks.8.hook_in for blocks.8.hook_resid_pre, blocks.8.ln2.hook_in for resid_mid.
    match = re.fullmatch(r"blocks\.(\d+)\.(?:(\w+)\.)?hook_(in|out)", str(model.hook_dict[hook_point].name))
    if match is None or not hasattr(model, "plain"):
        return None, ""
    blocks = model.adapter.component_mapping["blocks"]
    part = blocks.submodules.get(match[2]) if match[2] else None
    if match[2] and part is None:
        return None, ""
    path = f"{blocks.name}.{match[1]}" + (f".{part.name}" if part else "")
    try:
        return model.plain.get_submodule(path), match[3]
    except AttributeError:
        return None, ""


@torch.no_grad()
def run_bridge_to_hook(model: TransformerBridge, tokens: torch.Tensor, hook_point: str) -> torch.Tensor:
    """Activations at the hook point of contexts [n, seq_len] by the bridge; nothing after it is computed."""
    caught = []

    def stop(acts, hook):
        caught.append(acts)
        raise HookReached

    try:
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(hook_point, stop)])
    except HookReached:
        return caught[0]
    except ValueError as error:  # the bridge refuses hook points that a mode of its own must be set for
        raise InputError(f"hook point {hook_point!r} cannot be read: {one_line(error)}") from error
    raise InputError(f"hook point {hook_point!r} is never reached in a forward of this model")
