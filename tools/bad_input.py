#!/usr/bin/env python3
"""Give bavq a thousand and more bad inputs: python tools/bad_input.py --out results/safety/bad_input.json

Every case must end in a BavqError of one line that names a cause and a cure (a command: exit code 2, one
line, no traceback), and must leave the folder as it was: no file half-written, none overwritten. Cases are
generated from lists of what can be wrong with a value of a kind; `--seed` and `--share` pick a part of
them."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

os.environ |= {"ACCELERATE_USE_CPU": "true"}
import numpy as np
import torch
from PIL import Image

import bavq
import bavq.evaluation.compression as compression
import bavq.quantizers.remedies as remedies
import bavq.reference as reference
import bavq.theory.metrics as metrics
import bavq.theory.rate_distortion as rd
import bavq.theory.sources as sources
import bavq.training.data as data
from bavq.cli import main
from bavq.core.config import PriorConfig, RunConfig, check_config, config_from_dict
from bavq.core.errors import BavqError
from bavq.core.presets import read_config
from bavq.core.provenance import environment
from bavq.core.storage import read_json, read_weights, write_json
from bavq.models.maskgit import load_prior, make_prior
from bavq.training.checkpoints import load_model
from bavq.training.experiments import load_results, run
from bavq.training.prior_training import prepare_prior
from bavq.training.sweeps import sweep

NAN, INF = float("nan"), float("inf")
WHOLE = ["a", None, 1.5, NAN, INF, -INF, [], {}, (1, 2), -1, -(10**30), 10**30, b"1", 1j]
NUMBER = ["a", None, NAN, -INF, [], {}, (1, 2), b"1", 1j]
NAME = [
    "nope",
    "",
    "os.system",
    "__import__('os').system('touch trapped')",
    "../../etc/passwd",
    "a\0b",
    3,
    None,
    [],
    {},
]
TENSORS = {
    "none": lambda z: None,
    "a text": lambda z: "z",
    "a number": lambda z: 3,
    "a list": lambda z: z.tolist(),
    "an array": lambda z: z.numpy(),
    "whole numbers": lambda z: z.long(),
    "truths": lambda z: z > 0,
    "complex": lambda z: z.to(torch.complex64),
    "empty": lambda z: z[:0],
    "a scalar": lambda z: z.sum(),
    "one axis less": lambda z: z[0],
    "one axis more": lambda z: z[None],
    "too few channels": lambda z: z[:, :1],
    "too many channels": lambda z: torch.cat([z, z], 1),
    "nan": lambda z: z * NAN,
    "infinite": lambda z: z + INF,
    "one nan": lambda z: torch.where(torch.arange(z.numel()).view(z.shape) == 3, NAN, z),
    "huge": lambda z: z * 1e20,
}
QUANTIZERS = {
    "vq": bavq.VectorQuantizer,
    "vq_ema": bavq.VQEMAQuantizer,
    "ba_vq": bavq.BAQuantizer,
    "gumbel": bavq.GumbelQuantizer,
    "fsq": bavq.FSQQuantizer,
    "product": bavq.ProductQuantizer,
    "residual": bavq.ResidualQuantizer,
}


def reference_calls():
    "The same of the described system's calls."
    K, D, count = WHOLE + [0, 1], WHOLE + [0], WHOLE + [0]
    rate, part, flag = NUMBER + [-1.0], NUMBER + [-0.1, 1.0, 2.0], ["yes", None, 1, 0.0, []]
    widths = [256, "a", None, [128], [1, 2, 4], [128, 128], [0, 0], [-1, -2], [1.5, 3.0], {}]
    sizes = dict(num_embeddings=K, embedding_dim=D)
    small = dict(num_embeddings=8, embedding_dim=4)
    betas = dict(beta_start=rate + [0], beta_end=rate + [0], commitment_cost=rate, ba_iterations=count)
    model = reference.VQVAE(3, [4, 8], 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calls = {
        "VQEMAQuantizer": (small, sizes | dict(commitment_cost=rate, decay=part, epsilon=rate + [0])),
        "BAQuantizer": (small, sizes | betas),
        "VectorQuantizer": (small, sizes | dict(commitment_cost=rate, use_ema=flag, decay=part)),
        "GumbelVectorQuantizer": (small, sizes | dict(temperature=rate + [0], hard=flag)),
        "ProductQuantizer": (
            dict(num_subcodebooks=2, subcodebook_size=8, embedding_dim=4, commitment_cost=0.25),
            dict(
                num_subcodebooks=count + [3], subcodebook_size=K, embedding_dim=D + [5], commitment_cost=rate
            ),
        ),
        "Encoder": (
            dict(embedding_dim=4),
            dict(in_channels=count, hidden_dims=widths, embedding_dim=D, num_residual_layers=WHOLE),
        ),
        "Decoder": (dict(embedding_dim=4), dict(out_channels=count, hidden_dims=widths, embedding_dim=D)),
        "VQVAE": (
            dict(quantizer_type="vq_ema", codebook_size=8, latent_dim=4, hidden_channels=8),
            dict(quantizer_type=NAME, codebook_size=K, latent_dim=D, hidden_channels=count, nonsense=[1]),
        ),
        "VQVAE2": (
            dict(embedding_dim=4),
            dict(num_embeddings_top=K, num_embeddings_bottom=K, in_channels=count),
        ),
        "VQVAETrainer": (
            dict(model=model, optimizer=optimizer),
            dict(model=[None, "a", 3], optimizer=[None, "a"], recon_loss_type=NAME),
        ),
        "get_dataloaders": (
            dict(dataset="photos"),
            dict(batch_size=count, num_workers=WHOLE, dataset=["nope", None, 3], train_size=[-1, 10**9, "a"]),
        ),
        "validate": (
            dict(model=reference.VQVAE("vq_ema", 8, 4, hidden_channels=8), loader=[], device="cpu"),
            dict(model=[None, "a", model], loader=[None, 3, []], device=["gpu", 3.5, None]),
        ),
    }
    for name, (good, bad) in calls.items():
        for key, values in bad.items():
            for value in values:
                what = f"{key}={value!r:.40}"
                yield (
                    f"reference {name}",
                    what,
                    lambda n=name, o={**good, key: value}: getattr(reference, n)(**o),
                )
    for what, value in dict(
        text="a", none=None, whole=torch.ones(1, 3, 8, 8).long(), outside=-torch.ones(1, 3, 8, 8)
    ).items():
        yield (
            "reference train_step",
            what,
            lambda v=value: reference.VQVAETrainer(model, optimizer).train_step(v),
        )


def functions():
    "Yields (function, what is wrong, call) of public functions and classes."
    yield from reference_calls()
    g = torch.Generator().manual_seed(0)
    z, x, d = (
        torch.randn(4, 8, 3, 3, generator=g),
        torch.rand(2, 3, 8, 8, generator=g),
        torch.rand(6, 4, generator=g),
    )

    def each(name, call, good, bad):
        for k, values in bad.items():
            for v in values:
                yield name, f"{k}={v!r:.40}", lambda k=k, v=v: call(**{**good, k: v})

    size = dict(num_embeddings=WHOLE + [0, 1], embedding_dim=WHOLE + [0])
    rate, part = NUMBER + [-1.0], NUMBER + [-0.1, 1.0, 2.0]
    more = dict(
        vq=dict(commitment_cost=rate, init=NAME, distance=NAME, gradient=NAME),
        vq_ema=dict(commitment_cost=rate, decay=part, restart_below=part, distance=NAME),
        ba_vq=dict(
            commitment_cost=rate,
            decay=part,
            marginal=["nope", NAN, 2.0, []],
            beta=[0, -1, NAN, "a", (1,), (1, 2, 3), None],
        ),
        gumbel=dict(temperature=[0, -1, NAN, "a", None, (1, 2, 3)], sample=NAME),
        fsq=dict(levels=[(1, 2), (2, 8), "a", 3.5, (1000, 3), -1]),
        product=dict(groups=[0, -1, 3, "a", None, 2.5], base=NAME),
        residual=dict(levels=[0, -1, "a", None, 2.5, (3, 5)], base=NAME, dropout=[-0.1, 1.1, NAN, "a"]),
    )
    for name, cls in QUANTIZERS.items():
        good = dict(num_embeddings=64, embedding_dim=8)
        yield from each(cls.__name__, cls, good, size | more[name])
        yield from each(
            f"make_quantizer {name}",
            lambda name=name, **o: bavq.make_quantizer(name, **o),
            good,
            dict(size, nonsense=[1], commitment_cost=["a"]),
        )
        torch.manual_seed(0)
        q = bavq.make_quantizer(name, 64, 8).train()
        q(z)
        for what, change in TENSORS.items():
            if what == "too many channels" and name == "-":
                continue
            yield f"{cls.__name__}.forward", what, lambda q=q, change=change: q.train()(change(z))
            yield f"{cls.__name__}.encode", what, lambda q=q, change=change: q.eval().encode(change(z))
        index = q.eval().encode(z)
        wrong = {
            "floats": index.float(),
            "too large": index + 64,
            "negative": index - 65,
            "two axes": index[0],
            "none": None,
            "a list": index.tolist(),
            "truths": index > 3,
        }
        for what, i in wrong.items():
            yield f"{cls.__name__}.decode", what, lambda q=q, i=i: q.decode(i)
    yield from each(
        "make_quantizer", bavq.make_quantizer, dict(num_embeddings=16, embedding_dim=8), dict(name=NAME[:7])
    )
    yield from each(
        "VQVAE",
        bavq.VQVAE,
        dict(codebook_size=16, embedding_dim=8, hidden_channels=8),
        dict(
            quantizer=NAME[:6] + [None, 3, torch.nn.Linear(2, 2)],
            codebook_size=WHOLE + [1],
            embedding_dim=WHOLE + [0],
            in_channels=WHOLE + [0],
            hidden_channels=WHOLE + [0],
            residual_blocks=WHOLE,
        ),
    )
    yield from each(
        "check_quantizer", bavq.check_quantizer, {}, dict(q=[None, 3, "vq", torch.nn.Linear(2, 2)])
    )
    for what, change in TENSORS.items():
        if what in ("huge", "nan", "infinite", "one nan"):
            continue
        yield "compute_psnr", what, lambda change=change: bavq.compute_psnr(x, change(x))
    yield from each("compute_psnr", bavq.compute_psnr, dict(x=x, y=x), dict(convention=NAME[:6]))
    some = torch.zeros(2, 3, dtype=torch.long)
    bad_indices = [None, "a", [1, 2], 3, 0.5, np.ones(3), torch.zeros(0).long(), torch.zeros(2, 3), some > 0]
    for f in (bavq.compute_perplexity, bavq.compute_usage_rate):
        wrong = [*bad_indices, some + 16, some - 1, torch.ones(16).long()]
        bad = dict(indices=wrong, num_embeddings=WHOLE + [0])
        yield from each(f.__name__, f, dict(indices=some, num_embeddings=16), bad)
    bad_counts = dict(counts=[None, "a", [1, 2], 3, np.ones(3), torch.zeros(0), torch.tensor(3)])
    for f in (metrics.perplexity_of_counts, metrics.usage_of_counts, bavq.dead_codes):
        yield from each(f.__name__, f, {}, bad_counts)
    yield from each("entropy_term", bavq.entropy_term, {}, dict(weight=rate, sharpness=rate + [0]))
    yield from each("ramp", remedies.ramp, dict(start=0.0, end=1.0), dict(until=part[:-2] + [0, 1.1]))
    bad_d = [
        None,
        "a",
        torch.zeros(0, 3),
        torch.zeros(3),
        -torch.ones(3, 3),
        torch.full((3, 3), NAN),
        torch.full((3, 3), INF),
    ]
    yield from each(
        "blahut_arimoto",
        rd.blahut_arimoto,
        dict(d=d, beta=1.0),
        dict(
            d=bad_d,
            beta=NUMBER + [0, -1.0, INF],
            iterations=WHOLE[:8] + [0],
            tol=["a", None, NAN],
            p=["a", torch.zeros(6), torch.ones(5), torch.full((6,), NAN), -torch.ones(6)],
            Q=["a", torch.zeros(4), torch.ones(5), torch.full((4,), NAN)],
        ),
    )
    yield from each(
        "rd_curve",
        rd.rd_curve,
        dict(d=d, betas=[1.0]),
        dict(d=bad_d, betas=[None, "a", [], [0.0], [NAN], [-1.0], 0]),
    )
    yield from each(
        "gaussian_rd",
        rd.gaussian_rd,
        dict(variances=[1.0, 2.0], distortion=0.5),
        dict(
            variances=["a", None, [], [0.0], [-1.0], [NAN], [INF], [[1.0]]],
            distortion=["a", None, 0.0, -1.0, NAN],
        ),
    )
    yield from each(
        "bernoulli_rd",
        rd.bernoulli_rd,
        dict(p=0.5, distortion=0.1),
        dict(p=NUMBER + [-0.1, 1.1], distortion=["a", None, -1.0, NAN]),
    )
    for f, o in (
        (sources.gaussian_source, {}),
        (sources.bernoulli_source, dict(p=NUMBER + [-0.1, 1.1])),
        (sources.mixture_source, dict(num_components=WHOLE[:9] + [0], dim=WHOLE[:9] + [0])),
    ):
        yield from each(f.__name__, f, dict(n=10), dict(n=WHOLE + [0], **o))
    yield from each(
        "gaussian_source",
        sources.gaussian_source,
        dict(n=10),
        dict(cov_or_dim=[0, -1, "a", None, [[1.0, 2.0]], [[1.0, 2.0], [3.0, 1.0]], [-1.0], [NAN]]),
    )
    yield from each(
        "make_prior",
        make_prior,
        dict(kind="pixelcnn", num_embeddings=16, grid=(4, 4)),
        dict(
            kind=NAME[:6],
            num_embeddings=WHOLE + [0],
            grid=[None, 3, "a", (4,), (0, 4), (4, -1), (4, 4, 4)],
            channels=WHOLE + [0],
            layers=WHOLE[:10],
        ),
    )
    model = bavq.VQVAE("vq", 16, 8, hidden_channels=8, residual_blocks=0).eval()
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    yield from each(
        "compress",
        compression.compress,
        dict(images=pixels, model=model),
        dict(
            images=[None, "a", x, pixels[0], pixels[:0], pixels[:, :2], pixels.tolist()],
            model=[None, "a", torch.nn.Linear(2, 2)],
            coding=["nope", 3, "prior"],
            tile=[0, -4, 30, "a", None, 2.5],
            batch_size=[0, -1, "a", None],
        ),
    )
    yield from each(
        "decompress",
        compression.decompress,
        dict(data=b"BAVQ", model=model),
        dict(data=[b"", b"BAVQ", b"x" * 100, "a", None, 3]),
    )


def configurations(folder):
    "Yields (what, what is wrong, call) of every field of both configurations."
    lists = {
        "int": WHOLE,
        "float": [*NUMBER, -1.0],
        "str": [3, None, [], {}, "a\0b", b"a"],
        "bool": ["yes", 3, None, []],
        "dict": ["a", 3, None, [], {"a": []}, {"a": {}}, {3j: 1}],
    }
    for f in fields(RunConfig):
        for v in lists[f.type.partition("[")[0]]:
            yield (
                "RunConfig",
                f"{f.name}={v!r:.40}",
                lambda f=f, v=v: check_config(replace(RunConfig(), **{f.name: v})),
            )
            yield (
                "config_from_dict",
                f"{f.name}={v!r:.40}",
                lambda f=f, v=v: check_config(config_from_dict({f.name: v})),
            )
            yield (
                "run",
                f"{f.name}={v!r:.40}",
                lambda f=f, v=v: run(
                    replace(RunConfig(data=str(folder / "images.npz")), **{f.name: v}),
                    folder / "runs",
                    progress=False,
                ),
            )
    for d in (None, 3, "a", [], [1], {"epoch": 1}, {3: 1}, {None: 1}):
        yield "config_from_dict", repr(d), lambda d=d: config_from_dict(d)
    codes = bavq.__dict__.get("_codes") or __import__(
        "bavq.training.prior_training", fromlist=["Codes"]
    ).Codes(*[np.zeros((64, 4, 4), np.uint8)] * 2, *[np.zeros(64, int)] * 2, 16, num_classes=1)
    for f in fields(PriorConfig):
        if f.name in ("name", "wandb", "class_conditional"):
            continue
        for v in lists[f.type.partition("[")[0]] + ["nope"] * (f.type == "str"):
            yield (
                "PriorConfig",
                f"{f.name}={v!r:.40}",
                lambda f=f, v=v: prepare_prior(replace(PriorConfig(), **{f.name: v}), codes),
            )
    for k, v in dict(configs=[[], None], jobs=[0, -1, "a", None]).items():
        if k == "jobs":
            for j in v:
                yield (
                    "sweep",
                    f"jobs={j!r}",
                    lambda j=j: sweep([RunConfig()], folder / "runs", jobs=j, progress=False),
                )


def damage(whole, rng):
    "Yields (what was done, other bytes)."
    n = len(whole)
    for i in range(12):
        k = rng.randrange(n)
        yield f"cut at {k}", whole[:k]
        yield f"bit {k} flipped", whole[:k] + bytes([whole[k] ^ 1 << rng.randrange(8)]) + whole[k + 1 :]
        yield f"overwritten at {k}", whole[:k] + rng.randbytes(40) + whole[k + 40 :]
    yield from {
        "empty": b"",
        "noise": rng.randbytes(500),
        "zeros": bytes(500),
        "text": b"hello",
        "another kind": b"PK\3\4" + bytes(60),
        "json": b'{"a": 1}',
        "list": b"[1, 2]",
        "deep": b"[" * 100000,
    }.items()


def files(folder):
    """Yields (format, what is wrong, call) of damaged and foreign files; a change that the reader may not see
    is left out."""
    rng = random.Random(0)
    torch.save({"a": torch.randn(100)}, folder / "w.pt")
    readers = {
        "weights .pt": ("w.pt", read_weights),
        "images .npz": ("images.npz", lambda p: data.load_images(str(p))),
        "images .npy": ("images.npy", lambda p: data.load_images(str(p))),
        "image .png": ("one.png", lambda p: data.read_image(p)),
        "json": ("c.json", lambda p: config_from_dict(read_json(p))),
        "yaml": ("c.yaml", read_config),
    }
    for kind, (name, read) in readers.items():
        whole = (folder / name).read_bytes()
        for i, (what, other) in enumerate(damage(whole, rng)):
            visible = kind in ("weights .pt", "images .npz") or not what.startswith(
                ("bit", "overwritten", "cut")
            )
            path = folder / "bad" / f"{i}{Path(name).suffix}"
            if not visible or (kind == "yaml" and what in ("empty",)):
                continue
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(other)
            if kind in ("weights .pt", "images .npz") and same(read, path, folder / name):
                continue
            yield kind, what, lambda read=read, path=path: read(path)
        for path in (folder / "none.xyz", folder, folder / "none" / "x"):
            yield kind, f"path {path.name}", lambda read=read, path=path: read(path)
    for f in (load_model, load_prior, load_results):
        for path in ("none", "", str(folder / "w.pt"), "a\0b"):
            yield (
                f.__name__,
                f"folder {path[-6:]!r}",
                lambda f=f, path=path: f(folder / path if path else folder / "bad"),
            )
    for name in ("fotos", "", "no/such/folder", "x.npz", "x.npy", str(folder), "a\0b/c", None, 3):
        yield "load_images", repr(name)[:40], lambda name=name: data.load_images(name)
    for k, v in (
        [("batch_size", b) for b in WHOLE + [0]]
        + [("workers", b) for b in WHOLE]
        + [("train_size", b) for b in WHOLE + [1000]]
        + [("image_size", b) for b in WHOLE + [3]]
    ):
        yield (
            "get_dataloaders",
            f"{k}={v!r:.40}",
            lambda k=k, v=v: data.get_dataloaders(str(folder / "images.npz"), **{"batch_size": 8, k: v}),
        )


def same(read, path, whole):
    "Does a changed file still say the same?"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            a, b = read(path), read(whole)
        except Exception:
            return False
    return all(
        torch.equal(torch.as_tensor(u), torch.as_tensor(v))
        for u, v in zip(
            a.values() if isinstance(a, dict) else a[:4], b.values() if isinstance(b, dict) else b[:4]
        )
    )


def commands():
    "Yields (command, what is wrong, arguments)."
    whole, number, text = (
        ["three", "-1", "1.5", "nan", "1e99", ""],
        ["three", "nan", "-1", "", "1e-3x"],
        ["nope", "a/b/c", ""],
    )
    bad = {"int": whole, "float": number, "bool": ["perhaps"], "dict": ["one"]}
    base = ["train", "--data", "images.npz"]
    for f in fields(RunConfig):
        for v in bad.get(f.type.partition("[")[0], []):
            yield (
                f"train --{f.name}",
                repr(v),
                [
                    *base,
                    f"--{f.name}={v}" if f.type != "dict" else f"--{f.name}",
                    *([v] if f.type.startswith("dict") else []),
                ],
            )
    for option, values in {
        "--quantizer": NAME[:5],
        "--precision": text,
        "--preset": ["nope"],
        "--config": ["none.yaml", "bad/0.pt", "."],
        "--data": ["nope", "a/b/c", "", "none.npz", "."],
        "--name": ["a/b", "..", ".", "x" * 300, "a\nb"],
        "--nonsense": ["1"],
        "--out": ["images.npz", "/proc/none/x"],
        "--options": ["distance", "nope nope"],
    }.items():
        for v in values:
            yield f"train {option}", repr(v)[:40], [*base, option, *v.split(" ")]
    for command, options in {
        "compare": {
            "--preset": ["nope"],
            "--data": ["nope"],
            "--seeds": whole,
            "--jobs": whole,
            "--epochs": whole,
            "--train_size": ["three", "-2", *whole[2:5]],
            "--codebook_sizes": whole,
            "--quantizers": ["nope"],
            "--nonsense": ["1"],
        },
        "evaluate": {"": ["none", "images.npz", "."], "--nonsense": ["1"]},
        "summarise": {"": ["none", "images.npz", "."]},
        "prior": {"": ["", "nope"], "train": ["none", "."], "sample": ["none", "."]},
        "compress": {"": ["", "none", "none none none", ". . out"]},
        "decompress": {"": ["", "none", "none none none"]},
        "lab": {"": ["nope"], "--K": whole, "--steps": whole, "--commitment": number, "--seeds": whole[:4]},
        "nope": {"": [""]},
        "": {"--nope": [""]},
    }.items():
        for option, values in options.items():
            for v in values:
                value = [f"{option}={v}"] if option.startswith("--") else [option, *v.split(" ")]
                yield f"{command} {option}".strip(), repr(v), [a for a in [command, *value] if a]


def snapshot(folder):
    "Every file below a folder, with what it holds."
    return {
        str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def one_line(e):
    "Is a message one line that names a cause and a cure?"
    text = str(e)
    return "\n" not in text.strip() and ": " in text and 10 < len(text) < 600


def judge(call):
    "What became of a call: fine, or what was wrong with it."
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            call()
    except BavqError as e:
        return "fine" if one_line(e) else f"not one line with cause and cure: {str(e)[:200]}"
    except BaseException as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    return "accepted"


def judge_command(args):
    "The same of a command."
    said, code = io.StringIO(), 0
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            main(args)
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    lines = said.getvalue().strip().splitlines()
    return (
        "fine"
        if code == 2 and len(lines) == 1 and lines[0].startswith("bavq: ")
        else f"exit {code}: {' | '.join(lines)[:200]}"
    )


def prepare(folder):
    "Good files, next to which the bad ones lie."
    x = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", train=x[:64], test=x[64:])
    np.save(folder / "images.npy", x)
    Image.fromarray(x[0]).save(folder / "one.png")
    (folder / "c.json").write_text(json.dumps(asdict(RunConfig())))
    (folder / "c.yaml").write_text("lr: 1e-3\n")


def campaign(share=1.0, seed=0, kinds=("function", "configuration", "file", "command")):
    "Try the cases, or a part of them; counts by kind and what went wrong."
    rng, tried, wrong, began, here = random.Random(seed), Counter(), [], time.perf_counter(), os.getcwd()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        prepare(folder)
        os.chdir(folder)
        try:
            makers = dict(
                function=functions,
                configuration=lambda: configurations(folder),
                file=lambda: files(folder),
                command=commands,
            )
            for kind in kinds:
                cases = list(makers[kind]())
                before = snapshot(folder)
                for name, what, call in cases:
                    if rng.random() > share:
                        continue
                    tried[f"{kind}: {name if kind == 'file' else name.split(' --')[0].split('.')[0]}"] += 1
                    outcome = judge_command(call) if kind == "command" else judge(call)
                    if outcome != "fine":
                        wrong.append(f"{kind} {name} [{what}] {outcome}")
                        print(wrong[-1], file=sys.stderr, flush=True)
                if (after := snapshot(folder)) != before:
                    wrong.append(
                        f"{kind}: files changed: {sorted(set(after.items()) ^ set(before.items()))[:5]}"
                    )
        finally:
            os.chdir(here)
    return dict(
        cases=sum(tried.values()),
        fine=sum(tried.values()) - len(wrong),
        tried=dict(sorted(tried.items())),
        wrong=wrong,
        seed=seed,
        seconds=round(time.perf_counter() - began, 1),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["function", "configuration", "file", "command"])
    parser.add_argument("--out", default="", help="a JSON file; empty: only print")
    o = parser.parse_args()
    torch.set_num_threads(1)
    record = campaign(o.share, o.seed, o.kinds) | environment()
    if o.out:
        write_json(o.out, record)
    print(json.dumps(record, indent=1))
    sys.exit(bool(record["wrong"]))
