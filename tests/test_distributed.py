"""Several processes: two of them train as one, at every step; and workers do not outlive the sweep that
started them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from bavq.core.config import RunConfig
from bavq.core.storage import final_weights, only_writer, read_weights
from bavq.training.experiments import first_steps

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}
TINY = dict(
    train_size=640,
    codebook_size=32,
    embedding_dim=8,
    hidden_channels=8,
    residual_blocks=1,
    epochs=1,
    batch_size=32,
    lr=3e-3,
    warmup_steps=2,
)
METHODS = "vq_ema", "ba_vq", "vq", "residual"
STEPS = 20


def save_steps(folder):
    """What one process of several does: the first steps of every method, in double precision, into a file of
    its own."""
    for q in METHODS:
        torch.save(
            first_steps(RunConfig(quantizer=q, **TINY), STEPS, torch.float64),
            folder / f"{q}-{os.environ['RANK']}.pt",
        )


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    "Two processes, each with half of every batch."
    folder = tmp_path_factory.mktemp("halves")
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(folder),
    ]
    done = subprocess.run(launch, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def revived(states):
    "Was a code of VQ-EMA revived in these steps? Without revival they are others."
    still = first_steps(
        RunConfig(quantizer="vq_ema", options={"restart_below": "0"}, **TINY), STEPS, torch.float64
    )
    return any(
        not torch.allclose(a["quantizer.book.codes"], b["quantizer.book.codes"], atol=1e-3)
        for a, b in zip(states, still)
    )


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_at_every_step(halves, one_thread, method):
    """All weights, codes, counts, potentials and losses: equal to the bit on both processes, and to rounding
    with one process that has the whole batch."""
    first, second = (torch.load(halves / f"{method}-{rank}.pt") for rank in (0, 1))
    whole = first_steps(RunConfig(quantizer=method, **TINY), STEPS, torch.float64)
    assert len(first) == len(whole) == STEPS
    for step, (a, b, w) in enumerate(zip(first, second, whole)):
        assert all(torch.equal(a[k], b[k]) for k in a), f"the processes differ after step {step + 1}"
        for k in w:
            torch.testing.assert_close(
                a[k], w[k], rtol=1e-9, atol=1e-10, msg=lambda m: f"{k} after step {step + 1}: {m}"
            )
    if method == "vq_ema":
        assert revived(whole), "no code was revived in these steps: give more"


TRAIN = (
    "train --quantizer ba_vq --codebook-size 32 --embedding-dim 8 --hidden-channels 8 --residual-blocks 1"
    " --train-size 640 --batch-size 32 --epochs 4 --warmup-steps 5"
)


def two_processes(out):
    "`bavq train` as torchrun starts it; what it prints goes into out.log."
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no-python",
        sys.executable,
        "-c",
        "from bavq.cli import main; main()",
    ]
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(
            [*launch, *TRAIN.split(), "--name", "run", *["--resume"] * out.exists(), "--out", str(out)],
            env=ENV,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def test_several_processes_stop_together_and_go_on(tmp_path):
    """Two processes, stopped by a signal in mid-training and started again, end with the weights, to the bit,
    of two that were left alone."""
    assert two_processes(tmp_path / "whole").wait(300) == 0, (tmp_path / "whole.log").read_text()
    printed = (tmp_path / "whole.log").read_text()
    assert printed.count("saved in") == 1 and "arning" not in printed, printed
    process, cut, until = two_processes(tmp_path / "cut"), tmp_path / "cut" / "run", time.time() + 240
    while not (cut / "history.jsonl").exists():
        assert process.poll() is None and time.time() < until, (tmp_path / "cut.log").read_text()
        time.sleep(0.01)
    process.terminate()
    assert (
        process.wait(300) != 0
        and "goes on from there" in (tmp_path / "cut.log").read_text()
        and not final_weights(cut)
    )
    assert two_processes(tmp_path / "cut").wait(300) == 0
    whole, resumed = (read_weights(final_weights(f)) for f in (tmp_path / "whole" / "run", cut))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_torchrun_as_the_readme_prints_it(tmp_path):
    """On a machine without a GPU, and without being told so: accelerate sees both processes, and they train
    one run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"^(torchrun .*) bavq train --config \S+", readme, re.M)
    launch = re.sub(r"(--nproc_per_node) \d+", r"\1 2", printed).split()
    free = {k: v for k, v in ENV.items() if k != "ACCELERATE_USE_CPU"}
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [*launch, "bavq", *TRAIN.split(), "--epochs", "1", "--name", "run", "--out", str(tmp_path)],
        env=free | {"CUDA_VISIBLE_DEVICES": "", "PATH": scripts},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("saved in") == 1 and final_weights(tmp_path / "run")


LOADED = """
import sys, torch
from bavq.quantizers.vq_ema import VQEMAQuantizer
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), VQEMAQuantizer(16, 8)).train()
if torch.distributed.get_rank() == 0: model[1].set_codes(torch.randn(16, 8))
torch.nn.parallel.DistributedDataParallel(model)(torch.randn(64, 8))
torch.save(model[1].codebook, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
"""


