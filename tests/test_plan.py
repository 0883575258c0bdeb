"""Estimates of memory and time hold, groups that exceed the memory are split, and estimating changes nothing."""

import gc
import re
import shutil
import statistics
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO, SAES, same_bits, train

import main
import plan
import training
from activation_store import ActivationsStore
from checkpoint import load_sae
from console import InputError
from logs import run_folder
from sae import SAE_CLASSES
from training import TrainingBar
from training_step import Run, group_step, make_optimizer

PEAK = """
import sys
import psutil
sys.path[:0] = [{repo!r}, {repo!r} + "/tests"]
import plan
from config import post_init_cfg
from helpers import train
from language_model import load_model
small, cfgs = ([post_init_cfg(cfg) for cfg in group] for group in {groups!r})
model = load_model(cfgs[0])
train(model, small)  # whatever the libraries load or map at first
before = psutil.Process().memory_info().rss
train(model, cfgs)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(plan.memory_needed(cfgs, model), int(status["VmHWM"].split()[0]) * 1024 - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("largest", ["weights", "activations"])
def test_memory_estimate(training_cfg, program, largest):
    """The peak memory of a training process is at most the estimate, and at least half of it."""
    sizes = dict(batch_size=64, dict_size=16384) if largest == "weights" else dict(batch_size=2048, dict_size=8192)
    few = dict(num_tokens=4 * sizes["batch_size"], num_epochs=9, checkpoint_freq=2, n_batches_to_dead=2)
    cfgs = [training_cfg(**(changes | sizes | few)) for changes in SAES[1:5]]
    small = [training_cfg("small", **changes, checkpoint_freq=2) for changes in SAES[1:5]]
    done = program.run("-c", PEAK.format(repo=str(REPO), groups=(small, cfgs)))
    assert done.returncode == 0, done.stderr
    estimate, peak = map(int, done.stdout.split())
    assert 0.5 * estimate < peak < estimate


@pytest.mark.fast
def test_memory_of_shards_is_that_under_torchrun(model, training_cfg, monkeypatch):
    """Where the plan proposes feature_shards, there is one process; the run that it proposes has two buffers."""
    cfg = training_cfg(sae_type="topk", top_k=2, feature_shards=2)
    proposed = plan.memory_needed([cfg], model)
    monkeypatch.setattr(plan.distributed, "size", lambda: 2)
    assert proposed == plan.memory_needed([cfg], model)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.fast
def test_memory_left_in_a_container(tmp_path, version):
    """The limits of the process's groups and of their parents count; "max" is no limit."""
    names = [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")][version - 1]
    line = ["9:cpu:/other\n4:memory,hugetlb:/job/step\n0::/", "0::/job/step"][version - 1]
    root, unlimited = tmp_path / ["memory", ""][version - 1], [str(2**63 - 4096), "max"][version - 1]
    for folder, limit in [("job/step", unlimited), ("job", "5000"), ("", unlimited), ("other", "1")]:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, "4000")):
            (root / folder / name).write_text(f"{value}\n")
        (root / folder / "memory.stat").write_text("anon 3300\nfile 700\ntotal_cache 700\n")
    (tmp_path / "groups").write_text(line + "\n")
    assert min(plan.memory_left_in_cgroups(tmp_path / "groups", tmp_path)) == 5000 - 4000 + 700
    assert plan.memory_left_in_cgroups(tmp_path / "nothing", tmp_path) == [float("inf")]


def test_free_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    monkeypatch.setattr(plan, "memory_left_in_cgroups", lambda *_: [6000])
    monkeypatch.setattr(plan.distributed, "local_size", lambda: 4)
    assert plan.free_memory("cpu") == 1500


@pytest.fixture
def cfgs(training_cfg):
    return [training_cfg(sae_type="topk", top_k=2, dict_size=size) for size in (64, 512, 128, 512, 64)]


