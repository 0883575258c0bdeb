"""What keeps features alive: b_dec_init, taken from a stream that does not move, also in a resumed run; γ. And how
similar features are.
"""

import re

import numpy as np
import pytest
import torch
from helpers import same_bits, stopping_store, train

import evaluation
import main
from activation_store import ActivationsStore
from config import KEYS
from console import InputError
from sae import SAE_CLASSES
from training import Stopped, initialize_b_dec
from training_step import make_optimizer, training_step

pytestmark = pytest.mark.fast

MEAN = dict(b_dec_init="mean", dict_size=96)
GROUP = [
    dict(sae_type="topk", top_k=4),
    dict(sae_type="topk", top_k=4, **MEAN),
    dict(sae_type="batchtopk", top_k=4, **MEAN),
    dict(sae_type="vanilla", l1_coeff=0.02, input_unit_norm=False, **MEAN),
    dict(sae_type="jumprelu", l1_coeff=0.01, dtype="float64", **MEAN),
]


def new_sae(cfg):
    return SAE_CLASSES[cfg["sae_type"]](cfg)


def first_buffer(store) -> np.ndarray:
    """All rows [n, d] of the first buffer, batch by batch; this moves the store."""
    batches = [store.next_batch()]
    while store.offset < len(store.buffer):
        batches.append(store.next_batch())
    assert len(batches) > 1
    return torch.cat(batches).double().numpy()


def normalised(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-5)


def test_b_dec_is_the_mean_and_the_stream_stays_where_it_is(model, training_cfg, capsys):
    cfgs = [training_cfg(**changes) for changes in GROUP]
    store, saes = ActivationsStore(model, cfgs[0]), [new_sae(cfg) for cfg in cfgs]
    before = store.state_dict()
    capsys.readouterr()
    initialize_b_dec(saes, store)
    assert store.state_dict() == before
    printed = capsys.readouterr().err
    expected = first_buffer(ActivationsStore(model, cfgs[0]))
    assert np.array_equal(first_buffer(store), expected), "the batches are those of a store that nobody looked into"
    for sae in saes:
        rows = normalised(expected) if sae.cfg["input_unit_norm"] else expected
        mean = rows.mean(0) if sae.cfg["b_dec_init"] == "mean" else 0 * rows[0]
        np.testing.assert_allclose(sae.b_dec.detach().numpy(), mean, rtol=1e-5, atol=1e-6)
    gammas = [f"{np.linalg.norm(x.mean(0)) / np.linalg.norm(x.std(0)):.2f}" for x in (normalised(expected), expected)]
    warned = re.findall(r"warning: many features of (\d) SAEs? may die, because γ = .* is (\d+\.\d+), above", printed)
    assert warned == ([("1", gammas[0])] if float(gammas[0]) > 0.5 else []), "only the SAE that begins at zero"
    capsys.readouterr()
    initialize_b_dec(saes[1:], store)
    assert "warning" not in capsys.readouterr().err


def test_a_store_in_the_middle_of_its_buffer_or_at_its_end(model, training_cfg):
    cfg = training_cfg(**GROUP[1])
    store, other = ActivationsStore(model, cfg), ActivationsStore(model, cfg)
    for _ in range(2):  # in the middle of the first buffer, then at its end
        while True:
            store.next_batch(), other.next_batch()
            before = store.state_dict()
            initialize_b_dec([new_sae(cfg)], store)
            assert store.state_dict() == before == other.state_dict()
            if store.offset == 0:
                break
        assert torch.equal(store.next_batch(), other.next_batch())


def test_b_dec_is_the_same_in_a_group_alone_cached_and_in_a_custom_loop(model, training_cfg, tmp_path):
    cfgs = [training_cfg(**changes) for changes in GROUP]
    group, results = train(model, cfgs)
    assert [result["decoder_similarity"] for result in results] == [
        evaluation.decoder_similarity(sae.W_dec) for sae in group
    ]
    (alone,), _ = train(model, [training_cfg("alone", **GROUP[2])])
    assert same_bits(group[2], alone)
    for times in range(2):  # written, then read
        cached = training_cfg(f"cached{times}", **GROUP[2], activation_cache=str(tmp_path / "cache"))
        (sae,), _ = train(model, [cached])
        assert same_bits(sae, alone)

    own, store, cfg = new_sae(cfgs[2]), ActivationsStore(model, cfgs[2]), cfgs[2]
    optimizer = make_optimizer(own, cfg)
    initialize_b_dec([own], store)
    for _ in range(cfg["num_tokens"] // cfg["batch_size"]):
        training_step(own, optimizer, store.next_batch(), cfg)
    assert same_bits(own, alone)


@pytest.mark.parametrize("stop_in", [1, 2, 5])
def test_a_resumed_run_is_not_initialised_again(model, training_cfg, stop_in):
    whole, _ = train(model, [training_cfg("whole", **changes) for changes in GROUP])
    cfgs = [training_cfg("cut", **changes) for changes in GROUP]
    with pytest.raises(Stopped):
        train(model, cfgs, stopping_store(stop_in, Stopped()))
    resumed, _ = train(model, cfgs)
    for sae, other in zip(whole, resumed, strict=True):
        assert same_bits(sae, other)


def test_a_loaded_b_dec_is_kept(model, training_cfg):
    cfg = training_cfg(**GROUP[1])
    sae = new_sae(cfg)
    sae.b_dec.data[3] = 0.5
    initialize_b_dec([sae], ActivationsStore(model, cfg))
    assert sae.b_dec.count_nonzero() == 1


@pytest.mark.parametrize("rows", [2, 5, 40])
def test_decoder_similarity_is_the_mean_over_pairs(rows, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 3 * rows)  # some rows at a time
    W_dec = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    pairs = [
        abs(float(a @ b)) / (np.linalg.norm(a) * np.linalg.norm(b))
        for i, a in enumerate(W_dec.numpy())
        for b in W_dec.numpy()[:i]
    ]
    assert evaluation.decoder_similarity(W_dec) == pytest.approx(np.mean(pairs))


def test_the_recommended_sweep_is_the_papers_with_other_settings():
    runs = {sweep: main.sweep_configs(sweep, {}) for sweep in ("paper", "recommended")}
    for paper, recommended in zip(runs["paper"], runs["recommended"], strict=True):
        changed = {key for key in KEYS if paper[key] != recommended[key]}
        assert changed == {*main.RECOMMENDED, "sweep"} and recommended["b_dec_init"] == "mean"
        assert paper["name"] != recommended["name"]


def test_nan_in_activations_is_an_error(model, training_cfg):
    cfg = training_cfg(**GROUP[1])
    store, sae = ActivationsStore(model, cfg), new_sae(cfg)
    store.peek()[-1, 0] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinity in the activations of .*lm"):
        initialize_b_dec([sae], store)
    assert not sae.b_dec.any()
