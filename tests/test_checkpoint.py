"""Checkpoints that are corrupt, partly written, partly deleted or hostile are skipped for the previous one."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from helpers import OFTEN, SAES, STEPS, assert_as_uninterrupted, corrupt, same_bits, stopping_store, train

import checkpoint
import files
import training
from activation_store import ActivationsStore
from checkpoint import find_corruption, group_folder, groups_folder, load_sae, newest_checkpoint, save_sae
from console import InputError
from files import SaveError
from logs import remove_checkpoints, run_folder
from sae import SAE_CLASSES


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "manifest", "state"])
def test_a_corrupt_checkpoint_is_skipped(model, training_cfg, uninterrupted, capsys, how):
    """The previous one is used, with a warning. If all are corrupt, training does not start over."""
    cfgs = [training_cfg("cut", **changes, **OFTEN, checkpoint_freq=2) for changes in SAES]
    with pytest.raises(KeyboardInterrupt):
        train(model, cfgs, stopping_store(8, KeyboardInterrupt()))
    paths = sorted(group_folder(cfgs).glob("step_*"))
    assert [path.name for path in paths] == ["step_000000004", "step_000000006"], "keep_checkpoints is 2"
    corrupt(paths[1], how)
    assert newest_checkpoint(cfgs[0]) == paths[0]
    assert f"{paths[1]} is corrupt" in capsys.readouterr().err
    corrupt(paths[0], how)
    with pytest.raises(InputError, match="only corrupt checkpoints"):
        train(model, cfgs)
    if how == "flipped":
        corrupt(paths[0], how)  # flips it back
        assert_as_uninterrupted(uninterrupted, cfgs, *train(model, cfgs))


@pytest.mark.fast
def test_a_partly_written_checkpoint_is_ignored(model, training_cfg, monkeypatch):
    """A save that is interrupted at any write leaves the previous checkpoint; the next save removes its files."""
    cfg = training_cfg(**SAES[1], checkpoint_freq=2)
    write, calls = checkpoint.write, []
    for interrupt_at in range(1, 7):

        def interrupted(path, content, interrupt_at=interrupt_at):
            if path.is_relative_to(groups_folder(cfg)):
                calls.append(path)
            if len(calls) == interrupt_at:
                path.write_bytes(content[: len(content) // 2])
                raise KeyboardInterrupt
            return write(path, content)

        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "write", interrupted)
            patch.setattr(files, "write", interrupted)
            train(model, [cfg])
        assert len(calls) == interrupt_at
        path = newest_checkpoint(cfg)
        assert path is None or find_corruption(path) is None
    with pytest.raises(KeyboardInterrupt):
        train(model, [cfg], stopping_store(4, KeyboardInterrupt()))
    assert not list(groups_folder(cfg).glob("*/*.tmp"))


def test_checkpoints_by_the_clock(model, training_cfg, monkeypatch):
    """One every 15 minutes, and "seconds" counts those before resuming. A step takes 400 s here."""
    now, saved, save = [0.0], [], checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: saved.append(args[2]["step"]) or save(*args))

    def slow_store(stop_in):
        class Store(stopping_store(stop_in, KeyboardInterrupt())):
            def next_batch(self):
                now[0] += 400
                return super().next_batch()

        return Store

    cfg = training_cfg(**SAES[1], checkpoint_freq=1000)
    with pytest.raises(KeyboardInterrupt):
        train(model, [cfg], slow_store(9))
    assert saved == [3, 6]
    _, (result,) = train(model, [cfg], slow_store(99))
    assert result["seconds"] == STEPS * 400


def test_all_is_on_disk_before_it_is_renamed(model, training_cfg, monkeypatch):
    """Every file that gets its name, or whose folder does, and the metrics before a checkpoint; then the name too."""
    flushed, unflushed_names, renamed, fsync = set(), set(), [], os.fsync

    def version(status):
        return status.st_ino, status.st_size, status.st_mtime_ns

    def noted_fsync(descriptor):
        fsync(descriptor)
        flushed.add(version(os.fstat(descriptor)))
        unflushed_names.discard(os.fstat(descriptor).st_ino)

    def checking(rename):
        def checked(old, new):
            if old.suffix != ".tmp":
                return rename(old, new)
            needed = [path for path in (old, *old.rglob("*")) if path.is_file()]
            if Path(new).name.startswith("step_"):
                needed += [run_folder(cfg) / "metrics.jsonl" for cfg in cfgs]
            assert {version(path.stat()) for path in needed} <= flushed and not unflushed_names, new
            unflushed_names.add(old.parent.stat().st_ino)
            renamed.append(Path(new).name)
            return rename(old, new)

        return checked

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", checking(Path.rename))
    monkeypatch.setattr(Path, "replace", checking(Path.replace))
    cfgs = [training_cfg(**changes, log_freq=1, checkpoint_freq=5) for changes in SAES[:2]]
    train(model, cfgs)
    assert {"step_000000005", "sae", "result.json", "config.json"} <= set(renamed) and not unflushed_names


def test_a_checkpoint_that_reads_back_otherwise(model, training_cfg, monkeypatch):
    """A disk that changes a bit: the save fails, and the previous checkpoint is kept."""
    write = checkpoint.write

    def changing_write(path, content):
        digest = write(path, content)
        if "step_000000006" in str(path) and path.suffix == ".safetensors":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return digest

    monkeypatch.setattr(checkpoint, "write", changing_write)
    cfg = training_cfg(**SAES[1], checkpoint_freq=3)
    with pytest.raises(SaveError, match="SHA-256 differs"):
        train(model, [cfg])
    assert newest_checkpoint(cfg).name == "step_000000003"


def test_a_half_deleted_checkpoint_is_never_found(tmp_path, monkeypatch):
    def interrupted_rmtree(folder):
        (folder / "manifest.json").unlink()
        raise OSError

    path = tmp_path / "step_000000003"
    path.mkdir()
    for name in ("state.json", "manifest.json"):
        (path / name).touch()
    monkeypatch.setattr(shutil, "rmtree", interrupted_rmtree)
    checkpoint.remove(path)
    assert [left.name for left in tmp_path.iterdir()] == ["step_000000003.tmp"]


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Replace a checkpoint's file, and its SHA-256 in the manifest."""
    digests = json.loads((path / "manifest.json").read_text())
    digests[name] = checkpoint.write(path / name, content)
    (path / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.parametrize("state", ["[]", "7", "{}", '{"step": "x"}', "[" * 9999, "no weights"])
def test_an_invalid_state_is_corrupt(model, training_cfg, state):
    """Files with the right SHA-256 that are not those of a checkpoint."""
    cfg = training_cfg(**SAES[1], checkpoint_freq=2)
    with pytest.raises(KeyboardInterrupt):
        train(model, [cfg], stopping_store(4, KeyboardInterrupt()))
    path = newest_checkpoint(cfg)
    if state == "no weights":
        digests = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({"state.json": digests["state.json"]}))
    else:
        replace_file(path, "state.json", state.encode())
    assert find_corruption(path)
    with pytest.raises(InputError, match="only corrupt"):
        newest_checkpoint(cfg)


