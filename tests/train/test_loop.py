import errno
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import replace

import pytest
import torch
from small_runs import logged, signal_after, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsecnx.cli import main
from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.common.torch_files import save_torch
from sparsecnx.train import checkpoint, loop, masks
from sparsecnx.train.checkpoint import CheckpointFolder
from sparsecnx.train.learner import Learner
from sparsecnx.train.log import JsonLines, TensorBoard
from sparsecnx.train.loop import Trainer
from sparsecnx.train.options import Options
from sparsecnx.train.schedule import learning_rate
from sparsecnx.train.start import pretrain


def weights(output):
    return checkpoint.read(output / "last.pt")["model"]


@pytest.mark.parametrize("grad_accum_steps", [1, 2], ids="accumulate{}".format)
@pytest.mark.parametrize("stop", [1, 2, 3], ids="stop-at-step-{}".format)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(photos, tmp_path, monkeypatch, stop, grad_accum_steps):
    fields = {"grad_accum_steps": grad_accum_steps, "mask_ratio": 0.5}
    assert train(photos, tmp_path / "whole", **fields) == 0
    with monkeypatch.context() as patch:
        signal_after(stop, patch)
        assert train(photos, tmp_path / "parts", **fields) == 143
    assert [line["step"] for line in logged(tmp_path / "parts")] == list(range(1, stop + 1))
    assert checkpoint.read(tmp_path / "parts" / "last.pt")["step"] == stop

    torch.rand(3)  # the losses do not depend on the global generator
    assert train(None, tmp_path / "parts", resume="auto", workers=1) == 0

    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert whole == parts
    assert len({line["loss"] for line in whole}) == len(whole) == 8 // grad_accum_steps
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(photos, tmp_path, monkeypatch):
    mask = torch.tensor([[True, False, False, True]])
    monkeypatch.setattr(masks, "random_mask", lambda batch, *args, **kwargs: mask.expand(batch, -1))
    train(photos, tmp_path / "large", batch_size=8, epochs=1, mask_ratio=0.5)
    train(photos, tmp_path / "small", batch_size=2, grad_accum_steps=4, epochs=1, mask_ratio=0.5)
    large, small = logged(tmp_path / "large"), logged(tmp_path / "small")
    assert len(large) == len(small) == 1
    assert small[0] == pytest.approx(large[0], rel=1e-5)


