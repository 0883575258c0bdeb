"""Converts SAEs to and from other libraries' formats. RUN is a run's folder; --out names a new or empty folder.

    python export.py RUN --to saelens|dictionary_learning|published|safetensors --out DIR
    python export.py DIR --from saelens|dictionary_learning|published --out RUN
    python export.py DIR --upload NAMESPACE/NAME        (or combined with --to)

    saelens              cfg.json, sae_weights.safetensors   SAELens 6: SAE.load_from_disk(DIR)
    dictionary_learning  config.json, ae.pt                  dictionary_learning.utils.load_dictionary(DIR, device)
    published            config.json, sae.pt                 the scripts published with arXiv 2412.06410
    safetensors          cfg.json, sae_weights.safetensors   the format of this program: checkpoint.load_sae(DIR)

Features and reconstructions stay the same; an SAE that the format cannot express is refused. BatchTopK and Matryoshka
are exported with their inference threshold. For SAELens both become the equivalent JumpReLU SAE. The published scripts
have no Matryoshka, so it becomes a BatchTopK. Counters of dead features are not exported. Importing runs no code from
the files.

Each export has a model card, README.md, with the metrics of the run (model_card.py). --upload uploads such a folder to
the Hugging Face hub. A new repository is private; an existing one keeps its visibility. Only --upload uses the network.
"""

import argparse
import json
import re
import shutil
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file

from checkpoint import load_sae, serialized
from config import BATCH_TOP_K_TYPES, KEYS, SITES, TOP_K_TYPES, num_steps, post_init_cfg, prefix_sizes
from console import InputError, one_line, run_command
from files import sync, write, write_json
from hub import is_hub_name
from language_model import hub_name
from model_card import model_card
from sae import SAE_CLASSES, BaseAutoencoder

OUR_CONFIG = "batchtopk_config"  # the key under which our config is stored in another library's config
LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}  # weights are transposed
# dictionary_learning's class, trainer class, and names of weights if they are those of torch.nn.Linear, else ours.
DICTIONARIES = {
    "vanilla": ("AutoEncoder", "StandardTrainer", LINEAR | {"b_dec": "bias"}),
    "topk": ("AutoEncoderTopK", "TopKTrainer", LINEAR),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer", LINEAR),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer", {}),
    "matryoshka": ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", {}),
}
WEIGHTS = ("sae_weights.safetensors", "ae.pt", "sae.pt")  # every export contains one of these


def export_sae(
    sae: BaseAutoencoder, to: str, folder: str | Path, run: Path | None = None, repo: str | None = None
) -> None:
    """Write an SAE to a new or empty folder in the format `to` (a key of EXPORTS), with a model card. The card has the
    metrics from the run's folder `run`, and code that loads the SAE from the hub repository `repo`.

    Raises InputError if the format cannot express the SAE, if the folder is not empty or cannot be written, or if a
    record of the run is corrupt.
    """
    write_folder(Path(folder), EXPORTS[to](sae) | {"README.md": model_card(sae, to, run, repo).encode()})


def import_sae(folder: str | Path, source: str) -> BaseAutoencoder:
    """Load the SAE from a folder in the format `source` (a key of IMPORTS), on the CPU, in eval mode.

    A BatchTopK SAE without an inference threshold cannot encode in eval() until evaluation.calibrate_threshold sets
    one. Raises InputError if anything is missing, corrupt or not supported.
    """
    folder = Path(folder)
    try:
        cfg, tensors = convert(*IMPORTS[source](folder))
        cfg = post_init_cfg(cfg)
        sae = SAE_CLASSES[cfg["sae_type"]](cfg)
        sae.load_state_dict(sae.state_dict() | tensors)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except KeyError as error:
        raise InputError(f"{folder} is not in the format {source}: {error} is missing") from error
    except Exception as error:
        raise InputError(f"{folder} cannot be read in the format {source}: {one_line(error)}") from error
    return sae.eval()


# Export: the files of each format, {name: content}


def own_files(sae: BaseAutoencoder) -> dict:
    weights, cfg = serialized(sae, portable_cfg(sae))
    return {"sae_weights.safetensors": weights, "cfg.json": cfg}


def published_files(sae: BaseAutoencoder) -> dict:
    cfg = portable_cfg(sae) | {"dtype": f"torch.{sae.cfg['dtype']}"}
    if sae.cfg["sae_type"] in BATCH_TOP_K_TYPES and sae.threshold_num_batches > 0:
        cfg["threshold"] = sae.threshold.item()  # the scripts have no threshold and ignore the key
    return {"sae.pt": {name: parameter.detach() for name, parameter in sae.named_parameters()}, "config.json": cfg}


