"A training process that is killed and started again ends where an undisturbed one does, to the bit."

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import bavq.core.storage
from bavq.core import provenance
from bavq.core.config import RunConfig
from bavq.core.errors import BavqError
from bavq.core.storage import read_weights
from bavq.training import experiments
from bavq.training.checkpoints import Training
from bavq.training.experiments import run
from bavq.training.loop import prepare

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
        assert difference(*(read_weights(folder / name) for folder in (whole, killed))) is None


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


def prepared(**changes):
    return prepare(RunConfig(**TINY | changes))


def test_a_changed_encoder_takes_no_old_warm_up(tmp_path, monkeypatch):
    "The name of a kept warm-up follows the source of this package: one other character makes another file."
    copy = shutil.copytree(ROOT / "bavq", tmp_path / "bavq", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "files", lambda name: copy)
    t = prepared(warmup_steps=20)  # an epoch

    def name():
        experiments.source_hash.cache_clear()
        return experiments.warmup_file(t, tmp_path)

    before, networks = name(), copy / "models" / "networks.py"
    assert before and before == name()
    text = networks.read_text(encoding="utf-8")
    networks.write_text(text.replace("class Encoder", "class  Encoder"), encoding="utf-8")
    changed = name()
    networks.write_text(text, encoding="utf-8")
    assert changed != before == name()
    monkeypatch.undo()
    experiments.source_hash.cache_clear()


PLUGIN = """
from torch import nn
from bavq.models.networks import Encoder

class Mine(Encoder):
    def forward(self, x):
        return super().forward(x) * {factor}


"""


def test_a_changed_network_of_ones_own_takes_no_old_warm_up(tmp_path, monkeypatch):
    """A class of another module counts with its file, also where the model only holds it; one whose source is
    nowhere keeps no warm-up. A run that follows the change trains its own."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    for factor in (1, 2):
        (tmp_path / "my_nets.py").write_text(PLUGIN.format(factor=factor))
        sys.modules.pop("my_nets", None)
        importlib.invalidate_caches()
        t = prepared(warmup_steps=20)
        t.model.encoder.__class__ = importlib.import_module("my_nets").Mine
        names.append(experiments.warmup_file(t, tmp_path))
    assert names[0] and names[1] and names[0] != names[1]
    t.model.encoder.__class__ = type("Typed", (type(t.model.encoder),), {"__module__": "nowhere"})
    assert experiments.warmup_file(t, tmp_path) is None


def stop_after(epochs):
    "Ask the run to stop when so many epochs are written."

    def look():
        if len(lines(Path("runs/run"))) == epochs:
            signal.raise_signal(signal.SIGINT)

    return look


def test_a_run_names_all_that_trained_it(tmp_path, monkeypatch):
    """Begun by one commit, gone on with by another: environment.json, the record and the table name both. An
    attempt that is refused leaves environment.json as it was, and one without a checkpoint is not named."""
    monkeypatch.chdir(tmp_path)
    config, inner = RunConfig(name="run", **TINY | dict(warmup_steps=0)), experiments.keep_warmup
    path = Path("runs/run/environment.json")

    def attempt(commit, epochs):
        monkeypatch.setattr(provenance, "ask_git", lambda *words: commit if words[0] == "rev-parse" else "")
        monkeypatch.setattr(experiments, "keep_warmup", lambda t, out: (inner(t, out), stop_after(epochs)()))
        run(config, "runs", resume=True, progress=False, record="study")

    def segments():
        return [(s["commit"], s["epoch"], s["step"]) for s in json.loads(path.read_text())["segments"]]

    with pytest.raises(KeyboardInterrupt):
        attempt("a", 2)
    assert segments() == [("a", 0, 0)]
    with pytest.raises(KeyboardInterrupt):
        attempt("b", 4)
    assert segments()[0] == ("a", 0, 0) and segments()[1][:2] == ("b", 2)
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(Training, "data_fingerprint", "5678")
        with pytest.raises(BavqError, match="the data of .* have changed"):
            attempt("c", 9)
    assert path.read_bytes() == before
    undone = json.loads(before)["segments"][1] | dict(commit="c", epoch=9)  # its checkpoints are lost
    latest = bavq.core.storage.checkpoints(path.parent)[-1]
    state = read_weights(latest)
    state["segments"].append(undone)
    bavq.core.storage.write_weights(latest, state)
    attempt("d", 9)
    assert [s[0] for s in segments()] == ["a", "b", "d"]
    (record,) = experiments.read_records("study")
    assert [s["commit"] for s in record["segments"]] == ["a", "b", "d"]
    assert experiments.load_results("study")["commit"].tolist() == ["a + b + d"]


def test_a_prior_names_all_that_trained_it(tmp_path, monkeypatch):
    "As a run does; and a part of an uncommitted commit keeps a run out of the records."
    made_by = dict(commit="a-dirty", source="1")
    t = prepared()
    experiments.write_environment(made_by, t, tmp_path)
    t.epoch = 3
    experiments.write_environment(made_by | dict(commit="b"), t, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(asdict(t.config)))
    with pytest.raises(BavqError, match="trained by uncommitted code"):
        experiments.make_record(tmp_path)
