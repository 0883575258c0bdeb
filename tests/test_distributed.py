"""distributed.py: several ranks give the bits of one, and end together when one of them fails.

Each rank is a fork of the test process, joined by torch.distributed's gloo. test_resume.test_killed_processes_resume
runs torchrun.
"""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from datetime import timedelta

import pytest
import torch
from helpers import (
    OFTEN,
    REPO,
    SAES,
    SEQ_LEN,
    counted_batches,
    figures,
    lines_of,
    only_line,
    results_of,
    run_ranks,
    same_bits,
    stream_cfg,
    train_shared,
    unused_port,
)  # fmt: skip
from kill_and_resume import TORCHRUN, command, digests, environment, start

import activation_cache
import checkpoint
import distributed
import plan
import training
from activation_store import ActivationsStore
from checkpoint import load_sae, newest_checkpoint
from console import InputError
from hub import StreamError
from logs import RunLog, run_folder
from training import NotFinite

# What they exchange


@pytest.mark.fast
def test_without_torchrun_there_is_no_process_group():
    """Without torchrun nothing is started, and the functions return at once."""
    with distributed.process_group():
        assert (distributed.size(), distributed.rank(), distributed.local_size()) == (1, 0, 1)
        assert distributed.from_rank_0(lambda: 3) == 3 and distributed.gather(4) == [4]
        assert distributed.any_rank(True, False) == [True, False] and distributed.gather_lists([5]) == [5]
        distributed.check_ranks({"versions": {}}, REPO / "no such folder")


def test_collectives():
    def all_of_them():
        rank = distributed.rank()
        rows = torch.full((3, 2), float(rank), dtype=torch.bfloat16)
        return (
            distributed.from_rank_0(lambda: f"from {rank}"), distributed.gather(rank * rank),
            distributed.gather_lists(["x"] * rank), distributed.any_rank(rank == 1, False, True),
            distributed.start_broadcast(rows, 2)() or rows.tolist(),
        )  # fmt: skip

    for result in results_of(run_ranks(3, all_of_them)):
        assert result == ("from 0", [0, 1, 4], ["x"] * 3, [True, False, True], [[2.0, 2.0]] * 3)


@pytest.mark.parametrize("where", ["from_rank_0", "on_all"])
def test_an_error_is_raised_on_every_rank_and_printed_once(where):
    def fails():
        if distributed.rank() == (0 if where == "from_rank_0" else 2):
            raise InputError("no such thing")

    ranks = run_ranks(3, lambda: getattr(distributed, where)(fails))
    assert [code for code, *_ in ranks] == [2] * 3 and only_line(ranks) == "error: no such thing"


def test_ranks_that_differ_are_refused(tmp_path, monkeypatch):
    """In packages, data or code; and an output_dir that they do not share."""

    def check(**changes):
        made_with = {"versions": {"torch": "2.11"}, "data_files_sha256": "ab", "threads": 1}
        own = {key: value for key, value in changes.items() if distributed.rank() == 1}
        distributed.check_ranks(made_with | own, tmp_path / "output" / ("" if distributed.rank() == 0 else "b"))

    ranks = run_ranks(2, lambda: check(versions={"torch": "2.8"}))
    assert only_line(ranks) == "error: rank 1 differs from rank 0: torch is '2.8', not '2.11'"
    ranks = run_ranks(2, lambda: check(data_files_sha256="cd", threads=2))
    assert "data_files_sha256 is 'cd', not 'ab'; threads is 2, not 1" in only_line(ranks)
    ranks = run_ranks(2, check)
    assert re.search(r"output_dir must be on a disk that all ranks share: rank 1 .*", only_line(ranks))
    assert [code for code, *_ in ranks] == [2, 2] and not list(tmp_path.glob("output/.ranks*"))
    monkeypatch.setattr(distributed, "code_fingerprint", lambda: f"code of {distributed.rank()}")
    assert "code is 'code of 1'" in only_line(run_ranks(2, check))


# The stream


