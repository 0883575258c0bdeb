"""The held-out metrics against slow references: loops over tokens and contexts, and transformers' own GPT-2."""

import copy
import inspect
import json
import math
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from activation_store import ActivationsStore
from config import get_default_cfg, post_init_cfg
from evaluation import evaluate, heldout_baseline, histograms
from language_model import load_model
from sae import SAE_CLASSES
from training import make_optimizer, training_step

DEMO_LM = Path(__file__).resolve().parent.parent / "demo" / "lm"
LAYER, SEQ_LEN, CONTEXTS, CONTEXTS_PER_BATCH = 2, 16, 6, 4
SAES = {
    "vanilla": dict(sae_type="vanilla", l1_coeff=0.02),
    "topk": dict(sae_type="topk", top_k=5),
    "batchtopk": dict(sae_type="batchtopk", top_k=5),
    "jumprelu": dict(sae_type="jumprelu", l1_coeff=0.01, bandwidth=0.03),
    "batchtopk, raw inputs": dict(sae_type="batchtopk", top_k=3, dict_size=40, input_unit_norm=False),
    "jumprelu, float64": dict(sae_type="jumprelu", l1_coeff=0.01, bandwidth=0.03, dtype="float64"),
}


@pytest.fixture(scope="module")
def model():
    return load_model(make_cfg())


@pytest.fixture(scope="module")
def hf_model():
    return transformers.GPT2LMHeadModel.from_pretrained(DEMO_LM, attn_implementation="eager").eval()


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
    """The same store under another eval_skip_positions."""
    store = copy.copy(store)
    store.cfg = post_init_cfg(store.cfg | {"eval_skip_positions": skip})
    return store


# The slow reference


@torch.no_grad()
def forward_by_hand(hf_model, tokens: list[int], replace=None) -> tuple[torch.Tensor, list[float]]:
    """Activations [T, d] before block LAYER, and −log p of tokens[1], tokens[2], …; `replace` maps the activations."""
    seen = []

    def splice(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden[0].clone())
        if replace is None:
            return None
        hidden = replace(hidden[0].clone())[None]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = hf_model.transformer.h[LAYER].register_forward_pre_hook(splice, with_kwargs=True)
    logits = hf_model(torch.tensor([tokens])).logits[0].double()
    handle.remove()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return seen[0], [-log_p[t, tokens[t + 1]].item() for t in range(len(tokens) - 1)]


def ce_by_hand(hf_model, tokens: list[int], skip: int, rows: list | None = None) -> float:
    """Mean −log p over the predictions made from positions `skip` on, whose activations are replaced by `rows`."""

    def replace(hidden):
        for t in range(skip, len(tokens)):
            hidden[t] = rows[t - skip]
        return hidden

    losses = forward_by_hand(hf_model, tokens, replace if rows is not None else None)[1]
    return sum(losses[skip:]) / len(losses[skip:])


