"""main.py as a user runs it: complete sweeps, bad input, tables and figures."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import numpy as np
import pytest
from helpers import DEMO_LM, REPO

# Few tokens, and all runs in one group, so that a sweep takes seconds.
TINY = ["num_tokens=6000", "batch_size=512", "eval_tokens=512", "dict_size=64", "top_k_aux=16"]
DEMO_RUNS, PAPER_RUNS = 18, 15


def run_main(program, *args) -> subprocess.CompletedProcess:
    """`python main.py ARGS` of a user without account or network."""
    env = {key: value for key, value in program.env.items() if key != "WANDB_MODE"}
    return program.run("main.py", *args, env=env)


def run_folders(sweep: Path) -> list[Path]:
    return sorted(path.parent for path in sweep.glob("*/config.json"))


def snapshot(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.parent != folder}


# A complete sweep


@pytest.fixture(scope="module")
def demo(program, tmp_path_factory):
    """`python main.py demo` with fewer tokens: its arguments, what it said, the folder of its runs."""
    folder = tmp_path_factory.mktemp("demo")
    args = ["demo", "num_tokens=3000", *TINY[1:3], "perf_log_freq=3", f"output_dir={folder / 'runs'}"]
    first = run_main(program, *args)
    assert first.returncode == 0, first.stderr
    (sweep,) = (folder / "runs").iterdir()
    return args, first, sweep


def test_demo_trains_all_runs_and_draws_them(demo):
    """The demo leaves a finished record per run, the figure as PNG and PDF, the numbers as CSV, and a table."""
    _, first, sweep = demo
    folders = run_folders(sweep)
    assert len(folders) == DEMO_RUNS
    types = set()
    for folder in folders:
        types.add(json.loads((folder / "config.json").read_text())["sae_type"])
        result = json.loads((folder / "result.json").read_text())
        assert result["tokens"] == 3072 and np.isfinite(list(result.values())).all()
        assert (folder / "sae" / "sae_weights.safetensors").is_file()
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert types == {"vanilla", "topk", "batchtopk", "jumprelu", "matryoshka"}
    assert sweep.name != "demo", "a sweep with overrides has a separate folder"
    assert (sweep / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert (sweep / "results.pdf").read_bytes()[:4] == b"%PDF"
    with open(sweep / "results.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {folder.name for folder in folders}
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert float(rows[folder.name]["nmse"]) == pytest.approx(result["nmse"])
    table = first.stdout
    for label, count in {"BatchTopK": 5, " TopK": 5, "JumpReLU": 3, "Vanilla (L1)": 3, "Matryoshka": 2}.items():
        assert sum(line.lstrip("| ").startswith(label.strip()) for line in table.splitlines()) == count
    assert "ce_degradation" in table and str(sweep / "results.png") in table
    (page,) = sweep.glob("*/features.html")
    assert page.parent.name.startswith("batchtopk_512_k16_") and f" of 512 features to {page}" in table


def test_demo_prints_its_progress(demo):
    """The plan, the progress and the missing login are on stderr, without a traceback or a warning."""
    _, first, _ = demo
    assert "18 SAEs on " in first.stderr and "blocks.2.hook_resid_pre" in first.stderr
    for shown in ("tok/s", "loss", "L0", "dead"):
        assert shown in first.stderr
    assert first.stderr.count("tok/s") < 150, "stderr is no terminal: a line every 5 seconds is enough"
    assert first.stderr.count("Not logged in to Weights & Biases") == 1
    assert "Traceback" not in first.stderr and "Warning" not in first.stderr


def test_rerun_skips_finished_runs(demo, main_here):
    """The same command again trains nothing, changes no record, and draws the figure again."""
    args, first, sweep = demo
    before = snapshot(sweep)
    (sweep / "results.png").unlink()
    code, out, err = main_here(*args)
    assert code == 0, err
    assert snapshot(sweep) == before
    assert "18 of 18 runs are finished" in err and "tok/s" not in err
    assert out and first.stdout.startswith(out), "the page exists and is not written again"
    assert (sweep / "results.png").is_file()


def test_results_of_a_sweep_folder(demo, tmp_path, main_here):
    """`python results.py FOLDER` prints the same table and redraws the figure."""
    _, first, sweep = demo
    copy = tmp_path / "copy"
    shutil.copytree(sweep, copy, ignore=shutil.ignore_patterns("results*"))
    code, out, err = main_here(copy, script="results.py")
    assert code == 0, err
    printed = out.replace(str(copy), str(sweep))
    assert printed and first.stdout.startswith(printed), "all but the line about features.html"
    assert {path.name for path in copy.glob("results.*")} == {
        f"results.{ending}" for ending in ("png", "pdf", "csv", "md")
    }


@pytest.fixture(scope="module")
def merged(program, tmp_path_factory):
    """A demo whose overrides make all runs equal, with two seeds."""
    folder = tmp_path_factory.mktemp("merged")
    overrides = ["sae_type=batchtopk", "top_k=4", "l1_coeff=0", *TINY, f"output_dir={folder / 'runs'}"]
    done = run_main(program, "demo", *overrides, "--seeds", "1", "2")
    assert done.returncode == 0, done.stderr
    (sweep,) = (folder / "runs").iterdir()
    return done, sweep


def test_equal_runs_are_merged_and_seeds_are_not(merged):
    """Runs that overrides make equal are trained once, which is printed; each seed is a separate run."""
    done, sweep = merged
    configs = [json.loads((folder / "config.json").read_text()) for folder in run_folders(sweep)]
    assert sorted(config["seed"] for config in configs) == [1, 2]
    assert all((folder / "result.json").is_file() for folder in run_folders(sweep))
    assert re.search(r"Merged .* 36 runs become 2$", done.stderr, re.MULTILINE)
    overrides = {"sae_type": "batchtopk", "top_k": 4, "dict_size": 64, "num_tokens": 6000, "eval_tokens": 512}
    for config in configs:
        assert {key: config[key] for key in overrides} == overrides


def test_seeds_are_averaged(merged):
    """The table has mean ± standard error over the seeds of each metric."""
    done, sweep = merged
    results = [json.loads((folder / "result.json").read_text()) for folder in run_folders(sweep)]
    nmse = np.array([result["nmse"] for result in results])
    assert f"{nmse.mean():.4f} ± {nmse.std(ddof=1) / np.sqrt(2):.4f}" in done.stdout
    assert nmse[0] != nmse[1]


def test_missing_login_is_reported_once(merged):
    """Without a Weights & Biases account, training continues and prints one line for all runs."""
    done, sweep = merged
    assert done.stderr.count("Not logged in to Weights & Biases") == 1
    assert not list(sweep.glob("*/wandb"))


# Without training: the __main__ block of main.py runs in this process, which saves the import of torch


@pytest.fixture
def main_here(monkeypatch, capfd, tmp_path):
    """Run `python SCRIPT ARGS` in this process: exit code, stdout and stderr. Other exceptions fail the test."""
    import datasets
    import huggingface_hub

    for key in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.chdir(REPO)

    def call(*args, script="main.py") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        return code, *capfd.readouterr()

    return call


@pytest.mark.fast
def test_list_prints_the_runs(main_here, tmp_path):
    """--list prints one unique name per line and does nothing else; the default is paper, with 15 runs."""
    names = {}
    for sweep, count in [("paper", PAPER_RUNS), ("demo", DEMO_RUNS)]:
        code, out, err = main_here(sweep, "--list", f"output_dir={tmp_path / 'runs'}")
        names[sweep] = out.splitlines()
        assert (code, err) == (0, "")
        assert len(names[sweep]) == len(set(names[sweep])) == count
    assert main_here("--list") == (0, "\n".join(names["paper"]) + "\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_the_papers_sweep(monkeypatch):
    """The 15 runs of the paper: JumpReLU at three coefficients, TopK and BatchTopK over k and over dictionary sizes."""
    import main

    runs = {
        (cfg["sae_type"], cfg["dict_size"], cfg["l1_coeff"] if cfg["sae_type"] == "jumprelu" else cfg["top_k"])
        for cfg in main.sweep_configs("paper", {})
    }
    wanted = {("jumprelu", 12288, l1_coeff) for l1_coeff in (0.004, 0.0018, 0.0008)}
    for sae_type in ("topk", "batchtopk"):
        wanted |= {(sae_type, 12288, k) for k in (16, 32, 64)}
        wanted |= {(sae_type, 768 * n, 32) for n in (4, 8, 32)}
    assert runs == wanted
    assert {cfg["sweep"] for cfg in main.sweep_configs("paper", {})} == {"paper"}


def test_overrides_apply_to_every_run(main_here):
    """An override changes every name, unless its value is the default; the order does not matter."""
    plain = main_here("demo", "--list")[1].splitlines()
    assert main_here("demo", "--list", "lr=0.003")[1].splitlines() == plain
    changed = main_here("demo", "lr=1e-3", "n_batches_to_dead=7", "--list")[1].splitlines()
    assert not set(changed) & set(plain)
    assert main_here("demo", "--list", "n_batches_to_dead=7", "lr=.001")[1].splitlines() == changed
    _, out, err = main_here("demo", "--list", "sae_type=topk", "--seeds", "1", "2", "3")
    assert len(out.splitlines()) == len(set(out.splitlines())) < 48
    assert "Merged" in err


def test_arguments_in_any_order(main_here):
    """Sweep, overrides and seeds may come in any order."""
    wanted = main_here("demo", "lr=1e-3", "top_k=4", "--list", "--seeds", "1", "2")
    assert wanted[0] == 0 and len(wanted[1].splitlines()) > 16
    for args in (
        "demo --seeds 1 2 lr=1e-3 top_k=4 --list", "--list --seeds 1 2 demo lr=1e-3 top_k=4",
        "lr=1e-3 demo top_k=4 --seeds 1 2 --list", "--seeds 1 lr=1e-3 2 --list top_k=4 demo",
        "lr=1e-3 --seeds 1 --list demo --seeds 2 top_k=4", "--seeds=1 2 demo lr=1e-3 top_k=4 --list",
    ):  # fmt: skip
        assert main_here(*args.split()) == wanted, args


def test_finished_runs_of_other_data(main_here, tmp_path, capfd, monkeypatch):
    """If the file at dataset_path has changed since finished runs, a line warns about it; the runs are unchanged."""
    import main

    monkeypatch.setattr("results.draw_results", lambda folder: None)  # figures take seconds
    data, runs = tmp_path / "text.jsonl", tmp_path / "runs"
    data.write_text("".join(json.dumps({"text": f"import module_{i} as m{i * i}"}) + "\n" for i in range(900)))
    overrides = [*TINY, "sae_type=topk", "top_k=4", "l1_coeff=0", "num_tokens=1000"]
    overrides += [f"dataset_path={data}", f"output_dir={runs}"]
    code, _, err = main_here("demo", *overrides)
    assert code == 0 and "changed" not in err, err
    (sweep,) = runs.iterdir()
    before, cfgs = snapshot(sweep), main.sweep_configs("demo", dict(map(main.parse_override, overrides)))
    capfd.readouterr()
    os.utime(data, (1, 1))
    main.warn_of_changed_data(cfgs)
    data.rename(tmp_path / "elsewhere.jsonl")
    main.warn_of_changed_data(cfgs)
    assert capfd.readouterr().err == "", "another mtime is not a change, nor is missing data"
    data.write_bytes((tmp_path / "elsewhere.jsonl").read_bytes().replace(b"module_7 ", b"modula_7 "))
    code, _, err = main_here("demo", *overrides)
    (line,) = [line for line in err.splitlines() if "changed" in line]
    assert code == 0 and line.startswith(f"warning: dataset_path = '{data}' has changed since 1 of these runs")
    assert snapshot(sweep) == before


def test_a_sweep_without_runs(monkeypatch):
    import main

    monkeypatch.setattr(main, "SWEEPS", {"empty": ({}, [])})
    with pytest.raises(ValueError, match="sweep 'empty' has no runs"):
        main.sweep_configs("empty", {})


def test_sweeps_with_overrides_have_separate_folders():
    """The folder changes with overrides that affect results, not with those that affect the recording of runs."""
    import main

    def folder(**overrides):
        return {cfg["sweep"] for cfg in main.sweep_configs("demo", overrides)}

    assert folder() == folder(output_dir="x", log_freq=3) == {"demo"}
    assert folder(lr=1e-3) == folder(lr=0.001, log_freq=3)
    assert len({*folder(), *folder(lr=1e-3), *folder(lr=2e-3), *folder(num_tokens=1e5)}) == 4
    assert folder(num_tokens=1e5) == folder(num_tokens=100000)


BAD_CONFIG = {
    "unknown sweep": (["papr"], r"papr.*paper, demo"),
    "unknown key": (["demo", "top_kk=3"], "'top_kk'.*'top_k'"),
    "unknown sae_type": (["demo", "sae_type=topkk"], "sae_type = 'topkk'.*vanilla, topk, batchtopk, jumprelu"),
    "a word for a number": (["demo", "top_k=many"], "top_k = 'many'.*int"),
    "a fraction for an integer": (["demo", "top_k=1.5"], "top_k = 1.5.*int"),
    "a boolean for a number": (["demo", "lr=True"], "lr = True.*float"),
    "a number for a boolean": (["demo", "input_unit_norm=1"], "input_unit_norm = 1 .*bool"),
    "none for a number": (["demo", "top_k=none"], "top_k = None"),
    "not a literal": (["demo", "lr={[]:1}"], r"lr = .*\{\[\]:1\}"),
    "a negative rate": (["demo", "lr=-1"], "lr = -1.0.*above 0"),
    "top_k above dict_size": (["demo", "top_k=9000"], "top_k = 9000.*dict_size = (512|256)"),
    "unknown dtype": (["demo", "dtype=float16"], "dtype = 'float16'.*float32"),
    "unknown device": (["demo", "device=gpu"], "device = 'gpu'"),
    "unknown site": (["demo", "site=resid"], "site = 'resid'.*resid_pre"),
    "no value": (["demo", "top_k"], "'top_k'.*KEY=VALUE"),
    "a key that is derived": (["demo", "name=mine"], "name cannot be set"),
    "seed twice": (["demo", "seed=1", "--seeds", "1", "2"], "seed = 1.*--seeds"),
    "a negative seed": (["demo", "--seeds", "1", "-1"], "seed = -1"),
    "a fraction for a seed": (["demo", "--seeds", "1", "1.5"], r"--seeds '1\.5'.*integer"),
    "a word for a seed": (["demo", "--seeds", "one"], "--seeds 'one'.*integer"),
    "no seeds": (["demo", "--seeds"], "--seeds ''.*integer"),
    "a bad value after seeds": (["demo", "--seeds", "1", "top_k=many"], "top_k = 'many'.*int"),
    "two sweeps": (["demo", "paper"], "'paper'.*KEY=VALUE"),
}
BAD_STREAM = {
    "layer out of range": (["layer=4"], r"blocks\.4\.hook_resid_pre.*0 to 3"),
    "wrong act_size": (["act_size=64"], "act_size = 64.*128"),
    "no such hook point": (["site=blocks.1.hook_nothing"], "blocks.1.hook_nothing"),
    "no model directory": (["model_name={tmp}/nothing"], "nothing'.*no such folder"),
    "model without weights": (["model_name={tmp}/no_weights"], "no_weights'.*no weights"),
    "model without tokenizer": (["model_name={tmp}/no_tokenizer"], "no_tokenizer'.*no tokenizer"),
    "corrupt weights": (["model_name={tmp}/broken_weights"], "broken_weights' cannot be loaded"),
    "no data file": (["dataset_path={tmp}/none.jsonl"], "none.jsonl'.*no such file"),
    "no known column": (["dataset_path={tmp}/columns.jsonl"], "columns.jsonl'.*tokens, input_ids, text.*body"),
    "empty data": (["dataset_path={tmp}/empty.jsonl"], "empty.jsonl' is empty"),
    "too little data": (["dataset_path={tmp}/short.jsonl"], "short.jsonl' is too short.*6,000"),
    "not JSON": (["dataset_path={tmp}/broken.jsonl"], "broken.jsonl and later documents cannot be"),
    "not Parquet": (["dataset_path={tmp}/broken.parquet"], "broken.parquet' cannot be"),
    "output_dir is a file": (["output_dir={tmp}/short.jsonl"], "output_dir = .*short.jsonl"),
}


@pytest.fixture
def bad_files(tmp_path) -> Path:
    """Bad models and bad data."""
    for name in ("no_weights", "no_tokenizer", "broken_weights"):
        shutil.copytree(DEMO_LM, tmp_path / name)
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    (tmp_path / "no_tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "broken_weights" / "model.safetensors").write_bytes(b"garbage" * 99)
    (tmp_path / "columns.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text('{"text": "import sys"}\n' * 900)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\nthis is not JSON\n')
    (tmp_path / "broken.parquet").write_text("this is not Parquet")
    return tmp_path


def the_error(code: int, err: str) -> str:
    """The one line on stderr beside the plan of a sweep and progress bars."""
    lines = [line.strip() for line in err.replace("\r", "\n").splitlines()]
    plan = r"\d+ SAEs? on |on cpu: [\d.]+ million parameters, |in /.*/runs|Estimated time: |Merged equal runs: "
    plan += "|counting tokens: |$"
    lines = [line for line in lines if not re.match(plan, line)]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.parametrize("case", BAD_CONFIG)
@pytest.mark.fast
def test_bad_overrides(main_here, tmp_path, case):
    """A bad command line gives one line on stderr with key and value, exit code 2, and no files."""
    args, pattern = BAD_CONFIG[case]
    code, out, err = main_here(args[0], f"output_dir={tmp_path / 'runs'}", *args[1:])
    assert re.search(pattern, the_error(code, err)) and out == ""
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", BAD_STREAM)
def test_bad_model_or_data(main_here, bad_files, case):
    """A bad model or dataset is detected before training: one line, exit code 2, no run folder."""
    args, pattern = BAD_STREAM[case]
    args = [arg.replace("{tmp}", str(bad_files)) for arg in args]
    before = snapshot(bad_files.parent)
    code, out, err = main_here("demo", *TINY, f"output_dir={bad_files / 'runs'}", *args)
    assert re.search(pattern, the_error(code, err)) and out == ""
    assert snapshot(bad_files.parent) == before and not (bad_files / "runs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_ctrl_c_while_it_imports():
    """It ends without a traceback. From then on, Ctrl-C is the program's."""
    process = subprocess.Popen([sys.executable, "main.py", "--list"], cwd=REPO, stderr=subprocess.PIPE)
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


