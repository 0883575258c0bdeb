"""The held-out metrics against a slow reference: loops over tokens and contexts, with the GPT-2 of transformers."""

import copy
import inspect
import itertools
import json
import math
import random
import re
import shutil
import sys
import textwrap

import numpy as np
import pytest
import torch
from evaluation_reference import (
    CONTEXTS_PER_BATCH,
    LAYER,
    SEQ_LEN,
    ce_by_hand,
    forward_by_hand,
    kept_positions,
    metrics_by_hand,
    reconstruct_by_hand,
)
from helpers import DEMO_LM, REPO, make_sae, make_x
from transformer_lens.model_bridge import TransformerBridge

import evaluation
from activation_store import ActivationsStore
from checkpoint import load_sae, save_sae
from config import best_device, get_default_cfg, post_init_cfg
from console import InputError, run_command
from demo.text import documents
from evaluation import calibrate_threshold, evaluate, heldout_baseline, histograms
from files import write_json
from sae import SAE_CLASSES
from shards import WHOLE
from sparse_ops import smallest_positive
from training_step import make_optimizer, training_step

CONTEXTS = 6
SAES = {
    "vanilla": dict(sae_type="vanilla", l1_coeff=0.02),
    "topk": dict(sae_type="topk", top_k=5),
    "batchtopk": dict(sae_type="batchtopk", top_k=5),
    "jumprelu": dict(sae_type="jumprelu", l1_coeff=0.01, bandwidth=0.03),
    "batchtopk, raw inputs": dict(sae_type="batchtopk", top_k=3, dict_size=40, input_unit_norm=False),
    "jumprelu, float64": dict(sae_type="jumprelu", l1_coeff=0.01, bandwidth=0.03, dtype="float64"),
}


def make_cfg(**changes) -> dict:
    """A small completed config; held-out contexts make a batch of four and one of two."""
    cfg = get_default_cfg() | dict(
        model_name=str(DEMO_LM), layer=LAYER, act_size=128, dict_size=96, top_k_aux=8, lr=3e-3, device="cpu",
        seq_len=SEQ_LEN, batch_size=CONTEXTS_PER_BATCH * SEQ_LEN, num_tokens=10 * CONTEXTS_PER_BATCH * SEQ_LEN,
        model_batch_size=8, num_batches_in_buffer=2, eval_tokens=CONTEXTS * SEQ_LEN,
    )  # fmt: skip
    return post_init_cfg(cfg | changes)


@pytest.fixture(scope="module")
def group(model, tmp_path_factory):
    """A store, and SAEs of all types after ten steps on it."""
    path = tmp_path_factory.mktemp("data") / "code.jsonl"
    parts = inspect.getsource(textwrap).split("\n\n")
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    cfgs = [make_cfg(dataset_path=str(path), **changes) for changes in SAES.values()]
    store = ActivationsStore(model, cfgs[0])
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    optimizers = [make_optimizer(sae, cfg) for sae, cfg in zip(saes, cfgs)]
    for _ in range(10):
        x = store.next_batch()
        for sae, optimizer, cfg in zip(saes, optimizers, cfgs):
            training_step(sae, optimizer, x, cfg)
    return store, dict(zip(SAES, saes))


def with_skip(store, skip: int):
    """The same store with another eval_skip_positions."""
    store = copy.copy(store)
    store.cfg = post_init_cfg(store.cfg | {"eval_skip_positions": skip})
    return store


SHARED = ("ce_original", "ce_zero_ablated", "ce_mean_ablated")  # the same in eval() and for the batch top-k


def assert_equal_metrics(measured: dict, reference: dict, suffix: str = "") -> None:
    for key, (value, error) in reference.items():
        key = key if key in SHARED else key + suffix
        # Counts are exact; the rest is float32 against float64 and other attention kernels.
        tolerance = dict(abs=1e-9) if key.startswith(("l0", "de")) else dict(rel=2e-4, abs=2e-4)
        assert measured[key] == pytest.approx(value, **tolerance), key
        assert measured[f"{key}_se"] == pytest.approx(error, **tolerance | dict(rel=2e-3)), key


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.fast
def test_metrics_equal_a_plain_reference(model, hf_model, group, skip):
    """Every metric of every SAE type, and the _batch metrics of BatchTopK, follow their definitions."""
    store, saes = with_skip(group[0], skip), group[1]
    assert store.eval_documents.tolist() == [0, 1, 1, 1, 1, 2] and len(store.eval_contexts) == CONTEXTS
    results = evaluate(list(saes.values()), store, heldout_baseline(store))
    for (name, sae), result in zip(saes.items(), results):
        assert_equal_metrics(result, metrics_by_hand(hf_model, sae, store, skip, False, CONTEXTS))
        if name.startswith("batchtopk"):
            by_hand = metrics_by_hand(hf_model, sae, store, skip, True, CONTEXTS)
            assert_equal_metrics(result, by_hand, "_batch")
            assert by_hand["l0"][0] == sae.cfg["top_k"], "the batch top-k keeps k features a token"
            assert result["l0"] != result["l0_batch"], "the threshold is not the batch top-k"
            assert result["threshold"] == sae.threshold.item() > 0
        else:
            assert not any("_batch" in key for key in result)