def test_codes_that_one_process_has_loaded(tmp_path):
    "The first process has codes, the other gets them with the buffers: none waits for the other to set them."
    (tmp_path / "go.py").write_text(LOADED)
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "go.py"),
        str(tmp_path),
    ]
    done = subprocess.run(launch, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))


MASKED = """
import sys, torch
from bavq.quantizers.adapters import as_vector_quantize
from bavq import BAQuantizer, VQEMAQuantizer, make_quantizer
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
rank = -1
if len(sys.argv) > 2:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
states = {}
for make in (VQEMAQuantizer, BAQuantizer):
    torch.manual_seed(0)
    x, adapter = torch.randn(12, 2, 80, 8), as_vector_quantize(make(32, 8)).train()
    lengths = torch.tensor([[[70], [25]]]).repeat(12, 1, 1)   # the second sequence is much shorter
    lengths[0, 1] = lengths[3, 0] = lengths[4, 1] = 0    # one process has nothing, at the start and later
    mine = slice(None) if rank < 0 else slice(rank, rank + 1)
    for batch, length in zip(x, lengths):
        adapter(batch[mine], mask=(torch.arange(80) < length)[mine])
    states[make.__name__] = adapter.state_dict()
torch.manual_seed(0)
quantizer = make_quantizer("vq_entropy", 16, 8).train()
quantizer(x[0, :1].flatten(0, 1))
if rank < 1: quantizer.eval()(x[0, :1].flatten(0, 1))   # evaluation waits for nobody
torch.save(states, f"{sys.argv[1]}/{rank}.pt")
"""


def test_sequences_of_several_lengths_on_several_processes(tmp_path):
    """With a mask, each process has another number of latents, and some steps none: start, statistics and
    revival are those of one process that has them all."""
    (tmp_path / "go.py").write_text(MASKED)
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "go.py"),
        str(tmp_path),
        "together",
    ]
    for command in (launch, [sys.executable, str(tmp_path / "go.py"), str(tmp_path)]):
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second, whole = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1, -1))
    for name in whole:
        assert all(torch.equal(first[name][k], second[name][k]) for k in first[name])
        for k, v in whole[name].items():
            torch.testing.assert_close(
                first[name][k], v, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}, {k}: {m}"
            )


# Without it a process may be at its end while the other still talks to it, and both die of that.
TOGETHER = """
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def two(program, folder):
    "Run a program in two processes."
    (folder / "go.py").write_text(program + TOGETHER)
    run = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run([*run, str(folder / "go.py")], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


TRAFFIC = """
import copy, torch
import torch.distributed as dist
from bavq import make_quantizer
torch.set_num_threads(1)
dist.init_process_group("gloo")
sent = []

def counting(call):
    def counted(x, *more, **options):
        sent.append(x.numel() * x.element_size())
        return None if x.is_meta else call(x, *more, **options)
    return counted

for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor"):
    setattr(dist, name, counting(getattr(dist, name)))
K, D = 1024, 64
for name in ("vq_ema", "ba_vq"):
    torch.manual_seed(dist.get_rank())
    q = make_quantizer(name, K, D).train()
    q.set_codes(torch.randn(K, D))
    sent.clear()
    q(torch.randn(256, D))
    needed = 4 * K * (D + 1)   # counts and sums of the codes
    assert needed <= sum(sent) < 1.25 * needed, f"{name} sends {sum(sent)} bytes a step, needs {needed}"
for name in ("vq_ema", "ba_vq", "vq_ema_spec", "gumbel", "vq_entropy", "residual", "vq_ema_growing"):
    q = make_quantizer(name, 64, 8).train()
    q(torch.randn(50, 8))
    copy.deepcopy(q).to("meta")(torch.empty(50, 8, device="meta"))   # which has no values to ask for
"""


def test_a_step_sends_little_and_never_waits(tmp_path):
    """Revival sends a few rows, not as many as there are codes; and no step of several processes asks for a
    value on the host."""
    two(TRAFFIC, tmp_path)


NOISE = """
import torch
import torch.distributed as dist
from bavq import make_quantizer
from bavq.core.distributed import gather_rows
torch.set_num_threads(1)
dist.init_process_group("gloo")

def agree(x):
    both = gather_rows(x.detach()[None])
    return torch.equal(both[0], both[1])

for seed in (0, dist.get_rank()):   # seeded alike, and each for itself
    torch.manual_seed(0)
    z = torch.randn(400, 8)
    torch.manual_seed(seed)
    gumbel = make_quantizer("gumbel", 64, 8).train()
    out = gumbel(z)
    assert agree(gumbel.codebook) and not agree(out.metrics["code_indices"]), "the same Gumbel noise"
    residual = make_quantizer("residual", 64, 8, levels="4,4,4", base="vq_ema", dropout=1.0).train()
    assert not agree(residual(z).z_q), "the same dropout"
    ema = make_quantizer("vq_ema", 64, 8, restart_below=0.9).train()
    for k in range(5):
        ema.book.counts[k] = 0   # revived
        ema(z)
    assert agree(ema.codebook) and agree(ema.book.counts)
