"""Weights & Biases mirrors the local record, with the real client: offline, and to a local server."""

import json
import signal
import time
from pathlib import Path

import pytest
import wandb
from helpers import OFTEN, SAES, STEPS, figures, lines_of, same_bits, stopping_store, train
from kill_and_resume import command
from wandb_server import WandbServer, records

import logs
import training
from activation_store import ActivationsStore
from checkpoint import load_sae, run_folder
from logs import RunLog, is_finished

ONE_SAE = ("sae_type=topk", "top_k=8", "l1_coeff=0", "wandb_mode=online")  # makes all runs of the demo equal

# Offline and disabled


def test_wandb_offline_mirrors_every_run(model, training_cfg, monkeypatch):
    """WANDB_MODE=offline gives one offline run per SAE; the local record is the same with and without it."""
    for mode in ("disabled", "offline"):
        monkeypatch.setenv("WANDB_MODE", mode)
        cfgs = [training_cfg(mode, **changes, log_freq=4, perf_log_freq=6) for changes in SAES[:3]]
        train(model, cfgs)
        for cfg in cfgs:
            runs = list((run_folder(cfg) / "wandb").glob("offline-run-*/*.wandb"))
            assert len(runs) == (mode == "offline")
            assert all(path.stat().st_size > 0 for path in runs)
    wandb.teardown()
    for changes in SAES[:3]:
        plain, mirrored = (run_folder(training_cfg(mode, **changes)) for mode in ("disabled", "offline"))
        assert lines_of(plain) == lines_of(mirrored)
        records = [json.loads((folder / "result.json").read_text()) for folder in (plain, mirrored)]
        assert figures(records[0]) == figures(records[1])
        assert same_bits(load_sae(plain), load_sae(mirrored))


@pytest.mark.fast
def test_wandb_mode_in_the_config_takes_precedence(training_cfg, monkeypatch):
    """wandb_mode of the config overrides WANDB_MODE."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(training_cfg(wandb_mode="disabled"), {})
    log.start(0, 0)
    assert log.wandb_run is None
    log.close()


def test_wandb_offline_records_a_resumed_run_once(model, training_cfg, monkeypatch):
    """The newest offline folder has every step once, with the id of the first; the first is renamed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = training_cfg(**SAES[1], **OFTEN)
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(6, training.Stopped()))
    wandb.teardown()
    train(model, [cfg])
    wandb.teardown()
    (newest,) = (run_folder(cfg) / "wandb").glob("offline-run-*/*.wandb")
    (cut_off,) = (run_folder(cfg) / "wandb").glob("replaced-offline-run-*/*.wandb")
    found = [(record.run.run_id, record.history) for record in records(newest)]
    ids, steps = {run_id for run_id, _ in found if run_id}, [history.step.num for _, history in found if history.item]
    assert steps == [line["step"] for line in lines_of(run_folder(cfg))] == [1, *range(2, STEPS + 1, 2)]
    assert ids == {cut_off.stem.removeprefix("run-")}


def test_wandb_that_fails_midway_changes_nothing(model, training_cfg, monkeypatch, capsys):
    """One line reports it; weights and local record are those of a run without W&B."""
    cfg = training_cfg("off", **SAES[1])
    plain = train(model, [cfg])[0][0]
    failing = training_cfg("failing", **SAES[1])

    class Broken:
        step = 0

        def log(self, line, step):
            if step > 1:
                raise RuntimeError("no connection")

    monkeypatch.setattr("logs.start_wandb", lambda *_: Broken())
    saes, _ = train(model, [failing])
    assert same_bits(plain, saes[0]) and lines_of(run_folder(failing)) == lines_of(run_folder(cfg))
    assert capsys.readouterr().err.count("Weights & Biases failed (no connection)") == 1


# Online


@pytest.fixture
def server():
    server = WandbServer([], "me", "project")
    yield server
    server.close()


def credentials(server: WandbServer) -> dict:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}