def excluding(store, *ids: int):
    """The same store with exclude_tokens, and with a context that consists of such tokens."""
    store = copy.copy(store)
    store.cfg, store.excluded = post_init_cfg(store.cfg | {"exclude_tokens": ids}), torch.tensor(ids)
    store.eval_contexts = store.eval_contexts.clone()
    store.eval_contexts[CONTEXTS_PER_BATCH] = ids[-1]
    return store


def most_frequent(tokens: torch.Tensor, n: int) -> list[int]:
    return tokens.flatten().bincount().topk(n).indices.tolist()


@pytest.mark.parametrize("skip", [0, 1])
def test_excluded_tokens_count_in_no_metric(model, hf_model, group, skip):
    """They keep the model's activations, and neither they nor the predictions from them count."""
    ids = (0, *most_frequent(group[0].eval_contexts, 3))
    store, saes = excluding(with_skip(group[0], skip), *ids), group[1]
    contexts = store.eval_contexts.tolist()
    results = evaluate(list(saes.values()), store, heldout_baseline(store))
    for (name, sae), result in zip(saes.items(), results):
        assert_equal_metrics(result, metrics_by_hand(hf_model, sae, store, skip, False, CONTEXTS, ids))
        assert sum(result["histograms"]["l0"]) == sum(token not in ids for c in contexts for token in c[skip:])
        if name.startswith("batchtopk"):
            assert_equal_metrics(result, metrics_by_hand(hf_model, sae, store, skip, True, CONTEXTS, ids), "_batch")


def test_histograms_equal_a_plain_reference(model, hf_model, group):
    """Tokens by number of active features and features by log10 of density, counted one by one."""
    store, saes = group
    saes = {name: copy.deepcopy(sae).eval() for name, sae in saes.items()}
    with torch.no_grad():
        for sae in saes.values():
            sae.W_enc[:, :2] = 0  # features that are almost never active
    rows = torch.cat([forward_by_hand(hf_model, tokens)[0][1:] for tokens in store.eval_contexts.tolist()])
    results = evaluate(list(saes.values()), store, heldout_baseline(store))
    for sae, result in zip(saes.values(), results):
        active = (sae.encode(rows) > 0).numpy()
        counted = result["histograms"]
        assert json.loads(json.dumps(counted)) == counted
        l0 = [0] * (1 + max(row.sum() for row in active))
        for row in active:
            l0[row.sum()] += 1
        assert counted["l0"] == l0
        density = [np.log10(column.mean()) for column in active.T if column.any()]
        assert counted["log10_density"] == np.histogram(density, counted["log10_density_edges"])[0].tolist()
        assert counted["never_active"] == sum(not column.any() for column in active.T)
        assert sum(counted["log10_density"]) + counted["never_active"] == sae.cfg["dict_size"]
        assert counted["never_active"] / sae.cfg["dict_size"] == pytest.approx(result["dead_fraction"])
        assert sum(n * count for n, count in enumerate(l0)) / len(rows) == pytest.approx(result["l0"])
    assert any(result["histograms"]["never_active"] for result in results)


@pytest.mark.fast
def test_histogram_bins_hold_every_density():
    """Features that are always active are in the last bin, those below the lowest edge in the first bin."""
    counted = histograms(
        token_l0=torch.tensor([2] * 999 + [0]), times_active=torch.tensor([1000, 50, 1e-6, 0, 0]), shards=WHOLE
    )
    assert counted["l0"] == [1, 0, 999]
    middle = [int(edge <= math.log10(0.05) < edge + 0.25) for edge in counted["log10_density_edges"][1:-2]]
    assert counted["log10_density"] == [1, *middle, 1] and sum(middle) == 1 and counted["never_active"] == 2


