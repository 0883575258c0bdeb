"""The training loop: any number of SAEs on one stream of activations, which can be stopped and resumed at any step."""

import signal
import threading
import time
import traceback
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from tqdm import tqdm

import sparse_ops
from checkpoint import Checkpoints, handle_save_errors, remove_checkpoints, save_sae
from config import MIN_L0, num_steps
from console import InputError, out_of_memory, tell
from evaluation import evaluate, heldout_baseline
from hub import StreamError
from language_model import complete_cfg
from logs import RunLog, is_over, provenance
from sae import BaseAutoencoder, Counts

MAX_GAMMA = 0.5  # above it, a fifth of the features and more died at lr 1e-3 (docs/dead_features.md)
TOGETHER = 1.0  # seconds within which a second signal counts as the first: timeout(1) sends two


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
    """Train SAEs side by side on one stream: the language model runs once, and all see the same batches.

    `cfgs` are completed configs that agree on all `in_group` keys (config.py). Each run has its own record and its own
    sae/ folder in output_dir/sweep/name. The SAEs of a group do not influence each other. If a checkpoint holds all
    these runs, training resumes from it, with the same results as without the interruption. Returns the final held-out
    metrics.

    Raises, after what was trained has been saved:
        InputError     a run is over or in use; its checkpoint was made with other versions, threads, device, model or
                       data (unless resume_anyway); the dataset ends before num_tokens or holds NaN; NaN or infinity
                       stopped an SAE (raised when the others are trained)
        StreamError    the network stays down
        SaveError      the disk cannot be written
        Stopped        Ctrl-C or SIGTERM
        torch.OutOfMemoryError, MemoryError, or torch's RuntimeError: memory ran out
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
        with handle_save_errors(cfg | {"save_errors": "stop"}, "the SAEs"):
            for run in runs:
                save_sae(run.sae, run.log.folder / "sae")
        for run, result in zip(runs, results):
            result |= {"tokens": num_tokens, "steps": num_tokens // cfg["batch_size"], "seconds": seconds}
            with handle_save_errors(cfg | {"save_errors": "stop"}, f"{run.log.folder}"):
                run.log.finish(result)
        remove_checkpoints(cfg, lambda name: is_over(cfg | {"name": name}))
    if failed:
        raise NotFinite(f"{len(failed)} of {len(saes)} SAEs were stopped, and saved as they were: {'; '.join(failed)}")
    return results


def train_steps(runs: list[Run], activation_store, baseline: dict, checkpoints: Checkpoints) -> list[str]:
    """All steps after the checkpoint's. Runs stopped by NaN are removed from `runs`; returns a line for each."""
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
    with bar, StopSignals() as signals, SaveOnError(runs, checkpoints, last_step) as memory:
        for step in range(checkpoints.step + 1, last_step + 1):
            # The step
            position = activation_store.state_dict()
            outputs = memory.begin(step, position)
            for run in runs:
                run.optimizer.param_groups[0]["lr"] = learning_rate(run.cfg, step)
            try:
                if step == 1:
                    signals.stop_at_once_in(lambda: initialize_b_dec([run.sae for run in runs], activation_store))
                x = signals.stop_at_once_in(activation_store.next_batch)
                group_step(runs, x, outputs, checkpoints.ahead)
                if any(isinstance(output, FloatingPointError) for output in outputs) and not x.isfinite().all():
                    raise InputError(f"step {step}: NaN or infinity in the activations of {cfg['model_name']}")
            except (InputError, StreamError, Stopped) as error:
                checkpoints.save(step - 1, position)
                if isinstance(error, InputError) and step > 1:
                    with handle_save_errors(cfg, "the SAEs"):
                        for run in runs:
                            save_sae(run.sae, run.log.folder / "sae")
                tell(f"Stopped after {step - 1} of {last_step} steps")
                raise
            for run, output in list(zip(runs, outputs)):
                if isinstance(output, FloatingPointError):  # raised before the weights change
                    runs.remove(run)
                    outputs.remove(output)
                    failed.append(f"{run.cfg['name']}: step {step}: {output}")
                    tell(failed[-1])
                    with handle_save_errors(cfg, f"{run.log.folder}"):
                        save_sae(run.sae, run.log.folder / "sae")
                        run.log.stop(step, str(output))
            if not runs:
                break
            bar.update(len(x))

            # Records. Apart from group_step's failures, numbers are read from the device only here.
            metrics = [{} for _ in runs]
            if step == 1 or step % cfg["log_freq"] == 0 or step == last_step:
                metrics = [{key: value.item() for key, value in output.items()} for output in outputs]
                bar.set_postfix_str(summary(metrics))
            if step % cfg["perf_log_freq"] == 0 and step < last_step:
                evaluated = evaluate([run.sae for run in runs], activation_store, baseline, eval_contexts)
                tell(progress_table(runs, outputs, evaluated, step * cfg["batch_size"]))
                for values, more in zip(metrics, evaluated):
                    values |= more
            memory.position = None  # from here on nothing changes an SAE
            for run, values in zip(runs, metrics):
                if values.get("l0_norm", MIN_L0) < MIN_L0 and run.cfg["name"] not in warned:
                    warned.add(run.cfg["name"])
                    where = f"{run.cfg['name']}: L0 has fallen to {values['l0_norm']:.2g} after step {step}"
                    tell(f"warning: {where}, so hardly any feature is active: lr or l1_coeff may be too high")
                if values:
                    with handle_save_errors(cfg, f"{run.log.folder}/metrics.jsonl"):
                        run.log.log(step, step * cfg["batch_size"], values)

            # Checkpoints
            if signals.asked or step == last_step or checkpoints.due(step):
                checkpoints.save(step, activation_store.state_dict())
            if signals.asked:
                tell(f"Stopped after {step} of {last_step} steps")
                raise Stopped
    return failed


