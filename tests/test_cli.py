"The command `bavq`: mistakes end with one line and exit code 2 and leave nothing behind."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bavq.cli import main, parse
from bavq.core.config import RunConfig
from bavq.core.errors import BavqError
from bavq.training.experiments import read_records
from bavq.training.sweeps import sweep

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--data images.npz --codebook_size 8 --embedding_dim 4 --hidden_channels 4 --residual_blocks 0 --epochs 1"
    " --batch_size 32".split()
)

BAD = {
    "trian": "trian",
    "train --codebok_size 5": "--codebok_size",
    "train --epochs three": "three",
    "train --epochs 2.5": "2.5",
    "train --epochs 0": "epochs is 0",
    "train --codebook-size 1": "codebook_size is 1",
    "train --batch-size 0": "batch_size is 0",
    "train --batch_size 10000000": "batch_size is 10000000",
    "train --lr -1": "lr is -1.0",
    "train --lr nan": "lr is nan",
    "train --precision fp8": "unknown precision",
    "train --quantizer vq_emma": "unknown quantizer",
    "train --options gamma 1": "gamma",
    "train --options distance": "key-value pairs",
    "train --options distance manhattan": "unknown distance",
    "train --data fotos": "unknown data set",
    "train --data no/such/folder": "no/such/folder",
    "train --data missing.npz": "missing.npz",
    "train --name a/b": "name is 'a/b'",
    "train --preset fast": "unknown preset",
    "train --config missing.yaml": "missing.yaml",
    "train --config broken.yaml": "broken.yaml is not YAML",
    "train --config list.yaml": "list.yaml holds no names",
    "train --config key.yaml": "unknown configuration key 'epoch'",
    "compare --preset fast": "unknown preset",
    "compare --data images.npz": "train_size is 6400",
    "compare --seeds -1": "seeds is -1",
    "compare --jobs -1": "jobs is -1",
    "compare --epochs -1": "epochs is -1",
    "evaluate": "runs",
    "evaluate nowhere": "nowhere",
    "summarise nowhere": "there is no folder nowhere",
    "summarise .": "no finished run",
}


