"""The training loop: one shared stream of activations, any number of SAEs, and a state that can be gone on from."""

import signal
import threading
import time
import traceback
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from tqdm import tqdm

import sparse_ops
from checkpoint import Checkpoints, disk, remove_checkpoints, save_sae
from common import MIN_L0
from config import InputError, num_steps, out_of_memory, tell
from evaluation import evaluate, heldout_baseline
from hub import StreamError
from language_model import complete_cfg
from logs import RunLog, is_over, provenance
from sae import BaseAutoencoder, Counts

TOGETHER = 1.0  # seconds within which a second signal is the same wish: timeout(1) sends two, for one


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: training has stopped, and is saved."""


class NotFinite(InputError):
    """NaN or infinity stopped some SAEs of a group; the others are trained."""


@dataclass
class Run:
    """One SAE of a group."""

    cfg: dict
    sae: BaseAutoencoder
    optimizer: torch.optim.Optimizer
    log: RunLog

    def __post_init__(self):
        self.graphs = StepGraphs(self)


def train_sae(sae, activation_store, model, cfg: dict) -> dict:
    """Train one SAE: a group of one. Returns its final metrics on held-out tokens."""
    return train_sae_group([sae], activation_store, model, [cfg])[0]


def train_sae_group(saes: list, activation_store, model, cfgs: list[dict], resume_anyway: bool = False) -> list[dict]:
    """Train SAEs side by side on one stream: the language model runs once, and each sees the same batches.

    `cfgs` are completed configs that agree on config.GROUP_KEYS; each run has its own record and its own sae/
    folder in output_dir/sweep/name. No SAE of a group changes another. Where a checkpoint holds all these runs,
    training goes on from there, to the bit as if it had never stopped. Returns the final held-out metrics.

    Raises InputError if a run is over or in use, if its checkpoint was made with something else (versions, threads,
    device, model, data; unless resume_anyway), if the dataset ends before num_tokens or holds NaN, and, when the others
    are trained, if NaN or infinity stopped an SAE; StreamError if the network stays down, SaveError if the disk does,
    Stopped on Ctrl-C or SIGTERM; torch.OutOfMemoryError, MemoryError or torch's RuntimeError where memory runs out.
    What was trained is saved first.
    """
    cfgs = [complete_cfg(cfg, model) for cfg in cfgs]
    for sae, cfg in zip(saes, cfgs):
        sae.cfg = cfg
    cfg = cfgs[0]
    made_with = provenance(model, activation_store)
    with ExitStack() as stack:
        logs = [stack.enter_context(closing(RunLog(run_cfg, made_with))) for run_cfg in cfgs]
        runs = [Run(c, sae.train(), make_optimizer(sae, c), log) for c, sae, log in zip(cfgs, saes, logs)]
        checkpoints = Checkpoints(runs, made_with, resume_anyway)
        activation_store.load_state_dict(checkpoints.stream or activation_store.beginning)
        for run in runs:
            run.log.start(checkpoints.step, checkpoints.logged.get(run.cfg["name"], 0))
        baseline = heldout_baseline(activation_store)

        failed = train_steps(runs, activation_store, baseline, checkpoints)
        seconds = checkpoints.elapsed()

        num_tokens = activation_store.tokens_needed
        results = evaluate([run.sae for run in runs], activation_store, baseline) if runs else []
        with disk(cfg | {"save_errors": "stop"}, "the SAEs"):
            for run in runs:
                save_sae(run.sae, run.log.folder / "sae")
        for run, result in zip(runs, results):
            result |= {"tokens": num_tokens, "steps": num_tokens // cfg["batch_size"], "seconds": seconds}
            with disk(cfg | {"save_errors": "stop"}, f"{run.log.folder}"):
                run.log.finish(result)
        remove_checkpoints(cfg, lambda name: is_over(cfg | {"name": name}))
    if failed:
        raise NotFinite(f"{len(failed)} of {len(saes)} SAEs were stopped, and saved as they were: {'; '.join(failed)}")
    return results


def train_steps(runs: list[Run], activation_store, baseline: dict, checkpoints: Checkpoints) -> list[str]:
    """All steps after that of the checkpoint. Runs that NaN stops leave `runs`; a line for each comes back."""
    cfg = checkpoints.cfg
    last_step = activation_store.tokens_needed // cfg["batch_size"]
    eval_contexts = max(1, cfg["batch_size"] // activation_store.seq_len)
    failed, warned = [], set()
    bar = tqdm(
        total=last_step * cfg["batch_size"],
        initial=checkpoints.step * cfg["batch_size"],
        unit="tok",
        unit_scale=True,
        desc=f"training {len(runs)} SAEs",
        smoothing=0.05,
    )
    with bar, StopSignals() as signals, SaveWithoutMemory(runs, checkpoints, last_step) as memory:
        for step in range(checkpoints.step + 1, last_step + 1):
            position = activation_store.state_dict()
            outputs = memory.begin(step, position)
            for run in runs:
                run.optimizer.param_groups[0]["lr"] = learning_rate(run.cfg, step)
            try:
                x = signals.stop_at_once_in(activation_store.next_batch)
                group_step(runs, x, outputs, checkpoints.ahead)
                if any(isinstance(output, FloatingPointError) for output in outputs) and not x.isfinite().all():
                    raise InputError(f"step {step}: NaN or infinity in the activations of {cfg['model_name']}")
            except (InputError, StreamError, Stopped) as error:  # also: the data ended early, or the network is down
                checkpoints.save(step - 1, position)
                if isinstance(error, InputError) and step > 1:
                    with disk(cfg, "the SAEs"):
                        for run in runs:
                            save_sae(run.sae, run.log.folder / "sae")
                tell(f"Stopped after {step - 1} of {last_step} steps")
                raise
            for run, output in list(zip(runs, outputs)):
                if isinstance(output, FloatingPointError):  # raised before the weights are touched
                    runs.remove(run)
                    outputs.remove(output)
                    failed.append(f"{run.cfg['name']}: step {step}: {output}")
                    tell(failed[-1])
                    with disk(cfg, f"{run.log.folder}"):
                        save_sae(run.sae, run.log.folder / "sae")
                        run.log.stop(step, str(output))
            if not runs:
                break
            bar.update(len(x))

            # Records. Apart from group_step's failures, numbers leave the device only here.
            metrics = [{} for _ in runs]
            if step == 1 or step % cfg["log_freq"] == 0 or step == last_step:
                metrics = [{key: value.item() for key, value in output.items()} for output in outputs]
                bar.set_postfix_str(summary(metrics))
            if step % cfg["perf_log_freq"] == 0 and step < last_step:
                evaluated = evaluate([run.sae for run in runs], activation_store, baseline, eval_contexts)
                tell(progress_table(runs, outputs, evaluated, step * cfg["batch_size"]))
                for values, more in zip(metrics, evaluated):
                    values |= more
            memory.position = None  # what follows only writes
            for run, values in zip(runs, metrics):
                if values.get("l0_norm", MIN_L0) < MIN_L0 and run.cfg["name"] not in warned:
                    warned.add(run.cfg["name"])
                    where = f"{run.cfg['name']}: L0 has fallen to {values['l0_norm']:.2g} after step {step}"
                    tell(f"warning: {where}, so hardly any feature is active: lr or l1_coeff may be too high")
                if values:
                    with disk(cfg, f"{run.log.folder}/metrics.jsonl"):
                        run.log.log(step, step * cfg["batch_size"], values)
            if signals.asked or step == last_step or checkpoints.due(step):
                checkpoints.save(step, activation_store.state_dict())
            if signals.asked:
                tell(f"Stopped after {step} of {last_step} steps")
                raise Stopped
    return failed


class SaveWithoutMemory:
    """Saves what was trained where memory runs out in a step. Some SAEs may have taken this step and others not, so the
    checkpoint is that of the step before, and says which SAEs are ahead of it, with the numbers of their outputs.
    """

    def __init__(self, runs: list[Run], checkpoints: Checkpoints, last_step: int):
        self.runs, self.checkpoints, self.last_step, self.position = runs, checkpoints, last_step, None

    def __enter__(self):
        return self

    def begin(self, step: int, position: dict) -> list[dict]:
        """A step begins, with the stream at `position`. Returns the list for the outputs of the SAEs that take it."""
        self.step, self.position, self.outputs = step, position, []
        return self.outputs

    def __exit__(self, kind, error, frames):
        if error is None or self.position is None or not out_of_memory(error):
            return
        traceback.clear_frames(frames)  # they hold what took the memory
        if half_updated := [run.cfg["name"] for run in self.runs if getattr(run.optimizer, "is_updating", False)]:
            tell(f"Out of memory while the weights of {half_updated[0]} were changed: the last checkpoint is kept")
            return
        failed = read_failures([run.sae for run in self.runs], self.outputs)
        ahead = {
            run.cfg["name"]: {key: value.item() for key, value in output.items()}
            for run, output, again in zip(self.runs, self.outputs, failed)
            if not again and isinstance(output, dict)
        }
        self.checkpoints.save(self.step - 1, self.position, ahead)
        tell(f"Out of memory: stopped after {self.step - 1} of {self.last_step} steps")


def as_output(numbers: dict) -> dict:
    """The numbers that a checkpoint has of an output, as scalars() gives them."""
    return {
        key: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        for key, value in numbers.items()
    }


class StopSignals:
    """SIGINT and SIGTERM as a wish to stop: at once where no SAE is being changed, else after the step."""

    def __enter__(self):
        self.asked = self.at_once = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, *_):
        if self.asked and time.monotonic() - self.asked_at > TOGETHER:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self.asked_at = True, time.monotonic()
        tell("Stopping: a checkpoint is saved first (the same again stops at once, without)")
        if self.at_once:
            raise Stopped

    def stop_at_once_in(self, function):
        """The function's value, or Stopped out of its midst."""
        self.at_once = True
        try:
            if self.asked:
                raise Stopped
            return function()
        finally:
            self.at_once = False


