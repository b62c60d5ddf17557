"Nothing that is loaded can run code, write outside its folder or fill the memory."

import ast
import json
import multiprocessing
import os
import shutil
import struct
import time
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import bavq
from bavq.core.config import RunConfig, check_config, config_from_dict
from bavq.core.errors import BavqError
from bavq.core.presets import read_config
from bavq.core.storage import newest_checkpoint, read_json, read_weights, write_json
from bavq.evaluation.reports import load_weights, weights_from
from bavq.models.maskgit import load_prior, make_prior
from bavq.quantizers.base import make_quantizer
from bavq.training.checkpoints import load_model
from bavq.training.data import load_images, read_image
from bavq.training.experiments import run
from bavq.training.images import read_arrays
from bavq.training.prior_training import extract_codes

SOURCES = sorted(Path(bavq.__file__).parent.glob("*.py"))


class Trap:
    "Whoever unpickles it makes a file named `trapped` in the present folder."

    def __reduce__(self):
        return os.system, ("touch trapped",)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    "An empty folder, in which no trap may go off."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield tmp_path
    assert not (tmp_path / "trapped").exists(), "the trap went off"
    assert not (tmp_path.parent / "evil").exists()


TINY = RunConfig(
    name="run",
    data="images.npz",
    codebook_size=8,
    embedding_dim=4,
    hidden_channels=4,
    residual_blocks=0,
    epochs=1,
    batch_size=32,
)
PRIOR = dict(
    kind="pixelcnn",
    channels=16,
    layers=1,
    codes=dict(num_embeddings=8, grid=[4, 4], num_classes=0, top_embeddings=0, model=""),
)


def a_run(folder=Path("run")):
    "The folder of a run, without weights."
    write_json(folder / "config.json", asdict(TINY))
    return folder


def trap(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "model_state_dict": Trap()}, path)
    return path


def a_trap_in_a_run(name):
    return trap(a_run() / name).parent


def a_trap_in_a_prior():
    write_json(Path("prior/config.json"), PRIOR)
    return trap(Path("prior/final_model.pt")).parent


def a_trap_in_the_codes():
    "Beside a good model, codes that are pickled objects."
    x = np.zeros((64, 16, 16, 3), np.uint8)
    np.savez("images.npz", train=x, test=x[:32])
    run(TINY, ".", progress=False)
    extract_codes("run")
    for f in Path("run").glob("codes-*/*.npy"):
        np.save(f, np.array([Trap()], dtype=object), allow_pickle=True)


def an_array_of_traps(name):
    (np.savez if name.endswith("z") else np.save)(
        name, np.array([Trap()] * 20, dtype=object), allow_pickle=True
    )
    return name


def enter(context):
    with context:
        pass


LOADERS = {
    "a file of weights": lambda: read_weights(trap(Path("w.pt"))),
    "weights for evaluation": lambda: load_weights(trap(Path("w.pt"))),
    "weights of a judge": lambda: enter(weights_from(str(trap(Path("w.pt"))), "https://x/w.pth", ("", ""))),
    "final model of a run": lambda: load_model(a_trap_in_a_run("final_model.pt")),
    "final safetensors of a run": lambda: load_model(a_trap_in_a_run("final_model.safetensors")),
    "newest checkpoint of a run": lambda: load_model(a_trap_in_a_run("checkpoint_epoch1.pt")),
    "a prior": lambda: load_prior(a_trap_in_a_prior()),
    "codes of a run": lambda: (a_trap_in_the_codes(), extract_codes("run")),
    "images .npz": lambda: load_images(an_array_of_traps("x.npz")),
    "images .npy": lambda: load_images(an_array_of_traps("x.npy")),
    "yaml": lambda: (
        Path("c.yaml").write_text("name: !!python/object/apply:os.system ['touch trapped']\n"),
        read_config("c.yaml"),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", LOADERS)
def test_a_malicious_pickle_is_refused(loader):
    with pytest.raises(BavqError):
        LOADERS[loader]()


@pytest.mark.filterwarnings("ignore")
def test_a_malicious_checkpoint_is_passed_over(here):
    trap(here / "checkpoint_epoch1.pt")
    assert newest_checkpoint(here) is None


def test_the_trap_works(here):
    "Else the tests above would say nothing."
    torch.load(trap(here / "w.pt"), weights_only=False)
    (here / "trapped").unlink()


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "shutil.unpack_archive",
    "joblib.load",
    "torch.hub.load",
    "dill.load",
    "marshal.loads",
}
NEEDED = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_module_evaluates_text_or_loads_without_care(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
        if name in FORBIDDEN or name.endswith((".extractall", ".extract")) or "shell=True" in words:
            wrong.append(f"line {node.lineno}: {name}")
        if name in NEEDED and NEEDED[name] not in words:
            wrong.append(f"line {node.lineno}: {name} without {NEEDED[name]}")
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "os.system",
        "__import__('os').system('touch trapped')",
        "torch.nn.Linear",
        "bavq.quantizers.base.VectorQuantizer",
        "../../evil",
        "!!python/name:os.system",
    ],
)
def test_names_in_a_configuration_are_looked_up_and_never_evaluated(text):
    with pytest.raises(BavqError, match="unknown quantizer"):
        make_quantizer(text, 8, 4)
    with pytest.raises(BavqError, match="unknown prior"):
        make_prior(text, 8, (4, 4))
    with pytest.raises(BavqError):
        make_quantizer("vq", 8, 4, init=text)
    with pytest.raises(BavqError):
        check_config(config_from_dict({"precision": text}))


