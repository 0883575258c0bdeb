"""What results.py, which needs no torch, shares with the other modules."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Keys that saved configs hold beside those of config.get_default_cfg. language_model.complete_cfg adds `asked`, the
# requested values of keys that the model changes (the run's name follows from these), and has_bos = False.
RECORDED = ("_provenance", "asked", "has_bos")
MIN_L0 = 0.1  # a mean L0 below this means that the features died


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