@pytest.mark.fast
def test_a_group_that_is_too_large_is_split(cfgs, model, capsys):
    """Every SAE is in one group, every group fits, and the sizes are printed; a group that fits is not split."""
    available = plan.memory_needed([cfgs[1], cfgs[0]], model)
    parts = plan.plan_group(cfgs, model, 0, False, available)
    assert sorted(cfg["name"] for part in parts for cfg in part) == sorted(cfg["name"] for cfg in cfgs)
    assert all(plan.memory_needed(part, model) <= available for part in parts) and len(parts) < len(cfgs)
    assert f"training {' + '.join(str(len(part)) for part in parts)} SAEs in separate groups" in capsys.readouterr().err
    assert plan.plan_group(cfgs[:2], model, 0, False, available) == [cfgs[:2]]
    assert plan.plan_group(cfgs, model, 0, True, available) == parts, "--force splits too"


def test_an_sae_that_does_not_fit_alone_is_refused(cfgs, model, monkeypatch):
    """One line with the SAE's name, the memory that it needs and the free memory."""
    available = plan.memory_needed([cfgs[1]], model) - 1
    with pytest.raises(InputError, match=rf"{cfgs[1]['name']} alone needs about 0\.\d\d GiB.*0\.\d\d GiB are free"):
        plan.plan_group(cfgs, model, 0, False, available)
    assert plan.plan_group(cfgs[1:2], model, 0, True, available) == [cfgs[1:2]]
    monkeypatch.setattr(plan, "MAX_DAYS", 0)  # fewer tokens would not help
    with pytest.raises(InputError, match="a smaller dict_size, batch_size or eval_tokens needs less"):
        plan.plan_group(cfgs, model, 0, False, available)


def test_the_plan_uses_the_context_length_of_the_model(training_cfg, model, monkeypatch):
    """main.py plans with the seq_len used in training, not with the requested one."""
    monkeypatch.setattr(main, "load_model", lambda cfg: model)
    planned = []
    monkeypatch.setattr(main, "plan_group", lambda group, *_: planned.append(group) or [])
    main.train([training_cfg(sae_type="topk", top_k=2, seq_len=seq_len) for seq_len in (128, 1000)], False, False)
    (right,), (cut,) = planned
    assert plan.memory_needed([cut], model) == plan.memory_needed([right], model) and cut["name"] != right["name"]


def test_splitting_a_group_does_not_change_its_saes(training_cfg, model, monkeypatch, capsys):
    """main.py trains the parts one after the other, and each SAE is bit-identical to that from one group."""
    cfgs = [training_cfg("parts", **changes) for changes in SAES[:4]]
    monkeypatch.setattr(main, "load_model", lambda cfg: model)
    available = plan.memory_needed(cfgs[:3], model)
    monkeypatch.setattr(main, "free_memory", lambda device: available)
    main.train(cfgs, False, False)
    assert "4 SAEs in 2 groups" in capsys.readouterr().err
    whole, _ = train(model, [training_cfg("whole", **changes) for changes in SAES[:4]])
    for sae, cfg in zip(whole, cfgs):
        assert same_bits(sae, load_sae(run_folder(cfg)))


def test_time_estimate_changes_nothing(training_cfg, model, capsys):
    """It prints the remaining steps and the seconds of one; batches and random numbers are the same afterwards."""
    cfgs = [training_cfg(**changes) for changes in SAES]
    torch.manual_seed(5)
    (store, estimated) = (ActivationsStore(model, cfgs[0]) for _ in range(2))
    for s in (store, estimated):
        s.next_batch()
    before, random = estimated.state_dict(), torch.get_rng_state()
    plan.plan_time(cfgs, estimated, steps_done=4, force=False, available=2**40)
    assert re.search(r"Estimated time: \d+ seconds?.* for 8 steps of [\d.e-]+ s ", capsys.readouterr().err)
    assert estimated.state_dict() == before and torch.equal(torch.get_rng_state(), random)
    for _ in range(8):
        assert torch.equal(store.next_batch(), estimated.next_batch())


