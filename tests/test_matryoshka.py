"""What Matryoshka BatchTopK adds to BatchTopK: nested prefixes of the dictionary, in the loss and in evaluation.

Values and gradients of all types are compared with tests/reference.py in test_sae.py and test_training_step.py.
"""

import copy
import json
import re

import pytest
import torch
from helpers import (
    completed_training_cfg,
    dense,
    figures,
    lines_of,
    make_sae,
    make_x,
    params,
    sae_cfg,
    same_bits,
    set_threshold,
    state,
    stopping_store,
    train,
)

from activation_store import ActivationsStore
from checkpoint import load_sae, save_sae
from config import post_init_cfg, prefix_sizes
from console import InputError
from evaluation import calibrate_threshold, evaluate, heldout_baseline, table
from export import export_sae, import_sae
from logs import run_folder
from sae import SAE_CLASSES
from sparse_ops import SparsityPattern
from training_step import make_optimizer, training_step

pytestmark = pytest.mark.fast
SIZES = [2, 7, 8, 24]


# Config


@pytest.mark.parametrize(
    "dict_size, sizes",
    [(12288, [384, 1152, 2688, 5760, 12288]), (48, [2, 5, 11, 23, 48]), (5, [1, 2, 3, 5]), (1, [1])],
)
def test_default_sizes(dict_size, sizes):
    """1/32, 3/32, 7/32, 15/32 and all of the dictionary, rounded up; equal ones are merged."""
    assert prefix_sizes(sae_cfg("matryoshka", F=dict_size, k=1)) == sizes


def test_sizes_may_be_set():
    cfg = sae_cfg("matryoshka", matryoshka_sizes=tuple(SIZES))
    assert cfg["matryoshka_sizes"] == prefix_sizes(cfg) == SIZES
    assert cfg["name"] != sae_cfg("matryoshka")["name"]
    assert sae_cfg("batchtopk", matryoshka_sizes=[7])["dict_size"] == 24, "other types ignore the key"


@pytest.mark.parametrize(
    "sizes", [[], [24, 24], [8, 4, 24], [0, 24], [-1, 24], [0.5, 1.0], [True, 24], 24, "24", [[24]]]
)
def test_sizes_that_are_not_increasing_numbers_of_features(sizes):
    with pytest.raises(InputError) as error:
        sae_cfg("matryoshka", matryoshka_sizes=sizes)
    assert str(error.value) == (
        f"matryoshka_sizes = {sizes!r} is not allowed: it must be None or a list of increasing numbers of features, "
        f"such as [64, 256, 1024]"
    )


@pytest.mark.parametrize("sizes", [[2, 7], [2, 25]])
def test_sizes_that_do_not_end_at_dict_size(sizes):
    with pytest.raises(InputError) as error:
        sae_cfg("matryoshka", matryoshka_sizes=sizes)
    assert str(error.value) == (
        f"matryoshka_sizes = {sizes} is not allowed: it must end at dict_size = 24, the whole dictionary"
    )


# The loss


@pytest.mark.parametrize("input_unit_norm", [True, False])
def test_loss_and_gradients_by_hand(input_unit_norm):
    """Backpropagation written out: feature j's residual is the mean of those of the prefixes that contain j."""
    sae = make_sae("matryoshka", matryoshka_sizes=SIZES, input_unit_norm=input_unit_norm, l1_coeff=0, aux_penalty=0)
    x, p = make_x(7, 5), params(sae)
    output = sae(x)
    output["loss"].backward()

    x_hat = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5) if input_unit_norm else x
    z = (x_hat - p["b_dec"]) @ p["W_enc"]
    f = torch.where(z >= z.relu().flatten().topk(3 * 7).values[-1], z, 0)
    residuals = [f[:, :m] @ p["W_dec"][:m] + p["b_dec"] - x_hat for m in SIZES]
    torch.testing.assert_close(output["loss"], sum(r.square().mean() for r in residuals) / len(SIZES))
    torch.testing.assert_close(output["l2_loss"], residuals[-1].square().mean())
    grad_W_dec, grad_z = torch.zeros_like(p["W_dec"]), torch.zeros_like(z)
    for j in range(24):
        residual = sum(r for m, r in zip(SIZES, residuals) if j < m) / len(SIZES) * 2 / x.numel()
        grad_W_dec[j] = f[:, j] @ residual
        grad_z[:, j] = residual @ p["W_dec"][j] * (f[:, j] > 0)
    grad_b_dec = sum(residuals).sum(0) / len(SIZES) * 2 / x.numel() - (grad_z @ p["W_enc"].T).sum(0)
    torch.testing.assert_close(sae.W_dec.grad, grad_W_dec)
    torch.testing.assert_close(sae.W_enc.grad, (x_hat - p["b_dec"]).T @ grad_z)
    torch.testing.assert_close(sae.b_dec.grad, grad_b_dec)


