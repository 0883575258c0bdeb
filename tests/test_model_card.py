"""A model card has the numbers of its SAE and code that works. Only --upload uploads an export to the hub.

The hub is a local server (hub_server.py); the client is the real huggingface_hub.
"""

import json
import re
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import FOREIGN, ours, published_forward
from hub_server import UploadHub

import evaluation
import model_card
from checkpoint import save_sae
from config import get_default_cfg, post_init_cfg
from console import InputError
from export import export_sae, main, upload
from sae import SAE_CLASSES

TYPES = tuple(SAE_CLASSES)
TOKEN = "hf_of_this_test"


def make_sae(sae_type: str, **changes):
    """No parameter has its initial value, so that a test fails if a card's code loads something else."""
    cfg = get_default_cfg() | {"act_size": 16, "dict_size": 64, "top_k": 4, "l1_coeff": 0.01, "device": "cpu"}
    sae = SAE_CLASSES[sae_type](post_init_cfg(cfg | {"sae_type": sae_type} | changes)).eval()
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.1)
        if sae_type in ("vanilla", "jumprelu"):
            sae.b_enc.normal_(0, 0.1)
        if sae_type == "jumprelu":
            sae.jumprelu.log_threshold.normal_(-1, 0.1)
        if sae_type in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(0.54321)
            sae.threshold_num_batches.fill_(100)
    return sae


def make_run(folder: Path, sae, metrics: dict | None = None) -> Path:
    """A run's folder as training leaves it."""
    save_sae(sae, folder / "sae")
    (folder / "config.json").write_text(json.dumps(sae.cfg))
    if metrics is not None:
        (folder / "result.json").write_text(json.dumps(metrics))
    return folder


def some_metrics(shift: float = 0) -> dict:
    metrics = {key: shift + i / 7 for i, key in enumerate(model_card.METRIC_DEFINITIONS)}
    return metrics | {f"{key}_se": value / 100 for key, value in metrics.items()}


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def rows(card: str) -> dict:
    return dict(re.findall(r"^\| `(\w+)` +\| `?(.*?)`? +\|", card, re.MULTILINE))


# The card


@pytest.mark.parametrize("to", [*FOREIGN, "safetensors"])
@pytest.mark.fast
def test_metadata(tmp_path, to):
    """huggingface_hub reads the metadata: names are hub names, the license is left open."""
    export_sae(
        make_sae("topk", input_unit_norm=False),
        to,
        tmp_path / "out",
        make_run(tmp_path, make_sae("topk"), {"tokens": 9}),
    )
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == (to if to in ("saelens", "dictionary_learning") else "batchtopk")
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["Skylion007/openwebtext"])
    assert {"sparse-autoencoder", "topk"} <= set(card.data.tags) and card.data.license is None
    assert "# TopK SAE with 64 features, blocks.8.hook_resid_pre of gpt2-small" in card.text


def test_local_paths_are_not_in_the_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "lm").mkdir(parents=True)
    for name, dataset in [("some/lm", "some/text.jsonl"), (str(tmp_path / "lm"), str(tmp_path / "text"))]:
        sae = make_sae("topk", model_name=name, dataset_path=dataset)
        run = make_run(tmp_path / "run", sae, some_metrics() | {"tokens": 9})
        (tmp_path / "card.md").write_text(model_card.model_card(sae, "saelens", run), encoding="utf-8")
        data = huggingface_hub.ModelCard.load(tmp_path / "card.md").data
        assert data.base_model is None and data.datasets is None


