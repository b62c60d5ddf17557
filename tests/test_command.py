"""The command as a new user meets it: typos are answered before torch is loaded and name what was meant; a
comparison takes every field of a run; a folder with a bad image is checked first and gone on with."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import bavq
from bavq.cli import chosen_study, main, parse
from bavq.core.config import RunConfig
from bavq.core.distributed import set_seed
from bavq.core.errors import BavqError
from bavq.core.presets import KNOWN, OLD_NAMES, PRESETS, study_configs
from bavq.core.storage import write_json
from bavq.evaluation.compression import compress, read_header
from bavq.evaluation.folders import compress_folder, decompress_folder
from bavq.evaluation.summaries import summarise, table_as_text, tables
from bavq.models.maskgit import make_prior
from bavq.models.networks import NETWORKS
from bavq.models.vqvae import VQVAE
from bavq.quantizers.base import ALIASES, QUANTIZERS, make_quantizer
from bavq.theory.statistics import p_as_text
from bavq.training.images import DATASETS

ROOT = Path(__file__).resolve().parent.parent

# 37: a typo costs no torch

TYPOS = {
    "trian": "choose one of train",
    "train --codebok_size 5": "did you mean --codebook-size?",
    "train --beta 3": "--options beta 3",
    "train --epochs two": "two",
    "train --epochs 0": "epochs is 0",
    "train --quantizer ba-vq": "choose one of ba_vq, ",
    "train --network convv": "choose one of conv",
    "train --data fotos": "choose one of photos, ",
    "train --data no/such.npz": "there is no file no/such.npz",
    "train --preset fast": "unknown preset",
    "compare --batchsize 3": "did you mean --batch-size?",
    "compare --quantizers vq_emma": "choose one of vq_ema, ",
    "compare --seed 3": "give --seeds",
    "compare --seeds -1": "seeds is -1",
    "evaluate nowhere": "there is no run nowhere",
    "summarise nowhere": "there is no folder nowhere",
    "compress": "RUN folder of a trained autoencoder",
    "compress nowhere a b": "there is no run nowhere",
    "prior train nowhere --hidden-chanels 3": "did you mean --hidden-channels?",
    "lab --K 1": "codebook_size is 1",
}
WITHOUT_TORCH = """
import sys
HEAVY = ("torch", "numpy", "pandas", "scipy", "PIL", "torchvision", "accelerate")
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in HEAVY:
            raise RuntimeError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
from bavq.cli import main
for line in sys.stdin.read().splitlines():
    try:
        main(line.split())
        print("accepted", file=sys.stderr)
    except SystemExit as e:
        assert e.code == 2, e.code