@pytest.mark.parametrize(
    "path",
    [
        "math:gcd",
        "os:kill",
        "os:getpgid",
        "subprocess:Popen",
        "builtins:print",
        "builtins:eval",
        "shutil:move",
        "torch:save",
        "bavq.core.storage:write_json",
        "os:environ",
        "math:pi",
    ],
)
def test_a_path_calls_nothing_but_what_is_meant_for_it(path, here, monkeypatch):
    "A stranger's configuration, also one in a run's folder, cannot call a function by its name."
    import importlib

    torch.save({}, here / "empty.pt")
    called = []
    module, _, name = path.partition(":")
    real = getattr(importlib.import_module(module), name)
    if callable(real) and module != "builtins" and not isinstance(real, type):
        monkeypatch.setattr(importlib.import_module(module), name, lambda *a, **k: called.append(path))
    with pytest.raises(BavqError, match="give a subclass of torch.nn.Module, or register it"):
        make_quantizer(path, 4, 6)
    with pytest.raises(BavqError, match="give a subclass of torch.nn.Module, or register it"):
        bavq.VQVAE("vq", codebook_size=4, embedding_dim=4, network=path)
    with pytest.raises(BavqError, match="annotated to return ImageData, or register it"):
        load_images(path)
    for field in ("quantizer", "network"):
        folder = here / field
        write_json(folder / "config.json", asdict(RunConfig(name=field, codebook_size=4)) | {field: path})
        shutil.copy(here / "empty.pt", folder / "final_model.pt")
        with pytest.raises(BavqError):
            load_model(folder)
    assert called == []


def test_what_is_meant_for_it_is_called(here, monkeypatch):
    "A subclass of nn.Module by its path; a function by its annotation; anything that its module registers."
    monkeypatch.syspath_prepend(str(here))
    (here / "plugin_of_mine.py").write_text(PLUGIN)
    assert type(make_quantizer("plugin_of_mine:Mine", 4, 6)).__name__ == "Mine"
    assert make_quantizer("plugin_of_mine:half", 8, 6).num_embeddings == 4
    assert load_images("plugin_of_mine:grey").name == "grey"


PLUGIN = """
import torch
from bavq.quantizers.base import VectorQuantizer, register_quantizer
from bavq.training.images import ImageData

class Mine(VectorQuantizer):
    pass

@register_quantizer("half_of_mine")
def half(num_embeddings, embedding_dim):
    return VectorQuantizer(num_embeddings // 2, embedding_dim)

def grey() -> ImageData:
    images = torch.zeros(8, 1, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(8, dtype=torch.int64)
    return ImageData(images, labels, images, labels, "grey", ("grey",))
"""


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/../../evil", "..", "a\\b", "a\0b", "x" * 300, "a\nb"]
)
def test_no_name_leads_out_of_the_folder(name):
    with pytest.raises(BavqError):
        check_config(RunConfig(name=name))