def test_a_corrupt_newer_checkpoint_does_not_displace_an_older_one(model, training_cfg):
    """A save deletes only checkpoints that are older than itself."""
    cfg = training_cfg(**SAES[1], checkpoint_freq=2, keep_checkpoints=1)
    two = training_cfg(**SAES[1], checkpoint_freq=2)
    with pytest.raises(KeyboardInterrupt):
        train(model, [two], stopping_store(8, KeyboardInterrupt()))
    older, newer = sorted(group_folder([cfg]).glob("step_*"))
    corrupt(newer, "flipped")
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(2, training.Stopped()))
    assert newest_checkpoint(cfg).name == "step_000000005" and not older.exists()


def test_provenance_is_checked_before_anything_is_loaded(model, training_cfg, monkeypatch):
    """A rejected checkpoint leaves the SAE unchanged."""
    cfg = training_cfg(**SAES[1])
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(4, training.Stopped()))
    made_with = training.provenance
    monkeypatch.setattr(training, "provenance", lambda *args: made_with(*args) | {"device": "another"})
    sae, untrained = (SAE_CLASSES[cfg["sae_type"]](cfg) for _ in range(2))
    with pytest.raises(InputError, match="device was cpu and is another"):
        training.train_sae_group([sae], ActivationsStore(model, cfg), model, [cfg])
    assert same_bits(sae, untrained)


# The weights of a saved SAE


@pytest.fixture
def saved(training_cfg, tmp_path):
    cfg = training_cfg(**SAES[2])
    save_sae(sae := SAE_CLASSES[cfg["sae_type"]](cfg), tmp_path / "sae")
    return sae, tmp_path / "sae"


