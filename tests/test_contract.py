"""The contract of a quantizer (01_base), for every registered one: random sizes, scales and seeds, in float32
and under bfloat16 autocast, for rows and for maps."""

import contextlib
import copy
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bavq

for path in sorted(Path(bavq.__file__).parent.rglob("*.py")):  # whatever registers a quantizer
    if re.search(r"^@register_quantizer\(", path.read_text(encoding="utf-8"), re.M):
        importlib.import_module(
            ".".join(path.relative_to(Path(bavq.__file__).parent.parent).with_suffix("").parts)
        )

from bavq.quantizers.base import QUANTIZERS, make_quantizer
from bavq.quantizers.contract import RULES, check_quantizer
from bavq.quantizers.remedies import entropy_term, with_losses
from bavq.quantizers.search import rotate

PEER = importlib.util.find_spec("vector_quantize_pytorch") is not None
NAMES = [
    n for n in sorted(QUANTIZERS) if PEER or not n.startswith("peer")
]  # a wrapped library may not be installed
OURS = [n for n in NAMES if not n.startswith("peer")]
PRECISIONS = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
SHAPES = {"rows": lambda b, d, h, w: (b * h * w, d), "maps": lambda b, d, h, w: (b, d, h, w)}

sizes = st.tuples(st.integers(1, 3), st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 5))
given_latents = given(
    size=sizes,
    K=st.sampled_from([16, 64]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
few = settings(max_examples=10, deadline=None, derandomize=True)
every_quantizer = pytest.mark.parametrize("name", NAMES)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def case(name, size, K, scale, seed, shape, precision, steps=2):
    "A quantizer after a few training steps, and latents it has not seen."
    torch.manual_seed(seed)

    def make():
        return (scale * torch.randn(SHAPES[shape](*size))).to(
            torch.bfloat16 if precision == "bfloat16" else torch.float32
        )

    q = make_quantizer(name, K, size[1]).train()
    with PRECISIONS[precision]():
        for step in range(steps):
            q.anneal(step / steps)
            q(make())
    return q, make()


def grid(z):
    return z.shape[:1] + z.shape[2:]


@every_quantizer
@every_precision
@every_shape
@few
@given_latents
def test_training_returns_what_it_promises(name, precision, shape, size, K, scale, seed):
    q, z = case(name, size, K, scale, seed, shape, precision)
    z.requires_grad_(True)
    with PRECISIONS[precision]():
        z_q, losses, metrics = q(z)
    assert z_q.shape == z.shape and z_q.dtype == z.dtype and z_q.isfinite().all()
    assert all(v.dim() == 0 and v.isfinite() for v in losses.values())
    assert not any(v.requires_grad for v in metrics.values())
    index = metrics["code_indices"]
    assert (
        index.dtype == torch.int64
        and index.shape == grid(z)
        and 0 <= index.min()
        and index.max() < q.num_embeddings == K
    )
    assert 1 - 1e-6 <= metrics["perplexity"] <= min(K, index.numel()) + 1e-6
    assert 0 < metrics["usage_rate"] <= 1
    (z_q.sum() + sum(losses.values())).backward()
    assert z.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in q.parameters())


@every_quantizer
@every_precision
@every_shape
@few
@given_latents
def test_evaluation_is_what_the_indices_say(name, precision, shape, size, K, scale, seed):
    q, z = case(name, size, K, scale, seed, shape, precision)
    before = copy.deepcopy(q.eval().state_dict())
    with PRECISIONS[precision]():
        z_q, _, metrics = q(z)
        index = q.encode(z)
        decoded = q.decode(index)
    assert torch.equal(z_q, decoded.to(z.dtype)), "forward(z).z_q is not decode(encode(z))"
    assert torch.equal(metrics["code_indices"], index)
    assert torch.equal(q.decode(index), decoded) and torch.equal(q.encode(z.float()), index), (
        "autocast changes the result"
    )
    assert torch.equal(q.codebook[index.flatten()], q.decode(index.flatten())), (
        "decode does not read the codebook"
    )
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items()), "evaluation changes state"


