"""The arithmetic of the quantizers: nearest codes against float64, latents that are not finite, precisions,
first codes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bavq.core.errors import BavqError
from bavq.quantizers.base import make_quantizer
from bavq.quantizers.composite import ResidualQuantizer
from bavq.quantizers.remedies import entropy_term, ramp, scheduled, with_losses
from bavq.quantizers.search import (
    INITIALIZERS,
    nearest_code,
    search_and_compare_two,
    search_and_look_again,
    squared_distances,
    straight_through,
)
from bavq.quantizers.vq_ema import VQEMAQuantizer

searches = pytest.mark.parametrize("search", [search_and_look_again, search_and_compare_two])
few = settings(max_examples=40, deadline=None, derandomize=True)
given_scene = given(
    exponent=st.integers(-20, 20),
    offset=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    K=st.sampled_from([2, 17, 255, 256, 320, 512, 1000]),
    D=st.sampled_from([1, 2, 8, 64]),
    n=st.sampled_from([1, 3, 40, 600]),
    seed=st.integers(0, 2**16),
)


def scene(exponent, offset, K, D, n, seed):
    "Latents and codes of one cloud: its spread is a power of ten, its mean `offset` times that."
    torch.manual_seed(seed)
    mean = offset * torch.randn(D).sign()
    return [((torch.randn(size, D) + mean).double() * 10.0**exponent).float() for size in (n, K)]


def by_definition(x, e):
    "The nearest code in float64, of equally near ones the first."
    d = torch.stack([(row.double() - e.double()).square().sum(1) for row in x])
    return (d <= d.amin(1, keepdim=True) * (1 + 1e-9)).int().argmax(1)


@searches
@few
@given_scene
def test_the_nearest_code_is_the_nearest_one(search, exponent, offset, K, D, n, seed):
    x, e = scene(exponent, offset, K, D, n, seed)
    assert torch.equal(search(x, e), by_definition(x, e))


@searches
@few
@given_scene
def test_an_index_does_not_depend_on_batch_mates(search, exponent, offset, K, D, n, seed):
    x, e = scene(exponent, offset, K, D, n, seed)
    together = search(x, e)
    assert torch.equal(torch.cat([search(row[None], e) for row in x[:50]]), together[:50])
    assert torch.equal(search(x.flip(0), e), together.flip(0))
    assert torch.equal(search(torch.cat([x, x, 1e6 * x[:5]]), e)[: 2 * n], together.repeat(2))


@searches
@pytest.mark.parametrize("K", [16, 256, 300, 512])
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6])
def test_near_duplicates_have_one_index_whatever_the_chunk(search, K, gap):
    "Half of the codes are those of the other half, to the bit or nearly; of equal ones the first is taken."
    torch.manual_seed(0)
    e = 3 + torch.randn(K // 2, 8)
    e = torch.cat([e, e + gap * torch.randn_like(e)])
    x = 3 + torch.randn(700, 8)
    index = search(x, e)
    for size in (1, 7, 64, 700):
        assert torch.equal(torch.cat([search(part, e) for part in x.split(size)]), index)
    if not gap:
        assert index.max() < K // 2
        assert search(x[:20], x[:1].repeat(K, 1)).eq(0).all()


def test_codes_one_of_which_is_far_away():
    torch.manual_seed(0)
    x, e = torch.randn(500, 16), torch.randn(256, 16)
    e[7] = 1e6
    for search in (search_and_look_again, search_and_compare_two):
        assert torch.equal(search(x, e), by_definition(x, e))


@given_scene
@few
def test_distances_are_those_of_float64(exponent, offset, K, D, n, seed):
    x, e = scene(max(-15, min(15, exponent)), offset, K, D, n, seed)
    exact = (x.double()[:, None] - e[:50].double()).square().sum(2)
    found = squared_distances(x, e[:50]).double()
    spread = (e.double() - e.double().mean(0)).square().sum(1).max()
    assert (found - exact).abs().max() <= 1e-5 * max(exact.max(), spread)


CODES = ("vq_ema", "ba_vq", "vq_ema_spec")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*CODES, "vq_ema_growing"])
def test_a_bad_latent_is_learned_from_by_nothing(name, bad):
    "What a batch with such rows teaches is what it teaches without them."
    torch.manual_seed(0)
    options = {} if name == "vq_ema_spec" else dict(restart_below=0.0)
    q = make_quantizer(name, 16, 4, **options).train()
    x = torch.randn(200, 4)
    q(x)
    twin = copy.deepcopy(q)
    index = nearest_code(x, q.codebook)
    x[3], x[70, 2] = bad, -bad
    good = x.isfinite().all(1)
    for one in (q, twin):
        one.update(x if one is q else x[good], index if one is q else index[good])
    for key, value in q.state_dict().items():
        assert value.isfinite().all(), key
        assert torch.allclose(value.double(), twin.state_dict()[key].double(), rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", ["vq_ema", "ba_vq"])
def test_no_code_is_revived_at_a_bad_latent(name):
    torch.manual_seed(0)
    q = make_quantizer(name, 16, 4).train()
    x = torch.randn(40, 4)
    q(x)
    x[::2] = float("nan")
    for _ in range(5):
        q.update(x, torch.zeros(40, dtype=torch.long))
    assert all(v.isfinite().all() for v in q.state_dict().values())


@searches
@pytest.mark.parametrize("K", [16, 256])
def test_a_bad_latent_has_index_0_and_shows_in_the_output(search, K):
    x, e = torch.randn(5, 4), torch.randn(K, 4)
    x[1], x[2, 1], x[3] = float("nan"), float("inf"), float("-inf")
    assert search(x, e)[1:4].eq(0).all()
    assert straight_through(x, e[search(x, e)])[1].isnan().all()
    q = make_quantizer("vq_ema", 16, 4).train()
    q(torch.randn(50, 4))
    with pytest.raises(BavqError, match="NaN or infinite"):
        q(x)


@pytest.mark.parametrize("name", ["vq", "vq_ema", "ba_vq", "gumbel"])
def test_zero_has_a_gradient_like_others_under_cosine_distance(name):
    torch.manual_seed(0)
    q = make_quantizer(name, 16, 4, distance="cosine").train()
    z = torch.randn(50, 4)
    z[:3] = 0
    z.requires_grad_(True)
    out = q(z)
    (out.z_q.cos().sum() + sum(out.losses.values())).backward()
    assert z.grad[:3].abs().max() < 100


def test_a_decay_outside_0_to_1_is_refused():
    for name in CODES:
        for decay in (5, 1.0, -0.1):
            with pytest.raises(BavqError, match="decay"):
                make_quantizer(name, 16, 4, decay=decay)


def test_a_code_that_wins_nothing_stays():
    q = make_quantizer("vq_ema", 2, 1, restart_below=0.0).train()
    q.set_codes(torch.tensor([[0.0], [40.0]]))
    for _ in range(1000):
        q(torch.randn(20, 1))
    assert q.codebook[1] == 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_half_modules_search_in_float32(dtype, distance):
    torch.manual_seed(0)
    z = 20 * torch.randn(300, 256)
    q = make_quantizer("vq_ema", 64, 256, distance=distance).train()
    q(z)
    half = copy.deepcopy(q).to(dtype).eval()
    z = z.to(dtype)
    expected = nearest_code(half.prepare(z.double()), half.codebook.double())
    assert torch.equal(half.encode(z), expected) and len(expected.unique()) > 50


@pytest.mark.parametrize("name", ["vq", "vq_ema", "ba_vq", "gumbel", "product", "residual", "fsq"])
def test_the_output_is_like_the_input(name):
    torch.manual_seed(0)
    q = make_quantizer(name, 64, 8).train()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        z = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).to(dtype)
        for mode in (True, False):
            out = q.train(mode)(z)
            assert out.z_q.dtype == dtype and out.z_q.is_contiguous(memory_format=torch.channels_last)
            assert all(loss.dtype in (torch.float32, torch.float64) for loss in out.losses.values())
            assert out.metrics["code_indices"].dtype == torch.int64


@pytest.mark.parametrize("name", ["vq", *CODES, "gumbel", "residual"])
def test_a_module_that_goes_through_precisions_still_trains(name):
    q = make_quantizer(name, 16, 4).double().bfloat16().train()
    for dtype in (torch.bfloat16, torch.float32):
        q(torch.randn(50, 4, dtype=dtype))
    q.double()(torch.randn(50, 4, dtype=torch.float64))


def test_codes_that_are_given_are_looked_at():
    for name in ("vq", "vq_ema", "ba_vq"):
        q = make_quantizer(name, 16, 4)
        for codes in (torch.zeros(1, 4), torch.zeros(16, 3), torch.full((16, 4), float("nan")), [[0.0]]):
            with pytest.raises(BavqError, match="codes h"):
                q.set_codes(codes)
        assert not q.initialised


def test_an_unknown_option_names_the_class():
    with pytest.raises(BavqError, match="VQEMAQuantizer.*codebook_dim"):
        VQEMAQuantizer(16, 4, codebook_dim=4)
    with pytest.raises(BavqError, match=f"num_embeddings is {1024**8}: give a whole number below"):
        ResidualQuantizer(1024**8, 4)


def test_an_attribute_set_on_a_wrapper_reaches_the_quantizer():
    inner = make_quantizer("vq_ema", 16, 4)
    outer = scheduled(with_losses(inner, more=entropy_term()), commitment_loss=ramp(0, 1))
    outer.restart_below, outer.commitment_cost = 0.2, 2.0
    assert (inner.restart_below, inner.commitment_cost) == (0.2, 2.0)
    outer.eval()
    assert not outer.training and not inner.training
    outer.train()
    assert {"commitment_loss", "more"} <= set(outer(torch.randn(50, 4)).losses)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e11])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_ba_vq_learns_the_same_at_every_scale_and_place(scale, mean):
    torch.manual_seed(0)
    x = torch.randn(500, 4)

    def error(scale, mean):
        torch.manual_seed(1)
        q, z = make_quantizer("ba_vq", 16, 4).train(), scale * (x + mean)
        for _ in range(20):
            q(z)
        q.eval()
        return (((z - q(z).z_q) / scale).square().sum(1)).mean().item()

    assert error(scale, mean) < 1.1 * error(1.0, 0.0)


@pytest.mark.parametrize("K", [64, 512, 3000])
def test_first_codes_are_as_good_as_those_of_the_library(K):
    "Squared error after k-means++, on clusters of many sizes."
    from sklearn.cluster import kmeans_plusplus

    torch.manual_seed(0)
    cluster, size = torch.randint(100, (4 * K,)), torch.rand(100).mul(4).exp() / 20
    x = (3 * torch.randn(100, 8))[cluster] + size[cluster][:, None] * torch.randn(4 * K, 8)
    _, pick = kmeans_plusplus(x.double().numpy(), K, random_state=0)

    def error(e):
        return (x - e[nearest_code(x, e)]).square().sum(1).mean()

    codes = INITIALIZERS["kmeans++"](x, K)
    assert codes.shape == (K, 8) and len(codes.unique(dim=0)) == K
    assert error(codes) < 1.1 * error(x[torch.as_tensor(pick)]) < error(INITIALIZERS["data"](x, K))


@pytest.mark.parametrize("scale", [1e-20, 1e14])
def test_first_codes_of_any_scale(scale):
    torch.manual_seed(0)
    x = scale * (torch.randn(500, 4) + 100)
    codes = INITIALIZERS["kmeans++"](x, 64)
    assert len(codes.unique(dim=0)) == 64 and codes.isfinite().all()
