"""What the benchmarks share: rounds in which every arm has its turn, the largest memory of one call, and
where records go.

Time. On the CPU it is processor time on one thread, which a busy machine disturbs least; on CUDA it is
wall-clock time between two synchronisations. All arms run once in every round, one after the other, so that a
slow minute meets all of them: compare within a round. Memory. On the CPU each call runs in a process of its
own, forked before anything large was made: the peak of its resident memory (VmHWM, reset after a small first
call) less what it held before. On CUDA: the peak of what torch has allocated, less what was allocated
before."""

import contextlib
import ctypes
import multiprocessing
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bavq.core.storage import write_json
from bavq.core.provenance import environment


def seconds(call, device):
    "Seconds that one call takes."
    if device == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    call()
    return time.process_time() - began


def interleaved(arms, rounds, device, warm=1):
    "{arm: seconds in each round} of {arm: call(round)}; each arm runs `warm` times before, unrecorded."
    for call in arms.values():
        for _ in range(warm):
            call(0)
    taken = {name: [] for name in arms}
    for r in range(rounds):
        for name, call in arms.items():
            taken[name].append(round(seconds(lambda: call(r), device), 6))
    return taken


def resident(field):
    "VmRSS or VmHWM of this process, in bytes; where there is no /proc, the largest so far."
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _grow(make, pipe):
    torch.set_num_threads(1)
    small, call = make()
    small()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what the small call left
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    call()
    pipe.send(max(resident("VmHWM") - before, 0))


def peak_bytes(make, device):
    "Bytes that `call` needs at most, beyond what is held before; `make()` gives (a small first call, call)."
    if device == "cuda":
        small, call = make()
        small()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    processes = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    )
    receive, send = processes.Pipe(False)
    child = processes.Process(target=_grow, args=(make, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None  # it was killed: the memory was not there
    finally:
        child.join()


def record(folder, name, device, **values):
    "Write FOLDER/NAME.json: the values, and what they were measured on and with."
    about = environment(device)
    about["versions"]["vector-quantize-pytorch"] = version("vector-quantize-pytorch")
    path = write_json(
        Path(folder) / f"{name}.json",
        dict(clock="wall" if device == "cuda" else "processor", environment=about, **values),
    )
    print(path, flush=True)