@pytest.mark.parametrize(
    "name", OURS
)  # a library that starts with the same code twice leaves the choice to rounding
@every_shape
@few
@given_latents
def test_an_index_is_its_latent_s_own(name, shape, size, K, scale, seed):
    "Neither batch mates nor their order change it, and a map is its rows."
    q, z = case(name, size, K, scale, seed, shape, "float32")
    index = q.eval().encode(z)
    assert torch.equal(torch.cat([q.encode(v[None]) for v in z]), index)
    assert torch.equal(q.encode(z.flip(0)), index.flip(0))
    if shape == "maps":
        assert torch.equal(q.encode(z.movedim(1, -1).reshape(-1, size[1])), index.flatten())


@every_quantizer
@few
@given_latents
def test_a_copy_from_state_dict_goes_on_alike(name, size, K, scale, seed):
    q, z = case(name, size, K, scale, seed, "maps", "float32")
    twin = make_quantizer(name, K, size[1]).train()
    twin.load_state_dict(q.state_dict())
    out = []
    for one in (q, twin):
        torch.manual_seed(seed)
        one(z)
        out.append(one.eval().encode(z))
    assert torch.equal(*out) and torch.equal(q.codebook, twin.codebook)


@pytest.mark.parametrize("name", OURS)
def test_check_quantizer_accepts_it(name):
    assert len(check_quantizer(make_quantizer(name, 16, 8))) == len(RULES)


@pytest.mark.parametrize("base", OURS)
@pytest.mark.parametrize("name", ["product", "residual"])
def test_composites_of_everything(name, base):
    "Options come as text, as the command line gives them."
    check_quantizer(
        make_quantizer(
            name,
            64,
            8,
            base=base,
            **{"product": dict(groups="2"), "residual": dict(levels="8,8", dropout="0.5")}[name],
        )
    )


