"""What the user reads: errors of one line, messages, exit codes. Without torch, so that results.py starts fast."""

import functools
import os
import re
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

RANK = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # of this process, under torchrun
another_rank_prints = RANK > 0  # the error with which all ranks end (distributed.process_group)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # control characters


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, the value, what is allowed."""

    exit_code = 2


def tell(line: str, any_rank: bool = False) -> None:
    """A line (or a table) for the user, above any progress bar. Under torchrun rank 0 prints it, or every rank."""
    if RANK == 0 or any_rank:
        tqdm.write(printable(line), file=sys.stderr)


tell_once = functools.cache(tell)  # for messages that concern all runs of a sweep


def printable(text: str) -> str:
    """Control characters but for the ends of lines escaped: a message may hold a file's text, such as a name."""
    return CONTROL.sub(lambda match: match[0] if match[0] == "\n" else repr(match[0])[1:-1], text)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a device's, which torch.OutOfMemoryError says (known by its name, without torch), or the
    machine's, where torch raises a plain RuntimeError.
    """
    of_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def run_command(main, interrupted: str = "Stopped") -> None:
    """main(arguments of the command line). An error with an exit_code, which is one line, ends the program with both;
    Ctrl-C with the line `interrupted` and code 4; memory that runs out with a line and code 3. See
    quiet_on_closed_pipe for a closed pipe.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n" if RANK == 0 else ""
    try:
        with quiet_on_closed_pipe():
            main(sys.argv[1:])
    except KeyboardInterrupt:
        if not another_rank_prints:
            print(interrupted, file=sys.stderr)
        sys.exit(4)
    except Exception as error:
        line, code = str(error), getattr(error, "exit_code", None)
        if out_of_memory(error):
            line, code = f"out of memory: {one_line(error)}", 3
        if code is None:
            raise
        if not another_rank_prints:
            print(f"error: {printable(line)}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(code)


def one_line(error: Exception) -> str:
    """The first line of an error of another library, cut to a readable length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else line[:200] + " …"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


@contextmanager
def quiet_on_closed_pipe() -> Iterator[None]:
    """Exit with code 141 (128 + SIGPIPE) and no traceback if the reader of stdout or stderr is gone: `... | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if has_no_reader(stream)]
        if not closed:
            raise  # another pipe or connection
        for stream in closed:  # Python flushes them again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)


def has_no_reader(stream) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
