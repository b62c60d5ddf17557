"""Killed anywhere and resumed, training ends where an undisturbed run does, to the bit: a dozen of the kills
that tools/kill.py records."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
kill = pytest.importorskip("kill")


@pytest.fixture(autouse=True)
def one_thread():
    "A forked child must not find threads of its parent."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(kill.os, "fork"), reason="needs fork")
def test_a_dozen_kills():
    record = kill.experiment(
        12, seed=1, names=("vq_ema", "gumbel", "maskgit", "ba_vq"), each=3, progress=False
    )
    assert record["kills"] == 12 and not [r for r in record["rows"] if r["difference"]]


def test_the_comparison_sees_one_changed_number(tmp_path):
    folders = [tmp_path / name for name in ("whole", "killed")]
    for f in folders:
        kill.work("transformer", f, "")
    assert kill.compare(*folders) is None
    path = sorted(folders[1].glob("checkpoint_epoch?.pt"))[-1]
    state = kill.read_weights(path)
    next(iter(state["optimizer_state_dict"]["state"].values()))["exp_avg"].view(-1)[0] += 1e-6
    kill.bavq.core.storage.write_weights(path, state)
    assert "optimizer_state_dict" in kill.compare(*folders)
