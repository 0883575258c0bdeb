"""What the user reads: harmless whatever names it holds, and without torch."""

import subprocess
import sys
from pathlib import Path

from console import tell


def test_messages_hold_no_control_characters(capsys):
    """What tell prints may hold a file's name: a control sequence in it never reaches the terminal."""
    tell("a\x1b[31m\nb\x9b")
    assert capsys.readouterr().err == "a\\x1b[31m\nb\\x9b\n"


def test_needs_no_torch():
    """console.py and config.py import no torch, and config.py no SAE."""
    code = "import sys, console, config; assert not {'torch', 'sae'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