@pytest.mark.parametrize("changes", [{}, {"exclude_tokens": [0]}, {"activation_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_rank_gets_the_batches_of_one_process(model, counted, size, changes):
    """With buffers that end within a forward pass, and more ranks than forward passes in a buffer."""
    changes = changes | {"num_tokens": 360 if "exclude_tokens" in changes else 400}

    def batches():
        store = ActivationsStore(model, stream_cfg(dataset_path=counted, **changes))
        return [store.next_batch() for _ in range(9)], store.state_dict()

    alone, state = batches()
    for of_rank, state_of_rank in results_of(run_ranks(size, batches)):
        assert all(map(torch.equal, of_rank, alone)) and state_of_rank == state


def test_a_position_is_loaded_with_any_number_of_ranks(model, counted):
    def batches(position=None, skip=3):
        store = ActivationsStore(model, stream_cfg(dataset_path=counted))
        if position is not None:
            store.load_state_dict(position)
        for _ in range(skip if position is None else 0):
            store.next_batch()
        return store.state_dict(), [store.next_batch() for _ in range(10 - skip)]

    for skip in (1, 2, 3, 7):
        position, expected = results_of(run_ranks(2, lambda skip=skip: batches(skip=skip)))[0]
        for size in (1, 3):
            for _, found in results_of(run_ranks(size, lambda skip=skip, at=position: batches(at, skip))):
                assert all(map(torch.equal, found, expected))


def test_forward_passes_are_distributed(model, counted, monkeypatch):
    """Each rank runs its share of them, and the text is read by rank 0 alone."""
    _, expected = counted_batches(model, counted)
    calls = []
    real = ActivationsStore.get_activations
    monkeypatch.setattr(ActivationsStore, "get_activations", lambda *args: calls.append(1) or real(*args))

    def count():
        store = ActivationsStore(model, stream_cfg(dataset_path=counted))
        begin = store.stream.state_dict()
        calls.clear()
        for _ in range(10):
            store.next_batch()
        return len(calls), store.stream.state_dict() == begin

    forwards = -(-len(expected) // (3 * SEQ_LEN))
    (first, moved), (second, untouched) = results_of(run_ranks(2, count))
    assert first + second == forwards and abs(first - second) <= 1 and not moved and untouched


def test_activations_are_exchanged_during_training(model, counted):
    """The next buffer is harvested as far as this one is used, and nobody waits before the activations are needed."""

    def progress():
        store = ActivationsStore(model, stream_cfg(dataset_path=counted, num_batches_in_buffer=6))  # 7 batches
        real, calls, waiting = store.get_activations, [], []
        store.get_activations = lambda tokens: calls.append(store.offset) or real(tokens)
        for _ in range(10):
            store.next_batch()
            waiting.append(len(store.exchanges))
        return calls, waiting

    # The second buffer has 120 rows: 8 left over from the first, 2 forward passes of 48 rows, and one of 16.
    expected = [2, 2, 1, 1, 1, 1, 1, 0, 0, 0]
    of_0, of_1 = results_of(run_ranks(2, progress))
    assert of_0 == ([0, 0, 0, 0, 80], expected) and of_1 == ([0, 0, 0, 0], expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_error_is_raised_where_its_buffer_is_needed(model, counted, monkeypatch, size):
    """Not where the buffer is harvested ahead: all batches before it are trained on, as in one process."""
    expected, _ = counted_batches(model, counted)
    real, calls = ActivationsStore.get_batch_tokens, []

    def get_batch_tokens(self):
        calls.append(1)
        if len(calls) == 5:
            raise StreamError("the hub is down")
        return real(self)

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", get_batch_tokens)

    def batches():
        store, number = ActivationsStore(model, stream_cfg(dataset_path=counted)), 0
        with pytest.raises(StreamError, match="the hub is down"):
            while True:
                store.next_batch()
                number += 1
        return number, torch.stack([store.next_batch() for _ in range(10 - number)])  # the hub is up again

    for number, rest in results_of(run_ranks(size, batches)):
        assert number == 4 and torch.equal(rest, expected[4:])


def test_an_error_of_one_rank_ends_all_ranks(model, training_cfg, monkeypatch):
    """If it occurs where the next buffer is harvested ahead: the other ranks wait for this rank's activations."""
    cfgs = [training_cfg(**changes) for changes in SAES[:2]]
    real = ActivationsStore.get_activations

    def get_activations(self, tokens):
        if distributed.rank() == 1 and self.buffer is not None:
            raise OSError(5, "Input/output error")
        return real(self, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", get_activations)
    ranks = run_ranks(2, lambda: train_shared(model, cfgs), timeout=60)
    assert [code for code, *_ in ranks] == [3, "OSError(5, 'Input/output error')"]  # an unexpected error: a traceback


@pytest.mark.parametrize("size", [2, 3])
def test_buffers_smaller_than_a_forward_pass(model, counted, size):
    """Some are filled by what the forward pass before them has left over."""

    def batches():
        store = ActivationsStore(model, stream_cfg(dataset_path=counted, model_batch_size=7, num_batches_in_buffer=1))
        states, found = [], []
        for _ in range(10):
            states.append(store.state_dict())
            found.append(store.next_batch())
        return states, torch.stack(found)

    states, expected = batches()
    assert {state["buffer"] for state in states} == set(range(5))
    for states_of_rank, found in results_of(run_ranks(size, batches)):
        assert states_of_rank == states and torch.equal(found, expected)


def test_a_used_store_is_freed(model, counted):
    """At once, without the garbage collector: its buffers may fill half of a GPU."""

    def use(number):
        store = ActivationsStore(model, stream_cfg(dataset_path=counted))
        for _ in range(number):
            store.next_batch()
        if number < 10:
            store.drop_next_buffer()
        alive = weakref.ref(store)
        gc.disable()
        del store
        return alive() is None

    assert results_of(run_ranks(2, lambda: [use(3), use(10)])) == [[True, True]] * 2


def test_a_position_is_loaded_during_an_exchange(model, counted):
    def batches():
        store = ActivationsStore(model, stream_cfg(dataset_path=counted))
        store.next_batch()
        in_flight = len(store.exchanges)
        store.load_state_dict(store.beginning)
        return in_flight, torch.stack([store.next_batch() for _ in range(10)])

    for in_flight, found in results_of(run_ranks(2, batches)):
        assert in_flight and torch.equal(found, counted_batches(model, counted)[0])


def test_the_cache_is_that_of_one_process(model, counted, tmp_path):
    def batches(folder):
        store = ActivationsStore(model, stream_cfg(dataset_path=counted, activation_cache=str(tmp_path / folder)))
        return torch.cat([store.next_batch() for _ in range(10)])

    expected = batches("one")
    for found in results_of(run_ranks(2, lambda: batches("two"))):
        assert torch.equal(found, expected)
    files = [{path.name: path.read_bytes() for path in (tmp_path / f).glob("*/*")} for f in ("one", "two")]
    assert files[0] == files[1]
    for path in (tmp_path / "two").glob("*/*.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")  # corrupt: harvested again by all ranks
    for found in results_of(run_ranks(2, lambda: batches("two"))):
        assert torch.equal(found, expected)


def test_a_cache_that_cannot_be_written_ends_all_ranks(model, training_cfg, tmp_path, monkeypatch):
    """When the second buffer is harvested, in step 4, on rank 0 alone."""
    cfgs = [training_cfg(**changes, activation_cache=str(tmp_path / "cache")) for changes in SAES]
    real = activation_cache.write_json

    def write_json(path, content):
        if len(content["buffers"]) == 2:
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(activation_cache, "write_json", write_json)
    ranks = run_ranks(2, lambda: train_shared(model, cfgs), timeout=60)
    assert [code for code, *_ in ranks] == [3, 3] and "No space left on device" in only_line(ranks)
    assert {newest_checkpoint(cfg).name for cfg in cfgs} == {"step_000000003"}
    assert not any((run_folder(cfg) / "sae").exists() for cfg in cfgs)


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_devices_that_not_every_rank_has(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ranks = run_ranks(2, lambda: distributed.check_device(device))
    expected = "--nproc-per-node 2 is not allowed: this machine has 0 GPUs" if device == "cuda" else "device = 'cuda:1'"
    assert [code for code, *_ in ranks] == [2, 2] and expected in only_line(ranks)


def test_an_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    ranks = run_ranks(2, lambda: distributed.check_ranks({"versions": {}}, tmp_path / "file" / "sweep"))
    assert [code for code, *_ in ranks] == [2, 2] and "cannot be written to" in only_line(ranks)


def test_the_end_of_the_data_is_one_line(model, counted, monkeypatch):
    monkeypatch.setattr(ActivationsStore, "check_length", lambda self: None)  # as for a hub dataset

    def read_on():
        store = ActivationsStore(model, stream_cfg(dataset_path=counted, num_tokens=480))
        for _ in range(12):
            store.next_batch()

    ranks = run_ranks(2, read_on)
    assert [code for code, *_ in ranks] == [2, 2]
    assert "is too short: 400 tokens to train on" in only_line(ranks)


# Training


def assert_as_one_process(cfgs, uninterrupted, results=None):
    saes, expected, lines = uninterrupted
    for i, cfg in enumerate(cfgs):
        assert same_bits(load_sae(run_folder(cfg)), saes[i]), cfg["name"]
        assert lines_of(run_folder(cfg)) == lines[i]
        result = json.loads((run_folder(cfg) / "result.json").read_text())
        assert figures(result) == {key: v for key, v in figures(expected[i]).items() if key != "histograms"}
    if results:
        assert list(map(figures, results)) == list(map(figures, expected))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_saes_are_bit_identical_to_one_process(model, training_cfg, uninterrupted, size):
    """7: one rank has no SAE. Every rank returns all results, and rank 0 alone reports."""
    cfgs = [training_cfg(**changes, **OFTEN) for changes in SAES]
    ranks = run_ranks(size, lambda: train_shared(model, cfgs))
    for results in results_of(ranks):
        assert_as_one_process(cfgs, uninterrupted, results)
    assert "After 256 tokens" in ranks[0][1] and all(cfg["name"].rpartition("_")[0] in ranks[0][1] for cfg in cfgs)
    assert not any(stderr for _, stderr, _ in ranks[1:])


@pytest.mark.parametrize("resumed_by", [1, 2, 3])
def test_a_killed_run_resumes_with_another_number_of_ranks(model, training_cfg, uninterrupted, monkeypatch, resumed_by):
    """One rank dies. The others end within seconds with exit code 3."""
    cfgs = [training_cfg(**changes, **OFTEN, checkpoint_freq=3) for changes in SAES]

    def group_step(*args):
        steps.append(1)
        if len(steps) == 8 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    steps, real = [], training.group_step
    monkeypatch.setattr(training, "group_step", group_step)
    started = time.monotonic()
    ranks = run_ranks(3, lambda: train_shared(model, cfgs))
    assert [code for code, *_ in ranks] == [3, -signal.SIGKILL, 3] and time.monotonic() - started < 60
    assert "another rank has ended" in only_line(ranks)
    monkeypatch.setattr(training, "group_step", real)
    assert {newest_checkpoint(cfg).name for cfg in cfgs} == {"step_000000006"}
    results_of(run_ranks(resumed_by, lambda: train_shared(model, cfgs)))
    assert_as_one_process(cfgs, uninterrupted)


def test_a_signal_stops_all_ranks_after_the_same_step(model, training_cfg, uninterrupted, monkeypatch):
    """Even if a single rank gets it; exit code 4."""
    cfgs = [training_cfg(**changes, **OFTEN) for changes in SAES]
    real, steps = training.group_step, []

    def group_step(*args):
        steps.append(1)
        if len(steps) == 5 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(training, "group_step", group_step)
    ranks = run_ranks(2, lambda: train_shared(model, cfgs))
    assert [code for code, *_ in ranks] == [4, 4] and "Stopped after 5 of 12 steps" in ranks[0][1]
    monkeypatch.setattr(training, "group_step", real)
    assert {newest_checkpoint(cfg).name for cfg in cfgs} == {"step_000000005"}
    results_of(run_ranks(3, lambda: train_shared(model, cfgs)))
    assert_as_one_process(cfgs, uninterrupted)


def test_a_signal_while_text_is_read_stops_all_ranks(model, training_cfg, uninterrupted, monkeypatch):
    """Rank 0 waits for the network for minutes; the checkpoint is that of the step before."""
    cfgs = [training_cfg(**changes, **OFTEN) for changes in SAES]
    real, begun = ActivationsStore.get_batch_tokens, []

    def waits(self):
        begun.append(1)
        if len(begun) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return real(self)

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", waits)
    started = time.monotonic()
    ranks = run_ranks(2, lambda: train_shared(model, cfgs))
    assert [code for code, *_ in ranks] == [4, 4] and time.monotonic() - started < 50
    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", real)
    results_of(run_ranks(2, lambda: train_shared(model, cfgs)))
    assert_as_one_process(cfgs, uninterrupted)


@pytest.mark.parametrize("save_errors", ["stop", "go_on"])
def test_a_full_disk_on_one_rank(model, training_cfg, uninterrupted, monkeypatch, save_errors):
    """Its line is printed once. With "stop" all ranks end with exit code 3; with "go_on" they continue."""
    cfgs = [training_cfg(**c, **OFTEN, checkpoint_freq=3, save_errors=save_errors) for c in SAES]
    real = checkpoint.write

    def write(path, content):
        if distributed.rank() == 1 and "step_000000006" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(checkpoint, "write", write)
    ranks = run_ranks(2, lambda: train_shared(model, cfgs))
    printed = "".join(stderr for _, stderr, _ in ranks)
    assert printed.count("the checkpoint after step 6 cannot be written: No space left on device") == 1
    monkeypatch.setattr(checkpoint, "write", real)
    if save_errors == "stop":
        assert [code for code, *_ in ranks] == [3, 3]
        assert {newest_checkpoint(cfg).name for cfg in cfgs} == {"step_000000003"}
        results_of(run_ranks(2, lambda: train_shared(model, cfgs)))
    assert_as_one_process(cfgs, uninterrupted)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left")], ids=str)
def test_a_rank_that_fails_alone(model, training_cfg, uninterrupted, monkeypatch, error):
    """Out of memory in a step, or a record that cannot be written: its line, exit code 3, and the others end too."""
    cfgs = [training_cfg(**changes, **OFTEN, checkpoint_freq=3) for changes in SAES]
    target, name = (RunLog, "flush") if isinstance(error, OSError) else (training, "group_step")
    real, calls = getattr(target, name), []

    def fail(*args):
        calls.append(1)
        if len(calls) > 9 and distributed.rank() == 1:
            raise error
        return real(*args)

    monkeypatch.setattr(target, name, fail)
    started = time.monotonic()
    ranks = run_ranks(3, lambda: train_shared(model, cfgs))
    assert [code for code, *_ in ranks] == [3, 3, 3] and time.monotonic() - started < 60
    assert str(error.args[-1]) in only_line(ranks)
    monkeypatch.setattr(target, name, real)
    results_of(run_ranks(2, lambda: train_shared(model, cfgs)))
    assert_as_one_process(cfgs, uninterrupted)


@pytest.mark.parametrize("owner", [lambda i: i % 2, lambda i: int(i == 1)], ids=["shared", "alone on its rank"])
def test_nan_stops_one_sae(model, training_cfg, uninterrupted, owner):
    """The others are trained, with the same bits. All ranks raise NotFinite with its name."""
    cfgs = [training_cfg(**changes, **OFTEN) for changes in SAES]

    def train():
        real = training.learning_rate
        training.learning_rate = lambda cfg, step: (
            float("nan") if (cfg["name"], step) == (cfgs[1]["name"], 5) else real(cfg, step)
        )
        train_shared(model, cfgs, owner)

    ranks = run_ranks(2, train)
    assert [code for code, *_ in ranks] == [NotFinite.exit_code] * 2
    assert f"1 of 6 SAEs were stopped, and saved as they were: {cfgs[1]['name']}: step 6" in only_line(ranks)
    rest = [i for i in range(len(cfgs)) if i != 1]
    saes, results, lines = uninterrupted
    of_rest = [saes[i] for i in rest], [results[i] for i in rest], [lines[i] for i in rest]
    assert_as_one_process([cfgs[i] for i in rest], of_rest)


@pytest.mark.parametrize("b_dec_init", ["zero", "mean"])
@pytest.mark.parametrize("batch", [1, 3])
def test_nan_in_the_activations_ends_all_ranks(model, training_cfg, monkeypatch, b_dec_init, batch):
    """Also those without an SAE, or whose SAEs do not need the mean of the first buffer."""
    cfgs = [training_cfg(sae_type="topk", top_k=2 + i, b_dec_init=b_dec_init if i else "zero") for i in range(2)]
    real = ActivationsStore.fill_buffer

    def fill_buffer(self):
        real(self)
        self.buffer[self.order[batch * self.cfg["batch_size"] - 1]] = torch.nan

    monkeypatch.setattr(ActivationsStore, "fill_buffer", fill_buffer)
    ranks = run_ranks(3, lambda: train_shared(model, cfgs), timeout=60)
    assert [code for code, *_ in ranks] == [2] * 3 and "NaN or infinity in the activations" in only_line(ranks)


def test_all_saes_stop_at_a_logged_step(model, training_cfg):
    cfgs = [training_cfg(sae_type="topk", top_k=2 + i, log_freq=1, perf_log_freq=2, lr=1e30) for i in range(2)]
    ranks = run_ranks(2, lambda: train_shared(model, cfgs))
    assert [code for code, *_ in ranks] == [2, 2] and "2 of 2 SAEs were stopped" in only_line(ranks)


def test_a_silent_rank_times_out(monkeypatch):
    """No collective waits for longer than TIMEOUT."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=3))

    def silent():
        if distributed.rank() == 1:
            time.sleep(10)
        distributed.any_rank(True)

    started = time.monotonic()
    ranks = run_ranks(2, silent)
    assert ranks[0][0] == 3 and "does not respond" in only_line(ranks) and time.monotonic() - started < 60


# GPUs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_nccl_gives_the_bits_of_one_process(tmp_path):
    """Two machines of one rank each, which in fact share a GPU: NCCL is given another name for each."""
    args = ["dict_size=1024", "top_k=8", "l1_coeff=0.01", "num_tokens=20_000", "device=cuda"]
    port, nodes = unused_port(), []
    start(command(tmp_path / "one", *args), tmp_path / "log").wait(timeout=300)
    for i in range(2):
        env = dict(NCCL_HOSTID=f"machine {i}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        where = ["--nnodes=2", f"--node-rank={i}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        torchrun = [sys.executable, "-c", TORCHRUN, *where, "--nproc-per-node=1", *command(tmp_path / "two", *args)]
        with open(tmp_path / f"log{i}", "w") as log:
            nodes.append(subprocess.Popen(torchrun, env=environment() | env, stdout=log, stderr=log, cwd=REPO))
    try:
        assert [node.wait(timeout=300) for node in nodes] == [0, 0], (tmp_path / "log0").read_text()
    finally:
        for node in nodes:
            node.kill()
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != {}


# The plan


@pytest.mark.fast
def test_saes_are_assigned_by_cost_and_memory(training_cfg, model, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    cfgs = [training_cfg(sae_type="topk", top_k=2, dict_size=size) for size in (64, 512, 128, 2048, 64)]
    seconds = [1, 5, 2, 20, 1.5]
    owners = plan.assign(cfgs, seconds, model, 2**40)
    assert owners[3] not in {owners[i] for i in (0, 1, 2, 4)}, "the slowest is alone"
    work = [sum(s for s, owner in zip(seconds, owners) if owner == rank) for rank in range(3)]
    assert sorted(work) == [4.5, 5, 20]
    available = plan.memory_needed([cfgs[3]], model)
    for cost in (seconds, [1, 1, 1, 0, 1]):
        owners = plan.assign(cfgs, cost, model, available)
        for rank in set(owners):
            part = [cfg for cfg, owner in zip(cfgs, owners) if owner == rank]
            assert plan.memory_needed(part, model) <= available


def test_plan_for_several_ranks(model, training_cfg):
    """All ranks agree on it. It says how the SAEs are distributed, and that some ranks have none."""
    cfgs = [training_cfg(**changes) for changes in SAES[:2]]

    def times():
        return plan.plan_time(cfgs, ActivationsStore(model, cfgs[0]), 0, False, 2**40)

    ranks = run_ranks(3, times)
    first, *others = results_of(ranks)
    assert all(owners == first for owners in others) and len(set(first)) == 2
    assert re.search(r"SAEs per rank: [01], [01], [01] \(ranks without .*at most .* GiB.* received", ranks[0][1])
    assert not ranks[1][1]
