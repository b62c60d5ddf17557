"""Make a virtual environment and install bavq into it: python3 tools/install.py .venv [extra]

Runs under the system's Python with nothing installed. pip's report is cut down to the large downloads."""

import re
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit(
        "bavq needs Python 3.10 or newer, this is %d.%d: name another one, as in  make PYTHON=python3.12"
        % sys.version_info[:2]
    )

LARGE = re.compile(r"\s*(?:Downloading|Using cached) (\S+?)(?:-py\d|-cp\d)\S* \(([\d.]+ [MG]B)\)")
UNPACK = re.compile(r"Installing collected packages: (.*)")


def has_pip(python):
    return (
        python.exists()
        and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    )


def make_venv(folder):
    "A virtual environment with pip, also where the system's Python comes without ensurepip."
    python = folder / "bin" / "python"
    if has_pip(python):
        return python
    print(f"Making a virtual environment in {folder}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True)
    if not has_pip(python):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], capture_output=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "pip"],
            capture_output=True,
        )
    if not has_pip(python):
        sys.exit(
            f"{made.stdout}{made.stderr}\nNo virtual environment could be made: install Python's venv module"
        )
    return python


def install(python, what):
    "pip install, one line for each large file."
    start, log = time.monotonic(), []
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--editable",
        what,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout:
            log.append(line)
            large, unpack = LARGE.match(line), UNPACK.match(line)
            note = (
                f"{large[1]}, {large[2]}"
                if large and (float(large[2].split()[0]) >= 20 or "GB" in large[2])
                else ""
            )
            if unpack:
                note = f"unpacking {len(unpack[1].split(', '))} packages"
            if note:
                print(f"{time.monotonic() - start:5.0f} s  {note}", flush=True)
    if pip.returncode:
        sys.exit(
            "".join(log[-25:])
            + f"\npip could not install {what}: see above; the same command continues where it stopped"
        )
    print(f"{time.monotonic() - start:5.0f} s  installed", flush=True)


if __name__ == "__main__":
    folder, extra = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    python = make_venv(folder)
    what = f".[{extra}]" if extra else "."
    first = not list(folder.glob("lib/*/site-packages/torch"))
    print(
        f"Installing bavq{what[1:]} into {folder}" + "; this downloads about 2.6 GB, mostly PyTorch" * first,
        flush=True,
    )
    install(python, what)