@torch.no_grad()
def reconstruct_by_hand(sae, batch: list[torch.Tensor], batch_top_k: bool) -> tuple[list, list]:
    """Reconstruction and features of each token of a batch: the definitions, in float64, a token at a time."""
    kind, k = sae.cfg["sae_type"], sae.cfg["top_k"]
    W_enc, W_dec, b_enc, b_dec = (getattr(sae, name).double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    normalised, pre_activations = [], []
    for x in batch:
        mean, scale = torch.zeros(1).double(), torch.ones(1).double()
        if sae.cfg["input_unit_norm"]:
            mean = x.double().mean()
            scale = ((x.double() - mean) ** 2).sum().div(len(x) - 1).sqrt() + 1e-5
        normalised.append((mean, scale - 1e-5 if sae.cfg["input_unit_norm"] else scale))
        x = (x.double() - mean) / scale
        if kind == "jumprelu":
            z = x @ W_enc + b_enc
        elif kind == "vanilla":
            z = (x - b_dec) @ W_enc + b_enc
        else:
            z = (x - b_dec) @ W_enc
        pre_activations.append(z.clamp(min=0))
    if batch_top_k:
        lowest = torch.cat(pre_activations).sort(descending=True).values[len(batch) * k - 1]
    features = []
    for z in pre_activations:
        if kind == "jumprelu":
            kept = z > sae.jumprelu.log_threshold.double().exp()
        elif kind == "topk":
            kept = z >= z.sort(descending=True).values[k - 1]
        elif kind == "batchtopk":
            kept = z >= lowest if batch_top_k else z > sae.threshold.double()
        else:
            kept = z > 0
        features.append(z * kept)
    reconstructions = [(f @ W_dec + b_dec) * scale + mean for f, (mean, scale) in zip(features, normalised)]
    return [row.float() for row in reconstructions], features


def metrics_by_hand(hf_model, sae, contexts: list[list[int]], skip: int, batch_top_k: bool, measured: int) -> dict:
    """All metrics on the first `measured` contexts; the held-out mean is over all contexts."""
    acts = [list(forward_by_hand(hf_model, tokens)[0][skip:]) for tokens in contexts]
    held_out = [x.double() for rows in acts for x in rows]
    x_mean = sum(held_out) / len(held_out)
    nmse, errors, variance, l0, tokens_seen = 0.0, 0.0, 0.0, 0, 0
    ever_active = [False] * sae.cfg["dict_size"]
    ce = {"original": [], "reconstructed": [], "zero": [], "mean": []}
    for start in range(0, measured, CONTEXTS_PER_BATCH):
        part = acts[start : min(start + CONTEXTS_PER_BATCH, measured)]
        reconstructions, features = reconstruct_by_hand(sae, [x for rows in part for x in rows], batch_top_k)
        for i, x in enumerate(x for rows in part for x in rows):
            x, r = x.double(), reconstructions[i].double()
            error = ((x - r) ** 2).sum().item()
            nmse += error / ((x - x.mean()) ** 2).sum().item()
            errors += error
            variance += ((x - x_mean) ** 2).sum().item()
            for j in features[i].nonzero().flatten().tolist():
                l0 += 1
                ever_active[j] = True
            tokens_seen += 1
        for i in range(len(part)):
            tokens, length = contexts[start + i], SEQ_LEN - skip
            rows = reconstructions[i * length : (i + 1) * length]
            ce["original"].append(ce_by_hand(hf_model, tokens, skip))
            ce["reconstructed"].append(ce_by_hand(hf_model, tokens, skip, rows))
            ce["zero"].append(ce_by_hand(hf_model, tokens, skip, [torch.zeros(128)] * length))
            ce["mean"].append(ce_by_hand(hf_model, tokens, skip, [x_mean.float()] * length))
    ce = {key: sum(values) / len(values) for key, values in ce.items()}
    return {
        "nmse": nmse / tokens_seen,
        "fvu": errors / variance,
        "l0": l0 / tokens_seen,
        "dead_fraction": ever_active.count(False) / len(ever_active),
        "ce_original": ce["original"],
        "ce_zero_ablated": ce["zero"],
        "ce_mean_ablated": ce["mean"],
        "ce_reconstructed": ce["reconstructed"],
        "ce_degradation": ce["reconstructed"] - ce["original"],
        "recovery_from_zero": (ce["zero"] - ce["reconstructed"]) / (ce["zero"] - ce["original"]),
        "recovery_from_mean": (ce["mean"] - ce["reconstructed"]) / (ce["mean"] - ce["original"]),
    }


SHARED = ("ce_original", "ce_zero_ablated", "ce_mean_ablated")  # the same in eval() and for the batch top-k


def assert_equal_metrics(measured: dict, reference: dict, suffix: str = "") -> None:
    for key, value in reference.items():
        key = key if key in SHARED else key + suffix
        # Counts are exact; the rest is float32 against float64 and other attention kernels.
        tolerance = dict(abs=1e-9) if key.startswith(("l0", "dead")) else dict(rel=2e-4, abs=2e-4)
        assert measured[key] == pytest.approx(value, **tolerance), key


# The tests


@pytest.mark.parametrize("skip", [0, 1])
def test_metrics_equal_a_plain_reference(model, hf_model, group, skip):
    """Every metric of every SAE type, and BatchTopK's _batch figures, follow from their definitions."""
    store, saes = with_skip(group[0], skip), group[1]
    contexts = store.eval_contexts.tolist()
    assert len(contexts) == CONTEXTS
    results = evaluate(list(saes.values()), model, store, heldout_baseline(model, store))
    for (name, sae), result in zip(saes.items(), results):
        assert_equal_metrics(result, metrics_by_hand(hf_model, sae, contexts, skip, False, CONTEXTS))
        if name.startswith("batchtopk"):
            by_hand = metrics_by_hand(hf_model, sae, contexts, skip, True, CONTEXTS)
            assert_equal_metrics(result, by_hand, "_batch")
            assert by_hand["l0"] == sae.cfg["top_k"], "the batch top-k keeps k features a token"
            assert result["l0"] != result["l0_batch"], "the threshold is not the batch top-k"
            assert result["threshold"] == sae.threshold.item() > 0
        else:
            assert not any(key.endswith("_batch") for key in result)


def test_histograms_equal_a_plain_reference(model, hf_model, group):
    """Tokens by their number of active features, features by the log10 of their density: counted one by one."""
    store, saes = group
    saes = {name: copy.deepcopy(sae).eval() for name, sae in saes.items()}
    with torch.no_grad():
        for sae in saes.values():
            sae.W_enc[:, :2] = 0  # features that are hardly ever active
    rows = torch.cat([forward_by_hand(hf_model, tokens)[0][1:] for tokens in store.eval_contexts.tolist()])
    results = evaluate(list(saes.values()), model, store, heldout_baseline(model, store))
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


def test_histogram_bins_hold_every_density():
    """Features that are always active, or more rarely than the lowest edge says, are in the last and the first bin."""
    counted = histograms(token_l0=torch.tensor([2] * 999 + [0]), times_active=torch.tensor([1000, 50, 1e-6, 0, 0]))
    assert counted["l0"] == [1, 0, 999]
    middle = [int(edge <= math.log10(0.05) < edge + 0.25) for edge in counted["log10_density_edges"][1:-2]]
    assert counted["log10_density"] == [1, *middle, 1] and sum(middle) == 1 and counted["never_active"] == 2


def test_metrics_on_the_first_contexts(model, hf_model, group):
    """Evaluations during training are the same metrics on the first contexts, without the share of dead features."""
    store, saes = group
    results = evaluate(list(saes.values()), model, store, heldout_baseline(model, store), num_contexts=3)
    for sae, result in zip(saes.values(), results):
        assert "dead_fraction" not in result and "histograms" not in result
        reference = metrics_by_hand(hf_model, sae, store.eval_contexts.tolist(), 1, False, 3)
        del reference["dead_fraction"]
        assert_equal_metrics(result, reference)


def test_baseline_is_of_the_held_out_set(model, hf_model, group):
    """The mean activation and the CEs without an SAE are those of the held-out contexts, one by one."""
    store, _ = group
    baseline = heldout_baseline(model, store)
    contexts = store.eval_contexts.tolist()
    rows = torch.cat([forward_by_hand(hf_model, tokens)[0][1:] for tokens in contexts])
    torch.testing.assert_close(baseline["mean"], rows.mean(0), rtol=1e-4, atol=1e-4)
    for key, row in [("ce_original", None), ("ce_zero_ablated", torch.zeros(128)), ("ce_mean_ablated", rows.mean(0))]:
        by_hand = [ce_by_hand(hf_model, tokens, 1, row if row is None else [row] * SEQ_LEN) for tokens in contexts]
        assert baseline[key].tolist() == pytest.approx(by_hand, rel=2e-4)


def test_the_demo_language_model_has_something_to_lose(model, group):
    """The signs: ablation hurts the language model, so a reconstruction's degradation and recovery mean something."""
    store, saes = group
    for result in evaluate(list(saes.values()), model, store, heldout_baseline(model, store)):
        assert result["ce_zero_ablated"] - result["ce_original"] > 0.5
        assert result["ce_degradation"] > 0
        assert result["recovery_from_zero"] < 1
        assert all(math.isfinite(value) for key, value in result.items() if key != "histograms")


def state_of(model, sae) -> list:
    """Everything that an evaluation must leave as it was."""
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
    """Weights, buffers, gradients, mode, hooks and random states are the same after an evaluation as before."""
    store, saes = group
    contexts = store.eval_contexts.clone()
    for sae in saes.values():
        sae.train(training)
    before = [state_of(model, sae) for sae in saes.values()]
    first = evaluate(list(saes.values()), model, store, heldout_baseline(model, store))
    for sae, state in zip(saes.values(), before):
        for now, then in zip(state_of(model, sae), state, strict=True):
            if isinstance(then, dict):
                assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
            else:
                assert np.array_equal(now, then)
    assert torch.equal(store.eval_contexts, contexts)
    assert evaluate(list(saes.values()), model, store, heldout_baseline(model, store)) == first


def test_evaluation_takes_nothing_from_the_stream(model, group):
    """The next batch is the same with an evaluation before it as without."""
    batches = []
    for evaluated in (False, True):
        store = ActivationsStore(model, group[0].cfg)
        store.next_batch()
        if evaluated:
            evaluate(list(group[1].values()), model, store, heldout_baseline(model, store))
        batches.append(store.next_batch())
    assert torch.equal(*batches)


def test_metrics_do_not_depend_on_the_group(model, group):
    """An SAE evaluated among others gets the figures that it gets alone."""
    store, saes = group
    baseline = heldout_baseline(model, store)
    together = evaluate(list(saes.values()), model, store, baseline)
    for sae, result in zip(saes.values(), together):
        assert evaluate([sae], model, store, baseline) == [result]


def test_metrics_in_eval_do_not_depend_on_the_batches(model, group):
    """In eval() a token's features do not depend on its batch: only the _batch figures change with the batch size."""
    store, saes = group
    smaller = copy.copy(store)
    smaller.cfg = post_init_cfg(store.cfg | {"batch_size": SEQ_LEN})
    baseline = heldout_baseline(model, store)
    results = [evaluate(list(saes.values()), model, s, baseline) for s in (store, smaller)]
    for usual, other in zip(*results):
        assert usual.pop("histograms") == other.pop("histograms")
        assert {k: v for k, v in usual.items() if "_batch" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "_batch" not in k}, rel=1e-5, abs=1e-5
        )
        if "nmse_batch" in usual:
            assert usual["nmse_batch"] != pytest.approx(other["nmse_batch"], rel=1e-5)
