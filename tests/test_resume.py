"A training process that is killed and started again ends where an undisturbed one does, to the bit."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bavq.core.config import RunConfig
from bavq.core.errors import BavqError
from bavq.core.storage import read_weights
from bavq.training.experiments import run

ROOT = Path(__file__).resolve().parent.parent
PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ENV = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
MAIN = "from bavq.cli import main; main()"
TINY = dict(
    train_size=640,
    quantizer="vq_ema",
    codebook_size=16,
    embedding_dim=8,
    hidden_channels=8,
    residual_blocks=1,
    epochs=6,
    batch_size=32,
    checkpoint_every=2,
    warmup_steps=5,
)


def command(name, out, **more):
    return [
        "train",
        "--name",
        name,
        "--out",
        str(out),
        *(str(a) for k, v in (TINY | more).items() for a in (f"--{k}", v)),
    ]


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *args],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


pytestmark = pytest.mark.usefixtures("one_thread")


def lines(folder):
    path = folder / "history.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in e.items() if k != "seconds"} for e in entries]


def wait_for(process, folder, epochs):
    until = time.time() + 60
    while len(lines(folder)) < epochs:
        assert process.poll() is None and time.time() < until, process.communicate()[1]
        time.sleep(0.005)


def difference(a, b, path=""):
    "Where two checkpoints first differ, or None; times and names may differ."
    if isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) else path
    if not isinstance(a, (dict, list, tuple)):
        return None if a == b else path
    pairs = [x if isinstance(x, dict) else dict(enumerate(x)) for x in (a, b)]
    if pairs[0].keys() != pairs[1].keys():
        return path
    found = (
        difference(pairs[0][k], pairs[1][k], f"{path}/{k}") for k in pairs[0] if k not in ("seconds", "name")
    )
    return next((d for d in found if d), None)


def test_killed_and_resumed_is_undisturbed(tmp_path):
    """Killed in the second epoch, before any checkpoint, and in the fourth, between two; the run's lock goes
    with its process."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(RunConfig(name="whole", **TINY), tmp_path, progress=False)
    for epochs in (1, 3):
        process = start(*command("killed", tmp_path), *["--resume"] * killed.exists())
        wait_for(process, killed, epochs)
        with pytest.raises(BavqError, match="another process is training"):
            run(RunConfig(name="killed", **TINY), tmp_path, resume=True, progress=False)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (killed / "final_metrics.json").exists(), (
            "the run was over before it could be killed: give it more epochs"
        )
    process = start(*command("killed", tmp_path), "--resume")
    assert process.wait(60) == 0, process.communicate()[1]
    process.communicate()
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in killed.iterdir())
    assert lines(whole) == lines(killed) and len(lines(whole)) == 6
    assert (whole / "final_metrics.json").read_text() == (killed / "final_metrics.json").read_text()
    for name in ("final_model.safetensors", "final_model.pt", "checkpoint_epoch4.pt", "checkpoint_epoch6.pt"):
        assert (
            difference(*(read_weights(folder / name) for folder in (whole, killed))) is None
        )


def test_two_processes_train_as_one(tmp_path):
    "Half a batch each: the losses are those of one process, up to rounding."
    (tmp_path / "go.py").write_text(MAIN)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "go.py"),
    ]
    done = subprocess.run(
        [*launch, *command("two", tmp_path, epochs=1)], env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run(RunConfig(name="one", **TINY | dict(epochs=1)), tmp_path, progress=False)
    two, one = lines(tmp_path / "two"), lines(tmp_path / "one")
    for key in ("train_recon_loss", "recon_loss", "psnr"):
        assert two[0][key] == pytest.approx(one[0][key], rel=0.02)
    assert two[0]["bits_fixed"] == one[0]["bits_fixed"]