def test_metrics_on_the_first_contexts(model, hf_model, group):
    """Evaluations during training give the same metrics on the first contexts, without dead and dense fractions."""
    store, saes = group
    results = evaluate(list(saes.values()), store, heldout_baseline(store), num_contexts=3)
    for sae, result in zip(saes.values(), results):
        assert not {"dead_fraction", "dense_fraction", "histograms"} & result.keys()
        reference = metrics_by_hand(hf_model, sae, store, 1, False, 3)
        del reference["dead_fraction"], reference["dense_fraction"]
        assert_equal_metrics(result, reference)


def test_baseline_is_computed_on_the_held_out_set(model, hf_model, group):
    """The mean activation and the CEs without an SAE equal those computed one context at a time."""
    store, _ = group
    baseline = heldout_baseline(store)
    contexts = store.eval_contexts.tolist()
    rows = torch.cat([forward_by_hand(hf_model, tokens)[0][1:] for tokens in contexts])
    torch.testing.assert_close(baseline["mean"], rows.mean(0), rtol=1e-4, atol=1e-4)
    for key, row in [("ce_zero_ablated", torch.zeros(128)), ("ce_mean_ablated", rows.mean(0))]:
        by_hand = [ce_by_hand(hf_model, tokens, 1, [row] * SEQ_LEN)[0] for tokens in contexts]
        assert baseline[key].tolist() == pytest.approx(by_hand, rel=2e-4)


def test_ablation_hurts_the_demo_language_model(model, group):
    """So the degradation and recovery of a reconstruction are meaningful."""
    store, saes = group
    for result in evaluate(list(saes.values()), store, heldout_baseline(store)):
        assert result["ce_zero_ablated"] - result["ce_original"] > 0.5
        assert result["ce_degradation"] > 0
        assert result["recovery_from_zero"] < 1
        assert all(math.isfinite(value) for key, value in result.items() if key != "histograms")


def state_of(model, sae) -> list:
    """Everything that an evaluation must not change."""
    return [
        {name: tensor.clone() for name, tensor in sae.state_dict().items()},
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.grad for parameter in sae.parameters()],
        [parameter.requires_grad for parameter in sae.parameters()],
        [module.training for module in (*sae.modules(), *model.modules())],
        json.dumps(sae.cfg),
        torch.get_rng_state(),
        np.random.get_state()[1],
        random.getstate()[1],
        [len(point.fwd_hooks) for point in model.hook_dict.values()],
    ]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_has_no_side_effects(model, group, training):
    """Weights, buffers, gradients, mode, hooks and random states are unchanged after an evaluation."""
    store, saes = group
    contexts = store.eval_contexts.clone()
    for sae in saes.values():
        sae.train(training)
    before = [state_of(model, sae) for sae in saes.values()]
    first = evaluate(list(saes.values()), store, heldout_baseline(store))
    for sae, state in zip(saes.values(), before):
        for now, then in zip(state_of(model, sae), state, strict=True):
            if isinstance(then, dict):
                assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
            else:
                assert np.array_equal(now, then)
    assert torch.equal(store.eval_contexts, contexts)
    assert evaluate(list(saes.values()), store, heldout_baseline(store)) == first


def test_evaluation_does_not_advance_the_stream(model, group):
    """The next batch is the same with and without an evaluation before it."""
    batches = []
    for evaluated in (False, True):
        store = ActivationsStore(model, group[0].cfg)
        store.next_batch()
        if evaluated:
            evaluate(list(group[1].values()), store, heldout_baseline(store))
        batches.append(store.next_batch())
    assert torch.equal(*batches)


def test_metrics_do_not_depend_on_the_group(model, group):
    """An SAE has the same metrics whether it is evaluated in a group or alone."""
    store, saes = group
    baseline = heldout_baseline(store)
    together = evaluate(list(saes.values()), store, baseline)
    for sae, result in zip(saes.values(), together):
        assert evaluate([sae], store, baseline) == [result]


def test_metrics_in_eval_do_not_depend_on_the_batches(model, group):
    """In eval() a token's features do not depend on its batch: only the _batch metrics change with the batch size."""
    store, saes = group
    smaller = copy.copy(store)
    smaller.cfg = post_init_cfg(store.cfg | {"batch_size": SEQ_LEN})
    baseline = heldout_baseline(store)
    results = [evaluate(list(saes.values()), s, baseline) for s in (store, smaller)]
    for usual, other in zip(*results):
        assert usual.pop("histograms") == other.pop("histograms")
        assert {k: v for k, v in usual.items() if "_batch" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "_batch" not in k}, rel=1e-5, abs=1e-5
        )
        if "nmse_batch" in usual:
            assert usual["nmse_batch"] != pytest.approx(other["nmse_batch"], rel=1e-5)