def test_metrics(tmp_path):
    """They are from evaluation.json, else from result.json; for the published scripts with the top k of the batch."""
    sae, metrics = make_sae("batchtopk"), some_metrics()
    batch = {re.sub("(_se)?$", r"_batch\1", key, count=1): value + 0.5 for key, value in metrics.items()}
    batch = {key: value for key, value in batch.items() if "ce_original" not in key}  # it is the model's alone
    run = make_run(tmp_path / "run", sae, metrics | batch | {"tokens": 1_234_944, "steps": 3, "seconds": 4.5})
    card = model_card.model_card(sae, "saelens", run)
    assert "trained on 1,234,944 tokens of `Skylion007/openwebtext`" in card
    assert "first 65,536 tokens of `Skylion007/openwebtext`, held out from training" in card
    for key in model_card.METRIC_DEFINITIONS:
        assert rows(card)[key] == f"{metrics[key]:.4f} ± {metrics[f'{key}_se']:.4f}"
    assert "f = z where z > 0.54321, else 0" in card and "4·B largest" in card
    published = model_card.model_card(sae, "published", run)
    assert rows(published)["nmse"].startswith(f"{batch['nmse_batch']:.4f}") and "0.54321" not in published
    assert rows(published)["ce_original"] == rows(card)["ce_original"]

    newer = {"eval_tokens": 2560} | some_metrics(3)
    (run / "evaluation.json").write_text(json.dumps(newer))
    card = model_card.model_card(sae, "saelens", run)
    assert rows(card)["fvu"] == f"{newer['fvu']:.4f} ± {newer['fvu_se']:.4f}"
    assert "first 2,560 tokens" in card and "trained on 1,234,944" in card
    (run / "result.json").write_text("{")
    with pytest.raises(InputError, match="result.json is corrupt"):
        main([str(run), "--to", "saelens", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_metrics_have_the_names_of_evaluation():
    """Every metric on the card is defined in evaluation.py."""
    text = evaluation.__doc__
    assert all(re.search(rf"\b{key}\b", text) for key in model_card.METRIC_DEFINITIONS)


def test_config(tmp_path):
    """The card has the keys that affect the result; keys unused by the SAE type and local folders are left out."""
    sae = make_sae("jumprelu", bandwidth=0.25, lr=0.125, output_dir="/home/me/runs", activation_cache="/home/me/cache")
    run = make_run(tmp_path / "run", sae, {"tokens": 9})
    for to in ("saelens", "published", "safetensors"):
        export_sae(sae, to, tmp_path / to, run)
        config = rows(card_of(tmp_path / to))
        assert (config["bandwidth"], config["lr"], config["hook_point"]) == ("0.25", "0.125", sae.cfg["hook_point"])
        assert "top_k" not in config and "log_freq" not in config
        assert not any("/home/me" in path.read_text(errors="ignore") for path in (tmp_path / to).iterdir())


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "x` | [click](http://evil) | `", "a\u202eb", "<!-- "])
def test_names_are_not_rendered_as_markup(tmp_path, hostile):
    """Names in an untrusted config change nothing but their own text: markup in them is replaced."""
    names = [f"lm {hostile}", f"text {hostile}", f"blocks.8.{hostile}"]
    harmless = ["".join(c if c.isprintable() and c not in "<>`|[]" else "\ufffd" for c in name) for name in names]
    cards = []
    for model_name, dataset_path, site in (names, harmless):
        sae = make_sae("topk", model_name=model_name, dataset_path=dataset_path, site=site)
        run = make_run(tmp_path / f"run{len(cards)}", sae, some_metrics() | {"tokens": 9})
        cards.append(model_card.model_card(sae, "saelens", run))
    assert cards[0] == cards[1] and all(name in cards[0] for name in harmless)


