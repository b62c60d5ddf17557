"""Images per second of the training loop, beside the straightforward one: python benchmarks/training.py
[--network study] [--rounds 7] [--quick]

The straightforward loop is the one of most examples: torchvision's ImageFolder in a DataLoader opens each
picture with PIL and turns it to floats, the memory format and the optimizer are the default ones, losses are
fetched after every step, and VQ-EMA is written with a table of distances and a one-hot matrix. The arms
change one thing after another; the package is `bavq.training.loop` as it stands. Pictures are files of the
size that the network sees, but for `photographs`: JPEG files of 256 by 256 pixels that are resized to 64 by
64, as in training on pictures of one's own; there is a loop with loader processes too, where seconds are of
the clock. Beside them stand the straightforward loop around the quantizer of vector-quantize-pytorch, the
package in bfloat16, and with BA-VQ. All train the same network on the same images in the same order, by
turns, an epoch each, so that a busy machine slows all alike: ratios are medians over rounds of one run. The
losses of the first steps are compared, with the same random numbers; later, rounding puts a latent to another
code, and runs slowly part. On one thread of a processor a second is one of processor time; on several
threads, and on a GPU, one of the clock. Writes results/bench/training.json, on a GPU
results/bench-cuda/training.json."""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from bavq.core.config import RunConfig
from bavq.core.distributed import set_seed
from bavq.core.storage import write_json
from bavq.training.data import get_dataloaders
from bavq.training.images import PHOTOS, photo_path
from bavq.training.sweeps import cores
from bavq.quantizers.base import Quantized, from_rows, initialise, latent_rows, register_quantizer
from bavq.quantizers.search import squared_distances
from bavq.models.vqvae2 import build_model
from bavq.training.loop import loss_terms, make_accelerator, prepare, train_epoch
from bavq.quantizers.codebook import revive
from bavq.quantizers.vq_ema import VQEMAQuantizer

ROOT = Path(__file__).resolve().parent.parent
OUT, QUICK = "results/bench", "experiments/bench-quick"
SMALL = RunConfig(
    quantizer="vq_ema",
    hidden_channels=16,
    embedding_dim=64,
    codebook_size=256,
    batch_size=64,
    lr=1e-3,
    train_size=1280,
)
NETWORKS = dict(
    tiny=replace(SMALL, hidden_channels=8, embedding_dim=8, residual_blocks=1, codebook_size=32),
    small=SMALL,
    study=replace(SMALL, codebook_size=512, batch_size=32),
    photographs=replace(SMALL, codebook_size=512, batch_size=32, image_size=64, train_size=640),
    wide=replace(
        SMALL,
        hidden_channels=256,
        embedding_dim=256,
        codebook_size=512,
        batch_size=32,
        lr=3e-4,
        train_size=64,
    ),
)
PLAIN, PEER, WORKERS = "straightforward", "straightforward, peer's", "straightforward, loader processes"
OTHERS = PEER, "the package, bf16", "the package, BA-VQ"  # another quantizer or precision, so other losses
STEPS, TOLERANCE = (
    10,
    1e-4,
)  # steps compared, and the largest relative difference of a loss that counts as rounding


class Pictures:
    "Pictures opened with PIL one by one, in the order of a loader."

    def __init__(self, loader, items, workers=0):
        self.loader, order = loader, Order(loader)
        self.data = DataLoader(
            items, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0
        )

    def __iter__(self):
        for x, y in self.data:
            yield x.to(self.loader.device), y.to(self.loader.device)


class Order:
    "The batches of a loader's epoch, as lists of indices."

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (i.tolist() for i in self.loader.indices())


class InMemory:
    "Arrays that become PIL images when they are asked for, as torchvision's smaller data sets are."

    def __init__(self, images):
        self.arrays, self.to_float = images.permute(0, 2, 3, 1).cpu().numpy(), to_float()

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, i):
        return self.to_float(Image.fromarray(self.arrays[i])), 0


def to_float(size=0):
    "The usual transforms of a PIL image, with resizing where a size is given."
    resize = [transforms.Resize(size, transforms.InterpolationMode.BICUBIC)] if size else []
    return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])