def test_fractions_have_errors_over_parts(model, hf_model, group, monkeypatch):
    """With more documents than MAX_PARTS, the jackknife omits consecutive documents together."""
    monkeypatch.setattr(evaluation, "MAX_PARTS", 4)
    store, sae = copy.copy(group[0]), group[1]["topk"]
    store.eval_documents = torch.arange(CONTEXTS)
    (result,) = evaluate([sae], store, heldout_baseline(store))
    reference = metrics_by_hand(hf_model, sae, store, 1, False, CONTEXTS)
    assert_equal_metrics(result, reference)
    assert result["dead_fraction_se"] > 0 and result["dense_fraction_se"] > 0


def test_one_document_has_no_error(model, group):
    """Standard errors need two documents; with one, the metrics are finite and have no standard error."""
    store, sae = group[0], group[1]["batchtopk"]
    (result,) = evaluate([sae], store, heldout_baseline(store), num_contexts=1)
    assert {"nmse", "kl_divergence", "recovery_from_mean_batch"} <= result.keys()
    assert not any(key.endswith("_se") for key in result) and all(map(math.isfinite, result.values()))


def test_the_model_is_not_run_more_often_than_needed(model, group):
    """heldout_baseline runs the layers before the hook point once per batch of contexts, and those after it twice, for
    the ablations. evaluate runs only the latter: once for the model, and once for each SAE and each batch top k.
    """
    (store, saes), below, above = group, [], []
    count = lambda forwards: lambda module, args, output: forwards.append(len(args[0]))  # noqa: E731
    handles = [model.plain.transformer.h[0].ln_1.register_forward_hook(count(below))]
    handles += [model.plain.lm_head.register_forward_hook(count(above))]
    try:
        baseline = heldout_baseline(store)
        assert below == [4, 2] and above == [4, 4, 2, 2]
        evaluate(list(saes.values()), store, baseline)
    finally:
        for handle in handles:
            handle.remove()
    assert below == [4, 2]
    assert above[4:] == [4] * (1 + len(saes) + 2) + [2] * (1 + len(saes) + 2)


# The threshold


@pytest.fixture(scope="module")
def demo_halves(model, tmp_path_factory):
    """Activations on the demo's text: two halves of alternating documents, not used in training, and one set for
    training.
    """
    path = tmp_path_factory.mktemp("data") / "demo.jsonl"
    texts = [document["text"][:6000] for document in documents("sae")[:80]]
    halves = []
    for part in (texts[0:60:2], texts[1:60:2], texts[60:]):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        cfg = make_cfg(dataset_path=str(path), seq_len=128, batch_size=128, num_tokens=128, eval_tokens=96 * 128)
        store = ActivationsStore(model, cfg)
        halves.append(torch.cat([store.get_activations(x)[:, 1:].flatten(0, 1) for x in store.eval_contexts.split(32)]))
    return halves


@pytest.mark.parametrize("top_k", [8, 16, 32, 64])
def test_calibrated_threshold_gives_the_l0_on_other_text(demo_halves, top_k):
    """After calibration on one half of the text, the mean L0 is the target on this half, and within 2 % of it on the
    other half. The threshold is that from sorting all pre-activations.
    """
    calibration, other, training = demo_halves
    cfg = make_cfg(top_k=top_k, dict_size=512, batch_size=1024)
    sae = SAE_CLASSES["batchtopk"](cfg)
    optimizer = make_optimizer(sae, cfg)
    for x in training.split(1024):
        training_step(sae, optimizer, x, cfg)
    sae.eval()
    for target in (None, 0.75 * top_k):
        returned = calibrate_threshold(sae, (x for x in calibration.split(1000)), target)
        with torch.no_grad():
            l0, l0_other = ((sae.encode(x) > 0).sum().item() / len(x) for x in (calibration, other))
        assert returned == pytest.approx(l0, rel=1e-4)
        assert l0 == pytest.approx(target or top_k, rel=1e-3)
        assert l0_other == pytest.approx(target or top_k, rel=0.02)
        with torch.no_grad():
            z = sae.pre_activation(sae.preprocess_input(calibration)[0]).flatten()
        exact = z.sort(descending=True).values[round((target or top_k) * len(calibration)) - 1].item()
        assert sae.threshold.item() == pytest.approx(exact, rel=1 / 4096)