def test_the_log_forgets_what_a_killed_run_did_after_its_checkpoint(photos, tmp_path):
    train(photos, tmp_path / "run")
    expected = logged(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-00000008.pt").unlink()
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')  # killed while writing
    assert train(photos, tmp_path / "run", resume="auto") == 0
    assert logged(tmp_path / "run") == expected


def test_ctrl_c_saves_and_exits_with_130(photos, tmp_path, monkeypatch, capsys):
    signal_after(3, monkeypatch, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    assert train(photos, tmp_path / "run") == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 3
    assert "SIGINT: saved step 3 in" in capsys.readouterr().out


def test_the_loss_falls_on_the_photographs_in_the_wheels(tmp_path):
    assert train(None, tmp_path / "run", batch_size=8, epochs=3, base_lr=0.1, epoch_repeats=10) == 0
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert len(losses) == 3 * (220 // 8)
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.95 * first


def test_bfloat16_trains_close_to_float32(photos, tmp_path):
    train(photos, tmp_path / "float32", epochs=1)
    train(photos, tmp_path / "bfloat16", epochs=1, dtype="bfloat16")
    exact, rounded = ([line["loss"] for line in logged(tmp_path / name)] for name in ("float32", "bfloat16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bfloat16").values())


def test_clipping_limits_the_gradient_and_the_log_keeps_its_norm(photos, tmp_path, monkeypatch):
    used = []
    step = torch.optim.AdamW.step

    def record_and_step(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        used.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", record_and_step)
    train(photos, tmp_path / "run", epochs=1, clip_grad=1e-3)
    assert used == pytest.approx([1e-3] * 4, rel=1e-2)
    assert all(line["grad_norm"] > 2e-3 for line in logged(tmp_path / "run"))


def test_the_first_lines_say_what_is_trained_on_what(photos, tmp_path, capsys):
    assert train(photos, tmp_path / "run") == 0
    first = capsys.readouterr().out.splitlines()[:6]
    assert first[0] == "FCMAE atto, 0.1 M parameters, float32 on cpu, mask ratio 0.6, GRN per sample"
    assert first[1] == f"8 images of 64 px from {photos}"
    assert first[2] == "batch 2, steps per epoch 4, epochs 2"
    assert first[3] == "peak learning rate 0.000391, warm-up epochs 0.2"
    assert first[4] == f"writes to {tmp_path}/run"
    hint = "hint: 8 steps at a learning rate of at most 0.00039 hardly train a network; --small-data"
    assert first[5].startswith(hint)


def test_unreadable_images_are_named_once_and_counted(photos, tmp_path, capsys):
    (photos / "3.png").write_bytes(b"")
    (photos / "cat" / "4.png").write_bytes(b"no image")
    assert train(photos, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert out.count("skipped unreadable image 3.png") == 1
    assert "skipped 2 unreadable images: 3.png, cat/4.png" in out
    assert len(logged(tmp_path / "run")) == 8


def test_only_the_first_of_many_unreadable_images_are_named(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "MOST_NAMED", 2)
    for name in ("3.png", "cat/1.png", "cat/4.png"):
        (photos / name).write_bytes(b"")
    assert train(photos, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert out.count("skipped unreadable image ") == 2 and out.count("; further ones are only counted") == 1
    assert "skipped 3 unreadable images: 3.png, cat/1.png, ..." in out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(photos, tmp_path, monkeypatch):
    losses, calls = Learner.losses, iter(range(8))

    def broken(learner, *batch):
        value = losses(learner, *batch)
        return [value[0] * float("nan")] if next(calls) == 6 else value

    monkeypatch.setattr(Learner, "losses", broken)
    good = "last good checkpoint: .*checkpoint-00000004.pt"
    with pytest.raises(TrainingStopped, match=f"step 7: loss is nan.*{good}"):
        train(photos, tmp_path / "run")
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 4
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_a_gradient_that_is_not_finite_stops_before_the_update(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: pytest.fail("updated"))
    losses = Learner.losses

    def broken(learner, *batch):
        value = losses(learner, *batch)
        value[0].register_hook(lambda gradient: gradient * float("inf"))
        return value

    monkeypatch.setattr(Learner, "losses", broken)
    with pytest.raises(TrainingStopped, match=r"gradient norm (nan|inf).*no checkpoint yet"):
        train(photos, tmp_path / "run")


def test_a_full_disk_stops_and_names_the_last_good_checkpoint(photos, tmp_path, monkeypatch):
    save = torch.save

    def full_at_step_8(state, file):
        if state["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", full_at_step_8)
    good = "last good checkpoint: .*checkpoint-00000004.pt"
    with pytest.raises(TrainingStopped, match=f"step 8: .*No space left on device.*{good}"):
        train(photos, tmp_path / "run")
    monkeypatch.setattr(torch, "save", save)
    assert train(photos, tmp_path / "run", resume="auto") == 0


def test_what_a_run_leaves_behind(photos, tmp_path):
    output = tmp_path / "run"
    options = Options(data=str(photos), output=str(output), device="cpu", workers=0, keep=2)
    assert pretrain(options, {"image_size": 64, "epochs": 3, "batch_size": 4}) == 0
    assert [path.name for path in CheckpointFolder(output).all()] == [
        "checkpoint-00000004.pt",
        "checkpoint-00000006.pt",
    ]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert all(line["images_per_s"] > 0 for line in lines)
    events = EventAccumulator(str(output)).Reload()
    assert [event.step for event in events.Scalars("pretrain/loss")] == [1, 2, 3, 4, 5, 6]


def test_resume_auto_without_a_checkpoint_starts_a_run(photos, tmp_path):
    options = Options(data=str(photos), output=str(tmp_path / "run"), resume="auto", device="cpu", workers=0)
    assert pretrain(options, {"image_size": 64, "epochs": 1, "batch_size": 4}) == 0


def test_a_finished_run_is_extended_with_a_schedule_of_its_own(photos, tmp_path):
    run, options = tmp_path / "run", {"data": str(photos), "device": "cpu", "workers": 0}
    train(photos, run)
    more = Options(output=str(run), resume="newest", extend=3, **options)
    assert pretrain(more, {}) == 0
    rates = [line["lr"] for line in logged(run)]
    assert len(rates) == 5 * 4
    again = [learning_rate(step, peak=0.05 * 2 / 256, warmup_steps=0.3 * 4, total_steps=12) for step in range(12)]
    assert rates[8:] == again
    saved = checkpoint.read(run / "last.pt")
    assert (saved["step"], saved["recipe"]["epochs"], saved["recipe"]["first_epoch"]) == (20, 5, 2)
    chosen = Options(output=str(run), resume="newest", extend=2, **options)
    assert pretrain(chosen, {"warmup_epochs": 1.0}) == 0
    assert checkpoint.read(run / "last.pt")["recipe"]["warmup_epochs"] == 1.0
    with pytest.raises(InputError, match=r"warmup_epochs is 3.0: expected 0 to --extend, 2"):
        pretrain(chosen, {"warmup_epochs": 3.0})
    state = checkpoint.read(run / "checkpoint-00000024.pt")
    (tmp_path / "other").mkdir()
    save_torch(tmp_path / "other" / "part.pt", state)
    with pytest.raises(InputError, match=r"extend is 3: the run is at step 24 of 28; --resume without it"):
        pretrain(Options(resume=str(tmp_path / "other" / "part.pt"), extend=3, **options), {})


def test_the_configuration_of_an_extended_run_is_not_repeated_with_another_schedule(photos, tmp_path, capsys):
    run = tmp_path / "run"
    train(photos, run)
    repeated = ["pretrain", "--config", str(run / "config.yaml"), "--device", "cpu", "--workers", "0"]
    assert main([*repeated, "--draw-every", "0", "--output", str(tmp_path / "again")]) == 0
    assert logged(run) == logged(tmp_path / "again")
    train(None, run, resume="newest", options={"extend": 3})
    assert main([*repeated, "--output", str(tmp_path / "other")]) == 2
    assert "--first-epoch is 2: the run was extended there; remove it for a run with" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*repeated, "--output", str(run), "--resume", "auto"]) == 0
    assert "the run is finished" in capsys.readouterr().out


def test_the_configuration_of_a_run_extends_it(photos, tmp_path, capsys):
    """So does a file that keeps the epochs of before, again and again, as a scheduler repeats its command."""
    run = tmp_path / "run"
    train(photos, run)
    shutil.copy(run / "config.yaml", tmp_path / "before.yaml")
    extend = ["pretrain", "--device=cpu", "--workers=0", "--draw-every=0", "--extend=1", "--output", str(run)]
    for config, resume, epochs in (
        (run / "config.yaml", "newest", 3),
        (run / "config.yaml", "auto", 3),
        (tmp_path / "before.yaml", "auto", 3),
        (run / "config.yaml", "newest", 4),
    ):
        assert main([*extend, "--config", str(config), "--resume", resume]) == 0
        assert f"steps per epoch 4, epochs {epochs}" in capsys.readouterr().out
        assert len(logged(run)) == 4 * epochs
    assert main([*extend, "--config", str(tmp_path / "before.yaml"), "--resume", "newest"]) == 2
    assert "--epochs is 2: the run to resume has 4; leave it out" in capsys.readouterr().err


def test_an_extension_that_was_stopped_goes_on_with_the_same_command(photos, tmp_path, monkeypatch, capsys):
    """A scheduler that starts a run again repeats its command."""
    train(photos, tmp_path / "run")
    place = {"data": str(photos), "output": str(tmp_path / "run"), "device": "cpu", "workers": 0, "draw_every": 0}
    command = Options(resume="auto", extend=3, **place)
    with monkeypatch.context() as patch:
        signal_after(11, patch, signal.SIGTERM)
        assert pretrain(command, {}) == 143
    assert pretrain(command, {}) == 0
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 21))
    assert checkpoint.read(tmp_path / "run" / "last.pt")["recipe"]["epochs"] == 5
    capsys.readouterr()
    assert pretrain(command, {}) == 0
    assert "the run is finished" in capsys.readouterr().out and len(logged(tmp_path / "run")) == 20


@pytest.mark.parametrize("share", [0.25, 0.5, 2])
def test_checkpoints_are_written_every_part_of_an_epoch_or_every_few(photos, tmp_path, share):
    train(photos, tmp_path / "run", options={"save_every": share, "keep": 9})
    steps = [int(path.stem.removeprefix("checkpoint-")) for path in CheckpointFolder(tmp_path / "run").all()]
    assert steps == list(range(int(4 * share), 9, int(4 * share)))


def test_small_data_trains_on_a_few_images_and_keeps_what_was_chosen(photos, tmp_path):
    options = Options(data=str(photos), output=str(tmp_path / "run"), device="cpu", workers=0, small_data=True)
    assert pretrain(options, {"image_size": 64, "epochs": 1}) == 0
    recipe = checkpoint.read(tmp_path / "run" / "last.pt")["recipe"]
    assert (recipe["batch_size"], recipe["base_lr"], recipe["epoch_repeats"], recipe["epochs"]) == (8, 0.03, 55, 1)
    assert pretrain(replace(options, resume="auto"), {"epochs": 1}) == 0


def test_crops_need_not_be_square(photos, tmp_path):
    train(photos, tmp_path / "run", image_size=(64, 96), grn_scope="batch", epochs=1)
    recipe = checkpoint.read(tmp_path / "run" / "last.pt")["recipe"]
    assert (recipe["image_size"], recipe["grn_scope"]) == ((64, 96), "batch")
    assert train(None, tmp_path / "run", resume="newest") == 0


def test_resume_refuses_what_cannot_continue(photos, tmp_path):
    run = tmp_path / "run"
    train(photos, run)
    with pytest.raises(InputError, match=r"output is .*run: holds a run already"):
        train(photos, run)
    newest, older = run / "checkpoint-00000008.pt", run / "checkpoint-00000004.pt"

    with pytest.raises(InputError, match="model is femto: the run to resume has atto"):
        train(photos, run, resume="auto", model="femto")
    with pytest.raises(InputError, match=r"resume is .*00000004.pt: .*run goes on to checkpoint-00000008.pt"):
        train(photos, run, resume=str(older))
    with pytest.raises(InputError, match=r"resume is .*missing.pt: no such file; there are also checkpoint"):
        train(photos, run, resume=str(run / "missing.pt"))

    state = checkpoint.read(newest)
    state["recipe"]["model"] = "femto"
    save_torch(tmp_path / "mixed.pt", state)
    with pytest.raises(
        InputError, match=r"mixed.pt: model\.\S+ is float32 \(16, .*: expected float32 \(24, .* in femto"
    ):
        train(photos, tmp_path / "other", resume=str(tmp_path / "mixed.pt"))

    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"truncated or damaged.*there are also checkpoint-00000004.pt"):
        train(photos, run, resume="auto")

    (photos / "3.png").unlink()
    newest.unlink()
    with pytest.raises(InputError, match="7 image files, not the 8 that the run was started with"):
        train(photos, run, resume="auto")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("change", ["size", "contents"])
def test_images_replaced_under_the_same_names_are_noticed(photos, tmp_path, change):
    train(photos, tmp_path / "run", epochs=1)
    whole = (photos / "3.png").read_bytes()
    middle = len(whole) // 2
    extra = b"" if change == "contents" else b"\0"
    (photos / "3.png").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :] + extra)
    problem = {
        "size": "the same names, but files of other sizes",
        "contents": "the same names and sizes, but files with other contents",
    }
    with pytest.raises(InputError, match=rf"resume is .*photos: {problem[change]} .*; the losses could not continue"):
        train(None, tmp_path / "run", resume="auto")


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_is_not_checked(photos, tmp_path, capsys):
    train(photos, tmp_path / "run")
    state = checkpoint.read(tmp_path / "run" / "checkpoint-00000004.pt")
    del state["data"]["sizes"], state["data"]["contents"], state["recipe"]["max_pixels"]
    torch.serialization.set_crc32_options(False)
    try:
        save_torch(tmp_path / "old.pt", state)
    finally:
        torch.serialization.set_crc32_options(True)
    capsys.readouterr()
    assert train(None, tmp_path / "branch", resume=str(tmp_path / "old.pt")) == 0
    out = capsys.readouterr().out
    assert "old.pt is of an earlier version: changed images under the same names are not noticed" in out
    assert "old.pt holds no checksums: damage to it is not noticed" in out
    assert logged(tmp_path / "branch") == logged(tmp_path / "run")[4:]


