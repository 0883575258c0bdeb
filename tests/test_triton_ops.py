"""The kernels of triton_ops.py: on a GPU where there is one, else on CPU tensors in Triton's interpreter.

They select what float64 selects, compute what the torch path computes, and leave everything as it was when they fail.
"""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import KINDS, feature_major, hard_input, make_sae, make_x, results_of, run_ranks, sae_cfg, state
from torch.overrides import TorchFunctionMode

import distributed
import sparse_ops
from sae import FEATURE_DIM, SAE_CLASSES, Counts
from shards import team
from training import save_if_memory_runs_out
from training_step import Run, StepGraphs, graph_key, group_step, launch_step, make_optimizer, scalars, training_step

pytest.importorskip("triton", reason="Triton is for Linux only: the kernels were NOT tested")
import triton  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import triton_ops  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HARD = ["plain", "heavy tails", "scales", "zero rows", "negative rows", "ties", "packed"]
BY_ROW = pytest.mark.parametrize("per_row", [True, False], ids=["topk", "batchtopk"])


@pytest.fixture(autouse=True, scope="module")
def patched_once():
    """Triton's interpreter patches its language again at every call of a function: more than a third of its time."""
    patch, Scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if DEVICE == "cuda" or not patch or not Scope:
        yield
        return
    functions = [vars(module) for module in (triton_ops, triton.language.standard)]
    scopes = [patch(SimpleNamespace(__globals__=names)) for names in functions]
    interpreter._patch_lang = lambda fn: Scope()
    yield
    interpreter._patch_lang = patch
    for scope in reversed(scopes):
        scope.restore()


def use_triton(monkeypatch, use=True):
    monkeypatch.setattr(sparse_ops, "uses_triton", lambda x: use and x.dtype == torch.float32)


@pytest.fixture(autouse=True)
def sparse_whatever_it_costs(monkeypatch):
    use_triton(monkeypatch)
    monkeypatch.setattr(sparse_ops, "DENSE_FROM", 1)
    monkeypatch.setattr(sparse_ops, "sparse_is_cheaper", lambda *_: True)
    monkeypatch.setattr(sparse_ops, "_grown", {})
    monkeypatch.setattr("sae.GOES_DENSE", 1)


def small(kind, seed):
    """hard_input with few rows and columns: each costs the interpreter a while."""
    x, W = hard_input(kind, seed)
    return x[:5].to(DEVICE), W[:, :70].T.contiguous().T.to(DEVICE)


def places(pattern):
    n = int(pattern.row_offsets[-1])
    return pattern.rows[:n].long(), pattern.cols[:n].long(), pattern.products[:n]


