"What several test files share."

from pathlib import Path

import pytest
import torch


@pytest.fixture
def one_thread(monkeypatch):
    "This process trains as its children do: on the CPU, with one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_repository(monkeypatch):
    "Git does not find this checkout, so that tests may record runs while files of it are being changed."
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path(__file__).resolve().parent.parent))