def test_the_estimated_step_time_is_about_right(model, training_cfg, capsys):
    """Within a factor of 3, which a busy machine keeps. JumpReLU's first 10 steps are dense and slower."""
    sizes = dict(dict_size=2048, batch_size=256, num_tokens=256 * 30, n_batches_to_dead=100, num_epochs=2)
    kinds = (dict(sae_type="topk"), dict(sae_type="batchtopk"), dict(sae_type="jumprelu", l1_coeff=0.01))
    cfgs = [training_cfg(**sizes, top_k=4, **kind) for kind in kinds]
    plan.plan_time(cfgs, ActivationsStore(model, cfgs[0]), 0, False, 2**40)
    step, harvest = map(float, re.search(r"of ([\d.e-]+) s \(([\d.e-]+) s", capsys.readouterr().err).groups())
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    runs = [Run(cfg, sae, make_optimizer(sae, cfg), None) for cfg, sae in zip(cfgs, saes)]
    store, seconds = ActivationsStore(model, cfgs[0]), []
    for _ in range(25):
        x = store.next_batch()
        started = time.perf_counter()
        group_step(runs, x, [], {})
        seconds.append(time.perf_counter() - started)
    dense, later = statistics.median(seconds[1:10]), statistics.median(seconds[12:])
    assert 1 / 3 < (step - harvest) / ((10 * dense + 20 * later) / 30) < 3


