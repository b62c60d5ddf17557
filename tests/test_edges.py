"Cases at the edge, each of which once gave a wrong number, the wrong data or a traceback."

import math
import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bavq.comparison.compare import name_arms, verdict
from bavq.comparison.explore import make_schedule
from bavq.core.config import PriorConfig, RunConfig, check_config, require_same, run_name
from bavq.core.distributed import get_rng_state, set_rng_state
from bavq.core.errors import BavqError, DiskError
from bavq.core.plots import cell_borders
from bavq.core.storage import newest_checkpoint, read_weights, write_final_weights
from bavq.evaluation.evaluate import evaluate
from bavq.evaluation.reports import load_weights, report
from bavq.evaluation.scores import operating_point
from bavq.evaluation.summaries import summarise
from bavq.models.maskgit import make_prior
from bavq.models.networks import Decoder
from bavq.models.vqvae import VQVAE
from bavq.quantizers.base import VectorQuantizer
from bavq.studies.linear_lab import distortion_bound
from bavq.theory import sources
from bavq.theory.metrics import LossMeter, compute_entropy_bits
from bavq.theory.rate_distortion import blahut_arimoto, blahut_arimoto_codebook
from bavq.theory.statistics import minimum_detectable_effect, paired_difference, permutation_p
from bavq.training import data
from bavq.training import images as image_sets
from bavq.training.checkpoints import load_model, save_checkpoint
from bavq.training.experiments import run
from bavq.training.loop import fit, make_accelerator, prepare
from bavq.training.prior_training import extract_codes, model_codes, save_samples, train_prior

TINY = RunConfig(
    train_size=64,
    codebook_size=8,
    embedding_dim=4,
    hidden_channels=4,
    residual_blocks=0,
    epochs=1,
    batch_size=32,
)


def write_folder(root, color, n=2, side=8):
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (side, side), (color,) * 3).save(root / split / "a" / f"{i}.bmp")
            os.utime(root / split / "a" / f"{i}.bmp", (0, 0))


def test_folders_of_one_relative_name_are_two(tmp_path, monkeypatch):
    monkeypatch.setenv("BAVQ_CACHE", str(tmp_path / "cache"))
    means = []
    for project, color in (("one", 0), ("two", 255)):
        write_folder(tmp_path / project / "data", color)
        monkeypatch.chdir(tmp_path / project)
        means.append(data.load_images("./data").train.float().mean().item())
    assert means == [0, 255]


def test_a_cache_is_read_where_it_cannot_be_written_and_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BAVQ_CACHE", str(tmp_path))
    built = []

    def build():
        built.append(1)
        return dict(x=np.arange(3))

    def full(*a):
        raise DiskError("there is no room: make some")

    with monkeypatch.context() as m, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        m.setattr(image_sets, "atomic_write", full)
        assert image_sets.cached("a", 1, build)["x"].tolist() == [0, 1, 2]
        assert len(built) == 1 and len(said) == 1
    image_sets.cached("a", 1, build)
    monkeypatch.setattr("filelock.FileLock", full)
    assert image_sets.cached("a", 1, build)["x"].tolist() == [0, 1, 2] and len(built) == 2