def saelens_files(sae: BaseAutoencoder) -> dict:
    cfg, weights = sae.cfg, weights_of(sae)
    config = {"architecture": {"vanilla": "standard", "topk": "topk"}.get(cfg["sae_type"], "jumprelu")}
    if config["architecture"] == "jumprelu":
        weights["threshold"] = weights["threshold"].expand(cfg["dict_size"])
    if config["architecture"] == "topk":
        config |= {"k": cfg["top_k"], "rescale_acts_by_decoder_norm": False}
    metadata = {
        "sae_lens_version": "6.0.0", "model_name": hub_name(cfg["model_name"]), "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},  # as in training
        "hook_name": cfg["hook_point"], "hook_layer": cfg["layer"], "hook_head_index": None,
        "context_size": cfg["seq_len"], "prepend_bos": cfg["bos_per_context"],
        "sequence_separator_token": "bos" if cfg.get("has_bos", True) else None,
        "disable_concat_sequences": False, "exclude_special_tokens": cfg["exclude_tokens"] or False,
        "dataset_path": cfg["dataset_path"], OUR_CONFIG: portable_cfg(sae),
    }  # fmt: skip
    config |= {
        "d_in": cfg["act_size"], "d_sae": cfg["dict_size"], "dtype": cfg["dtype"], "device": "cpu",
        "apply_b_dec_to_input": cfg["sae_type"] != "jumprelu", "reshape_activations": "none",
        # Its layer_norm is the same function as input_unit_norm: unbiased standard deviation, plus 1e-5.
        "normalize_activations": "layer_norm" if cfg["input_unit_norm"] else "none", "metadata": metadata,
    }  # fmt: skip
    return {"sae_weights.safetensors": weights, "cfg.json": config}


def dictionary_learning_files(sae: BaseAutoencoder) -> dict:
    cfg, weights = sae.cfg, weights_of(sae)
    if cfg["input_unit_norm"]:
        raise InputError("dictionary_learning does not support input_unit_norm = True; use --to saelens")
    dict_class, trainer_class, names = DICTIONARIES[cfg["sae_type"]]
    if names:
        weights = {names.get(name, name): value.t() for name, value in weights.items()}
    if cfg["sae_type"] in TOP_K_TYPES:
        weights = {"threshold": torch.tensor(-1.0), "k": torch.tensor(cfg["top_k"], dtype=torch.int32)} | weights
    groups = {}
    if cfg["sae_type"] == "matryoshka":
        sizes = prefix_sizes(cfg)
        groups["group_sizes"] = [end - start for start, end in pairwise([0, *sizes])]
        groups["group_fractions"] = [size / cfg["dict_size"] for size in groups["group_sizes"]]
        groups["group_weights"] = [1 / len(sizes)] * len(sizes)
        weights["group_sizes"] = torch.tensor(groups["group_sizes"])
    layer, submodule = cfg["layer"], cfg["hook_point"]
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", submodule):
        layer, site = int(match[1]), match[2]
        if site == "resid_pre" and layer > 0:  # this library reads the outputs of blocks
            layer, site = layer - 1, "resid_post"
        submodule = f"{site}_layer_{layer}"
    trainer = {
        "trainer_class": trainer_class, "dict_class": dict_class, "activation_dim": cfg["act_size"],
        "dict_size": cfg["dict_size"], "k": cfg["top_k"], "lr": cfg["lr"], "seed": cfg["seed"], "device": "cpu",
        "steps": num_steps(cfg), "lm_name": hub_name(cfg["model_name"]), "layer": layer,
        "submodule_name": submodule, "wandb_name": cfg["name"], **groups,
    }  # fmt: skip
    buffer = {"d_submodule": cfg["act_size"], "ctx_len": cfg["seq_len"]}
    return {"ae.pt": weights, "config.json": {"trainer": trainer, "buffer": buffer, OUR_CONFIG: portable_cfg(sae)}}


def portable_cfg(sae: BaseAutoencoder) -> dict:
    """The config without folders of this machine."""
    return {key: value for key, value in sae.cfg.items() if key not in KEYS or KEYS[key].portable}