def test_bad_input_as_a_user_sees_it(program, bad_files):
    """The same in separate processes: only the plan and one line on stderr, and exit code 2."""
    cases = [
        ("demo", *BAD_CONFIG["unknown sae_type"][0][1:]),
        ("demo", *TINY, f"dataset_path={bad_files}/broken.jsonl"),
        ("demo", *TINY, f"dataset_path={bad_files}/short.jsonl"),
    ]
    patterns = ["sae_type = 'topkk'", "broken.jsonl", "short.jsonl' is too short"]
    for args, pattern in zip(cases, patterns):
        process = run_main(program, *args, f"output_dir={bad_files / 'runs'}")
        assert re.search(pattern, the_error(process.returncode, process.stderr))
        assert "Traceback" not in process.stderr and process.stdout == ""
    assert not (bad_files / "runs").exists()


def test_without_a_network_it_points_to_the_demo(program, tmp_path):
    """`python main.py` without a network ends with one or two lines that suggest alternatives; no files are left."""
    done = run_main(program, f"output_dir={tmp_path / 'runs'}")
    assert done.returncode == 2
    assert 1 <= len(done.stderr.splitlines()) <= 2
    for text in ("error: ", "gpt2", "python main.py demo", "model_name", "dataset_path"):
        assert text in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.fast
