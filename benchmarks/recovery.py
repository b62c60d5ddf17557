"""A machine of a cluster dies in the middle of a run, and the sweep goes on: python benchmarks/recovery.py

Starts a Ray cluster of two nodes on this machine, one core each, beside a head without cores, and sweeps two
runs over it. The first node that has finished a few epochs of its run is killed with all its processes. Ray
sends the run to the other node, where it goes on from its last checkpoint; at the end it must be, bit for
bit, the run that was trained here without a cluster. Writes results/bench/ray.json: what happened, when, and
where."""

import inspect
import json
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch

from bavq.core.config import RunConfig, run_name
from bavq.core.storage import write_json
from bavq.training.experiments import load_results, run
from bavq.training.sweeps import Ray, sweep
from bavq.core.storage import read_history

# before Ray is imported: a busy machine starts its processes slowly
os.environ |= dict(
    RAY_raylet_start_wait_time_s="120",
    RAY_agent_register_timeout_ms="120000",
    RAY_worker_register_timeout_seconds="300",
    RAY_worker_niceness="0",
    RAY_USAGE_STATS_ENABLED="0",
)
ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    train_size=640,
    codebook_size=16,
    embedding_dim=8,
    hidden_channels=8,
    residual_blocks=1,
    epochs=12,
    batch_size=32,
    checkpoint_every=1,
)
EPOCHS_BEFORE = 3  # that a run must have finished
CONFIGS = [RunConfig(name=q, quantizer=q, **TINY) for q in ("vq_ema", "ba_vq")]


def patient():
    """Let Ray's nodes start on a busy machine too.

    A node waits 15 s, and no longer, for the files in which its agents name their ports (Ray's issue 65983).
    Two of the agents are for a dashboard that is not there: their files are written beforehand, saying so."""
    from ray._private import services

    start = services.start_raylet

    def start_raylet(*args, **options):
        given = inspect.signature(start).bind(*args, **options).arguments
        for port in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"):
            (Path(given["session_dir"]) / f"{port}_{given['node_id']}").write_text("-1")
        return start(*args, **options)

    return mock.patch.object(services, "start_raylet", start_raylet)


def node_options(cores):
    "No more processes than must be; the port of the remaining agent."
    with socket.create_server(("", 0)) as s:
        port = s.getsockname()[1]
    return dict(
        num_cpus=cores,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        runtime_env_agent_port=port,
    )


def log(out):
    path = out / "sweep.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill(cluster, nodes, out, events, patience=600):
    "Wait until a run has finished some epochs, and kill the node it is on."
    until = time.time() + patience
    while time.time() < until:
        for start in log(out):
            done = len(read_history(out / start["run"])) if "machine" in start else 0
            if done >= EPOCHS_BEFORE:
                events.append(
                    dict(
                        time=round(time.time(), 2),
                        run=start["run"],
                        event="machine killed",
                        machine=start["machine"],
                        epochs=done,
                    )
                )
                return cluster.remove_node(
                    next(n for n in nodes if n.node_id.startswith(start["machine"])), allow_graceful=False
                )
        time.sleep(0.01)


def same_run(a, b):
    "Are two run folders equal in every bit of weights, metrics and history, but for the seconds?"
    weights = [torch.load(p / "final_model.pt", weights_only=True) for p in (a, b)]
    plain = [[{k: v for k, v in h.items() if k != "seconds"} for h in read_history(p)] for p in (a, b)]
    return (
        weights[0].keys() == weights[1].keys()
        and all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
        and plain[0] == plain[1]
        and (a / "final_metrics.json").read_text() == (b / "final_metrics.json").read_text()
    )


def recover(folder):
    """The events of a sweep whose machine is killed, and whether each run is the one trained without a
    cluster."""
    from ray.cluster_utils import Cluster

    out, alone, events = folder / "cluster", folder / "alone", []
    with patient():
        cluster = Cluster(initialize_head=True, head_node_args=node_options(0))
        nodes = [cluster.add_node(**node_options(1)) for _ in range(2)]
    try:
        killer = threading.Thread(target=kill, args=(cluster, nodes, out, events))
        killer.start()
        result = sweep(CONFIGS, out, progress=False, engine=Ray(address=cluster.address))
        killer.join()
    finally:
        cluster.shutdown()
    for c in CONFIGS:
        run(c, alone, progress=False)
    names = {n.node_id[:8]: f"node {i}" for i, n in enumerate(nodes, 1)}
    events = sorted([*log(out), *events], key=lambda e: e["time"])
    story = [
        dict(seconds=round(e["time"] - events[0]["time"], 1), event=e["event"], run=e["run"])
        | (dict(machine=names[e["machine"]], epochs=e["epochs"]) if "machine" in e else {})
        for e in events
    ]
    equal = {run_name(c): same_run(out / run_name(c), alone / run_name(c)) for c in CONFIGS}
    return dict(
        events=story,
        failures=result.failures,
        epochs=TINY["epochs"],
        equal_to_one_machine=equal,
        runs=len(load_results(out)),
    )


def main():
    torch.set_num_threads(1)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        found = recover(Path(folder))
    found |= dict(
        took=round(time.time() - began, 1),
        versions={k: version(k) for k in ("ray", "torch")},
        device=f"cpu, {platform.machine()}",
    )
    print(json.dumps(found, indent=1))
    if not all(found["equal_to_one_machine"].values()):
        sys.exit("a run differs from the one of a single machine")
    write_json(ROOT / "results" / "bench" / "ray.json", found)


if __name__ == "__main__":
    main()
