"""What all commands share: messages, one-line errors, exit codes, and tables. Imports no torch, so results.py starts
fast.
"""

import errno
import functools
import os
import re
import select
import sys
import warnings

from tqdm import tqdm

RANK = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # of this process, under torchrun
another_rank_prints = RANK > 0  # so that an error that ends all ranks is printed once (distributed.process_group)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # control characters


class InputError(ValueError):
    """Invalid user input. The message is one line: what is wrong, the value, what is allowed."""

    exit_code = 2


def tell(line: str, any_rank: bool = False) -> None:
    """Print text to stderr, above any progress bar. Under torchrun, only rank 0 does, or with `any_rank` any rank."""
    if RANK == 0 or any_rank:
        tqdm.write(printable(line), file=sys.stderr)


tell_once = functools.cache(tell)  # prints a message that is the same for all runs of a sweep once


def shown_live() -> bool:
    """Whether stderr is shown as it is written: in a terminal or a notebook, not in a log file."""
    return getattr(sys.stderr, "isatty", lambda: False)() or "ipykernel" in sys.modules


def printable(text: str) -> str:
    """Escape control characters except newlines: a message may contain text from a file, such as a name."""
    return CONTROL.sub(lambda match: match[0] if match[0] == "\n" else repr(match[0])[1:-1], text)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory. For the machine's memory, torch raises a plain RuntimeError.
    torch.OutOfMemoryError is recognised by its name, because this module does not import torch.
    """
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def run_command(main, interrupted: str = "Stopped") -> None:
    """Call main with the command-line arguments; turn these errors into one line on stderr and an exit code:

    an error with an `exit_code`: its message and that code; out of memory or a full disk: 3; another file that cannot
    be read or written: 2; Ctrl-C: the line `interrupted` and 4; stdout or stderr closed by its reader, as in
    `... | head`: no line, and 141 (128 + SIGPIPE).
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n" if RANK == 0 else ""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        if not another_rank_prints:
            print(interrupted, file=sys.stderr)
        sys.exit(4)
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if has_no_reader(stream)]
        if not closed:
            raise  # another pipe or connection
        for stream in closed:  # Python flushes them again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)
    except Exception as error:
        if out_of_memory(error):
            line, code = f"out of memory: {one_line(error)}", 3
        elif hasattr(error, "exit_code"):
            line, code = str(error), error.exit_code
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            line, code = one_line(error), 3
        elif isinstance(error, OSError) and error.filename is not None:
            line, code = f"{error.strerror}: {error.filename}", 2
        else:
            raise
        if not another_rank_prints:
            print(f"error: {printable(line)}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(code)


def one_line(error: Exception) -> str:
    """Another library's error message in one line, cut to a readable length."""
    line = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return line if len(line) <= 300 else line[:300] + " …"


def text_table(rows: list, right: bool = False) -> str:
    """Rows of strings as aligned text. `right` aligns all but the first column to the right. A row may lack its last
    cells.
    """
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    pad = str.rjust if right else str.ljust
    lines = ((row[0].ljust(widths[0]), *map(pad, row[1:], widths[1:])) for row in rows)
    return "\n".join("   ".join(line).rstrip() for line in lines)


def markdown_table(rows: list, right: bool = False) -> str:
    """Rows, the first of which is the head, as a Markdown table. `right` aligns columns to the right."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * (width - right) + ":" * right for width in widths], *rows[1:]]
    pad = str.rjust if right else str.ljust
    return "\n".join(f"| {' | '.join(map(pad, row, widths))} |" for row in rows)


def count_of(number: int, noun: str) -> str:
    """As in "1 SAE" and "2 SAEs"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def has_no_reader(stream) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
