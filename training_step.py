"""A training step: forward, backward, clip and project the gradient, Adam, normalise W_dec.

On CUDA, steps are recorded as CUDA graphs. On a CPU, a step of a small SAE runs on one core, because more would hardly
help, and the small SAEs of a group take their steps side by side. So its results do not depend on the number of cores.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

import sparse_ops
from config import num_steps
from logs import RunLog
from sae import BaseAutoencoder, Counts, TopKSAE

SMALL = 2**27  # a small SAE has at most so many multiplications in a dense product: batch_size · d · F


@dataclass
class Run:
    """An SAE in training."""

    cfg: dict
    sae: BaseAutoencoder
    optimizer: torch.optim.Optimizer
    log: RunLog | None  # None if another shard of the SAE keeps the record

    def __post_init__(self):
        self.graphs = StepGraphs(self.sae, self.optimizer, self.cfg)


def make_optimizer(sae: BaseAutoencoder, cfg: dict) -> torch.optim.Optimizer:
    """Adam, for training_step only: instead of W_enc it holds the transpose, a parameter of its own in the same memory,
    because fused Adam copies other layouts. share_gradients passes the gradient on; without it, step() raises
    RuntimeError.
    """
    parameters = [p if p.is_contiguous() else torch.nn.Parameter(p.detach().T) for p in sae.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=True)
    if sparse_ops.uses_triton(sae.W_enc):
        import triton_ops

        # Allocated in the first step, between its intermediate results, they would fragment the memory.
        optimizer.state |= {p: triton_ops.adam_state(p) for p in parameters if p.ndim == 2}

    def check(*_):
        if any(p.grad is not None and held.grad is None for p, held in zip(sae.parameters(), parameters)):
            raise RuntimeError("use torch.optim.Adam(sae.parameters()): make_optimizer is for training_step only")

    optimizer.register_step_pre_hook(check)
    return optimizer


def learning_rate(cfg: dict, step: int) -> float:
    """The learning rate in a step, counted from 1. It depends on the step alone, so it needs no state.

    lr · min(1, step / lr_warmup_steps, (last step + 1 − step) / lr_decay_steps). Both ramps reach 0 one step outside of
    training, so the rate is never 0.
    """
    warmup, decay, left = cfg["lr_warmup_steps"], cfg["lr_decay_steps"], num_steps(cfg) + 1 - step
    return cfg["lr"] * min(1, step / warmup if warmup else 1, max(left, 0) / decay if decay else 1)


def training_step(sae: BaseAutoencoder, optimizer, x: torch.Tensor, cfg: dict) -> dict:
    """One step on activations x [batch_size, d]; returns the forward's output, without sae_out. Decoder rows stay unit
    vectors.

    The learning rate is the optimizer's; a schedule must set it before each step (learning_rate).
    Raises FloatingPointError, with nothing changed, if loss or gradient is NaN or infinite.
    """
    with torch.no_grad():
        x = sae.preprocess_input(x.reshape(-1, x.shape[-1]))[0]
    output = launch_step(sae, optimizer, x, cfg)
    if read_failures([sae], [output])[0]:
        del output  # frees memory for the repeated step
        output = launch_step(sae, optimizer, x, cfg, wait=True)
    return output


def launch_step(sae: BaseAutoencoder, optimizer, x: torch.Tensor, cfg: dict, wait: bool = False) -> dict:
    """One step on normalised inputs x: compute_gradients, then apply_update.

    On CUDA this only launches kernels, unless `wait` is set. The output then has the `status` [3]: the failure, and the
    Counts for the next step. If the failure is not 0, nothing has changed, and the step must be repeated with wait=True
    (read_failures).
    """
    with one_core_if_small(cfg):
        output = compute_gradients(sae, optimizer, x, cfg, wait)
        apply_update(sae, optimizer, cfg, output)
    if wait and "status" in output and output.pop("status")[0]:
        raise FloatingPointError("NaN or infinity in the gradient")
    return output


@sparse_ops.sae_arithmetic
def compute_gradients(sae: BaseAutoencoder, optimizer, x: torch.Tensor, cfg: dict, wait: bool = False) -> dict:
    """Compute the gradients of a step, and return its output. With the kernels of triton_ops.py, also update the
    statistics, unless the step failed, and add to the output its `status`, and the `scales` for apply_update.
    """
    clear_gradients(sae, optimizer)  # of a step in which memory ran out
    output = sae.forward_normalised(x, wait)[0]
    output["loss"].backward()
    share_gradients(sae, optimizer)
    if sparse_ops.uses_triton(sae.W_enc) and sae.shards.count == 1:
        import triton_ops

        optimizer.is_updating = True
        if "failure" not in output:
            output["failure"] = torch.zeros((), dtype=torch.int64, device=sae.W_dec.device)
        output["scales"] = triton_ops.begin_adam(optimizer, cfg["max_grad_norm"], output["failure"])
        sae.update_statistics(output)
        output["status"] = torch.cat([output.pop("failure")[None], sae.counts_on_device()])
    return output


@sparse_ops.sae_arithmetic
def apply_update(sae: BaseAutoencoder, optimizer, cfg: dict, output: dict) -> None:
    """The rest of a step: update the weights, and the statistics if compute_gradients did not."""
    if "scales" in output:
        import triton_ops

        triton_ops.finish_adam(optimizer, sae.W_dec, output.pop("scales"))
    else:
        update_weights(sae, optimizer, cfg)
        sae.update_statistics(output)
    optimizer.is_updating = False  # until here the SAE is half updated and must not be saved
    clear_gradients(sae, optimizer)


def update_weights(sae: BaseAutoencoder, optimizer, cfg: dict) -> None:
    """Clip the gradient, remove its part parallel to the decoder rows, take Adam's step, normalise the rows."""
    norm = gradient_norm(sae)
    if not norm.isfinite():
        clear_gradients(sae, optimizer)
        raise FloatingPointError("NaN or infinity in the gradient")
    if norm + 1e-6 > cfg["max_grad_norm"]:  # otherwise torch, which adds 1e-6 too, multiplies by 1
        torch.nn.utils.clip_grads_with_norm_(sae.parameters(), cfg["max_grad_norm"], norm)
    optimizer.is_updating = True
    sae.make_decoder_weights_and_grad_unit_norm()
    optimizer.step()
    sae.normalize_decoder()


