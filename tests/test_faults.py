"""Full disks, folders that cannot be written, data that vanish, clocks that jump, loaders that die, signals,
numbers that are none: each ends in one line, and the run goes on from there to the bit."""

import contextlib
import os
import random
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import get_worker_info

import bavq.core.storage
import bavq.training.checkpoints
import bavq.training.data
import bavq.training.loop
from bavq.cli import main, parse
from bavq.core.config import PriorConfig, RunConfig
from bavq.core.errors import BavqError, DiskError
from bavq.core.storage import (
    Interrupted,
    checkpoints,
    final_weights,
    newest_checkpoint,
    read_history,
    read_weights,
    stop_signals,
    write_json,
)
from bavq.training.data import Batches, epoch_order, get_dataloaders
from bavq.training.experiments import run
from bavq.training.prior_training import Codes, fit_prior

TOLD = [
    *("name", "data", "quantizer", "codebook_size", "embedding_dim", "hidden_channels", "residual_blocks"),
    *("epochs", "batch_size", "checkpoint_every"),
]  # what the command line is given of it
TINY = RunConfig(
    name="run",
    data="images.npz",
    quantizer="vq_ema",
    codebook_size=8,
    embedding_dim=4,
    hidden_channels=4,
    residual_blocks=0,
    epochs=3,
    batch_size=16,
    checkpoint_every=1,
)
CODES = Codes(
    *[np.random.default_rng(0).integers(0, 16, (64, 4, 4), dtype=np.uint8)] * 2,
    *[np.arange(64) % 3] * 2,
    16,
    num_classes=3,
    model="0" * 64,
)
PRIOR = PriorConfig("maskgit", channels=16, layers=1, epochs=3, batch_size=16)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    x = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    np.savez("images.npz", train=x[:64], test=x[64:])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(v, b[k]) for k, v in a.items() if k not in ("seconds", "name")
        )
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def undisturbed(train, folder):
    "Train the run in another folder, without a fault, and compare everything it wrote."
    train(Path("whole"))
    assert not [p for p in folder.iterdir() if p.name.endswith(".part")]
    return (
        same(newest_checkpoint(folder), newest_checkpoint(Path("whole")))
        and same(read_history(folder), read_history("whole"))
        and same(read_weights(folder / "final_model.pt"), read_weights("whole/final_model.pt"))
        and same(read_weights(final_weights(folder)), read_weights(final_weights("whole")))
    )


def train(folder=Path("run"), config=TINY):
    return run(replace(config, name=folder.name), folder.parent, resume=True, progress=False)


def train_prior(folder=Path("prior")):
    return fit_prior(PRIOR, CODES, folder, resume=True, progress=False)


@contextlib.contextmanager
def at_batch(number, do):
    "Call a function when the training batch of this number is taken, counted over all epochs."
    inner, count = Batches.__iter__, [0]

    def outer(self):
        for batch in inner(self):
            count[0] += self.train
            if self.train and count[0] == number:
                batch = do(batch) or batch
            yield batch

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Batches, "__iter__", outer)
        yield


# Asked to stop


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_and_the_run_goes_on_to_the_bit(number, code, capsys):
    """Ctrl-C and a cluster's preemption, as the third batch of the second epoch is taken; Jupyter's stop
    button is the first of them."""
    args = ["train", *(f"--{k}={getattr(TINY, k)}" for k in TOLD), "--out", "."]
    with at_batch(7, lambda batch: signal.raise_signal(number)), pytest.raises(SystemExit) as e:
        main(args)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == code and "stopped in epoch 2 after step 2 of 4" in said and "--resume" in said
    assert [p.name for p in checkpoints(Path("run"))] == [
        "checkpoint_epoch1.pt",
        "checkpoint_epoch1_step2.pt",
    ]
    main([*args, "--resume"])
    assert undisturbed(train, Path("run"))