def test_a_folder_beyond_the_default_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("BAVQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MEMORY_LIMIT", 100)
    write_folder(tmp_path / "f", 7, n=4)
    assert len(data.get_dataloaders(str(tmp_path / "f"), 2, memory_limit=2**20)[0].images) == 4
    with pytest.raises(BavqError, match="give a multiple of 4"):
        data.get_dataloaders(str(tmp_path / "f"), 2, image_size=30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert data.read_image(str(tmp_path / "f/train/a/0.bmp")).size == (8, 8)


def test_more_processes_than_images_are_left(tmp_path):
    class Five:
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return torch.zeros(3, 8, 8, dtype=torch.uint8), 0

    shares = [
        [len(x) for x, _ in data.StreamedBatches(Five(), batch_size=4, train=False, rank=r, world_size=4)]
        for r in range(4)
    ]
    assert sum(map(sum, shares)) == 5


def test_labels_of_any_whole_type(tmp_path):
    images = np.zeros((20, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz",
        train=images,
        test=images,
        train_labels=np.arange(20).astype(">i4"),
        test_labels=np.arange(20),
    )
    assert data.load_images(str(tmp_path / "a.npz")).train_labels.tolist() == list(range(20))
    np.savez(
        tmp_path / "b.npz",
        train=images,
        test=images,
        train_labels=np.arange(20) + 10**7,
        test_labels=np.arange(20),
    )
    with pytest.raises(BavqError, match="below a million"):
        data.load_images(str(tmp_path / "b.npz"))
    decoder = Decoder(3, 4, 4, 1, num_classes=3)
    for kind in (torch.uint8, torch.int16):
        assert decoder(torch.zeros(2, 4, 2, 2), torch.tensor([0, 2], dtype=kind)).shape == (2, 3, 8, 8)
    prior = make_prior("pixelcnn", 8, (4, 4), channels=16, layers=1, num_classes=3)
    assert prior.nll(
        torch.zeros(2, 4, 4, dtype=torch.long), torch.tensor([0, 2], dtype=torch.uint8)
    ).shape == (2,)
    with pytest.raises(BavqError, match="give labels"):
        prior.nll(torch.zeros(2, 4, 4, dtype=torch.long), torch.tensor([0.0, 2.0]))


def test_singular_sources():
    assert sources.gaussian_source(3, [0.0, 0.0]).abs().sum() == 0


def test_an_estimate_does_not_depend_on_the_batch():
    "A prior that knows the more, the more it sees: its costs depend on how many codes are masked."
    prior, grids = (
        make_prior("maskgit", 8, (4, 4), channels=16, layers=1).eval(),
        torch.zeros(64, 4, 4, dtype=torch.long),
    )
    prior.logits = lambda x, cond=None: (
        10 * (x < 8).float().mean((1, 2))[:, None, None, None] * torch.eye(8)[0].expand(*x.shape, 8)
    )
    whole = prior.nll_estimate(grids).mean()
    for n in (1, 3, 16):
        assert abs(torch.cat([prior.nll_estimate(g) for g in grids.split(n)]).mean() / whole - 1) < 0.25


def test_the_transformers_cache_needs_no_context():
    prior = make_prior("transformer", 8, (4, 4), channels=16, layers=1).eval()
    grids, cache = torch.randint(8, (2, 4, 4)), {}
    cached = torch.stack([prior.next_logits(grids, t, None, cache) for t in range(16)], 1)
    torch.testing.assert_close(cached, prior.logits(grids).flatten(1, 2).detach(), rtol=1e-4, atol=1e-4)


def test_no_significance_out_of_nothing():
    assert math.isnan(permutation_p([1, -1, math.nan]))
    constant = paired_difference(pd.Series([1.7] * 7), pd.Series([1.0] * 7))
    assert constant["diff"] == pytest.approx(0.7) and math.isnan(constant["p"])
    a, b = pd.Series([1.0, 2.0, 4.0, math.nan]), pd.Series([0.0, 1.5, 2.0, 1.0])
    assert paired_difference(a, b) == paired_difference(a[:3], b[:3])
    runs = pd.DataFrame(
        [
            dict(
                data="x",
                codebook_size=8,
                distance="euclidean",
                method=m,
                seed=s,
                run=f"{m}{s}",
                psnr=1.0 + s,
                perplexity=2.0,
                usage_rate=1.0,
                dead_codes=0,
            )
            for m, seeds in (("ba_vq", (0, 1)), ("vq_ema", (0, 0)))
            for s in seeds
        ]
    )
    with pytest.raises(BavqError, match="vq_ema was run twice"):
        summarise(runs)


def test_effects_that_few_pairs_can_find():
    for n, options in ((2, dict(alpha=0.01)), (2, dict(power=0.99)), (3, dict(alpha=0.001))):
        assert 5 < minimum_detectable_effect(n, **options) < 100


@pytest.mark.parametrize("beta", [1e3, 1e6, 1e8, 1e9])
def test_the_rate_at_a_high_price(beta):
    assert blahut_arimoto(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), beta).rate.item() == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_bounds_of_any_scale():
    assert distortion_bound(np.array([1e-12]), 1.0) == pytest.approx(0.25e-12) and distortion_bound(
        np.array([1.0]), 16.0
    ) == pytest.approx(2.0**-32)


def test_borders_of_any_scale():
    codes = np.random.default_rng(0).uniform(-1, 1, (512, 2))
    assert len({len(cell_borders(c)) for c in (codes, codes / 512, codes * 1e-4, codes + 1e6)}) == 1


def test_averages_of_low_precision():
    meter = LossMeter()
    for _ in range(1000):
        meter.update(dict(loss=torch.tensor(1.0, dtype=torch.bfloat16)))
    assert meter.compute()["loss"] == pytest.approx(1)


def test_half_precision_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(BavqError, match="fp16 does not work on this machine"):
        make_accelerator(RunConfig(precision="fp16"))
    prepare(TINY)  # the next one is as ever


def test_loading_draws_nothing(tmp_path):
    fit(prepare(TINY), tmp_path / "run", progress=False)
    torch.manual_seed(7)
    before = torch.rand(1)
    for load in (
        load_model,
        lambda folder: load_weights(folder / "final_model.pt"),
        lambda folder: load_weights(shutil.copy(folder / "final_model.pt", tmp_path)),
        lambda folder: load_weights(folder / "final_model.safetensors"),
        lambda folder: load_weights(shutil.copy(folder / "final_model.safetensors", tmp_path)),
    ):
        torch.manual_seed(7)
        load(tmp_path / "run")
        assert torch.equal(torch.rand(1), before)
    write_final_weights(tmp_path / "run", dict(x=torch.zeros(1)), {})
    with pytest.raises(BavqError, match="of another version"):
        load_model(tmp_path / "run")


def test_a_warm_up_is_of_its_images(tmp_path, monkeypatch):
    "Other pictures behind the same path: nothing of the old ones is left in a new run."
    monkeypatch.chdir(tmp_path)

    def images(seed, top):
        a = np.random.default_rng(seed).integers(0, top, (80, 16, 16, 3), dtype=np.uint8)
        np.savez("v.npz", train=a[:64], test=a[64:])

    c = replace(TINY, data="v.npz", train_size=0, epochs=3, warmup_steps=4, lr=3e-3)
    images(0, 255)
    run(c, "one", progress=False)
    images(1, 60)
    shutil.rmtree(tmp_path / "one" / run_name(c))
    assert run(c, "one", progress=False) == run(c, "two", progress=False)
    assert len(list((tmp_path / "one").glob(".warmup-*"))) == 2


def test_a_schedule_by_entropy_keeps_its_ends(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent / "nbs/7_comparison")  # beside the records
    f = make_schedule("entropy", 50, 1000)
    assert f(0) == pytest.approx(50) and f(1) == pytest.approx(1000) and 100 < f(0.5) < 500


def test_two_levels_are_not_taken_for_one(tmp_path):
    fit(prepare(replace(TINY, levels=2)), tmp_path / "run", progress=False)
    with pytest.raises(BavqError, match="has two levels of codes"):
        extract_codes(tmp_path / "run")
    assert not list((tmp_path / "run").glob("codes-*"))


def test_a_new_checkpoint_stays_beside_damaged_ones_of_later_epochs(tmp_path):
    t = prepare(TINY)
    for epoch in (9, 10):
        (tmp_path / f"checkpoint_epoch{epoch}.pt").write_bytes(b"damaged")
    for t.epoch in (1, 2):
        path = save_checkpoint(t, tmp_path)
        assert path.exists() and (tmp_path / "latest").read_text().strip() == path.name
    with pytest.warns(match="checkpoint_epoch10"):
        assert newest_checkpoint(tmp_path)["epoch"] == 2


def test_a_model_is_left_in_training_also_where_its_evaluation_fails():
    model = VQVAE("vq_ema", 8, 4, hidden_channels=4, residual_blocks=0).train()
    with pytest.raises(BavqError, match="no images"):
        evaluate(model, [])
    assert model.training


def test_blahut_arimoto_keeps_no_graph():
    "Codes that learn by gradient are read and not followed."
    x, q = torch.randn(64, 4), VectorQuantizer(8, 4)
    result = blahut_arimoto_codebook(x.requires_grad_(), q.codebook, beta=1.0, iterations=5)
    assert not any(v.requires_grad for v in result if torch.is_tensor(v))


def test_random_states_of_another_machine(monkeypatch):
    "A checkpoint of a machine with GPUs is resumed on one without."
    state = get_rng_state()
    before = torch.rand(1)
    set_rng_state(state | dict(cuda=[torch.zeros(16, dtype=torch.uint8)] * 8))
    assert torch.equal(torch.rand(1), before)


def test_one_run_has_one_name():
    """Numbers of any kind, and options that are no texts, mean what they say, and the name of the run is the
    same."""
    plain = RunConfig(epochs=3, lr=1e-3, clip_grad=0.0, seed=1, options={"decay": "0.95"})
    other = RunConfig(epochs=3.0, lr=np.float64(1e-3), clip_grad=0, seed=np.int64(1), options={"decay": 0.95})
    assert run_name(other) == run_name(plain) and check_config(other) == plain
    require_same(other, asdict(plain), Path("."))


def test_rate_and_distortion_of_a_codebook_that_has_collapsed():
    torch.manual_seed(0)
    x, codes = 0.01 * torch.randn(500, 4), torch.randn(512, 4)
    nearest = torch.cdist(x, codes).argmin(1)
    scores, _ = operating_point(
        x, codes[nearest], compute_entropy_bits(nearest.bincount(minlength=512)).item(), codes
    )
    assert -0.01 < scores["excess_bits"] < 1


def test_small_data_sets_are_evaluated(tmp_path, monkeypatch):
    "One test image, and fewer training images than a batch."
    monkeypatch.chdir(tmp_path)
    fit(prepare(replace(TINY, batch_size=64)), tmp_path / "run", progress=False)
    np.save("few.npy", np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    report([tmp_path / "run"], "out", data="few.npy", judges=[])
    assert (tmp_path / "out" / "evaluation.json").exists()


def test_classes_that_training_images_lack(tmp_path, monkeypatch):
    "They count as classes, and a figure of samples leaves places empty; a prior of other codes is refused."
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), dtype=np.uint8)
    np.savez(
        "x.npz",
        train=x[:40],
        test=x[40:],
        train_labels=np.arange(40) % 2,
        test_labels=np.array([0] * 6 + [2] * 2),
    )
    run(replace(TINY, name="run", data="x.npz", train_size=0), ".", progress=False)
    train_prior(
        "run", PriorConfig(kind="pixelcnn", channels=16, layers=1, epochs=1, batch_size=8), progress=False
    )
    assert extract_codes("run").num_classes == 3 and save_samples("run/priors/pixelcnn", n=4).exists()
    state = read_weights("run/final_model.safetensors")
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    write_final_weights(Path("run"), changed, {})
    with pytest.raises(BavqError, match="of other codes"):
        save_samples("run/priors/pixelcnn", n=1)


