"""The calls of the described system, of its guide and of its tutorial, run as written, on small data under
the name of CIFAR-10; and what each says to a mistake."""

import json

import pytest
import torch
import torch.nn.functional as F

from bavq import reference
from bavq.core.errors import BavqError
from bavq.evaluation.reports import load_weights
from bavq.quantizers.search import nearest_code, squared_distances
from bavq.quantizers.specified import iterate
from bavq.reference import (
    VQVAE,
    VQVAE2,
    BAQuantizer,
    Decoder,
    Encoder,
    GumbelVectorQuantizer,
    ProductQuantizer,
    VectorQuantizer,
    VQEMAQuantizer,
    VQVAETrainer,
    get_dataloaders,
    train,
    train_epoch,
    validate,
)
from bavq.training.checkpoints import load_model
from bavq.training.data import load_images
from bavq.training.images import DATASETS


@pytest.fixture
def cifar10(monkeypatch):
    "A few photographs under the name of CIFAR-10, which cannot be downloaded everywhere."
    photos = load_images("photos")
    few = photos._replace(
        train=photos.train[:512],
        train_labels=photos.train_labels[:512],
        test=photos.test[:64],
        test_labels=photos.test_labels[:64],
    )
    monkeypatch.setitem(DATASETS._found, "cifar10", lambda: few)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.rand(2, 3, 32, 32) * 2 - 1


# The system


@pytest.mark.parametrize("quantizer_type", ["vq_ema", "ba_vq"])
def test_the_model_as_written(x, quantizer_type):
    model = VQVAE(quantizer_type=quantizer_type, codebook_size=512, latent_dim=256)
    x_recon, recon_loss, quant_loss_dict, metrics = model(x)
    assert x_recon.shape == x.shape
    torch.testing.assert_close(recon_loss, F.mse_loss(x_recon, x))
    names = {"commitment_loss"} | ({"entropy_loss"} if quantizer_type == "ba_vq" else set())
    assert set(quant_loss_dict) == names
    assert {"perplexity", "usage_rate", "code_indices"} <= set(metrics)
    (recon_loss + sum(quant_loss_dict.values())).backward()


def test_the_quantizers_as_written():
    z = torch.randn(2, 256, 8, 8)
    q = VQEMAQuantizer(num_embeddings=512, embedding_dim=256, commitment_cost=0.25, decay=0.99, epsilon=1e-5)
    assert q.codebook.abs().max() <= 1 / 512 and not q.ema_cluster_size.any()
    z_q, losses, metrics = q(z)
    assert z_q.shape == z.shape and metrics["code_indices"].shape == (2, 8, 8)
    q = BAQuantizer(
        num_embeddings=512,
        embedding_dim=256,
        beta_start=0.1,
        beta_end=5.0,
        commitment_cost=0.25,
        ba_iterations=5,
    )
    epoch, max_epochs = 50, 100
    q.set_beta(epoch, max_epochs)
    assert float(q.beta) == pytest.approx(2.55)
    z_q, losses, metrics = q(z)
    assert float(metrics["beta"]) == pytest.approx(2.55) and losses["entropy_loss"] < 0


def test_epsilon_is_used():
    torch.manual_seed(0)
    z = torch.randn(64, 4)
    codes = []
    for epsilon in (1e-5, 1.0):
        torch.manual_seed(1)
        q = VQEMAQuantizer(8, 4, epsilon=epsilon)
        q(z)
        codes.append(q.codebook)
    assert not torch.equal(*codes)


def test_the_metrics_as_written(x):
    code_indices, num_embeddings = torch.tensor([[0, 1], [2, 3]]), 8
    assert float(reference.compute_perplexity(code_indices, num_embeddings)) == pytest.approx(4)
    assert float(reference.compute_usage_rate(code_indices, num_embeddings)) == pytest.approx(0.5)
    x_recon = (x + 0.02).clamp(-1, 1)
    assert float(reference.compute_psnr(x, x_recon)) == pytest.approx(40, abs=0.2)


