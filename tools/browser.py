"""Use the notebooks as a reader does, in JupyterLab and in a real browser: python tools/browser.py
[7_comparison/02_explore …]

Works in a copy of nbs/ and results/ whose outputs are removed. Every cell must run, no output may be an
error, and what can be moved is moved with the keyboard: the picture must change. Screenshots and times go to
experiments/browser/. Needs Chromium: Playwright's, the system's, or the one that BAVQ_CHROMIUM names; with
--install it is fetched where that is possible. Without one, a line says so. The last line reads `N passed, N
failed`; the exit status is 1 where anything failed."""

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
from gate import BIN, ENV, ROOT, Report

READ = [
    "6_studies/01_linear_lab",
    "1_theory/01_tutorial",
    "7_comparison/01_compare",
    "6_studies/03_variants",
    "7_comparison/02_explore",
]
OUT = ROOT / "experiments" / "browser"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DONE = "from pathlib import Path; Path('{name}.done').touch()"
ERROR = (
    '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"],'
    ' .jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]'
)


# The browser


def candidates(playwright):
    "Where a Chromium may be."
    named = os.environ.get("BAVQ_CHROMIUM"), playwright.chromium.executable_path
    return [
        p
        for p in (*named, *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        if p and Path(p).exists()
    ]


def start_chromium(playwright):
    "A browser, or None where there is none that starts."
    for path in candidates(playwright):
        with suppress(Exception):
            return playwright.chromium.launch(
                executable_path=path, args=FLAGS
            )  # a missing library, a wrong architecture, …
    return None


def fetch_chromium():
    "Try to install Chromium: Playwright's own; else, as root on Debian and its kin, the distribution's."
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        commands += [
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"],
        ]
    for command in commands:
        with suppress(subprocess.TimeoutExpired, OSError):
            subprocess.run(
                command,
                capture_output=True,
                timeout=300,
                env=os.environ | dict(DEBIAN_FRONTEND="noninteractive"),
            )


# The servers


@contextmanager
def workplace():
    """A copy of what a reader has, outputs removed, and settings that ask JupyterLab to draw all cells and to
    fetch no news."""
    with tempfile.TemporaryDirectory(prefix="bavq-browser-") as tmp:
        tmp = Path(tmp)
        shutil.copytree(ROOT / "results", tmp / "results")
        for path in (ROOT / "nbs").rglob("[0-9]*.ipynb"):
            place = tmp / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            nb = nbformat.read(path, as_version=4)
            for c in nb.cells:
                if c.cell_type == "code":
                    c.outputs, c.execution_count = [], None
            nb.cells.append(nbformat.v4.new_code_cell(DONE.format(name=path.stem)))
            nbformat.write(nb, place)
        settings = {
            "lab/@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
            "lab/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
            "config/labconfig/page_config.json": {
                "disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}
            },
        }
        for name, value in settings.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_text(json.dumps(value))
        yield tmp


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serve(command, tmp, url, patience=60):
    "A server in a process group of its own, ended with all its kernels."
    env = ENV | dict(
        JUPYTER_CONFIG_DIR=str(tmp / "config"),
        JUPYTERLAB_SETTINGS_DIR=str(tmp / "lab"),
        JUPYTERLAB_WORKSPACES_DIR=str(tmp / "workspaces"),
        JUPYTER_RUNTIME_DIR=str(tmp / "runtime"),
        IPYTHONDIR=str(tmp / "ipython"),
        PYTHONPATH=str(ROOT),
    )
    with open(tmp / "server.log", "wb") as log:
        p = subprocess.Popen(
            command,
            cwd=tmp,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + patience
        while True:
            with (
                suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(url, timeout=5),
            ):
                break
            if p.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server did not start:\n" + (tmp / "server.log").read_text()[-2000:])
            time.sleep(0.3)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGTERM)
        try:
            p.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)


def lab(tmp, token, port):
    return [
        BIN / "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={tmp}",
        f"--IdentityProvider.token={token}",
        "--LabApp.extension_manager=readonly",
    ]


def voila(tmp, port):
    return [
        BIN / "voila",
        "nbs/7_comparison/02_explore.ipynb",
        "--no-browser",
        "--Voila.ip=127.0.0.1",
        f"--port={port}",
    ]


# A reader


def press_run(page):
    """Run, Run All Cells; once more where the kernel was not there yet, and JupyterLab asked which one to
    take."""
    from playwright.sync_api import TimeoutError as Late

    accept, begun = (
        page.locator(".jp-Dialog .jp-mod-accept"),
        page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[[*\d]+\]")),
    )
    for _ in range(6):
        if accept.count():
            accept.first.click()
            page.wait_for_timeout(3000)
        try:
            page.get_by_role("menuitem", name="Run", exact=True).click(timeout=5000)
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click(timeout=5000)
        except Late:
            continue  # the question came in between
        for _ in range(80):
            if begun.count():
                return
            if accept.count():
                break
            page.wait_for_timeout(250)