def test_a_stopped_command_says_how_to_go_on(monkeypatch, capsys):
    "Only what can go on is said to."
    said = {}
    for folder in ("run", "a"):  # paths are checked before anything starts
        Path(folder).mkdir()
    Path("run/config.json").write_text("{}")

    def interrupted(self):
        raise KeyboardInterrupt

    for words in ("compare", "prior train run", "prior sample run", "compress run a b", "evaluate run"):
        monkeypatch.setattr(type(parse(words.split())), "__call__", interrupted)
        with pytest.raises(SystemExit) as e:
            main(words.split())
        said[words] = capsys.readouterr().err.strip()
        assert e.value.code == 130
    assert said["compare"].endswith("the same command goes on") and said["prior train run"].endswith(
        "with --resume goes on"
    )
    assert (
        said["compress run a b"].endswith("the same command goes on")
        and said["evaluate run"] == said["prior sample run"] == "bavq: stopped"
    )


def test_a_prior_that_is_asked_to_stop_goes_on_to_the_bit():
    inner = bavq.training.loop.LossMeter.update

    def update(self, *args, **options):
        inner(self, *args, **options)
        if self.steps == 3 and not checkpoints(Path("prior")):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(bavq.training.loop.LossMeter, "update", update)
        with pytest.raises(Interrupted, match="after step 3 of 4"):
            train_prior()
    assert [p.name for p in checkpoints(Path("prior"))] == ["checkpoint_epoch0_step3.pt"]
    train_prior()
    assert undisturbed(train_prior, Path("prior"))


def test_a_second_signal_does_not_wait():
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process in the background may ignore it
    with pytest.raises(KeyboardInterrupt), stop_signals():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_in_another_thread_signals_are_left_alone():
    found = []
    thread = threading.Thread(target=lambda: [found.append(asked) for asked in [stop_signals().__enter__()]])
    thread.start()
    thread.join()
    assert found == [[]]


def test_long_epochs_are_saved_within(monkeypatch):
    "A checkpoint is due by the clock, not only by the epoch."
    monkeypatch.setattr(bavq.training.checkpoints, "SAVE_EVERY", 0)
    with at_batch(8, lambda batch: (_ for _ in ()).throw(MemoryError())), pytest.raises(MemoryError):
        train()
    assert [p.name for p in checkpoints(Path("run"))] == [
        "checkpoint_epoch1_step1.pt",
        "checkpoint_epoch1_step2.pt",
    ]
    train()
    monkeypatch.setattr(bavq.training.checkpoints, "SAVE_EVERY", 600)
    assert undisturbed(train, Path("run"))


# Disks and folders


@contextlib.contextmanager
def small_disk(size):
    "No file may grow larger: the same errors as on a full disk, from the operating system itself."
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 5000, 20_000])
def test_a_full_disk_ends_in_one_line_and_spoils_nothing(size):
    train(config=replace(TINY, epochs=3, name="run"))
    shutil.rmtree("run")
    with at_batch(5, lambda batch: limit.__enter__() and None):
        limit = small_disk(size)
        try:
            with pytest.raises(DiskError, match="cannot be written") as e:
                train()
        finally:
            limit.__exit__(None, None, None)
    assert "\n" not in str(e.value) and not [p for p in Path("run").iterdir() if p.name.endswith(".part")]
    assert newest_checkpoint(Path("run"))["epoch"] == 1
    train()
    assert undisturbed(train, Path("run"))


@pytest.mark.parametrize("error", [28, 122, 5])
def test_a_disk_that_fails_at_the_last_moment(error, monkeypatch, tmp_path):
    "No space, over quota, input/output error, when the bytes are to reach the disk: the old file stays."
    path = write_json(tmp_path / "a.json", 1)

    def fail(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match=os.strerror(error)):
        write_json(path, 2)
    assert path.read_text() == "1\n" and [p.name for p in tmp_path.glob(".*")] == []