"""


def test_a_typo_is_answered_before_torch_is_imported(tmp_path):
    "One process without torch and the like answers them all, a line each."
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join(TYPOS),
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == len(TYPOS), done.stderr
    for (typed, words), line in zip(TYPOS.items(), said):
        assert line.startswith("bavq: ") and words in line, (typed, line)


def test_the_names_known_without_torch_are_those_there_are():
    assert sorted(KNOWN["quantizer"]) == sorted(n for n, q in QUANTIZERS.items() if "bavq." in q.__module__)
    assert sorted(KNOWN["network"]) == sorted(n for n, q in NETWORKS.items() if "bavq." in q.__module__)
    assert sorted(KNOWN["data set"]) == sorted(n for n, f in DATASETS.items() if "bavq." in f.__module__)
    assert sorted(OLD_NAMES) == sorted(ALIASES)


# 32: compare takes every field of a run


def test_compare_takes_every_field_of_a_run():
    other = dict(
        data="mnist",
        data_root="there",
        train_size=640,
        image_size=16,
        levels=2,
        embedding_dim=32,
        network="my:Net",
        hidden_channels=8,
        residual_blocks=1,
        warmup_steps=7,
        epochs=3,
        batch_size=20,
        lr=1e-2,
        cooldown=0.5,
        clip_grad=2.0,
        precision="bf16",
        workers=1,
        checkpoint_every=3,
        wandb=True,
    )
    own = {"quantizer", "codebook_size", "seed", "name", "options"}
    for name in {f.name for f in fields(RunConfig)} - own:
        start = getattr(PRESETS["quick"].base, name)
        value = other.get(
            name,
            f"{start}x" if isinstance(start, str) else not start if isinstance(start, bool) else start + 1,
        )
        flag = "--" + name.replace("_", "-")
        words = [flag] if value is True else [flag, str(value)]
        study = chosen_study(parse(["compare", *words]))
        assert study.base == replace(PRESETS["quick"].base, **{name: value}), name
        assert all(getattr(c, name) == value for c in study_configs(study))
    study = chosen_study(parse("compare --options distance cosine --preset cpu".split()))
    assert study.base == replace(PRESETS["cpu"].base, options={"distance": "cosine"})


@pytest.mark.parametrize("words", ["--quantizer vq", "--codebook-size 3", "--seed 1", "--name x"])
def test_compare_refuses_what_differs_from_run_to_run(words):
    with pytest.raises(BavqError, match="differs from run to run"):
        parse(["compare", *words.split()]).check()


# 36: wrong keywords


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: bavq.VQEMAQuantizer(8, 4, dekay=0.9),
            "VQEMAQuantizer does not take dekay: did you mean decay?",
        ),
        (lambda: bavq.BAQuantizer(8, 4, bta=3), "BAQuantizer does not take bta: did you mean beta?"),
        (lambda: bavq.VQEMAQuantizer(8), "VQEMAQuantizer: missing .* it takes num_embeddings, embedding_dim"),
        (
            lambda: make_quantizer("vq_ema", 8, 4, dekay=0.9),
            "vq_ema does not take dekay: did you mean decay?",
        ),
        (lambda: make_quantizer("residual", 8, 4, base="vq_ema", dekay=1), "did you mean decay?"),
        (lambda: bavq.ProductQuantizer(16, 4, grups=2), "ProductQuantizer itself takes .*groups"),
        (lambda: make_quantizer("gumbl", 8, 4), "choose one of gumbel, "),
        (
            lambda: bavq.compute_psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "datset"),
            "one of dataset, ",
        ),
    ],
)
def test_a_wrong_keyword_names_its_class_and_the_valid_ones(call, says):
    with pytest.raises(BavqError, match=says) as e:
        call()
    assert "\n" not in str(e.value)


def test_quantizers_are_listed_with_their_options(capsys):
    main(["quantizers"])
    said = capsys.readouterr().out
    for name in KNOWN["quantizer"]:
        assert f"\n{name}: " in said
    main(["quantizers", "vq_ema"])
    assert "decay 0.99" in capsys.readouterr().out


def test_one_thing_has_one_name():
    assert parse("prior train x --hidden-channels 32".split()).verb.prior.channels == 32
    assert parse("prior train x --channels 32".split()).verb.prior.channels == 32
    assert (
        parse("lab --codebook-size 8".split()).codebook_size == parse("lab --K 8".split()).codebook_size == 8
    )


def test_help_names_the_positional_arguments(capsys):
    for command, names in {
        "compress": "RUN IMAGES OUT",
        "decompress": "RUN FILES OUT",
        "evaluate": "RUNS",
    }.items():
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        usage = capsys.readouterr().out
        assert all(f" {name} " in usage.partition("\n")[2] for name in names.split()), usage


# 33: folders with bad images


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "m"
    set_seed(0)
    sizes = dict(codebook_size=24, embedding_dim=4, hidden_channels=4, residual_blocks=0)
    model = VQVAE("vq", **sizes)
    model(torch.rand(8, 3, 32, 32) * 2 - 1)
    write_json(folder / "config.json", asdict(RunConfig(name="m", quantizer="vq", **sizes)))
    torch.save(model.state_dict(), folder / "final_model.pt")
    return folder, model.eval()


def pictures(folder):
    "Three good pictures, one cut short, one animated, and a text."
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    for name, image in zip(("a.png", "b.jpg", "z.gif"), images):
        image.save(folder / name)
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:200])
    images[0].save(folder / "d.gif", save_all=True, append_images=images[1:])
    (folder / "notes.txt").write_text("x")
    return folder


def test_bad_images_are_found_before_anything_is_written(model_folder, tmp_path, capsys):
    run, _ = model_folder
    folder, out = pictures(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(BavqError, match=r"2 of 5 files are bad \(c.png, d.gif\).*--skip-bad"):
        compress_folder(run, folder, out)
    assert not out.exists()
    compress_folder(run, folder, out, skip_bad=True)
    said = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["a.png.bavq", "b.jpg.bavq", "z.gif.bavq"]
    assert "c.png" in said and "d.gif is animated (3 frames)" in said and "not looked at: notes.txt" in said


def test_a_stopped_command_goes_on(model_folder, tmp_path, capsys):
    run, _ = model_folder
    folder, out = pictures(tmp_path / "in"), tmp_path / "out"
    size = compress_folder(run, folder, out, skip_bad=True)
    whole = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "b.jpg.bavq").unlink()
    kept = (out / "a.png.bavq").stat().st_mtime_ns
    assert compress_folder(run, folder, out, skip_bad=True) == size
    assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    assert (out / "a.png.bavq").stat().st_mtime_ns == kept
    (out / "a.png.bavq").write_bytes(whole["z.gif.bavq"])
    with pytest.raises(BavqError, match="another image, model or coding: remove it"):
        compress_folder(run, folder, out, skip_bad=True)


def test_damaged_files_are_found_before_a_picture_is_written(model_folder, tmp_path):
    run, _ = model_folder
    folder, out, back = pictures(tmp_path / "in"), tmp_path / "out", tmp_path / "back"
    compress_folder(run, folder, out, skip_bad=True)
    data = bytearray((out / "z.gif.bavq").read_bytes())
    data[50] ^= 1
    (out / "z.gif.bavq").write_bytes(bytes(data))
    with pytest.raises(BavqError, match="1 of 3 files are bad"):
        decompress_folder(run, out, back)
    assert not back.exists() and decompress_folder(run, out, back, skip_bad=True) == 2


def test_the_shortest_coding_is_measured(model_folder):
    "A prior that knows nothing does not win only because it is there."
    _, model = model_folder
    set_seed(0)
    prior = make_prior("transformer", 24, (8, 8), channels=16, layers=1).eval()
    with torch.no_grad():
        prior.head[1].bias[0] += 6  # sure of one code, and wrong
    images = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    sizes = {c: len(compress(images, model, prior, c)) for c in ("uniform", "marginal", "prior")}
    best = compress(images, model, prior)
    assert len(best) == min(sizes.values()) < sizes["prior"]
    assert read_header(best).prior == bytes(8)


# 38: numbers and tables in print


def test_no_p_is_nought():
    assert p_as_text(0.0) == p_as_text(1e-12) == "<0.0001" and p_as_text(float("nan")) == "–"
    rows = [
        dict(
            run=f"{m}{s}",
            data="photos",
            codebook_size=256,
            distance="euclidean",
            method=m,
            quantizer=m,
            seed=s,
            psnr=20 + 9 * (m == "ba_vq") + 1e-3 * s * (1 + (m == "ba_vq")),
            perplexity=100.0 + s,
            usage_rate=1.0,
            dead_codes=0,
        )
        for m in ("vq_ema", "ba_vq")
        for s in range(9)
    ]
    summary = summarise(pd.DataFrame(rows))
    _, differences = tables(summary)
    text = table_as_text(differences, ("data", "codebook_size", "distance", "method"))
    assert "p<0.0001" in text and "p=0.0 " not in text and "p=0\n" not in text


@pytest.mark.parametrize("columns", [2, 6, 12])
def test_tables_fit_a_hundred_columns(columns):
    table = pd.DataFrame({f"c{i}": ["+0.00 [-0.12, +0.13] p=0.71"] * 3 for i in range(columns)})
    table.insert(0, "method", ["a", "b", "c"])
    table.insert(0, "data", "photos")
    text = table_as_text(table, ("data", "method"))
    assert max(map(len, text.splitlines())) <= 100 and text.startswith("data photos\n")
    assert text.count("+0.00") == 3 * columns


# 39: the explorer as an application


def test_the_explorer_shows_no_value_without_a_word(monkeypatch):
    "What a cell returns is a control, a picture, or an aside, which an application leaves out."
    from bavq.core.views import aside

    notebook = json.loads((ROOT / "nbs/7_comparison/02_explore.ipynb").read_text(encoding="utf-8"))
    wrong = []
    for cell in notebook["cells"]:
        results = [o["data"] for o in cell.get("outputs", []) if o["output_type"] == "execute_result"]
        bare = any("image/png" not in data for data in results)
        last = "".join(cell["source"]).rstrip().rpartition("\n")[2]
        if bare and not last.startswith("aside("):
            wrong.append(last)
    assert not wrong
    assert aside(354) == 354
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.8")
    assert aside(354) is None