def test_calibration_of_an_sae_without_threshold(demo_halves, monkeypatch):
    """It can encode afterwards. One tensor and batches of it, split into chunks or not, give the same threshold."""
    cfg = make_cfg(top_k=8)
    thresholds = []
    for activations in (demo_halves[0], list(demo_halves[0].split(777)), demo_halves[0].double()):
        sae = SAE_CLASSES["batchtopk"](cfg).eval()
        with pytest.raises(RuntimeError, match="no inference threshold"):
            sae.encode(demo_halves[1])
        calibrate_threshold(sae, activations)
        assert (sae.encode(demo_halves[1]) > 0).any() and sae.threshold_num_batches > 0
        thresholds.append(sae.threshold.item())
        monkeypatch.setattr(evaluation, "CHUNK", 100 * cfg["dict_size"])
    assert thresholds[0] == thresholds[1] == thresholds[2] > 0


def test_training_continues_from_a_calibrated_threshold():
    sae, x = make_sae("batchtopk", input_unit_norm=False), make_x(50, 5)
    calibrate_threshold(sae, x, 2)
    calibrated, output = sae.threshold.item(), sae.train()(x)
    sae.update_statistics(output)
    smallest = smallest_positive(output["feature_acts"].detach()).item()
    assert sae.threshold.item() == pytest.approx(calibrated + 0.01 * (smallest - calibrated), rel=1e-3)


def test_calibration_on_bad_input(demo_halves):
    """One line for an impossible target, no activations, NaN or another SAE type; the threshold is unchanged."""
    sae = SAE_CLASSES["batchtopk"](make_cfg(top_k=8)).eval()
    x = demo_halves[0][:50]
    for given, target, message in [
        (x, 96, "target_l0 = 96 cannot be reached: only [0-9.]+ features per token"),
        (x, 0, "target_l0 = 0 is not allowed"),
        (x, math.nan, "target_l0 = nan is not allowed"),
        (x[:0], None, "no activations"),
        ([], None, "no activations"),
        (torch.full_like(x, math.nan), None, "NaN"),
    ]:
        with pytest.raises(InputError, match=message):
            calibrate_threshold(sae, given, target)
    assert sae.threshold == 0 and sae.threshold_num_batches == 0
    with pytest.raises(InputError, match="this one is topk"):
        calibrate_threshold(SAE_CLASSES["topk"](make_cfg(sae_type="topk", top_k=8)), x)


# In the model


@pytest.mark.parametrize("name, skip", [*itertools.product(SAES, [0, 1, 3]), ("batchtopk, exclude_tokens", 1)])
def test_splice_is_what_the_evaluation_measures(model, hf_model, group, name, skip):
    """While it is active, and only then, reconstructions replace the activations from position `skip` on."""
    name, excludes = name.removesuffix(", exclude_tokens"), name.endswith("exclude_tokens")
    store, sae = group[0], copy.deepcopy(group[1][name]).eval()
    tokens = store.eval_contexts[:3]
    ids = most_frequent(tokens, 2) if excludes else []
    sae.cfg = post_init_cfg(sae.cfg | {"eval_skip_positions": skip, "exclude_tokens": ids or None})
    with torch.no_grad():
        before = model(tokens)
        with sae.splice(model):
            spliced = model(tokens)
        assert torch.equal(model(tokens), before)
        for context, logits in zip(tokens.tolist(), spliced):
            kept = kept_positions(context, skip, ids)

            def replace(hidden, kept=kept):
                hidden[kept] = torch.stack(reconstruct_by_hand(sae, list(hidden[kept]), False)[0])
                return hidden

            log_p = forward_by_hand(hf_model, context, replace)[2]
            torch.testing.assert_close(logits.log_softmax(-1), log_p.float(), rtol=1e-3, atol=1e-3)
    with pytest.raises(KeyError), sae.splice(model):
        raise KeyError
    assert torch.equal(model(tokens), before), "an error inside leaves no hook behind"


def test_splice_with_nothing_to_replace(model, group):
    with group[1]["topk"].splice(model), torch.no_grad():
        spliced = model(model.to_tokens(""))
    assert torch.equal(spliced, model(model.to_tokens("")))


def test_splice_of_one_text_after_another(model, group):
    """The excluded tokens are those of the text at hand, and no hook is left behind."""
    sae, (first, second) = copy.deepcopy(group[1]["topk"]).eval(), group[0].eval_contexts[:2, None]
    sae.cfg = post_init_cfg(sae.cfg | {"exclude_tokens": most_frequent(second, 2)})
    hooks = len(model.embed._forward_pre_hooks)
    with torch.no_grad():
        with sae.splice(model):
            model(first)
            after_another = model(second)
        with sae.splice(model):
            assert torch.equal(model(second), after_another)
    assert len(model.embed._forward_pre_hooks) == hooks