def run_all(page, url, token, name, tmp, patience):
    "Open a notebook in JupyterLab and run it; the problem, if a cell failed or did not run."
    page.goto(f"{url}/lab/tree/nbs/{name}.ipynb?token={token}&reset")
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=240_000)
    press_run(page)
    until, done = time.monotonic() + patience, tmp / "nbs" / f"{name}.done"
    while not done.exists():
        if page.locator(ERROR).count():
            break
        if time.monotonic() > until:
            return f"not at its end after {patience} s"
        page.wait_for_timeout(250)
    page.wait_for_timeout(1000)  # for the last outputs to arrive
    page.keyboard.press("Control+s")
    return saved_problem(page, tmp / "nbs" / f"{name}.ipynb")


def saved_problem(page, path, patience=20):
    "What the notebook that JupyterLab saved says: the first error, or a cell that was not run."
    for _ in range(4 * patience):
        page.wait_for_timeout(250)
        try:
            nb = nbformat.read(path, as_version=4)
        except nbformat.reader.NotJSONError:
            continue  # half-written
        cells = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
        errors = [o for c in cells for o in c.outputs if o.output_type == "error"]
        if errors:
            return "\n".join(errors[0].traceback[-6:]) or f"{errors[0].ename}: {errors[0].evalue}"
        left = sum(c.execution_count is None for c in cells)
        if not left:
            return ""
    return "some code cells have not run, or the notebook was not saved"


def look(page, name, where=None):
    "A screenshot; of the part of the page around an element, where one is given."
    if where:
        where.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
    page.screenshot(path=OUT / f"{name}.png")


def box_of(page, label):
    return page.locator(".widget-vbox", has=page.locator(".widget-label", has_text=label)).last


def after(page, box, act, patience=60):
    "Do something to a widget; the milliseconds until its picture was another."
    image = box.locator("img[alt]")
    before, began = image.get_attribute("src"), time.perf_counter()
    act()
    deadline = time.monotonic() + patience
    while image.get_attribute("src") == before:
        if time.monotonic() > deadline:
            raise AssertionError("its picture did not change")
        page.wait_for_timeout(5)
    return 1000 * (time.perf_counter() - began)


def control(box, label, kind):
    "A part of the slider or of the choices with this label."
    return box.locator(
        ".widget-inline-hbox, .widget-toggle-buttons",
        has=box.page.locator(f'.widget-label:text-is("{label}")'),
    ).locator(kind)