def weights_of(sae: BaseAutoencoder) -> dict:
    """W_enc [d, F], W_dec [F, d], b_enc [F], b_dec [d], and the threshold on z ([F] or []) if the SAE has one."""
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if sae.cfg["sae_type"] == "jumprelu":
        weights["threshold"] = sae.jumprelu.log_threshold.detach().exp()
    if sae.cfg["sae_type"] in TOP_K_TYPES:
        weights["b_enc"] = torch.zeros_like(sae.b_enc)  # unused here, but other libraries add it
    if sae.cfg["sae_type"] in BATCH_TOP_K_TYPES:
        if sae.threshold_num_batches == 0:
            raise InputError("this BatchTopK SAE has no inference threshold: calibrate it, or use --to published")
        weights["threshold"] = sae.threshold
    return weights


# Import. Each function reads a folder and returns the config, the tensors under our names, and `centred`: whether the
# encoder's input is x̂ − b_dec (True) or x̂ (False).


def from_published(folder: Path) -> tuple[dict, dict, bool]:
    cfg, tensors = json.loads((folder / "config.json").read_text()), read_tensors(folder / "sae.pt")
    needed = ("sae_type", "act_size", "dict_size", "top_k", "input_unit_norm", "model_name", "site", "layer", "dtype")
    cfg |= {key: cfg[key] for key in needed}  # a KeyError if one is missing: they have no valid default
    if (threshold := cfg.pop("threshold", None)) is not None:
        tensors["threshold"] = torch.tensor(threshold)
    if cfg["sae_type"] in TOP_K_TYPES:  # the scripts do not use it
        tensors["b_enc"] = torch.zeros_like(tensors["b_enc"])
    return cfg, tensors, cfg["sae_type"] != "jumprelu"


def from_saelens(folder: Path) -> tuple[dict, dict, bool]:
    config, tensors = json.loads((folder / "cfg.json").read_text()), read_tensors(folder / "sae_weights.safetensors")
    architecture, metadata, norm = config["architecture"], config["metadata"], config["normalize_activations"]
    check_allowed("architecture", architecture, "standard", "topk", "jumprelu")
    check_allowed("normalize_activations", norm, "none", "layer_norm")
    check_allowed("reshape_activations", config["reshape_activations"], "none")
    check_allowed("rescale_acts_by_decoder_norm", config.get("rescale_acts_by_decoder_norm", False), False)
    check_allowed("hook_head_index", metadata.get("hook_head_index"), None)
    ours = metadata.get(OUR_CONFIG, {})
    sae_type, theta = {"standard": "vanilla"}.get(architecture, architecture), tensors.get("threshold", torch.zeros(0))
    if sae_type == "jumprelu" and ours.get("sae_type") in BATCH_TOP_K_TYPES and len(theta.unique()) == 1:
        sae_type, tensors["threshold"] = ours["sae_type"], theta.flatten()[0]
    names = {"seq_len": "context_size", "bos_per_context": "prepend_bos", "dataset_path": "dataset_path"}
    cfg = {key: metadata[name] for key, name in names.items() if metadata.get(name) is not None}
    cfg |= {"model_name": metadata["model_name"], "site": metadata["hook_name"]} | ours
    cfg |= {"sae_type": sae_type, "act_size": config["d_in"], "dict_size": config["d_sae"]}
    cfg |= {"input_unit_norm": norm == "layer_norm"} | ({"top_k": config["k"]} if sae_type == "topk" else {})
    return cfg, tensors, config["apply_b_dec_to_input"]


def from_dictionary_learning(folder: Path) -> tuple[dict, dict, bool]:
    config, tensors = json.loads((folder / "config.json").read_text()), read_tensors(folder / "ae.pt")
    trainer = config["trainer"]
    types = {names[0]: sae_type for sae_type, names in DICTIONARIES.items()}
    check_allowed("dict_class", trainer["dict_class"], *types)
    sae_type = types[trainer["dict_class"]]
    _, _, names = DICTIONARIES[sae_type]
    if names:
        names = {foreign: name for name, foreign in names.items()}
        tensors = {names.get(name, name): value.t() for name, value in tensors.items()}
    if sae_type in TOP_K_TYPES:
        check_allowed("k in ae.pt", int(tensors.pop("k", trainer["k"])), trainer["k"])
    if sae_type == "topk":
        tensors.pop("threshold", None)  # unused by default
    if sae_type == "vanilla" and not torch.allclose(norms := tensors["W_dec"].norm(dim=-1), norms.new_ones(1)):
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}  # as its loader does
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]

    found = {"lr": trainer.get("lr"), "seed": trainer.get("seed"), "seq_len": config.get("buffer", {}).get("ctx_len")}
    cfg = {key: value for key, value in found.items() if value is not None} | {"model_name": trainer["lm_name"]}
    submodule = str(trainer["submodule_name"])
    if match := re.fullmatch(rf"({'|'.join(SITES)})_layer_(\d+)", submodule):
        cfg |= {"site": match[1], "layer": int(match[2])}
    elif submodule.startswith("blocks."):
        cfg["site"] = submodule
    else:
        raise InputError(f"submodule_name = {submodule!r} does not name a hook point, as resid_post_layer_8 does")
    cfg |= config.get(OUR_CONFIG, {}) | ({"top_k": trainer["k"]} if sae_type in TOP_K_TYPES else {})
    cfg |= {"sae_type": sae_type, "act_size": trainer["activation_dim"], "dict_size": trainer["dict_size"]}
    if sae_type == "matryoshka":
        sizes = tensors.pop("group_sizes").cumsum(0).tolist()
        if sizes != prefix_sizes(cfg | {"matryoshka_sizes": None}):
            cfg["matryoshka_sizes"] = sizes
    return cfg | {"input_unit_norm": False}, tensors, sae_type != "jumprelu"