def test_loaders_are_given_back_as_they_were():
    t = prepare(TINY)
    t.train_loader.set_epoch(3, 1)
    (codes,) = model_codes(t.model.eval(), t.train_loader, t.test_loader)
    assert len(codes.train) == 64 and (t.train_loader.train, t.train_loader.epoch, t.train_loader.start) == (
        True,
        3,
        1,
    )


def test_differences_in_per_cent_are_of_the_pairs():
    "Two more seeds of one method, far off, change nothing."
    rows = [
        dict(
            run=f"{m}{s}",
            data="toy",
            codebook_size=64,
            distance="euclidean",
            method=m,
            seed=s,
            psnr=20.0 + s,
            perplexity=p,
            usage_rate=1.0,
            dead_codes=0,
        )
        for m, values in (("vq_ema", (50.0, 50.5, 51.2)), ("ba_vq", (100.0, 101.0, 102.0, 10.0, 10.0)))
        for s, p in enumerate(values)
    ]
    text = verdict(summarise(pd.DataFrame(rows)))
    assert "+99.7 % of VQ-EMA's in the median" in text and "VQ-EMA" in text
    again = pd.DataFrame(rows).replace({"method": {"vq_ema": "vq"}})
    assert "VQ-EMA" not in verdict(summarise(again, "vq"), baseline="vq")
    tuned = "peer_vq decay=0.95 gradient=straight_through threshold_ema_dead_code=0.3"  # with 4,096 codes
    methods = dict(method=["vq_ema", "vq_ema decay=0.95", tuned, tuned], codebook_size=[512, 512, 4096, 512])
    assert name_arms(pd.DataFrame(methods))["method"].tolist() == [
        "vq_ema with defaults",
        "vq_ema",
        "peer_vq_tuned",
        tuned,
    ]
