"""Checkpoints and exact resume: whatever stops a run, the same call resumes it with bit-identical results."""

import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    OFTEN,
    SAES,
    STEPS,
    assert_as_uninterrupted,
    corrupt,
    is_over,
    lines_of,
    same_bits,
    stopping_store,
    train,
)
from kill_and_resume import command, digests, environment, kill_and_resume
from tqdm import tqdm

import checkpoint
import logs
import main
import training
import training_step
from activation_store import ActivationsStore
from checkpoint import Checkpoints, SaveError, groups_folder, load_sae, newest_checkpoint
from console import InputError, run_command
from hub import StreamError
from logs import RunLog, is_finished, run_folder, why_stopped
from sae import SAE_CLASSES
from training import train_sae_group
from training_step import group_step


def runs_here(cfgs):
    return {path.name for path in groups_folder(cfgs[0]).parent.iterdir()}


# Bit-identical resume


@pytest.mark.parametrize("checkpoint_freq", [1, 3, 1000])
@pytest.mark.fast
def test_a_run_stopped_anywhere_resumes_bit_identically(model, training_cfg, uninterrupted, checkpoint_freq):
    """KeyboardInterrupt out of nowhere (no checkpoint is saved then), Stopped, and a network that stays down."""
    rng = random.Random(checkpoint_freq)
    cfgs = [training_cfg("cut", **changes, **OFTEN, checkpoint_freq=checkpoint_freq) for changes in SAES]
    for error in (KeyboardInterrupt(), training.Stopped(), StreamError("down"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            train(model, cfgs, stopping_store(rng.randint(2, 4), error))
        assert not any(map(is_over, cfgs))
    assert newest_checkpoint(cfgs[0])
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))
    assert runs_here(cfgs) == {cfg["name"] for cfg in cfgs}, "finished: no checkpoint is left"
    assert not list(groups_folder(cfgs[0]).parent.glob("*/*.lock")) + list(
        groups_folder(cfgs[0]).parent.glob("*/.lock")
    )


def out_of_cuda_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


OUT_OF_MEMORY = {  # the real errors of torch on a CPU and of numpy; a CUDA one is the same class wherever it is raised
    "cuda": out_of_cuda_memory,
    "cpu": lambda: torch.empty(2**62, dtype=torch.uint8),
    "numpy": lambda: np.empty(2**62, np.uint8),
}


def raising_at(call: int, function, then=lambda: None):
    """`function`, but call number `call` of this process raises what `then` raises."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            then()
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("of, kind", [(0, "numpy"), (3, "cuda"), (len(SAES) - 1, "cpu")])
def test_out_of_memory_in_a_step_resumes_bit_identically(
    model, training_cfg, uninterrupted, monkeypatch, of, kind, side_by_side
):
    """In the forward of any SAE of the group at step 7: the step that others have taken is not taken twice."""
    if not side_by_side:
        monkeypatch.setattr(training_step, "SMALL", 0)
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    monkeypatch.setattr(saes[of], "forward_normalised", raising_at(7, saes[of].forward_normalised, OUT_OF_MEMORY[kind]))
    with pytest.raises((torch.OutOfMemoryError, RuntimeError, MemoryError)):
        train_sae_group(saes, ActivationsStore(model, cfgs[0]), model, cfgs)
    path = newest_checkpoint(cfgs[0])
    state = json.loads((path / "state.json").read_text())
    others = cfgs[:of] + cfgs[of + 1 :] if side_by_side else cfgs[:of]
    assert state["step"] == 6 and list(state["ahead"]) == [cfg["name"] for cfg in others]
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


@pytest.mark.parametrize("place", ["harvest", "evaluation"])
def test_out_of_memory_elsewhere_resumes_bit_identically(model, training_cfg, uninterrupted, monkeypatch, place):
    """In the language model's forward, and in the evaluation after step 8, whose line is logged once."""
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        if place == "evaluation":
            patch.setattr(training, "evaluate", raising_at(2, training.evaluate, out_of_cuda_memory))
            train(model, cfgs)
        else:
            train(model, cfgs, stopping_store(8, torch.OutOfMemoryError("CUDA out of memory.")))
    assert newest_checkpoint(cfgs[0]).name == "step_000000007"
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