def test_a_run_goes_on_in_another_output_and_with_moved_images(photos, tmp_path):
    train(photos, tmp_path / "run")
    moved = photos.rename(tmp_path / "moved")
    older = tmp_path / "run" / "checkpoint-00000004.pt"
    assert train(moved, tmp_path / "branch", resume=str(older)) == 0
    assert logged(tmp_path / "branch") == logged(tmp_path / "run")[4:]


@pytest.mark.parametrize(("field", "value"), [("workers", -1), ("keep", 0), ("save_every", 0), ("device", "tpu")])
def test_options_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}: expected"):
        Options(**{field: value})


@pytest.mark.parametrize("target", ["log", "events"])
def test_a_log_that_cannot_be_written_stops_and_keeps_the_last_good_checkpoint(photos, tmp_path, monkeypatch, target):
    kind = {"log": JsonLines, "events": TensorBoard}[target]
    step = kind.step

    class FullFile:
        def __init__(self, file):
            self.fileno = file.fileno

        def write(self, *arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = write

    def full_at_step_6(callback, record):
        if record.step == 6:
            callback.file = FullFile(callback.file)
        step(callback, record)

    monkeypatch.setattr(kind, "step", full_at_step_6)
    name = {"log": "log.jsonl", "events": "events.out.tfevents"}[target]
    good = "last good checkpoint: .*checkpoint-00000004.pt"
    with pytest.raises(TrainingStopped, match=f"step 6: .*{name}.*No space left on device.*{good}"):
        train(photos, tmp_path / "run")
    assert checkpoint.read(tmp_path / "run" / "last.pt")["step"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_vanish_stop_the_run(photos, tmp_path, monkeypatch, workers):
    batches = Trainer.batches

    def vanish(trainer):
        for file in photos.rglob("*.png"):
            file.unlink()
        return batches(trainer)

    monkeypatch.setattr(Trainer, "batches", vanish)
    with pytest.raises(TrainingStopped, match=r"^step 1: data is .*none of its 8 image files.*no checkpoint yet$"):
        train(photos, tmp_path / "run", workers=workers)


def test_file_names_in_another_encoding(photos, tmp_path, monkeypatch):
    """A terminal that cannot show the names of skipped files gets them escaped, and the run can be resumed."""
    folder = os.fsdecode(os.fsencode(photos) + b"/caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    for name in ("bad", "worse"):
        with open(f"{folder}/{name}.png", "wb") as file:
            file.write(b"no image")
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert train(photos, tmp_path / "run", batch_size=10, epochs=1) == 0
    assert train(None, tmp_path / "run", resume="auto") == 0
    terminal.flush()
    assert rb"skipped unreadable image caf\udce9/bad.png" in terminal.buffer.getvalue()


def test_default_workers_where_affinity_is_unknown(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert loop.default_workers() == 3