@BY_ROW
@pytest.mark.parametrize("kind", HARD)
def test_selects_what_the_torch_path_selects(kind, per_row, monkeypatch):
    """The same places in the same order (ties to the first), but for values within rounding of the threshold."""
    k = 3
    x, W = small(kind, 1)
    pattern = sparse_ops.select_topk(x, W, k, per_row)
    rows, cols, products = places(pattern)
    use_triton(monkeypatch, False)
    expected = sparse_ops.select_topk(x, W, k, per_row)
    use_triton(monkeypatch)
    rounding = 4e-7 * len(W) * (x.norm(dim=-1).amax() * W.norm(dim=0).amax()).item()
    exact = (x.double() @ W.double())[rows, cols]
    own = 4e-7 * len(W) * (x.norm(dim=-1)[rows] * W.norm(dim=0)[cols])
    assert ((products - exact).abs() <= own).all()
    assert (products > 0).all()
    flat, expected_flat = rows * W.shape[1] + cols, expected.rows * W.shape[1] + expected.cols
    assert flat.equal(flat.unique())  # row-major, no place twice
    different = set(flat.tolist()) ^ set(expected_flat.tolist())
    if kind in ("ties", "zero rows", "plain", "negative rows"):
        assert not different
    z = (x.double() @ W.double()).flatten()
    levels = z.view(len(x), -1).topk(k).values[:, -1] if per_row else z.topk(k * len(x)).values[-1:]
    for place in different:
        level = levels[place // W.shape[1]] if per_row else levels[0]
        assert abs(z[place] - max(level, 0)) <= rounding


@pytest.mark.parametrize("kind", ["plain", "heavy tails", "scales", "zero rows", "packed"])
def test_everything_above_a_threshold(kind):
    """All entries above θ − margin and no others, but for float32's rounding."""
    x, W = small(kind, 1)
    g = torch.Generator().manual_seed(1)
    b, theta = torch.randn(W.shape[1], generator=g) * 0.1, torch.rand(W.shape[1], generator=g) + 0.5
    b, theta = b.to(DEVICE), theta.to(DEVICE)
    rows, cols, products = places(sparse_ops.select_above(x, W, b, theta, 0.05))
    exact = x.double() @ W.double()
    distance = exact + b.double() - theta.double() + 0.05
    rounding = 2e-7 * len(W) * (x.double().norm(dim=-1, keepdim=True) * W.double().norm(dim=0)) + 1e-6
    selected = torch.zeros_like(distance, dtype=torch.bool)
    selected[rows, cols] = True
    assert selected[distance > rounding].all()
    assert not selected[distance < -rounding].any()
    assert ((products - exact[selected]).abs() <= rounding[selected]).all()


@pytest.mark.parametrize("with_offset", [False, True])
def test_the_bound_holds(with_offset):
    """The error of every screened value, its last rounding included, is within the bound; and it is no idle one."""
    for kind in ("plain", "heavy tails", "scales", "negative rows"):
        x, W = small(kind, 1)
        offset = torch.linspace(-3, 1, W.shape[1]).to(DEVICE) if with_offset else None
        screened = triton_ops.screen(x, W, offset, at_least=1)
        true = x.double() @ W.double() + (offset.double() if with_offset else 0)
        z, error = (n.double() / screened.scales[:, None] for n in (screened.z, screened.errors[:, None]))
        allowed = (true.abs() + error) * 2.0**-11 * 1.01
        assert ((z - true).abs() <= error + allowed).all()
        size = (x.double().norm(dim=-1, keepdim=True) + 2) * (W.double().norm(dim=0).amax() + 4)
        assert (error < 0.1 * size).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
@BY_ROW
def test_rows_of_any_size(scale, per_row):
    """Powers of 2 keep the screen within float16's range: the same places, whatever the rows' scale."""
    x, W = small("plain", 1)
    expected = places(sparse_ops.select_topk(x, W, 3, per_row))
    x[2] *= 1e-9  # by itself selected in no batch
    found = places(sparse_ops.select_topk(x * scale, W, 3, per_row))
    if per_row:
        assert all(map(torch.equal, found[:2], expected[:2]))
    else:
        assert found[0].equal(places(sparse_ops.select_topk(x, W, 3, per_row))[0])


@pytest.mark.parametrize("with_offset", [False, True])
def test_weights_too_large_for_the_screen_take_the_dense_form(with_offset):
    x, W = small("plain", 1)
    b = torch.zeros_like(W[0])

    def select(W, b):
        return sparse_ops.select_above(x, W, b, 0, 0.0) if with_offset else sparse_ops.select_topk(x, W, 3, True)

    assert select(W, b) is not None
    W = W.clone()
    if with_offset:
        b[3] = -300.0
        assert select(W, b) is None
        b[3] = 0
    W[:, 5] *= 300 / W[:, 5].norm()
    assert select(W, b) is None


@pytest.mark.parametrize("width", [30, 90])
def test_dense_products_have_16_bits_of_precision(width):
    """In every layout, of a small and of a large result, the error is within its bound and beyond what one product of
    bfloat16 has.
    """
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 75, generator=g) * 10.0 ** torch.randint(-3, 4, (n, 1), generator=g) for n in (20, width))
    a, b = a.to(DEVICE), b.to(DEVICE)
    exact, norms = a.double() @ b.double().T, a.norm(dim=1, keepdim=True) * b.norm(dim=1)
    for left in (a, a.T.contiguous().T):
        for right in (b.T, b.T.contiguous(), torch.cat([b, b], 1)[:, :75].T):
            error = (triton_ops.matmul(left, right).double() - exact).abs()
            assert (error <= 2.0**-15 * norms).all()
    assert not ((a.bfloat16().double() @ b.bfloat16().double().T - exact).abs() <= 2.0**-15 * norms).all()


@pytest.mark.parametrize("inner, copies", [(60, [3, 3]), (61, [3, 2])])
def test_dense_products_of_large_operands_store_their_high_parts_once(inner, copies, monkeypatch):
    real, used = triton_ops.parts, []

    def parts(matrix, inner, copies, low):
        used.append(copies)
        return real(matrix, inner, copies, low)

    monkeypatch.setattr(triton_ops, "parts", parts)
    triton_ops.matmul(torch.ones(2, inner).to(DEVICE), torch.ones(inner, 30).to(DEVICE))
    assert used == copies