def test_the_loop_as_written(cifar10, x):
    device = "cpu"
    loader, val_loader = get_dataloaders(batch_size=256, num_workers=4)
    model = VQVAE(quantizer_type="ba_vq", codebook_size=32, latent_dim=16, hidden_channels=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    before = validate(model, val_loader, device)
    for epoch in range(3):
        model.quantizer.set_beta(epoch, 3)
        train_metrics = train_epoch(model, loader, optimizer, device)
    after = validate(model, val_loader, device)
    assert loader.epoch == 3
    assert train_metrics["loss"] == pytest.approx(
        train_metrics["recon_loss"] + train_metrics["commitment_loss"] + train_metrics["entropy_loss"],
        rel=1e-4,
    )
    assert after["recon_loss"] < before["recon_loss"]
    names = "loss recon_loss perplexity usage_rate psnr commitment_loss entropy_loss beta"
    assert set(names.split()) <= set(after)


@pytest.mark.usefixtures("one_thread", "no_repository")
@pytest.mark.parametrize("quantizer_type", ["vq_ema", "ba_vq"])
def test_ten_epochs_run_metrics_make_sense_checkpoints_load(cifar10, tmp_path, monkeypatch, quantizer_type):
    monkeypatch.chdir(tmp_path)
    model = VQVAE(quantizer_type=quantizer_type, codebook_size=32, latent_dim=16, hidden_channels=8)
    epochs, batch_size, lr, run_name, use_wandb = 10, 64, 3e-4, "test", False
    final = train(model, epochs, batch_size, lr, run_name, use_wandb)
    assert 1 <= final["perplexity"] <= 32 and 1 / 32 <= final["usage_rate"] <= 1 and final["psnr"] > 5
    folder = tmp_path / "experiments/test"
    assert json.loads((folder / "final_metrics.json").read_text()) == final
    state = torch.load(folder / "checkpoint_epoch10.pt", weights_only=True)
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "val_metrics"} <= set(state)
    assert state["epoch"] == 10
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    again, config = load_model(folder)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    expected = model.cpu().eval()(images)
    torch.testing.assert_close(again(images).x_recon, expected.x_recon)
    if quantizer_type == "ba_vq":  # the β of the last epoch, which stood still in it
        BAQuantizer.set_beta(model.quantizer, 9, 10)
        assert history[-1]["beta"] == pytest.approx(float(model.quantizer.beta))
        assert type(again.quantizer) is BAQuantizer


@pytest.mark.usefixtures("one_thread", "no_repository")
def test_a_run_goes_on_only_when_asked(cifar10, tmp_path):
    def model():
        torch.manual_seed(0)
        return VQVAE("vq_ema", 16, 8, hidden_channels=8)

    options = dict(epochs=1, batch_size=64, run_name="again", out=tmp_path, progress=False)
    final = train(model(), **options)
    with pytest.raises(BavqError, match="is there already"):
        train(model(), **options)
    assert train(model(), **options, resume=True) == final


# The guide's unit tests


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_soft_assignments_sum_to_one(beta):
    torch.manual_seed(0)
    P, Q = iterate(squared_distances(torch.randn(200, 4), torch.randn(16, 4)), beta, 5)
    torch.testing.assert_close(P.sum(1), torch.ones(200))
    torch.testing.assert_close(Q.sum(), torch.ones(()))


def test_large_beta_recovers_hard_vq():
    torch.manual_seed(0)
    q = BAQuantizer(16, 4)
    z = torch.randn(200, 4)
    q.embedding.data.copy_(torch.randn(16, 4))
    q.beta.fill_(1e6)
    nearest = nearest_code(z, q.codebook)
    for training in (True, False):
        z_q, _, metrics = q.train(training)(z)
        assert torch.equal(metrics["code_indices"], nearest)
        torch.testing.assert_close(z_q, q.codebook[nearest])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("make", [VQEMAQuantizer, BAQuantizer])
def test_no_nan_in_gradients(make, scale):
    torch.manual_seed(0)
    model = VQVAE("ba_vq" if make is BAQuantizer else "vq_ema", 32, 16, hidden_channels=8)
    z = (scale * torch.randn(64, 16)).requires_grad_(True)
    z_q, losses, _ = model.quantizer(z)
    (z_q.square().mean() + sum(losses.values())).backward()
    for tensor in (z, *model.quantizer.parameters()):
        assert tensor.grad.isfinite().all()