def gradient_norm(sae: BaseAutoencoder) -> torch.Tensor:
    """The norm [] of the gradient of all parameters, those on other shards included."""
    norms = {p: torch.linalg.vector_norm(p.grad) for p in sae.parameters() if p.grad is not None}
    if sae.shards.count == 1:
        return torch.linalg.vector_norm(torch.stack(list(norms.values())))
    of_b_dec = norms.pop(sae.b_dec)
    own = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return (sae.shards.sum(own**2) + of_b_dec**2).sqrt()


def share_gradients(sae: BaseAutoencoder, optimizer) -> None:
    """Give the optimizer the gradient of W_enc, whose transpose it holds (make_optimizer)."""
    for held, parameter in zip(optimizer.param_groups[0]["params"], sae.parameters()):
        if held is not parameter:
            held.grad = parameter.grad.T


def clear_gradients(sae: BaseAutoencoder, optimizer) -> None:
    for parameter in (*sae.parameters(), *optimizer.param_groups[0]["params"]):
        parameter.grad = None


def read_failures(saes: list, outputs: list[dict | FloatingPointError]) -> list[bool]:
    """Which steps must be repeated with wait=True. Also reads the counts for the next step (BaseAutoencoder.counts)."""
    queued = [i for i, output in enumerate(outputs) if isinstance(output, dict) and "status" in output]
    failed = [False] * len(outputs)
    for i in queued:
        failure, *counts = outputs[i].pop("status").tolist()
        failed[i], saes[i].known_counts = failure != 0, Counts(*counts)
    return failed