def test_l2_and_aux_loss_are_those_of_batchtopk():
    """With the same weights, all outputs but the loss are BatchTopK's to rounding."""
    sae, other = make_sae("matryoshka", matryoshka_sizes=SIZES), make_sae("batchtopk")
    other.load_state_dict(sae.state_dict())
    output, expected = sae(make_x(7, 5)), other(make_x(7, 5))
    assert expected["aux_loss"] > 0 and output["loss"].item() != pytest.approx(expected["loss"].item(), rel=0.01)
    for key in expected.keys() - {"loss"}:
        torch.testing.assert_close(dense(output[key]), dense(expected[key]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_prefix_is_bit_identical_to_batchtopk(dtype):
    """Weights, counters, threshold and outputs after several steps, with dead features."""
    trained = {}
    for kind in ("matryoshka", "batchtopk"):
        sae = make_sae(kind, d=16, F=48, k=4, dtype=dtype, lr=0.02, matryoshka_sizes=[48])
        optimizer = make_optimizer(sae, sae.cfg)
        outputs = [training_step(sae, optimizer, make_x(12, 16, step), sae.cfg) for step in range(6)]
        trained[kind] = state(sae), outputs
    (weights, outputs), (expected, expected_outputs) = trained.values()
    assert any(output["aux_loss"] > 0 for output in outputs)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for output, expected_output in zip(outputs, expected_outputs):
        assert all(torch.equal(dense(output[key]), dense(expected_output[key])) for key in expected_output)


def test_padded_patterns_are_split_by_group_too():
    """PaddedPattern.by_group (CUDA) computes what SparsityPattern.by_group does: padding, empty rows and groups."""
    pytest.importorskip("triton", reason="Triton is for Linux only: the kernels were NOT tested")
    import triton_ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    matrix = (torch.randn(6, 24, generator=g) * (torch.rand(6, 24, generator=g) < 0.3)).to(device)
    matrix[2], matrix[:, SIZES[1] : SIZES[2]] = 0, 0
    reference = SparsityPattern.of(matrix)
    rows, cols, values = (
        torch.nn.functional.pad(of, (0, 5), value=with_)
        for of, with_ in ((reference.rows, 5), (reference.cols, 24), (reference.products, 0))
    )
    row_offsets = torch.nn.functional.pad((matrix != 0).sum(1).cumsum(0), (1, 0)).int()
    padded = triton_ops.PaddedPattern(rows.int(), cols.int(), row_offsets, (6, 24), values, None, None)
    ours, theirs = padded.by_group(SIZES), reference.by_group(SIZES)
    assert ours.row_offsets[-1] == len(reference), "no row has the padding"
    table, grad = torch.randn(24, 12, generator=g).to(device), torch.randn(6 * 4, 12, generator=g).to(device)
    torch.testing.assert_close(ours.spmm(values, table), theirs.spmm(reference.products, table))
    found, expected = (of.decode_gradients(v, table, grad) for of, v in ((ours, values), (theirs, reference.products)))
    torch.testing.assert_close(found[0][: len(reference)], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    parts = theirs.spmm(reference.products, table).view(6, 4, 12).cumsum(1)
    for p, m in enumerate(SIZES):
        torch.testing.assert_close(parts[:, p], matrix[:, :m] @ table[:m])


# Prefixes


@pytest.mark.parametrize("input_unit_norm", [True, False])
@pytest.mark.parametrize("m", SIZES)
def test_a_prefix_is_the_truncated_sae(m, input_unit_norm):
    """A BatchTopK with the first m features and the threshold reconstructs as decode(f[..., :m]) does."""
    sae = make_sae("matryoshka", matryoshka_sizes=SIZES, input_unit_norm=input_unit_norm).eval()
    truncated = make_sae("batchtopk", F=m, k=1, input_unit_norm=input_unit_norm).eval()
    with torch.no_grad():
        truncated.W_enc.copy_(sae.W_enc[:, :m])
        truncated.W_dec.copy_(sae.W_dec[:m])
        truncated.b_dec.copy_(sae.b_dec)
    set_threshold(sae, 0.4)
    set_threshold(truncated, 0.4)
    x = make_x(14, 5).view(2, 7, 5)
    reconstruction, features = truncated.reconstruct(x)
    assert (features > 0).any()
    torch.testing.assert_close(sae.encode(x)[..., :m], features)
    torch.testing.assert_close(sae.decode(features, like=x), reconstruction)


def test_reconstructions_are_those_of_the_prefixes():
    sae = make_sae("matryoshka", matryoshka_sizes=SIZES)
    x = sae.preprocess_input(make_x(7, 5))[0]
    pattern = sae.select(x, wait=True)
    acts = sae.activation(sae.pre_activation(x, pattern), pattern)
    features = acts if pattern is None else pattern.sparse_tensor(acts).to_dense()
    for m, reconstruction in zip(SIZES, sae.reconstructions(acts, pattern), strict=True):
        torch.testing.assert_close(reconstruction, sae.decode(features[:, :m]))


# Evaluation


@pytest.fixture(scope="module")
def evaluated(model, training_data, tmp_path_factory):
    """A store, a Matryoshka SAE after some steps, and its metrics."""
    cfg = completed_training_cfg(
        training_data, tmp_path_factory.mktemp("runs"), sae_type="matryoshka", top_k=8, layer=2
    )
    store, sae = ActivationsStore(model, cfg), SAE_CLASSES["matryoshka"](cfg)
    optimizer = make_optimizer(sae, cfg)
    for _ in range(10):
        training_step(sae, optimizer, store.next_batch(), cfg)
    baseline = heldout_baseline(store)
    return store, sae, baseline, evaluate([sae], store, baseline)[0]


def test_metrics_of_prefixes_are_those_of_truncated_saes(evaluated):
    """All metrics of the first m features equal those of a BatchTopK with these features and the threshold alone."""
    store, sae, baseline, metrics = evaluated
    assert prefix_sizes(sae.cfg) == [2, 6, 14, 30, 64]
    assert metrics["nmse_prefix_2"] > metrics["nmse_prefix_14"] > metrics["nmse"]
    for m in (2, 6, 14, 30):
        truncated = SAE_CLASSES["batchtopk"](post_init_cfg(sae.cfg | dict(sae_type="batchtopk", dict_size=m, top_k=1)))
        with torch.no_grad():
            truncated.W_enc.copy_(sae.W_enc[:, :m])
            truncated.W_dec.copy_(sae.W_dec[:m])
            truncated.b_dec.copy_(sae.b_dec)
        set_threshold(truncated, sae.threshold)
        (expected,) = evaluate([truncated], store, baseline)
        of_prefix = {key: value for key, value in metrics.items() if re.search(rf"_prefix_{m}(_se)?$", key)}
        expected = {re.sub(r"(_se)?$", rf"_prefix_{m}\1", key, count=1): value for key, value in expected.items()}
        assert len(of_prefix) == 2 * 11 and of_prefix.keys() <= expected.keys()
        assert of_prefix == pytest.approx({key: expected[key] for key in of_prefix}, rel=1e-4, abs=1e-6)


def test_prefixes_are_measured_on_the_whole_held_out_set_only(evaluated):
    store, sae, baseline, metrics = evaluated
    (some,) = evaluate([sae], store, baseline, num_contexts=2)
    assert not any("_prefix_" in key for key in some)
    assert {"nmse", "nmse_batch", "threshold"} <= some.keys() & metrics.keys()


def test_printed_table(evaluated):
    """One aligned line per prefix, below the table of all metrics, which does not have them."""
    metrics = evaluated[3]
    first, second = table(metrics).split("\n\n")
    assert "_prefix_" not in first and len(second.splitlines()) == 6
    head, *lines = (re.split("  +", line) for line in second.splitlines())
    assert head == ["features", "nmse", "fvu", "l0", "dead_fraction", "ce_degradation"]
    assert [line[0] for line in lines] == ["2", "6", "14", "30", "all"]
    for line, suffix in zip(lines, ["_prefix_2", "_prefix_6", "_prefix_14", "_prefix_30", ""]):
        for key, cell in zip(head[1:], line[1:], strict=True):
            assert cell == f"{metrics[key + suffix]:.4f} ± {metrics[f'{key}{suffix}_se']:.4f}"


def test_threshold_can_be_calibrated(evaluated):
    store, sae, *_ = evaluated
    sae = copy.deepcopy(sae).eval()
    x = store.get_activations(store.eval_contexts)[:, 1:].flatten(0, 1)
    l0 = calibrate_threshold(sae, x, target_l0=3)
    assert l0 == pytest.approx(3, rel=0.05) and (sae.encode(x) > 0).sum(1).double().mean() == pytest.approx(l0)


# Records


def test_round_trip(tmp_path):
    sae = make_sae("matryoshka", matryoshka_sizes=SIZES, dtype="float32")
    set_threshold(sae, 0.4)
    save_sae(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path)
    assert loaded.cfg == sae.cfg and prefix_sizes(loaded.cfg) == SIZES
    assert same_bits(loaded, sae)


@pytest.mark.parametrize("sizes", [None, [64, 200, 256]])
@pytest.mark.parametrize("config", ["ours", "theirs"])
def test_dictionary_learning_keeps_the_groups(tmp_path, sizes, config):
    """Also where the folder holds that library's config only."""
    sae = make_sae("matryoshka", d=16, F=256, matryoshka_sizes=sizes, dtype="float32", input_unit_norm=False)
    set_threshold(sae, 0.4)
    export_sae(sae, "dictionary_learning", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    written = json.loads(path.read_text())
    groups = [8, 16, 32, 64, 136] if sizes is None else [64, 136, 56]
    assert written["trainer"]["group_sizes"] == groups and sum(written["trainer"]["group_fractions"]) == 1
    if config == "theirs":
        del written["batchtopk_config"]
        path.write_text(json.dumps(written))
    back = import_sae(tmp_path / "out", "dictionary_learning")
    assert (back.cfg["sae_type"], back.cfg["matryoshka_sizes"]) == ("matryoshka", sizes)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in params(sae, torch.float32).items()
               if name != "b_enc")  # fmt: skip
    assert "for m = 8, 24, 56, 120." in (card := (tmp_path / "out" / "README.md").read_text()) or sizes
    assert "# Matryoshka SAE with 256 features" in card and "arxiv.org/abs/2503.17547" in card


def test_resumes_to_the_bit_in_a_mixed_group(model, training_data, tmp_path):
    kinds = [dict(sae_type="matryoshka", top_k=4, n_batches_to_dead=2), dict(sae_type="topk", top_k=4)]
    whole, cut = (
        [
            completed_training_cfg(training_data, tmp_path / name, **kind, checkpoint_freq=2, log_freq=2)
            for kind in kinds
        ]
        for name in ("whole", "cut")
    )
    saes, results = train(model, whole)
    with pytest.raises(KeyboardInterrupt):
        train(model, cut, stopping_store(8, KeyboardInterrupt()))
    assert not (run_folder(cut[0]) / "result.json").exists()
    resumed, resumed_results = train(model, cut)
    assert all(map(same_bits, saes, resumed))
    assert list(map(figures, results)) == list(map(figures, resumed_results))
    assert [lines_of(run_folder(cfg)) for cfg in whole] == [lines_of(run_folder(cfg)) for cfg in cut]