"""


def test_processes_have_their_own_noise_and_one_codebook(tmp_path):
    two(NOISE, tmp_path)


EMPTY = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from bavq import make_quantizer
from bavq.core.distributed import gather_rows
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()

class Net(torch.nn.Module):
    def __init__(self, q):
        super().__init__()
        self.enc, self.q = torch.nn.Linear(8, 8), q

    def forward(self, x):
        out = self.q(self.enc(x))
        return sum(out.losses.values()) + out.z_q.sum()

for name, options in dict(vq={}, vq_ema={}, ba_vq={}, gumbel={}, vq_entropy={}, product={}, vq_ema_growing={},
                          residual=dict(dropout=0.5)).items():
    torch.manual_seed(0)
    net = Net(make_quantizer(name, 64, 8, **options))
    net = DistributedDataParallel(net, broadcast_buffers=False).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for n in ((90, 0), (31, 0), (0, 30), (7, 64)):   # rows of each process
        loss = net(torch.randn(n[rank], 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for k, v in net.state_dict().items():
            both = gather_rows(v[None])
            assert v.isfinite().all() and torch.equal(both[0], both[1]), (name, n, k)
"""


def test_a_process_without_latents_takes_part_in_every_step(tmp_path):
    "In the first step and later, maps' last batches that do not divide, codes by gradient and by averages."
    two(EMPTY, tmp_path)


UNEVEN = """
import torch
import torch.distributed as dist
from bavq import make_quantizer
from bavq.quantizers.remedies import entropy_term
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo")
torch.manual_seed(0)
q = make_quantizer("vq", 16, 8).train()
q.set_codes(torch.randn(16, 8))
z = torch.randn(60, 8)
mine = slice(0, 45) if dist.get_rank() == 0 else slice(45, 60)
part = z[mine].clone().requires_grad_(True)
term = entropy_term(1.0)
loss = term(q, part)
loss.backward()
dist.is_initialized = lambda: False   # one process
whole = z.clone().requires_grad_(True)
expected = term(q, whole)
expected.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(part.grad / 2, whole.grad[mine])   # gradients of processes are averaged
"""


def test_entropy_of_uneven_batches_is_that_of_all_latents(tmp_path):
    two(UNEVEN, tmp_path)


SPLIT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from bavq import make_quantizer
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))

class Net(nn.Module):
    def __init__(self, q):
        super().__init__()
        self.enc, self.q, self.dec = nn.Linear(8, 8), q, nn.Linear(8, 8)

    def forward(self, x):
        self.out = self.q(self.enc(x))
        return (self.dec(self.out.z_q) - x).square().mean() + sum(self.out.losses.values())

for name, inner in (("vq", False), ("vq", True), ("gumbel", False), ("gumbel", True)):
    torch.manual_seed(0)
    net = Net(make_quantizer(name, 16, 8)).train()
    x = 5 + 5 * torch.randn(2, 64, 8)[dist.get_rank()]
    if inner: fully_shard(net.q, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for step in range(2):
        net(x).backward()
        codes = net.q.embedding.full_tensor().clone()
        assert codes.abs().max() > 1, f"{name}: the codes of the first batch are lost after step {step}"
        if name == "vq": assert torch.equal(net.out.z_q, codes[net.out.metrics["code_indices"]])
        optimizer.step()
        optimizer.zero_grad()
        moved = (net.q.embedding.full_tensor() - codes).abs().max()
        assert 0 < moved < 0.5
    net.q.set_codes(torch.ones(16, 8))   # between passes
    assert net.q.embedding.full_tensor().eq(1).all()
"""


def test_codes_of_the_first_batch_under_fsdp2(tmp_path):
    "`fully_shard` around the network, or around the quantizer too: the codes that were set stay."
    two(SPLIT, tmp_path)


SWEEP = """
from bavq.core.config import RunConfig
from bavq.training.sweeps import sweep
if __name__ == "__main__":
    configs = [RunConfig(name=q, quantizer=q, **{tiny}) for q in ("vq_ema", "ba_vq")]
    sweep(configs, {out!r}, jobs=2, progress=False)
"""


def test_workers_end_with_their_sweep(tmp_path):
    "The process of a sweep is killed: its workers end too, and their folders are free."
    (tmp_path / "go.py").write_text(
        SWEEP.format(tiny=TINY | dict(epochs=10_000, checkpoint_every=10_000), out=str(tmp_path / "runs"))
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "go.py")],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.time() + 240
    while not all((tmp_path / "runs" / q / "history.jsonl").exists() for q in ("vq_ema", "ba_vq")):
        assert process.poll() is None and time.time() < until, process.communicate()[1]
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, [p.cmdline() for p in alive]
    for q in ("vq_ema", "ba_vq"):
        with only_writer(tmp_path / "runs" / q):
            assert json.loads((tmp_path / "runs" / q / "config.json").read_text())["quantizer"] == q


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_steps(Path(sys.argv[1]))