@BY_ROW
@pytest.mark.fast
def test_more_candidates_than_a_program_reads_at_once(per_row):
    """300 groups of one feature each, more than half of them with candidates."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(2, 8, generator=g).to(DEVICE), torch.randn(300, 8, generator=g).to(DEVICE)
    k = 75
    rows, cols, _ = places(triton_ops.select_topk(x, W.T, k, per_row, 600))
    z = x.double() @ W.double().T
    level = z.topk(k).values[:, -1:] if per_row else z.flatten().topk(2 * k).values[-1]
    found = torch.zeros_like(z, dtype=torch.bool)
    found[rows, cols] = True
    assert found.equal((z >= level) & (z > 0))


@pytest.mark.fast
def test_more_rows_than_a_program_places_at_once():
    counts = torch.randint(0, 4, (2100,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    errors, limits = torch.zeros(2100, device=DEVICE), torch.zeros(5, device=DEVICE)
    row_offsets = torch.empty(2101, dtype=torch.int32, device=DEVICE)
    found, failure = torch.empty(2, dtype=torch.int64, device=DEVICE)
    for capacity, expected in ((5000, 0), (500, sparse_ops.OVERFLOW)):
        triton_ops.place_candidates[(1,)](
            counts, errors, limits, row_offsets, found, failure, 2100, capacity, NOT_FINITE=1, OVERFLOW=2, BLOCK=1024
        )
        assert row_offsets[1:].equal(counts.cumsum(0).clamp(max=capacity).int()) and row_offsets[0] == 0
        assert found == counts.sum() and failure == expected


@pytest.mark.fast
def test_ties_go_to_the_first():
    x, W = torch.ones(3, 2, device=DEVICE), feature_major(torch.ones(2, 128)).to(DEVICE)
    rows, cols, _ = places(sparse_ops.select_topk(x, W, 5, per_row=True))
    assert rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert cols.tolist() == [0, 1, 2, 3, 4] * 3
    rows, cols, _ = places(sparse_ops.select_topk(x, W, 5, per_row=False))
    assert (rows * 128 + cols).tolist() == list(range(15))


@pytest.mark.fast
def test_finds_a_winner_that_the_screen_underrates():
    """Two features whose screened values err by the whole bound, one up and one down: the true order counts."""
    d, eps = 64, 1e-4
    halfway = 1.984375 - 2.0**-8
    W = torch.zeros(d + 1, 128)
    W[:d, 3], W[:d, 90] = halfway + eps, halfway - eps
    W[d, 90] = 0.03125
    x = torch.ones(1, d + 1, device=DEVICE)
    _, cols, _ = places(sparse_ops.select_topk(x, feature_major(W).to(DEVICE), 1, per_row=True))
    assert cols.tolist() == [90]


@pytest.mark.parametrize("d", [33, 576, 768, 2048, 4096])
def test_products_over_a_pattern(d):
    """Of any width, F no multiple of 64, a feature with more entries than a chunk, features and rows with none."""
    g = torch.Generator().manual_seed(d)
    B, num_features = (2 * triton_ops.CHUNK + 7, 21) if d < 100 else (5, 13)
    matrix = torch.randn(B, num_features, generator=g) * (torch.rand(B, num_features, generator=g) < 0.2)
    matrix[:, 4], matrix[:, 7], matrix[3] = 1 + torch.rand(B, generator=g), 0, 0
    matrix = matrix.to(DEVICE)
    reference = sparse_ops.SparsityPattern.of(matrix)
    n, padding = len(reference), 9
    fill = lambda values, with_: torch.nn.functional.pad(values, (0, padding), value=with_)  # noqa: E731
    pattern = triton_ops.PaddedPattern(
        fill(reference.rows, B - 1).int(), fill(reference.cols, num_features).int(),
        torch.nn.functional.pad((matrix != 0).sum(1).cumsum(0), (1, 0)).int(), matrix.shape,
        fill(reference.products, 0.0), None, None,
    )  # fmt: skip
    table, x, grad = (torch.randn(rows, d, generator=g).to(DEVICE) for rows in (num_features, B, B))
    exact, close = matrix.double(), dict(rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(pattern.spmm(pattern.products, table).double(), exact @ table.double(), **close)
    torch.testing.assert_close(pattern.spmm_t(pattern.products, x).double(), exact.T @ x.double(), **close)
    torch.testing.assert_close(pattern.feature_sums(pattern.products).double(), exact.sum(0), **close)
    grad_values, grad_W = pattern.decode_gradients(pattern.products, table, grad)
    torch.testing.assert_close(grad_W.double(), exact.T @ grad.double(), **close)
    full = grad.double() @ table.double().T
    torch.testing.assert_close(grad_values[:n].double(), full[reference.rows, reference.cols], rtol=1e-5, atol=2e-4)
    assert not grad_values[n:].any()
    assert pattern.sparse_tensor(pattern.products).to_dense().equal(matrix)
    assert pattern.trimmed().sparse_tensor(pattern.trimmed().products).is_coalesced()


@pytest.mark.parametrize("form", ["dense", "sparse", "nothing active"])
@pytest.mark.fast
def test_statistics_of_activations(form):
    """Count, sum, the active features and the smallest positive activation, of several programs' worth of values."""
    g = torch.Generator().manual_seed(0)
    acts = torch.relu(torch.randn(150, 300, generator=g) - (100 if form == "nothing active" else 1.5))
    acts[:, 7], acts[:, 130] = 0, 0
    acts[:, 299] = 0
    acts[149, 299] = 0 if form == "nothing active" else 5e-4
    acts = acts.to(DEVICE)
    pattern = None
    values = acts
    if form != "dense":
        rows, cols = (torch.ones_like(acts) if form == "nothing active" else acts).nonzero(as_tuple=True)
        pattern = SimpleNamespace(cols=cols.int(), shape=acts.shape)
        values = acts[rows, cols]
        smallest = acts[acts > 0].min() if (acts > 0).any() else torch.tensor(torch.inf)
        assert sparse_ops.smallest_positive(values) == smallest.to(DEVICE)
    count, total, mask = sparse_ops.count_active(values, pattern)
    assert count == (acts > 0).sum() and mask.equal((acts > 0).any(0)) and mask.dtype == torch.bool
    torch.testing.assert_close(total.double(), acts.double().sum(), rtol=1e-5, atol=0)


