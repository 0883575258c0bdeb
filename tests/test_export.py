"""SAEs compute the same after export and import, and corrupt or unsupported files are refused.

The other libraries are not installed here: their documented forward passes are implemented below. check_with_peers.py
runs the real ones.
"""

import copy
import hashlib
import inspect
import json
import pickle
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from helpers import FOREIGN, ours, published_forward, real_activations, trained_sae
from safetensors.torch import load_file, save_file

from checkpoint import load_sae, save_sae
from config import post_init_cfg
from console import InputError, run_command
from export import export_sae, import_sae, main
from sae import SAE_CLASSES

TYPES, BATCH_TOP_K = tuple(SAE_CLASSES), ("batchtopk", "matryoshka")
WEIGHTS = {"saelens": "sae_weights.safetensors", "dictionary_learning": "ae.pt", "published": "sae.pt"}
CONFIG = {"saelens": "cfg.json", "dictionary_learning": "config.json", "published": "config.json"}


@pytest.fixture(scope="module")
def acts():
    return real_activations(inspect.getsource(textwrap).split("\n\n")[:30])


@pytest.fixture(scope="module")
def make_sae(acts):
    made = {}

    def make(sae_type: str, input_unit_norm: bool = False):
        key = sae_type, input_unit_norm
        if key not in made:
            made[key] = trained_sae(acts, sae_type=sae_type, input_unit_norm=input_unit_norm)
        return made[key]

    return make


def assert_same(results, expected):
    """(features, reconstructions) are equal up to float32 rounding, which may flip features with z near a threshold."""
    (features, reconstruction), (wanted, wanted_reconstruction) = results, expected
    flipped = (features > 0) != (wanted > 0)
    assert flipped.float().mean() < 1e-4 and (wanted > 0).any() and not (wanted > 0).all()
    torch.testing.assert_close(features[~flipped], wanted[~flipped], rtol=1e-4, atol=1e-4 * wanted.max().item())
    rows, scale = ~flipped.any(1), wanted_reconstruction.abs().max().item()
    torch.testing.assert_close(reconstruction[rows], wanted_reconstruction[rows], rtol=1e-4, atol=1e-5 * scale)


# Forward passes of the other libraries: features [B, F] and reconstructions [B, d]


