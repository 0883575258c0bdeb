"""The training loop: any number of SAEs on one stream of activations, which can be stopped and resumed at any step."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

import distributed
from activation_store import ActivationsStore
from checkpoint import Checkpoints, handle_save_errors, run_folder, save_sae
from config import KEYS, MIN_L0
from console import InputError, count_of, out_of_memory, shown_live, tell, text_table
from evaluation import evaluate, evaluation_cost, heldout_baseline
from files import SaveError
from hub import StreamError
from language_model import complete_cfg
from logs import RunLog, provenance, remove_checkpoints
from sae import SAE_CLASSES, BaseAutoencoder
from training_step import Run, group_step, learning_rate, make_optimizer, read_failures

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MAX_GAMMA = 0.5  # warn above this γ (initialize_b_dec): a fifth or more of the features died (docs/dead_features.md)
MAX_LAG = 0.1  # warn if L0 differs by a larger fraction from that with the top k of the batch
SIGNAL_DEBOUNCE = 1.0  # seconds; a second signal this soon is ignored, because timeout(1) sends two


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: training has stopped, and is saved."""

    def __str__(self):
        return "training was stopped and is saved: the same call resumes it"


class NotFinite(InputError):
    """NaN or infinity stopped some SAEs of a group; the others are trained."""


def train_sae(sae: BaseAutoencoder, activation_store: ActivationsStore, model: TransformerBridge, cfg: dict) -> dict:
    """Train one SAE: a group of one. Returns its final metrics on held-out tokens."""
    return train_sae_group([sae], activation_store, model, [cfg])[0]