@pytest.mark.fast
@pytest.mark.parametrize("programs, length, seed", [(1, 500, 0), (512, 5000, 1)])
def test_sums_of_activations_do_not_depend_on_the_zeros_after_them(programs, length, seed, monkeypatch):
    """There are as many as there is room for candidates, and a resumed run may have less than the run before it."""
    monkeypatch.setattr(triton_ops.Total, "PROGRAMS", programs)
    values = torch.rand(length, generator=torch.Generator().manual_seed(seed)).exp().to(DEVICE)
    padded = [torch.nn.functional.pad(values, (0, more)) for more in (0, 1, 37, 2000, 9000)]
    if DEVICE == "cpu" and length == 500:
        assert len({each.sum().item() for each in padded}) > 1, "torch's sum would do"
    totals = set()
    for each in padded:
        pattern = SimpleNamespace(cols=torch.zeros_like(each, dtype=torch.int32), shape=(1, 1))
        total = sparse_ops.total(each.requires_grad_(), pattern)
        totals |= {total.item(), sparse_ops.count_active(each, pattern)[1].item()}
        (3 * total).backward()
        assert (each.grad == 3).all()
    assert len(totals) == 1
    torch.testing.assert_close(totals.pop(), values.double().sum().item(), rtol=1e-6, atol=0)


@pytest.mark.fast
def test_the_l1_penalty_uses_total(monkeypatch):
    sae, _, _ = trained("vanilla", True, monkeypatch, steps=0)
    x = make_x(6, 12, 0, torch.float32).to(DEVICE)
    before = sae(x)["l1_loss"].item()
    monkeypatch.setattr(sparse_ops, "total", lambda acts, pattern: 2 * acts.sum())
    assert before > 0 and sae(x)["l1_loss"].item() == pytest.approx(2 * before)


@pytest.mark.fast
def test_adams_moments_are_allocated_before_the_first_step(monkeypatch):
    """Those of the two matrices: b_enc of a TopK has no gradient, and no moments."""
    sae, optimizer, _ = trained("topk", True, monkeypatch, steps=0)
    assert [state["exp_avg"].shape for state in optimizer.state.values()] == [sae.W_dec.shape] * 2


@pytest.mark.fast
def test_mean_squared_error_and_its_gradients():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(150, 33, generator=g).to(DEVICE).requires_grad_() for _ in range(2))
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    loss, expected = sparse_ops.mean_squared_error(a, b), torch.nn.functional.mse_loss(*exact)
    (3 * loss).backward(), (3 * expected).backward()
    for ours, theirs in zip((loss, a.grad, b.grad), (expected, exact[0].grad, exact[1].grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (0, 8)])
@pytest.mark.fast
def test_normalised_input(shape):
    """Also into a given tensor; and as a differentiable function where gradients are wanted."""
    x = 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = x.double()
    mean, std = exact.mean(-1, keepdim=True), exact.std(-1, keepdim=True)
    expected, out = ((exact - mean) / (std + 1e-5), mean, std), torch.empty_like(x)
    for found in (sparse_ops.normalise(x), sparse_ops.normalise(x, out), sparse_ops.normalise(x.requires_grad_())):
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-5, atol=1e-5)
    assert found[0].requires_grad and found[0] is not out
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.fast
def test_the_top_k_of_rows():
    """Ties go to the first; a row with fewer positive values keeps them all; nothing else is left."""
    z = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    z[1], z[2, 5:], z[3, 10:20] = -1, -2, 4.0
    acts = sparse_ops.keep_top_k(z, 7)
    order = z.sort(dim=1, descending=True, stable=True).indices[:, :7]
    expected = torch.zeros_like(z).scatter_(1, order, z.gather(1, order).clamp(min=0))
    assert acts.equal(expected)


TOO_SMALL = (6, 24, 3), (6, 24, None)  # sizes of the selections in `trained`, as keys of sparse_ops._grown