IMPORTS = {"saelens": from_saelens, "dictionary_learning": from_dictionary_learning, "published": from_published}
EXPORTS = {
    "saelens": saelens_files, "dictionary_learning": dictionary_learning_files, "published": published_files,
    "safetensors": own_files,
}  # fmt: skip


def convert(cfg: dict, tensors: dict, centred: bool) -> tuple[dict, dict]:
    """Our config and state dict for an SAE with z = (x̂ − b_dec) W_enc + b_enc, or z = x̂ W_enc + b_enc if not centred.
    Where our SAE of that type has another form of z, b_enc absorbs the difference.

    Raises InputError if the tensors do not match the config, or if none of our SAEs computes the same function.
    """
    d, F, sae_type = cfg["act_size"], cfg["dict_size"], cfg["sae_type"]
    shapes = {"W_enc": [d, F], "W_dec": [F, d], "b_enc": [F], "b_dec": [d]}
    if sae_type == "jumprelu":
        shapes["jumprelu.log_threshold" if "jumprelu.log_threshold" in tensors else "threshold"] = [F]
    if sae_type in BATCH_TOP_K_TYPES and "threshold" in tensors:
        shapes["threshold"] = []
    for name in [*shapes, *tensors]:
        found = list(tensors[name].shape) if name in tensors else "missing"
        if found != shapes.get(name):
            expected = shapes.get(name, f"one of {', '.join(shapes)}")
            raise InputError(f"{name} is {found}; according to the config it must be {expected}")
        if not tensors[name].isfinite().all():
            raise InputError(f"NaN or infinity in {name}")

    theta, b_enc = tensors.pop("threshold", None), tensors["b_enc"]
    if sae_type in BATCH_TOP_K_TYPES and theta is not None and theta >= 0:  # dictionary_learning: -1 is no threshold
        if centred and not b_enc.any():
            # If training continues, the running mean starts from this threshold.
            tensors |= {"threshold": theta, "threshold_num_batches": torch.tensor(100)}
        else:
            sae_type = "jumprelu"  # equivalent at inference, and JumpReLU has a bias
    if centred != (sae_type != "jumprelu"):
        shift = (tensors["b_dec"].double() @ tensors["W_enc"].double()).to(b_enc.dtype)
        tensors["b_enc"] = b_enc = b_enc - shift if centred else b_enc + shift
    if sae_type in TOP_K_TYPES and b_enc.any():
        raise InputError(f"a {sae_type} SAE with an encoder bias is not supported")
    if sae_type == "jumprelu" and theta is not None:  # a threshold below 0 is equivalent to 0, because of the relu
        tensors["jumprelu.log_threshold"] = theta.expand(F).clamp(min=torch.finfo(torch.float32).tiny).log()
    dtype = "float64" if b_enc.dtype == torch.float64 else "float32"
    return cfg | {"sae_type": sae_type, "dtype": dtype, "device": "cpu"}, tensors


def check_allowed(key: str, value, *allowed) -> None:
    if value not in allowed:
        raise InputError(f"{key} = {value!r} is not supported, only {', '.join(map(str, allowed))}")


