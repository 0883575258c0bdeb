"""shards.py: an SAE whose features are split over ranks selects and learns what one process does."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    OFTEN,
    SAES,
    completed_training_cfg,
    figures,
    is_over,
    lines_of,
    only_line,
    results_of,
    run_ranks,
    same_bits,
    train,
    train_shared,
)  # fmt: skip

import checkpoint
import distributed
import main
import plan
import training
from activation_store import ActivationsStore
from checkpoint import load_sae, newest_checkpoint
from config import get_default_cfg, post_init_cfg
from console import InputError
from logs import run_folder
from sae import FEATURE_DIM, SAE_CLASSES
from shards import WHOLE, team
from sparse_ops import SparsityPattern
from training import train_sae_group
from training_step import Run, make_optimizer, training_step

ALL_TYPES = [*SAES, dict(sae_type="matryoshka", top_k=4, n_batches_to_dead=2)]


def part_of(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's slice, if all ranks share the tensor."""
    return tensor.chunk(distributed.size(), dim)[distributed.rank()]


def whole(parts: list[dict]) -> dict:
    """The state of the SAE from those of its shards."""
    return {
        name: torch.cat([part[name] for part in parts], FEATURE_DIM[name]) if name in FEATURE_DIM else tensor
        for name, tensor in parts[0].items()
    }


# Selection


