"""Training step, evaluation and memory of the quantizers beside vector-quantize-pytorch: python
benchmarks/quantizers.py [--quick] [--only step]

Writes results/bench/*.json and the figure experiments/bench.png; `make bench`. One thread on the CPU; the
same command runs on CUDA where there is one. How time and memory are taken is said in measure.py. 04_speed
reads the records."""

import argparse
import copy
import logging
import os
import time
from pathlib import Path

import torch
from measure import ROOT, interleaved, peak_bytes, record

import bavq.models.vqvae  # registers the quantizers
from bavq.core.distributed import set_seed
from bavq.quantizers.base import make_quantizer
from bavq.quantizers.search import nearest_code
from bavq.quantizers.adapters import peer_library

PEER = dict(decay=0.99, commitment_weight=0.25)
PEERS = dict(
    peer_plain=dict(PEER, rotation_trick=False), peer_strong=dict(PEER, threshold_ema_dead_code=2)
)  # its plain EMA step; as commonly set
# codes; beyond, the dense sketch keeps over ten tables of all latents by all codes for its backward pass
SKETCH_UP_TO = 4096
SIZES = dict(
    codes=(512, 1024, 4096, 16384),
    latents=(4096, 8192, 16384, 32768),
    dims=(16, 32, 64, 128, 256),
    N=16384,
    D=64,
    K=1024,
    rounds=5,
    batch=32,
    width=64,
)
QUICK = dict(
    codes=(64, 256), latents=(512, 1024), dims=(8, 16), N=1024, D=8, K=64, rounds=2, batch=4, width=8
)


def quantizer(arm, K, D, device):
    "A quantizer whose codes are set, so that no step is the first; the peer's module as it is."
    set_seed(0)
    if arm in PEERS:
        return peer_library().VectorQuantize(D, K, **PEERS[arm]).to(device)
    q = make_quantizer(arm, K, D)
    q.set_codes(torch.randn(K, D))
    q.initialised.fill_(True)
    q.load_state_dict(q.state_dict())  # it knows now that its codes are set
    return q.to(device)


def training_step(arm, q):
    "Forward and backward of one batch, as a function of the batch."

    def step(x):
        z = x.detach().requires_grad_(True)
        if arm in PEERS:
            z_q, _, loss = q(z[None])
            z_q = z_q[0]
            loss = loss.sum()
        else:
            z_q, losses, _ = q(z)
            loss = sum(losses.values())
        torch.autograd.backward([z_q, loss], [torch.ones_like(z_q), None])

    q.train()
    return step


def evaluation_step(arm, q):
    "Codes of one batch, in evaluation."
    q.eval()

    @torch.no_grad()
    def step(x):
        q(x[None] if arm in PEERS else x)

    return step


def compared(arms, N, D, K, rounds, device, make=training_step):
    "Seconds of each arm in each round, on the same latents."
    x = torch.randn(rounds, N, D, generator=torch.Generator().manual_seed(1)).to(device)
    steps = {arm: make(arm, quantizer(arm, K, D, device)) for arm in arms}
    return interleaved({arm: lambda r, step=step: step(x[r]) for arm, step in steps.items()}, rounds, device)


def contenders(K):
    return ["vq_ema", "ba_vq", *PEERS] + ["ba_vq_spec"] * (K <= SKETCH_UP_TO)


def memory(size, device):
    "Extra memory of one training step, in MB, by number of codes."

    def make(arm, K):
        def prepared():
            step = training_step(arm, quantizer(arm, K, size["D"], device))
            x = torch.randn(size["N"], size["D"]).to(device)
            return (lambda: step(x[:64])), (lambda: step(x))

        return prepared

    found = {str(K): {arm: peak_bytes(make(arm, K), device) for arm in contenders(K)} for K in size["codes"]}
    return dict(
        N=size["N"],
        D=size["D"],
        megabytes={
            K: {a: b if b is None else round(b / 2**20, 1) for a, b in row.items()}
            for K, row in found.items()
        },
    )


