"""The training loop: reproducible, the same in any group, undisturbed by evaluation, and completely recorded."""

import io
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import BATCH, SAES, STEPS, figures, lines_of, same_bits, set_threshold, train

import training
from activation_store import ActivationsStore
from checkpoint import load_sae
from config import post_init_cfg
from console import InputError
from evaluation import evaluate, heldout_baseline, recorded_metrics
from export import export_sae
from files import write_json
from logs import is_finished, run_folder
from sae import SAE_CLASSES
from training import train_sae, train_sae_group
from training_step import learning_rate, make_optimizer, training_step

METRICS = {
    "nmse", "fvu", "l0", "dead_fraction", "ce_original", "ce_reconstructed", "ce_degradation", "recovery_from_zero",
    "recovery_from_mean", "tokens", "steps", "seconds",
}  # fmt: skip


# Reproducible


@pytest.mark.fast
def test_same_seed_same_bits(model, training_cfg):
    """The same configs give bit-identical weights, buffers and figures, whatever the global random state."""
    runs = []
    for i in (1, 2):
        torch.manual_seed(i)
        runs.append(train(model, [training_cfg(f"again{i}", **changes) for changes in SAES]))
    (saes, results), (others, other_results) = runs
    assert all(same_bits(sae, other) for sae, other in zip(saes, others))
    assert list(map(figures, results)) == list(map(figures, other_results))


def test_recording_does_not_change_the_weights(model, training_cfg):
    """Evaluating, logging and saving at every step or never gives bit-identical weights and final figures."""
    often, never = (dict(perf_log_freq=n, log_freq=n, checkpoint_freq=n) for n in (1, 1000))
    runs = [
        train(model, [training_cfg(n, **changes, **f) for changes in SAES]) for n, f in [("a", often), ("b", never)]
    ]
    (saes, results), (others, other_results) = runs
    assert all(same_bits(sae, other) for sae, other in zip(saes, others))
    assert list(map(figures, results)) == list(map(figures, other_results))


def test_an_sae_is_the_same_in_any_group(model, training_cfg):
    """Trained in a group or alone by train_sae, an SAE has bit for bit the same weights and the same figures."""
    saes, results = train(model, [training_cfg("together", **changes) for changes in SAES])
    for sae, result, changes in zip(saes, results, SAES):
        cfg = training_cfg("alone", **changes)
        alone = SAE_CLASSES[cfg["sae_type"]](cfg)
        result_alone = train_sae(alone, ActivationsStore(model, cfg), model, cfg)
        assert same_bits(sae, alone), changes
        assert figures(result_alone) == figures(result), changes


def test_an_sae_in_eval_is_trained_as_one_in_train(model, training_cfg):
    """A BatchTopK then keeps the top k of the batch, not what exceeds its threshold."""
    saes = []
    for training_mode in (True, False):
        cfg = training_cfg(str(training_mode), **SAES[2])
        saes.append(SAE_CLASSES["batchtopk"](cfg).train(training_mode))
        set_threshold(saes[-1], 10.0)
        train_sae(saes[-1], ActivationsStore(model, cfg), model, cfg)
    assert same_bits(*saes)


def test_training_learns(model, training_cfg):
    """Held-out error falls with training: the loop does train on the language model's activations."""
    short, long = (
        train(model, [training_cfg(**changes, num_tokens=steps * BATCH) for changes in SAES[:3]])[1]
        for steps in (2, 60)
    )
    for few, many in zip(short, long):
        assert many["nmse"] < 0.8 * few["nmse"]


@pytest.mark.parametrize("warmup, decay", [(0, 0), (5, 0), (0, 4), (5, 4), (1, 1), (12, 0), (6, 6)])
def test_warmup_and_decay(model, training_cfg, warmup, decay):
    """The rate rises from 0 over the first steps and falls to 0 over the last: as a plain loop with it written out."""
    rising = [(i + 1) / warmup for i in range(warmup)]
    falling = [(decay - i) / decay for i in range(decay)]
    rates = [3e-3 * factor for factor in rising + [1.0] * (STEPS - warmup - decay) + falling]
    cfg = training_cfg(sae_type="batchtopk", top_k=4, lr_warmup_steps=warmup, lr_decay_steps=decay)
    other = training_cfg("plain", sae_type="batchtopk", top_k=4)
    plain, store = SAE_CLASSES["batchtopk"](other), ActivationsStore(model, other)
    optimizer = make_optimizer(plain, other)
    for i, rate in enumerate(rates):
        assert learning_rate(cfg, i + 1) == rate
        optimizer.param_groups[0]["lr"] = rate
        training_step(plain, optimizer, store.next_batch(), other)
    assert same_bits(plain, train(model, [cfg])[0][0])


# Records


