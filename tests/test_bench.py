"""The quantizer benchmark, small: it writes what 04_speed reads. What takes how long is no test's
business."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bavq.studies.speed import TIMED, draw_steps, exponent_of, load_bench, ratio, seconds_table

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vector_quantize_pytorch") is None, reason="the peer is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/quantizers.py", "--quick", "--device", "cpu", "--out", out],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_part_is_recorded(folder):
    bench = load_bench(folder)
    assert set(bench) == {"memory", "step", "evaluation", "sampling", "scaling", "aids"}
    for name, part in bench.items():
        assert part["clock"] == "processor" and part["environment"]["versions"]["vector-quantize-pytorch"], (
            name
        )


def test_arms_have_a_second_for_every_round(folder):
    bench = load_bench(folder)
    for seconds in (
        bench["step"]["seconds"],
        bench["scaling"]["latents"]["seconds"],
        bench["scaling"]["dims"]["seconds"],
    ):
        for taken in seconds.values():
            assert set(taken) <= set(TIMED) and all(len(t) == 2 and min(t) > 0 for t in taken.values())
        assert math.isfinite(exponent_of(seconds, "vq_ema"))
        assert all(ratio(taken, "vq_ema", "peer_plain") > 0 for taken in seconds.values())
    assert set(seconds_table(bench["step"]["seconds"])) == set(bench["memory"]["megabytes"])


def test_every_arm_s_memory_was_taken(folder):
    rows = load_bench(folder)["memory"]["megabytes"].values()
    assert all(
        set(row) == set(TIMED) and all(mb is not None and mb >= 0 for mb in row.values()) for row in rows
    )


def test_precision_is_an_island(folder):
    assert load_bench(folder)["aids"]["precision"]["unchanged"]["autocast"] == 1


def test_the_figure_is_drawn(folder):
    assert (folder / "bench.png").stat().st_size > 1000
    assert len(draw_steps(folder).axes) == 2


def test_the_training_loops_have_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import training

    from bavq.training.data import get_dataloaders

    config = training.replace(training.NETWORKS["tiny"], train_size=640)
    config = training.write_files(config, tmp_path)
    files = training.datasets.ImageFolder(tmp_path / "train", training.to_float())
    todo = training.arms(config, get_dataloaders("photos", 64, train_size=640)[0], files)
    found = training.compare_losses(
        {name: training.first_steps(data, epoch) for name, (data, epoch) in todo.items()}
    )  # says where they differ
    assert (
        max(v for name, v in found.items() if name not in training.OTHERS) < training.TOLERANCE
        and found[training.PEER] > 0
    )