def test_out_of_memory_while_records_are_written(model, training_cfg, uninterrupted, monkeypatch):
    """No checkpoint of the step before is saved then: some records are ahead of it."""
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(training, "record", raising_at(2 * len(SAES) + 2, training.record, out_of_cuda_memory))
        train(model, cfgs)
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


def test_out_of_memory_in_the_middle_of_an_update(model, training_cfg, uninterrupted, monkeypatch, capsys):
    """An SAE that is half changed is not saved: training resumes from the checkpoint before, to the same bits."""
    cfgs = [training_cfg("cut", **changes, **OFTEN, checkpoint_freq=3) for changes in SAES]
    saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
    normalise = saes[2].normalize_decoder
    monkeypatch.setattr(saes[2], "normalize_decoder", raising_at(5, normalise, out_of_cuda_memory))
    with pytest.raises(torch.OutOfMemoryError):
        train_sae_group(saes, ActivationsStore(model, cfgs[0]), model, cfgs)
    assert "the last checkpoint is kept" in capsys.readouterr().err
    assert newest_checkpoint(cfgs[0]).name == "step_000000003"
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


class ClosedPipe:
    """A stderr whose reader leaves when it has read `text`. The progress bar is written as often as to a terminal."""

    def __init__(self, text: str):
        self.text, self.written = text, ""

    def write(self, text: str) -> int:
        if self.text in self.written:
            raise BrokenPipeError
        self.written += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("text", [" 128/768", "After 256 tokens"])
def test_a_closed_pipe_ends_training_with_a_checkpoint(model, training_cfg, uninterrupted, monkeypatch, text):
    """`python main.py … 2>&1 | less`, and less is left: training ends with a checkpoint of the last step."""
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]

    def slow_step(*args):  # slow enough for the bar to be written after each step
        time.sleep(0.15)
        group_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr("training.group_step", slow_step)
        patch.setattr(tqdm, "_lock", threading.RLock())  # tqdm does not release its lock when writing fails
        patch.setattr(sys, "stderr", ClosedPipe(text))
        with pytest.raises(BrokenPipeError):
            train(model, cfgs)
    assert newest_checkpoint(cfgs[0])
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


def test_out_of_memory_again_at_the_same_step(model, training_cfg, uninterrupted, monkeypatch):
    """A second time, later in the same step: what is there is kept, and is still resumed from."""
    monkeypatch.setattr(training_step, "SMALL", 0)
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    for of, call in ((1, 7), (4, 1)):
        saes = [SAE_CLASSES[cfg["sae_type"]](cfg) for cfg in cfgs]
        raises = raising_at(call, saes[of].forward_normalised, out_of_cuda_memory)
        monkeypatch.setattr(saes[of], "forward_normalised", raises)
        with pytest.raises(torch.OutOfMemoryError):
            train_sae_group(saes, ActivationsStore(model, cfgs[0]), model, cfgs)
        state = json.loads((newest_checkpoint(cfgs[0]) / "state.json").read_text())
        assert state["step"] == 6 and len(state["ahead"]) == 1
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_and_exit_code_3(monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as caught:
        run_command(lambda argv: OUT_OF_MEMORY[kind]())
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 3 and len(lines) == 1 and lines[0].startswith("error: out of memory: ")


def test_warmup_and_decay_resume(model, training_cfg):
    """The learning rate follows from the step: stopped in the rise, between, and in the fall, the bits are the same."""
    changes = dict(SAES[2], lr_warmup_steps=5, lr_decay_steps=4)
    whole, _ = train(model, [training_cfg("whole", **changes)])
    cfg = training_cfg("cut", **changes)
    for batches in (4, 4, 5):  # stopped after 3, 6 and 10 of 12 steps
        with pytest.raises(training.Stopped):
            train(model, [cfg], stopping_store(batches, training.Stopped()))
    cut, _ = train(model, [cfg])
    assert same_bits(whole[0], cut[0])


def test_a_run_with_a_reduced_seq_len_resumes(model, training_cfg):
    """Also where the record is from before the cut was recorded: the name, and so the checkpoint, is the same."""
    changes = dict(sae_type="topk", top_k=4, seq_len=1000, eval_tokens=200)
    whole, _ = train(model, [training_cfg("whole", **changes)])
    cfg = training_cfg("cut", **changes)
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(6, training.Stopped()))
    path = run_folder(cfg) / "config.json"
    recorded = json.loads(path.read_text())
    assert recorded["seq_len"] == 128
    path.write_text(json.dumps(cfg | {"_provenance": recorded["_provenance"]}))
    assert newest_checkpoint(cfg).name == "step_000000005"
    resumed, _ = train(model, [cfg])
    assert same_bits(whole[0], resumed[0]) and json.loads(path.read_text())["seq_len"] == 128