def group_step(runs: list[Run], x: torch.Tensor, outputs: list, ahead: dict) -> None:
    """A training step of each run on the same batch. Appends one entry per run to `outputs`: the scalars of its output,
    the FloatingPointError that stopped it, or None if memory ran out before it took the step.

    ahead: the numbers of runs that had already taken this step when memory ran out before the last checkpoint
    (training.save_if_memory_runs_out). These runs are skipped, and their numbers are moved to `outputs`.

    On CUDA the host waits for the device once, after it has queued the steps of all runs, and no longer than until the
    gradients are known: the next steps are queued while the weights are still being updated.
    """

    def attempt(i, wait=False):
        try:
            outputs[i] = runs[i].graphs.launch_step(inputs[i], wait)
        except FloatingPointError as error:
            outputs[i] = error

    inputs = normalised([run.sae for run in runs], x)
    outputs += [as_output(ahead.pop(run.cfg["name"])) if run.cfg["name"] in ahead else None for run in runs]
    waiting = [i for i, output in enumerate(outputs) if output is None]
    small = [i for i in waiting if is_small(runs[i].cfg)]
    if len(small) > 1:
        with sparse_ops.full_precision():  # a setting of the process: the steps may not restore it one by one
            steps = [one_core_each(torch.get_num_threads()).submit(attempt, i) for i in small]
            wait(steps)
        for step in steps:
            step.result()  # raises its error
    for i in waiting:
        if outputs[i] is None:
            attempt(i)
    failed = [i for i, failure in enumerate(read_failures([run.sae for run in runs], outputs)) if failure]
    for i in failed:
        outputs[i] = None  # if memory runs out now, these runs have not taken the step
    for i in failed:
        attempt(i, wait=True)


@torch.no_grad()
def normalised(saes: list[BaseAutoencoder], x: torch.Tensor) -> list[torch.Tensor]:
    """The normalised input [batch_size, d] of each SAE, computed once for all that share it. On CUDA it is in scratch
    memory, because CUDA graphs read it from a fixed address.
    """
    inputs, found = [], {}
    for sae in saes:
        key = "batch" if sae.cfg["input_unit_norm"] else "unnormalised batch", sae.W_enc.dtype, sae.W_enc.device
        if key not in found:
            name, dtype, device = key
            out = sparse_ops.scratch(name, x.shape, dtype, device) if sae.W_enc.is_cuda else None
            found[key] = sae.preprocess_input(x, out)[0]
        inputs.append(found[key])
    return inputs


def scalars(output: dict) -> dict:
    """The scalars of a step's output, and its status, still on the device. The rest would keep [B, F] of every SAE in
    memory.
    """
    return {key: value.detach() for key, value in output.items() if value.ndim == 0 or key == "status"}


def as_output(numbers: dict) -> dict:
    """Numbers from a checkpoint in the form that scalars() gives them."""
    return {
        key: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        for key, value in numbers.items()
    }


def is_small(cfg: dict) -> bool:
    """Whether the steps of an SAE run on one core."""
    size = cfg["batch_size"] * cfg["act_size"] * cfg["dict_size"]
    return cfg["device"] == "cpu" and cfg["feature_shards"] == 1 and size <= SMALL


@lru_cache
def one_core_each(size: int) -> ThreadPoolExecutor:
    """A pool of threads in each of which torch uses one core."""
    ready = threading.Barrier(size + 1)

    def start():
        torch.get_num_threads()  # initialises torch's setting for this thread, which would otherwise happen later
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(size)
    for _ in range(size):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(size)  # the setting of this thread, and of all that start later
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_core_each.cache_clear)  # a fork has none of the threads


@contextmanager
def one_core_if_small(cfg: dict) -> Iterator[None]:
    """Context manager in which torch uses one core if the SAE is small."""
    before = torch.get_num_threads()
    change = before > 1 and is_small(cfg)
    if change:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if change:
            torch.set_num_threads(before)


def graph_key(sae: BaseAutoencoder, batch_size: int) -> tuple:
    """All that determines the operations and array sizes of a step on CUDA: whether it may be sparse, the room for dead
    features, and the room for candidates. Sets known_counts, which cannot be read while a CUDA graph is recorded.
    """
    until_sparse, most_dead = sae.known_counts = sae.counts()
    dead = sparse_ops.room_for(most_dead, sae.cfg["dict_size"]) if sae.aux_loss_on_dead_features else 0
    k = sae.cfg["top_k"] if isinstance(sae, TopKSAE) else None
    return until_sparse == 0, dead, sparse_ops.candidate_capacity(batch_size, len(sae.W_dec), k)