# The tutorial


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_vector_quantizer_as_written(use_ema):
    num_embeddings, embedding_dim = 16, 8
    q = VectorQuantizer(
        num_embeddings, embedding_dim, commitment_cost=0.25, use_ema=use_ema, decay=0.99, epsilon=1e-5
    )
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    z_q, loss, metrics = q(z)
    assert z_q.shape == z.shape and loss.dim() == 0
    assert {"perplexity", "encoding_indices"} <= set(metrics)
    (z_q.sum() + loss).backward()
    assert z.grad.isfinite().all() and len(list(q.parameters())) == (0 if use_ema else 1)


def test_the_product_quantizer_as_written():
    num_subcodebooks, subcodebook_size, embedding_dim, commitment_cost = 4, 256, 64, 0.25
    q = ProductQuantizer(num_subcodebooks, subcodebook_size, embedding_dim, commitment_cost)
    z = torch.randn(2, 64, 4, 4)
    z_q, loss, metrics = q(z)
    assert z_q.shape == z.shape and metrics["encoding_indices"].shape == (2, 4, 4, 4)
    assert torch.equal(q.eval()(z)[0], q.decode(q.encode(z)))


def test_one_subcodebook_is_a_vector_quantizer():
    torch.manual_seed(0)
    one = ProductQuantizer(1, 16, 8, 0.25)
    torch.manual_seed(0)
    plain = VectorQuantizer(16, 8)
    z = torch.randn(32, 8)
    for mine, theirs in zip(one(z)[:2], plain(z)[:2], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("hard", [True, False])
def test_the_gumbel_quantizer_as_written(hard):
    num_embeddings, embedding_dim = 16, 8
    q = GumbelVectorQuantizer(num_embeddings, embedding_dim, temperature=1.0, hard=hard)
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    z_q, loss, metrics = q(z)
    rows = z_q.permute(0, 2, 3, 1).reshape(-1, 8)
    is_code = (rows[:, None] == q.codebook).all(2).any(1)
    assert bool(is_code.all()) == hard
    (z_q.sum() + loss).backward()
    assert z.grad.isfinite().all()


def test_the_networks_as_written():
    encoder = Encoder(in_channels=3, hidden_dims=[128, 256], embedding_dim=64, num_residual_layers=2)
    embedding_dim, hidden_dims, out_channels = 64, [128, 256], 3
    decoder = Decoder(embedding_dim, hidden_dims, out_channels)
    z = encoder(torch.rand(2, 3, 32, 32))
    assert z.shape == (2, 64, 8, 8)
    images = decoder(z)
    assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1


def models():
    in_channels, hidden_dims, num_embeddings, embedding_dim, commitment_cost = 3, [8, 16], 32, 8, 0.25
    yield VQVAE(in_channels, hidden_dims, num_embeddings, embedding_dim, commitment_cost, True)
    yield VQVAE(in_channels, hidden_dims, num_embeddings, embedding_dim, commitment_cost, use_ema=False)
    num_embeddings_top, num_embeddings_bottom = 16, 32
    yield VQVAE2(in_channels, num_embeddings_top, num_embeddings_bottom, embedding_dim, commitment_cost)


@pytest.mark.parametrize("recon_loss_type", ["mse", "l1"])
def test_the_trainer_as_written(recon_loss_type):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    for model in models():
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        trainer = VQVAETrainer(model, optimizer, recon_loss_type=recon_loss_type)
        before = trainer.eval_step(x)
        for _ in range(5):
            last = trainer.train_step(x)
        after = trainer.eval_step(x)
        assert trainer.eval_step(x) == after
        assert after["recon_loss"] < before["recon_loss"]
        assert last["loss"] == pytest.approx(last["recon_loss"] + last["vq_loss"], abs=1e-5)
        images = model.eval().decode_codes(model.encode(x))
        torch.testing.assert_close(images, model(x)[0].detach())


# A checkpoint in the described layout, of a network with names of its own


class TheirBlock(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.b = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


class Theirs(torch.nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        nn = torch.nn
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 128, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            TheirBlock(256),
            TheirBlock(256),
        )
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            TheirBlock(256),
            TheirBlock(256),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(256, 128, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 3, 4, 2, 1),
        )

    def forward(self, x):
        return self.decoder(self.quantizer(self.encoder(x)).z_q)


@pytest.mark.parametrize("make, name", [(VQEMAQuantizer, "vq_ema_spec"), (BAQuantizer, "ba_vq_spec")])
def test_a_checkpoint_in_the_described_layout_loads(x, tmp_path, make, name):
    torch.manual_seed(0)
    theirs = Theirs(make(num_embeddings=64, embedding_dim=256)).eval()
    keep = {k: v for k, v in theirs.state_dict().items() if k != "quantizer.initialised"}
    checkpoint = dict(epoch=10, model_state_dict=keep, optimizer_state_dict={}, val_metrics={"psnr": 20.0})
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    model, config = load_weights(tmp_path / "checkpoint.pt")
    assert (config.quantizer, config.codebook_size) == (name, 64)
    codes = model.encode(x)
    torch.testing.assert_close(model.decode_codes(codes), theirs.decoder(theirs.quantizer.decode(codes)))
    if make is VQEMAQuantizer:
        torch.testing.assert_close(model(x).x_recon, theirs(x))


# Mistakes


def a_tutorial_model():
    return next(models())


MISTAKES = {
    "unknown name": (lambda: VQVAE(quantizer_typ="vq_ema"), "did you mean quantizer_type?"),
    "unknown name, tutorial": (lambda: VQVAE(hidden_dim=[8, 16]), "did you mean hidden_dims?"),
    "unknown option": (lambda: VQVAE(quantizer_type="vqema"), "choose one of vq_ema"),
    "K as text": (lambda: VQVAE(codebook_size="many"), "codebook_size is 'many': give a whole number"),
    "K of one": (lambda: VQEMAQuantizer(num_embeddings=1), "give at least 2"),
    "decay": (lambda: VQEMAQuantizer(decay=1.5), "decay is 1.5"),
    "epsilon": (lambda: VQEMAQuantizer(epsilon=0), "epsilon is 0"),
    "beta": (lambda: BAQuantizer(beta_start=-1), "beta_start is -1"),
    "beta misspelt": (lambda: BAQuantizer(beta_strat=0.1), "did you mean beta_start?"),
    "epoch": (lambda: BAQuantizer(8, 4).set_beta(11, 10), "epoch is 11 of 10"),
    "latents": (lambda: VectorQuantizer(8, 4)(torch.randn(2, 5, 4, 4)), "5 channels, the codes 4"),
    "missing": (lambda: VectorQuantizer(8), "missing a required argument: 'embedding_dim'"),
    "too many": (lambda: GumbelVectorQuantizer(8, 4, 1.0, True, 1), "too many positional arguments"),
    "flag": (lambda: VectorQuantizer(8, 4, use_ema="yes"), "give True or False"),
    "pieces": (lambda: ProductQuantizer(3, 16, 64, 0.25), "give a multiple of 3"),
    "temperature": (lambda: GumbelVectorQuantizer(8, 4, temperature=0.0), "temperature is 0.0"),
    "widths": (lambda: Encoder(hidden_dims=256), "hidden_dims is 256"),
    "recon loss": (
        lambda: VQVAETrainer(a_tutorial_model(), torch.optim.SGD([torch.zeros(1)]), "l2"),
        "choose one of l1, mse",
    ),
    "optimizer": (lambda: VQVAETrainer(a_tutorial_model(), None), "give one of torch.optim"),
    "range": (lambda: a_tutorial_model()(torch.full((1, 3, 32, 32), -1.0)), "give them in [0, 1]"),
    "device": (
        lambda: validate(VQVAE("vq_ema", 8, 4, hidden_channels=8), [], "gpu"),
        "give cpu, cuda or mps",
    ),
    "model": (lambda: validate(a_tutorial_model(), [], "cpu"), "VQVAETrainer"),
    "K mismatch": (lambda: reference.compute_perplexity(torch.tensor([0, 9]), 8), "lie outside 0..7"),
    "counts for indices": (lambda: reference.compute_usage_rate(torch.tensor([0.5, 0.5]), 2), "give"),
    "batch size": (lambda: get_dataloaders(batch_size=0), "batch_size is 0"),
    "data set": (lambda: get_dataloaders(dataset="cifar"), "cifar10"),
    "train a stranger": (lambda: train(a_tutorial_model(), 1, 8, 1e-3, "no", False), "bavq.run"),
    "train, misspelt": (lambda: train(a_tutorial_model(), epoch=1), "did you mean epochs?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name, cifar10):
    call, says = MISTAKES[name]
    with pytest.raises(BavqError) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value) and ": " in str(e.value)