def trained(kind, triton, monkeypatch, steps=2, dead=slice(None, None, 2), **changes):
    """An SAE after a few steps, half of its features (or `dead`) dead at first; and the steps' outputs."""
    use_triton(monkeypatch, triton)
    sae = make_sae(kind, d=12, F=24, k=3, dtype="float32", top_k_aux=5, lr=0.01, **changes).to(DEVICE)
    sae.num_batches_not_active[dead] = 10
    if hasattr(sae, "batches_until_sparse"):
        sae.batches_until_sparse.fill_(0)
    optimizer, outputs = make_optimizer(sae, sae.cfg), []
    for step in range(steps):
        x = make_x(6, 12, step, torch.float32).to(DEVICE)
        outputs.append(training_step(sae, optimizer, x, sae.cfg))
    return sae, optimizer, outputs


@pytest.fixture(scope="module")
def two_steps():
    """A function that gives an SAE of a kind after two steps with the kernels, the optimizer and the steps' outputs."""
    made = {}

    def after_two_steps(kind, monkeypatch):
        if kind not in made:
            made[kind] = trained(kind, True, monkeypatch)
        return made[kind]

    return after_two_steps


@pytest.mark.parametrize(
    "kind, max_grad_norm", [*((kind, 100_000.0) for kind in KINDS), ("batchtopk", 0.05), ("jumprelu", 0.05)]
)
@pytest.mark.fast
def test_training_steps_equal_the_torch_path(kind, max_grad_norm, monkeypatch, two_steps):
    """Outputs, weights, counters, thresholds and Adam's state after two steps, aux loss and clipping included."""
    expected, expected_optimizer, expected_outputs = trained(kind, False, monkeypatch, max_grad_norm=max_grad_norm)
    if max_grad_norm == 100_000.0:
        sae, optimizer, outputs = two_steps(kind, monkeypatch)
    else:
        sae, optimizer, outputs = trained(kind, True, monkeypatch, max_grad_norm=max_grad_norm)
    for output, expected_output in zip(outputs, expected_outputs):
        assert set(output) == set(expected_output)
        assert output["feature_acts"].is_sparse and expected_output["feature_acts"].is_sparse
        for key, value in expected_output.items():
            torch.testing.assert_close(output[key].to_dense(), value.to_dense(), rtol=1e-3, atol=1e-5, msg=key)
    assert kind not in ("topk", "batchtopk", "matryoshka") or outputs[0]["aux_loss"] > 0
    for name, value in state(expected).items():
        torch.testing.assert_close(state(sae)[name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() < 1e-6
    for held, other in zip(optimizer.param_groups[0]["params"], expected_optimizer.param_groups[0]["params"]):
        for key, value in expected_optimizer.state[other].items():
            torch.testing.assert_close(optimizer.state[held][key], value, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.skipif(DEVICE == "cuda", reason="two ranks on one GPU")
def test_shards(monkeypatch):
    """An SAE split over two ranks, only one with dead features, takes the step of a whole one with torch's products."""
    make_whole, kind = make_sae, "batchtopk"

    def make_alive(*args, **changes):
        sae = make_whole(*args, **changes)
        sae.num_batches_not_active.zero_()
        return sae

    monkeypatch.setitem(globals(), "make_sae", make_alive)

    def make_slice(*args, **changes):
        sae = make_whole(*args, **changes)
        own = SAE_CLASSES[kind](sae.cfg, team(2))
        parts = {name: tensor.chunk(2, FEATURE_DIM[name])[distributed.rank()] for name, tensor in state(sae).items()
                 if name in FEATURE_DIM}  # fmt: skip
        own.load_state_dict(state(sae) | parts)
        own.num_batches_not_active.zero_()
        return own

    def steps():
        monkeypatch.setitem(globals(), "make_sae", make_slice)
        dead = slice(0, 12, 2) if distributed.rank() == 0 else slice(0)
        sae, _, outputs = trained(kind, True, monkeypatch, dead=dead)
        assert all(output["feature_acts"].is_sparse for output in outputs)
        return state(sae), [{key: v.item() for key, v in output.items() if v.ndim == 0} for output in outputs]

    sae, _, outputs = trained(kind, False, monkeypatch, dead=slice(0, 12, 2))
    assert outputs[0]["aux_loss"] > 0
    ranks = results_of(run_ranks(2, steps))
    for _, found in ranks:
        for values, output in zip(found, outputs):
            assert values == pytest.approx({key: output[key].item() for key in values}, rel=1e-3, abs=1e-5)
    for name, value in state(sae).items():
        parts = [own[name] for own, _ in ranks]
        found = torch.cat(parts, FEATURE_DIM[name]) if name in FEATURE_DIM else parts[0]
        torch.testing.assert_close(found, value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
@pytest.mark.fast
def test_the_counts_for_the_next_step(kind, monkeypatch):
    """What the host reads at the end of a step is what the SAE holds."""
    sae, optimizer, _ = trained(kind, True, monkeypatch, steps=0)
    if kind == "jumprelu":
        sae.batches_until_sparse.fill_(3)
    training_step(sae, optimizer, make_x(6, 12, 1, torch.float32).to(DEVICE), sae.cfg)
    known, sae.known_counts = sae.known_counts, None
    assert known == sae.counts() and known.most_dead > 0 and (known.until_sparse > 0) == (kind == "jumprelu")


def test_the_graph_key_changes_with_its_own_capacity_only(monkeypatch):
    """Each key has CUDA graphs of its own, whose recording costs several steps."""
    topk, jumprelu = (trained(kind, True, monkeypatch, steps=0)[0] for kind in ("topk", "jumprelu"))
    before = [graph_key(sae, 6) for sae in (topk, jumprelu)]
    sparse_ops._grown[6, 24, None] = 9
    assert [graph_key(sae, 6) == key for sae, key in zip((topk, jumprelu), before)] == [True, False]
    sparse_ops._grown[6, 24, 3] = 9
    assert graph_key(topk, 6) != before[0]


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_a_step_gives_the_same_bits_again(kind, monkeypatch, two_steps):
    first, second = state(two_steps(kind, monkeypatch)[0]), state(trained(kind, True, monkeypatch)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_too_many_candidates(kind, monkeypatch, two_steps):
    """A step whose candidates overflow changes nothing until it is repeated with room for them; then it is the same."""
    expected = state(two_steps(kind, monkeypatch)[0])
    sae, optimizer, _ = trained(kind, True, monkeypatch, steps=1)
    monkeypatch.setattr(sparse_ops, "_grown", dict.fromkeys(TOO_SMALL, 3))
    before, moments = state(sae), [t.clone() for s in optimizer.state.values() for t in s.values()]
    x = make_x(6, 12, 1, torch.float32).to(DEVICE)
    output = launch_step(sae, optimizer, sae.preprocess_input(x)[0], sae.cfg)
    assert output["status"][0] == sparse_ops.OVERFLOW
    assert all(torch.equal(before[name], value) for name, value in state(sae).items())
    assert all(map(torch.equal, moments, [t for s in optimizer.state.values() for t in s.values()]))
    training_step(sae, optimizer, x, sae.cfg)
    assert all(torch.equal(expected[name], value) for name, value in state(sae).items())
    assert max(sparse_ops._grown.values()) > 3


def test_too_many_candidates_to_pay_off_take_the_dense_form(monkeypatch):
    """Above 1/DENSE_FROM of all entries the step takes the dense form, and is right."""
    expected = trained("batchtopk", False, monkeypatch, steps=1)[0]
    monkeypatch.setattr(sparse_ops, "DENSE_FROM", 40)
    sae, _, (output,) = trained("batchtopk", True, monkeypatch, steps=1)
    assert not output["feature_acts"].is_sparse
    for name, value in state(expected).items():
        torch.testing.assert_close(state(sae)[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_more_dead_features_than_expected_are_noticed(monkeypatch):
    """The host sizes the aux loss by counters that it knows; if they were changed under it, the step is repeated."""
    sae, optimizer, _ = trained("topk", True, monkeypatch, steps=0)
    other, other_optimizer, _ = trained("topk", True, monkeypatch, steps=0)
    for one in (sae, other):
        one.num_batches_not_active.fill_(10)
    sae.known_counts, other.known_counts = Counts(0, 0), None
    x = make_x(6, 12, 1, torch.float32).to(DEVICE)
    assert training_step(sae, optimizer, x, sae.cfg)["aux_loss"] > 0
    training_step(other, other_optimizer, x, other.cfg)
    assert all(torch.equal(value, state(other)[name]) for name, value in state(sae).items())


def test_memory_that_runs_out_in_a_repeated_step(monkeypatch):
    """A run whose step must be repeated has not taken it: what is saved when memory runs out must not say so."""
    runs = [Run(sae.cfg | {"name": name}, sae, optimizer, None) for name in "ab"
            for sae, optimizer, _ in [trained("topk", True, monkeypatch, steps=0)]]  # fmt: skip
    monkeypatch.setattr(sparse_ops, "_grown", dict.fromkeys(TOO_SMALL, 3))
    real, saved = sparse_ops.within_capacity, {}

    def within_capacity(size, wait, *functions):
        if wait:
            raise torch.OutOfMemoryError("no memory")
        return real(size, wait, *functions)

    monkeypatch.setattr(sparse_ops, "within_capacity", within_capacity)
    checkpoints = SimpleNamespace(save=lambda step, position, ahead: saved.update(ahead=ahead))
    before = [state(run.sae) for run in runs]
    outputs, x = [], make_x(6, 12, 0, torch.float32).to(DEVICE)
    with pytest.raises(torch.OutOfMemoryError), save_if_memory_runs_out(runs, outputs, checkpoints, {"row": 0}, 1, 9):
        group_step(runs, x, outputs, {})
    assert saved == {"ahead": {}}
    for run, values in zip(runs, before):
        assert all(torch.equal(values[name], value) for name, value in state(run.sae).items())


@pytest.mark.parametrize("kind, where", [*((kind, "activations") for kind in KINDS), ("batchtopk", "gradient")])
def test_nan_never_reaches_the_weights(kind, where, monkeypatch):
    """The step raises and changes nothing; the other SAE of the group takes its step."""
    sae, optimizer, _ = trained(kind, True, monkeypatch, steps=0)
    other, other_optimizer, _ = trained(kind, True, monkeypatch, steps=0)
    if hasattr(sae, "batches_until_sparse"):
        sae.batches_until_sparse.fill_(3)
    before, before_other = state(sae), state(other)
    x = make_x(6, 12, 1, torch.float32).to(DEVICE)
    runs = [Run(sae.cfg, sae, optimizer, None), Run(other.cfg, other, other_optimizer, None)]
    if where == "activations":
        with pytest.raises(FloatingPointError, match="NaN or infinity in the activations"):
            training_step(sae, optimizer, x * float("nan"), sae.cfg)
    else:
        sae.b_dec.register_hook(lambda grad: grad * float("inf"))
        outputs = []
        group_step(runs, x, outputs, {})
        error, output = outputs
        assert isinstance(error, FloatingPointError) and "gradient" in str(error)
        assert output["loss"].isfinite() and not {"failure", "status", "scales"} & set(output)
        assert not torch.equal(state(other)["W_dec"], before_other["W_dec"])
    assert all(torch.equal(before[name], value) for name, value in state(sae).items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "W", "offset"])
@pytest.mark.fast
def test_what_is_not_finite_is_noticed_on_the_device(where, bad):
    """In one number of the inputs of a selection."""
    x, W = small("plain", 1)
    offset = torch.zeros(W.shape[1], device=DEVICE)
    {"x": x, "W": W, "offset": offset}[where][..., 3] = bad
    patterns = [triton_ops.select_above(x, W, offset, 0.0, 100)]
    if where != "offset":
        patterns += [triton_ops.select_topk(x, W, 3, per_row, 100) for per_row in (True, False)]
    for pattern in patterns:
        assert pattern.failure & sparse_ops.NOT_FINITE


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, float64_by_default])
def test_the_kernels_test_themselves(mode):
    """At the real size, and in whatever mode they are first used: a self-test that fails turns the kernels off."""
    with mode():
        triton_ops.self_test(torch.device(DEVICE))


def test_the_self_test_notices_wrong_kernels(monkeypatch):
    monkeypatch.setattr(triton_ops, "CHUNK", 16)  # fewer rows
    wrong = lambda self, values, table: table.new_ones(self.shape[0], table.shape[1])  # noqa: E731
    monkeypatch.setattr(triton_ops.PaddedPattern, "spmm", wrong)
    with pytest.raises(RuntimeError, match="wrong"):
        triton_ops.self_test(torch.device(DEVICE))


def test_every_kernel_compiles():
    """For compute capability 8.0 and 9.0, at the smallest and the largest width: the interpreter accepts more."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = Path(triton_ops.__file__).read_text().count("@triton.jit") - 4  # less the functions that kernels call
    assert done.stdout.count(" compiles\n") == kernels


READS = [
    getattr(torch.Tensor, name)
    for name in ("tolist", "item", "numpy", "cpu", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__")
]


class NoReads(TorchFunctionMode):
    """An error for what copies a value to the host: it is not allowed while a CUDA graph is recorded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in READS, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_once_its_form_is_known(kind, monkeypatch):
    """Also if the known counts are forgotten: after a step that had to be repeated, or whose counters were set."""
    sae, optimizer, _ = trained(kind, True, monkeypatch, steps=1)
    x = sae.preprocess_input(make_x(6, 12, 4, torch.float32).to(DEVICE))[0]
    sae.known_counts = None
    with pytest.raises(AssertionError, match="tolist"), NoReads():
        graph_key(sae, len(x))
    graph_key(sae, len(x))
    with NoReads():
        launch_step(sae, optimizer, x, sae.cfg)


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_a_step_does_not_wait_for_the_device(kind, monkeypatch):
    sae, optimizer, _ = trained(kind, True, monkeypatch, steps=2)
    x = make_x(6, 12, 4, torch.float32).to(DEVICE)
    try:
        torch.cuda.set_sync_debug_mode("error")
        launch_step(sae, optimizer, sae.preprocess_input(x)[0], sae.cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_graphs_give_the_bits_of_steps_without(kind, monkeypatch):
    """With a learning rate that changes, in between a batch with NaN, and one for whose candidates there is no room."""
    sae, optimizer, _ = trained(kind, True, monkeypatch, steps=0)
    plain, plain_optimizer, _ = trained(kind, True, monkeypatch, steps=0)
    run = Run(sae.cfg, sae, optimizer, None)
    for step in range(12):
        if step == 8:
            monkeypatch.setattr(sparse_ops, "_grown", dict.fromkeys(TOO_SMALL, 3))
        if step == 1:
            sae.known_counts = None  # they must be read before this step is recorded
        optimizer.param_groups[0]["lr"] = plain_optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        x = make_x(6, 12, step, torch.float32).to(DEVICE)
        if step == 5:
            x[3, 2] = float("nan")
        outputs = []
        group_step([run], x, outputs, {})
        if step == 5:
            assert isinstance(outputs[0], FloatingPointError)
            continue
        expected = training_step(plain, plain_optimizer, x, plain.cfg)
        for key, value in outputs[0].items():
            assert torch.equal(value, expected[key]), (step, key)
        for name, value in state(plain).items():
            assert torch.equal(state(sae)[name], value), (step, name)
    assert run.graphs.recorded


def group(kinds, **changes):
    """Runs of SAEs of a size at which a step's intermediate results fill several blocks of memory."""
    runs = []
    for seed, kind in enumerate(kinds):
        cfg = sae_cfg(kind, d=64, F=2048, k=8, dtype="float32", device="cuda", top_k_aux=16, seed=seed, **changes)
        sae = SAE_CLASSES[kind](cfg).train()
        if hasattr(sae, "batches_until_sparse"):
            sae.batches_until_sparse.fill_(0)
        runs.append(Run(cfg, sae, make_optimizer(sae, cfg), None))
    return runs


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_graphs_of_a_group_do_not_disturb_each_other(monkeypatch):
    """They share memory, and are recorded in an order other than that in which they run."""
    monkeypatch.undo()
    kinds = ["topk", "batchtopk", "jumprelu", "topk", "vanilla", "matryoshka", "batchtopk"]
    together, alone = (group(kinds, n_batches_to_dead=3) for _ in range(2))
    for step in range(30):
        if step % 7 == 3:  # another form for some of them
            for run in together[step % 3 :: 3] + alone[step % 3 :: 3]:
                run.sae.num_batches_not_active[: 100 * step] = 10
                run.sae.known_counts = None
        x, outputs = make_x(1024, 64, step, torch.float32).cuda(), []
        group_step(together, x, outputs, {})
        for run, other, output in zip(together, alone, outputs):
            expected = training_step(other.sae, other.optimizer, x, other.cfg)
            assert set(output) == {key for key, value in expected.items() if value.ndim == 0}
            for key, value in output.items():
                assert torch.equal(value, expected[key]), (step, run.cfg["sae_type"], key)
            for name, value in state(other.sae).items():
                assert torch.equal(state(run.sae)[name], value), (step, run.cfg["sae_type"], name)
    assert sum(len(run.graphs.recorded) for run in together) > len(kinds)


def test_a_memory_pool_is_not_used_again_after_its_last_graph(monkeypatch):
    """With expandable_segments, torch 2.11 refuses to record into it. Real graphs need a GPU; these record nothing."""

    class Graph:
        pass

    pools, used = iter("abc"), []

    def graph(recorded, pool, *_):
        used.append(pool)
        return nullcontext()

    cuda = dict(CUDAGraph=Graph, graph=graph, device=nullcontext, graph_pool_handle=lambda: next(pools))
    for name, stub in (cuda | dict(empty_cache=lambda: None)).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(StepGraphs, "pools", {})
    monkeypatch.setattr("training_step.HostCopy", lambda status: status)

    def recorded():
        sae, optimizer, _ = trained("topk", True, monkeypatch, steps=0)
        graphs, x = StepGraphs(sae, optimizer, sae.cfg), make_x(6, 12, 0, torch.float32).to(DEVICE)
        return graphs.record(x, None, scalars(launch_step(sae, optimizer, x, sae.cfg)))

    first = recorded()
    second = recorded()
    assert used == ["a"] * 4
    del first
    gc.collect()
    third = recorded()
    assert used == ["a"] * 6
    del second, third
    gc.collect()
    recorded()
    assert used == ["a"] * 6 + ["b"] * 2


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_graphs_of_a_group_share_their_memory(monkeypatch):
    """Two SAEs more need less memory more than the screens of their steps would take."""
    monkeypatch.undo()

    def reserved(kinds):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        runs = group(kinds)
        for step in range(4):
            group_step(runs, make_x(16384, 64, step, torch.float32).cuda(), [], {})
        assert all(run.graphs.recorded for run in runs)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    reserved(["topk"])  # scratch memory and workspaces stay
    one_screen = 16384 * 2048 * 2
    assert reserved(["topk"] * 3) - reserved(["topk"]) < one_screen