class StepGraphs:
    """The training steps of a run. On CUDA they are recorded as CUDA graphs, because launching some 150 kernels takes
    the host several times as long as the device needs to run them.

    A graph repeats fixed operations on fixed memory. So each graph_key has two graphs, of compute_gradients and of
    apply_update. Between them the status is copied to the host, which reads it while the weights are updated. The first
    step with a key runs eagerly, the second is recorded.
    """

    # By device: the memory pool for the intermediate results of all graphs, and these graphs. The pool holds the
    # gradients between the two graphs of a step, so no other graph may run between them.
    pools = {}
    streams = {}  # device: stream; autograd requires that a step is recorded on the stream on which it ran before

    def __init__(self, sae: BaseAutoencoder, optimizer: torch.optim.Optimizer, cfg: dict):
        self.sae, self.optimizer, self.cfg = sae, optimizer, cfg
        self.seen, self.recorded = {}, {}  # by key: the output of its first step; its graphs and their output
        self.rate, self.lr = None, None  # the learning rate that is in lr []; the graphs read it

    def launch_step(self, x: torch.Tensor, wait: bool = False) -> dict:
        """scalars(launch_step(…)). On CUDA, inputs x of the same shape must be at the same address."""
        sae, optimizer, cfg = self.sae, self.optimizer, self.cfg
        if not sae.W_enc.is_cuda or sae.shards.count > 1:
            return scalars(launch_step(sae, optimizer, x, cfg, wait))
        if x.device not in self.streams:
            self.streams[x.device] = torch.cuda.Stream(x.device)
        stream = self.streams[x.device]
        key = (x.data_ptr(), x.shape, graph_key(sae, len(x)))
        if wait or key not in self.seen or not sparse_ops.uses_triton(sae.W_enc):
            stream.wait_stream(torch.cuda.current_stream(x.device))
            try:
                with torch.cuda.stream(stream):
                    output = scalars(launch_step(sae, optimizer, x, cfg, wait))
            finally:
                torch.cuda.current_stream(x.device).wait_stream(stream)
            if not wait:
                self.seen[key] = output
            return dict(output)
        if key not in self.recorded:
            self.recorded[key] = self.record(x, stream, self.seen[key])
        begin, finish, output, status = self.recorded[key]
        rate = optimizer.param_groups[0]["lr"]
        if rate != self.rate:
            self.rate = rate
            self.lr.fill_(rate)
        optimizer.is_updating = True
        begin.replay()
        status.copy(output["status"])
        finish.replay()  # reads what begin has left in the shared memory
        optimizer.is_updating = False
        return output | {"status": status}

    def record(self, x, stream: torch.cuda.Stream, like: dict) -> tuple:
        """Returns the graphs, the scalars that they write, allocated like `like`, and a HostCopy for their status.

        The scalars are outside of the shared pool, whose memory is overwritten by the next graph that runs.
        """
        sae, group = self.sae, self.optimizer.param_groups[0]
        begin, finish, rate = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), group["lr"]
        self.lr = x.new_zeros(()) if self.lr is None else self.lr
        output = {key: torch.empty_like(value) for key, value in like.items()}
        pool, graphs = self.pools.get(x.device, (None, ()))
        if not graphs:  # torch may refuse a pool whose graphs are all gone
            pool, graphs = self.pools[x.device] = torch.cuda.graph_pool_handle(), weakref.WeakSet()
        torch.cuda.empty_cache()  # torch cannot free cached memory while it records
        group["lr"] = self.lr
        try:
            with torch.cuda.device(x.device), torch.cuda.graph(begin, pool, stream, "thread_local"):
                full = compute_gradients(sae, self.optimizer, x, self.cfg)
                written = scalars(full)
                for dtype in {value.dtype for value in output.values()}:  # one kernel for all of a type
                    keys = [key for key, value in output.items() if value.dtype == dtype]
                    torch._foreach_copy_([output[key] for key in keys], [written[key] for key in keys])
            with torch.cuda.device(x.device), torch.cuda.graph(finish, pool, stream, "thread_local"):
                apply_update(sae, self.optimizer, self.cfg, full)
        except RuntimeError as error:
            del self.pools[x.device]  # the pool is unusable after a failure
            raise (error.__context__ or error) from None  # the error of ending the graph hides the cause
        finally:
            group["lr"], self.optimizer.is_updating = rate, False  # recording changes nothing
        graphs |= {begin, finish}
        return begin, finish, output, HostCopy(output["status"])


class HostCopy:
    """A copy of a device tensor on the host, which can be read while the device works on what was queued after it."""

    def __init__(self, like: torch.Tensor):
        self.values, self.written = torch.empty_like(like, device="cpu", pin_memory=True), torch.cuda.Event()

    def copy(self, tensor: torch.Tensor) -> None:
        self.values.copy_(tensor, non_blocking=True)
        self.written.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list:
        self.written.synchronize()
        return self.values.tolist()