def test_without_a_network_the_dataset_is_named(main_here, tmp_path):
    """A local model with a hub dataset and no network: one line with the dataset and alternatives."""
    code, out, err = main_here("demo", *TINY, "dataset_path=Skylion007/openwebtext", f"output_dir={tmp_path / 'runs'}")
    error = the_error(code, err)
    assert "Skylion007/openwebtext" in error and "dataset_path" in error and "main.py demo" in error
    assert not (tmp_path / "runs").exists()


def test_a_machine_that_is_too_small(main_here, tmp_path):
    """A sweep far beyond the machine is refused, with an estimate, before anything starts."""
    code, out, err = main_here("demo", "num_tokens=1e15", f"output_dir={tmp_path / 'runs'}")
    error = the_error(code, err)
    assert "too small" in error and "days" in error and "main.py demo" in error
    assert "1,000,000,000,000,000 tokens" in err and not (tmp_path / "runs").exists()


def test_folders_that_cannot_be_used(main_here, tmp_path, monkeypatch):
    """Refused before the language model is loaded: a file as output_dir, and a run that another process trains."""
    import main
    from checkpoint import run_folder

    monkeypatch.setattr("language_model.load_model", None)
    (tmp_path / "file").touch()
    code, _, err = main_here("demo", *TINY, f"output_dir={tmp_path / 'file' / 'runs'}")
    assert "output_dir = " in the_error(code, err) and "cannot be written to" in err
    args = [*TINY, f"output_dir={tmp_path / 'runs'}"]
    folder = run_folder(main.sweep_configs("demo", dict(map(main.parse_override, args)))[3])
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        code, _, err = main_here("demo", *args)
    assert the_error(code, err) == f"error: {folder} is being trained by another process"


def test_runs_that_nan_has_stopped(program, tmp_path):
    """Exit code 2 when it happens, and each time the sweep is started again: not everything is done."""
    args = ["demo", *TINY, "sae_type=vanilla", "l1_coeff=0", "lr=1e30", f"output_dir={tmp_path / 'runs'}"]
    first, again = run_main(program, *args), run_main(program, *args)
    assert first.returncode == again.returncode == 2
    assert first.stderr.splitlines()[-1].startswith("error: 3 of 3 SAEs were stopped")
    assert "was stopped (step 2: NaN or infinity in " in again.stderr
    assert again.stderr.splitlines()[-1] == "error: 3 of 3 runs were stopped (see above)"