def make_optimizer(sae, cfg: dict) -> torch.optim.Optimizer:
    """Adam, for training_step. It holds W_enc by its transpose (same memory): fused Adam copies all else."""
    parameters = [p if p.is_contiguous() else torch.nn.Parameter(p.detach().T) for p in sae.parameters()]
    return torch.optim.Adam(parameters, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=True)


def learning_rate(cfg: dict, step: int) -> float:
    """Adam's rate in a step, counted from 1. It follows from the step alone, so there is no state to lose.

    lr · min(1, step / lr_warmup_steps, (last step + 1 − step) / lr_decay_steps): the lines begin and end at 0 one step
    outside of training, so that no step is for nothing.
    """
    warmup, decay, left = cfg["lr_warmup_steps"], cfg["lr_decay_steps"], num_steps(cfg) + 1 - step
    return cfg["lr"] * min(1, step / warmup if warmup else 1, max(left, 0) / decay if decay else 1)


def training_step(sae, optimizer, x: torch.Tensor, cfg: dict) -> dict:
    """One step on activations x [batch_size, d]; returns the forward's output. Decoder rows end as unit vectors.
    The learning rate is the optimizer's: learning_rate gives it where cfg has it change over the steps.

    Raises FloatingPointError, with nothing changed, if loss or gradient is NaN or infinite.
    """
    output = start_step(sae, optimizer, x, cfg)
    if read_failures([sae], [output])[0]:
        del output  # the repetition may need its memory
        output = start_step(sae, optimizer, x, cfg, wait=True)
    return output