def hard_activations(kind: str, dtype: torch.dtype, B: int, F: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(B)
    z = torch.randn(B, F, generator=g, dtype=dtype)
    if kind == "ties":
        z = z.mul(2).round()
    if kind == "few":
        z = torch.where(torch.rand(B, F, generator=g) < 0.06, z, -1)
    if kind == "subnormal":
        z = z * (1e-42 if dtype == torch.float32 else 1e-310)
    return z.relu()


@pytest.mark.parametrize("size", [2, 4])
def test_selection_equals_one_process(size):
    """Of all shards, ties to the first in row-major order, as a stable sort of the whole matrix has them."""
    F, k = 48, 5
    cases = [
        (hard_activations(kind, dtype, B, F), per_row)
        for kind in ("random", "ties", "few", "subnormal")
        for dtype in (torch.float32, torch.float64) for B in (1, 13) for per_row in (True, False)
    ]  # fmt: skip

    def largest():
        found = []
        for z, per_row in cases:
            own = part_of(z, 1)
            pattern = SparsityPattern.of(own)
            keep = team(size).largest(pattern.products, pattern.rows, len(z), k, per_row)
            found.append(torch.zeros_like(own, dtype=torch.bool).index_put((pattern.rows, pattern.cols), keep))
        return found

    ranks = results_of(run_ranks(size, largest))
    for i, (z, per_row) in enumerate(cases):
        rows = z if per_row else z.flatten()[None]
        order = rows.sort(dim=-1, descending=True, stable=True).indices[:, : k if per_row else k * len(z)]
        expected = torch.zeros_like(rows).scatter(1, order, 1.0).view(z.shape) * z > 0
        assert torch.equal(torch.cat([of_rank[i] for of_rank in ranks], 1), expected), (per_row, z)


# A step


def steps_of(cfg, batches: list, shards=WHOLE) -> tuple[list[dict], dict, list, list]:
    """Training steps of a new SAE: their numbers, the SAE's state after them, the active places of each step, and
    whether its form was sparse.
    """
    sae = SAE_CLASSES[cfg["sae_type"]](cfg, shards)
    if hasattr(sae, "batches_until_sparse") and cfg["dict_size"] > 64:
        sae.batches_until_sparse.zero_()
        sae.b_enc.data.fill_(-0.7)  # few active features
    optimizer, numbers, active, forms = make_optimizer(sae, cfg), [], [], []
    for x in batches:
        output = training_step(sae, optimizer, x, cfg)
        numbers.append({key: value.item() for key, value in output.items() if value.ndim == 0})
        active.append(output["feature_acts"].detach().to_dense() > 0)
        forms.append(output["feature_acts"].is_sparse)
    return numbers, {name: tensor.clone() for name, tensor in sae.state_dict().items()}, active, forms


@pytest.mark.parametrize("dict_size, size", [(64, 2), (768, 2), (768, 4)], ids=["dense", "sparse", "sparse 4"])
def test_steps_equal_one_process(size, dict_size):
    """The same active places. Losses, gradients (by the weights) and counters agree in all steps."""
    cfg = get_default_cfg() | dict(act_size=24, device="cpu", top_k_aux=3, n_batches_to_dead=2, max_grad_norm=1e-3)
    own = dict(dict_size=dict_size, dtype="float64", bandwidth=0.03, feature_shards=size)
    cfgs = [post_init_cfg(cfg | changes | own) for changes in ALL_TYPES]
    cfgs[-1] = post_init_cfg(cfgs[-1] | {"matryoshka_sizes": [3, dict_size // 2 + 5, dict_size]})
    g = torch.Generator().manual_seed(0)
    batches = list(torch.randn(4, 32, 24, generator=g, dtype=torch.float64) + 0.3)
    ranks = results_of(run_ranks(size, lambda: [steps_of(cfg, batches, team(size)) for cfg in cfgs]))
    for i, cfg in enumerate(cfgs):
        expected, state, active, _ = steps_of(cfg, batches)
        for numbers, own, _, forms in (of_rank[i] for of_rank in ranks):
            assert numbers == ranks[0][i][0]  # to the bit
            assert all(name in FEATURE_DIM or torch.equal(own[name], ranks[0][i][1][name]) for name in own)
            assert forms == [dict_size == 768] * 4
            for step, values in zip(expected, numbers):
                assert values == pytest.approx(step, rel=1e-9, abs=1e-12), cfg["name"]
        for step, places in enumerate(active):
            assert torch.equal(torch.cat([of_rank[i][2][step] for of_rank in ranks], 1), places)
        found = whole([of_rank[i][1] for of_rank in ranks])
        for name, tensor in state.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-11, msg=f"{cfg['name']}: {name}")


def test_dense_ties_go_to_the_first_of_all_shards():
    """In float32 on integers, as in one process, and as a stable sort has them."""
    g = torch.Generator().manual_seed(2)
    x, W = torch.randint(-1, 2, (9, 8), generator=g).float(), torch.randint(-1, 2, (8, 48), generator=g).float()
    cfg = dict(act_size=8, dict_size=48, top_k=5, device="cpu", input_unit_norm=False)
    cfgs = [post_init_cfg(cfg | {"sae_type": kind, "feature_shards": 2}) for kind in ("topk", "batchtopk")]

    def active(shards=WHOLE):
        found = []
        for cfg in cfgs:
            sae = SAE_CLASSES[cfg["sae_type"]](cfg, shards)
            sae.W_enc.data.copy_(W[:, shards.features(48)])
            found.append(sae(x)["feature_acts"].detach() > 0)
        return found

    ranks = results_of(run_ranks(2, lambda: active(team(2))))
    for i, of_one in enumerate(active()):
        z = (x @ W).relu()
        rows = z if i == 0 else z.flatten()[None]
        order = rows.sort(dim=-1, descending=True, stable=True).indices[:, : 5 if i == 0 else 45]
        expected = torch.zeros_like(rows).scatter(1, order, 1.0).view(z.shape) * z > 0
        assert torch.equal(of_one, expected) and torch.equal(torch.cat([of_rank[i] for of_rank in ranks], 1), expected)


def test_one_rank_that_needs_the_dense_form():
    """Then all take it: a vanilla SAE has too many active features in the first slice alone."""
    cfg = post_init_cfg(
        dict(sae_type="vanilla", l1_coeff=0.1, act_size=24, dict_size=768, device="cpu", feature_shards=2)
    )

    def form():
        sae = SAE_CLASSES["vanilla"](cfg, team(2))
        sae.batches_until_sparse.zero_()
        sae.b_enc.data.fill_(5.0 if distributed.rank() == 0 else -1.0)
        return sae(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)))["feature_acts"].is_sparse

    assert results_of(run_ranks(2, form)) == [False, False]


def test_initial_weights_equal_one_process():
    cfg = post_init_cfg(get_default_cfg() | dict(act_size=70, dict_size=96, device="cpu", feature_shards=4))
    expected = SAE_CLASSES["batchtopk"](cfg).state_dict()
    found = whole(results_of(run_ranks(4, lambda: dict(SAE_CLASSES["batchtopk"](cfg, team(4)).state_dict()))))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_losses_of_200_steps_differ_only_by_rounding():
    """In float32, not more than a few times as much as those of one process whose inputs are permuted."""
    cfg = get_default_cfg() | dict(act_size=32, dict_size=256, top_k=4, device="cpu", lr=1e-3)
    cfg = post_init_cfg(cfg | dict(top_k_aux=8, n_batches_to_dead=2, feature_shards=2))
    g = torch.Generator().manual_seed(1)
    atoms = torch.randn(100, 32, generator=g)
    batches = [(torch.rand(32, 100, generator=g) < 0.05).float() @ atoms for _ in range(200)]
    order = torch.randperm(32, generator=g)

    def losses(shards=WHOLE, order=slice(None)):
        sae = SAE_CLASSES["batchtopk"](cfg, shards)
        with torch.no_grad():
            sae.W_enc.copy_(sae.W_enc[order].clone()), sae.W_dec.copy_(sae.W_dec[:, order].clone())
        optimizer = make_optimizer(sae, cfg)
        return torch.tensor([training_step(sae, optimizer, x[:, order], cfg)["loss"].item() for x in batches])

    one = losses()
    permuted = (losses(order=order) - one).abs()
    sharded = (results_of(run_ranks(2, lambda: losses(team(2))))[0] - one).abs()
    assert one[-1] < 0.8 * one[0] and sharded.max() > 0
    assert sharded.max() < 5 * permuted.max() and sharded[:10].max() < 1e-6


# Training


def sharded_cfgs(training_cfg, count: int, **changes) -> list[dict]:
    return [training_cfg(**one, **OFTEN, feature_shards=count, **changes) for one in ALL_TYPES]


@pytest.fixture(scope="module")
def sharded(model, training_data, tmp_path_factory):
    """Configs of a group that two ranks have trained, each SAE with two shards, without interruption."""
    folder = tmp_path_factory.mktemp("sharded")
    cfgs = sharded_cfgs(lambda **changes: completed_training_cfg(training_data, folder, **changes), 2)
    return cfgs, results_of(run_ranks(2, lambda: train_shared(model, cfgs)))[0]


def assert_close(found: dict, expected: dict) -> None:
    """Numbers, lists of them and strings, those of float32 sums in another order."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not isinstance(value, dict):
            assert found[key] == (pytest.approx(value, rel=2e-3, abs=2e-4) if isinstance(value, float) else value), key


def test_a_run_equals_one_process(model, training_cfg, sharded):
    """Up to rounding. Its sae/ is an ordinary one, and the first rank of a team alone keeps the record."""
    cfgs, results = sharded
    alone = [training_cfg(**one, **OFTEN) for one in ALL_TYPES]
    assert [cfg["name"] for cfg in alone] == [cfg["name"] for cfg in cfgs]
    saes, expected = train(model, alone)
    for cfg, sae, result, wanted in zip(cfgs, saes, results, expected):
        del wanted["decoder_similarity"]
        assert_close(figures(result), figures(wanted))
        assert_close(result["histograms"], wanted["histograms"])
        found = load_sae(run_folder(cfg)).state_dict()
        for name, tensor in sae.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{cfg['name']}: {name}")
    for cfg, of_one in zip(cfgs, alone):
        lines, wanted = lines_of(run_folder(cfg)), lines_of(run_folder(of_one))
        assert len(lines) == len(wanted)
        for line, of_line in zip(lines, wanted):
            assert_close(line, of_line)


def test_a_killed_run_resumes_bit_identically(model, training_cfg, sharded, monkeypatch):
    cfgs = sharded_cfgs(training_cfg, 2, checkpoint_freq=3)
    steps, real = [], training.group_step

    def group_step(*args):
        steps.append(1)
        if len(steps) == 8 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    monkeypatch.setattr(training, "group_step", group_step)
    ranks = run_ranks(2, lambda: train_shared(model, cfgs), timeout=60)
    assert {code for code, *_ in ranks} == {3, -signal.SIGKILL}
    monkeypatch.setattr(training, "group_step", real)
    assert newest_checkpoint(cfgs[0]).name == "step_000000006"
    resumed = results_of(run_ranks(2, lambda: train_shared(model, cfgs)))[0]
    uninterrupted, results = sharded
    assert list(map(figures, resumed)) == list(map(figures, results))
    for cfg, of_other in zip(cfgs, uninterrupted):
        assert same_bits(load_sae(run_folder(cfg)), load_sae(run_folder(of_other)))
        assert lines_of(run_folder(cfg)) == lines_of(run_folder(of_other))


def test_resumed_with_another_number_of_shards(model, training_cfg, monkeypatch):
    """By --resume-anyway only. SAEs and optimizers are then the same to the bit."""
    cfgs = sharded_cfgs(training_cfg, 2, num_tokens=256)
    real = checkpoint.Checkpoints.save

    def save(self, step, stream, ahead=None):
        real(self, step, stream, ahead)
        raise InputError("stopped here")

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert "stopped here" in only_line(run_ranks(2, lambda: train_shared(model, cfgs)))
    path = newest_checkpoint(cfgs[0])
    state = json.loads((path / "state.json").read_text())

    def loaded(count):
        runs = []
        for cfg in cfgs:
            sae = SAE_CLASSES[cfg["sae_type"]](cfg, team(count))
            runs.append(Run(cfg, sae, make_optimizer(sae, cfg), None))
        checkpoint.load_checkpoint(path, state, runs)
        return [checkpoint.tensors_of(run) for run in runs]

    of_two = results_of(run_ranks(2, lambda: loaded(2)))
    for count in (1, 4):
        ranks = results_of(run_ranks(count, lambda count=count: loaded(count)))
        for i, cfg in enumerate(cfgs):
            b_dec = [name for name, _ in SAE_CLASSES[cfg["sae_type"]](cfg).named_parameters()].index("b_dec")
            for name, tensor in ranks[0][i].items():
                dim = FEATURE_DIM.get(name.removeprefix("sae."), 0)
                is_whole = tensor.ndim == 0 or name == "sae.b_dec" or name.startswith(f"adam.{b_dec}.")
                parts = [[of_rank[i][name] for of_rank in of_ranks] for of_ranks in (ranks, of_two)]
                assert torch.equal(*(of[0] if is_whole else torch.cat(of, dim) for of in parts)), (cfg["name"], name)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", real)
    again = [cfg | {"feature_shards": 4} for cfg in cfgs]
    line = only_line(run_ranks(4, lambda: train_shared(model, again)))
    assert "cannot resume" in line and "feature_shards was 2 and is 4" in line
    ranks = run_ranks(4, lambda: train_shared(model, again, resume_anyway=True))
    assert results_of(ranks) and "resuming anyway" in ranks[0][1] and all(map(is_over, again))


def test_checkpoints_from_before_feature_shards():
    before, now, path = {"versions": {}}, {"versions": {}, "feature_shards": 1}, Path("step_1")
    checkpoint.check_provenance(before, now, path, resume_anyway=False)
    with pytest.raises(InputError, match="feature_shards was 1 and is 2"):
        checkpoint.check_provenance(before, now | {"feature_shards": 2}, path, resume_anyway=False)
    assert checkpoint.file_of({"provenance": before, "runs": ["a", "b"]}, "b", 0) == "01.safetensors"


def test_an_unsharded_sae_is_refused(model, training_cfg):
    """From Python: train_sae of a whole SAE."""
    cfgs = sharded_cfgs(training_cfg, 2)[:1]
    with pytest.raises(InputError, match=r"feature_shards = 2, but the SAE of .* pass shards.team\(2\)"):
        train(model, cfgs)


def test_teams_of_shards(model, training_cfg, sharded):
    """Two teams of two ranks share the SAEs: the bits are those of one team."""
    cfgs = sharded_cfgs(training_cfg, 2)
    results = results_of(run_ranks(4, lambda: main.train(cfgs, force=True, resume_anyway=False)))
    assert results == [[]] * 4
    for cfg, of_one_team in zip(cfgs, sharded[0]):
        assert same_bits(load_sae(run_folder(cfg)), load_sae(run_folder(of_one_team)))
        assert lines_of(run_folder(cfg)) == lines_of(run_folder(of_one_team))


def test_nan_in_one_shard_stops_the_sae_on_all(model, training_cfg, monkeypatch):
    """In the dense form and in the sparse. What cannot be saved (save_errors) is reported once."""
    cfgs, real = sharded_cfgs(training_cfg, 2, save_errors="go_on"), checkpoint.write_slices

    def write_slices(sae, file):
        if distributed.rank() == 1 and "stopped.json" not in os.listdir(file.parent.parent) and sae.cfg == cfgs[5]:
            raise OSError(28, "No space left on device")
        real(sae, file)

    monkeypatch.setattr(checkpoint, "write_slices", write_slices)

    def train_with_nan():
        shards = team(2)
        saes = [SAE_CLASSES[cfg["sae_type"]](cfg, shards) for cfg in cfgs]
        if shards.index == 1:
            saes[1].W_enc.data[0, 0] = saes[5].W_enc.data[0, 0] = torch.nan
        return train_sae_group(saes, ActivationsStore(model, cfgs[0]), model, cfgs)

    ranks = run_ranks(2, train_with_nan)
    assert [code for code, *_ in ranks] == [2, 2] and "2 of 7 SAEs were stopped" in only_line(ranks)
    assert sum(stderr.count("No space left on device; training continues") for _, stderr, _ in ranks) == 1
    stopped = json.loads((run_folder(cfgs[1]) / "stopped.json").read_text())
    assert stopped["step"] == 1 and "NaN" in stopped["reason"]
    assert load_sae(run_folder(cfgs[1])).W_enc[0, 32].isnan() and all(map(is_over, cfgs[:5] + cfgs[6:]))


def test_a_full_disk_is_one_line(model, training_cfg, monkeypatch):
    """On the rank that writes its slice of the finished SAE."""
    cfgs, real = sharded_cfgs(training_cfg, 2)[:1], checkpoint.write_slices

    def write_slices(sae, file):
        if distributed.rank() == 1:
            raise OSError(28, "No space left on device")
        real(sae, file)

    monkeypatch.setattr(checkpoint, "write_slices", write_slices)
    ranks = run_ranks(2, lambda: train_shared(model, cfgs))
    assert [code for code, *_ in ranks] == [3, 3] and "No space left on device" in only_line(ranks)
    monkeypatch.setattr(checkpoint, "write_slices", real)
    results_of(run_ranks(2, lambda: train_shared(model, cfgs)))
    assert load_sae(run_folder(cfgs[0])).W_dec.shape == (64, 128)


@pytest.mark.parametrize("ranks, shards", [(1, 2), (3, 2), (2, 4)])
def test_numbers_of_ranks_that_do_not_fit_are_refused(model, training_cfg, ranks, shards):
    cfgs = sharded_cfgs(training_cfg, shards)
    expected = f"feature_shards = {shards} is not allowed with {ranks} of torchrun's ranks"
    assert expected in only_line(run_ranks(ranks, lambda: main.train(cfgs, force=True, resume_anyway=False)))


@pytest.mark.fast
def test_shards_must_divide_dict_size():
    with pytest.raises(InputError, match="feature_shards = 5 is not allowed: it must divide dict_size = 12288"):
        post_init_cfg({"feature_shards": 5})


@pytest.mark.fast
def test_the_plan_proposes_shards(model, training_cfg):
    """For an SAE that does not fit on a rank; an SAE that fits nowhere is refused with its numbers alone."""
    cfg = training_cfg(dict_size=2**16)
    needed, of_quarter = (plan.memory_needed([cfg | {"feature_shards": n}], model) for n in (1, 4))
    with pytest.raises(InputError, match=r"alone needs about .* are free \(with feature_shards=4 about .* of 4 GPUs"):
        plan.plan_group([cfg], model, 0, False, of_quarter)
    with pytest.raises(InputError, match=r"are free\. `python main.py demo`"):
        plan.plan_group([cfg], model, 0, False, 2**20)
    assert of_quarter < needed / 2


def test_an_sae_that_does_not_fit_is_not_loaded(sharded, monkeypatch):
    monkeypatch.setattr(checkpoint.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**10}))
    with pytest.raises(InputError, match="sae_weights.safetensors does not fit on cpu: it needs .* are free"):
        load_sae(run_folder(sharded[0][0]))
