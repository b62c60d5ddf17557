"""Images per second of the training loop, beside the straightforward one: python benchmarks/training.py [tiny small wide] [--rounds 7]

The straightforward loop opens PIL images in a DataLoader, turns each to floats with torchvision's transforms, keeps the default memory format and
optimizer, and fetches its losses after every step. The arms change one thing after another; the last is `bavq.training` as it stands. All train the
same model on the same images in the same order, by turns, an epoch each, so that a busy machine slows all alike: ratios are medians over rounds of one
run. The losses of the first steps are compared, with the same random numbers; later, rounding puts a latent to another code, and runs slowly part.
On the CPU a second is one of processor time, on one thread; on a GPU it is one of the clock. Writes results/bench/training.json, on a GPU
training-cuda.json."""
import argparse
import itertools
import json
import platform
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from bavq.core import RunConfig, set_seed
from bavq.data import load_images
from bavq.training import build_model, loss_terms, make_accelerator, prepare, train_epoch

OUT = Path(__file__).resolve().parent.parent / "results" / "bench"
SMALL = RunConfig(quantizer="vq_ema", hidden_channels=16, embedding_dim=64, codebook_size=256, batch_size=64, lr=1e-3, train_size=1280)
NETWORKS = dict(
    tiny=replace(SMALL, hidden_channels=8, embedding_dim=8, residual_blocks=1, codebook_size=32), small=SMALL,
    wide=replace(SMALL, hidden_channels=256, embedding_dim=256, codebook_size=512, batch_size=32, lr=3e-4, train_size=64))
STEPS, TOLERANCE = 10, 1e-4  # steps compared, and the largest relative difference of a loss that counts as rounding


class Straightforward:
    "PIL images, one by one."
    def __init__(self, loader):
        pictures = [Image.fromarray(x) for x in loader.images.permute(0, 2, 3, 1).cpu().numpy()]
        to_float = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
        self.items, self.order = [*zip(pictures, loader.labels.tolist())], loader
        self.collate = lambda items: (torch.stack([to_float(x) for x, _ in items]), torch.tensor([y for _, y in items]))

    def __iter__(self):
        batches = [i.tolist() for i in self.order.indices()]
        for x, y in DataLoader(self.items, batch_sampler=batches, collate_fn=self.collate): yield x.to(self.order.device), y.to(self.order.device)


def fetch_each(losses): return {k: v.item() for k, v in losses.items()}
def leave(losses): return {k: v.detach() for k, v in losses.items()}


def plain_loop(config, loader, keep, fused=None, memory_format=torch.contiguous_format):
    "A function that trains an epoch and returns the loss of each step."
    model = build_model(config).to(loader.device, memory_format=memory_format).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, fused=fused)

    def epoch(data):
        steps = []
        for x, _ in data:
            losses = loss_terms(model(x.contiguous(memory_format=memory_format)))
            optimizer.zero_grad()
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            steps.append(keep(losses))
        return [float(s["loss"]) for s in steps]
    return epoch


def own_loop(config):
    "`train_epoch` on what `prepare` makes, as in every run of the package; the loss averaged over the epoch."
    t = prepare(config)
    return lambda data: [train_epoch(t.net, data, t.optimizer, clip_grad=config.clip_grad, accelerator=t.accelerator)["loss"]]


def arms(config, loader):
    "What is timed, by name: the data, and the epoch."
    pictures = Straightforward(loader)
    last, keep = dict(memory_format=torch.channels_last), dict(keep=leave)
    return {
        "straightforward": (pictures, plain_loop(config, loader, fetch_each)),
        "images from memory": (loader, plain_loop(config, loader, fetch_each)),
        "losses fetched once": (loader, plain_loop(config, loader, **keep)),
        "channels last": (loader, plain_loop(config, loader, **keep, **last)),
        "fused AdamW": (loader, plain_loop(config, loader, **keep, **last, fused=True)),
        "the package": (loader, own_loop(config)),
        "the package, bf16": (loader, own_loop(replace(config, precision="bf16")))}


def timed(f, device):
    "Seconds, and the result."
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if "cuda" in str(device) else (lambda: None, time.process_time)
    wait(); start = clock()
    value = f()
    wait()
    return clock() - start, value


def first_steps(data, epoch):
    "The losses of the first steps. A DataLoader draws a random number, so the seed is set after it."
    batches = [*itertools.islice(data, STEPS)]
    set_seed(0)
    return epoch(batches)


def compare_losses(losses):
    "Largest relative difference of the first steps' losses from the straightforward loop's; beyond rounding only where the precision is lower."
    plain, found = losses["straightforward"], {}
    for name, steps in losses.items():
        pairs = zip(steps, plain) if len(steps) > 1 else [(steps[0], statistics.mean(plain))]
        found[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        assert "bf16" in name or found[name] < TOLERANCE, f"{name}: losses differ by {found[name]:.1e}"
    return found


def measure(config, rounds, device):
    "One network: the first steps of every arm, to compare them; then every arm in each round."
    from bavq.data import get_dataloaders
    loader = get_dataloaders(config.data, config.batch_size, train_size=config.train_size, device=device)[0]
    todo, seconds, n = arms(config, loader), {}, len(loader) * config.batch_size
    read = {name: data for name, (data, _) in todo.items() if name in ("straightforward", "images from memory")}
    data_seconds = {k: [] for k in read}
    difference = compare_losses({name: first_steps(data, epoch) for name, (data, epoch) in todo.items()})
    for turn in range(rounds):
        loader.set_epoch(turn)
        for name, (data, epoch) in todo.items(): seconds.setdefault(name, []).append(timed(lambda: epoch(data), device)[0])
        for name, data in read.items(): data_seconds[name].append(timed(lambda: [None for _ in data], device)[0])
    plain = seconds["straightforward"]
    rows = []
    for name, s in seconds.items():
        ratios = [a / b for a, b in zip(plain, s)]
        rows.append(dict(arm=name, images_per_second=round(n / statistics.median(s), 1), ratio=round(statistics.median(ratios), 3),
                         ratio_range=[round(min(ratios), 3), round(max(ratios), 3)], loss_difference=float(f"{difference[name]:.1e}")))
    keys = "quantizer", "hidden_channels", "embedding_dim", "codebook_size", "batch_size"
    return dict(config={k: getattr(config, k) for k in keys}, steps=len(loader), rounds=rounds, arms=rows,
                data_us_per_image={k: round(1e6 * statistics.median(s) / n, 2) for k, s in data_seconds.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=[*NETWORKS])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_images("photos")
    device = make_accelerator(SMALL).device
    path = OUT / ("training-cuda.json" if device.type == "cuda" else "training.json")
    found = json.loads(path.read_text()) if path.exists() else dict(networks={})
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    found |= dict(device=name, threads=1, seconds="of the clock" if device.type == "cuda" else "of processor time",
                  steps_compared=STEPS, tolerance=TOLERANCE, versions={k: version(k) for k in ("torch", "torchvision", "accelerate", "pillow")})
    for network in args.networks:
        found["networks"][network] = measure(NETWORKS[network], args.rounds, device)
        OUT.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(network)
        for r in found["networks"][network]["arms"]:
            print(f"  {r['arm']:22s} {r['images_per_second']:9.1f} images/s  {r['ratio']:.2f}x  losses differ by {r['loss_difference']:.0e}")


if __name__ == "__main__": main()
