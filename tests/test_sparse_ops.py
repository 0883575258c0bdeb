"""The sparse form selects what a float64 product would, and computes what the dense form computes."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import DEMO_LM, KINDS, feature_major, hard_input, make_sae, make_x
from torch.overrides import TorchFunctionMode

import sparse_ops
from config import get_default_cfg
from evaluation import calibrate_threshold, decoder_similarity
from language_model import Harvester, load_model
from sae import SAE_CLASSES, SPARSE_AFTER, JumpReLUSAE, VanillaSAE
from sparse_ops import SparsityPattern
from training_step import Run, apply_update, group_step, make_optimizer, training_step

SCREENS = (torch.bfloat16, torch.float32)


def flat(pattern):
    return pattern.rows * pattern.shape[1] + pattern.cols


@pytest.fixture(autouse=True)
def sparse_whatever_it_costs(monkeypatch):
    monkeypatch.setattr(sparse_ops, "DENSE_FROM", 1)
    monkeypatch.setattr(sparse_ops, "sparse_is_cheaper", lambda *_: True)


@pytest.fixture(params=SCREENS, ids=str)
def screen_dtype(request, monkeypatch):
    monkeypatch.setattr(sparse_ops, "screen_dtype", lambda device: request.param)


@pytest.mark.parametrize("per_row", [True, False], ids=["topk", "batchtopk"])
@pytest.mark.parametrize("kind", ["plain", "heavy tails", "scales", "zero rows", "negative rows", "ties", "packed"])
@pytest.mark.parametrize("seed", range(6))
def test_selects_what_float64_selects(screen_dtype, kind, per_row, seed):
    """Exactly k a row (B·k a batch) less where fewer are positive, and those of float64 beyond float32's rounding."""
    x, W = hard_input(kind, seed)
    k = 1 + seed * 2
    pattern = sparse_ops.select_topk(x, W, k, per_row)
    values = pattern.products
    z = x.double() @ W.double()
    rounding = 2e-7 * len(W) * (x.double().norm(dim=-1, keepdim=True) * W.double().norm(dim=0)).clamp(min=1e-30)
    selected = torch.zeros_like(z, dtype=torch.bool)
    selected[pattern.rows, pattern.cols] = True
    assert selected.sum() == len(pattern)  # no place twice
    assert (values > 0).all()
    assert ((values - z[selected]).abs() <= rounding[selected]).all()
    # Of the surely positive entries, those surely above the k-th are selected and those surely below are not.
    tables = [(z, rounding, selected, k)] if per_row else [(t.reshape(1, -1) for t in (z, rounding, selected))]
    tables = tables if per_row else [(*tables[0], k * len(x))]
    for z, rounding, selected, k in tables:
        upper, lower = ((z + s * rounding).topk(k).values[:, -1:] for s in (1, -1))
        assert selected[(z - rounding > upper) & (z - rounding > 0)].all()
        assert not selected[z + rounding < lower].any()
        assert not selected[z + rounding < 0].any()
        surely_positive, maybe_positive = ((z > s * rounding).sum(-1).clamp(max=k) for s in (1, -1))
        assert (selected.sum(-1) >= surely_positive).all()
        assert (selected.sum(-1) <= maybe_positive).all()


def test_finds_a_winner_that_the_screen_underrates(screen_dtype):
    """Two features whose screened values err by the whole bound, one up and one down: the true order counts."""
    d, eps = 64, 1e-4
    halfway = 1.984375 - 2.0**-8
    W = torch.zeros(d + 1, 128)
    W[:d, 3], W[:d, 90] = halfway + eps, halfway - eps  # rounded up by almost half a unit, and down
    W[d, 90] = 0.03125  # which makes it the greater of the two
    pattern = sparse_ops.select_topk(torch.ones(1, d + 1), feature_major(W), 1, per_row=True)
    assert pattern.cols.tolist() == [90]


@pytest.mark.fast
def test_ties_go_to_the_first(screen_dtype):
    x, W = torch.ones(3, 2), feature_major(torch.ones(2, 128))
    pattern = sparse_ops.select_topk(x, W, 5, per_row=True)
    assert pattern.rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert pattern.cols.tolist() == [0, 1, 2, 3, 4] * 3
    pattern = sparse_ops.select_topk(x, W, 5, per_row=False)
    assert flat(pattern).tolist() == list(range(15))


