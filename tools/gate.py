"""Everything CI checks: clean and export change nothing, README.md is up to date, the site builds, every
notebook runs, pytest passes.

Run by `make test`. Compares bytes, so it needs no clean git tree; clean and export work on a copy, the tree
stays as it is. The last line reads `N passed, N failed`; the exit status is 1 where anything failed."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONHASHSEED="0"
)
PARTS = ["nbs", "bavq", "settings.ini"]  # what clean and export read and write
RUNNING = set()  # notebook processes, each the head of its own process group


class Report:
    "One line for each check as it ends, and the count."

    def __init__(self):
        self.passed = self.failed = 0

    def add(self, name, seconds, problem="", passed=None, failed=None):
        self.passed += (not problem) if passed is None else passed
        self.failed += bool(problem) if failed is None else failed
        print(f"  {'FAILED' if problem else 'ok':6s}  {name:28s} {seconds:6.1f} s", flush=True)
        if problem:
            print("\n".join("          " + line for line in problem.splitlines()), flush=True)


@contextmanager
def copy_of(root):
    "A copy of what clean and export work on, removed afterwards."
    with tempfile.TemporaryDirectory(prefix="bavq-gate-") as tmp:
        for part in PARTS:
            if (root / part).is_dir():
                shutil.copytree(
                    root / part, Path(tmp) / part, ignore=shutil.ignore_patterns("__pycache__", ".*")
                )
            elif (root / part).exists():
                shutil.copy(root / part, tmp)
        yield Path(tmp)


def contents(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob(pattern))}


def changes(command, pattern, root=ROOT):
    "What a command would change: the files of a copy that differ after it; and its complaint where it fails."
    with copy_of(root) as tmp:
        before = contents(tmp, pattern)
        done = subprocess.run([BIN / command], cwd=tmp, env=ENV, capture_output=True, text=True)
        after = contents(tmp, pattern)
    differ = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    complaint = (
        done.stderr.strip().splitlines()[-15:] if done.returncode or "Failed to" in done.stderr else []
    )
    return differ, "\n".join(complaint)


def no_op(command, pattern, remedy, root=ROOT):
    "The problem, if the command is not a no-op."
    differ, complaint = changes(command, pattern, root)
    return "\n".join(
        [f"{name} would change: {remedy}" for name in differ] + ([complaint] if complaint else [])
    )


def readme(root=ROOT):
    "The problem, if README.md is not what nbs/index.ipynb gives."
    if not (root / "nbs/index.ipynb").exists():
        return "nbs/index.ipynb is not there: README.md is generated from it"
    from readme import build, problems  # beside this file; needs the dev extra

    return "\n".join(problems(build(root), root))


def docs(root=ROOT):
    "The problems of the documentation site, built aside."
    with tempfile.TemporaryDirectory(prefix="bavq-site-") as tmp:
        done = subprocess.run(
            [sys.executable, root / "tools/docs.py", tmp], cwd=root, env=ENV, capture_output=True, text=True
        )
    return (
        "\n".join(done.stdout.strip().splitlines()[:40] + done.stderr.strip().splitlines()[-15:])
        if done.returncode
        else ""
    )


def notebooks(root=ROOT):
    return [
        p
        for p in sorted((root / "nbs").rglob("*.ipynb"))
        if not any(q[0] in "_." for q in p.relative_to(root).parts)
    ]


def stop(process):
    "End a notebook and everything it started."
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_notebook(path, timeout):
    "Seconds taken, and the problem."
    start = time.monotonic()
    p = subprocess.Popen(
        [BIN / "nbdev_test", "--path", path],
        cwd=ROOT,
        env=ENV,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    RUNNING.add(p)
    try:
        out, _ = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return (
            time.monotonic() - start,
            (
                f'stopped after {timeout} s: make the notebook faster, or give more time with ARGS="--timeout'
                ' 600"'
            ),
        )
    finally:
        stop(p)
        RUNNING.discard(p)
    tail = "\n".join(out.strip().splitlines()[-40:])
    again = f"run it again with {os.path.relpath(BIN, ROOT)}/nbdev_test --path {path.relative_to(ROOT)}"
    return time.monotonic() - start, f"{tail}\n{again}" if p.returncode else ""


def run_notebooks(report, workers, timeout):
    "Every notebook in a process of its own, `workers` at a time."
    paths, pool = notebooks(), ThreadPoolExecutor(workers)
    try:
        results = pool.map(lambda p: run_notebook(p, timeout), paths)
        for path, (seconds, problem) in zip(paths, results, strict=True):
            report.add(path.stem, seconds, problem)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for p in list(RUNNING):
            stop(p)


def run_pytest(report):
    "pytest over tests/, its own count added to the report."
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        xml = Path(tmp) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            f"--junitxml={xml}",
            "tests",
        ]
        done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        suites = list(ElementTree.parse(xml).getroot().iter("testsuite")) if xml.exists() else []
    n = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
    failed = n["failures"] + n["errors"]
    passed = n["tests"] - failed - n["skipped"]
    problem = (
        "\n".join(done.stdout.strip().splitlines()[-80:] + done.stderr.strip().splitlines()[-20:])
        if done.returncode
        else ""
    )
    report.add(
        f"pytest: {passed} of {passed + failed} passed",
        time.monotonic() - start,
        problem,
        passed,
        failed or int(done.returncode != 0),
    )


def run_browser(report):
    "The notebooks in JupyterLab, in a browser; their own count added to the report."
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "tools/browser.py", "--install"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    counts = re.findall(r"^(\d+) passed, (\d+) failed$", done.stdout, re.M)
    passed, failed = map(int, counts[-1]) if counts else (0, 0)
    tail = "\n".join(done.stdout.strip().splitlines()[-80:] + done.stderr.strip().splitlines()[-20:])
    wrong = done.returncode or not counts
    report.add(
        f"browser: {passed} of {passed + failed} passed",
        time.monotonic() - start,
        tail if wrong else "",
        passed,
        failed or int(bool(wrong)),
    )
    if not wrong:
        print("\n".join("          " + line for line in done.stdout.strip().splitlines()[:-1]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=int, default=300, help="seconds a notebook may take (default 300)")
    parser.add_argument("--workers", type=int, default=2, help="notebooks run at a time (default 2)")
    parser.add_argument(
        "--browser",
        action="store_true",
        help="also use the notebooks in JupyterLab and a browser, as CI does",
    )
    args, report = parser.parse_args(), Report()

    def check(name, problem, *a):
        start = time.monotonic()
        try:
            found = problem(*a)
        except Exception as e:
            found = f"{type(e).__name__}: {e}"
        report.add(name, time.monotonic() - start, found)

    print("What is stored, and what is made from it", flush=True)
    check("clean", no_op, "nbdev_clean", "nbs/**/*.ipynb", "run `make clean-notebooks`")
    check(
        "export",
        no_op,
        "nbdev_export",
        "bavq/**/*.py",
        "edit the notebook, not the module, and run `make export`",
    )
    check("readme", readme)
    check("docs", docs)
    print(f"The notebooks, {args.workers} at a time", flush=True)
    run_notebooks(report, args.workers, args.timeout)
    print("What no notebook can test", flush=True)
    run_pytest(report)
    if args.browser:
        run_browser(report)
    print(f"{report.passed} passed, {report.failed} failed", flush=True)
    return int(report.failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped")