def group_step(runs: list[Run], x: torch.Tensor, outputs: list, ahead: dict) -> None:
    """A training step of each run on the same batch. As each is done, the scalars of its output, or the
    FloatingPointError that stopped it, are added to `outputs`. Runs in `ahead` took this step before memory ran out;
    their numbers are taken from there, and removed.

    On CUDA the host waits for the device once, when the steps of all runs are queued.
    """

    def attempt(run, wait=False):
        try:
            return run.graphs.start_step(x, wait)
        except FloatingPointError as error:
            return error

    device = runs[0].sae.W_enc.device
    if device.type == "cuda":  # at one place, where CUDA graphs read it
        x = sparse_ops.scratch("batch", x.shape, x.dtype, device).copy_(x)

    for run in runs:
        name = run.cfg["name"]
        outputs.append(as_output(ahead.pop(name)) if name in ahead else attempt(run))
    failed = [i for i, failure in enumerate(read_failures([run.sae for run in runs], outputs)) if failure]
    for i in failed:
        outputs[i] = None  # these have not taken the step, should memory run out now
    for i in failed:
        outputs[i] = attempt(runs[i], wait=True)


class StepGraphs:
    """The steps of a run, on CUDA as CUDA graphs: one launch in place of some 150, which take longer than the device's
    work.

    A graph repeats fixed operations on fixed memory, so each form of a step (form_of_step) has its own. The first step
    of a form runs as it is, the second is recorded.
    """

    memory = None  # what all graphs use for their intermediate results: no two run at the same time
    streams = {}  # one per device: autograd wants a step recorded on the stream on which it ran before

    def __init__(self, run: Run):
        self.run, self.seen, self.recorded = run, {}, {}

    def start_step(self, x: torch.Tensor, wait: bool = False) -> dict:
        """scalars(start_step(…)) of a batch x; on CUDA, batches of the same shape must be at the same address."""
        sae, optimizer, cfg = self.run.sae, self.run.optimizer, self.run.cfg
        if not sae.W_enc.is_cuda:
            return scalars(start_step(sae, optimizer, x, cfg, wait))
        stream = self.streams.setdefault(x.device, torch.cuda.Stream(x.device))
        form = (x.data_ptr(), x.shape, x.dtype, sae.form_of_step())
        if wait or form not in self.seen or not sparse_ops.uses_kernels(sae.W_enc):
            stream.wait_stream(torch.cuda.current_stream(x.device))
            try:
                with torch.cuda.stream(stream):
                    output = scalars(start_step(sae, optimizer, x, cfg, wait))
            finally:
                torch.cuda.current_stream(x.device).wait_stream(stream)
            if not wait:
                self.seen[form] = output
            return dict(output)
        if form not in self.recorded:
            self.recorded[form] = self.record(x, stream, self.seen[form])
        graph, lr, output = self.recorded[form]
        lr.fill_(optimizer.param_groups[0]["lr"])
        graph.replay()
        return dict(output)

    def record(self, x, stream: torch.cuda.Stream, like: dict) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, dict]:
        """(the graph, the learning rate that it reads, the scalars that it writes, which are as those in `like`).

        The scalars are copied to memory of their own: the shared memory is the next graph's as soon as that runs.
        """
        sae, group = self.run.sae, self.run.optimizer.param_groups[0]
        graph, lr, rate = torch.cuda.CUDAGraph(), torch.zeros((), device=x.device), group["lr"]
        output = {key: torch.empty_like(value) for key, value in like.items()}
        StepGraphs.memory = StepGraphs.memory or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # while it records, torch cannot return memory that is cached for other uses
        group["lr"] = lr
        try:
            with torch.cuda.device(x.device), torch.cuda.graph(graph, StepGraphs.memory, stream, "thread_local"):
                written = scalars(start_step(sae, self.run.optimizer, x, self.run.cfg))
                torch._foreach_copy_(list(output.values()), [written[key] for key in output])
        except RuntimeError as error:
            StepGraphs.memory = None  # the pool cannot be used again
            raise (error.__context__ or error) from None  # ending the graph fails, too, and hides why
        finally:
            group["lr"] = rate
        return graph, lr, output


