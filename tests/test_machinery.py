"""The quantizers among PyTorch's machinery: evaluation and freezing, activation checkpointing, copies that
average weights, partial loading, masks. What several processes share is in test_distributed."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from bavq.core.errors import BavqError
from bavq.quantizers.adapters import as_vector_quantize
from bavq.quantizers.base import make_quantizer
from bavq.quantizers.codebook import EMACodebook, revive, sample_rows

NAMES = [
    "vq",
    "vq_ema",
    "ba_vq",
    "vq_ema_spec",
    "gumbel",
    "product",
    "residual",
    "vq_entropy",
    "vq_ema_growing",
]
SEARCHED = ["vq", "vq_ema", "ba_vq", "gumbel", "vq_ema_spec"]


def trained(name, K=64, **options):
    "A quantizer after one batch, in training mode."
    torch.manual_seed(0)
    q = make_quantizer(name, K, 8, **options).train()
    q(torch.randn(500, 8))
    return q


def same_state(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_an_encoder_learns_before_a_quantizer_in_evaluation(gradient):
    "The gradient of the reconstruction reaches it, as large as in training."
    q = trained("vq_ema", gradient=gradient, restart_below=0.0)
    torch.manual_seed(1)
    enc, dec, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(100, 8)
    norms = {}
    for mode in (False, True):
        enc.zero_grad()
        z_q = copy.deepcopy(q).train(mode)(enc(x)).z_q
        (dec(z_q) - x).square().mean().backward()
        norms[mode] = enc.weight.grad.norm().item()
    assert norms[False] == pytest.approx(norms[True]) and norms[True] > 0.1
    assert not q.eval()(x).z_q.requires_grad, "no gradient was asked for"


@pytest.mark.parametrize("way", ["freeze", "requires_grad_", "attribute"])
@pytest.mark.parametrize(
    "name", ["vq_ema", "ba_vq", "vq_ema_spec", "residual", "vq_entropy", "vq_ema_growing"]
)
def test_frozen_in_training_mode(name, way):
    "Nothing moves, by gradient or by averages; gradients reach the latents; unfrozen, it learns again."
    q = trained(name)
    if way == "freeze":
        q.freeze()
    elif way == "requires_grad_":
        q.requires_grad_(False)
    else:
        for part in q.modules():
            part.frozen = True
    before = copy.deepcopy(q.state_dict())
    z = torch.randn(200, 8, requires_grad=True)
    for progress in (0.4, 1.0):
        if name != "ba_vq":  # whose β goes on, as it is told
            q.anneal(progress)
        q.train()(z).z_q.sum().backward()
    assert same_state(before, q.state_dict()) and z.grad.abs().min() > 0
    if way == "freeze":
        q.unfreeze()
        q(z)
        assert name == "vq_entropy" or not same_state(before, q.state_dict())
        assert all(p.requires_grad for p in q.parameters())


def step(q, enc, dec, x, mode):
    "Gradients of one step, and the state after it; mode: None, or how it is checkpointed."

    def forward(v):
        out = q(enc(v))
        return dec(out.z_q), sum(out.losses.values(), v.new_zeros(()))

    torch.manual_seed(2)
    x = x.clone().requires_grad_(True)
    y, loss = forward(x) if mode is None else checkpoint(forward, x, use_reentrant=mode)
    ((y - x).square().mean() + loss).backward()
    return [p.grad for m in (enc, dec, q) for p in m.parameters()], q.state_dict()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing(name, options, reentrant):
    "The gradients and the state are those of a step without it; the codebook is updated once."
    if name == "residual" and options:
        pytest.skip("no cosine")
    q = trained(name, **options)
    enc, dec, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(100, 8)
    (grads, state), (grads_again, state_again) = (
        step(*copy.deepcopy((q, enc, dec)), x, mode) for mode in (None, reentrant)
    )
    for a, b in zip(grads, grads_again, strict=True):
        assert a is None and b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert same_state(state, state_again)


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_checkpointed_passes_before_backward(reentrant):
    "Each repeated pass gets the codes of its own first one, in whatever order they come."
    q, enc = trained("vq_ema"), nn.Linear(8, 8)
    batches = [torch.randn(50, 8, requires_grad=True) for _ in range(3)]
    grads = []
    for mode in (None, reentrant):
        enc.zero_grad()
        one, outs = copy.deepcopy(q), []

        def run(v):
            return (one(enc(v)).z_q * v.detach()).square().sum()

        for v in batches:
            outs.append(run(v) if mode is None else checkpoint(run, v, use_reentrant=mode))
        for k in (1, 0, 2):
            outs[k].backward()
        grads.append((enc.weight.grad.clone(), one.state_dict()))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-4) and same_state(grads[0][1], grads[1][1])


def test_a_repeated_pass_whose_first_one_is_forgotten_is_refused():
    q, x = trained("vq_ema"), torch.randn(50, 8, requires_grad=True)
    out = checkpoint(lambda v: q(v).z_q, x, use_reentrant=True)
    for _ in range(5):
        q(torch.randn(50, 8))
    with pytest.raises(BavqError, match="is not known now: call backward before"):
        out.sum().backward()


def test_what_is_remembered_goes_with_its_graph():
    "A training loop keeps no more of its passes than their graphs do; a quantizer can be copied and pickled."
    from bavq.quantizers.base import FIRST_PASSES

    q, enc = trained("vq_ema"), nn.Linear(8, 8)
    for _ in range(3):
        out = q(enc(torch.randn(50, 8)))
        out.z_q.sum().backward()
    assert len(FIRST_PASSES[q].with_graph) == 1
    del out
    gc.collect()
    assert len(FIRST_PASSES[q].with_graph) == 0
    pickle.loads(pickle.dumps(copy.deepcopy(q)))


def averaged_by_hand(model):
    "A copy as libraries make it that average floating-point tensors and leave out all others (ema-pytorch)."
    copied = copy.deepcopy(model)

    def follow(decay=0.5):
        for mine, theirs in zip(copied.state_dict().values(), model.state_dict().values()):
            if mine.is_floating_point():
                mine.data.lerp_(theirs, 1 - decay)

    return copied, follow


@pytest.mark.parametrize("name", SEARCHED[:4])  # the last one's codes are never set from a batch
def test_a_copy_that_averages_floats_keeps_its_codes(name):
    "Made before the first batch, averaged, and then trained on: the codes are not set anew."
    torch.manual_seed(0)
    q = make_quantizer(name, 16, 8).train()
    copied, follow = averaged_by_hand(q)
    for _ in range(30):
        q(5 + torch.randn(200, 8))
        follow()
    before = copied.codebook.clone()
    torch.manual_seed(1)
    copied.train()(-5 + torch.randn(200, 8))
    stayed = ((copied.codebook - before).abs().amax(1) < 1).sum()
    assert copied.initialised and stayed >= 8, "a batch has set the averaged codes anew"


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)])
@pytest.mark.parametrize("name", [*SEARCHED, "vq_ema_growing", "residual"])
def test_averaged_model_takes_all_buffers(name, average):
    torch.manual_seed(0)
    q = make_quantizer(name, 64, 8).train()
    mean = AveragedModel(q, multi_avg_fn=average, use_buffers=True)
    for step in range(5):
        q(torch.randn(200, 8))
        q.anneal(step / 4)
        mean.update_parameters(q)
    z = torch.randn(50, 8)
    copied = mean.module.eval()
    assert copied.num_embeddings == len(copied.codebook)
    assert torch.equal(copied(z).z_q, copied.decode(copied.encode(z)))


def test_a_growing_codebook_says_its_size_in_its_buffers():
    "A copy of all buffers has the size that they say, in training too, where they are on the host."
    q = trained("vq_ema_growing")
    copied = copy.deepcopy(q)
    q.anneal(1.0)
    for mine, theirs in zip(copied.buffers(), q.buffers()):
        mine.data.copy_(theirs)
    assert q.num_embeddings == copied.num_embeddings == len(copied.codebook) == 64
    assert torch.equal(q.encode(torch.ones(1, 8)), copied.encode(torch.ones(1, 8)))


@pytest.mark.parametrize("name", [*SEARCHED, "vq_ema_growing"])
def test_the_record_follows_the_codes(name):
    "Whatever part of a state is loaded: codes count as set where they came, and only there."
    state = trained(name, 16).state_dict()

    def loaded(part, K=16):
        q = make_quantizer(name, K, 8).train()
        fits = {k: v for k, v in part.items() if v.shape == q.state_dict()[k].shape}
        q.load_state_dict(fits, strict=False)
        return q

    key = make_quantizer(name, 16, 8).codes_key
    assert not loaded(state, K=32)._ready, "codes of another size did not come"
    assert not loaded({k: v for k, v in state.items() if k != key})._ready
    q = loaded({key: state[key]})
    assert q._ready and bool(q.initialised)
    q(torch.randn(50, 8))
    if name != "vq_ema_spec":
        torch.testing.assert_close(
            q.base.book.codes if name == "vq_ema_growing" else q.codebook, state[key], rtol=0, atol=0.2
        )
    again = trained(name, 16)
    again.load_state_dict({k: v for k, v in state.items() if k == "wins"}, strict=False)
    assert again._ready, "codes that were set stay set"


def test_a_record_in_a_whole_model():
    "Tensors of an encoder alone mark no codes as set; a file from before has a record of another type."
    model = nn.Sequential(nn.Linear(8, 8), trained("vq", 16))
    fresh = nn.Sequential(nn.Linear(8, 8), make_quantizer("vq", 16, 8))
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith("0.")}, strict=False)
    assert not fresh[1]._ready
    old = model.state_dict() | {"1.initialised": torch.tensor(True)}
    for assign in (False, True):
        fresh = nn.Sequential(nn.Linear(8, 8), make_quantizer("vq", 16, 8))
        fresh.load_state_dict(old, assign=assign)
        assert fresh[1]._ready and fresh[1].initialised.dtype == torch.float32


@pytest.mark.parametrize(
    "mask, line",
    [
        (torch.ones(5, 2, dtype=torch.bool), r"the mask has shape \[5, 2\], the vectors \[2, 5\]"),
        (torch.ones(10, dtype=torch.bool), r"the mask has shape \[10\], the vectors \[2, 5\]"),
        (torch.ones(2, 5, dtype=torch.int64), "the mask is torch.int64: give a tensor of bool"),
        (torch.ones(2, 5), "the mask is torch.float32: give a tensor of bool"),
        ([[True] * 5] * 2, "the mask is list: give a tensor of bool"),
    ],
)
def test_masks_are_bool_and_of_the_right_shape(mask, line):
    "One line, before anything is learned."
    adapter = as_vector_quantize(trained("vq_ema")).train()
    before = copy.deepcopy(adapter.state_dict())
    with pytest.raises(BavqError, match=line):
        adapter(torch.randn(2, 5, 8), mask=mask)
    assert same_state(before, adapter.state_dict())


def test_a_mask_of_channels_first_sequences():
    adapter = as_vector_quantize(trained("vq_ema"), channel_last=False).train()
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    z_q, index, _ = adapter(torch.randn(2, 8, 5), mask=mask)
    assert z_q.shape == (2, 8, 5) and torch.equal(index >= 0, mask)


def test_rows_for_revival():
    "All rows where there are as many, none twice where there are more, every row equally often."
    x = torch.arange(100.0)[:, None]
    assert torch.equal(sample_rows(x, 100).flatten().sort().values, x.flatten())
    counts = torch.zeros(100)
    for _ in range(2000):
        rows = sample_rows(x, 30).flatten().long()
        assert len(rows.unique()) == 30
        counts[rows] += 1
    assert (counts / 600 - 1).abs().max() < 0.2
    assert set(sample_rows(x[:3], 30).flatten().tolist()) == {0.0, 1.0, 2.0}


def test_revival_moves_codes_to_finite_rows_only():
    book = EMACodebook(torch.zeros(8, 2))
    book.counts[:4] = 0
    revive(book, torch.full((16, 2), torch.nan), below=0.5)
    assert book.codes.isfinite().all() and book.counts[:4].max() == 0
    revive(book, torch.ones(16, 2), below=0.5)
    assert book.codes[:4].min() == 1
