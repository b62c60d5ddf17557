"""What perplexity and usage are taken of: indices and K, as everywhere in the field. Counts have functions of
their own, and neither is taken for the other."""

import pytest
import torch

from bavq.core.errors import BavqError
from bavq.theory.metrics import (
    code_counts,
    compute_perplexity,
    compute_usage_rate,
    perplexity_of_counts,
    usage_of_counts,
)

INDICES = torch.randint(500, (8, 8, 8), generator=torch.Generator().manual_seed(0))


def test_indices_and_their_counts_agree():
    counts = code_counts(INDICES, 512)
    assert compute_perplexity(INDICES, 512) == perplexity_of_counts(counts)
    assert compute_usage_rate(INDICES, 512) == usage_of_counts(counts) == INDICES.unique().numel() / 512
    assert compute_perplexity(torch.arange(512).view(8, 64), 512).item() == pytest.approx(512)
    assert compute_perplexity(torch.zeros(4, 9, dtype=torch.long), 512).item() == pytest.approx(1)


@pytest.mark.parametrize("measure", [compute_perplexity, compute_usage_rate])
@pytest.mark.parametrize(
    "given, says",
    [
        (code_counts(INDICES, 512), "may be counts"),
        (torch.full((512,), 8), "may be counts"),
        (torch.full((512,), 1 / 512), "whole numbers"),
        (INDICES + 400, "outside 0..511"),
        (INDICES - 1, "outside 0..511"),
        (torch.zeros(0, 8, dtype=torch.long), "no indices"),
        (0.5, "a tensor of whole numbers"),
    ],
)
def test_what_is_no_index_is_refused(measure, given, says):
    with pytest.raises(BavqError, match=says) as e:
        measure(given, 512)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("measure", [compute_perplexity, compute_usage_rate])
def test_k_must_be_given(measure):
    "The old call, with counts alone, does not pass in silence."
    with pytest.raises(TypeError, match="num_embeddings"):
        measure(code_counts(INDICES, 512))
    for wrong in (0, -1, 2.5, "512", None):
        with pytest.raises(BavqError, match="num_embeddings"):
            measure(INDICES, wrong)