@pytest.mark.parametrize("per_row", [True, False], ids=["topk", "batchtopk"])
@pytest.mark.parametrize("kind", ["plain", "heavy tails", "scales", "packed"])
def test_the_screen_leaves_no_trace(monkeypatch, kind, per_row):
    """Screened in bfloat16 or in float32: the same places and the same bits."""
    x, W = hard_input(kind, 3)
    found = []
    for dtype in SCREENS:
        monkeypatch.setattr(sparse_ops, "screen_dtype", lambda device, dtype=dtype: dtype)
        found.append(sparse_ops.select_topk(x, W, 4, per_row))
    assert torch.equal(flat(found[0]), flat(found[1]))
    assert torch.equal(found[0].products, found[1].products)


@pytest.mark.parametrize("kind", ["plain", "heavy tails", "scales", "zero rows", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_everything_above_a_threshold(screen_dtype, kind, seed):
    """All entries above θ − margin and no others, but for float32's rounding."""
    x, W = hard_input(kind, seed)
    g = torch.Generator().manual_seed(seed)
    b, theta = torch.randn(W.shape[1], generator=g) * 0.1, torch.rand(W.shape[1], generator=g) + 0.5
    pattern = sparse_ops.select_above(x, W, b, theta, 0.05)
    distance = x.double() @ W.double() + b.double() - theta.double() + 0.05
    rounding = 2e-7 * len(W) * (x.double().norm(dim=-1, keepdim=True) * W.double().norm(dim=0)) + 1e-6
    selected = torch.zeros_like(distance, dtype=torch.bool)
    selected[pattern.rows, pattern.cols] = True
    assert selected[distance > rounding].all()
    assert not selected[distance < -rounding].any()
    assert ((pattern.products - (x.double() @ W.double())[selected]).abs() <= rounding[selected]).all()


@pytest.mark.fast
def test_the_bound_holds(screen_dtype):
    """The error of every screened value, its last rounding included, is within the bound."""
    for kind in ("plain", "heavy tails", "scales", "negative rows"):
        for seed in range(4):
            x, W = hard_input(kind, seed)
            z, error = sparse_ops.screen(x, W)
            true = x.double() @ W.double()
            allowed = (true.abs() + error.double()[:, None]) * sparse_ops.relative_error(z.dtype) * 1.01
            assert ((z.double() - true).abs() <= error.double()[:, None] + allowed).all()


def test_too_many_candidates_are_left_to_the_dense_form(monkeypatch):
    monkeypatch.setattr(sparse_ops, "DENSE_FROM", 16)
    x, W = hard_input("packed", 1)
    assert sparse_ops.select_topk(x, W.abs(), 1, per_row=False) is None or (x @ W.abs() > 0).float().mean() < 1 / 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_reported(kind, bad):
    """In the activations or the encoder, by either form; nothing is selected around them."""
    for until_sparse in (0, 5):
        sae = make_sae(kind, d=16, F=64, dtype="float32")
        if "batches_until_sparse" in dict(sae.named_buffers()):
            sae.batches_until_sparse.fill_(until_sparse)
        x = make_x(8, 16, dtype=torch.float32)
        sae(x)
        x[3, 5] = bad
        with pytest.raises(FloatingPointError, match="NaN or infinity in the activations"):
            sae(x)


def both_forms(kind, seed, **changes):
    """The same SAE in dense and in sparse form, with gradients, of the same float32 batch."""
    found = []
    for sparse in (False, True):
        # Half of the features are dead, so that the aux loss is in its sparse form with few of them a token, or dense.
        sae = make_sae(kind, seed=seed, d=24, F=160, k=5, dtype="float32", top_k_aux=(3, 40)[seed % 2], **changes)
        sae.num_batches_not_active[::2] = 10
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse_ops, "sparse_is_cheaper", lambda *_: sparse)  # noqa: B023
            if isinstance(sae, tuple(SAE_CLASSES[name] for name in ("vanilla", "jumprelu"))):
                sae.batches_until_sparse.fill_(0 if sparse else 5)
            x = make_x(30, 24, seed, dtype=torch.float32).requires_grad_()
            output = sae(x)
            assert output["feature_acts"].is_sparse == sparse
            output["loss"].backward()
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None} | {"x": x.grad}
        found.append((sae, output, gradients))
    return found


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_the_dense_form(screen_dtype, kind, seed, unit_norm):
    """Values to float32's rounding, gradients to 1e-5 of their norm, in x and every parameter, aux loss included."""
    (_, dense, dense_grads), (_, sparse, sparse_grads) = both_forms(kind, seed, input_unit_norm=unit_norm)
    assert set(dense) == set(sparse)
    assert "aux_loss" not in dense or dense["aux_loss"] > 0
    for key, value in dense.items():
        torch.testing.assert_close(sparse[key].to_dense(), value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: k + m)
    assert {name for name, grad in dense_grads.items() if grad.any()} <= set(sparse_grads)
    for name, grad in sparse_grads.items():
        error = (grad - dense_grads.get(name, 0)).norm()
        assert error <= 1e-5 * dense_grads.get(name, grad).norm(), name
        assert grad.stride() == (dict(make_sae(kind).named_parameters()) | {"x": grad})[name].stride() or grad.ndim == 2