def test_unknown_training_is_not_made_up(tmp_path):
    """The card of an SAE trained elsewhere does not present default config values as its own."""
    export_sae(make_sae("topk"), "published", tmp_path / "theirs")
    main([str(tmp_path / "theirs"), "--from", "published", "--out", str(tmp_path / "run")])
    main([str(tmp_path / "run"), "--to", "saelens", "--out", str(tmp_path / "out")])
    card = card_of(tmp_path / "out")
    assert "No metrics are recorded." in card and "training is not recorded" in card
    assert "openwebtext" not in card and "lr" not in rows(card) and rows(card)["dict_size"] == "64"
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(some_metrics()))
    card = model_card.model_card(make_sae("topk"), "saelens", tmp_path / "run")
    assert "nmse" in rows(card) and "held out" not in card


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sae_type", TYPES)
def test_loading_code_of_our_own_format(tmp_path, monkeypatch, sae_type, dtype):
    """It runs unchanged in the folder and computes the same as the SAE."""
    sae = make_sae(sae_type, dtype=dtype)
    export_sae(sae, "safetensors", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    exec(code_of(card_of(tmp_path / "out")), names := {})
    features, reconstruction = ours(sae, names["x"])
    assert torch.equal(names["features"], features) and (features > 0).any()
    torch.testing.assert_close(names["reconstruction"], reconstruction)


@pytest.mark.parametrize("sae_type", TYPES)
def test_loading_code_for_the_published_scripts(tmp_path, monkeypatch, sae_type):
    """Their sae.py has a class per SAE type, which takes the config with a torch dtype."""
    sae = make_sae(sae_type)

    class Theirs(torch.nn.Module):
        def __init__(self, cfg):
            super().__init__()
            assert cfg["dtype"] is torch.float32
            for name, parameter in sae.named_parameters():
                self.register_buffer(name.replace(".", "/"), torch.empty_like(parameter))

        def load_state_dict(self, tensors):
            super().load_state_dict({name.replace(".", "/"): tensor for name, tensor in tensors.items()})

        def forward(self, x):
            features, reconstruction = published_forward(tmp_path / "out", x)
            return {"feature_acts": features, "sae_out": reconstruction}

    export_sae(sae, "published", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    name = "BatchTopKSAE" if sae_type == "matryoshka" else type(sae).__name__
    monkeypatch.setitem(sys.modules, "sae", types.SimpleNamespace(**{name: Theirs}))
    exec(code_of(card_of(tmp_path / "out")), names := {})
    assert names["features"].shape == (4, 64) and names["reconstruction"].shape == (4, 16)


# Upload


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on which a user is logged in."""
    with UploadHub(tmp_path / "hub", TOKEN, "me") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def test_export_upload_and_load_from_the_hub(tmp_path, program):
    """A user uploads an export, and the code on the card downloads and loads it: in processes of their own, because the
    client reads HF_ENDPOINT at import.
    """
    sae, env = make_sae("batchtopk"), program.env | {"HF_TOKEN": TOKEN}
    run, out = make_run(tmp_path / "run", sae, some_metrics() | {"tokens": 9}), tmp_path / "out"
    with UploadHub(tmp_path / "hub", TOKEN, "me", program.port) as hub:
        arguments = (run, "--to", "safetensors", "--out", out, "--upload", "me/an-sae")
        done = program.run("export.py", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        assert f"Uploaded {out} to {hub.url}/me/an-sae, which is private" in done.stdout
        assert hub.commits == [{"README.md": "regular", "cfg.json": "regular", "sae_weights.safetensors": "lfs"}]
        for path in out.iterdir():
            assert (hub.folder / "me" / "an-sae" / path.name).read_bytes() == path.read_bytes()
        code = code_of(card_of(out)) + "print(features.shape[1], reconstruction.shape[1], sae.threshold.item())"
        assert 'snapshot_download("me/an-sae")' in code
        done = program.run("-c", code, env=env)
    assert done.stdout.split() == ["64", "16", str(sae.threshold.item())], done.stderr


@pytest.mark.fast
def test_upload_of_an_edited_card_to_a_public_repository(tmp_path, hub, capsys):
    """An existing public repository stays public, which is printed."""
    export_sae(make_sae("topk"), "saelens", tmp_path / "out")
    hub.visibility["me/seen"] = "public"
    card = tmp_path / "out" / "README.md"
    card.write_text(card_of(tmp_path / "out").replace("# license: choose", "license: mit #"), encoding="utf-8")
    main([str(tmp_path / "out"), "--upload", "me/seen"])
    assert capsys.readouterr().out.endswith("which is public\n") and hub.visibility["me/seen"] == "public"
    data = huggingface_hub.ModelCard.load(hub.folder / "me" / "seen" / "README.md").data
    assert data.license == "mit" and data.library_name == "saelens"


def test_nothing_is_sent_without_upload(tmp_path, hub):
    for to in (*FOREIGN, "safetensors"):
        export_sae(make_sae("topk", input_unit_norm=False), to, tmp_path / to)
    main([str(make_run(tmp_path / "run", make_sae("topk"))), "--to", "saelens", "--out", str(tmp_path / "out")])
    main([str(tmp_path / "out"), "--from", "saelens", "--out", str(tmp_path / "back")])
    assert hub.requests == []


def test_refusals_before_anything_is_written(tmp_path, hub, monkeypatch):
    run = make_run(tmp_path / "run", make_sae("topk"))
    export = [str(run), "--to", "saelens", "--out", str(tmp_path / "out"), "--upload"]
    for repo in ("an-sae", "me/", "me/an sae", "me/a/b", "", "https://huggingface.co/me/an-sae"):
        with pytest.raises(InputError, match=re.escape(f"--upload {repo!r} must be NAMESPACE/NAME")):
            main([*export, repo])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="needs a login.*hf auth login"):
        main([*export, "me/an-sae"])
    assert not (tmp_path / "out").exists() and hub.requests == []


def test_refusals_of_the_hub(tmp_path, hub, monkeypatch):
    """One line each for an invalid token, another user's namespace, a bad card, no hub, no export; then it works."""
    out, card = tmp_path / "out", tmp_path / "out" / "README.md"
    export_sae(make_sae("topk"), "safetensors", out)

    def refused(match, folder=out, repo="me/an-sae"):
        with pytest.raises(InputError, match=match) as error:
            upload(folder, repo)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)

    refused("no permission", repo="you/an-sae")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_old")
        refused("not valid; log in again")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        refused("http://127.0.0.1:9 cannot be reached")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refused("cannot be reached.*offline mode")
    written = card_of(out)
    card.write_text(written.replace("# license:", "license: nonsense #"), encoding="utf-8")
    refused('Invalid metadata.*"license" must be one of')
    refused("not an export", folder=make_run(tmp_path / "run", make_sae("topk")))
    refused("not an export", folder=tmp_path / "nothing")
    assert not hub.commits
    card.write_text(written, encoding="utf-8")
    assert "private" in upload(out, "me/an-sae") and len(hub.commits) == 1


@pytest.mark.parametrize("arguments", [
    ["DIR"], ["DIR", "--to", "saelens"], ["DIR", "--upload", "me/x", "--out", "OUT"],
    ["DIR", "--from", "saelens", "--out", "OUT", "--upload", "me/x"], ["DIR", "--to", "saelens", "--from", "saelens"],
])  # fmt: skip
def test_wrong_combinations(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(r"error: .*--(to|out)", capsys.readouterr().err)