def test_stopped_in_the_final_evaluation(model, training_cfg, uninterrupted, monkeypatch):
    """What remains is the evaluation: no step is trained again, and runs that have their result are left alone."""
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    finish, finished = RunLog.finish, []

    def finish_two(self, result):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(self)
        finish(self, result)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "finish", finish_two)
        train(model, cfgs)
    assert list(map(is_finished, cfgs)) == [True, True] + [False] * (len(cfgs) - 2)
    before = digests(Path(cfgs[0]["output_dir"]))
    monkeypatch.setattr(training_step, "launch_step", None)
    saes, results = train(model, cfgs[2:])
    assert_as_uninterrupted([part[2:] for part in uninterrupted], cfgs[2:], saes, results)
    after = digests(Path(cfgs[0]["output_dir"]))
    assert all(after[key] == before[key] for key in before if key[0] in {cfg["name"] for cfg in cfgs[:2]})
    assert not groups_folder(cfgs[0]).exists()


def test_the_result_is_written_last(model, training_cfg, monkeypatch):
    """A run whose other records are incomplete is not finished."""
    cfg, write_json = training_cfg(**SAES[1]), logs.write_json

    def interrupted(path, content):
        if path.name == "histograms.json":
            raise KeyboardInterrupt
        write_json(path, content)

    monkeypatch.setattr(logs, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, [cfg])
    assert not is_finished(cfg)