def test_active_features_may_be_differentiated():
    """feature_acts keeps its graph in sparse form, for whoever adds a loss of their own."""
    sae = make_sae("topk", d=24, F=160, k=5, dtype="float32")
    output = sae(make_x(30, 24, dtype=torch.float32))
    output["feature_acts"].to_dense().sum().backward()
    assert sae.W_enc.grad.abs().sum() > 0


def test_the_form_follows_from_counts():
    """A new JumpReLU is sparse, goes dense when many features are active, and back after 10 batches with few."""
    sae = JumpReLUSAE(make_sae("jumprelu", d=16, F=480, dtype="float32", l1_coeff=0.0).cfg)
    optimizer = make_optimizer(sae, sae.cfg | {"lr": 0.0})
    forms = []
    for step in range(30):
        with torch.no_grad():
            sae.jumprelu.log_threshold.fill_(-5.0 if step == 15 else 1.5)
        output = training_step(sae, optimizer, make_x(16, 16, step, torch.float32), sae.cfg)
        forms.append(output["feature_acts"].is_sparse)
    assert forms == [True] * 16 + [False] * 10 + [True] * 4


def test_a_new_vanilla_is_dense(monkeypatch):
    """Half of its features are active: there are too many candidates, and the next 10 batches do not look for any."""
    monkeypatch.setattr(sparse_ops, "DENSE_FROM", 16)
    sae, calls = VanillaSAE(make_sae("vanilla", d=16, F=480, dtype="float32", l1_coeff=1e-3).cfg), []
    real, optimizer = sparse_ops.select_above, make_optimizer(sae, sae.cfg)
    monkeypatch.setattr(sparse_ops, "select_above", lambda *args: calls.append(1) or real(*args))
    for step in range(5):
        output = training_step(sae, optimizer, make_x(16, 16, step, torch.float32), sae.cfg)
        assert not output["feature_acts"].is_sparse and sae.batches_until_sparse == 10
    assert len(calls) == 1


def test_too_many_candidates_restart_the_count(monkeypatch):
    """Also where few features are active: the next batches do not look for candidates."""
    sae = make_sae("jumprelu", d=16, F=480, dtype="float32")
    sae.jumprelu.log_threshold.data.fill_(2.0)
    monkeypatch.setattr(sparse_ops, "select_above", lambda *_: None)
    sae.update_statistics(sae(make_x(16, 16, 0, torch.float32)))
    assert sae.batches_until_sparse == SPARSE_AFTER


