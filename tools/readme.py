"""Write README.md from nbs/index.ipynb, its figures as nbs/images/readme-N.png, and a small picture of each
notebook: python tools/readme.py

The stored outputs are used as they are; nothing is run. The same notebook always gives the same README and
figures; a small picture, nbs/images/NAME.png, is the notebook's first figure and names the bytes it was made
from."""

import base64
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from posixpath import normpath

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import (
    clean_magics,
    filter_stream_,
    hide_,
    hide_line,
    populate_language,
    rm_export,
    rm_header_dash,
)
from PIL import Image, PngImagePlugin
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
INDEX, FIGURE = "nbs/index.ipynb", "nbs/images/readme-{}.png"
NOTICE = "<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"
LINK = re.compile(r'(\]\()([^)\s]+)|((?:src|href)=")([^"]+)')
CODE = re.compile(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", re.M | re.S)


def obey(cell):
    "Quarto's echo, output and include, which nbdev leaves to Quarto; captions become alternative texts."
    if cell.cell_type != "code":
        return
    says = {k: " ".join(v) for k, v in cell.directives_.items()}
    if says.get("include:", "").lower() == "false":
        del cell["source"]
        return
    if says.get("output:", "").lower() == "false":
        cell["outputs"] = []
    if says.get("echo:", "").lower() == "false":
        cell.metadata["tags"] = ["hide-input"]
    cell.metadata["alt"] = (says.get("fig-alt:") or says.get("fig-cap:") or "Figure").strip("\"'")
    cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()


def from_root(text):
    """Markdown whose relative links, written for nbs/, work from the root of the repository; code stays as it
    is."""

    def fix(m):
        before, target = m[1] or m[3], m[2] or m[4]
        outside = re.match(r"[a-z][a-z+.-]*:|[#/]", target, re.I)
        return before + (target if outside else normpath(f"nbs/{target}"))

    return "".join(p if i % 2 else LINK.sub(fix, p) for i, p in enumerate(CODE.split(text)))


def take_figures(nb):
    "The stored figures, name → bytes; in the notebook each becomes a link to its name."
    figures = {}
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data:
                name = FIGURE.format(len(figures) + 1)
                figures[name] = base64.b64decode(data["image/png"])
                out["data"] = {"text/markdown": f"![{cell.metadata.get('alt', 'Figure')}]({name})"}
            elif "text/html" in data:
                data["text/html"] = re.sub(r"<style.*?</style>\n?", "", data["text/html"], flags=re.S)
    return figures


def build(root=ROOT):
    "Every file this makes, name → bytes."
    procs = [
        populate_language,
        hide_line,
        filter_stream_,
        rm_header_dash,
        rm_export,
        clean_magics,
        hide_,
        obey,
    ]
    nb = nbformat.reads(nb2str(NBProcessor(root / INDEX, procs=procs, process=True).nb), as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        for out in cell.get("outputs", []):
            if "text/markdown" in out.get("data", {}):
                out.data["text/markdown"] = from_root(out.data["text/markdown"])
    figures = take_figures(nb)
    nb.metadata["language_info"] = {
        "name": "python"
    }  # the language of the code blocks; nbdev_clean removes it
    hide = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"hide-input"}})
    text, _ = MarkdownExporter(config=hide).from_notebook_node(nb)
    text = re.sub(r"\x1b\[[0-9;]*m|[ \t]+$", "", text, flags=re.M)
    return {"README.md": (NOTICE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode(), **figures}


def first_figures(root=ROOT):
    "Name of the small picture → bytes of the first stored figure, for each notebook that has one."
    found = {}
    for path in sorted((root / "nbs").rglob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        figures = [
            o["data"]["image/png"]
            for c in cells
            for o in c.get("outputs", [])
            if "image/png" in o.get("data", {})
        ]
        if figures:
            found[f"nbs/images/{path.stem}.png"] = base64.b64decode(figures[0])
    return found


def digest(figure):
    return hashlib.sha256(figure).hexdigest()[:16]


def thumbnail(figure, size=(200, 112)):
    "A figure made small on white, with the digest of what it was made from."
    image = Image.open(io.BytesIO(figure)).convert("RGB")
    image.thumbnail(size, Image.Resampling.LANCZOS)
    sheet, out, note = Image.new("RGB", size, "white"), io.BytesIO(), PngImagePlugin.PngInfo()
    sheet.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    note.add_text("made-from", digest(figure))
    sheet.quantize(48, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True, pnginfo=note
    )
    return out.getvalue()


def made_from(path):
    """The digest a small picture names; nothing where it is no such picture. Its own bytes may differ between
    versions of Pillow."""
    try:
        return Image.open(path).text.get("made-from")
    except (OSError, AttributeError):
        return None


def problems(files, root=ROOT):
    "What stands differently on disk, and links that lead nowhere; nothing where all is well."
    small = first_figures(root)
    stale = [n for n, b in files.items() if not (root / n).exists() or (root / n).read_bytes() != b]
    stale += [n for n in figures_on_disk(root) if n not in files and n not in small]
    old = [n for n, figure in small.items() if made_from(root / n) != digest(figure)]
    targets = [
        (m[2] or m[4]).split("#")[0]
        for p in CODE.split(files["README.md"].decode())[::2]
        for m in LINK.finditer(p)
    ]
    dead = [
        t
        for t in targets
        if t
        and not re.match(r"[a-z][a-z+.-]*:", t, re.I)
        and t not in files
        and t not in small
        and not (root / t).exists()
    ]
    return (
        [f"{n} is not what {INDEX} gives: run `make readme`" for n in stale]
        + [f"{n} is not the first figure of its notebook: run `make readme`" for n in old]
        + [
            f"dead link in {INDEX}: {t}; a notebook that is new or renamed: run `make execute NB=index`, then"
            " `make readme`"
            for t in dead
        ]
    )


def figures_on_disk(root):
    return [p.relative_to(root).as_posix() for p in sorted(root.glob("nbs/images/*.png"))]


if __name__ == "__main__":
    if not (ROOT / INDEX).exists():
        sys.exit(f"{INDEX} is not there: README.md is generated from it")
    files, small = build(), first_figures()
    for name in figures_on_disk(ROOT):
        if name not in files and name not in small:
            (ROOT / name).unlink()
    for name, figure in small.items():
        if made_from(ROOT / name) == digest(figure):
            continue
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(thumbnail(figure))
    for name, content in files.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(content)
    sys.exit("\n".join(problems(files)) or None)