@sparse_ops.sae_arithmetic
def start_step(sae, optimizer, x: torch.Tensor, cfg: dict, wait: bool = False) -> dict:
    """As training_step, but on CUDA the host does not wait, unless `wait`. If output["failure"] is not 0, nothing was
    changed, and the step must be repeated with wait=True (read_failures).
    """
    output = sae(x, wait=wait)
    output["loss"].backward()
    if sparse_ops.uses_kernels(sae.W_enc):
        update_on_device(sae, optimizer, cfg, output)
    else:
        update_weights(sae, optimizer, cfg)
        sae.update_statistics(output)
    optimizer.is_updating = False  # if memory runs out before this, the SAE cannot be saved
    optimizer.zero_grad()
    sae.zero_grad()
    if wait and output.pop("failure", 0):
        raise FloatingPointError("NaN or infinity in the gradient")
    return output


def update_weights(sae, optimizer, cfg: dict) -> None:
    """Clip the gradient, remove its part parallel to the decoder rows, Adam, and unit rows again."""
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), cfg["max_grad_norm"])
    if not norm.isfinite():
        sae.zero_grad()
        raise FloatingPointError("NaN or infinity in the gradient")
    optimizer.is_updating = True
    sae.make_decoder_weights_and_grad_unit_norm()
    share_gradients(sae, optimizer)
    optimizer.step()
    sae.normalize_decoder()