def read_tensors(path: Path) -> dict:
    """The tensors in a .safetensors or .pt file. Raises InputError if it holds anything else; runs no code from it."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch's message advises weights_only=False, which runs the code
        raise InputError(f"{path.name} is corrupt, or holds objects other than tensors: not loaded") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path.name} does not hold a state dict (a dict of tensors)")
    for name, value in tensors.items():
        if value.untyped_storage().nbytes() < value.nbytes:  # a tensor with stride 0 can have any shape
            raise InputError(f"{path.name}: {name} is larger than its data")
    return tensors


def write_folder(folder: Path, files: dict) -> None:
    """Write {name: content} (JSON, bytes, or tensors in .safetensors or .pt) to a new or empty folder, all or nothing.

    Raises InputError if the folder is not empty or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(".export-*"):
            shutil.rmtree(killed)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not an empty folder and is not overwritten: choose another --out")
        # The folder itself is not replaced: it may be a mount point or the working directory.
        with TemporaryDirectory(dir=folder, prefix=".export-") as temporary, ExitStack() as undo:
            for name, content in files.items():
                path = Path(temporary) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".json":
                    write_json(path, content)
                elif isinstance(content, bytes):
                    write(path, content)
                else:
                    tensors = {key: tensor.contiguous().cpu() for key, tensor in content.items()}
                    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
                    sync(path)
            for path in list(Path(temporary).iterdir()):
                moved = path.rename(folder / path.name)
                undo.callback(moved.rename, path)  # back to where TemporaryDirectory deletes it
            undo.pop_all()
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {one_line(error)}") from error


# Upload


def check_can_upload(repo: str) -> None:
    """Raises InputError if `repo` is not a valid repository name, or if the user is not logged in to the hub."""
    if "/" not in repo or not is_hub_name(repo):
        raise InputError(f"--upload {repo!r} must be NAMESPACE/NAME, both of letters, digits, '-', '_' and '.'")
    if not get_token():
        raise InputError("--upload needs a login to the Hugging Face hub: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repo: str) -> str:
    """Upload a folder written by export_sae to the Hugging Face hub. A new repository is private; an existing one keeps
    its visibility. Returns a line with the URL and the visibility.

    Raises InputError if it is not such a folder, or if the hub cannot be reached or refuses the upload.
    """
    if not (folder / "README.md").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        raise InputError(f"{folder} is not uploaded: it is not an export with a model card, README.md")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Sparse autoencoder with its model card")
        return f"Uploaded {folder} to {url}, which is {'private' if api.model_info(repo).private else 'public'}"
    except HfHubHTTPError as error:
        refusals = {
            401: "the login is not valid; log in again with `hf auth login`",
            403: "no permission: the namespace is another user's, or the token has no write permission",
        }
        why = refusals.get(error.response.status_code, error.server_message or one_line(error))
        raise InputError(f"{folder} is not uploaded: the hub refused {repo}: {why}") from error
    except (httpx.TransportError, ConnectionError) as error:
        raise InputError(f"{folder} is not uploaded: {api.endpoint} cannot be reached: {one_line(error)}") from error
    except Exception as error:  # a failed file transfer, or a model card with invalid metadata
        raise InputError(f"{folder} is not uploaded to {repo}: {one_line(error)}") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUN|DIR", help="the folder to export, import or upload")
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--to", choices=EXPORTS, help="export the SAE of a run in this format")
    direction.add_argument("--from", dest="source", choices=IMPORTS, help="import a folder of this format")
    parser.add_argument("--out", type=Path, help="the output of --to or --from: a new or empty folder")
    parser.add_argument(
        "--upload", metavar="NAMESPACE/NAME", help="upload the export to this repository on the Hugging Face hub"
    )
    args = parser.parse_args(argv)
    uploads, converts = args.upload is not None, args.to or args.source
    if not (uploads or converts) or (uploads and args.source):
        parser.error("expected --to, --from, --upload, or --to and --upload")
    if (args.out is None) == bool(converts):
        parser.error("--out is required with --to and --from, and not allowed otherwise")
    if uploads:
        check_can_upload(args.upload)  # before anything is written
    if args.to:
        run = args.folder.parent if args.folder.name == "sae" else args.folder
        export_sae(load_sae(args.folder), args.to, args.out, run, args.upload)
        print(f"Wrote {', '.join(sorted(path.name for path in args.out.iterdir()))} to {args.out}")
    if uploads:
        print(upload(args.out or args.folder, args.upload))
    if args.source:
        sae = import_sae(args.folder, args.source)
        files = {f"sae/{name}": content for name, content in own_files(sae).items()}
        write_folder(args.out, files | {"config.json": sae.cfg | {"_provenance": {"imported_from": str(args.folder)}}})
        print(f"Wrote {args.out}: {sae.cfg['name']}, an SAE for {sae.cfg['hook_point']} of {sae.cfg['model_name']}")
        if sae.cfg["sae_type"] in BATCH_TOP_K_TYPES and sae.threshold_num_batches == 0:
            print("It has no inference threshold: calibrate it before encoding in eval()")


if __name__ == "__main__":
    run_command(main)
