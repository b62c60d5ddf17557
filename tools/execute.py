"""Run notebooks in place, store their outputs small, and clean them: python tools/execute.py [01_base …]

Without a name: all of them, in their order. A notebook that fails is left as it was."""

import base64
import io
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def find(names):
    "The notebooks of these names, `01_base` or `nbs/01_base.ipynb`; all where there are none."
    found = {
        p.stem: p for p in sorted(NBS.rglob("*.ipynb")) if p.name[0] not in "_." and p.parent.name[0] != "."
    }
    if not names:
        return [*found.values()]
    missing = [n for n in names if Path(n).stem not in found]
    if missing:
        sys.exit(f"no notebook {', '.join(missing)} in nbs/: give names such as 01_base")
    return [found[Path(n).stem] for n in names]


def shrink(nb, colours=128):
    """Store figures with a palette where that saves a quarter or more: a third of the bytes, no difference to
    the eye."""
    for data in (
        o["data"] for c in nb.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ):
        png, small = base64.b64decode(data["image/png"]), io.BytesIO()
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            small, "PNG", optimize=True
        )
        if small.tell() < 0.75 * len(png):
            data["image/png"] = base64.b64encode(small.getvalue()).decode()


def drop_widgets(nb):
    "Store no view of a widget: it lives as long as its kernel."
    for c in nb.cells:
        if "outputs" in c:
            c.outputs = [o for o in c.outputs if not any("widget-view" in kind for kind in o.get("data", {}))]


def drop_modules(nb):
    "Store no module as a value, as a cell that ends in `needs(...)` has it: its text is a path."
    for c in nb.cells:
        kept = [o for o in c.get("outputs", []) if "<module " not in o.get("data", {}).get("text/plain", "")]
        if "outputs" in c:
            c.outputs = kept


def execute(path, timeout=600):
    "Run one notebook in a kernel of its own and write it back with its outputs."
    start, nb = time.monotonic(), nbformat.read(path, as_version=4)
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as e:
        sys.exit(f"{e}\n{path.name} failed and was left as it was")
    drop_widgets(nb)
    drop_modules(nb)
    shrink(nb)
    nbformat.write(nb, path)
    print(
        f"{path.stem:24s} {time.monotonic() - start:5.1f} s  {path.stat().st_size / 1024:4.0f} KB", flush=True
    )


if __name__ == "__main__":
    for path in find(sys.argv[1:]):
        execute(path)
        subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], cwd=ROOT, check=True)
