"""Bad input ends in one line with a cause and a cure, and changes no file: a slice of the cases that
tools/bad_input.py records."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import bad_input  # noqa: E402


@pytest.mark.parametrize(
    "kind, share", [("function", 0.2), ("configuration", 0.1), ("file", 0.3), ("command", 0.1)]
)
def test_a_slice_of_the_campaign(kind, share):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record = bad_input.campaign(share, seed=7, kinds=(kind,))
    torch.set_num_threads(threads)
    assert record["cases"] > 10 and record["wrong"] == []


def test_the_judge_is_strict(tmp_path):
    "What is accepted, raises something else, or says it in two lines or without a cure, is not fine."

    def fail(message):
        raise bad_input.BavqError(message)

    assert bad_input.judge(lambda: None) == "accepted" and bad_input.judge(lambda: 1 / 0).startswith(
        "ZeroDivisionError"
    )
    assert (
        bad_input.judge(lambda: fail("lr is 0\nof all things: give more"))
        != "fine"
        != bad_input.judge(lambda: fail("no"))
    )
    assert bad_input.judge(lambda: fail("lr is 0: give more than 0")) == "fine"


def test_debug_shows_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(bad_input.BavqError):
        bad_input.main(["train", "--epochs", "0", "--debug"])