def write_files(config, root):
    """The training images of a configuration as PNG files in train/all; or photographs to resize, and the
    configuration that reads them."""
    for part in ("train", "test"):
        (root / part / "all").mkdir(parents=True)
    if config.image_size:
        save_photographs(config.train_size, root)
        return replace(config, data=str(root))
    images = get_dataloaders(config.data, config.batch_size, train_size=config.train_size)[0].images
    for i, x in enumerate(InMemory(images).arrays):
        Image.fromarray(x).save(root / "train/all" / f"{i:07d}.png")
    return config


def save_photographs(n, root):
    "Crops of the photographs, 256 by 256, as JPEG files in train/all, and as few as allowed in test/all."
    photographs = [Image.open(photo_path(name)).convert("RGB") for name in PHOTOS]
    place = np.random.default_rng(0)
    for i in range(n + 1):
        im = photographs[i % len(photographs)]
        left, top = place.integers(im.width - 255), place.integers(im.height - 255)
        part = "train" if i < n else "test"
        im.crop((left, top, left + 256, top + 256)).save(root / part / "all" / f"{i:07d}.jpg", quality=90)


@register_quantizer("vq_ema_dense")
class DenseVQEMA(VQEMAQuantizer):
    "VQ-EMA as most examples write it: a table of all distances, a one-hot matrix, and products with it."

    def forward(self, z):
        x, K = latent_rows(self, z), self.num_embeddings
        if self.training and not self._ready:
            initialise(self, x.detach())
        index = squared_distances(x, self.codebook).argmin(1)
        one_hot = x.new_zeros(len(x), K).scatter_(1, index[:, None], 1)
        e = one_hot @ self.codebook
        losses, z_q = self.losses(x, e), self.estimate(x, e)
        if self.training:
            with torch.no_grad():
                self.book.absorb(one_hot.sum(0), one_hot.T @ x)
                revive(self.book, x, self.restart_below, self.restart_at)
        p = one_hot.mean(0)
        metrics = dict(
            code_indices=from_rows(index, z.shape),
            perplexity=torch.exp(-(p * (p + 1e-10).log()).sum()),
            usage_rate=(p > 0).float().mean(),
        )
        return Quantized(from_rows(z_q, z.shape), losses, metrics)


def fetch_each(losses):
    return {k: v.item() for k, v in losses.items()}


def leave(losses):
    return {k: v.detach() for k, v in losses.items()}


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
    return lambda data: [
        train_epoch(t.net, data, t.optimizer, clip_grad=config.clip_grad, accelerator=t.accelerator)["loss"]
    ]


def arms(config, loader, files):
    "What is timed, by name: the data, and the epoch."
    last, keep, read = dict(memory_format=torch.channels_last), dict(keep=leave), Pictures(loader, files)
    by_clock = (
        "cuda" in str(loader.device) or torch.get_num_threads() > 1
    )  # only the clock sees the time of loader processes
    return {
        PEER: (
            read,
            plain_loop(
                replace(config, quantizer="peer_vq", options={"gradient": "straight_through"}),
                loader,
                fetch_each,
            ),
        ),
        PLAIN: (read, plain_loop(replace(config, quantizer="vq_ema_dense"), loader, fetch_each)),
        **(
            {
                WORKERS: (
                    Pictures(loader, files, cores()),
                    plain_loop(replace(config, quantizer="vq_ema_dense"), loader, fetch_each),
                )
            }
            if by_clock and config.image_size
            else {}
        ),
        "quantizer without tables": (read, plain_loop(config, loader, fetch_each)),
        "pictures from memory": (
            Pictures(loader, InMemory(loader.images)),
            plain_loop(config, loader, fetch_each),
        ),
        "tensors from memory": (loader, plain_loop(config, loader, fetch_each)),
        "losses fetched once": (loader, plain_loop(config, loader, **keep)),
        "channels last": (loader, plain_loop(config, loader, **keep, **last)),
        "fused AdamW": (loader, plain_loop(config, loader, **keep, **last, fused=True)),
        "the package": (loader, own_loop(config)),
        "the package, bf16": (loader, own_loop(replace(config, precision="bf16"))),
        "the package, BA-VQ": (loader, own_loop(replace(config, quantizer="ba_vq"))),
    }


def timed(f, device):
    "Seconds."
    cuda = "cuda" in str(device)
    wait, clock = (
        torch.cuda.synchronize if cuda else (lambda: None),
        time.perf_counter if cuda or torch.get_num_threads() > 1 else time.process_time,
    )
    wait()
    start = clock()
    f()
    wait()
    return clock() - start