def test_killed_processes_resume(tmp_path, program):
    """`python main.py demo` and torchrun, with real signals and a corrupt checkpoint, finished by three ranks: a short
    run of tests/kill_and_resume.py with an SAE of each type.
    """
    kills = [(signal.SIGKILL, "save", 0), (signal.SIGKILL, "evaluation", 0)]
    kills += [(signal.SIGTERM, "", 1), (signal.SIGKILL, "", 2)]
    overrides = ("top_k=8", "l1_coeff=0.01", "num_tokens=17_000", "eval_tokens=256", "checkpoint_freq=1")
    hits = kill_and_resume(tmp_path, kills, random.Random(7), 1, *overrides, delay=0.2, ranks=3, program=program)
    assert hits["rank 0 of 1 (SIGTERM)"] and sum(hits[f"rank {i} of 2 (SIGKILL)"] for i in range(2))
    assert hits["a save (SIGKILL)"] and hits["an evaluation (SIGKILL)"] and hits["a corrupt checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_a_second_one_does_not_wait(model, training_cfg, uninterrupted, monkeypatch, number):
    """The step finishes and a checkpoint is saved; a second signal interrupts that. Both can be resumed."""
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    before = signal.getsignal(number)
    step, calls = training_step.launch_step, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3 * len(SAES) + 2:  # in the fourth step
            os.kill(os.getpid(), number)
        return step(*args)

    def signalled_again(*args):
        os.kill(os.getpid(), number)
        raise AssertionError("not reached")

    monkeypatch.setattr(training, "SIGNAL_DEBOUNCE", 0.0)
    for save in (signalled_again, checkpoint.save_checkpoint):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            patch.setattr(training_step, "launch_step", signalled)
            patch.setattr(checkpoint, "save_checkpoint", save)
            train(model, cfgs)
        assert signal.getsignal(number) == before
        assert (caught.type is training.Stopped) == (save is not signalled_again)
    assert newest_checkpoint(cfgs[0]).name == "step_000000004"
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


def test_a_signal_during_a_harvest_stops_at_once(model, training_cfg):
    """Harvesting takes minutes on a CPU: it is broken off, and nothing of it is lost or skipped."""
    cfg = training_cfg(**SAES[1])

    class Store(ActivationsStore):
        def fill_buffer(self):
            super().fill_buffer()
            if self.buffer_start["buffer"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("not reached")

    with pytest.raises(training.Stopped, match="the same call resumes it"):
        train(model, [cfg], Store)
    assert newest_checkpoint(cfg).name == "step_000000006"
    assert same_bits(train(model, [cfg])[0][0], train(model, [training_cfg("whole", **SAES[1])])[0][0])


# What has to be the same


def test_what_a_checkpoint_was_made_with(model, training_cfg):
    """Whatever can change the results is part of the provenance, and must be the same to resume."""
    made_with = logs.provenance(model, ActivationsStore(model, training_cfg(**SAES[1])))
    versions, ignored = made_with["versions"], {"versions", "python", "commit"}
    assert versions.keys() == {"torch", "numpy", "transformer_lens", "transformers", "datasets", "tokenizers"}
    compared = {
        "device", "feature_shards", "threads", "model_sha256", "heldout_tokens_sha256", "data_files_sha256",
        "dataset_commit",
    }  # fmt: skip
    assert made_with.keys() == compared | ignored
    for key in (*compared, *versions):
        now = made_with | ({"versions": versions | {key: "another"}} if key in versions else {key: "another"})
        with pytest.raises(InputError, match=rf"step_1: {key} was .+ and is another \(--resume"):
            checkpoint.check_provenance(made_with, now, Path("step_1"), resume_anyway=False)
    checkpoint.check_provenance(made_with, made_with | dict(python="1", commit="2"), Path("step_1"), False)


def test_changed_provenance_is_refused(model, training_cfg, monkeypatch, capsys):
    """One line names what changed, both values and the flag; with the flag, training resumes."""
    cfg = training_cfg(**SAES[1])
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(4, training.Stopped()))
    provenance = training.provenance
    monkeypatch.setattr(training, "provenance", lambda *args: provenance(*args) | {"threads": "another"})
    with pytest.raises(InputError, match="threads was .+ and is another.*--resume-anyway") as caught:
        train(model, [cfg])
    assert "\n" not in str(caught.value) and not is_over(cfg)
    store = ActivationsStore(model, cfg)
    training.train_sae_group([SAE_CLASSES["topk"](cfg)], store, model, [cfg], resume_anyway=True)
    assert is_finished(cfg) and "and is another" in capsys.readouterr().err


def test_data_edited_since_the_checkpoint_is_refused(model, training_cfg, training_data, tmp_path):
    """One letter, of the same size, long after the held-out tokens. A copy, newly written, is no change."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(training_data).read_text())
    cfg = training_cfg(**SAES[1], dataset_path=str(copy))
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(3, training.Stopped()))
    copy.write_text(Path(training_data).read_text()[::-1].replace("e", "a", 1)[::-1])
    with pytest.raises(InputError, match=r"step_\d+: data_files_sha256 was \w+ and is \w+ \(--resume-anyway") as caught:
        train(model, [cfg])
    assert "\n" not in str(caught.value)
    copy.unlink()
    copy.write_text(Path(training_data).read_text())
    train(model, [cfg])


def test_provenance_stays_in_the_record(model, training_cfg, monkeypatch):
    """Every provenance that a step of the run was trained with, and from which step on; the last one on top."""
    cfg = training_cfg(**SAES[1])
    original = training.provenance

    def go_on(thing, batches, error=KeyboardInterrupt):
        monkeypatch.setattr(training, "provenance", lambda *args: original(*args) | {"thing": thing})
        store = stopping_store(batches, error())(model, cfg)
        with pytest.raises(error):
            training.train_sae_group([SAE_CLASSES["topk"](cfg)], store, model, [cfg], resume_anyway=True)
        top = json.loads((run_folder(cfg) / "config.json").read_text())["_provenance"]
        assert top["versions"]["torch"] == torch.__version__
        return [(made_with["thing"], made_with["after_step"]) for made_with in [*top["earlier"], top]], top["wandb_id"]

    before, wandb_id = go_on("none of its steps is kept", 3)
    assert before == [("none of its steps is kept", 0)]
    assert go_on("A", 3, training.Stopped) == ([("A", 0)], wandb_id)
    assert go_on("A", 3, training.Stopped) == ([("A", 0)], wandb_id)
    assert go_on("none of its steps is kept", 3) == ([("A", 0), ("none of its steps is kept", 4)], wandb_id)
    assert go_on("A", 2, training.Stopped) == ([("A", 0)], wandb_id)
    assert go_on("B", 3, training.Stopped) == ([("A", 0), ("B", 5)], wandb_id)
    assert go_on("B", 1) == ([("A", 0), ("B", 5)], wandb_id)
    assert go_on("A", 1) == ([("A", 0), ("B", 5), ("A", 7)], wandb_id)
    corrupt(newest_checkpoint(cfg), "flipped")  # back to step 5: of B's steps nothing is left
    assert go_on("C", 1) == ([("A", 0), ("C", 5)], wandb_id)


def test_two_processes_on_one_run(training_cfg):
    """The second is refused in a line, and not once the first is dead."""
    cfg = training_cfg(**SAES[1])
    reader, writer = os.pipe()
    holder = os.fork()  # which saves importing everything again
    if not holder:
        try:
            log = RunLog(cfg, {})
            os.write(writer, b"locked")
            time.sleep(99)
            log.close()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 9) == b"locked"
        with pytest.raises(InputError, match="another process"):
            RunLog(cfg, {})
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(reader)
    RunLog(cfg, {}).close()


@pytest.mark.parametrize("line", ["5", "{}", '{"step": 3'])
def test_a_corrupt_line_of_the_metrics_is_refused(model, training_cfg, line):
    """If it is of a step before the checkpoint."""
    cfg = training_cfg(**SAES[1], log_freq=1)
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(5, training.Stopped()))
    path = run_folder(cfg) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(InputError, match="metrics.jsonl does not match the checkpoint after step 4"):
        train(model, [cfg])


@pytest.mark.parametrize("name", ["config.json", "stopped.json"])
def test_a_run_with_a_corrupt_record_is_refused(training_cfg, name):
    """In one line, and the record is kept: it may say why the run was stopped, or what it was trained with."""
    cfg = training_cfg(**SAES[1])
    path = run_folder(cfg) / name
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(InputError, match=f"{name} is corrupt"), closing(RunLog(cfg, {})) as log:
        log.start(0, 0)
    assert path.read_text() == "{"
    assert is_over(cfg) == (name == "stopped.json")
    path.unlink()
    RunLog(cfg, {}).close()  # the lock was released


# Runs of a sweep


def test_runs_added_later_form_a_group_of_their_own(model, training_cfg, monkeypatch):
    """Started runs resume together, new ones start together, and runs that are left out are kept."""
    cfgs = [training_cfg(**changes) for changes in SAES[:4]]
    with pytest.raises(training.Stopped):
        train(model, cfgs[:3], stopping_store(6, training.Stopped()))
    groups = []
    monkeypatch.setattr(main, "load_model", lambda cfg: model)
    monkeypatch.setattr(main, "plan_group", lambda group, *_: [group])
    monkeypatch.setattr(main, "plan_time", lambda group, *_: [0] * len(group))
    monkeypatch.setattr(main, "train_sae_group", lambda s, store, m, group, anyway: groups.append(group))
    main.train([cfgs[3], *cfgs[:2]], False, False)
    assert [[cfg["name"] for cfg in group] for group in groups] == [
        [cfgs[3]["name"]],
        [cfg["name"] for cfg in cfgs[:2]],
    ]
    train(model, cfgs[:2])
    assert newest_checkpoint(cfgs[2]).name == "step_000000005"
    train(model, cfgs[2:3])
    assert not groups_folder(cfgs[0]).exists()


def test_a_run_without_its_record_does_not_resume(model, training_cfg):
    """No metrics before the checkpoint, or an SAE without a checkpoint: a line, and nothing is written over."""
    cfg = training_cfg(**SAES[1])
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(6, training.Stopped()))
    record = run_folder(cfg) / "metrics.jsonl"
    content = record.read_bytes()
    record.unlink()
    with pytest.raises(
        InputError, match="does not match the checkpoint after step 5: its last valid line before is of step 0, not 1"
    ):
        train(model, [cfg])
    record.write_bytes(content)
    os.rename(groups_folder(cfg), run_folder(cfg).parent.parent / "moved")
    for place in ("sae", "sae.old"):  # the second: where a kill came between save_sae's renames
        (run_folder(cfg) / place).mkdir()
        with pytest.raises(InputError, match="no checkpoint to resume from"):
            train(model, [cfg])
        (run_folder(cfg) / place).rmdir()
    assert record.read_bytes() == content


def test_a_run_that_was_moved_away_starts_from_scratch(model, training_cfg):
    """Even if its state is still in the checkpoint of a group that resumes."""
    cfgs = [training_cfg(**changes) for changes in SAES[:2]]
    with pytest.raises(training.Stopped):
        train(model, cfgs, stopping_store(6, training.Stopped()))
    run_folder(cfgs[1]).rename(run_folder(cfgs[1]).parent.parent / "moved")
    assert newest_checkpoint(cfgs[1]) is None and newest_checkpoint(cfgs[0]) is not None
    with pytest.raises(InputError, match="cannot be resumed together: .*step_000000005, none"):
        train(model, cfgs)
    alone = train(model, cfgs[1:])[0][0]
    assert same_bits(alone, train(model, [training_cfg("whole", **SAES[1])])[0][0])


def test_a_used_store_is_rewound(model, training_cfg):
    """The same call again in a notebook, with the same store: nothing of the stream is skipped."""
    cfg = training_cfg(**SAES[1])
    store = ActivationsStore(model, cfg)
    for _ in range(5):
        store.next_batch()
    sae = SAE_CLASSES["topk"](cfg)
    training.train_sae(sae, store, model, cfg)
    assert same_bits(sae, train(model, [training_cfg("whole", **SAES[1])])[0][0])


def test_a_stop_in_the_last_step_is_a_stop(model, training_cfg, monkeypatch):
    cfg = training_cfg(**SAES[1], checkpoint_freq=1000)
    step, calls = training_step.launch_step, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(training.Stopped):
        patch.setattr(training_step, "launch_step", signalled)
        train(model, [cfg])
    assert newest_checkpoint(cfg).name == f"step_{STEPS:09}" and not is_over(cfg)


def test_a_stop_while_the_last_checkpoint_is_saved_is_a_stop(model, training_cfg, monkeypatch):
    cfg = training_cfg(**SAES[1], checkpoint_freq=1000)
    save = Checkpoints.save

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(Checkpoints, "save", signalled)
    with pytest.raises(training.Stopped):
        train(model, [cfg])
    assert newest_checkpoint(cfg).name == f"step_{STEPS:09}" and not is_over(cfg)


# NaN


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_nan_stops_one_sae_and_not_the_others(model, training_cfg, monkeypatch, where):
    """Before its weights are touched; the others come to the same bits, and the record names step and reason."""
    cfgs = [training_cfg("with", **changes) for changes in SAES[:3]]
    real, seen = training_step.launch_step, []

    def poisoned(sae, optimizer, x, cfg, wait=False):
        if cfg["sae_type"] == "topk":
            seen.append({name: value.clone() for name, value in sae.state_dict().items()})
            if len(seen) == 5 and where == "weights":
                with torch.no_grad():
                    sae.W_enc[3, 7] = torch.nan
                    seen[-1]["W_enc"][3, 7] = torch.nan
            if len(seen) == 5 and where == "gradient":
                sae.W_dec.register_hook(lambda grad: grad * torch.inf)
        return real(sae, optimizer, x, cfg, wait)

    monkeypatch.setattr(training_step, "launch_step", poisoned)
    with pytest.raises(InputError, match=f"1 of 3 SAEs.*{cfgs[1]['name']}: step 5: NaN or infinity"):
        train(model, cfgs)
    monkeypatch.undo()
    assert len(seen) == 5
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert [is_finished(cfg) for cfg in cfgs] == [True, False, True]
    assert re.fullmatch("step 5: NaN or infinity in .*", why_stopped(run_folder(cfgs[1])))
    saved = load_sae(run_folder(cfgs[1])).state_dict()
    assert all(torch.equal(saved[name].nan_to_num(), value.nan_to_num()) for name, value in seen[4].items())
    for i in (0, 2):
        alone = train(model, [training_cfg("alone", **SAES[i])])[0][0]
        assert same_bits(alone, load_sae(run_folder(cfgs[i])))
    with pytest.raises(InputError, match="was stopped: step 5"):
        train(model, [cfgs[1]])
    assert not groups_folder(cfgs[0]).exists()


def test_a_closed_pipe_while_nan_stops_a_run(model, training_cfg, uninterrupted, monkeypatch):
    """The checkpoint that is saved then has the run that is about to be stopped, too."""
    cfgs = [training_cfg("cut", **changes, **OFTEN) for changes in SAES]
    real, steps = training_step.launch_step, itertools.count(1)

    def poisoned(sae, optimizer, x, cfg, wait=False):
        if cfg["name"] == cfgs[1]["name"] and next(steps) == 5:
            raise FloatingPointError("NaN or infinity in the test")
        return real(sae, optimizer, x, cfg, wait)

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "launch_step", poisoned)
        patch.setattr(tqdm, "_lock", threading.RLock())  # tqdm does not release its lock when writing fails
        patch.setattr(sys, "stderr", ClosedPipe("NaN or infinity in the test"))
        with pytest.raises(BrokenPipeError):
            train(model, cfgs)
    state = json.loads((newest_checkpoint(cfgs[0]) / "state.json").read_text())
    assert state["step"] == 4 and why_stopped(run_folder(cfgs[1])) is None
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


@pytest.mark.fast
def test_nan_in_the_activations_stops_all_of_them(model, training_cfg):
    """No SAE is to blame: they are saved as they were, and not marked as stopped."""
    cfgs = [training_cfg(**changes) for changes in SAES[:2]]

    class Store(ActivationsStore):
        batches = 0

        def next_batch(self):
            self.batches += 1
            return super().next_batch() * (torch.nan if self.batches == 6 else 1)

    with pytest.raises(InputError, match="step 6: NaN or infinity in the activations"):
        train(model, cfgs, Store)
    assert not any(map(is_over, cfgs)) and newest_checkpoint(cfgs[0]).name == "step_000000005"


# The disk


@pytest.fixture
def file_size_limit():
    """Files beyond `size` bytes cannot be written by this process: what a full disk does, without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("save_errors", ["stop", "go_on"])
def test_a_failed_save_keeps_the_previous_checkpoint(model, training_cfg, uninterrupted, file_size_limit, save_errors):
    """Training ends or continues, as save_errors says; once there is space, the same call gives the same bits."""
    cfgs = [training_cfg("cut", **changes, **OFTEN, checkpoint_freq=3, save_errors=save_errors) for changes in SAES]
    with pytest.raises(KeyboardInterrupt):
        train(model, cfgs, stopping_store(5, KeyboardInterrupt()))
    first = newest_checkpoint(cfgs[0])
    file_size_limit(20_000)
    error = SaveError if save_errors == "stop" else KeyboardInterrupt
    with pytest.raises(error):
        train(model, cfgs, stopping_store(6, KeyboardInterrupt()))
    file_size_limit(resource.RLIM_INFINITY)
    assert newest_checkpoint(cfgs[0]) == first and first.name == "step_000000003"
    assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


def test_a_line_that_is_half_written(training_cfg, file_size_limit):
    """It is taken back, and written whole with the next one."""
    cfg = training_cfg(**SAES[1])
    log = RunLog(cfg, {})
    log.start(0, 0)
    log.log(1, 64, {"loss": 0.5})
    file_size_limit((run_folder(cfg) / "metrics.jsonl").stat().st_size + 9)
    with pytest.raises(OSError):
        log.log(2, 128, {"loss": 0.4})
    file_size_limit(resource.RLIM_INFINITY)
    log.log(3, 192, {"loss": 0.3})
    log.close()
    assert [line["step"] for line in lines_of(run_folder(cfg))] == [1, 2, 3]


IN_NAMESPACES_OF = """
import ctypes, os, runpy, sys
folder, process = os.getcwd(), sys.argv.pop(1)
for namespace in ("user", "mnt"):
    assert ctypes.CDLL(None).setns(os.open(f"/proc/{process}/ns/{namespace}", os.O_RDONLY), 0) == 0
os.chdir(folder)
runpy.run_path("main.py", run_name="__main__")
"""


def test_a_full_disk(tmp_path, program):
    """A file system of 1.5 MB, mounted in a user namespace: exit code 3 and a line; with more room the run finishes."""
    mount = f"mount -t tmpfs -o size=1500k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system allows no mount in a user namespace: a full disk was not tried")
    script = f"{mount} && echo mounted && read line && mount -o remount,size=99m {tmp_path} && echo larger && read line"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(["unshare", "-rm", "sh", "-c", script], **pipes) as shell:
        args = command(tmp_path, "sae_type=topk", "l1_coeff=0", "num_tokens=10_000", "eval_tokens=256")[1:]
        args, how = ["-c", IN_NAMESPACES_OF, shell.pid, *args], dict(env=environment(), figures=False)
        inside = Path(f"/proc/{shell.pid}/root{tmp_path}")
        assert shell.stdout.readline() == "mounted\n"
        done = program.run(*args, **how)
        assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
        assert "cannot be written: No space left on device" in done.stderr and list(inside.glob("*/groups/*/step_*"))
        shell.stdin.write("\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == "larger\n"
        done = program.run(*args, **how)
        assert done.returncode == 0 and "Trained and evaluated 3 SAEs" in done.stderr, done.stderr
        assert len(list(inside.glob("*/*/result.json"))) == 3


def test_the_gpu_is_part_of_the_provenance(monkeypatch):
    """The card, its capability, CUDA's version and TF32 are part of what a checkpoint was made with."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made_with = logs.hardware("cuda:0")
    name = "card cuda:0 (compute capability 9.0)"
    assert made_with == {"card": name, "cuda": torch.version.cuda, "model_in_tf32": True}
    assert logs.hardware("cpu") == {"threads": torch.get_num_threads()}
    before, now = (made | {"versions": {}} for made in (made_with, logs.hardware("cuda:1")))
    with pytest.raises(InputError, match="card was card cuda:0 .* and is card cuda:1"):
        checkpoint.check_provenance(before, now, Path("step_1"), resume_anyway=False)
