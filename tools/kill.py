#!/usr/bin/env python3
"""Kill training at random moments, resume it, and compare with a run that was left alone: python
tools/kill.py --kills 200

A run is killed by SIGKILL up to ten times, wherever it is, then left to end; everything it wrote must equal
the files of the undisturbed run, to the bit, times excepted. Half of the kills come after a random time, half
a random time after the process began to write a checkpoint, and writes are slowed down, so that many land
inside one. To afford hundreds of them, this process imports torch once and forks a child for every attempt;
`--fresh` of the kills are dealt to new interpreters instead."""

import argparse
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
import accelerate.scheduler  # noqa: F401  (imported here, so that no child has to)
import numpy as np
import sklearn.cluster  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import tqdm.auto  # noqa: F401

import bavq.core.storage
import bavq.training.checkpoints
import bavq.training.loop
import bavq.training.prior_training
from bavq.core.config import PriorConfig, RunConfig
from bavq.core.provenance import environment
from bavq.core.storage import read_history, read_weights, write_json
from bavq.training.experiments import run
from bavq.training.prior_training import Codes, fit_prior

PLACES = [
    "starting",
    "restoring",
    "training",
    "validating",
    "writing a checkpoint",
    "renaming a checkpoint",
    "after a checkpoint",
    "writing another file",
]
TINY = dict(
    codebook_size=16,
    embedding_dim=8,
    hidden_channels=8,
    residual_blocks=1,
    epochs=3,
    batch_size=16,
    checkpoint_every=1,
    lr=3e-3,
)
RUNS = {  # name: what is trained
    "vq_ema": RunConfig(quantizer="vq_ema", warmup_steps=3, **TINY),
    "ba_vq": RunConfig(quantizer="ba_vq", cooldown=0.5, **TINY),
    "vq": RunConfig(quantizer="vq", options={"gradient": "rotation"}, **TINY),
    "gumbel": RunConfig(quantizer="gumbel", **TINY),
    "residual": RunConfig(quantizer="residual", options={"levels": "4,4", "dropout": "0.5"}, **TINY),
    "two levels": RunConfig(quantizer="vq_ema", levels=2, **TINY),
    "transformer": PriorConfig("transformer", channels=16, layers=1, epochs=3, batch_size=16),
    "pixelcnn": PriorConfig(
        "pixelcnn", channels=16, layers=1, epochs=3, batch_size=16, class_conditional=False
    ),
    "maskgit": PriorConfig("maskgit", channels=16, layers=1, epochs=3, batch_size=16),
}


def images(folder):
    "A file of small images, for the autoencoders."
    x = np.random.default_rng(0).integers(0, 256, (128, 3, 16, 16), dtype=np.uint8)
    np.savez(folder / "images.npz", train=x[:96], test=x[96:])
    return str(folder / "images.npz")


def codes():
    "Grids of codes, for the priors."
    rng = np.random.default_rng(0)
    grids, labels = rng.integers(0, 16, (128, 4, 4), dtype=np.uint8), rng.integers(0, 3, 128)
    return Codes(grids[:96], grids[96:], labels[:96], labels[96:], 16, num_classes=3, model="0" * 64)


def work(name, folder, data):
    "Train, or go on with, one of `RUNS`; returns when it has ended."
    torch.set_num_threads(1)
    config = RUNS[name]
    if isinstance(config, PriorConfig):
        return fit_prior(config, codes(), folder, resume=True, progress=False)
    return run(replace(config, name=folder.name, data=data), folder.parent, resume=True, progress=False)


def mark(module, function, place, where, slow=0.0):
    "Note in shared memory that the process is inside a function."
    inner = getattr(module, function)

    def outer(*args, **options):
        before, where[0] = where[0], place(before := where[0]) if callable(place) else place
        if slow:
            time.sleep(slow)
        result = inner(*args, **options)
        where[0] = before if function != "restore" else 2
        return result

    setattr(module, function, outer)


def instrument(where, slow):
    "Say where the process is, write slowly, and write a checkpoint every few steps."
    bavq.training.checkpoints.SAVE_EVERY = 0.01
    modules = bavq.training.checkpoints, bavq.training.loop, bavq.training.prior_training
    for module in modules:
        for function in ("write_json", "write_history", "write_weights"):
            if hasattr(module, function):
                mark(module, function, lambda now: 4 if now in (4, 6) else 7, where)
        mark(module, "save_checkpoint", 6, where)
        if hasattr(module, "restore_state"):
            mark(module, "restore_state", 1, where)
        if hasattr(module, "rest_of_epoch"):
            mark(module, "rest_of_epoch", 2, where)
    mark(bavq.training.loop, "validate", 3, where)
    mark(bavq.training.prior_training, "bits_per_code", 3, where)
    mark(bavq.core.storage._ErrorKeeper, "write", lambda now: now, where, slow)
    mark(os, "replace", lambda now: 5 if now == 4 else now, where, slow)