@pytest.mark.fast
def test_a_flipped_bit_in_the_weights_is_found(saved):
    """Wherever it is, loading raises an error of one line."""
    sae, folder = saved
    path = folder / "sae_weights.safetensors"
    content = path.read_bytes()
    for i in range(len(content) - 1, 0, -len(content) // 40):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(InputError, match="is corrupt") as caught:
            load_sae(folder)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(content)
    assert same_bits(load_sae(folder), sae)


def test_the_checksum_is_not_part_of_the_config(saved):
    """It is in cfg.json only; older folders without it still load."""
    sae, folder = saved
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg.pop("weights_sha256") == hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert cfg == sae.cfg == load_sae(folder).cfg
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert same_bits(load_sae(folder), sae)


def test_partly_deleted_checkpoints(model, training_cfg):
    """A kill during deletion leaves checkpoints without a state.json, or with a temporary name. Other runs start
    nevertheless, and the files are deleted once their own runs are over.
    """
    cfgs = [training_cfg(**changes) for changes in SAES[:2]]
    with pytest.raises(training.Stopped):
        train(model, cfgs[:1], stopping_store(4, training.Stopped()))
    path = newest_checkpoint(cfgs[0])
    (path / "state.json").unlink()
    (run_folder(cfgs[1])).mkdir()
    (run_folder(cfgs[1]) / "config.json").write_text("{}")
    assert newest_checkpoint(cfgs[1]) is None
    group = group_folder(cfgs[1:])
    (group / "step_000000001.tmp").mkdir(parents=True)
    path.rename(f"{path}.tmp")
    remove_checkpoints(groups_folder(cfgs[0]).parent)
    assert path.parent.exists(), "the run has not ended"
    (run_folder(cfgs[0]) / "result.json").write_text("{}")
    remove_checkpoints(groups_folder(cfgs[0]).parent)
    assert list(groups_folder(cfgs[0]).iterdir()) == [group], "a checkpoint that is being written is kept"
    old = groups_folder(cfgs[0]) / "old"  # from before runs.json
    (old / "step_000000002.tmp").mkdir(parents=True)
    (old / "step_000000001").mkdir()
    (old / "step_000000001" / "state.json").write_text(json.dumps({"runs": [cfgs[0]["name"]]}))
    remove_checkpoints(groups_folder(cfgs[0]).parent)
    assert list(groups_folder(cfgs[0]).iterdir()) == [group]


HOSTILE = {
    "a path out of the folder": ("manifest.json", lambda old: json.dumps({"../../x": "0"}).encode(), "names"),
    "no JSON": ("manifest.json", lambda old: b"\x80\x04.", "not that of a checkpoint"),
    "another JSON": ("manifest.json", lambda old: b"[1, 2]", "not that of a checkpoint"),
    "a number": ("manifest.json", lambda old: b"7", "not that of a checkpoint"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests_are_corrupt(model, training_cfg, kind):
    cfg = training_cfg(**SAES[1], checkpoint_freq=2)
    with pytest.raises(KeyboardInterrupt):
        train(model, [cfg], stopping_store(4, KeyboardInterrupt()))
    path = newest_checkpoint(cfg)
    name, content, problem = HOSTILE[kind]
    (path / name).write_bytes(content((path / name).read_bytes()))
    assert problem in find_corruption(path)


CHANGES = {
    "weights of another dtype": lambda tensors: tensors | {"sae.W_enc": tensors["sae.W_enc"].double()},
    "weights of another shape": lambda tensors: tensors | {"sae.W_enc": torch.zeros(3, 5)},
    "moments of another shape": lambda tensors: tensors | {"adam.0.exp_avg": torch.zeros(3, 5)},
    "squares of another shape": lambda tensors: tensors | {"adam.0.exp_avg_sq": torch.zeros(3, 5)},
    "a moment that is a number": lambda tensors: tensors | {"adam.0.exp_avg": torch.zeros(())},
    "no moments": lambda tensors: {name: value for name, value in tensors.items() if name.startswith("sae")},
    "one weight less": lambda tensors: {name: value for name, value in tensors.items() if name != "sae.b_dec"},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_tensors_that_do_not_fit_are_an_error(model, training_cfg, kind):
    """Even if every SHA-256 is right."""
    cfg = training_cfg(**SAES[1], checkpoint_freq=2)
    with pytest.raises(KeyboardInterrupt):
        train(model, [cfg], stopping_store(4, KeyboardInterrupt()))
    path = newest_checkpoint(cfg)
    tensors = safetensors.torch.load_file(path / "00.safetensors")
    tensors = CHANGES[kind](tensors)
    digests = json.loads((path / "manifest.json").read_text())
    digests["00.safetensors"] = checkpoint.write(path / "00.safetensors", safetensors.torch.save(tensors))
    (path / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(InputError, match="does not fit") as caught:
        train(model, [cfg])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_from_before_a_buffer_was_added(model, training_cfg):
    """It can be resumed: batches_until_sparse is then as in an untrained SAE."""
    cfg = training_cfg(**SAES[0])
    with pytest.raises(training.Stopped):
        train(model, [cfg], stopping_store(4, training.Stopped()))
    path = newest_checkpoint(cfg)
    tensors = safetensors.torch.load_file(path / "00.safetensors")
    del tensors["sae.batches_until_sparse"]
    replace_file(path, "00.safetensors", safetensors.torch.save(tensors))
    assert len(train(model, [cfg])[1]) == 1