class SaveOnError:
    """Saves a checkpoint if memory runs out in a step, or if the progress bar cannot be written because its reader is
    gone. Some SAEs may have taken the step and others not, so it is the checkpoint of the step before, with a list of
    the SAEs that are ahead of it and the numbers of their outputs.
    """

    def __init__(self, runs: list[Run], checkpoints: Checkpoints, last_step: int):
        self.runs, self.checkpoints, self.last_step, self.position = runs, checkpoints, last_step, None

    def __enter__(self):
        return self

    def begin(self, step: int, position: dict) -> list[dict]:
        """Call when a step begins, with the stream at `position`. Returns the list for the step's outputs."""
        self.step, self.position, self.outputs = step, position, []
        return self.outputs

    def __exit__(self, kind, error, frames):
        nobody_reads = isinstance(error, BrokenPipeError)
        if error is None or self.position is None or not (nobody_reads or out_of_memory(error)):
            return
        traceback.clear_frames(frames)  # they hold the tensors that filled the memory
        if half_updated := [run.cfg["name"] for run in self.runs if getattr(run.optimizer, "is_updating", False)]:
            tell(f"Out of memory while the weights of {half_updated[0]} were updated: the last checkpoint is kept")
            return
        failed = read_failures([run.sae for run in self.runs], self.outputs)
        ahead = {
            run.cfg["name"]: {key: value.item() for key, value in output.items()}
            for run, output, again in zip(self.runs, self.outputs, failed)
            if not again and isinstance(output, dict)
        }
        self.checkpoints.save(self.step - 1, self.position, ahead)
        if not nobody_reads:
            tell(f"Out of memory: stopped after {self.step - 1} of {self.last_step} steps")


def as_output(numbers: dict) -> dict:
    """Numbers from a checkpoint in the form that scalars() gives them."""
    return {
        key: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        for key, value in numbers.items()
    }


class StopSignals:
    """Handles SIGINT and SIGTERM: stop at once while no SAE is being updated, else after the step."""

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
        tell("Stopping after saving a checkpoint (a second signal stops at once, without saving)")
        if self.at_once:
            raise Stopped

    def stop_at_once_in(self, function):
        """Call function; a signal interrupts it with Stopped."""
        self.at_once = True
        try:
            if self.asked:
                raise Stopped
            return function()
        finally:
            self.at_once = False


@torch.no_grad()
def initialize_b_dec(saes: list, activation_store) -> None:
    """Set b_dec of each SAE with b_dec_init = "mean" to the mean of the normalised activations in the store's buffer,
    which is the first before training. A b_dec that is not 0 stays. The position of the stream does not change.

    Prints γ = ‖μ‖ / ‖σ‖ of these activations, with μ [d] their mean and σ [d] their standard deviation over tokens
    (arXiv 2605.31518), and a warning if it exceeds MAX_GAMMA and b_dec starts from zero.
    Raises InputError if there is NaN or infinity in activations whose mean is needed.
    """
    rows, moments, at_risk = activation_store.peek(), {}, 0
    for sae in saes:
        key = sae.cfg["input_unit_norm"], sae.W_dec.dtype
        if key not in moments:
            mean, std = mean_and_std(sae, rows)
            moments[key] = mean, (mean.norm() / std.norm()).item()
            tell(f"γ = ‖mean‖ / ‖standard deviation‖ of the activations: {moments[key][1]:.2f}")
        mean, gamma = moments[key]
        at_risk += sae.cfg["b_dec_init"] == "zero" and gamma > MAX_GAMMA
        if sae.cfg["b_dec_init"] == "mean" and not sae.b_dec.any():
            if not mean.isfinite().all():
                raise InputError(f"NaN or infinity in the activations of {sae.cfg['model_name']}")
            sae.b_dec.copy_(mean)
    if at_risk:
        tell(f"warning: γ above {MAX_GAMMA} means that many features of {at_risk} SAEs may die: set b_dec_init=mean")


