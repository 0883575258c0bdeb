"""The commands and examples of README.md and docs/ run as a user runs them, their tables of keys are config.py's, and
their links lead somewhere.
"""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import REPO

import main
from config import KEYS, get_default_cfg

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted(REPO.glob("docs/*.md"))]
TEXT = {page.relative_to(REPO).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README, CONFIG = TEXT["README.md"], TEXT["docs/config.md"]
COMMANDS = re.findall(r"^python (\w+\.py[^#\n]*)", "\n".join(TEXT.values()), re.MULTILINE)
ALL_EXAMPLES = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's own files in a folder of their own, without anything that earlier runs left behind."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    left_out = shutil.ignore_patterns(".git", "runs", "wandb", "text.jsonl", "tests", ".venv*", "__pycache__")
    shutil.copytree(REPO, folder, ignore=left_out)
    return folder


def test_demo_command_then_examples(clone, program):
    """The main command, cut short, trains and draws; the Python examples and the other commands then run on what it
    left.
    """
    command = re.search(r"python (main\.py demo)$", README, re.MULTILINE).group(1)
    small = ["num_tokens=4096", "eval_tokens=1024", "dict_size=64", "top_k_aux=16", "l1_coeff=0"]
    done = subprocess.run([sys.executable, *command.split(), *small], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figure = re.search(r"Figure: (\S+)", done.stdout).group(1)
    assert (clone / figure).stat().st_size > 10_000

    examples = {name: ALL_EXAMPLES.findall(text) for name, text in TEXT.items() if "```python" in text}
    assert {name: len(found) for name, found in examples.items()} == {"README.md": 1, "docs/config.md": 3}
    (inference,), (training, loop, own_step) = examples["README.md"], examples["docs/config.md"]
    training = training.replace("100_000", "10_000").replace("8192", "4096")
    # The loop gives the SAE and the metrics of train_sae.
    loop += "\nassert {key: metrics[key] for key in ('nmse', 'l0')} == {key: result[key] for key in ('nmse', 'l0')}"
    loop += "\nassert load_sae('runs/mine/loop').W_enc.equal(load_sae(f\"runs/mine/{cfg['name']}\").W_enc)"
    # The example's own steps give the same SAE, up to the rounding of another kernel of Adam.
    own_step += "\nfor name, value in load_sae('runs/mine/loop').state_dict().items():"
    own_step += "\n    torch.testing.assert_close(sae.state_dict()[name], value, atol=1e-4, rtol=1e-4)"
    done = program.run("-c", f"{training}\n{loop}\n{own_step}", cwd=clone)
    assert done.returncode == 0, done.stderr
    nmse, l0, _ = map(float, done.stdout.split())
    assert 0 < nmse < 1 and 0 < l0 < 512

    (trained,) = (clone / "runs" / "mine").glob("batchtopk_*")
    checks = "\nassert reconstruction.shape == x.shape and len(features.shape) == 3 and (features >= 0).all()"
    checks += "\nassert ((x - reconstruction).norm(dim=-1) < x.norm(dim=-1))[:, 1:].all()"
    checks += "\nassert torch.equal(spliced_logits[:, 0], logits[:, 0]) and not torch.equal(spliced_logits, logits)"
    done = program.run("-c", inference.replace("runs/demo/RUN", f"runs/mine/{trained.name}") + checks, cwd=clone)
    assert done.returncode == 0, done.stderr

    # Every other command that needs no network, on that run; DIR and NAME stand for new folders.
    commands, names = [], {"runs/demo/RUN": str(trained), "runs/<sweep>/<run>": str(trained)}
    names |= {"demo": Path(figure).parent.name, "path/to/text": "demo/text.jsonl"}
    for command in COMMANDS:
        words = [names.get(word, word) for word in command.split()]
        if words[0] == "main.py" or "--upload" in words:
            continue
        form = next((word for before, word in zip(words, words[1:]) if before in ("--to", "--from")), "")
        commands.append([word.replace("DIR", f"out-{form}").replace("NAME", f"from-{form}") for word in words])
    commands.append(["evaluation.py", str(trained), "--eval-tokens", "0"])
    done = [program.run(*words, cwd=clone) for words in commands]
    # dictionary_learning's format has no input_unit_norm, which the example's SAE has: nothing to import either.
    for words, command in zip(commands, done):
        assert command.returncode == (2 if "dictionary_learning" in words or words[-1] == "0" else 0), command.stderr
    assert sum(words[0] == "export.py" for words in commands) == 7
    assert {"evaluation.py", "features.py", "results.py"} <= {words[0] for words in commands}
    assert (trained / "evaluation.json").is_file() and (trained / "features.html").is_file()
    evaluations = [command for words, command in zip(commands, done) if words[0] == "evaluation.py"]
    assert all("kl_divergence" in command.stdout for command in evaluations[:-1])
    assert done[-1].stderr.startswith("error: --eval-tokens 0 is not allowed")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("main.py")])
def test_other_commands_parse(command, capsys):
    """Every other command line of main.py names a sweep and keys that exist."""
    _, *words = command.split()
    main.main([*words, "--list"])
    assert len(capsys.readouterr().out.splitlines()) > 1


def rows_of_keys(text: str) -> dict:
    """{key: (default, meaning)} of the rows of a table of keys."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    return {key: (default, meaning) for key, default, meaning in rows}


@pytest.mark.fast
def test_table_of_keys_is_complete():
    """docs/config.md lists every key with its default and its doc from config.py, and the README some of these rows."""
    rows, keys = rows_of_keys(CONFIG), get_default_cfg()
    for key, default in keys.items():
        written, meaning = rows[key]
        assert meaning == KEYS[key].doc
        if key == "device":
            assert written == "best present"
        elif isinstance(default, str) or default is None:
            assert written == str(default)
        else:
            assert eval(written) == default
    assert set(rows) == set(keys)
    assert len(rows_of_keys(README)) >= 10 and rows_of_keys(README).items() <= rows.items()


def anchors(text: str) -> set:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    headings = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", TEXT)
def test_links_resolve(page):
    """Every relative link names a file of the repository and, after #, one of its headings."""
    for link in links(TEXT[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_readme_is_short_and_leads_to_all_pages():
    assert len(README.encode()) <= 12_000
    assert {page for page in TEXT if page != "README.md"} <= {link.partition("#")[0] for link in links(README)}


def test_file_map_is_complete():
    """Every module stands in the file map, in one line, and nothing else does that is not there."""
    section = README.partition("## File map\n")[2].partition("\n## ")[0]
    names = re.findall(r"^    (\S+)", section, re.MULTILINE)
    assert {name for name in names if name.endswith(".py")} == {path.name for path in REPO.glob("*.py")}
    assert len(names) == len(set(names)) and all((REPO / name).exists() for name in names)


def test_first_two_shell_blocks_are_the_demo_and_the_tests():
    """.ci/run takes them for its two commands."""
    blocks = re.findall(r"^```sh\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
    assert [block.partition(" && ")[2] for block in blocks] == ["python main.py demo", "python -m pytest"]


@pytest.mark.fast
@pytest.mark.parametrize("script", sorted(REPO.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_exists(script):
    """A name that has moved to another module would be noticed only when the benchmark is run."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (REPO / f"{node.module}.py").exists():
            module = importlib.import_module(node.module)
            assert not [name.name for name in node.names if not hasattr(module, name.name)]