def first_steps(data, epoch):
    "The losses of the first steps. A DataLoader draws a random number, so the seed is set after it."
    batches = [*itertools.islice(data, STEPS)]
    set_seed(0)
    return epoch(batches)


def compare_losses(losses):
    """Largest relative difference of the first steps' losses from the straightforward loop's; beyond rounding
    only where precision or quantizer differ."""
    plain, found = losses[PLAIN], {}
    for name, steps in losses.items():
        pairs = zip(steps, plain) if len(steps) > 1 else [(steps[0], statistics.mean(plain))]
        found[name] = max(abs(a - b) / abs(b) for a, b in pairs)
        assert name in OTHERS or found[name] < TOLERANCE, f"{name}: losses differ by {found[name]:.1e}"
    return found


def measure(config, rounds, device, root):
    """One network, its pictures as files below `root`: the first steps of every arm, to compare them; then
    every arm in each round."""
    config, data_seconds = write_files(config, root), {}

    def make():
        return get_dataloaders(
            config.data,
            config.batch_size,
            train_size=config.train_size,
            image_size=config.image_size,
            device=device,
        )[0]

    if config.image_size:
        data_seconds["decoded once"] = [timed(make, device)]
    loader, files = make(), datasets.ImageFolder(root / "train", to_float(config.image_size))
    todo, seconds, n = arms(config, loader, files), {}, len(loader) * config.batch_size
    read = {name: todo[name][0] for name in (PLAIN, "pictures from memory", "tensors from memory")}
    difference = compare_losses({name: first_steps(data, epoch) for name, (data, epoch) in todo.items()})
    for turn in range(rounds):
        loader.set_epoch(turn)
        for name, (data, epoch) in todo.items():
            seconds.setdefault(name, []).append(timed(lambda: epoch(data), device))
        for name, data in read.items():
            data_seconds.setdefault(name, []).append(timed(lambda: [None for _ in data], device))
    plain = seconds[PLAIN]
    rows = []
    for name, s in seconds.items():
        ratios = [a / b for a, b in zip(plain, s)]
        rows.append(
            dict(
                arm=name,
                images_per_second=round(n / statistics.median(s), 1),
                ratio=round(statistics.median(ratios), 3),
                ratio_range=[round(min(ratios), 3), round(max(ratios), 3)],
                loss_difference=float(f"{difference[name]:.1e}"),
            )
        )
    keys = "quantizer", "hidden_channels", "embedding_dim", "codebook_size", "batch_size"
    return dict(
        config={k: getattr(config, k) for k in keys},
        steps=len(loader),
        rounds=rounds,
        threads=torch.get_num_threads(),
        arms=rows,
        data_us_per_image={k: round(1e6 * statistics.median(s) / n, 2) for k, s in data_seconds.items()},
    )


def about(device):
    "What was measured, on what, with what."
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    packages = "torch", "torchvision", "accelerate", "pillow", "vector-quantize-pytorch"
    return dict(
        device=name, steps_compared=STEPS, tolerance=TOLERANCE, versions={k: version(k) for k in packages}
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", choices=NETWORKS, action="append", help="this network alone; may be given more than once"
    )
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each arm")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=(
            "the smallest network, two rounds, written to experiments/bench-quick: to see that it works, not"
            " to quote"
        ),
    )
    args = parser.parse_args()
    device = make_accelerator(SMALL).device
    path = ROOT / (QUICK if args.quick else OUT + "-cuda" * (device.type == "cuda")) / "training.json"
    found = json.loads(path.read_text()) if path.exists() else dict(networks={})
    found |= about(device)
    todo = ["tiny"] if args.quick else args.network or NETWORKS
    for network, threads in itertools.product(todo, sorted({1, cores()}) if device.type == "cpu" else [1]):
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ, BAVQ_CACHE=f"{root}/cache"):
            one = measure(NETWORKS[network], 2 if args.quick else args.rounds, device, Path(root))
        found["networks"][f"{network}, {threads} thread{'s' * (threads > 1)}"] = one
        write_json(path, found)
        print(f"{network}, threads: {threads}")
        for r in one["arms"]:
            print(
                f"  {r['arm']:30s} {r['images_per_second']:9.1f} images/s  {r['ratio']:.2f}x  losses differ"
                f" by {r['loss_difference']:.0e}"
            )


if __name__ == "__main__":
    main()