def mean_and_std(sae, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d] and standard deviation [d] over tokens, in float64, of residual-stream vectors [n, d] as `sae`
    normalises them.
    """
    total = squares = 0
    for chunk in rows.split(sae.cfg["batch_size"]):
        x = sae.preprocess_input(chunk)[0].double()
        total, squares = total + x.sum(0), squares + x.pow(2).sum(0)
    mean = total / len(rows)
    return mean, (squares / len(rows) - mean**2).clamp(min=0).sqrt()


def make_optimizer(sae, cfg: dict) -> torch.optim.Optimizer:
    """Adam, for training_step. It holds the transpose of W_enc (same memory): fused Adam copies other layouts."""
    parameters = [p if p.is_contiguous() else torch.nn.Parameter(p.detach().T) for p in sae.parameters()]
    return torch.optim.Adam(parameters, lr=cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=True)


def learning_rate(cfg: dict, step: int) -> float:
    """The learning rate in a step, counted from 1. It depends on the step alone, so it needs no state.

    lr · min(1, step / lr_warmup_steps, (last step + 1 − step) / lr_decay_steps). Both ramps reach 0 one step outside of
    training, so the rate is never 0.
    """
    warmup, decay, left = cfg["lr_warmup_steps"], cfg["lr_decay_steps"], num_steps(cfg) + 1 - step
    return cfg["lr"] * min(1, step / warmup if warmup else 1, max(left, 0) / decay if decay else 1)


def training_step(sae, optimizer, x: torch.Tensor, cfg: dict) -> dict:
    """One step on activations x [batch_size, d]; returns the forward's output. Decoder rows stay unit vectors.

    The learning rate is the optimizer's; a schedule must set it before each step (learning_rate).
    Raises FloatingPointError, with nothing changed, if loss or gradient is NaN or infinite.
    """
    output = start_step(sae, optimizer, x, cfg)
    if read_failures([sae], [output])[0]:
        del output  # frees memory for the repeated step
        output = start_step(sae, optimizer, x, cfg, wait=True)
    return output


def group_step(runs: list[Run], x: torch.Tensor, outputs: list, ahead: dict) -> None:
    """A training step of each run on the same batch. Appends to `outputs`, run by run, the scalars of the forward's
    output, or the FloatingPointError that stopped the run. Runs in `ahead` had taken this step before memory ran out:
    they are skipped, and their numbers are moved from `ahead` to `outputs`.

    On CUDA the host waits for the device once, after it has queued the steps of all runs.
    """

    def attempt(run, wait=False):
        try:
            return run.graphs.start_step(x, wait)
        except FloatingPointError as error:
            return error

    device = runs[0].sae.W_enc.device
    if device.type == "cuda":  # CUDA graphs read the batch from a fixed address
        x = sparse_ops.scratch("batch", x.shape, x.dtype, device).copy_(x)

    for run in runs:
        name = run.cfg["name"]
        outputs.append(as_output(ahead.pop(name)) if name in ahead else attempt(run))
    failed = [i for i, failure in enumerate(read_failures([run.sae for run in runs], outputs)) if failure]
    for i in failed:
        outputs[i] = None  # if memory runs out now, these runs have not taken the step
    for i in failed:
        outputs[i] = attempt(runs[i], wait=True)


class StepGraphs:
    """The training steps of a run. On CUDA they are recorded as CUDA graphs, because launching some 200 kernels takes
    the host three times as long as the device needs to run them.

    A graph repeats fixed operations on fixed memory, so each form of a step (form_of_step) has its own. The first step
    of a form runs eagerly, the second is recorded.
    """

    memory = None  # memory pool for the intermediate results of all graphs; no two run at the same time
    streams = {}  # device: stream; autograd requires that a step is recorded on the stream on which it ran before

    def __init__(self, run: Run):
        self.run, self.seen, self.recorded = run, {}, {}

    def start_step(self, x: torch.Tensor, wait: bool = False) -> dict:
        """scalars(start_step(…)) for a batch x. On CUDA, batches of the same shape must be at the same address."""
        sae, optimizer, cfg = self.run.sae, self.run.optimizer, self.run.cfg
        if not sae.W_enc.is_cuda:
            return scalars(start_step(sae, optimizer, x, cfg, wait))
        if x.device not in self.streams:
            self.streams[x.device] = torch.cuda.Stream(x.device)
        stream = self.streams[x.device]
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
        """Returns the graph, the learning rate [] that it reads, and the scalars that it writes, allocated like `like`.

        The scalars are outside of the shared pool, whose memory is overwritten by the next graph that runs.
        """
        sae, group = self.run.sae, self.run.optimizer.param_groups[0]
        graph, lr, rate = torch.cuda.CUDAGraph(), torch.zeros((), device=x.device), group["lr"]
        output = {key: torch.empty_like(value) for key, value in like.items()}
        StepGraphs.memory = StepGraphs.memory or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # torch cannot free cached memory while it records
        group["lr"] = lr
        try:
            with torch.cuda.device(x.device), torch.cuda.graph(graph, StepGraphs.memory, stream, "thread_local"):
                written = scalars(start_step(sae, self.run.optimizer, x, self.run.cfg))
                torch._foreach_copy_(list(output.values()), [written[key] for key in output])
        except RuntimeError as error:
            StepGraphs.memory = None  # the pool is unusable after a failure
            raise (error.__context__ or error) from None  # the error of ending the graph hides the cause
        finally:
            group["lr"] = rate
        return graph, lr, output


@sparse_ops.sae_arithmetic
def start_step(sae, optimizer, x: torch.Tensor, cfg: dict, wait: bool = False) -> dict:
    """Like training_step, but on CUDA the host does not wait for the device unless `wait` is set. If output["failure"]
    is not 0, nothing has changed, and the step must be repeated with wait=True (read_failures).
    """
    output = sae(x, wait=wait)
    output["loss"].backward()
    if sparse_ops.uses_kernels(sae.W_enc):
        update_on_device(sae, optimizer, cfg, output)
    else:
        update_weights(sae, optimizer, cfg)
        sae.update_statistics(output)
    optimizer.is_updating = False  # until here the SAE is half updated and must not be saved
    optimizer.zero_grad()
    sae.zero_grad()
    if wait and output.pop("failure", 0):
        raise FloatingPointError("NaN or infinity in the gradient")
    return output


def update_weights(sae, optimizer, cfg: dict) -> None:
    """Clip the gradient, remove its part parallel to the decoder rows, take Adam's step, normalise the rows."""
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
    """update_weights and update_statistics with the kernels of triton_ops.py. If the step failed, output["failure"] is
    not 0 and nothing changes.
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
    """Give the optimizer the gradient of W_enc, whose transpose it holds (make_optimizer)."""
    for held, parameter in zip(optimizer.param_groups[0]["params"], sae.parameters()):
        if held is not parameter:
            held.grad = parameter.grad.T


def read_failures(saes: list, outputs: list[dict | FloatingPointError]) -> list[bool]:
    """Which steps must be repeated with wait=True. Also reads the counts for the next step (BaseAutoencoder.counts).

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
    """The scalars of a forward's output, still on the device. The rest would keep [B, F] of every SAE in memory."""
    return {key: value.detach() for key, value in output.items() if value.ndim == 0}


