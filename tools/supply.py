#!/usr/bin/env python3
"""Record what bavq was tried with: run it by the interpreter of an environment that holds the oldest
supported versions.

python tools/supply.py --audit audit.json --out results/safety/supply.json     (audit.json: pip-audit -f
json)"""

import argparse
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bavq.core.storage import write_json  # noqa: E402

TESTS = "tests/test_hostile.py", "tests/test_faults.py", "tests/test_contract.py"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--audit", default="", help="what pip-audit wrote, as JSON")
parser.add_argument("--out", required=True)
o = parser.parse_args()
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(ROOT / "settings.ini", encoding="utf-8")
sets = ("requirements", "train_requirements", "eval_requirements", "plots_requirements")
bounds = " ".join(ini["DEFAULT"][s] for s in sets).split()
names = list(dict.fromkeys(re.match(r"[\w.-]+", bound)[0] for bound in bounds))
done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
)
packages = json.loads(Path(o.audit).read_text())["dependencies"] if o.audit else []
write_json(
    o.out,
    dict(
        python=sys.version.split()[0],
        oldest={n: version(n) for n in names},
        tests=list(TESTS),
        outcome=(
            done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr[-200:]
        ),
        audit=dict(
            packages=len(packages),
            answered=sum("vulns" in p for p in packages),
            vulnerabilities=sum(len(p.get("vulns", ())) for p in packages),
        ),
    ),
)
print(Path(o.out).read_text(), done.stdout[-1500:])