@pytest.mark.parametrize("name", OURS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    exponent=st.integers(-20, 20),
    n=st.sampled_from([1, 2, 5, 64]),
    equal=st.booleans(),
    shift=st.sampled_from([0.0, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_extreme_latents_stay_finite_or_are_refused(name, exponent, n, equal, shift, seed):
    """Any scale from 1e-20 to 1e20, all latents alike, one alone, fewer than codes: output, losses, gradients
    and state are finite, or one line says why not."""
    torch.manual_seed(seed)
    z = (torch.randn(1, 8).expand(n, 8) if equal else torch.randn(n, 8)) * 10.0**exponent + shift
    q, z = make_quantizer(name, 16, 8).train(), z.clone().requires_grad_(True)
    try:
        for step in range(3):
            q.anneal(step / 2)
            z_q, losses, metrics = q(z)
            z.grad = None
            (z_q.sum() + sum(losses.values())).backward()
        index = q.eval().encode(z)
    except bavq.BavqError as e:
        assert exponent > 14 and "above 1e15" in str(e)
        return
    values = [
        z_q,
        z.grad,
        *losses.values(),
        *(m for m in metrics.values() if m.is_floating_point()),
        *(v for v in q.state_dict().values() if v.is_floating_point()),
    ]
    assert all(v.isfinite().all() for v in values)
    assert torch.equal(q(z).z_q, q.decode(index)) and q.decode(index).isfinite().all()


SEARCHED = ("vq", "vq_ema", "ba_vq", "gumbel")


@pytest.mark.parametrize("name", SEARCHED)
def test_codes_that_were_given_stay(name):
    """Codes set by hand, or loaded from a file that does not say whether they were set, are not set again by
    the first batch."""
    torch.manual_seed(0)
    codes = 5 + torch.randn(16, 8)
    z = codes[torch.randint(16, (500,))]  # k-means++ would take the same points in another order
    by_hand, loaded = make_quantizer(name, 16, 8).eval(), make_quantizer(name, 16, 8).eval()
    by_hand.set_codes(codes)
    loaded.load_state_dict(
        {k: v for k, v in by_hand.state_dict().items() if k != "initialised"}, strict=False
    )
    for q in (by_hand, loaded):
        q.train()(z)
        assert q._ready and torch.allclose(q.codebook, codes, atol=1e-2)
    fresh = make_quantizer(name, 16, 8).train()
    fresh(z)
    assert not torch.allclose(fresh.codebook, codes, atol=1e-2)


@pytest.mark.parametrize("name", [*SEARCHED, "product", "residual", "fsq"])
def test_the_first_step_compiles(name):
    "Codes are set by a library that cannot be traced; the rest of the step is."
    torch.manual_seed(0)
    z, plain = torch.randn(1000, 8), make_quantizer(name, 64, 8).train()
    compiled = copy.deepcopy(plain)
    torch.manual_seed(1)
    expected = plain(z).z_q
    torch.manual_seed(1)
    found = torch.compile(compiled, backend="eager")(z).z_q
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OURS)
def test_a_module_in_another_precision(name, dtype):
    "Codes come in the precision of the latents, in training and in use, whatever that of the module."
    torch.manual_seed(0)
    q = make_quantizer(name, 64, 8).to(dtype)
    for z in (torch.randn(90, 8), torch.randn(90, 8, dtype=dtype)):
        assert q.train()(z).z_q.dtype == q.eval()(z).z_q.dtype == z.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vq_ema", "ba_vq"])
def test_a_codebook_learns_in_half_precision_too(name, dtype):
    "Running means and sums are not taken in half: two clouds far apart, large batches, many steps."

    def error(dtype):
        torch.manual_seed(0)
        q, x = (
            make_quantizer(name, 16, 4).to(dtype).train(),
            torch.randn(8192, 4) + 8.0 * torch.randint(2, (8192, 4)),
        )
        q.set_codes(x[:16].to(dtype))  # the same start in each precision
        for _ in range(20):
            q(x.to(dtype))
        return (x - q.eval()(x.to(dtype)).z_q.float()).square().sum(1).mean().item()

    assert error(dtype) < 1.2 * error(torch.float32)


def test_a_latent_of_zero_has_a_gradient_like_others():
    z = torch.zeros(1, 4, requires_grad=True)
    rotate(z, torch.ones(1, 4)).sum().backward()
    assert z.grad.abs().max() < 10


def test_what_cannot_be_joined_is_refused():
    for options in (
        dict(name="product", base="vq_ema_growing"),
        dict(name="product", base="residual", levels="8,8", dropout=0.5),
    ):
        with pytest.raises(bavq.core.errors.BavqError, match="cannot be joined|outermost"):
            make_quantizer(num_embeddings=4096, embedding_dim=8, **options)
    with pytest.raises(bavq.core.errors.BavqError, match="until 0"):
        make_quantizer("vq_ema_growing", 64, 8, until=0)


def test_two_passes_before_one_backward():
    q = with_losses(make_quantizer("vq_ema", 16, 4), entropy_loss=entropy_term()).train()
    z = torch.randn(64, 4, requires_grad=True)
    sum(q(z + i).losses["entropy_loss"] for i in range(2)).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", ["fsq", "product", "residual"])
def test_composites_can_be_made_without_memory(name):
    with torch.device("meta"):
        q = make_quantizer(name, 64, 8)
    assert q.num_embeddings == 64


def test_whole_numbers_of_any_kind():
    assert (
        make_quantizer("ba_vq", 1024 / 2, 8.0).codebook.shape
        == bavq.BAQuantizer(512.0, 8).codebook.shape
        == (512, 8)
    )
    q = make_quantizer("vq", 512, 8)
    assert q.decode(torch.arange(512).to(torch.uint16)).shape == (512, 8)


def test_a_price_without_end_is_refused():
    for name, option in (("ba_vq", "beta"), ("gumbel", "temperature")):
        for value in (float("inf"), 1e38, 1e-38):
            pytest.raises(bavq.core.errors.BavqError, make_quantizer, name, 16, 4, **{option: value})
    q = make_quantizer("ba_vq", 16, 4, beta=1e12).train()
    for _ in range(3):
        q(torch.randn(64, 4))
    assert q.codebook.isfinite().all()