def test_a_folder_that_cannot_be_written(monkeypatch, here):
    for out in ("images.npz/runs", "/proc/bavq"):
        with pytest.raises(BavqError) as e:
            run(TINY, out, progress=False)
        assert "\n" not in str(e.value)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    inner = os.open

    def open_old(path, flags, *more):
        return refuse() if flags & os.O_EXCL else inner(path, flags, *more)

    monkeypatch.setattr(os, "open", open_old)
    with pytest.raises(DiskError, match="Permission denied"):
        run(TINY, here, progress=False)
    assert not list(Path("run").glob("c*"))


# Data


def test_a_vanished_data_set_is_named_and_the_run_goes_on_when_it_is_back():
    with at_batch(6, lambda batch: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in Path("run").iterdir() if p.name != ".lock")
    os.rename("images.npz", "elsewhere.npz")
    with pytest.raises(BavqError, match="there is no file images.npz"):
        train()
    assert before == sorted(
        (p.name, p.stat().st_mtime_ns) for p in Path("run").iterdir() if p.name != ".lock"
    )
    os.rename("elsewhere.npz", "images.npz")
    train()
    assert undisturbed(train, Path("run"))


def test_other_data_under_the_same_name_are_refused_and_the_run_goes_on_with_its_own(monkeypatch):
    "The checkpoint knows the fingerprint of its data set."

    def now(fingerprint):
        monkeypatch.setattr(bavq.training.checkpoints.Training, "data_fingerprint", fingerprint)

    now("1234")
    with at_batch(6, lambda batch: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train()
    now("5678")
    with pytest.raises(BavqError, match="the data of run have changed .fingerprint 1234, now 5678") as e:
        train()
    assert "\n" not in str(e.value)
    now("1234")
    train()
    assert undisturbed(train, Path("run"))


@pytest.fixture
def streamed(monkeypatch):
    "A folder of pictures, decoded anew in every epoch by a loader process."
    x = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(x):
        path = Path("pictures", "test" if i >= 32 else "train", "a", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    monkeypatch.setattr(bavq.training.loop, "get_dataloaders", partial(get_dataloaders, memory_limit=0))
    return replace(TINY, data="pictures", workers=1, epochs=2, batch_size=8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_loader_process_ends_in_one_line_and_the_run_goes_on(streamed, monkeypatch):
    inner, flag = bavq.training.data.read_image, Path("kill it").resolve()

    def deadly(path, size=0):
        if get_worker_info() and flag.exists() and checkpoints(flag.parent / "run"):
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(path, size)

    monkeypatch.setattr(bavq.training.data, "read_image", deadly)
    flag.touch()
    with pytest.raises(BavqError, match="a loader process was killed") as e:
        train(config=streamed)
    assert (
        "stopped in epoch 2" in str(e.value)
        and "checkpoint_epoch1.pt" in str(e.value)
        and "\n" not in str(e.value)
    )
    go_on = partial(train, config=streamed)
    go_on()
    assert undisturbed(go_on, Path("run"))


def test_a_picture_that_vanishes_while_training_is_named(streamed):
    config = replace(streamed, workers=0)
    with (
        at_stream(6, lambda: shutil.move("pictures/train", "gone")),
        pytest.raises(BavqError, match="cannot be read") as e,
    ):
        train(config=config)
    assert "stopped in epoch 2" in str(e.value) and "pictures/train" in str(e.value)
    shutil.move("gone", "pictures/train")
    go_on = partial(train, config=config)
    go_on()
    assert undisturbed(go_on, Path("run"))


@contextlib.contextmanager
def at_stream(number, do):
    inner, count = bavq.training.loop.LossMeter.update, [0]

    def update(self, losses, *args, **options):
        count[0] += "norm" in options
        if count[0] == number:
            count[0] += 1
            do()
        return inner(self, losses, *args, **options)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(bavq.training.loop.LossMeter, "update", update)
        yield


# Clocks


def test_clocks_may_jump(monkeypatch):
    """The wall clock goes anywhere, files are dated anyhow: what is trained, and from where it goes on, does
    not depend on it."""
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    with at_batch(10, lambda batch: signal.raise_signal(signal.SIGINT)), pytest.raises(Interrupted):
        train()
    for p in checkpoints(Path("run")):
        os.utime(p, (rng.uniform(0, 4e9),) * 2)
    train()
    assert all(h["seconds"] >= 0 for h in read_history("run"))
    assert undisturbed(train, Path("run"))


# Numbers


@pytest.mark.parametrize("number", [6, 8])
def test_a_step_that_is_not_finite_is_named_with_its_images_and_the_last_checkpoint(number):
    """Not a number in a batch of the second epoch: step, first images and checkpoint are in the message;
    nothing is written."""
    with (
        at_batch(number, lambda batch: (batch[0] * float("nan"), batch[1])),
        pytest.raises(BavqError, match="stopped in epoch 2") as e,
    ):
        train()
    step = number - 5
    first = epoch_order(64, TINY.seed, 1)[16 * step :][:3].tolist()
    assert f"step {step + 1} of 4, images {first[0]}, {first[1]}, {first[2]}" in str(
        e.value
    ) and "checkpoint_epoch1.pt" in str(e.value)
    assert len(read_history("run")) == 1 and newest_checkpoint(Path("run"))["epoch"] == 1
    train()
    assert undisturbed(train, Path("run"))


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    inner = torch.nn.utils.clip_grad_norm_

    def endless(*args, **options):
        return inner(*args, **options) * float("inf")

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda self, *a, **o: endless(*a))
    with pytest.raises(BavqError, match="step 1 of 4, images .* the loss or its gradient is not finite"):
        train()


def test_nothing_is_asked_of_the_device_at_every_step():
    "The counts of good steps stay on the device: on one without values, nothing fails."
    meter, one = bavq.training.loop.LossMeter(), torch.ones((), device="meta")
    for _ in range(3):
        meter.update(dict(loss=one), norm=one)
    assert meter.steps == 3 and meter.good.device.type == "meta"


# What belongs to the whole process


def test_new_files_get_the_rights_that_any_file_gets(monkeypatch, tmp_path):
    "The process's umask holds, and is never touched: another thread may be writing a file."
    before = os.umask(0o027)

    def touched(mask):
        raise AssertionError("the umask was set")

    try:
        monkeypatch.setattr(os, "umask", touched)
        assert write_json(tmp_path / "a.json", 1).stat().st_mode & 0o777 == 0o640
    finally:
        monkeypatch.undo()
        os.umask(before)


def test_overlapping_downloads_put_the_time_limit_back():
    "The second begins within the first and ends after it: the process's limit is what it was."
    within, tried, first_is_over = (threading.Event() for _ in range(3))

    def first():
        with bavq.core.storage.patient_for(10):
            within.set()
            tried.wait(5)
            time.sleep(0.2)  # the second is in its block by now, if it can be
        first_is_over.set()

    def second():
        within.wait(5)
        tried.set()
        with bavq.core.storage.patient_for(20):
            first_is_over.wait(5)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    left = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    assert left is None


def test_accelerate_is_left_as_it_was():
    "Of another precision and number of steps, and used before, while and after a run trains."
    yours = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    before = dict(vars(yours.state)), dict(vars(yours.gradient_state))
    train()
    train_prior()
    assert (dict(vars(yours.state)), dict(vars(yours.gradient_state))) == before
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_final_weights_of_both_forms_are_one():
    "Equal to the bit, and in the order of the model; where one form is missing, the other is read."
    train()
    safe, pickled = (Path("run") / name for name in bavq.core.storage.FINAL_WEIGHTS)
    a, b = read_weights(safe), read_weights(pickled)
    assert list(a) == list(b) and same(a, b)
    assert final_weights("run") == safe and bavq.core.storage.config_in_weights(safe)["codebook_size"] == 8
    data = bytearray(safe.read_bytes())
    data[-1] ^= 1
    safe.write_bytes(data)
    with pytest.raises(BavqError, match="final_model.safetensors cannot be read"):
        bavq.training.checkpoints.load_model("run")
    safe.unlink()
    assert bavq.training.checkpoints.load_model("run")[1] == TINY