def test_the_table_while_it_trains(model, training_cfg, capsys):
    """At each evaluation but the last: tokens so far and a line per SAE, aligned, with the numbers of its record."""
    cfgs = [training_cfg(**changes, log_freq=1, perf_log_freq=4) for changes in SAES]
    train(model, cfgs)
    err = capsys.readouterr().err.replace("\r", "\n")
    tables = re.findall(r"After (\d+) tokens:\n((?:\S+(?: .*)\n)+)", err)
    assert [int(tokens) for tokens, _ in tables] == [4 * BATCH, 8 * BATCH]
    for tokens, table in tables:
        head, *lines = table.splitlines()[: len(cfgs) + 1]
        assert re.split("  +", head) == ["SAE", "loss", "NMSE", "L0", "CE degradation", "dead"]
        assert len({len(line) for line in (head, *lines)}) == 1
        for cfg, line in zip(cfgs, lines, strict=True):
            (values,) = (values for values in lines_of(run_folder(cfg)) if values["tokens"] == int(tokens))
            name, loss, nmse, l0, ce_degradation, dead = line.split()
            assert name == cfg["name"].rpartition("_")[0], "without its hash"
            assert float(loss) == round(values["loss"], 4) and float(nmse) == round(values["nmse"], 4)
            assert float(l0) == round(values["l0"], 1) and float(ce_degradation) == round(values["ce_degradation"], 4)
            assert float(dead.rstrip("%")) == round(100 * values["num_dead_features"] / cfg["dict_size"], 1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_the_numbers_of_its_step(model, training_cfg, monkeypatch):
    """The loss beside the number of tokens is that of the step that reached it."""
    (cfg,), real = [training_cfg(**SAES[0], log_freq=1, perf_log_freq=100)], training.group_step
    monkeypatch.setattr(training, "group_step", lambda *args: time.sleep(0.15) or real(*args))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        train(model, [cfg])
        shown = re.findall(r"([\d.]+)/\d+ \[[^]]*loss ([\d.]+)", sys.stderr.getvalue())
    losses = {values["tokens"]: f"{values['loss']:.3f}" for values in lines_of(run_folder(cfg))}
    assert len(shown) >= STEPS and all(losses[float(tokens)] == loss for tokens, loss in shown)


def test_training_needs_only_write_and_flush_of_stderr(model, training_cfg, monkeypatch):
    written = []
    stderr = SimpleNamespace(write=written.append, flush=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        train(model, [training_cfg(**SAES[0])])
    assert any("tok/s" in text for text in written)


def test_names_in_the_table_that_differ_in_the_hash_alone():
    rows = [("topk_64_k4_seed49_0a", "1"), ("topk_64_k4_seed49_0b", "2")]
    assert "seed49_0a   " in training.progress_table(rows) and "seed49   " in training.progress_table(rows[:1])


def test_a_warning_when_l0_falls_to_nearly_zero(model, training_cfg, capsys):
    """One line for a run of which hardly a feature is active any more, at the first logged step that shows it."""
    dying = dict(sae_type="vanilla", l1_coeff=30.0, lr=3e-2)
    cfgs = [training_cfg(**changes, log_freq=2, perf_log_freq=5) for changes in (*SAES[:2], dying)]
    _, results = train(model, cfgs)
    low = [line["step"] for line in lines_of(run_folder(cfgs[2])) if line.get("l0_norm", 1) < 0.1]
    assert results[2]["l0"] < 0.1 and low[0] > 2 and len(low) > 1
    (line,) = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "L0 has fallen" in line]
    assert line.startswith(f"warning: {cfgs[2]['name']}: ") and f"after step {low[0]}," in line


def test_a_warning_of_saes_that_nothing_makes_sparse(model, training_cfg, capsys):
    """Once for each type of the group."""
    changes = [dict(sae_type="vanilla"), dict(sae_type="vanilla", lr=1e-3), dict(sae_type="topk")]
    cfgs = [training_cfg(**each, l1_coeff=0, num_tokens=BATCH) for each in changes]
    train(model, [*cfgs, training_cfg(sae_type="jumprelu", l1_coeff=0.01, num_tokens=BATCH)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: l1_coeff")]
    assert lines == ["warning: l1_coeff is 0: nothing makes this vanilla SAE sparse"]


@pytest.mark.parametrize(
    "of_store, of_sae, said",
    [
        (dict(layer=3), {}, "layer = 3 instead of 1"),
        (dict(num_tokens=2 * BATCH), {}, f"num_tokens = {2 * BATCH} instead of {STEPS * BATCH}"),
        ({}, dict(sae_type="topk"), "sae_type = 'topk' instead of 'batchtopk'"),
        ({}, dict(dict_size=32), "dict_size = 32 instead of 64"),
        ({}, dict(dtype="float64"), "dtype = 'float64' instead of 'float32'"),
    ],
)
def test_a_store_or_an_sae_of_another_config_is_refused(model, training_cfg, of_store, of_sae, said):
    """Its records would say what is not so. Nothing is written."""
    cfg = training_cfg(sae_type="batchtopk", top_k=4)
    sae_cfg = training_cfg(**dict(sae_type="batchtopk", top_k=4) | of_sae)
    sae, store = SAE_CLASSES[sae_cfg["sae_type"]](sae_cfg), ActivationsStore(model, cfg | of_store)
    with pytest.raises(InputError, match=f"made with another config than {cfg['name']}: {re.escape(said)}$"):
        train_sae(sae, store, model, cfg)
    assert not run_folder(cfg).exists()


def test_an_sae_of_a_class_of_ones_own(model, training_cfg):
    class MyTopK(SAE_CLASSES["topk"]):
        pass

    cfg = training_cfg(sae_type="topk", top_k=4, num_tokens=BATCH)
    assert train_sae(MyTopK(cfg), ActivationsStore(model, cfg), model, cfg)["l0"] > 0


def test_a_warning_of_a_threshold_that_lags(model, training_cfg, monkeypatch, capsys):
    cfgs = [training_cfg(sae_type="batchtopk", top_k=4, num_tokens=2 * BATCH), training_cfg(sae_type="topk", top_k=4)]
    warned = []
    for cfg, lag in ((cfgs[0], 0.0), (cfgs[0], 1e9), (cfgs[1], 0.0)):
        monkeypatch.setattr(training, "MAX_LAG", lag)
        train(model, [post_init_cfg(cfg | {"sweep": f"lag{len(warned)}"})])
        warned.append(re.findall(r"warning: \S+: L0 is (\S+) with the inference threshold", capsys.readouterr().err))
    assert len(warned[0]) == 1 and warned[1:] == [[], []]


@pytest.fixture
def recorded(model, training_cfg):
    """A group of three with its records: configs, trained SAEs, results."""
    cfgs = [training_cfg(**changes, log_freq=5, perf_log_freq=4, num_tokens=STEPS * BATCH - 1) for changes in SAES[:3]]
    store = ActivationsStore(model, cfgs[0])
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    return cfgs, saes, train_sae_group(saes, store, model, cfgs), store


@pytest.mark.fast
def test_a_run_is_recorded_completely(recorded):
    """config.json, metrics.jsonl, result.json and sae/ hold what the run was, did and came to."""
    cfgs, saes, results, store = recorded
    for cfg, sae, result in zip(cfgs, saes, results):
        folder = run_folder(cfg)
        assert folder == Path(cfg["output_dir"]) / cfg["sweep"] / cfg["name"]
        files = {"config.json", "metrics.jsonl", "histograms.json", "result.json", "sae"}
        assert {path.name for path in folder.iterdir()} == files

        config = json.loads((folder / "config.json").read_text())
        made_with = config.pop("_provenance")
        assert config == cfg
        assert made_with["versions"]["torch"] == torch.__version__
        assert made_with["heldout_tokens_sha256"] == store.fingerprint()
        assert {"python", "commit", "model_sha256"} <= made_with.keys()

        recorded_result = json.loads((folder / "result.json").read_text())
        assert recorded_result | {"histograms": json.loads((folder / "histograms.json").read_text())} == result
        assert "histograms" not in recorded_result, "result.json holds plain numbers"
        assert METRICS <= result.keys()
        assert result["steps"] == STEPS and result["tokens"] == STEPS * BATCH and result["seconds"] > 0
        batch = {"nmse_batch", "fvu_batch", "l0_batch", "ce_degradation_batch", "threshold"}
        assert batch & result.keys() == (batch if cfg["sae_type"] == "batchtopk" else set())

        loaded = load_sae(folder)
        assert same_bits(loaded, sae) and loaded.cfg == cfg and not loaded.training
        again = evaluate([loaded], store, heldout_baseline(store))[0]
        assert again == {key: result[key] for key in again}, "the saved SAE has the figures of its record"


def test_metrics_of_an_unfinished_sae_do_not_outlive_it(model, training_cfg):
    """Exports and cards show those of evaluation.json, so it is removed when the run finishes."""
    cfg = training_cfg(**SAES[1])
    run_folder(cfg).mkdir(parents=True)
    write_json(run_folder(cfg) / "evaluation.json", {"nmse": 9.0})
    _, (result,) = train(model, [cfg])
    assert recorded_metrics(run_folder(cfg))["nmse"] == result["nmse"]


def test_metrics_have_the_right_steps(recorded):
    """A line at step 1, every log_freq and perf_log_freq steps and at the end; tokens = step * batch_size."""
    for cfg in recorded[0]:
        lines = lines_of(run_folder(cfg))
        assert [line["step"] for line in lines] == [1, 4, 5, 8, 10, 12]
        for line in lines:
            assert line["tokens"] == line["step"] * BATCH
            logged, evaluated = line["step"] in (1, 5, 10, 12), line["step"] in (4, 8)
            training = {"loss", "l2_loss", "l1_loss", "l0_norm", "l1_norm", "num_dead_features"}
            assert training & line.keys() == (training if logged else set())
            assert ("aux_loss" in line) == (logged and cfg["sae_type"] != "vanilla")
            assert ({"nmse", "l0", "ce_degradation"} <= line.keys()) == evaluated
            assert all(math.isfinite(value) for value in line.values())


def test_logged_metrics_are_those_of_the_training_step(model, recorded):
    """The first line is the untrained SAE's loss on the first batch."""
    cfgs, _, _, store = recorded
    x = ActivationsStore(model, cfgs[0]).next_batch()
    for cfg in cfgs:
        output = SAE_CLASSES[cfg["sae_type"]](cfg)(x)
        first = lines_of(run_folder(cfg))[0]
        for key in ("loss", "l2_loss", "l0_norm", "num_dead_features"):
            assert first[key] == output[key].item()


def test_a_recorded_config_is_a_config(recorded):
    """config.json is completed to the same config again: its _provenance is ignored."""
    for cfg in recorded[0]:
        assert post_init_cfg(json.loads((run_folder(cfg) / "config.json").read_text())) == cfg


def test_a_seq_len_that_the_model_cannot_take_is_one_value_everywhere(model, training_cfg, tmp_path):
    """The contexts are as long as the model allows; records, exports and card say so, and the run keeps its name."""
    cfg = training_cfg(sae_type="topk", top_k=4, seq_len=1000, eval_tokens=200)
    (sae,), _ = train(model, [cfg])
    run = run_folder(cfg)
    assert is_finished(cfg)
    recorded = post_init_cfg(json.loads((run / "config.json").read_text()))
    for found in (recorded, post_init_cfg(recorded), load_sae(run).cfg, sae.cfg):
        assert (found["seq_len"], found["name"], found["asked"]) == (128, cfg["name"], {"seq_len": 1000})
    export_sae(load_sae(run), "saelens", tmp_path / "saelens", run)
    assert json.loads((tmp_path / "saelens" / "cfg.json").read_text())["metadata"]["context_size"] == 128
    card = (tmp_path / "saelens" / "README.md").read_text(encoding="utf-8")
    assert "in contexts of 128 tokens" in card and "first 256 tokens" in card
    assert re.search(r"`seq_len` +\| `128` ", card)

    # A config that is changed afterwards is another run, of contexts as long as it says.
    changed = post_init_cfg(recorded | {"lr": 1e-4})
    assert changed["name"] == training_cfg(sae_type="topk", top_k=4, seq_len=128, eval_tokens=200, lr=1e-4)["name"]
    assert "asked" not in changed


def test_excluded_tokens_are_recorded_as_ids_under_the_name_that_was_asked_for(model, training_cfg):
    cfg = training_cfg(sae_type="topk", top_k=4, exclude_tokens="bos")
    (sae,), _ = train(model, [cfg])
    recorded = post_init_cfg(json.loads((run_folder(cfg) / "config.json").read_text()))
    for found in (recorded, post_init_cfg(recorded), load_sae(run_folder(cfg)).cfg, sae.cfg):
        assert found["name"] == cfg["name"] and found["asked"] == {"exclude_tokens": "bos"}
        assert found["exclude_tokens"] == [model.tokenizer.bos_token_id]


def test_a_finished_run_is_refused(model, recorded):
    """A finished run is never trained again or written over: an InputError of one line names its folder."""
    cfgs, saes, _, store = recorded
    folder = run_folder(cfgs[0])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert is_finished(cfgs[0])
    with pytest.raises(InputError) as caught:
        train(model, [cfgs[0]])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(list(folder.parent.iterdir())) == len(cfgs)


def test_data_that_ends_early_finishes_no_run(model, training_cfg):
    """Where the data ends before num_tokens the run is not finished, an InputError says so, and the SAE is saved."""
    cfg = training_cfg(sae_type="topk", top_k=4)
    store, sae = ActivationsStore(model, cfg), SAE_CLASSES["topk"](cfg)
    store.tokens_needed = 10**9  # as with a dataset whose length is not known before
    with pytest.raises(InputError, match="too short"):
        train_sae_group([sae], store, model, [cfg])
    assert not is_finished(cfg) and same_bits(load_sae(run_folder(cfg)), sae)