def train_sae_group(
    saes: list[BaseAutoencoder | None],
    activation_store: ActivationsStore,
    model: TransformerBridge,
    cfgs: list[dict],
    resume_anyway: bool = False,
) -> list[dict]:
    """Train SAEs side by side on one stream: the language model runs once, and all see the same batches.

    `cfgs` are completed configs that agree on all `in_group` keys (config.py). Each run has its own record and its own
    sae/ folder in output_dir/sweep/name. The SAEs of a group do not influence each other. If a checkpoint holds all
    these runs, training resumes from it, with the same results as without the interruption. Returns the final held-out
    metrics.

    Raises, after what was trained has been saved:
        InputError     an SAE or the store was made with another config; a run is over or in use; its checkpoint was
                       made with other versions, threads, device, model or data (unless resume_anyway); the dataset ends
                       before num_tokens or holds NaN; NaN or infinity stopped an SAE (raised when the others are
                       trained)
        StreamError    the network stays down
        SaveError      the disk cannot be written
        Stopped        Ctrl-C or SIGTERM
        torch.OutOfMemoryError, MemoryError, or torch's RuntimeError: memory ran out
    """
    cfgs = [complete_cfg(cfg, model) for cfg in cfgs]
    for sae, cfg in zip(saes, cfgs):
        check_made_for(cfg, activation_store, sae)
    made_with = provenance(model, activation_store)
    distributed.check_ranks(made_with, run_folder(cfgs[0]).parent)
    for sae_type in sorted({cfg["sae_type"] for cfg in cfgs if cfg["l1_coeff"] == 0} & {"vanilla", "jumprelu"}):
        tell(f"warning: l1_coeff is 0: nothing makes this {sae_type} SAE sparse")
    with ExitStack() as stack:
        runs = []
        for sae, cfg in zip(saes, cfgs):
            if sae is not None:
                sae.cfg = cfg
                log = stack.enter_context(closing(RunLog(cfg, made_with))) if sae.shards.index == 0 else None
                runs.append(Run(cfg, sae.train(), make_optimizer(sae, cfg), log))
        checkpoints = Checkpoints(cfgs, runs, made_with, resume_anyway)
        activation_store.load_state_dict(checkpoints.stream or activation_store.beginning)
        for run in runs:
            if run.log:
                run.log.start(checkpoints.step, checkpoints.logged.get(run.cfg["name"], 0))
        baseline = heldout_baseline(activation_store)

        failed = train_steps(cfgs, runs, activation_store, baseline, checkpoints)
        activation_store.drop_next_buffer()  # there is one if all SAEs were stopped early
        seconds = checkpoints.elapsed()

        num_tokens = activation_store.tokens_needed
        results = evaluate([run.sae for run in runs], activation_store, baseline)
        with handle_save_errors("stop", "the SAEs"):
            for run in runs:
                save_sae(run.sae, run_folder(run.cfg) / "sae")
        for run, result in zip(runs, results):
            result |= {"tokens": num_tokens, "steps": num_tokens // run.cfg["batch_size"], "seconds": seconds}
            if run.log:
                with handle_save_errors("stop", f"{run.log.folder}"):
                    run.log.finish(result)
        all_results = dict(
            distributed.gather_lists([(run.cfg["name"], result) for run, result in zip(runs, results) if run.log])
        )
        distributed.from_rank_0(lambda: remove_checkpoints(run_folder(cfgs[0]).parent))
    for name, result in all_results.items():
        warn_of_lagging_threshold(name, result)
    if failed:
        raise NotFinite(f"{len(failed)} of {len(saes)} SAEs were stopped, and saved as they were: {'; '.join(failed)}")
    return [all_results[cfg["name"]] for cfg in cfgs]


def check_made_for(cfg: dict, activation_store: ActivationsStore, sae: BaseAutoencoder | None) -> None:
    """Raise InputError if the store or the SAE was made with another config than the run: the record would be wrong."""
    keys = [key.name for key in KEYS.values() if key.in_group and key.in_name]
    check_same("activation store", {key: activation_store.cfg[key] for key in keys}, cfg)
    if sae is None:
        return
    if sae.shards.count != cfg["feature_shards"]:
        raise InputError(
            f"feature_shards = {cfg['feature_shards']}, but the SAE of {cfg['name']} was built for {sae.shards.count}: "
            f"pass shards.team({cfg['feature_shards']}) to its constructor"
        )
    types = {kind: sae_type for sae_type, kind in SAE_CLASSES.items()}
    sae_type = next((types[kind] for kind in type(sae).__mro__ if kind in types), None)
    found = dict(sae_type=sae_type, dict_size=len(sae.W_dec) * sae.shards.count, act_size=sae.W_dec.shape[1])
    found["dtype"] = str(sae.W_dec.dtype).removeprefix("torch.")
    check_same("SAE", found, cfg | {"act_size": activation_store.act_size})


def check_same(what: str, found: dict, cfg: dict) -> None:
    """Raise InputError if a value `found` in the store or the SAE differs from the config's."""
    if other := [key for key in found if found[key] != cfg[key]]:
        differences = ", ".join(f"{key} = {found[key]!r} instead of {cfg[key]!r}" for key in other)
        raise InputError(f"the {what} was made with another config than {cfg['name']}: {differences}")


def warn_of_lagging_threshold(name: str, result: dict) -> None:
    """Warn if a BatchTopK's inference threshold lags behind its last batches, as in short training."""
    l0, in_batch = result["l0"], result.get("l0_batch", result["l0"])
    if abs(l0 - in_batch) > MAX_LAG * in_batch:
        what = f"L0 is {l0:.1f} with the inference threshold, and {in_batch:.1f} with the top k of the batch"
        why = "the threshold, a running mean, lags in short training (evaluation.calibrate_threshold sets it)"
        tell(f"warning: {name}: {what}: {why}")


def train_steps(
    cfgs: list[dict], runs: list[Run], activation_store: ActivationsStore, baseline: dict, checkpoints: Checkpoints
) -> list[str]:
    """Train from the checkpoint to the last step. Removes runs stopped by NaN from `runs`; returns a line for each."""
    cfg = cfgs[0]
    last_step = activation_store.tokens_needed // cfg["batch_size"]
    eval_contexts = max(1, cfg["batch_size"] // activation_store.seq_len)
    failed, warned = [], set()
    bar = TrainingBar(
        f"training {count_of(len(cfgs), 'SAE')}", checkpoints.step * cfg["batch_size"], last_step * cfg["batch_size"]
    )
    evaluations = (last_step - 1) // cfg["perf_log_freq"] - checkpoints.step // cfg["perf_log_freq"]
    bar.contexts_left = max(evaluations, 0) * eval_contexts + len(activation_store.eval_contexts)
    cost = max(distributed.gather(evaluation_cost([run.sae for run in runs])))
    bar.seconds_per_context = baseline["seconds_per_prediction"] * cost
    with bar, StopSignals() as signals:
        for step in range(checkpoints.step + 1, last_step + 1):
            position, outputs = activation_store.state_dict(), []  # group_step appends to outputs
            with save_if_memory_runs_out(runs, outputs, checkpoints, position, step, last_step):
                # Fetch a batch and take the step
                for run in runs:
                    run.optimizer.param_groups[0]["lr"] = learning_rate(run.cfg, step)
                try:
                    if step == 1:
                        initialize = partial(initialize_b_dec, [run.sae for run in runs], activation_store)
                        signals.call_harvest(activation_store, partial(distributed.on_all, initialize))
                    x = signals.call_harvest(activation_store, activation_store.next_batch)
                    group_step(runs, x, outputs, checkpoints.ahead)
                    failures = any(isinstance(output, FloatingPointError) for output in outputs)
                    # Ranks without SAEs check too: all must raise.
                    if (failures or not runs) and not x.isfinite().all():
                        raise InputError(f"step {step}: NaN or infinity in the activations of {cfg['model_name']}")
                except (InputError, StreamError, SaveError, Stopped) as error:
                    checkpoints.save(step - 1, position)
                    if isinstance(error, InputError) and step > 1:
                        for run in runs:
                            with handle_save_errors(cfg["save_errors"], "the SAE", any_rank=bool(run.log)):
                                save_sae(run.sae, run_folder(run.cfg) / "sae")
                    tell(f"Stopped after {step - 1} of {last_step} steps")
                    raise
                failed += remove_failed(runs, outputs, step)

                # Read the numbers and evaluate. Elsewhere only failures are read from the device.
                metrics = [{} for _ in runs]
                if step == 1 or step % cfg["log_freq"] == 0 or step == last_step:
                    metrics = [{key: value.item() for key, value in output.items()} for output in outputs]
                    if of_all_ranks := distributed.gather_lists([m for run, m in zip(runs, metrics) if run.log]):
                        bar.set_postfix_str(summary(of_all_ranks), refresh=False)
                bar.update(len(x))
                if step % cfg["perf_log_freq"] == 0 and step < last_step:
                    with bar.evaluating(eval_contexts):
                        evaluated = evaluate([run.sae for run in runs], activation_store, baseline, eval_contexts)
                        rows = distributed.gather_lists(progress_rows(runs, outputs, evaluated))
                    if rows:
                        tell(f"After {step * cfg['batch_size']:,} tokens:\n{progress_table(rows)}")
                    for values, more in zip(metrics, evaluated):
                        values |= more

            # Record them
            for run, values in zip(runs, metrics):
                if run.log and values:
                    record(run, step, values, warned)

            # Save a checkpoint
            stop, due, running = distributed.any_rank(signals.stop_requested, checkpoints.due(step), bool(runs))
            if not running:
                break
            if stop or due or step == last_step:
                checkpoints.save(step, activation_store.state_dict())
                (stop,) = distributed.any_rank(signals.stop_requested)
            if stop:
                tell(f"Stopped after {step} of {last_step} steps")
                raise Stopped
    return distributed.gather_lists(failed)


def remove_failed(runs: list[Run], outputs: list, step: int) -> list[str]:
    """Stop, save and remove the runs whose output is a FloatingPointError, raised before their weights changed.

    Returns a line for each whose record this rank keeps.
    """
    lines = []
    for run, output in list(zip(runs, outputs)):
        if isinstance(output, FloatingPointError):
            if run.log:
                lines.append(f"{run.cfg['name']}: step {step}: {output}")
                tell(lines[-1], any_rank=True)
            with handle_save_errors(run.cfg["save_errors"], f"{run_folder(run.cfg)}", any_rank=bool(run.log)):
                save_sae(run.sae, run_folder(run.cfg) / "sae")
                if run.log:
                    run.log.stop(step, str(output))
            runs.remove(run)  # only now: if saving fails, the checkpoint of the step before must still hold this run
            outputs.remove(output)
    return lines


def record(run: Run, step: int, values: dict, warned: set[str]) -> None:
    """Log a run's metrics. Warns, once per run, if hardly any feature is active; `warned` holds the names of runs."""
    if values.get("l0_norm", MIN_L0) < MIN_L0 and run.cfg["name"] not in warned:
        warned.add(run.cfg["name"])
        where = f"{run.cfg['name']}: L0 has fallen to {values['l0_norm']:.2g} after step {step}"
        hint = "so hardly any feature is active: lr or l1_coeff may be too high"
        tell(f"warning: {where}, {hint}", any_rank=True)
    with handle_save_errors(run.cfg["save_errors"], f"{run.log.folder}/metrics.jsonl"):
        run.log.log(step, step * run.cfg["batch_size"], values)


class TrainingBar(tqdm):
    """A progress bar over tokens. The time left includes the evaluation of `contexts_left` contexts. Evaluations do not
    lower the rate that is shown. In a log file it is written every 5 seconds.
    """

    contexts_left, seconds_per_context = 0, 0.0

    def __init__(self, title: str, done: int, total: int):
        super().__init__(
            desc=title, initial=done, total=total, unit="tok", unit_scale=True, smoothing=0.05,
            disable=distributed.rank() > 0, mininterval=0.1 if shown_live() else 5,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]",
        )  # fmt: skip

    @property
    def format_dict(self) -> dict:
        values = super().format_dict
        rate, left = values["rate"], "?"
        if rate is None and values["elapsed"]:  # until tqdm has a moving average
            rate = (values["n"] - values["initial"]) / values["elapsed"]
        if rate:
            training = (values["total"] - values["n"]) / rate
            left = self.format_interval(training + self.contexts_left * self.seconds_per_context)
        return values | {"left": left}

    @contextmanager
    def evaluating(self, contexts: int) -> Iterator[None]:
        started = time.time()
        yield
        seconds = time.time() - started
        self.contexts_left -= contexts
        self.seconds_per_context = seconds / contexts
        if not self.disable:
            self.last_print_t += seconds


@contextmanager
def save_if_memory_runs_out(
    runs: list[Run], outputs: list, checkpoints: Checkpoints, position: dict, step: int, last_step: int
) -> Iterator[None]:
    """Context manager around a step: saves a checkpoint if memory runs out, or the reader of the progress bar is gone.

    Some SAEs may have taken the step and others not. So the checkpoint is that of the step before, with the stream at
    `position`. It lists the SAEs that are ahead of it, with the numbers of their `outputs`.
    """
    try:
        yield
    except Exception as error:
        broken_pipe = isinstance(error, BrokenPipeError)
        # Other ranks cannot be asked to save now: the last checkpoint is kept.
        if distributed.size() > 1 or not (broken_pipe or out_of_memory(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        if half_updated := [run.cfg["name"] for run in runs if getattr(run.optimizer, "is_updating", False)]:
            tell(f"Out of memory while the weights of {half_updated[0]} were updated: the last checkpoint is kept")
            raise
        failed = read_failures([run.sae for run in runs], outputs)
        ahead = {
            run.cfg["name"]: {key: value.item() for key, value in output.items()}
            for run, output, must_repeat in zip(runs, outputs, failed)
            if not must_repeat and isinstance(output, dict)
        }
        checkpoints.save(step - 1, position, ahead)
        if not broken_pipe:
            tell(f"Out of memory: stopped after {step - 1} of {last_step} steps")
        raise


class StopSignals:
    """Handles SIGINT and SIGTERM: stop at once while activations are harvested, else after the step."""

    def __enter__(self):
        self.stop_requested = self.interruptible = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, *_):
        if not self.stop_requested:
            self.stop_requested, self.requested_at = True, time.monotonic()
            tell("Stopping after saving a checkpoint (a second signal stops at once, without saving)")
            if self.interruptible:
                raise Stopped
        elif time.monotonic() - self.requested_at > SIGNAL_DEBOUNCE:
            raise KeyboardInterrupt

    def call_harvest(self, activation_store: ActivationsStore, function):
        """Call function, which harvests activations. A signal interrupts it with Stopped: under torchrun only while
        rank 0 reads text, and then on every rank, because no rank may leave the others alone in a forward pass.
        """
        if distributed.size() == 1:
            return self.call_interruptibly(function)
        activation_store.interruptible = self.call_interruptibly
        return function()

    def call_interruptibly(self, function):
        """Call function; a signal interrupts it with Stopped."""
        self.interruptible = True
        try:
            if self.stop_requested:
                raise Stopped
            return function()
        finally:
            self.interruptible = False


@torch.no_grad()
def initialize_b_dec(saes: list[BaseAutoencoder], activation_store: ActivationsStore) -> None:
    """Set b_dec of each SAE with b_dec_init = "mean" to the mean of the normalised activations in the store's current
    buffer (the first, before training). A b_dec that is not 0 is kept. The stream does not advance.

    Warns if γ = ‖μ‖ / ‖σ‖ of these activations, with μ [d] their mean and σ [d] their standard deviation over tokens
    (arXiv 2605.31518), exceeds MAX_GAMMA and b_dec starts from zero.
    Raises InputError if there is NaN or infinity in activations whose mean is needed.
    """
    rows, moments, at_risk = activation_store.peek(), {}, []
    for sae in saes:
        key = sae.cfg["input_unit_norm"], sae.W_dec.dtype
        if key not in moments:
            mean, std = mean_and_std(sae, rows)
            moments[key] = mean, (mean.norm() / std.norm()).item()
        mean, gamma = moments[key]
        if sae.cfg["b_dec_init"] == "zero" and gamma > MAX_GAMMA:
            at_risk.append(gamma)
        if sae.cfg["b_dec_init"] == "mean" and not sae.b_dec.any():
            if not mean.isfinite().all():
                raise InputError(f"NaN or infinity in the activations of {sae.cfg['model_name']}")
            sae.b_dec.copy_(mean)
    if at_risk:
        gamma = f"γ = ‖mean‖ / ‖standard deviation‖ of the activations is {max(at_risk):.2f}, above {MAX_GAMMA}"
        which = count_of(len(at_risk), "SAE")
        tell(f"warning: many features of {which} may die, because {gamma}: set b_dec_init=mean")


def mean_and_std(sae: BaseAutoencoder, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d] and standard deviation [d] over tokens, in float64, of activations [n, d] as `sae` normalises them."""
    total = squares = 0
    for chunk in rows.split(sae.cfg["batch_size"]):
        x = sae.preprocess_input(chunk)[0].double()
        total, squares = total + x.sum(0), squares + x.pow(2).sum(0)
    mean = total / len(rows)
    return mean, (squares / len(rows) - mean**2).clamp(min=0).sqrt()


def progress_table(rows: list[tuple]) -> str:
    """The rows of progress_rows as a table. If the names differ without their hashes, it omits these to save width."""
    names = [name.rpartition("_")[0] for name, *_ in rows]
    if len(set(names)) == len(rows):
        rows = [(name, *row[1:]) for name, row in zip(names, rows)]
    return text_table([("SAE", "loss", "NMSE", "L0", "CE degradation", "dead"), *rows], right=True)


def progress_rows(runs: list[Run], outputs: list[dict], evaluated: list[dict]) -> list[tuple]:
    """Per SAE of this rank: loss and dead features of the training step; held-out NMSE, L0 and CE degradation."""
    rows = []
    for run, output, values in zip(runs, outputs, evaluated):
        if run.log:
            dead = output["num_dead_features"].item() / run.cfg["dict_size"]
            row = f"{output['loss'].item():.4f}", f"{values['nmse']:.4f}", f"{values['l0']:.1f}"
            rows.append((run.cfg["name"], *row, f"{values['ce_degradation']:.4f}", f"{dead:.1%}"))
    return rows


def summary(metrics: list[dict]) -> str:
    """For the progress bar: lowest and highest loss, L0 and number of dead features of the group."""

    def span(key, form):
        low, high = (format(end(values[key] for values in metrics), form) for end in (min, max))
        return low if low == high else f"{low}–{high}"

    return f"loss {span('loss', '.3f')}, L0 {span('l0_norm', '.0f')}, dead {span('num_dead_features', 'd')}"