def saelens_forward(folder, x):
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    z = (x - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    features = z.relu()
    if cfg["architecture"] == "jumprelu":
        features = features * (z > w["threshold"])
    if cfg["architecture"] == "topk":
        top = z.topk(cfg["k"], dim=-1)
        features = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
    reconstruction = features @ w["W_dec"] + w["b_dec"]
    return features, reconstruction * std + mean if cfg["normalize_activations"] == "layer_norm" else reconstruction


def dictionary_learning_forward(folder, x):
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    w = torch.load(folder / "ae.pt", weights_only=True)
    if trainer["dict_class"] == "JumpReluAutoEncoder":
        z = x @ w["W_enc"] + w["b_enc"]
        features = torch.relu(z * (z > w["threshold"]))
        return features, features @ w["W_dec"] + w["b_dec"]
    bias = w["bias" if trainer["dict_class"] == "AutoEncoder" else "b_dec"]
    if trainer["dict_class"] == "MatryoshkaBatchTopKSAE":
        assert w["group_sizes"].sum() == trainer["dict_size"] and w["group_sizes"].tolist() == trainer["group_sizes"]
        features = torch.relu((x - bias) @ w["W_enc"] + w["b_enc"])
        features = features * (features > w["threshold"])
        return features, features @ w["W_dec"] + bias
    features = torch.relu(torch.nn.functional.linear(x - bias, w["encoder.weight"], w["encoder.bias"]))
    if trainer["dict_class"] == "AutoEncoderTopK":
        assert w["k"] == trainer["k"]
        top = features.topk(trainer["k"], dim=-1)
        features = torch.zeros_like(features).scatter(-1, top.indices, top.values)
    if trainer["dict_class"] == "BatchTopKSAE":
        features = features * (features > w["threshold"])
    return features, torch.nn.functional.linear(features, w["decoder.weight"]) + bias


FORWARD = {
    "saelens": saelens_forward, "dictionary_learning": dictionary_learning_forward, "published": published_forward,
}  # fmt: skip


# Round trips


@pytest.mark.parametrize("input_unit_norm", [False, True])
@pytest.mark.parametrize("sae_type", TYPES)
@pytest.mark.parametrize("to", FOREIGN)
@pytest.mark.fast
def test_round_trip(make_sae, acts, tmp_path, to, sae_type, input_unit_norm):
    """The other library and the SAE imported again compute what ours does; the config is complete."""
    sae = make_sae(sae_type, input_unit_norm)
    if to == "dictionary_learning" and input_unit_norm:
        with pytest.raises(InputError, match="input_unit_norm = True"):
            export_sae(sae, to, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    export_sae(sae, to, tmp_path / "out")
    sae.train(to == "published" and sae_type in BATCH_TOP_K)  # the published scripts know the batch top-k only
    assert_same(FORWARD[to](tmp_path / "out", acts), ours(sae, acts))
    sae.eval()

    back = import_sae(tmp_path / "out", to)
    assert not back.training
    assert back.cfg == sae.cfg
    assert_same(ours(back, acts), ours(sae, acts))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(back, name), getattr(sae, name))
    if sae_type in BATCH_TOP_K:
        assert torch.equal(back.threshold, sae.threshold) and back.threshold_num_batches == 100


def test_fixtures_have_nonzero_biases(make_sae):
    """The round trips can only detect lost values that are not 0."""
    for sae_type in TYPES:
        assert make_sae(sae_type).b_dec.abs().min() > 0
    assert make_sae("vanilla").b_enc.any() and make_sae("jumprelu").b_enc.any()
    assert make_sae("batchtopk").threshold > 0.01 and make_sae("jumprelu").jumprelu.log_threshold.unique().numel() > 99


def test_command_line(make_sae, acts, tmp_path, capsys):
    """Export of a run's folder and import into another, which load_sae reads; also the format safetensors."""
    sae = make_sae("batchtopk", True)
    save_sae(sae, tmp_path / "run" / "sae")
    main([str(tmp_path / "run"), "--to", "saelens", "--out", str(tmp_path / "new" / "out")])
    main([str(tmp_path / "new" / "out"), "--from", "saelens", "--out", str(tmp_path / "back")])
    assert "blocks.2.hook_resid_pre of demo/lm" in capsys.readouterr().out
    assert_same(ours(load_sae(tmp_path / "back"), acts), ours(sae, acts))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert post_init_cfg(config) == sae.cfg
    assert config["_provenance"] == {"imported_from": str(tmp_path / "new" / "out")}
    main([str(tmp_path / "run"), "--to", "safetensors", "--out", str(tmp_path / "own")])
    assert_same(ours(load_sae(tmp_path / "own"), acts), ours(sae, acts))
    for folder in (tmp_path / "own", tmp_path / "back" / "sae"):
        cfg, weights = json.loads((folder / "cfg.json").read_text()), (folder / "sae_weights.safetensors").read_bytes()
        assert cfg["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert "weights_sha256" not in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert "weights_sha256" not in config | json.loads((tmp_path / "new" / "out" / "cfg.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "new", "own", "run"]


@pytest.mark.parametrize("kind", ["folder", "link", "here"])
def test_empty_output_folders(make_sae, tmp_path, monkeypatch, kind):
    """Export and import write to an existing empty folder, a link to one, and the working directory."""
    for name in ("out", "back"):
        (tmp_path / name).mkdir()
    if kind == "link":
        (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out")
    export_sae(make_sae("topk"), "saelens", {"folder": tmp_path / "out", "link": tmp_path / "link", "here": "."}[kind])
    files = {"README.md", "cfg.json", "sae_weights.safetensors"}
    assert {path.name for path in Path(".").iterdir()} == files == {path.name for path in (tmp_path / "out").iterdir()}
    main([str(tmp_path / "out"), "--from", "saelens", "--out", str(tmp_path / "back")])
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "sae"}
    assert load_sae(tmp_path / "back").cfg == make_sae("topk").cfg


def test_a_failed_write_leaves_an_empty_folder_empty(make_sae, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rename, names = Path.rename, []

    def full_disk(path, target):
        names.append(path.name)
        if len(names) == 3:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(InputError, match="cannot be written: .*No space left"):
        export_sae(make_sae("topk"), "saelens", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_export_is_repeated(make_sae, tmp_path):
    """What it left in the folder is removed."""
    (tmp_path / "out" / ".export-x").mkdir(parents=True)
    (tmp_path / "out" / ".export-x" / "cfg.json").touch()
    export_sae(make_sae("topk"), "saelens", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "cfg.json", "sae_weights.safetensors"}


@pytest.mark.fast
def test_nothing_is_overwritten(make_sae, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".kept").touch()
    with pytest.raises(InputError, match="not overwritten"):
        export_sae(make_sae("topk"), "saelens", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export_sae(make_sae("topk"), "saelens", tmp_path / "file" / "out")


def test_saelens_config_is_complete(make_sae, tmp_path):
    sae = copy.deepcopy(make_sae("batchtopk", True))
    sae.cfg["exclude_tokens"] = [0, 5]
    export_sae(sae, "saelens", tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == ("jumprelu", 128, 256, "float32")
    assert (cfg["normalize_activations"], cfg["apply_b_dec_to_input"]) == ("layer_norm", True)
    metadata = cfg["metadata"]
    assert (metadata["model_name"], metadata["hook_name"], metadata["hook_layer"]) == (
        "demo/lm",
        "blocks.2.hook_resid_pre",
        2,
    )
    assert (metadata["prepend_bos"], metadata["context_size"]) == (True, 64)
    assert metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": False}
    assert metadata["exclude_special_tokens"] == [0, 5]


def test_dictionary_learning_reads_outputs_of_blocks(make_sae, tmp_path):
    """The input of block 2 is the output of block 1 in that library."""
    export_sae(make_sae("topk"), "dictionary_learning", tmp_path / "out")
    trainer = json.loads((tmp_path / "out" / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["submodule_name"]) == (1, "resid_post_layer_1")


def test_float64_is_kept(acts, tmp_path):
    sae = trained_sae(acts, sae_type="vanilla", dtype="float64")
    export_sae(sae, "saelens", tmp_path / "out")
    back = import_sae(tmp_path / "out", "saelens")
    assert torch.equal(back.encode(acts), sae.encode(acts)) and back.W_enc.dtype == torch.float64


# SAEs trained with other libraries


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, edit):
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    edit(tensors)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


@pytest.fixture
def foreign(make_sae, tmp_path):
    """A folder as the other library writes it, without our config, after edits of its tensors and config."""

    def make(source, sae_type, tensors=lambda tensors: None, config=lambda config: None):
        folder = tmp_path / f"{source}_{sae_type}"
        export_sae(make_sae(sae_type), source, folder)

        def edit(content):
            content.get("metadata", content).pop("batchtopk_config", None)
            config(content)

        edit_json(folder / CONFIG[source], edit)
        edit_tensors(folder / WEIGHTS[source], tensors)
        return folder

    return make


@pytest.mark.parametrize("sae_type", TYPES)
@pytest.mark.parametrize("source", FOREIGN)
def test_foreign_config(foreign, acts, source, sae_type):
    """The other library's config suffices."""
    folder = foreign(source, sae_type)
    back = import_sae(folder, source)
    assert back.cfg["hook_point"] in ("blocks.2.hook_resid_pre", "blocks.1.hook_resid_post")
    assert (back.cfg["model_name"], back.cfg["seq_len"]) == ("demo/lm", 64)
    assert source != "saelens" or back.cfg["bos_per_context"] is True
    if sae_type in BATCH_TOP_K and source == "saelens":
        assert back.cfg["sae_type"] == "jumprelu"  # its config does not mention BatchTopK
    else:
        assert back.cfg["sae_type"] == sae_type
    back.train(source == "published" and sae_type in BATCH_TOP_K)
    assert_same(ours(back, acts), FORWARD[source](folder, acts))


def add_bias(tensors):
    name = "encoder.bias" if "encoder.bias" in tensors else "b_enc"
    tensors[name] += torch.linspace(-0.1, 0.1, 256)


def longer_rows(tensors):
    name = "decoder.weight" if "decoder.weight" in tensors else "W_dec"
    tensors[name] *= torch.linspace(0.5, 2, 256).view((1, -1) if name == "decoder.weight" else (-1, 1))


def negative_thresholds(tensors):
    tensors["threshold"][::2] = -1


@pytest.mark.parametrize(
    "source, sae_type, becomes, tensors, config",
    [
        ("dictionary_learning", "batchtopk", "jumprelu", add_bias, lambda config: None),
        ("saelens", "batchtopk", "jumprelu", add_bias, lambda config: None),
        ("saelens", "vanilla", "vanilla", longer_rows, lambda config: config.update(apply_b_dec_to_input=False)),
        ("saelens", "jumprelu", "jumprelu", longer_rows, lambda config: config.update(apply_b_dec_to_input=True)),
        ("saelens", "jumprelu", "jumprelu", negative_thresholds, lambda config: None),
        ("dictionary_learning", "jumprelu", "jumprelu", negative_thresholds, lambda config: None),
    ],
)
def test_other_parametrisations(foreign, acts, source, sae_type, becomes, tensors, config):
    """Biases that our SAE type does not have, decoder rows with other norms, negative thresholds."""
    folder = foreign(source, sae_type, tensors, config)
    back = import_sae(folder, source)
    assert back.cfg["sae_type"] == becomes
    assert_same(ours(back, acts), FORWARD[source](folder, acts))


def test_decoder_norms_are_folded(foreign, acts):
    """The import normalises the decoder rows of an AutoEncoder, as the loader of dictionary_learning does."""
    folder = foreign("dictionary_learning", "vanilla", longer_rows)
    features, reconstruction = dictionary_learning_forward(folder, acts)
    norms = torch.load(folder / "ae.pt", weights_only=True)["decoder.weight"].norm(dim=0)
    assert_same(ours(import_sae(folder, "dictionary_learning"), acts), (features * norms, reconstruction))


@pytest.mark.parametrize("source", ["dictionary_learning", "published"])
def test_batchtopk_without_threshold_needs_calibration(foreign, acts, source, tmp_path, capsys):
    def forget(config):
        config.pop("threshold", None)

    def unset(tensors):
        if "threshold" in tensors:
            tensors["threshold"].fill_(-1)

    folder = foreign(source, "batchtopk", unset, forget)
    back = import_sae(folder, source)
    with pytest.raises(RuntimeError, match="threshold"):
        back.encode(acts)
    assert (back.train().encode(acts) > 0).sum() == 8 * len(acts)
    for to in ("saelens", "dictionary_learning"):
        with pytest.raises(InputError, match="no inference threshold"):
            export_sae(back, to, tmp_path / to)
    main([str(folder), "--from", source, "--out", str(tmp_path / "run")])
    assert "no inference threshold" in capsys.readouterr().out


# Refusals


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


def pickled_code(path):
    path.write_bytes(pickle.dumps(Code()))


def saved_code(path):
    torch.save({"W_enc": Code()}, path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def tensors(edit):
    return lambda path: edit_tensors(path, edit)


def config(**changes):
    return lambda path: edit_json(path, lambda content: content.get("trainer", content).update(changes))


def without(key):
    return lambda path: edit_json(path, lambda content: content.get("trainer", content).pop(key))


def set_nan(tensors):
    next(iter(tensors.values())).view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    "source, sae_type, file, corrupt, message",
    [
        ("published", "topk", "sae.pt", pickled_code, "other than tensors"),
        ("published", "topk", "sae.pt", saved_code, "other than tensors"),
        ("published", "topk", "sae.pt", cut_short, "corrupt"),
        ("published", "topk", "sae.pt", lambda path: torch.save([1], path), "not hold a state dict"),
        ("published", "topk", "sae.pt", lambda path: path.unlink(), "No such file"),
        ("published", "topk", "sae.pt", tensors(set_nan), "NaN"),
        ("published", "topk", "sae.pt", tensors(lambda t: t.pop("W_dec")), "W_dec is missing"),
        ("published", "topk", "sae.pt", tensors(lambda t: t.update(more=torch.zeros(1))), "more is"),
        ("published", "topk", "sae.pt", tensors(lambda t: t.update(W_enc=torch.zeros(1).expand(128, 256))), "larger"),
        ("published", "topk", "config.json", config(dict_size=128), r"W_enc is \[128, 256\].*must be \[128, 128\]"),
        ("published", "topk", "config.json", config(sae_type="quantile"), "sae_type = 'quantile'"),
        ("published", "topk", "config.json", config(tied_weights=True), "unknown config key 'tied_weights'"),
        ("published", "topk", "config.json", config(top_k="8"), "top_k = '8'"),
        ("published", "topk", "config.json", without("input_unit_norm"), "'input_unit_norm' is missing"),
        ("published", "batchtopk", "config.json", config(threshold=float("nan")), "NaN"),
        ("published", "topk", "config.json", lambda path: path.write_text("{"), "Expecting"),
        ("published", "topk", "config.json", lambda path: path.write_text("[]"), "cannot be read"),
        ("saelens", "topk", "cfg.json", config(architecture="gated"), "gated.*only standard, topk, jumprelu"),
        ("saelens", "topk", "cfg.json", config(normalize_activations="constant_norm_rescale"), "constant_norm"),
        ("saelens", "topk", "cfg.json", config(reshape_activations="hook_z"), "hook_z"),
        ("saelens", "topk", "cfg.json", config(rescale_acts_by_decoder_norm=True), "rescale"),
        ("saelens", "topk", "cfg.json", without("metadata"), "'metadata' is missing"),
        ("saelens", "topk", "cfg.json", config(d_in=64), "W_enc is"),
        ("saelens", "topk", "cfg.json", config(k=257), "top_k = 257"),
        ("saelens", "topk", "sae_weights.safetensors", tensors(set_nan), "NaN"),
        ("saelens", "topk", "sae_weights.safetensors", cut_short, "corrupt"),
        ("saelens", "topk", "sae_weights.safetensors", tensors(add_bias), "encoder bias"),
        (
            "saelens",
            "jumprelu",
            "sae_weights.safetensors",
            tensors(lambda t: t.pop("threshold")),
            "threshold is miss",
        ),
        ("dictionary_learning", "topk", "config.json", config(dict_class="GatedAutoEncoder"), "only AutoEncoder, "),
        ("dictionary_learning", "topk", "config.json", config(k=9), "k in ae.pt"),
        ("dictionary_learning", "topk", "config.json", config(submodule_name="x"), "submodule_name = 'x'"),
        ("dictionary_learning", "topk", "ae.pt", tensors(add_bias), "encoder bias"),
        ("dictionary_learning", "vanilla", "ae.pt", tensors(lambda t: t.pop("bias")), "b_dec is missing"),
        ("dictionary_learning", "vanilla", "ae.pt", pickled_code, "other than tensors"),
        ("dictionary_learning", "jumprelu", "ae.pt", tensors(set_nan), "NaN"),
    ],
)
def test_invalid_imports_are_refused(foreign, tmp_path, monkeypatch, source, sae_type, file, corrupt, message):
    """One line names the problem, and no code in the file is executed."""
    monkeypatch.chdir(tmp_path)
    folder = foreign(source, sae_type)
    corrupt(folder / file)
    with pytest.raises(InputError, match=message) as error:
        import_sae(folder, source)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("char", ["\x1b", "\n", "\r", "\x00", "\x7f", "\x9b"])
@pytest.mark.parametrize("where", ["model_name", "site", "dataset_path", "tensor"])
def test_no_control_character_reaches_the_terminal(foreign, tmp_path, monkeypatch, capsys, where, char):
    """A control character in a config value or tensor name is refused; the error shows it escaped, in one line."""
    hostile = f"blocks.2.hook_resid_pre{char}[31mred"
    if where == "tensor":
        folder = foreign("published", "topk", lambda tensors: tensors.update({hostile: torch.zeros(1)}))
    else:
        folder = foreign("published", "topk", config=lambda config: config.update({where: hostile}))
    monkeypatch.setattr(sys, "argv", ["export.py", str(folder), "--from", "published", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        run_command(main)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable()
    assert hostile.encode("unicode_escape").decode() in err and not (tmp_path / "run").exists()


def test_the_pickles_execute_code_if_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_code(tmp_path / "sae.pt")
    torch.load(tmp_path / "sae.pt", weights_only=False)
    assert (tmp_path / "code_was_run").exists()