def test_archives_that_climb_out_write_nothing(here):
    "Members of an archive are only read, whatever they are called."
    inside = here / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "x.npz", "w") as z:
        for name in ("../../evil.npy", "/tmp/bavq-evil.npy"):
            with z.open(name, "w") as f:
                np.save(f, np.zeros(3))
    read_arrays(inside / "x.npz")
    torch.save({"a": torch.ones(3)}, inside / "w.pt")
    with zipfile.ZipFile(inside / "w.pt") as old, zipfile.ZipFile(inside / "evil.pt", "w") as new:
        for part in old.infolist():
            new.writestr(part.filename.replace("w/", "../../evil/", 1), old.read(part))
    try:
        read_weights(inside / "evil.pt")
    except BavqError:
        pass
    assert (
        sorted(p.name for p in here.rglob("*")) == ["evil.pt", "inside", "w.pt", "x.npz"]
        and not Path("/tmp/bavq-evil.npy").exists()
    )


def png(width, height, rows=1):
    "A small file that claims to be a large picture; with all its rows, it is one, and black."

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj()
    data = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + part(b"IDAT", data)
        + part(b"IEND", b"")
    )


def npy(shape):
    header = str(dict(descr="|u1", fortran_order=False, shape=shape)).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(100)


def zipped(path, name, size):
    "Zeros, far more than the file is long."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z, z.open(name, "w", force_zip64=True) as f:
        for _ in range(size >> 24):
            f.write(bytes(1 << 24))


def packed(path, size):
    "Good weights of so many bytes, packed into a few."
    torch.save({"a": torch.zeros(size, dtype=torch.uint8)}, whole := path.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            with old.open(part) as f, new.open(part, "w") as g:
                shutil.copyfileobj(f, g, 1 << 24)
    whole.unlink()


BOMBS = {  # how it is made, what reads it
    "a picture of 100,000 by 100,000": (lambda p: p.write_bytes(png(100_000, 100_000)), read_image),
    "a whole picture of 12,000 by 12,000": (lambda p: p.write_bytes(png(12_000, 12_000, 12_000)), read_image),
    "an array of a trillion numbers": (lambda p: p.write_bytes(npy((10**6, 3, 1000, 1000))), read_arrays),
    "weights that unpack": (lambda p: packed(p, 2**29), read_weights),
    "json without end": (lambda p: p.write_text("[" * 10**6), read_json),
    "yaml that laughs": (
        lambda p: p.write_text(
            "a0: &a0 [x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
            + "epochs: *a29\n"
        ),
        read_config,
    ),
}


def tell(pipe, read, path):
    """In a process of its own, whose memory has no earlier peak: what reading says, and how many kilobytes
    and seconds it took."""
    import resource

    peak, began = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    before = peak()
    try:
        read(path)
        said, refused = "it was read", False
    except BaseException as e:
        said, refused = str(e), isinstance(e, BavqError)
    pipe.send((refused, said, peak() - before, time.process_time() - began))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_fills_the_memory(bomb, here):
    (make, read), path, fork = BOMBS[bomb], here / "bomb.npy", multiprocessing.get_context("fork")
    make(path)
    mine, other = fork.Pipe()
    process = fork.Process(target=tell, args=(other, read, path))
    process.start()
    other.close()
    refused, said, kilobytes, seconds = mine.recv()
    process.join()
    assert refused and len(said) < 600 and "\n" not in said, said
    assert kilobytes < 200_000 and seconds < 10


def test_an_archive_of_arrays_says_how_large_it_becomes(here, monkeypatch):
    "Sizes are in the archive's table, and are looked at before anything is unpacked."
    monkeypatch.setattr("bavq.training.images.MEMORY_LIMIT", 2**24)
    zipped(here / "x.npz", "train.npy", 2**26)
    with pytest.raises(BavqError, match="would fill the memory"):
        read_arrays(here / "x.npz")


def test_every_bit_counts(here):
    "A bit flipped anywhere in a checkpoint is noticed, or changes nothing that is loaded."
    torch.save({"a": torch.randn(40), "b": [1, 2]}, here / "w.pt")
    whole, good, refused = (here / "w.pt").read_bytes(), read_weights(here / "w.pt"), 0
    for i in range(0, len(whole), 7):
        (here / "x.pt").write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        try:
            state = read_weights(here / "x.pt")
        except BavqError:
            refused += 1
        else:
            assert torch.equal(state["a"], good["a"]) and state["b"] == good["b"], f"byte {i}"
    assert refused > len(whole) / 7 / 3


def test_json_holds_data_alone():
    assert json.loads(json.dumps(asdict(RunConfig()))) == asdict(RunConfig())
