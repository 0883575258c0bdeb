"""Training a group of SAEs with several processes (ranks): torchrun --nproc-per-node N main.py …

Each SAE is on one rank, which trains, evaluates and records it. Every rank sees every batch.
What the ranks exchange, and when:

    tokens        rank 0 reads the text. Per round, it sends every rank the contexts of up to N forward passes.
    activations   rank i runs the i-th of these forward passes and sends its activations to all others. The forward
                  passes, and the order of their activations, are those of a single process. The next buffer is
                  exchanged while the ranks train on this one.
    flags         after each step: whether to stop, whether to save a checkpoint, whether SAEs are left
    records       metrics for the progress bar, the table of an evaluation, and results go to rank 0
    checkpoints   every rank writes its SAEs; rank 0 writes the manifest when all have verified theirs

Nothing else is exchanged: no gradient and no weight. So an SAE's arithmetic does not depend on the number of ranks, and
its bits are the same for any number. A checkpoint can be resumed with another number. An SAE that is too large for one
device is split over several ranks, which exchange more: shards.py.

The first rank that fails prints its line and exits. The others then lose their connection to it, and exit without a
line (RankLost). torchrun ends those that do not. All resume from the last checkpoint.

Without torchrun there is one rank, and nothing is exchanged.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

import console
from console import InputError, one_line, out_of_memory

# A rank that is silent for longer is lost. The evaluation of another rank may take hours on a CPU.
TIMEOUT = timedelta(hours=6)

activation_group = None  # all ranks; for activations, so that what is exchanged after a step does not wait for them


class RankLost(RuntimeError):
    """Another rank has ended or does not respond. The same command resumes from the last checkpoint."""

    exit_code = 3


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started. On a machine with GPUs, a rank uses that of its local number.

    Raises InputError if torch's build does not allow it.
    """
    global activation_group
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    backend, local_rank = "gloo", int(os.environ["LOCAL_RANK"])
    if not dist.is_gloo_available():
        raise InputError("torchrun needs a build of torch with gloo")
    if local_rank < torch.cuda.device_count():
        if not dist.is_nccl_available():
            raise InputError("torchrun on GPUs needs a build of torch with NCCL")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    with connection():
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        activation_group = dist.new_group(timeout=TIMEOUT)
    try:
        yield
    except BaseException:
        # Only the first rank that fails prints its line: most others fail because it has.
        with suppress(RuntimeError):
            console.another_rank_prints = store.add("failed", 1) > 1
        raise
    dist.destroy_process_group()


def check_device(device: str) -> None:
    """Raises InputError if a config's device cannot be that of every rank."""
    if size() == 1:
        return
    if device not in ("cuda", "cpu"):
        raise InputError(
            f"device = {device!r} is not allowed: under torchrun it must be cuda, one GPU per rank, or cpu"
        )
    if device == "cuda":
        if local_size() > torch.cuda.device_count():
            raise InputError(
                f"--nproc-per-node {local_size()} is not allowed: this machine has {torch.cuda.device_count()} GPUs"
            )
        # NCCL allocates its memory now, before free memory is measured.
        start_broadcast(torch.zeros(1, device=device), 0)()


@contextmanager
def connection() -> Iterator[None]:
    """Turns torch's errors in a collective into RankLost."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise RankLost(f"another rank has ended or does not respond ({one_line(error)})") from error


def size() -> int:
    """The number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def local_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


def from_rank_0(function: Callable):
    """The result of function() on rank 0, on every rank. If it raises an error that the program reports in one line,
    every rank raises it, with the attribute is_from_rank_0.
    """
    if size() == 1:
        return function()
    result = error = None
    if rank() == 0:
        try:
            result = function()
        except (Exception, KeyboardInterrupt) as raised:
            if not is_expected(raised):
                raise
            error = raised
    with connection():
        dist.broadcast_object_list(message := [result, error])
    result, error = message
    if error is not None:
        error.is_from_rank_0 = True
        raise error
    return result


def gather(value, group=None) -> list:
    """The value of each rank of a group (default: all), on every one of them."""
    if size() == 1:
        return [value]
    values = [None] * dist.get_world_size(group)
    with connection():
        dist.all_gather_object(values, value, group)
    return values


def gather_lists(values: list) -> list:
    """The lists of all ranks, joined."""
    return list(chain.from_iterable(gather(values)))


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    if size() == 1:
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32)
    with connection():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.bool().tolist()


def on_all(function: Callable, group=None) -> None:
    """Call function() on every rank of a group. If it raises an error that is_expected on some, all raise the first."""
    error = None
    try:
        function()
    except Exception as raised:
        if size() == 1 or not is_expected(raised):
            raise
        error = raised
    for raised in gather(error, group):
        if raised is not None:
            raise raised


def is_expected(error: BaseException) -> bool:
    """Whether the program reports an error in one line."""
    return hasattr(error, "exit_code") or isinstance(error, OSError | KeyboardInterrupt)


def start_broadcast(rows: torch.Tensor, source: int) -> Callable[[], None]:
    """Start to replace `rows`, of the same shape on every rank, by those of rank `source`. Returns a function that
    waits for the end. Until then, they must not be used.
    """
    if size() == 1:
        return lambda: None
    with connection():
        work = dist.broadcast(rows.view(torch.uint8), source, activation_group, async_op=True)

    def wait():
        with connection():
            work.wait()

    return wait


def check_ranks(made_with: dict, folder: Path) -> None:
    """Raises InputError if ranks differ in their code or in what determines results (`made_with`, logs.provenance), or
    if `folder` cannot be written to or is not on a disk that they share.
    """
    if size() == 1:
        return
    of_ranks = gather(made_with | made_with["versions"] | {"versions": None, "code": code_fingerprint()})
    for i, values in enumerate(of_ranks):
        differs = [f"{k} is {v!r}, not {of_ranks[0].get(k)!r}" for k, v in values.items() if v != of_ranks[0].get(k)]
        if differs:
            raise InputError(f"rank {i} differs from rank 0: {'; '.join(differs)}")
    mark = folder / f".ranks-{from_rank_0(lambda: secrets.token_hex(4))}"

    def write_mark():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise InputError(f"output_dir: {folder} cannot be written to: {error.strerror or error}") from error

    from_rank_0(write_mark)
    missing = [i for i, found in enumerate(gather(mark.exists())) if not found]
    if rank() == 0:
        mark.unlink()
    if missing:
        reason = f"rank {missing[0]} does not see {folder} as rank 0 does"
        raise InputError(f"output_dir must be on a disk that all ranks share: {reason}")


def code_fingerprint() -> str:
    """SHA-256 of the program's modules."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()