@pytest.fixture
def online(server, monkeypatch):
    """This process is logged in to the server, with short timeouts."""
    for key, value in (credentials(server) | {"WANDB_HTTP_TIMEOUT": "2"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(logs, "WANDB_TIMEOUT", 2)
    logs.is_online.cache_clear()
    yield server
    wandb.teardown()
    logs.is_online.cache_clear()


def pause_after(process, output_dir: Path, step: int) -> None:
    """Suspend a process, but not W&B's own, once it has logged a step."""
    while process.poll() is None and not any(
        b'"step": %d,' % step in path.read_bytes() for path in output_dir.glob("*/*/metrics.jsonl")
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)


def local_record(output_dir: Path) -> tuple[list[dict], dict]:
    """Metrics and result of the one run."""
    (folder,) = (path.parent for path in output_dir.glob("*/*/result.json"))
    return lines_of(folder), json.loads((folder / "result.json").read_text())


def test_an_online_run_is_resumed_by_its_id(tmp_path, program, server):
    """Killed when W&B has more steps than the checkpoint: the same command resumes that run, which ends finished, with
    every step once, as in the local record, and the result."""
    few = ("num_tokens=12_000", "eval_tokens=256", "log_freq=1", "checkpoint_freq=10")
    args = command(tmp_path / "runs", *ONE_SAE, "wandb_project=project", *few)
    env = {key: value for key, value in program.env.items() if key != "WANDB_MODE"} | credentials(server)
    log = tmp_path / "log"
    how = dict(out=log, err=log, env=env, figures=False)
    process = program.start(*args, **how)
    pause_after(process, tmp_path / "runs", 14)
    while not server.runs or not (run := next(iter(server.runs.values())))["history"]:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)  # it is sent every 15 s
    process.kill()
    assert process.wait() == -signal.SIGKILL
    sent = [row["_step"] for row in run["history"]]
    assert sent[-1] > 10, "or the step after the checkpoint was not sent before"
    assert run["state"] == "running"
    assert program.start(*args, **how).wait(timeout=100) == 0 and "Resuming after step 10" in log.read_text()
    lines, result = local_record(tmp_path / "runs")
    assert list(server.runs.values()) == [run] and run["state"] == "finished"
    assert [row["_step"] for row in run["history"]] == [line["step"] for line in lines]
    assert len(lines) == lines[-1]["step"] > sent[-1] and run["history"][-1]["tokens"] == lines[-1]["tokens"]
    assert [{key: row[key] for key in line} for row, line in zip(run["history"], lines)] == lines
    assert {key: run["summary"][key] for key in result} == result
    assert json.loads(next(tmp_path.glob("runs/*/*/config.json")).read_text())["_provenance"]["wandb_id"] == run["id"]


def test_a_server_that_fails_during_training(model, training_cfg, online, capsys):
    """Training completes with the weights and record of a run without W&B, and one line reports it."""
    changes = dict(**SAES[1], **OFTEN)
    plain, _ = train(model, [training_cfg("plain", wandb_mode="disabled", **changes)])

    class Store(ActivationsStore):
        batches = 0

        def next_batch(self):
            self.batches += 1
            if self.batches == 6:
                online.close()
            return super().next_batch()

    saes, _ = train(model, [cfg := training_cfg("online", **changes)], Store)
    assert len(online.runs) == 1 and capsys.readouterr().err.count("Weights & Biases failed") == 1
    assert same_bits(plain[0], saes[0]) and is_finished(cfg)
    assert lines_of(run_folder(training_cfg("plain", **changes))) == lines_of(run_folder(cfg))


def test_no_server(model, training_cfg, online, monkeypatch, capsys):
    """The login is tried once, not for each run of a sweep, and training continues without it."""
    online.close()
    login, calls = wandb.login, []
    monkeypatch.setattr(wandb, "login", lambda **how: calls.append(how) or login(**how))
    train(model, cfgs := [training_cfg(**changes) for changes in SAES[:3]])
    assert len(calls) == 1 and all(map(is_finished, cfgs))
    assert capsys.readouterr().err.count("Weights & Biases cannot be reached") == 1