@pytest.mark.fast
def test_a_pattern_of_nothing():
    """No entries: products of zeros, and no error."""
    pattern = SparsityPattern(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), (3, 4))
    values = torch.zeros(0)
    assert pattern.sddmm(torch.ones(3, 2), torch.ones(4, 2)).shape == (0,)
    assert torch.equal(pattern.spmm(values, torch.ones(4, 2)), torch.zeros(3, 2))
    assert torch.equal(pattern.spmm_t(values, torch.ones(3, 2)), torch.zeros(4, 2))
    assert torch.equal(pattern.sparse_tensor(values).to_dense(), torch.zeros(3, 4))


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_300_steps_differ_no_more_than_two_dense_runs_do(kind, monkeypatch):
    """On the demo's activations: from the dense form as far as that is from itself with another order of sums.

    The forms may select differently where an activation ties with the last that is selected. In this text, which does
    not depend on the version of Python, the smallest relative gap is 1.2e-6, several times the rounding error.
    """
    model = load_model(get_default_cfg() | {"model_name": str(DEMO_LM), "device": "cpu"})
    text = (DEMO_LM / "tokenizer.json").read_text(encoding="utf-8")[:110_000]
    tokens = model.tokenizer(text, verbose=False)["input_ids"]
    tokens = torch.tensor(tokens[: len(tokens) // 128 * 128]).view(-1, 128)
    x = Harvester(model, "blocks.2.hook_resid_pre")(tokens).flatten(0, 1).float()
    x = x[: len(x) // 64 * 64]  # whole batches
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    changes = dict(d=128, F=512, k=8, top_k_aux=64, lr=3e-3, n_batches_to_dead=20, aux_penalty=1 / 32, dtype="float32")

    def losses(sparse: bool, order: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(sparse_ops, "sparse_is_cheaper", lambda *_: sparse)
        sae = make_sae(kind, **changes)
        optimizer = make_optimizer(sae, sae.cfg)
        batches = [x[shuffled[64 * i % len(x) :][:64]] for i in range(300)]
        # The order of the tokens within a batch, and so that of all sums over them, is all that differs.
        return torch.stack([training_step(sae, optimizer, b[order], sae.cfg)["loss"].detach() for b in batches])

    plain, backwards = torch.arange(64), torch.arange(63, -1, -1)
    dense, reordered, sparse = losses(False, plain), losses(False, backwards), losses(True, plain)
    assert dense[-20:].mean() < 0.5 * dense[0], "it learns"
    assert (sparse - dense).abs().mean() <= 3 * (reordered - dense).abs().mean()


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE does


def medium():
    torch.set_float32_matmul_precision("medium")


def new_interface():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def all_backends():
    torch.backends.fp32_precision = "tf32"


def bfloat16_on_the_cpu():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def precision_settings():
    matmul = torch.backends.cuda.matmul
    for read in (
        lambda: matmul.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        *(lambda name=name: getattr(matmul, name, None) for name in sparse_ops.SUMS_IN_16_BITS),
    ):
        try:
            yield read()
        except RuntimeError:  # torch refuses one of its interfaces after the other was used
            yield "refused"


def check_precision(change_settings):
    """forward, a step and reconstruct in float32 are those in float64 to float32's rounding; settings are restored."""
    change_settings()
    before = list(precision_settings())
    for kind in ("batchtopk", "jumprelu"):
        low, exact = (make_sae(kind, d=64, F=512, k=4, dtype=dtype) for dtype in ("float32", "float64"))
        with torch.no_grad():
            for parameter, other in zip(exact.parameters(), low.parameters()):
                parameter.copy_(other)
        outputs, rebuilt = [], []
        for sae in (exact, low):
            x = make_x(256, 64).to(sae.W_dec)
            outputs.append([sae(x)["sae_out"].detach().double()])
            step = training_step(sae, make_optimizer(sae, sae.cfg), x, sae.cfg)
            outputs[-1].append(step["feature_acts"].detach().to_dense().double())
            with torch.no_grad():
                rebuilt.append(sae.eval().reconstruct(x)[0].double())
        for wanted, found in zip(*outputs):
            assert (found - wanted).norm() < 1e-5 * wanted.norm()
        assert (rebuilt[1] - rebuilt[0]).norm() < 1e-3 * rebuilt[0].norm()
    assert list(precision_settings()) == before


def check_threads():
    """Precision is set in a thread that begins while another computes in another one, and after both have ended."""
    matmul = torch.backends.cuda.matmul
    first, second = sparse_ops.full_precision("ieee"), sparse_ops.full_precision("tf32")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        assert matmul.fp32_precision == "tf32"
        for context, thread in ((first, one), (second, other)):
            thread.submit(context.__exit__, None, None, None).result()
        matmul.fp32_precision = "tf32"
        for thread in (one, other):
            assert thread.submit(sparse_ops.full_precision()(lambda: matmul.fp32_precision)).result() == "ieee"


def check_side_by_side():
    """Of two steps side by side, one ends while the other computes: the precision of that one stays the same."""
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    saes = [make_sae("topk", d=16, F=64, dtype="float32") for _ in range(2)]
    both, ended, seen = threading.Barrier(2), threading.Event(), []

    def forward(which, forward_normalised, *args):
        both.wait(9)
        if which == 1:
            assert ended.wait(9)
            seen.append(matmul.fp32_precision)
        return forward_normalised(*args)

    def finish(sae, *args):
        apply_update(sae, *args)
        if sae is saes[0]:
            ended.set()

    for i, sae in enumerate(saes):
        sae.forward_normalised = partial(forward, i, sae.forward_normalised)
    pytest.MonkeyPatch().setattr("training_step.apply_update", finish)  # in a process of its own
    torch.set_num_threads(2)
    runs = [Run(sae.cfg, sae, make_optimizer(sae, sae.cfg), None) for sae in saes]
    group_step(runs, make_x(8, 16, 0, torch.float32), [], {})
    assert seen == ["ieee"] and matmul.fp32_precision == "bf16"


def in_a_process(function, *args):
    """Run in a process of its own: torch's settings cannot all be put back."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("change_settings", [allow_tf32, medium, new_interface, all_backends, bfloat16_on_the_cpu])
def test_precision_is_what_it_should_be_whatever_is_set(change_settings):
    in_a_process(check_precision, change_settings)


class Products(TorchFunctionMode):
    """Counts matrix products, which must be in full precision."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__ or "matmul" in function.__name__:
            assert sparse_ops._precision.active == "ieee"
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_all_products_of_an_sae_are_in_full_precision():
    """On this CPU the settings may have no effect, so it is asked whether they are set."""
    sae, x = make_sae("batchtopk", d=64, F=512, k=4), make_x(8, 64)
    acts = sae.encode(x)
    for function in (
        lambda: sae.encode(x), lambda: sae.decode(acts), lambda: sae.reconstruct(x), lambda: sae(x)["loss"],
        lambda: training_step(sae, make_optimizer(sae, sae.cfg), x, sae.cfg),
        lambda: calibrate_threshold(sae, x), lambda: decoder_similarity(sae.W_dec),
    ):  # fmt: skip
        with Products() as products:
            function()
        assert products.count > 0


def test_precision_is_set_in_every_thread():
    in_a_process(check_threads)


def test_precision_of_steps_side_by_side():
    in_a_process(check_side_by_side)


def test_memory_that_runs_out_while_probing_is_an_error(monkeypatch):
    """It says nothing about what the device can do."""

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(SparsityPattern, "sddmm", out_of_memory)
    sparse_ops.has_sparse_kernels.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        sparse_ops.has_sparse_kernels(torch.device("cpu"))


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["distinct", "ties", "few positive", "zeros", "negative"])
@pytest.mark.parametrize("shape", [(40,), (6, 40)])
def test_keep_top_k_keeps_k(kind, shape):
    """The k largest positive values, also with ties at the k-th; their gradient is 1 and that of the others 0."""
    g = torch.Generator().manual_seed(0)
    values = torch.rand(shape, generator=g, dtype=torch.float64)
    if kind == "ties":
        values = (values * 4).round()
    elif kind == "few positive":
        values[..., 3:] = 0
    elif kind == "zeros":
        values[:] = 0
    elif kind == "negative":
        values -= 0.9  # fewer than 7 are positive in a row
    values.requires_grad_()
    kept = sparse_ops.keep_top_k(values, 7)
    expected = values.detach().clamp(min=0).topk(7, dim=-1).values
    assert torch.equal(kept.detach().topk(8, dim=-1).values, torch.nn.functional.pad(expected, (0, 1)))
    assert ((kept == values) | (kept == 0)).all()
    kept.sum().backward()
    assert (values.grad[kept > 0] == 1).all() and (values.grad[(kept == 0) & (values > 0)] == 0).all()


def test_keep_top_k_does_not_wait_for_a_gpu():
    """A CUDA graph could not record it. A tensor on "meta" raises an error if the host asks for its values."""
    z = torch.empty(40, device="meta", requires_grad=True)
    sparse_ops.keep_top_k(z, 7).sum().backward()
    assert z.grad.shape == z.shape
    with pytest.raises(RuntimeError, match="meta"):
        bool(z.any())
