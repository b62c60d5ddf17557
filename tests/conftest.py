"What several test files share."

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