def move(page, box, label, keys):
    """Move a slider with the keyboard, one key at a time; the median of the milliseconds until the picture
    changed."""
    handle = control(box, label, ".noUi-handle")
    handle.focus()
    times = [after(page, box, lambda k=k: page.keyboard.press(k)) for k in keys]
    return sorted(times)[len(times) // 2]


def pick(page, box, label):
    "Take another of some choices with the keyboard."
    control(box, label, "button:not(.mod-active)").last.focus()
    return after(page, box, lambda: page.keyboard.press("Enter"))


def caption(box):
    return box.locator("figcaption").inner_text()


def wait_caption(page, box, holds, patience=240):
    until = time.monotonic() + patience
    while not holds(caption(box)):
        if time.monotonic() > until:
            raise AssertionError(f"after {patience} s it still says: {caption(box)}")
        page.wait_for_timeout(100)


def explore_beta(page, times, prefix="02_explore"):
    box = box_of(page, "rounds")
    look(page, f"{prefix}_beta_before", box)
    times["β, a step"] = move(page, box, "β", ["ArrowRight"] * 9)
    times["marginal"] = pick(page, box, "marginal")
    before = caption(box)
    box.locator(".widget-play button").first.focus()
    after(page, box, lambda: page.keyboard.press("Enter"))
    wait_caption(page, box, lambda text: text != before)
    page.wait_for_timeout(1500)
    box.locator(".widget-play button").first.press("Enter")
    look(page, f"{prefix}_beta_after", box)


def explore_schedule(page, times):
    box = box_of(page, "first β")
    times["first β, a step"] = move(page, box, "first β", ["ArrowRight"] * 5)
    times["shape"] = pick(page, box, "shape")
    look(page, "22_explore_schedule", box)


def explore_sizes(page, times):
    box = box_of(page, "data")
    times["K, a step"] = move(page, box, "K", ["ArrowRight", "ArrowRight", "ArrowLeft"])
    times["method"] = pick(page, box, "method")
    look(page, "22_explore_sizes", box)


def explore_training(page, times):
    "Start, stop, see that it can go on; all with the keyboard."
    box = box_of(page, "seed")

    def button(text):
        return box.get_by_role("button", name=text)

    def epoch(text):
        return (
            int(text.partition("epoch ")[2].partition(" of")[0] or 0)
            if "epoch " in text and "no epoch" not in text
            else 0
        )

    button("Start").press("Enter")
    wait_caption(page, box, lambda text: epoch(text) >= 2)
    button("Stop").press("Enter")
    wait_caption(page, box, lambda text: "stopped" in text)
    look(page, "22_explore_training_stopped", box)
    reached = epoch(caption(box))
    assert reached < 20, "it had finished before it could be stopped"
    button("Start").press("Enter")
    wait_caption(page, box, lambda text: epoch(text) > reached)
    button("Stop").press("Enter")
    wait_caption(page, box, lambda text: "stopped" in text)


def try_out(report, name, act, *args):
    "Do one thing and report it."
    start = time.monotonic()
    try:
        problem = act(*args) or ""
    except Exception as e:
        problem = f"{type(e).__name__}: {str(e)[:1500]}"
    report.add(name, time.monotonic() - start, problem)
    return not problem


def use_lab(browser, report, names, times, patience):
    with workplace() as tmp:
        token, port = secrets.token_hex(16), free_port()
        url = f"http://127.0.0.1:{port}"
        with serve(lab(tmp, token, port), tmp, f"{url}/api"):
            for name in names:
                page = browser.new_page(viewport=dict(width=1400, height=1000))
                ran = try_out(report, f"browser: {name}", run_all, page, url, token, name, tmp, patience)
                page.locator(".jp-Notebook").evaluate("e => e.scrollTo(0, 0)") if ran else None
                look(page, Path(name).name)
                if ran and Path(name).name == "02_explore":
                    for part in explore_beta, explore_schedule, explore_sizes, explore_training:
                        try_out(report, f"browser: {part.__name__}", part, page, times)
                page.close()
                end_kernels(url, token)


def end_kernels(url, token):
    "So that five notebooks need the memory of one."
    head = dict(Authorization=f"token {token}")
    with urllib.request.urlopen(urllib.request.Request(f"{url}/api/sessions", headers=head), timeout=10) as f:
        sessions = json.load(f)
    for s in sessions:
        with suppress(urllib.error.URLError):
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/api/sessions/{s['id']}", headers=head, method="DELETE"),
                timeout=30,
            ).close()


def use_voila(browser, report, times, patience):
    def served(page, url):
        page.goto(url, timeout=1000 * patience)
        page.wait_for_selector(".noUi-handle", timeout=1000 * patience)
        assert not page.locator(ERROR).count(), "a cell failed"
        assert not page.locator(".jp-CodeCell .jp-InputArea:visible").count(), "it shows code"
        explore_beta(page, times, "voila")

    with workplace() as tmp:
        url = f"http://127.0.0.1:{(port := free_port())}"
        with serve(voila(tmp, port), tmp, f"{url}/voila/static/voila.js", patience):
            page = browser.new_page(viewport=dict(width=1400, height=1000))
            try_out(report, "browser: Voilà", served, page, url)
            page.close()


def run_browser(report, names=(), install=False, patience=240):
    "All of it, into a report; one line and nothing else where there is no browser."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return print("browser tests skipped: no Playwright (pip install 'bavq[dev]')", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    times = {}
    with sync_playwright() as p:
        browser = start_chromium(p)
        if browser is None and install:
            fetch_chromium()
            browser = start_chromium(p)
        if browser is None:
            return print(
                "browser tests skipped: no Chromium (playwright install chromium, or name one in"
                " BAVQ_CHROMIUM)",
                flush=True,
            )
        use_lab(browser, report, names or READ, times, patience)
        if not names or "7_comparison/02_explore" in names:
            use_voila(browser, report, {}, patience)
        browser.close()
    (OUT / "times.json").write_text(
        json.dumps({k: round(v, 1) for k, v in times.items()}, indent=1, ensure_ascii=False) + "\n"
    )
    print(
        f"screenshots: {OUT.relative_to(ROOT)}; milliseconds from key to picture:"
        f" {', '.join(f'{k} {v:.0f}' for k, v in times.items())}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"notebooks (default {' '.join(READ)})")
    parser.add_argument("--install", action="store_true", help="fetch Chromium where there is none")
    parser.add_argument("--timeout", type=int, default=240, help="seconds a notebook may take (default 240)")
    args, report = parser.parse_args(), Report()
    run_browser(report, args.names, args.install, args.timeout)
    print(f"{report.passed} passed, {report.failed} failed", flush=True)
    return int(report.failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