def bavq(capsys, *args):
    "Exit code, stdout and stderr."
    code = 0
    try:
        main(list(args))
    except SystemExit as e:
        code = e.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    images = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images[:64], test=images[64:])
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "key.yaml").write_text("epoch: 3\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("args", BAD)
def test_mistakes(args, here, capsys):
    before = sorted(p.name for p in here.rglob("*"))
    code, out, err = bavq(capsys, *args.split())
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("bavq: ") and "Traceback" not in err, (
        err
    )
    assert BAD[args] in err, err
    assert sorted(p.name for p in here.rglob("*")) == before


def test_help(capsys):
    for args in ([], ["--help"], ["train", "--help"]):
        code, out, err = bavq(capsys, *args)
        assert code == 0 and "usage: bavq" in out and err == ""


def test_a_run_from_start_to_summary(here, capsys):
    """Train from a file, refuse the name, resume, evaluate, summarise; dashes and underscores; --debug shows
    where."""
    (here / "c.yaml").write_text("quantizer: vq_ema\nlr: 1e-3\nseed: 3\n")
    train = ["train", "--config", "c.yaml", "--name", "one", *TINY]
    code, out, err = bavq(capsys, *train)
    assert code == 0, err
    config = json.loads(Path("experiments/one/config.json").read_text())
    assert (config["quantizer"], config["lr"], config["seed"], config["codebook_size"]) == (
        "vq_ema",
        1e-3,
        3,
        8,
    )
    code, _, err = bavq(capsys, *train)
    assert code == 2 and "there already: resume it" in err
    code, _, err = bavq(capsys, *train, "--resume", "--codebook-size", "16", "--no-wandb")
    assert code == 2 and "codebook_size 8, now 16" in err
    assert bavq(capsys, *train, "--resume", "--no_wandb")[0] == 0
    code, out, err = bavq(capsys, "evaluate", "experiments/one", "--judges", "", "--out", "judged")
    assert code == 0, err
    final = json.loads(Path("experiments/one/final_metrics.json").read_text())
    assert json.loads(Path("judged/evaluation.json").read_text())["runs"]["one"]["metrics"][
        "psnr"
    ] == pytest.approx(final["psnr"], abs=1e-3)
    code, out, _ = bavq(capsys, "summarise")
    assert code == 0 and "vq_ema" in out and f"{final['psnr']:.2f}" in out
    with pytest.raises(ValueError):
        main([*train, "--debug"])


def test_resuming_what_is_not_there_names_what_is(here, capsys):
    "A mistyped name starts no second run, and leaves nothing behind; nor does a mistyped prior."
    assert bavq(capsys, "train", "--name", "first", *TINY)[0] == 0
    code, _, err = bavq(capsys, "train", "--name", "frist", *TINY, "--resume")
    assert code == 2 and "no run frist to resume in experiments (there are first)" in err, err
    code, _, err = bavq(capsys, "prior", "train", "experiments/first", *PRIOR, "--resume")
    assert code == 2 and "no run maskgit to resume in experiments/first/priors (none is there)" in err, err
    assert sorted(p.name for p in Path("experiments").iterdir()) == ["first"]
    assert bavq(capsys, "train", "--name", "first", *TINY, "--resume")[0] == 0


THREADS = """
import sys
from bavq.cli import main
sys.argv = ["bavq", *sys.argv[1:]]
assert "torch" not in sys.modules
main()
"""


def test_threads_sleep_while_they_wait(here):
    "OpenMP reads the policy when torch is loaded: it is set before, and said; the user's own choice stands."
    free = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    args = [sys.executable, "-c", THREADS + "import os; print(os.environ.get('OMP_WAIT_POLICY'))"]
    args += ["train", "--name", "run", *TINY]
    for chosen, policy, said in (({}, "PASSIVE", True), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", False)):
        more = ["--out", policy]
        done = subprocess.run([*args, *more], env=free | chosen, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[-1] == policy and ("asleep while they wait" in done.stderr) == said


PRIOR = "--kind maskgit --epochs 1 --channels 16 --layers 1 --batch_size 16".split()


def test_folders_that_hold_more_than_plain_runs(here, capsys):
    """Priors among the runs, a run of two levels, names with a point, images smaller than SSIM's window: each
    verb takes what it can and names the rest."""
    assert bavq(capsys, "train", "--name", "lr0.1", *TINY)[0] == 0
    assert bavq(capsys, "train", "--name", "two", "--levels", "2", *TINY)[0] == 0
    assert bavq(capsys, "prior", "train", "experiments/lr0.1", *PRIOR)[0] == 0
    code, out, err = bavq(
        capsys, "evaluate", "experiments", "--judges", "", "--out", "judged", "--baseline", "lr0.1"
    )
    assert code == 0 and "two is left out: VQVAE2 has two levels" in out, err
    assert list(json.loads(Path("judged/evaluation.json").read_text())["runs"]) == ["lr0.1"]
    code, out, err = bavq(capsys, "evaluate", "experiments", "--judges", "", "--baseline", "lr0.2")
    assert code == 2 and not out and "unknown run 'lr0.2'" in err
    code, out, err = bavq(capsys, "summarise", "experiments")
    assert code == 0 and "ba_vq" in out, err
    code, _, err = bavq(capsys, "prior", "train", "experiments/lr0.1", "--name", "../../x", *PRIOR)
    assert code == 2 and "is one folder name" in err and not Path("experiments/x").exists()
    os.chdir("experiments/lr0.1/priors/maskgit")
    code, _, err = bavq(capsys, "prior", "sample", ".", "--n", "1")  # a grid of 16 codes, and eight passes
    assert code == 0 and Path("samples.png").exists(), err
    code, _, err = bavq(capsys, "prior", "sample", ".", "--n", "0")
    assert code == 2 and "n is 0" in err


def test_damaged_records_are_named(here, capsys):
    assert bavq(capsys, "train", "--name", "one", *TINY)[0] == 0
    for name, text in (
        ("config.json", "{}"),
        ("config.json", "[1]"),
        ("final_metrics.json", "{}"),
        ("final_metrics.json", "[]"),
    ):
        path = Path("experiments/one") / name
        kept = path.read_text()
        path.write_text(text)
        code, out, err = bavq(capsys, "summarise", "experiments")
        assert (code == 2 and len(err.splitlines()) == 1) or (
            code == 0 and text == "{}" and name == "config.json"
        ), (name, text, err)
        path.write_text(kept)


def test_sweep_in_processes(here, no_repository):
    "Two runs at a time in processes of their own; then the same command has nothing left to do."
    base = RunConfig(
        data="images.npz",
        codebook_size=8,
        embedding_dim=4,
        hidden_channels=4,
        residual_blocks=0,
        epochs=1,
        batch_size=32,
    )
    configs = [base, replace(base, quantizer="vq_ema"), replace(base, name="bad", lr=1e30, epochs=2)]
    result = sweep(configs, "runs", record="results", jobs=2, progress=False)
    assert len(result.metrics) == 2 and "stopped in epoch 1" in result.failures["bad"]
    assert [r["schema"] for r in read_records("results")] == [1, 1]
    assert sweep(configs[:2], "runs", progress=False).metrics == result.metrics


MINE = """
from bavq.quantizers.vq_ema import VQEMAQuantizer

class Slow(VQEMAQuantizer):
    def __init__(self, num_embeddings: int, embedding_dim: int, decay: float = 0.999):
        super().__init__(num_embeddings, embedding_dim, decay=decay)
"""


def test_a_quantizer_of_your_own(here, capsys, monkeypatch):
    "A class in the folder where one works: from the command line, and in the processes of a sweep."
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "mine.py").write_text(MINE)
    code, _, err = bavq(capsys, "train", "--quantizer", "mine:Slow", "--name", "one", *TINY)
    assert code == 0, err
    made_by = json.loads(Path("experiments/one/environment.json").read_text())
    assert made_by["arguments"]["decay"] == 0.999 and list(made_by["plugins"]) == ["mine"]
    base = RunConfig(**json.loads(Path("experiments/one/config.json").read_text()))
    result = sweep([replace(base, name=f"run {s}", seed=s) for s in (0, 1)], "runs", jobs=2, progress=False)
    assert not result.failures and len(result.metrics) == 2
    assert result.metrics["run 0"] == json.loads(Path("experiments/one/final_metrics.json").read_text())
    code, _, err = bavq(capsys, "train", "--quantizer", "nobody:Slow", "--name", "two", *TINY)
    assert code == 2 and "nobody" in err and len(err.splitlines()) == 1
    sys.modules.pop("mine", None)


def test_the_records_of_a_study(tmp_path):
    "A record of the future or a damaged line is named; a study that is there is not touched."
    path = tmp_path / "study.jsonl"
    for line in ('{"run": "a", "schema": 2, "config": {}, "metrics": {}}', '{"run": ', "[1]", '{"run": "a"}'):
        path.write_text(line + "\n")
        with pytest.raises(BavqError, match="line 1"):
            read_records(path)
        assert path.read_text() == line + "\n"
    assert read_records(tmp_path / "none") == []


def test_offline_tracking(here):
    "Weights & Biases, offline, logs into the run's folder."
    pytest.importorskip("wandb")
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    code = "from bavq.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--wandb", "--name", "tracked", *TINY]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(Path("experiments/tracked/wandb").glob("offline-run-*/*.wandb"))
    assert sorted(p.name for p in here.iterdir()) == [
        "broken.yaml",
        "experiments",
        "images.npz",
        "key.yaml",
        "list.yaml",
    ]


def test_options_of_a_file_and_of_the_command_line_come_together(here):
    "Also where an option is called like a field, such as levels."
    Path("c.yaml").write_text("quantizer: residual\noptions: {levels: '4,4', decay: 0.95}\n")
    command = parse("train --config c.yaml --options decay 0.9 distance euclidean".split())
    assert (
        command.run.options == {"levels": "4,4", "decay": "0.9", "distance": "euclidean"}
        and command.run.quantizer == "residual"
    )
    assert parse("train --config c.yaml".split()).run.options == {"levels": "4,4", "decay": "0.95"}
    Path("c.yaml").write_text("name: 2024-13-45\n")
    with pytest.raises(BavqError, match="is not YAML"):
        parse("train --config c.yaml".split())