def test_splice_into_another_bridge(model, group):
    """A bridge not made by load_model computes the same, also with excluded tokens."""
    own = TransformerBridge.boot_transformers(str(DEMO_LM), device="cpu", dtype=torch.float32)
    store, saes = group
    ids = store.eval_contexts[:2]
    for excluded in (None, "bos"):
        sae = copy.deepcopy(saes["topk"]).eval()
        sae.cfg = post_init_cfg(sae.cfg | {"exclude_tokens": excluded})
        with sae.splice(model), torch.no_grad():
            expected = model(ids)
        with sae.splice(own), torch.no_grad():
            torch.testing.assert_close(own(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAES)
def test_encode_and_decode_of_contexts(group, name):
    """They accept [contexts, positions, d] and [B, d]; with `like`, decode returns units of the residual stream."""
    store, sae = group[0], copy.deepcopy(group[1][name]).eval()
    acts = store.get_activations(store.eval_contexts[:3])[:, 1:]
    with torch.no_grad():
        reconstruction, features = sae.reconstruct(acts.flatten(0, 1))
        torch.testing.assert_close(sae.encode(acts).flatten(0, 1), features)
        torch.testing.assert_close(sae.decode(features, like=acts.flatten(0, 1)), reconstruction)
        torch.testing.assert_close(sae.decode(sae.encode(acts), like=acts).flatten(0, 1), reconstruction)
        assert torch.equal(sae.encode(acts).to_sparse().to_dense(), sae.encode(acts))


# The command


@pytest.fixture(scope="module")
def run_folder(group, tmp_path_factory):
    """A run's folder as training leaves it."""
    store, sae = group[0], group[1]["batchtopk"]
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_sae(sae, folder / "sae")
    write_json(folder / "config.json", sae.cfg | {"_provenance": {"heldout_tokens_sha256": store.fingerprint()}})
    write_json(folder / "result.json", {"nmse": 0.25})
    return folder


def test_a_run_opens_from_any_folder(group, tmp_path):
    """Its relative paths are those from the folder in which it was trained."""
    sae = copy.deepcopy(group[1]["batchtopk"])
    (tmp_path / "lm").symlink_to(DEMO_LM)
    (tmp_path / "text.jsonl").symlink_to(sae.cfg["dataset_path"])
    relative = dict(output_dir="runs", sweep="sweep", model_name="lm", dataset_path="text.jsonl")
    cfg = sae.cfg = post_init_cfg(sae.cfg | relative)
    run = tmp_path / "runs" / "sweep" / cfg["name"]
    save_sae(sae, run / "sae")
    write_json(run / "config.json", cfg)
    opened, _, store = evaluation.open_run(run)
    assert opened.cfg["model_name"] == str(tmp_path / "lm") and store.cfg["dataset_path"] == str(
        tmp_path / "text.jsonl"
    )
    for folder in (run, run / "sae"):
        assert load_sae(folder).cfg["model_name"] == str(tmp_path / "lm")  # so load_model(sae.cfg) works
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="model_name = 'lm'"):
        evaluation.open_run(tmp_path / "elsewhere")


def test_a_run_opens_on_another_machine(group, run_folder, tmp_path):
    """On the best device that is there, if that of its training is not."""
    shutil.copytree(run_folder, tmp_path / "run")
    cfg = json.loads((run_folder / "config.json").read_text())
    write_json(tmp_path / "run" / "config.json", cfg | {"device": "cuda:7"})
    assert str(evaluation.open_run(tmp_path / "run")[0].W_dec.device) == best_device()


def test_a_run_with_an_export_in_its_folder_opens(run_folder, tmp_path):
    """It is not taken for a sweep's folder, although an export may have a config.json."""
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "export").mkdir()
    write_json(tmp_path / "run" / "export" / "config.json", {})
    assert evaluation.open_run(tmp_path / "run")[0].cfg["sae_type"] == "batchtopk"


