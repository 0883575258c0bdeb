"""What the user reads: harmless whatever names it holds, and without torch."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import files
from console import InputError, count_of, markdown_table, one_line, run_command, tell, text_table
from files import read_json, write_json


def test_messages_hold_no_control_characters(capsys):
    """What tell prints may hold a file's name: a control sequence in it never reaches the terminal."""
    tell("a\x1b[31m\nb\x9b")
    assert capsys.readouterr().err == "a\\x1b[31m\nb\\x9b\n"


def test_needs_no_torch():
    """console.py and config.py import no torch, and config.py no SAE."""
    code = "import sys, console, config; assert not {'torch', 'sae'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff{}"])
def test_corrupt_json_is_one_line(tmp_path, content):
    """It names the file. No file is an empty dict."""
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    path.write_bytes(b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} is corrupt: .+$"):
        read_json(path)


def test_a_file_that_cannot_be_replaced(tmp_path, monkeypatch):
    """The old one stays, and nothing is left that fills the disk."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def no_space(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_read_or_written_is_one_line(tmp_path, monkeypatch, capsys):
    """Whatever the command was doing; another OSError is a fault of the program, and keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["command"])
    for path, reason in ((tmp_path / ("x" * 300), "File name too long"), (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit) as exit:
            run_command(lambda argv, path=path: path.write_text("a"))
        assert exit.value.code == 2 and capsys.readouterr().err == f"error: {reason}: {path}\n"
    with pytest.raises(SystemExit) as exit:  # always full
        run_command(lambda argv: Path("/dev/full").write_text("a"))
    assert exit.value.code == 3 and capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    with pytest.raises(OSError, match="of the program"):
        run_command(lambda argv: (_ for _ in ()).throw(OSError("of the program")))


def test_warnings_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # is restored
    run_command(lambda argv: None)
    assert warnings.formatwarning("too hot", UserWarning, "a.py", 3) == "warning: too hot\n"


@pytest.mark.parametrize(
    "message, line",
    [("", "ValueError"), ("one.", "one"), ("one\n  two\n", "one two"), ("x" * 400, "x" * 300 + " …")],
)
def test_errors_of_others_in_one_line(message, line):
    assert one_line(ValueError(message)) == line


def test_counts():
    assert [count_of(n, "SAE") for n in (0, 1, 2, 1200)] == ["0 SAEs", "1 SAE", "2 SAEs", "1,200 SAEs"]


def test_tables():
    rows = [("SAE", "L0", "NMSE"), ("a", "12.5", "1"), ("bcde", "3")]
    assert text_table(rows) == "SAE    L0     NMSE\na      12.5   1\nbcde   3"
    assert text_table(rows, right=True) == "SAE      L0   NMSE\na      12.5      1\nbcde      3"
    rows = [("SAE", "k"), ("abcd", "1")]
    assert markdown_table(rows) == "| SAE  | k   |\n| ---- | --- |\n| abcd | 1   |"
    assert markdown_table(rows, right=True) == "|  SAE |   k |\n| ---: | --: |\n| abcd |   1 |"
