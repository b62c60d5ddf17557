"""The arithmetic of the quantizers: nearest codes against float64, latents that are not finite, precisions,
first codes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bavq.core.errors import BavqError
from bavq.quantizers.base import (
    make_quantizer,
    nearest_code,
    search_and_compare_two,
    search_and_look_again,
    squared_distances,
)

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
    assert (found - exact).abs().max() <= 1e-5 * max(exact.max(), (e.double() - e.double().mean(0)).square().sum(1).max())