def test_a_warning_of_text_that_changed_since_training(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    evaluation.open_run(tmp_path / "run")
    assert "has changed" not in capsys.readouterr().err
    cfg = json.loads((run_folder / "config.json").read_text())
    write_json(tmp_path / "run" / "config.json", cfg | {"_provenance": {"heldout_tokens_sha256": "0" * 64}})
    evaluation.open_run(tmp_path / "run")
    assert f"{cfg['dataset_path']} has changed since training" in capsys.readouterr().err


def test_command_prints_and_writes_the_metrics(model, group, run_folder, capsys):
    """An aligned table of all metrics, and a file with the same; result.json is unchanged. Fewer tokens go to another
    file than evaluation.json, which exports show.
    """
    store, sae = group[0], group[1]["batchtopk"]
    result = (run_folder / "result.json").read_bytes()
    for arguments, contexts, file in [
        (["--eval-tokens", "40"], 3, f"evaluation_first_{3 * SEQ_LEN}.json"), ([], 6, "evaluation.json")
    ]:  # fmt: skip
        (run_folder / "evaluation.json").unlink(missing_ok=True)
        if not arguments:
            (run_folder / "evaluation.json").write_text("{")  # it is written again
        evaluation.main([str(run_folder), *arguments])
        store = copy.copy(group[0])
        store.eval_contexts = store.eval_contexts[:contexts]
        (expected,) = evaluate([sae], store, heldout_baseline(store))
        assert (run_folder / "evaluation.json").exists() == (not arguments)
        written = json.loads((run_folder / file).read_text())
        assert written.pop("eval_tokens") == contexts * SEQ_LEN
        assert written.pop("histograms") == expected.pop("histograms")
        assert written == pytest.approx(expected, rel=1e-6)
        printed, warnings = capsys.readouterr()
        first, header, *lines = printed.splitlines()
        assert first == f"{sae.cfg['name']} on {contexts} held-out contexts of {SEQ_LEN} tokens"
        assert "changed" not in warnings
        assert header.split("   ")[-1] == "batch top-k"
        rows = {line.split()[0]: line for line in lines}
        assert {f"{key}{end}" for key in rows for end in ("", "_se", "_batch", "_batch_se")} >= expected.keys()
        assert rows["nmse"].split()[1:] == [
            f"{expected['nmse']:.4f}", "±", f"{expected['nmse_se']:.4f}",
            f"{expected['nmse_batch']:.4f}", "±", f"{expected['nmse_batch_se']:.4f}",
        ]  # fmt: skip
        assert len({line.index(line.split()[1]) for line in lines}) == 1, "columns are aligned"
    assert (run_folder / "result.json").read_bytes() == result


def test_fvu_by_token(model, group, run_folder, capsys, monkeypatch):
    """The parts of the groups make up the metrics of evaluate; the groups hold the tokens that their names say."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(REPO / "benchmarks")])
    import fvu_by_token

    store, sae = group[0], group[1]["batchtopk"]
    (expected,) = evaluate([sae], store, heldout_baseline(store))
    tokens, used, vocabulary = fvu_by_token.measure(run_folder)
    assert tokens["id"].tolist() == store.eval_contexts[:, 1:].flatten().tolist() and len(vocabulary) == 4096
    assert tokens["position"].tolist() == [*range(1, SEQ_LEN)] * CONTEXTS
    for grouping in fvu_by_token.GROUPINGS:
        table = fvu_by_token.shares(tokens, used, grouping)
        for name, suffix in (("", ""), (" batch", "_batch")):
            part = table[sae.cfg["name"] + name]
            for what in ("fvu", "nmse", "l0"):
                assert part[what]["all"] == pytest.approx(expected[what + suffix], rel=1e-5)
                weights = 1 if what == "fvu" else table["", "tokens"].drop("all")
                assert (part[what].drop("all") * weights).sum() == pytest.approx(part[what]["all"])
        assert table["", "variance"].drop("all").sum() == pytest.approx(1)
        groups = fvu_by_token.groups_of(tokens, grouping)
        spans = tokens.groupby(groups, observed=True)[grouping].agg(["min", "max"])
        assert (spans["max"].to_numpy()[:-1] < spans["min"].to_numpy()[1:]).all()
    named = [[*map(int, name.split(" to "))] for name in spans.index]
    assert [(name[0], name[-1]) for name in named] == list(spans.itertuples(index=False, name=None))
    fvu_by_token.main([str(run_folder), "--plot", str(run_folder.parent / "tokens.png")])
    assert re.search(rf"\| {sae.cfg['name']} batch +\| fvu +\|", capsys.readouterr().out)
    assert (run_folder.parent / "tokens.png").stat().st_size > 10_000


def test_command_on_other_text(model, group, tmp_path, capsys):
    """It uses the other text's default split and column and all of its contexts, prints the run's own L0, and writes to
    a file of its own.
    """
    sae, run = copy.copy(group[1]["batchtopk"]), tmp_path / "run"
    sae.cfg = post_init_cfg(sae.cfg | {"dataset_column": "code", "dataset_split": "validation"})
    save_sae(sae, run / "sae")
    write_json(run / "config.json", sae.cfg | {"_provenance": {"heldout_tokens_sha256": group[0].fingerprint()}})
    write_json(run / "evaluation.json", {"l0": 5.25, "l0_se": 0.125})
    text = tmp_path / "letter.txt"
    text.write_text("Dear Anna, thank you for the long letter about the garden. " * 4)
    store = ActivationsStore(model, group[0].cfg | {"dataset_path": str(text)}, held_out_only=True)
    assert 1 < len(store.eval_contexts) < CONTEXTS
    (expected,) = evaluate([sae], store, heldout_baseline(store))
    evaluation.main([str(run), "--dataset-path", str(text)])
    (file,) = run.glob("evaluation_letter_*.json")
    written = json.loads(file.read_text())
    assert (written.pop("dataset_path"), written.pop("eval_tokens")) == (str(text), store.eval_contexts.numel())
    assert written.pop("histograms") == expected.pop("histograms") and written == pytest.approx(expected, rel=1e-6)
    printed, warnings = capsys.readouterr()
    first, *_, last = printed.splitlines()
    assert first == f"{sae.cfg['name']} on {len(store.eval_contexts)} contexts of {text}, each of {SEQ_LEN} tokens"
    assert last == "l0 on the run's own held-out text: 5.2500 ± 0.1250"
    assert "changed" not in warnings
    assert json.loads((run / "evaluation.json").read_text()) == {"l0": 5.25, "l0_se": 0.125}

    text.write_text("Another letter, about the sea and the long way there. " * 4)
    evaluation.main([str(run), "--dataset-path", str(text)])
    assert len(list(run.glob("evaluation_letter_*.json"))) == 2, "another text of the same name has its own file"
    evaluation.main([str(run), "--dataset-path", str(text), "--eval-tokens", "10"])
    assert len(list(run.glob("evaluation_letter_*.json"))) == 3, "fewer tokens do, too"
    assert f"on 1 context of {text}, each of {SEQ_LEN} tokens" in capsys.readouterr().out
    text.write_text("Dear")
    with pytest.raises(InputError, match="letter.txt' is too short: it has . tokens; it must have seq_len = 16"):
        evaluation.main([str(run), "--dataset-path", str(text)])


def test_command_on_bad_input(run_folder, group, tmp_path):
    """One line that names the problem."""

    def refused(*args) -> str:
        with pytest.raises(InputError) as error:
            evaluation.main([str(arg) for arg in args])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "nosuch is not a folder" in refused(tmp_path / "nosuch")
    assert "holds no SAE" in refused(tmp_path)
    assert f"RUN must be the folder of its run, {run_folder}" in refused(run_folder / "sae")
    for run in ("b", "a"):
        (tmp_path / "sweep" / run).mkdir(parents=True)
        write_json(tmp_path / "sweep" / run / "config.json", {"device": "cpu"})
    assert f"must be one of its runs, such as {tmp_path}/sweep/a" in refused(tmp_path / "sweep")
    assert "a holds no SAE yet: its training has not ended" in refused(tmp_path / "sweep/a")
    for tokens in (0, -5, 97):
        assert f"--eval-tokens {tokens} is not allowed: it must be 1 to 96" in refused(
            run_folder, "--eval-tokens", tokens
        )
    save_sae(SAE_CLASSES["batchtopk"](group[1]["batchtopk"].cfg), tmp_path / "untrained")
    assert "calibrate_threshold" in refused(tmp_path / "untrained")


CLOSED_PIPE = """
import os, runpy
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
runpy.run_path("evaluation.py", run_name="__main__")
"""


def test_closed_pipe_ends_the_command_quietly(run_folder, program):
    """`python evaluation.py RUN | head -1` writes evaluation.json and exits with 128 + SIGPIPE, without a traceback."""
    (run_folder / "evaluation.json").unlink(missing_ok=True)
    done = program.run("-c", CLOSED_PIPE, run_folder)
    assert (done.returncode, done.stderr, done.stdout) == (141, "", "")
    assert (run_folder / "evaluation.json").is_file()


def test_other_broken_pipes_are_errors(monkeypatch, capfd):
    """Only a closed stdout or stderr is quiet, not another broken connection."""

    def fail(argv):
        raise BrokenPipeError("the connection broke")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(BrokenPipeError, match="the connection broke"):
        run_command(fail)
