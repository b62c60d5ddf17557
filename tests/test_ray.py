"A sweep on a real cluster of two nodes, one of which is killed in the middle of a run."

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bavq.core.config import RunConfig
from bavq.core.errors import BavqError
from bavq.training.experiments import read_records, run
from bavq.training.images import cache_dir
from bavq.training.sweeps import Ray, Task, attempt_on_cluster, collect, record_outcome, sweep

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    train_size=320,
    codebook_size=16,
    embedding_dim=8,
    hidden_channels=8,
    residual_blocks=1,
    epochs=1,
    batch_size=32,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_machine_is_killed_and_its_run_goes_on(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bavq[ray]'")
    found = runpy.run_path(str(ROOT / "benchmarks" / "recovery.py"))["recover"](tmp_path)
    killed = next(e for e in found["events"] if e["event"] == "machine killed")
    again = [e for e in found["events"] if e["event"] == "started" and e["run"] == killed["run"]]
    assert [e["machine"] == killed["machine"] for e in again] == [True, False]
    assert again[1]["epochs"] >= killed["epochs"] >= 3, "the run was begun anew instead of resumed"
    assert not found["failures"] and found["runs"] == 2
    assert all(found["equal_to_one_machine"].values()), found["equal_to_one_machine"]
    assert not list((tmp_path / "cluster").glob(".sweep-*"))


def test_ray_is_an_extra(tmp_path, monkeypatch):
    "Without Ray the message says what to install; a finished run needs no cluster to be read."
    config = RunConfig(name="one", quantizer="vq_ema", **TINY)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BavqError, match=r"pip install 'bavq\[ray\]'"):
        sweep([config], tmp_path / "runs", progress=False, engine="ray")
    assert not (tmp_path / "runs").exists()
    before = sweep([config], tmp_path / "runs", progress=False)
    assert sweep([config], tmp_path / "runs", progress=False, engine=Ray()) == before


def test_files_of_a_run_travel_where_no_folder_is_shared(tmp_path, monkeypatch, no_repository):
    "A task that does not see the sweep's folder trains elsewhere; `collect` puts the files in place."
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_gpu_ids=list))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config, out = RunConfig(name="one", quantizer="vq_ema", **TINY), tmp_path / "runs"
    before = set((cache_dir() / "sweeps").glob("*"))
    sent = attempt_on_cluster(config, Task(out), out / ".sweep-not-here", 1, Path.cwd())
    for place in set((cache_dir() / "sweeps").glob("*")) - before:
        shutil.rmtree(place)
    assert not out.exists()
    errors = SimpleNamespace(RayError=OSError)
    outcome = collect(SimpleNamespace(get=lambda ref: ref, exceptions=errors), sent, out / "one")
    assert record_outcome(outcome, out, tmp_path / "records", "an arm") == outcome
    assert (outcome.name, outcome.error) == ("one", "")
    assert [r["arm"] for r in read_records(tmp_path / "records")] == ["an arm"]
    assert run(config, out, resume=True) == outcome.metrics
    assert sorted(p.name for p in (out / "one").iterdir() if p.name != ".lock") == sorted(sent[1])
