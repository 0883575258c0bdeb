"""The language model is run up to the hook point and no further, whatever its architecture."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    BOS,
    DEMO_LM,
    REPO,
    SEQ_LEN,
    all_contexts,
    counted_batches,
    one_line,
    reference_contexts,
    store_error,
    stream_cfg,
)
from transformer_lens.supported_models import MODEL_ALIASES

import language_model
from activation_store import ActivationsStore
from checkpoint import load_sae, save_sae
from console import InputError
from export import export_sae
from language_model import (
    UNFUSED_GELU,
    Loader,
    Predictor,
    check_hook_point,
    complete_cfg,
    hub_name,
    load_model,
    run_bridge_to_hook,
)
from sae import SAE_CLASSES


def test_transformer_lens_is_imported_when_a_model_is_loaded():
    """That takes seconds, which `python main.py --list` and a mistake on the command line need not cost."""
    for module in REPO.glob("*.py"):
        for node in ast.parse(module.read_text()).body:
            names = [getattr(node, "module", "") or "", *(alias.name for alias in getattr(node, "names", []))]
            assert not [name for name in names if name.startswith("transformer_lens")], module


# Tokens -> activations


@torch.no_grad()
def reference_activations(hf_model, contexts, site: str, layer: int) -> torch.Tensor:
    """The activations of the transformers model at the site, without transformer_lens."""
    seen, block = {}, hf_model.transformer.h[layer]
    handles = [
        block.attn.register_forward_hook(lambda module, args, output: seen.update(attn_out=output[0])),
        block.mlp.register_forward_hook(lambda module, args, output: seen.update(mlp_out=output)),
        block.ln_2.register_forward_hook(lambda module, args, output: seen.update(resid_mid=args[0])),
    ]
    hidden = hf_model(contexts, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return {"resid_pre": hidden[layer], "resid_post": hidden[layer + 1], **seen}[site]


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"])
@pytest.mark.fast
def test_sites_have_the_right_activations(model, hf_model, jsonl, texts, site):
    """Each site, also by its full hook name, gives the activations of the transformers model there."""
    path = jsonl(texts)
    store = ActivationsStore(model, stream_cfg(dataset_path=path, site=site, layer=1))
    contexts = store.get_batch_tokens()
    acts = store.get_activations(contexts)
    assert acts.shape == (3, SEQ_LEN, 128)
    torch.testing.assert_close(acts, reference_activations(hf_model, contexts, site, 1), rtol=1e-4, atol=1e-5)
    by_name = ActivationsStore(model, stream_cfg(dataset_path=path, site=f"blocks.1.hook_{site}", layer=3))
    assert torch.equal(by_name.get_activations(contexts), acts)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "blocks.2.ln2.hook_normalized", "blocks.2.mlp.hook_post"])
def test_activations_equal_run_with_cache(model, counted, site):
    """get_activations equals run_with_cache, for any width and for full hook names."""
    cfg = stream_cfg(dataset_path=counted, site=site, act_size=None)
    store = ActivationsStore(model, cfg)
    contexts = store.eval_contexts
    _, cache = model.run_with_cache(contexts, names_filter=[cfg["hook_point"]], stop_at_layer=cfg["layer"] + 1)
    # Fused attention sums in a different order.
    torch.testing.assert_close(store.get_activations(contexts), cache[cfg["hook_point"]], rtol=1e-4, atol=1e-5)
    assert store.act_size == cache[cfg["hook_point"]].shape[-1]


def test_layers_above_the_hook_point_are_not_run(model, counted):
    """The forward pass stops at the hook point: neither the rest of its block nor later blocks are called."""
    store = ActivationsStore(model, stream_cfg(dataset_path=counted))  # resid_pre of block 2
    called, blocks = [], model.plain.transformer.h
    handles = [
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, part in {"1": blocks[1], "2.attn": blocks[2].attn, "3": blocks[3]}.items()
    ]
    store.get_activations(store.eval_contexts)
    harvesting = list(called)
    model.plain(store.eval_contexts)
    for handle in handles:
        handle.remove()
    assert harvesting == ["1"]
    assert called == ["1", "1", "2.attn", "3"], "a full forward pass does call them"


def test_the_plain_model_and_the_bridge_share_their_weights(model):
    """The weights are in memory once."""
    plain = {name: tensor.data_ptr() for name, tensor in model.plain.named_parameters()}
    bridge = {tensor.data_ptr() for tensor in model.original_model.parameters()}
    assert plain and set(plain.values()) <= bridge


def test_gelu_is_fused(model):
    """In the plain model; it is the function that GPT-2 computes in eight passes."""
    plain = [module for block in model.plain.transformer.h for module in block.mlp.modules()]
    assert sum(isinstance(module, torch.nn.GELU) for module in plain) == len(model.plain.transformer.h)
    assert not any(isinstance(module, UNFUSED_GELU) for module in model.plain.modules())
    x, fused = 3 * torch.randn(10_000, dtype=torch.float64), model.plain.transformer.h[0].mlp.act
    for unfused in UNFUSED_GELU:
        assert torch.allclose(fused(x), unfused()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", ["blocks.2.ln2.hook_normalized", "blocks.2.mlp.hook_post"])
def test_hook_points_that_only_the_bridge_has(model, counted, capsys, site):
    """If the plain model has no such module, the bridge is run and this is reported; the results are bit-identical."""
    cfg = stream_cfg(dataset_path=counted, site=site, act_size=None)
    store = ActivationsStore(model, cfg)
    assert "which is slower" in capsys.readouterr().err
    _, cache = model.run_with_cache(store.eval_contexts, names_filter=[site], stop_at_layer=cfg["layer"] + 1)
    assert torch.equal(store.get_activations(store.eval_contexts), cache[site])


def test_harvesting_does_not_change_the_model(model, counted):
    """No hook remains, the model stays in eval mode without gradients, and a full forward pass gives the same."""

    def hooks_of_plain():
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.plain.modules()]

    before, hooks = model(torch.arange(20)[None]), hooks_of_plain()
    counted_batches(model, counted)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    assert hooks_of_plain() == hooks
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(torch.arange(20)[None]), before)


# Other language models


def copy_of_demo_lm(folder: Path, without: tuple = ()) -> Path:
    shutil.copytree(DEMO_LM, folder)
    for file in without:
        (folder / file).unlink()
    return folder


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_other_architectures(tmp_path, jsonl, texts, tokens, family):
    """A model of another architecture loads from its directory and is harvested at the right layer."""
    folder = copy_of_demo_lm(tmp_path / "lm", without=("model.safetensors",))
    config = getattr(transformers, f"{family}Config")(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=BOS, eos_token_id=BOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    hf_model.save_pretrained(folder)

    cfg = stream_cfg(model_name=str(folder), dataset_path=jsonl(texts), layer=1, act_size=32)
    store = ActivationsStore(load_model(cfg), cfg)
    contexts = store.get_batch_tokens()
    assert torch.equal(contexts, reference_contexts(tokens, SEQ_LEN, 3)[1][:3])
    with torch.no_grad():
        hidden = hf_model(contexts, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(store.get_activations(contexts), hidden, rtol=1e-4, atol=1e-5)
    assert store.next_batch().shape == (40, 32)


def lm_without_bos(folder: Path) -> Path:
    copy_of_demo_lm(folder)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        for key in ("bos_token", "eos_token", "unk_token", "bos_token_id", "eos_token_id"):
            content.pop(key, None)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("other_name", [False, True])
def test_a_tokenizer_without_bos(tmp_path, jsonl, texts, tokens, capsys, other_name):
    """Documents are concatenated without BOS, which is reported."""
    folder = lm_without_bos(tmp_path / "lm")
    if other_name:  # without the token that often replaces BOS
        path = folder / "tokenizer.json"
        path.write_text(path.read_text(encoding="utf-8").replace("<|endoftext|>", "<|sep|>"), encoding="utf-8")
    cfg = stream_cfg(model_name=str(folder), dataset_path=jsonl(texts))
    store = ActivationsStore(load_model(cfg), cfg)
    assert "no BOS" in capsys.readouterr().err
    heldout, rest = reference_contexts([document[1:] for document in tokens], SEQ_LEN, 3)
    assert torch.equal(store.eval_contexts, heldout)
    assert torch.equal(all_contexts(store), rest)
    store = ActivationsStore(store.model, cfg)
    assert torch.isfinite(store.next_batch()).all()


def exports_of(sae, tmp_path: Path) -> tuple[dict, str]:
    """The metadata of an SAE's SAELens export, and its model card."""
    run = tmp_path / "run"
    save_sae(sae, run / "sae")
    (run / "result.json").write_text(json.dumps({"tokens": 400, "nmse": 0.5}))
    export_sae(load_sae(run), "saelens", tmp_path / "out", run)
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    return metadata, (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("bos_per_context", [False, True])
def test_exports_of_an_sae_on_a_model_without_bos_say_so(tmp_path, jsonl, texts, bos_per_context):
    """Config, SAELens export and model card do not claim a BOS; the run's name is unchanged."""
    folder = str(lm_without_bos(tmp_path / "lm"))
    cfg = stream_cfg(sae_type="topk", model_name=folder, dataset_path=jsonl(texts), bos_per_context=bos_per_context)
    complete = complete_cfg(cfg, load_model(cfg))
    assert complete["name"] == cfg["name"] and complete["bos_per_context"] is False
    metadata, card = exports_of(SAE_CLASSES["topk"](complete), tmp_path)
    assert metadata["prepend_bos"] is False and metadata["sequence_separator_token"] is None
    assert "without BOS, as the model has none" in card
    assert re.search(r"\| `bos_per_context` +\| `False` +\|", card)


def test_exports_of_an_sae_on_a_model_with_bos(model, tmp_path, counted):
    cfg = complete_cfg(stream_cfg(sae_type="topk", dataset_path=counted), model)
    assert cfg == stream_cfg(sae_type="topk", dataset_path=counted), "nothing to change"
    metadata, card = exports_of(SAE_CLASSES["topk"](cfg), tmp_path)
    assert metadata["sequence_separator_token"] == "bos" and "each preceded by BOS" in card


# Names


def test_every_name_of_transformer_lens_is_known():
    """Each alias is resolved to the name on the hub; hub names and other names are unchanged."""
    for official, aliases in MODEL_ALIASES.items():
        assert {hub_name(alias) for alias in aliases} <= MODEL_ALIASES.keys() and hub_name(official) == official
    assert (hub_name("gpt2-small"), hub_name("pythia-70m")) == ("gpt2", "EleutherAI/pythia-70m")
    assert hub_name("someone/lm") == "someone/lm"


def test_a_local_folder_is_not_mistaken_for_an_alias(tmp_path, monkeypatch, counted):
    """A folder with the name of an alias of transformer_lens is loaded like any other folder."""
    copy_of_demo_lm(tmp_path / "pythia-70m")
    monkeypatch.chdir(tmp_path)
    cfg = stream_cfg(model_name="pythia-70m", dataset_path=counted)
    assert ActivationsStore(load_model(cfg), cfg).next_batch().shape == (40, 128)


def test_exports_name_the_model_as_the_hub_does(tmp_path):
    sae = SAE_CLASSES["topk"](stream_cfg(sae_type="topk", model_name="pythia-70m"))
    metadata, card = exports_of(sae, tmp_path)
    assert metadata["model_name"] == "EleutherAI/pythia-70m"
    assert "base_model: EleutherAI/pythia-70m\n" in card and "of `EleutherAI/pythia-70m`." in card


# Precision


@pytest.mark.parametrize("dtype, fast, lines", [("float32", False, 0), ("bfloat16", True, 0), ("bfloat16", False, 1)])
def test_a_slow_model_dtype_is_reported(monkeypatch, capsys, dtype, fast, lines):
    monkeypatch.setattr(language_model, "screen_dtype", lambda device: torch.bfloat16 if fast else torch.float32)
    assert load_model(stream_cfg(model_dtype=dtype)).cfg.dtype == getattr(torch, dtype)
    assert capsys.readouterr().err.count("model_dtype = bfloat16 is slow on this CPU") == lines


@pytest.mark.parametrize("fast", [False, True])
def test_float16_is_slow_on_a_cpu_without_fp16_instructions(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": fast}, raising=False)
    assert (language_model.slow_dtype("cpu", "float16") is None) == fast
    assert language_model.slow_dtype("cuda", "float16") is None


# Bad input


def test_act_size_and_layer_that_do_not_fit(model, counted):
    """A wrong act_size or layer is an error at once, which names the value and the valid ones."""
    message = store_error(model, dataset_path=counted, act_size=64)
    assert "act_size = 64" in message and "128" in message
    message = store_error(model, dataset_path=counted, layer=4)
    assert "blocks.4.hook_resid_pre" in message and "0 to 3" in message
    assert "blocks.1.hook_nothing" in store_error(model, dataset_path=counted, site="blocks.1.hook_nothing")
    assert check_hook_point(model, stream_cfg(act_size=None)) == 128


@pytest.mark.parametrize("site", ["blocks.1.attn.hook_pattern", "blocks.1.hook_q_input", "blocks.1.attn.hook_result"])
@pytest.mark.fast
def test_hook_points_that_give_no_residual_vectors(model, counted, site):
    """A hook point that exists but cannot be harvested is an InputError with its name."""
    assert site in store_error(model, dataset_path=counted, site=site)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_block(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {name: tensor for name, tensor in load_file(path).items() if ".h.1." not in name}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "file, corrupt, pattern",
    [
        ("config.json", Path.unlink, r"no config\.json"),
        ("config.json", lambda path: path.write_text("{broken"), "cannot be loaded"),
        ("model.safetensors", Path.unlink, "no weights"),
        ("model.safetensors", lambda path: path.write_bytes(b"garbage" * 99), "cannot be loaded"),
        ("model.safetensors", truncate, "cannot be loaded"),
        ("model.safetensors", drop_a_block, "weights"),
        ("tokenizer.json", Path.unlink, "no tokenizer"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "cannot be loaded"),
    ],
)
def test_bad_model_directory_is_one_clear_line(tmp_path, file, corrupt, pattern):
    """A model directory that is incomplete or corrupt is an InputError that names it; no weights are initialized."""
    folder = copy_of_demo_lm(tmp_path / "lm")
    corrupt(folder / file)
    with pytest.raises(InputError, match=pattern) as caught:
        load_model(stream_cfg(model_name=str(folder)))
    assert f"model_name = {str(folder)!r}" in one_line(caught)


@pytest.mark.fast
def test_missing_model_directory(tmp_path):
    """A path that does not exist is an InputError, not a request to the hub."""
    with pytest.raises(InputError, match="no such folder") as caught:
        load_model(stream_cfg(model_name=str(tmp_path / "none")))
    assert str(tmp_path / "none") in one_line(caught)


# From the hook point on


@pytest.mark.parametrize(
    "hook_point, below",
    [("blocks.2.hook_resid_pre", 2), ("blocks.1.hook_resid_post", 2), ("blocks.3.hook_resid_post", 4)]
    + [("blocks.0.hook_resid_pre", 0), ("blocks.2.hook_mlp_out", 0), ("blocks.1.hook_resid_mid", 0)],
)
@pytest.mark.fast
def test_predictions_equal_those_of_the_whole_model(model, hook_point, below):
    """With the model's own and with other activations; the model is unchanged afterwards."""
    ids = torch.randint(model.cfg.d_vocab, (3, 20), generator=torch.Generator().manual_seed(1))
    acts, predictor = run_bridge_to_hook(model, ids, hook_point), Predictor(model, hook_point)
    assert len(predictor.below) == below
    others = acts * 0.7 + torch.randn(acts.shape, generator=torch.Generator().manual_seed(2))
    whole = model.run_with_hooks(ids, return_type="logits", fwd_hooks=[(hook_point, lambda _, hook: others)])
    torch.testing.assert_close(predictor(ids, others), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predictor(ids, acts), model(ids), rtol=1e-4, atol=1e-4)
    assert (whole - model(ids)).abs().max() > 0.1
    torch.testing.assert_close(model.plain(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_the_bridge_is_used_if_the_blocks_disagree(model, monkeypatch):
    """The result is the same."""
    hook_point = "blocks.2.hook_resid_pre"
    ids = torch.arange(12).view(2, 6)
    acts = run_bridge_to_hook(model, ids, hook_point)
    expected = Predictor(model, hook_point)(ids, acts * 0.5)
    monkeypatch.setattr(Predictor, "as_output", lambda self, acts: acts * 1.01)
    predictor = Predictor(model, hook_point)
    assert not predictor.below
    torch.testing.assert_close(predictor(ids, acts * 0.5), expected, rtol=1e-4, atol=1e-4)


# Code in a model's repository


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model whose config refers to its own code, which would write a marker; prompts to run it are answered yes."""
    folder = tmp_path / "lm"
    shutil.copytree(DEMO_LM, folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda question: "y")

    def change(file: str, **keys) -> Path:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return folder

    yield change
    assert not (tmp_path / "marker").exists(), "its code was run"


def test_a_model_that_needs_its_own_code(with_code):
    """It is an error in one line."""
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    folder = with_code("config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(InputError) as caught:
        load_model(stream_cfg(model_name=str(folder)))
    assert one_line(caught).startswith(f"model_name = {str(folder)!r} needs Python code from its repository")


def test_weights_never_run_code(with_code):
    """There is no prompt either; by default there is one for a known config without a known model class."""
    folder = with_code("config.json", model_type="vit", auto_map={"AutoModelForCausalLM": "own.Own"})
    with pytest.raises(ValueError, match="custom code"):
        Loader().from_pretrained(str(folder))


def test_the_tokenizer_never_runs_code(monkeypatch):
    """By default there is a prompt if a tokenizer needs code and transformers has no class for its model."""
    real, trusted = transformers.AutoTokenizer.from_pretrained, []

    def from_pretrained(*args, **options):
        trusted.append(options.get("trust_remote_code"))
        return real(*args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    load_model(stream_cfg())
    assert trusted and set(trusted) == {False}
