"""The real SAELens and dictionary_learning on what export.py writes, and export.py on what they write.

    python tests/check_with_peers.py [--venv FOLDER]

Makes a virtual environment of its own, unless FOLDER holds one that an earlier call made there, and installs the two
libraries in it. Small SAEs of all types are trained on activations of the demo's language model and exported; the
libraries load them there, and encode and decode other activations. They then save SAEs of their own, which are
imported here. Ends with exit code 1 if any feature or reconstruction differs by more than float32 rounding.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
PACKAGES = ("sae-lens>=6,<7", "transformer_lens<4", "dictionary_learning==0.1.0")
K, D, F = 8, 128, 256


def check(name: str, results: tuple, expected: tuple) -> bool:
    """Print how far (features, reconstructions) are from the expected, relative to the largest; False if too far."""
    (features, reconstruction), (wanted, wanted_reconstruction) = results, expected
    flipped = (features > 0) != (wanted > 0)  # z as close to a threshold as float32 can tell
    rows = ~flipped.any(1)
    difference = ((features - wanted).abs() * ~flipped).max() / wanted.max()
    recon_difference = (reconstruction - wanted_reconstruction)[rows].abs().max() / wanted_reconstruction.abs().max()
    good = difference < 1e-5 and recon_difference < 1e-5 and flipped.float().mean() < 1e-4 and bool((wanted > 0).any())
    print(
        f"{'same' if good else 'DIFFERENT':10}{name:52} L0 {(wanted > 0).sum(1).float().mean():6.1f}   features "
        f"{difference:.0e}   reconstructions {recon_difference:.0e}   over the threshold otherwise {flipped.sum()}"
    )
    return bool(good)


def main(venv: Path, work: Path) -> bool:
    """In the project's own environment."""
    from helpers import ours, real_activations, trained_sae

    import export
    from checkpoint import save_sae

    library = Path(sysconfig.get_paths()["stdlib"])
    train, acts = (real_activations((library / name).read_text().split("\n\n")[:30]) for name in ("ast.py", "csv.py"))
    save_file({"acts": acts}, work / "acts.safetensors")
    for sae_type in ("vanilla", "topk", "batchtopk", "jumprelu", "matryoshka"):
        for norm in (False, True):
            name = f"{sae_type}{'_norm' * norm}"
            sae = trained_sae(train, sae_type=sae_type, input_unit_norm=norm)
            features, reconstruction = ours(sae, acts)
            save_file({"features": features, "reconstruction": reconstruction}, work / f"{name}.safetensors")
            save_sae(sae, work / name / "sae")
            for to in ("saelens",) if norm else ("saelens", "dictionary_learning"):
                command = [
                    sys.executable,
                    HERE.parent / "export.py",
                    work / name,
                    "--to",
                    to,
                    "--out",
                    work / to / name,
                ]
                subprocess.run(command, check=True)

    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
    good = subprocess.run([venv / "bin" / "python", __file__, "--peers", work]).returncode == 0

    for folder in sorted((work / "theirs").glob("*/*")):
        expected = load_file(work / f"theirs_{folder.name}.safetensors")
        results = ours(export.import_sae(folder, folder.parent.name), acts)
        name = f"{folder.parent.name}'s own {folder.name}, here"
        good &= check(name, results, (expected["features"], expected["reconstruction"]))
    return good


@torch.no_grad()
def peers(work: Path) -> bool:
    """In the environment of the other libraries."""
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.utils import load_dictionary
    from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    acts, good = load_file(work / "acts.safetensors")["acts"], True

    def run(sae) -> tuple:
        features = sae.encode(acts)
        return features, sae.decode(features)

    for folder in sorted([*work.glob("saelens/*"), *work.glob("dictionary_learning/*")]):
        expected = load_file(work / f"{folder.name}.safetensors")
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), on_card := {})
        sae = on_card["sae"]
        assert on_card["features"].shape == (4, F) and on_card["reconstruction"].shape == (4, D)
        if folder.parent.name == "saelens":
            assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_pre" and sae.cfg.metadata.prepend_bos is True
        else:
            assert on_card["config"]["trainer"]["submodule_name"] == "resid_post_layer_1"
        name = f"{type(sae).__module__.split('.')[0]} {type(sae).__name__}, {folder.name}"
        good &= check(name, run(sae), (expected["features"], expected["reconstruction"]))

    # SAEs that the libraries made: with biases, and thresholds amid the activations.
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="gpt2", hook_name="blocks.2.hook_resid_pre", context_size=64, prepend_bos=True)
    base = {"d_in": D, "d_sae": F, "metadata": metadata}
    theirs = {
        "saelens": {
            "standard": StandardSAE(StandardSAEConfig(**base, normalize_activations="layer_norm")),
            "uncentred": StandardSAE(StandardSAEConfig(**base, apply_b_dec_to_input=False)),
            "topk": TopKSAE(TopKSAEConfig(**base, k=K)),
            "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**base)),
            "batchtopk_training": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**base, k=K)),
            "matryoshka_training": MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(**base, k=K, matryoshka_widths=[16, 64, F])
            ),
        },
        "dictionary_learning": {
            "AutoEncoder": AutoEncoder(D, F),
            "BatchTopKSAE": BatchTopKSAE(D, F, K),
            "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [16, 48, F - 64]),
            "JumpReluAutoEncoder": JumpReluAutoEncoder(D, F),
        },
    }
    for library, saes in theirs.items():
        for name, sae in saes.items():
            for parameter, value in sae.named_parameters():
                if value.ndim == 1 and not (name == "topk" and parameter == "b_enc"):  # no TopK here has that bias
                    value.copy_(torch.randn_like(value) * 0.1)
            for buffer in ("threshold", "topk_threshold"):
                if hasattr(sae, buffer):
                    scale = 0.01 if buffer == "topk_threshold" else 1  # that one begins with small weights
                    getattr(sae, buffer).copy_((torch.rand_like(getattr(sae, buffer)) + 0.5) * scale)
            folder = work / "theirs" / library / name
            if library == "saelens":
                getattr(sae, "save_inference_model", sae.save_model)(folder)
                loaded = SAE.load_from_disk(folder)
            else:
                folder.mkdir(parents=True)
                torch.save(sae.state_dict(), folder / "ae.pt")
                trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "k": K, "layer": 1}
                trainer |= {"lm_name": "gpt2", "submodule_name": "resid_post_layer_1"}
                (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
                loaded, _ = load_dictionary(str(folder), "cpu")
            features, reconstruction = run(loaded)
            tensors = {"features": features.contiguous(), "reconstruction": reconstruction.contiguous()}
            save_file(tensors, work / f"theirs_{name}.safetensors")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="where the virtual environment is, or is to be made and kept")
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)  # how it calls itself in that environment
    args = parser.parse_args()
    if args.peers:
        sys.exit(0 if peers(args.peers) else 1)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with tempfile.TemporaryDirectory() as temporary:
        good = main(args.venv or Path(temporary) / "venv", Path(temporary))
    print("All the same" if good else "error: some differ", file=sys.stdout if good else sys.stderr)
    sys.exit(0 if good else 1)