@pytest.mark.fast
def test_the_time_left_includes_evaluations(monkeypatch):
    """An evaluation does not change the rate; what is left of them is added to the time left."""
    bar = TrainingBar("training", done=1000, total=5000)
    now = [bar.start_t]
    bar._time = lambda: now[0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    bar.contexts_left, bar.seconds_per_context = 100, 2.0
    for step in range(10):
        now[0] += 10
        bar.update(100)
        if step == 4:
            with bar.evaluating(40):
                now[0] += 40  # 1 s per context
    assert bar.format_dict["rate"] == pytest.approx(10) and bar.format_dict["elapsed"] == 140
    assert bar.format_dict["left"] in (bar.format_interval(3000 / 10 + 60), bar.format_interval(3000 / 10 + 59))
    bar.close()


def test_a_sweep_that_takes_too_long_is_refused(training_cfg, model, monkeypatch):
    """By the cost of the matrix products, before any data is read, and by the measured steps."""
    cfgs = [training_cfg(**changes) for changes in SAES]
    monkeypatch.setattr(plan, "MAX_DAYS", 1e-9)
    store = ActivationsStore(model, cfgs[0])
    for refuses in (
        lambda force: plan.plan_group(cfgs, model, 0, force, 2**40),
        lambda force: plan.plan_time(cfgs, store, 0, force, 2**40),
    ):
        with pytest.raises(InputError, match=r"it would take .* days.*--force"):
            refuses(False)
        refuses(True)
    monkeypatch.setattr(plan, "MAX_DAYS", 1.0)
    refuses(False)


def test_steps_that_are_done_cost_nothing(training_cfg, model, monkeypatch):
    """Of 100 steps of a day each, 80 are done."""
    cfg = training_cfg(sae_type="topk", top_k=2, num_tokens=64 * 100, num_epochs=9)
    monkeypatch.setattr(plan, "matmul_flops", lambda device: 64 * 2 * 128 * 64 / 86400)
    plan.plan_group([cfg], model, 80, False, 2**40)
    with pytest.raises(InputError, match="more than 40 days"):
        plan.plan_group([cfg], model, 60, False, 2**40)


def test_time_of_evaluations(training_cfg, model, monkeypatch, capsys):
    """A pass takes a minute. The two batches of held-out tokens are evaluated at the end, one of them every 3 steps."""
    monkeypatch.setattr(plan, "step_times", lambda cfgs, x: [(1.0, 1.0, 60.0)])
    for sae_type, passes in (("topk", 1), ("batchtopk", 2)):
        cfg = training_cfg(sae_type=sae_type, top_k=2, perf_log_freq=3)
        for done, evaluations in ((0, 3), (6, 1)):  # of 12 steps
            plan.plan_time([cfg], ActivationsStore(model, cfg), done, False, 2**40)
            assert f"{passes * (evaluations + 2)} minutes for evaluation" in capsys.readouterr().err


def test_nan_in_the_measured_steps_is_ignored(training_cfg):
    """Training reports it, with the name of the SAE. The other SAEs have their times."""
    cfgs = [training_cfg(sae_type="topk", top_k=4, lr=lr) for lr in (1e-3, 1e30)]
    assert plan.step_times(cfgs, torch.full((64, 128), torch.nan)) == [(0, 0, 0)] * 2
    times, unstable = plan.step_times(cfgs, torch.randn(64, 128))
    assert min(times) > 0 and unstable == (0, 0, 0)


def test_steps_with_many_dead_features_are_measured(training_cfg, model, monkeypatch, capsys):
    """Dead are those that are not active in the measured batch, unless training is too short. The time is printed. In
    the steps before, none become dead, because on CUDA the form of a step depends on their number.
    """
    dead = []

    def counting(runs, x, outputs, ahead):
        group_step(runs, x, outputs, ahead)
        dead.append(outputs[0]["num_dead_features"].item())

    monkeypatch.setattr(plan, "group_step", counting)
    x, sizes = torch.randn(64, 128), dict(dict_size=512, top_k=2)
    for n_batches, sae_type in ((3, "topk"), (11, "batchtopk"), (12, "topk"), (3, "vanilla")):
        dead.clear()
        cfg = training_cfg(sae_type=sae_type, n_batches_to_dead=n_batches, **sizes, l1_coeff=0.01)
        plan.step_times([cfg], x)
        least = 512 - 2 * 64 * 2  # at most 64 · k features are active in each of two batches
        if sae_type == "vanilla" or n_batches == 12:
            assert dead == [0] * 4
        else:
            assert dead[:4] == [0] * 4 and len(dead) == 5 and dead[4] >= least
    monkeypatch.setattr(plan, "step_times", lambda cfgs, x: [(1.0, 61.0, 0.1)])
    cfg = training_cfg(sae_type="topk", **sizes)
    plan.plan_time([cfg], ActivationsStore(model, cfg), steps_done=0, force=False, available=2**40)
    # 12 steps of 1 s, which with dead features take 60 s more.
    printed = re.search(r"Estimated time: (\d+) seconds to 12 minutes, depending on how", capsys.readouterr().err)
    assert 12 <= int(printed[1]) < 60


def test_nothing_is_measured_if_no_step_is_left(training_cfg, model, monkeypatch, capsys):
    cfgs = [training_cfg(**changes) for changes in SAES]
    store = ActivationsStore(model, cfgs[0])
    capsys.readouterr()
    monkeypatch.delattr(plan, "step_times")
    assert plan.plan_time(cfgs, store, steps_done=12, force=False, available=2**40) == [0] * len(cfgs)
    assert capsys.readouterr().err == ""


def test_too_little_disk_space_is_warned_of(training_cfg, model, monkeypatch, capsys):
    """Before training: for one checkpoint more than are kept, with Adam's moments, and the SAEs."""
    cfgs = [training_cfg(sae_type="topk", top_k=4, dict_size=size, keep_checkpoints=2) for size in (64, 192)]
    needed = 10 * 2 * 128 * 256 * 4
    usage = shutil.disk_usage("/")
    for free in (needed, needed - 1):
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        plan.plan_group(cfgs, model, 0, False, 2**40)
        assert ("need up to 0.00 GiB of disk space" in capsys.readouterr().err) == (free < needed)


def test_discarded_saes_are_freed(training_cfg, monkeypatch):
    """Without waiting for the garbage collector: the real ones are created next."""
    saes, real = [], plan.make_optimizer
    monkeypatch.setattr(plan, "make_optimizer", lambda sae, cfg: saes.append(weakref.ref(sae)) or real(sae, cfg))
    gc.disable()
    try:
        plan.step_times([training_cfg(sae_type="topk", top_k=4)], torch.randn(64, 128))
        assert [sae() for sae in saes] == [None]
    finally:
        gc.enable()
