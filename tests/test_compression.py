"""A file comes back exactly, or as an error of one line: damage, wrong models, lies about sizes, other batch
sizes and threads."""

import os
import random

import pytest
import torch

from bavq.core.distributed import set_seed
from bavq.core.errors import BavqError
from bavq.evaluation.compression import (
    CODINGS,
    DIGEST,
    HEADER,
    compress,
    decompress,
    digest,
    image_codes,
    read_codes,
    read_header,
)
from bavq.evaluation.folders import compress_folder, plan_files
from bavq.models.maskgit import make_prior
from bavq.models.vqvae import VQVAE

pytest.importorskip("constriction")
K, IMAGES = 24, 6


def make_model(seed):
    set_seed(seed)
    return VQVAE("vq", codebook_size=K, embedding_dim=4, hidden_channels=4, residual_blocks=0).eval()


def make_some_prior(kind="transformer", seed=0, **options):
    set_seed(seed)
    return make_prior(kind, K, (8, 8), channels=16, layers=1, **options).eval()


@pytest.fixture(scope="module")
def parts():
    "Images, model, prior, and one file for each coding."
    model, prior = make_model(0), make_some_prior()
    images = torch.randint(256, (IMAGES, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        model(images.float() / 127.5 - 1)
    return images, model, prior, {c: compress(images, model, prior, c) for c in CODINGS}


def refused(data, model, prior):
    "Does it end in one line? Anything but an answer or a BavqError fails the test."
    try:
        decompress(data, model, prior)
    except BavqError as e:
        return "\n" not in str(e) and len(str(e)) < 300
    return False


def damaged(data, rng):
    "Yields (what was done, other bytes) without end."
    n = len(data)
    while True:
        i, j, m = rng.randrange(n), rng.randrange(n), rng.randint(1, 16)
        low, high = sorted((i, j))
        yield "flip a bit", data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]
        yield "change a byte", data[:i] + bytes([data[i] ^ rng.randint(1, 255)]) + data[i + 1 :]
        yield "truncate", data[:i]
        yield "lose bytes", data[:i] + data[i + m :]
        yield "gain bytes", data[:i] + rng.randbytes(m) + data[i:]
        yield (
            "swap",
            data[:low]
            + data[high : high + m]
            + data[low + m : high]
            + data[low : low + m]
            + data[high + m :],
        )
        yield "overwrite", data[:i] + rng.randbytes(m) + data[i + m :]
        yield "append", data + rng.randbytes(m)


@pytest.mark.parametrize("coding", CODINGS)
def test_no_damaged_file_is_read(parts, coding):
    _, model, prior, files = parts
    rng, data, tried, silent = random.Random(coding), files[coding], 0, []
    for what, other in damaged(data, rng):
        if other == data:
            continue
        tried += 1
        if not refused(other, model, prior):
            silent.append(what)
        if tried == 240:
            break
    assert not silent


@pytest.mark.parametrize("coding", CODINGS)
def test_no_mixture_of_two_files_is_read(parts, coding):
    _, model, prior, files = parts
    for other in set(CODINGS) - {coding}:
        a, b = files[coding], files[other]
        for cut in (6, 14, 22, HEADER.size, len(a) - DIGEST):
            mixed = a[:cut] + b[cut:]
            assert mixed in (a, b) or refused(mixed, model, prior)


@pytest.mark.parametrize("coding", CODINGS)
def test_codes_that_were_changed_together_with_the_checksum_are_not_read(parts, coding):
    "Whoever computes the checksum anew meets that of the codes. Bits that no code depends on may differ."
    images, model, prior, files = parts
    rng, right = random.Random(0), image_codes(images, model, 32, 64)
    body, caught = files[coding][:-DIGEST], 0
    for _ in range(16):
        i = rng.randrange(HEADER.size, len(body))
        forged = body[:i] + bytes([body[i] ^ rng.randint(1, 255)]) + body[i + 1 :]
        try:
            assert torch.equal(read_codes(forged + digest(forged), model, prior), right)
        except BavqError:
            caught += 1
    assert caught >= 9


@pytest.mark.parametrize("seed", range(1, 6))
def test_only_the_model_and_the_prior_that_wrote_it_read_a_file(parts, seed):
    _, model, prior, files = parts
    for data in files.values():
        assert refused(data, make_model(seed), prior)
    assert refused(files["prior"], model, make_some_prior(seed=seed)) and refused(files["prior"], model, None)
    with torch.no_grad():
        almost = make_some_prior()
        almost.head[1].bias[0] += 1e-6  # one weight, hardly changed
    assert refused(files["prior"], model, almost)


@pytest.mark.parametrize(
    "lie",
    [
        dict(n=2**32 - 1),
        dict(height=2**32 - 1, width=2**32 - 1),
        dict(n=0),
        dict(width=0),
        dict(tile=0),
        dict(tile=65532),
        dict(tile=30),
        dict(channels=200),
        dict(coding=3),
        dict(n=349_526),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(parts, lie, monkeypatch):
    _, model, prior, files = parts
    monkeypatch.setattr(
        "bavq.evaluation.compression.decode_indices", lambda *_: pytest.fail("it went on to decode")
    )
    body = (
        HEADER.pack(*read_header(files["uniform"])._replace(**lie)) + files["uniform"][HEADER.size : -DIGEST]
    )
    assert refused(body + digest(body), model, prior)


@pytest.mark.parametrize("n", [0, 1, 3, HEADER.size, HEADER.size + DIGEST - 1, 5000])
def test_what_is_no_file_is_refused(parts, n):
    _, model, prior, _ = parts
    assert refused(random.Random(n).randbytes(n), model, prior)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("transformer", {}),
        ("pixelcnn", {}),
        ("pixelcnn", dict(num_classes=3)),
        ("transformer", dict(num_classes=1)),
    ],
)
def test_batch_sizes_and_threads_change_nothing(parts, kind, options):
    images, model, _, _ = parts
    prior, threads = make_some_prior(kind, **options), torch.get_num_threads()
    data = compress(images, model, prior, batch_size=1)
    try:
        torch.set_num_threads(2)
        assert compress(images, model, prior, batch_size=7) == data
        assert torch.equal(read_codes(data, model, prior, batch_size=7), image_codes(images, model, 32, 64))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 31), (5, 100)])
def test_images_of_any_size_keep_it(parts, size):
    _, model, prior, _ = parts
    images = torch.randint(256, (2, 3, *size)).byte()
    for coding in CODINGS:
        assert decompress(compress(images, model, prior, coding), model, prior).shape == images.shape


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path):
    for folder, message in {"none": "there is no folder", "": "holds no file"}.items():
        with pytest.raises(BavqError, match=message):
            compress_folder(tmp_path / "run", tmp_path / folder, tmp_path / "out")
    assert not os.path.exists(tmp_path / "out")


def test_two_files_never_become_one(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.bavq", "a.png.bavq"):
        (tmp_path / "in" / name).write_bytes(b"")
    with pytest.raises(BavqError, match="two files of .* would both become a.png"):
        plan_files(
            tmp_path / "in",
            tmp_path / "out",
            (".bavq",),
            lambda n: n.removesuffix(".bavq").removesuffix(".png") + ".png",
        )