def step(size, device):
    "A training step by number of codes."
    seconds = {
        str(K): compared(
            contenders(K), size["N"], size["D"], K, max(2, size["rounds"] - 2 * (K > 8192)), device
        )
        for K in size["codes"]
    }
    return dict(N=size["N"], D=size["D"], seconds=seconds)


def evaluation(size, device):
    "A pass in evaluation by number of codes."
    seconds = {
        str(K): compared(
            ["vq_ema", "peer_plain"], size["N"], size["D"], K, min(3, size["rounds"]), device, evaluation_step
        )
        for K in size["codes"]
    }
    return dict(N=size["N"], D=size["D"], seconds=seconds)


def sampling(size, device):
    "Latents from grids of indices, as a prior's samples become them, by number of codes."

    def looked_up(K):
        grids = torch.randint(K, (size["N"] // 64, 8, 8), generator=torch.Generator().manual_seed(1)).to(
            device
        )
        ours, peer = (
            quantizer("vq_ema", K, size["D"], device).eval(),
            quantizer("peer_plain", K, size["D"], device).eval(),
        )
        with torch.no_grad():
            arms = dict(
                vq_ema=lambda r: ours.decode(grids),
                peer_plain=lambda r: peer.get_output_from_indices(grids).movedim(-1, 1).contiguous(),
            )
            assert arms["vq_ema"](0).shape == arms["peer_plain"](0).shape
            return interleaved(arms, 4 * size["rounds"], device)

    return dict(N=size["N"], D=size["D"], seconds={str(K): looked_up(K) for K in size["codes"]})


def scaling(size, device):
    "A training step by number of latents and by their dimension."
    arms, K = ["vq_ema", "ba_vq", "peer_plain"], size["K"]
    latents = {
        str(N): compared(arms, N, size["D"], K, min(3, size["rounds"]), device) for N in size["latents"]
    }
    dims = {
        str(D): compared(arms, size["N"] // 2, D, K, min(3, size["rounds"]), device) for D in size["dims"]
    }
    return dict(K=K, latents=dict(D=size["D"], seconds=latents), dims=dict(N=size["N"] // 2, seconds=dims))


def precision(size, device):
    """What bfloat16 does to indices: our island of float32 under autocast, and a search in bfloat16; and
    their times."""
    q, x = (
        quantizer("vq_ema", size["K"], size["D"], device).eval(),
        torch.randn(size["N"], size["D"]).to(device),
    )
    e, exact = q.codebook, q.encode(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        island = q.encode(x)
    low = nearest_code(x.bfloat16(), e.bfloat16())
    trained = [quantizer("ba_vq", size["K"], size["D"], device).train() for _ in range(2)]
    for r in range(5):
        for one, on in zip(trained, (False, True)):
            set_seed(r)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=on):
                one(torch.randn(size["N"], size["D"]).to(device))
    searches = {
        "float32": lambda r: nearest_code(x, e),
        "bfloat16": lambda r: nearest_code(x.bfloat16(), e.bfloat16()),
    }
    return dict(
        unchanged=dict(
            autocast=(island == exact).double().mean().item(), search=(low == exact).double().mean().item()
        ),
        largest_difference_of_trained_codes=(trained[0].codebook - trained[1].codebook).abs().max().item(),
        seconds=interleaved(searches, size["rounds"], device),
    )


def model_step(compiled, size, device):
    "An optimiser step of a small VQ-VAE."
    set_seed(0)
    net = bavq.models.vqvae.VQVAE(
        "vq_ema", codebook_size=512, embedding_dim=64, hidden_channels=size["width"]
    ).to(device)
    x, opt = torch.randn(size["batch"], 3, 32, 32).to(device), torch.optim.AdamW(net.parameters(), 3e-4)
    net(x)  # sets the codes; k-means++ is a library's, and the compiler cannot look into it
    run = torch.compile(net) if compiled else net

    def step(r):
        out = run(x)
        opt.zero_grad()
        (out.recon_loss + sum(out.losses.values())).backward()
        opt.step()

    return step


def compiler(size, device):
    """Steps of ba_vq and of a small model as they are and compiled, and what compiling took; or why it could
    not be."""
    q, x = quantizer("ba_vq", size["K"], size["D"], device), torch.randn(size["N"], size["D"]).to(device)
    steps = {
        name: training_step("ba_vq", module)
        for name, module in {"as it is": q, "compiled": torch.compile(copy.deepcopy(q))}.items()
    }
    arms = dict(quantizer={name: lambda r, f=f: f(x) for name, f in steps.items()})
    arms["model"] = {"as it is": model_step(False, size, device), "compiled": model_step(True, size, device)}
    began, problem = sum(os.times()[:4]), ""
    try:
        [both["compiled"](0) for both in arms.values()]
    except Exception as e:
        problem = f"{type(e).__name__}: {e}".splitlines()[0][:200]  # no C++ compiler, say
    if problem:
        return dict(problem=problem)
    compiling = round(sum(os.times()[:4]) - began, 1)
    return dict(
        problem="",
        compiling_seconds=compiling,
        seconds={what: interleaved(both, size["rounds"], device, warm=2) for what, both in arms.items()},
    )


def layouts(size, device):
    "A step of vq_ema on feature maps, channels first and channels last in memory."
    maps = torch.randn(size["N"] // 64, size["D"], 8, 8).to(device)
    step, last = (
        training_step("vq_ema", quantizer("vq_ema", size["K"], size["D"], device)),
        maps.contiguous(memory_format=torch.channels_last),
    )
    return interleaved(
        {"channels first": lambda r: step(maps), "channels last": lambda r: step(last)},
        size["rounds"],
        device,
    )


def aids(size, device):
    "What may help, measured: number formats, the order of memory."
    return dict(
        N=size["N"], D=size["D"], K=size["K"], precision=precision(size, device), layout=layouts(size, device)
    )


def figure(folder, path):
    "The step and its memory against the number of codes."
    from bavq.studies.speed import draw_steps

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_steps(folder).savefig(path)
    print(path)


PARTS = dict(
    memory=memory,
    step=step,
    evaluation=evaluation,
    sampling=sampling,
    scaling=scaling,
    aids=aids,
    compiler=compiler,
)  # memory first: it forks while this process is small


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, in less than a minute: to see that it works, not to quote",
    )
    p.add_argument(
        "--only", choices=PARTS, action="append", help="this part alone; may be given more than once"
    )
    p.add_argument(
        "--out",
        help=(
            "folder of the records (default results/bench, on a GPU results/bench-cuda; with --quick,"
            " experiments/bench-quick)"
        ),
    )
    p.add_argument(
        "--rounds", type=int, help="rounds of each comparison (default 5; at K above 8192 two fewer)"
    )
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    args = p.parse_args()
    out = (
        Path(args.out)
        if args.out
        else ROOT
        / ("experiments/bench-quick" if args.quick else "results/bench" + "-cuda" * (args.device == "cuda"))
    )
    size = dict(QUICK if args.quick else SIZES) | (dict(rounds=args.rounds) if args.rounds else {})
    if args.device == "cpu":
        torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # where it leaves the graph is no news
    for name in PARTS:
        if name not in (args.only or [p for p in PARTS if p != "compiler" or not args.quick]):
            continue  # compiling takes longer than all the rest of a quick run
        began = time.perf_counter()
        record(
            out,
            name,
            args.device,
            **PARTS[name](size, args.device),
            wall_seconds=round(time.perf_counter() - began, 1),
        )
    if (out / "step.json").exists() and (out / "memory.json").exists():
        figure(out, (out if args.out or args.quick else ROOT / "experiments") / "bench.png")


if __name__ == "__main__":
    main()