def progress_table(runs: list[Run], outputs: list[dict], evaluated: list[dict], tokens: int) -> str:
    """A line per SAE: loss and dead features of the training step; held-out NMSE, L0 and CE degradation."""
    rows = [("SAE", "loss", "NMSE", "L0", "CE degradation", "dead")]
    for run, output, values in zip(runs, outputs, evaluated):
        dead = output["num_dead_features"].item() / run.cfg["dict_size"]
        row = f"{output['loss'].item():.4f}", f"{values['nmse']:.4f}", f"{values['l0']:.1f}"
        rows.append((run.cfg["name"], *row, f"{values['ce_degradation']:.4f}", f"{dead:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (f"{row[0]:{widths[0]}}" + "".join(f"{c:>{w + 2}}" for c, w in zip(row[1:], widths[1:])) for row in rows)
    return "\n".join((f"After {tokens:,} tokens:", *lines))


def summary(metrics: list[dict]) -> str:
    """For the progress bar: lowest and highest loss, L0 and number of dead features of the group."""

    def span(key, form):
        values = sorted(values[key] for values in metrics)
        ends = [format(values[0], form), format(values[-1], form)]
        return ends[0] if ends[0] == ends[1] else "–".join(ends)

    return f"loss {span('loss', '.3f')}, L0 {span('l0_norm', '.0f')}, dead {span('num_dead_features', 'd')}"
