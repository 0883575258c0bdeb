"""The README's commands and example run as a user runs them, and its table of keys is config.py's."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import evaluation
import main
from config import get_default_cfg, run_command

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's own files in a folder of their own, without anything that earlier runs left behind."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    left_out = shutil.ignore_patterns(".git", "runs", "wandb", "text.jsonl", "tests", ".venv*", "__pycache__")
    shutil.copytree(REPO, folder, ignore=left_out)
    return folder


def run(arguments, folder, **options):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, **options)


def test_demo_command_then_example(clone, monkeypatch, capsys):
    """The main command, cut short, trains and draws; the README's Python example then runs on what it left."""
    command = re.search(r"python (main\.py demo)$", README, re.MULTILINE).group(1)
    done = run([*command.split(), "num_tokens=4096", "eval_tokens=1024"], clone)
    assert done.returncode == 0, done.stderr
    figure = re.search(r"Figure: (\S+)", done.stdout).group(1)
    assert (clone / figure).stat().st_size > 10_000

    training, inference = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(["-c", training.replace("100_000", "20_000")], clone)
    assert done.returncode == 0, done.stderr
    nmse, l0, _ = map(float, done.stdout.split())
    assert 0 < nmse < 1 and 0 < l0 < 512

    (trained,) = (clone / "runs" / "mine").glob("batchtopk_*")
    checks = "\nassert reconstruction.shape == x.shape and len(features.shape) == 3 and (features >= 0).all()"
    checks += "\nassert ((x - reconstruction).norm(dim=-1) < x.norm(dim=-1))[:, 1:].all()"
    checks += "\nassert torch.equal(spliced_logits[:, 0], logits[:, 0]) and not torch.equal(spliced_logits, logits)"
    done = run(["-c", inference.replace("RUN", trained.name) + checks], clone)
    assert done.returncode == 0, done.stderr

    done = run(["evaluation.py", str(trained)], clone)
    assert done.returncode == 0 and "kl_divergence" in done.stdout and (trained / "evaluation.json").is_file()
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "argv", ["evaluation.py", str(trained), "--eval-tokens", "0"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as caught:
        run_command(evaluation.main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --eval-tokens 0 is not allowed")


@pytest.mark.parametrize("command", re.findall(r"^python (main\.py[^#\n]*)", README, re.MULTILINE))
def test_other_commands_are_understood(command, capsys):
    """Every other command line of the README names a sweep and keys that exist."""
    _, *words = command.split()
    main.main([*words, "--list"])
    assert len(capsys.readouterr().out.splitlines()) > 1


@pytest.mark.fast
def test_table_of_keys_is_complete():
    """Every config key stands in the README with its default and its comment in config.py, and no other key does."""
    source = (REPO / "config.py").read_text(encoding="utf-8")
    comments = dict(re.findall(r'^        "(\w+)": .*?,  # (.*)$', source, re.MULTILINE))
    section = re.search(r"^## Edit a config$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    table = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    rows = {key: (default, text) for key, default, text in table}
    keys = get_default_cfg()
    assert set(comments) == set(keys)
    for key, default in keys.items():
        written, meaning = rows[key]
        assert meaning == comments[key]
        if key == "device":
            assert written == "best present"
        elif isinstance(default, str) or default is None:
            assert written == str(default)
        else:
            assert eval(written) == default
    assert set(rows) == set(keys)