def update_on_device(sae, optimizer, cfg: dict, output: dict) -> None:
    """update_weights and update_statistics in the kernels of triton_ops.py. A failed step changes nothing, and is known
    by output["failure"].
    """
    import triton_ops

    share_gradients(sae, optimizer)
    optimizer.is_updating = True
    failure = output.get("failure", torch.zeros((), dtype=torch.int64, device=sae.W_dec.device))
    triton_ops.adam_step(optimizer, sae.W_dec, cfg["max_grad_norm"], failure)
    output["failure"] = failure
    before, valid = [buffer.clone() for buffer in sae.buffers()], failure == 0
    sae.update_statistics(output)
    for buffer, old in zip(sae.buffers(), before):
        buffer.copy_(torch.where(valid, buffer, old))


def share_gradients(sae, optimizer) -> None:
    """Give the optimizer the gradient of W_enc, which it holds by its transpose (make_optimizer)."""
    for held, parameter in zip(optimizer.param_groups[0]["params"], sae.parameters()):
        if held is not parameter:
            held.grad = parameter.grad.T


def read_failures(saes: list, outputs: list[dict | FloatingPointError]) -> list[bool]:
    """Which steps must be repeated with wait=True. Also reads what the next steps need (BaseAutoencoder.counts).

    Waits for the device once.
    """
    queued = [i for i, output in enumerate(outputs) if isinstance(output, dict) and "failure" in output]
    read = [torch.cat([outputs[i]["failure"][None], saes[i].counts_on_device()]) for i in queued]
    failed = [False] * len(outputs)
    for i, (failure, *counts) in zip(queued, torch.stack(read).tolist() if read else []):
        del outputs[i]["failure"]
        failed[i], saes[i].known_counts = failure != 0, Counts(*counts)
    return failed


def scalars(output: dict) -> dict:
    """The single numbers of a forward's output, still on the device: the rest would hold [B, F] of each SAE."""
    return {key: value.detach() for key, value in output.items() if value.ndim == 0}


def progress_table(runs: list[Run], outputs: list[dict], evaluated: list[dict], tokens: int) -> str:
    """The SAEs, a line each: loss and dead features of the training step, held-out NMSE, L0 and CE degradation."""
    rows = [("SAE", "loss", "NMSE", "L0", "CE degradation", "dead")]
    for run, output, values in zip(runs, outputs, evaluated):
        dead = output["num_dead_features"].item() / run.cfg["dict_size"]
        row = f"{output['loss'].item():.4f}", f"{values['nmse']:.4f}", f"{values['l0']:.1f}"
        rows.append((run.cfg["name"], *row, f"{values['ce_degradation']:.4f}", f"{dead:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (f"{row[0]:{widths[0]}}" + "".join(f"{c:>{w + 2}}" for c, w in zip(row[1:], widths[1:])) for row in rows)
    return "\n".join((f"After {tokens:,} tokens:", *lines))


def summary(metrics: list[dict]) -> str:
    """For the progress bar: loss, L0 and dead features, from the least to the greatest of the group."""

    def span(key, form):
        values = sorted(values[key] for values in metrics)
        ends = [format(values[0], form), format(values[-1], form)]
        return ends[0] if ends[0] == ends[1] else "–".join(ends)

    return f"loss {span('loss', '.3f')}, L0 {span('l0_norm', '.0f')}, dead {span('num_dead_features', 'd')}"