def attempt(name, folder, data, rng, kill, slow):
    "Fork a child that trains; where it was killed, or None where it ended by itself."
    where = mmap.mmap(-1, 1)
    where[0] = 0
    if not (pid := os.fork()):
        code = 1
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            instrument(where, slow)
            work(name, folder, data)
            code = 0
        finally:
            os._exit(code)
    return strike(pid, where, rng, kill)


def strike(pid, where, rng, kill):
    """Kill a process, at a time or a while after it began to write a checkpoint; where it was, or None where
    it had ended."""
    if kill:
        until = time.monotonic() + rng.uniform(0, kill)
        while time.monotonic() < until and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)
        if rng.random() < 0.5:  # and then wait for the next checkpoint
            while where[0] != 4 and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.0001)
            time.sleep(rng.uniform(0, 0.02))
        place = where[0]
        os.kill(pid, signal.SIGKILL)
        place = where[0]  # it stands still now
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return PLACES[place]
    assert os.WEXITSTATUS(status) == 0, "the process failed: run it alone to see why"


def fresh(name, folder, data, rng, kill):
    "The same in a new interpreter, whose import of torch counts as starting."
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import kill;"
        f" kill.bavq.training.checkpoints.SAVE_EVERY = 0.01; print('ready', flush=True); kill.work({name!r},"
        f" kill.Path({str(folder)!r}), {data!r})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout.readline() == "ready\n"
    try:
        child.wait(rng.uniform(0, kill))
        return None
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return "in a new interpreter"


def difference(a, b, path=""):
    "Where two checkpoints first differ, or None; times and names may differ."
    if isinstance(a, torch.Tensor):
        return None if torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b) else path
    if not isinstance(a, (dict, list, tuple)):
        return None if a == b else path
    pairs = [x if isinstance(x, dict) else dict(enumerate(x)) for x in (a, b)]
    if pairs[0].keys() != pairs[1].keys():
        return path
    found = (
        difference(pairs[0][k], pairs[1][k], f"{path}/{k}") for k in pairs[0] if k not in ("seconds", "name")
    )
    return next((d for d in found if d), None)


def compare(whole, killed):
    """What differs between the folders of two finished runs: weights, optimizer, buffers, generators,
    history, metrics; None if nothing."""
    last = sorted(whole.glob("checkpoint_epoch?.pt"))[-1].name
    for name in ("final_model.safetensors", "final_model.pt", last):
        if d := difference(read_weights(whole / name), read_weights(killed / name)):
            return f"{name}{d}"
    if d := difference(read_history(whole), read_history(killed)):
        return f"history{d}"
    if (whole / "final_metrics.json").read_text() != (killed / "final_metrics.json").read_text():
        return "final_metrics.json"
    left = [p.name for p in killed.iterdir() if p.name.endswith(".part")]
    return f"left behind: {', '.join(left)}" if left else None


def experiment(kills, seed=0, names=tuple(RUNS), fresh_kills=0, each=10, progress=True):
    "Kill until there are enough; a record of every run."
    rng, rows, done, began = random.Random(seed), [], 0, time.perf_counter()
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as tmp:  # in memory: the disk is not on trial
        tmp = Path(tmp)
        data, length = images(tmp), {}
        for name in names:  # the undisturbed runs, and how long one takes
            t = time.monotonic()
            assert attempt(name, tmp / f"whole {name}", data, rng, 0, 0.0) is None
            length[name] = time.monotonic() - t
        while done < kills:
            name, folder, places = names[len(rows) % len(names)], tmp / f"killed {len(rows)}", []
            new = fresh_kills > sum(r["places"].count("in a new interpreter") for r in rows)
            for _ in range(min(3 if new else each, kills - done)):
                place = (
                    fresh(name, folder, data, rng, 1.5 * length[name])
                    if new
                    else attempt(name, folder, data, rng, length[name], 0.001)
                )
                if place is None:
                    break
                places.append(place)
            attempt(name, folder, data, rng, 0, 0.0)
            rows.append(dict(run=name, places=places, difference=compare(tmp / f"whole {name}", folder)))
            done += len(places)
            if progress:
                print(
                    f"{done} kills, {len(rows)} runs: {name} {rows[-1]['difference'] or 'equal'}", flush=True
                )
    counts = Counter(p for r in rows for p in r["places"])
    return dict(
        kills=done,
        runs=len(rows),
        equal=sum(r["difference"] is None for r in rows),
        places=dict(counts.most_common()),
        seed=seed,
        seconds=round(time.perf_counter() - began, 1),
        **environment(),
        rows=rows,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--fresh", type=int, default=12, help="of them in new interpreters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="a JSON file; empty: only print")
    o = parser.parse_args()
    record = experiment(o.kills, o.seed, fresh_kills=o.fresh)
    if o.out:
        write_json(o.out, record)
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1))
    sys.exit(record["equal"] != record["runs"])
