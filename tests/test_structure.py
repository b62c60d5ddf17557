"""Rules about the whole project: the order of the modules, what importing costs, and the habits of the
notebooks.

Every test lists all that breaks its rule and says what to do."""

import ast
import importlib
import inspect
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = [*json.loads((ROOT / "nbs/parts.json").read_text(encoding="utf-8"))]  # in the order of the book
PATHS = {
    p.relative_to(ROOT / "nbs").with_suffix("").as_posix(): p
    for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if not any(q[0] in "_." for q in p.relative_to(ROOT).parts)
}
NOTEBOOKS = {n: json.loads(p.read_text(encoding="utf-8")) for n, p in PATHS.items()}
MODULES = {
    ".".join(p.relative_to(ROOT / "bavq").with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8"))
    for p in sorted((ROOT / "bavq").rglob("*.py"))
    if p.name[0] != "_"
}


def place(notebook):
    "Of a notebook in the book: the number of its part, its own number in it."
    part, _, stem = notebook.rpartition("/")
    return PARTS.index(part), int(stem[:2])


def module_name(notebook):
    """The module that a notebook's code belongs to: `2_quantizers/01_base` makes quantizers.base; the
    appendix has no folder."""
    part, _, stem = notebook.rpartition("/")
    return f"{part[2:]}.{stem[3:]}" if part[0].isdigit() else stem[3:]


PLACE = {module_name(n): place(n) for n in NOTEBOOKS if n != "index"}


def none(problems):
    "Fail with one line for each problem."
    if problems := list(problems):
        pytest.fail("\n".join(f"- {p}" for p in problems), pytrace=False)


def code_cells(only_exported=False):
    "(notebook, position, source, cell) of every code cell that is not empty."
    for name, nb in NOTEBOOKS.items():
        for i, c in enumerate(nb["cells"]):
            source = "".join(c["source"])
            if c["cell_type"] == "code" and source.strip() and (not only_exported or exported(source)):
                yield name, i, source, c


def directive(name, source):
    found = re.search(rf"^#\|\s*{name}\b:?[ \t]*(.*)$", source, re.M)
    return found and found[1].strip()


def exported(source):
    return directive("exporti?s?", source) is not None


def body(source):
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def statements(source):
    "The statements of a cell; none where it holds a magic or a shell command."
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imports(tree, module="part.module"):
    """(name, line) of everything imported anywhere in a module, also inside functions: `from a.b import c`
    gives a.b and a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["bavq", *module.split(".")]  # nbdev writes bavq.a.b as .b or ..a.b
            base = ".".join(
                here[: len(here) - node.level] * bool(node.level) + [node.module] * bool(node.module)
            )
            yield base, node.lineno
            yield from ((f"{base}.{a.name}", node.lineno) for a in node.names)


def imported(top):
    return [
        f"bavq/{m}.py line {line}"
        for m, tree in MODULES.items()
        for name, line in imports(tree, m)
        if name.split(".")[0] == top
    ]


# The modules


def test_one_notebook_one_module():
    exports = {n: [] for n in NOTEBOOKS}
    for n, _, source, _ in code_cells():
        if d := directive("default_exp", source):
            exports[n].append(d)
    wrong = [
        f"{n}: its code goes to {d}; write `#| default_exp {module_name(n)}`, once"
        for n, d in exports.items()
        if d and d != [module_name(n)]
    ]
    homeless = {n for n, *_ in code_cells(only_exported=True) if not exports[n]}
    wrong += [f"{n}: exports code but has no `#| default_exp {module_name(n)}`" for n in sorted(homeless)]
    made = {d for ds in exports.values() for d in ds}
    wrong += [
        f"bavq/{m}.py has no notebook: delete it, or bring its notebook back"
        for m in sorted(MODULES.keys() - made)
    ]
    wrong += [f"bavq/{m}.py is missing: run `make export`" for m in sorted(made - MODULES.keys())]
    places = list(PLACE.values())
    wrong += [
        f"two notebooks of {PARTS[p]} have the number {k:02d}: give one another"
        for p, k in sorted({k for k in places if places.count(k) > 1})
    ]
    names = [m.rpartition(".")[2] for m in PLACE]
    wrong += [
        f"two notebooks are called {n}: links go by name; give one another"
        for n in sorted({n for n in names if names.count(n) > 1})
    ]
    none(wrong)


def test_every_import_points_to_an_earlier_notebook():
    "Of an earlier part, or with a smaller number in the same part: so there can be no cycle."
    wrong = []
    for module, tree in MODULES.items():
        for name, line in imports(tree, module):  # also inside functions
            where = f"bavq/{module.replace('.', '/')}.py line {line} imports {name}"
            if name == "bavq":
                wrong.append(f"{where}: import from the module that defines it")
            elif name.endswith(".*"):
                wrong.append(f"{where}: name what you import")
            elif (
                (m := re.match(r"bavq\.(\w+\.\w+|\w+)", name))
                and m[1] in MODULES
                and not PLACE[m[1]] < PLACE[module]
            ):
                wrong.append(
                    f"{where}: only earlier notebooks may be imported; move the code, or register it from the"
                    " later notebook"
                )
    none(sorted(set(wrong)))


@pytest.mark.parametrize("tool", ["fastcore", "nbdev", "execnb", "IPython"])
def test_package_needs_no_authoring_tool(tool):
    none([f"{where} imports {tool}: use it in lesson cells only" for where in imported(tool)])


def test_only_plots_imports_matplotlib():
    none(
        [
            f"{w} imports matplotlib: use bavq.core.plots"
            for w in imported("matplotlib")
            if not w.startswith("bavq/core.plots.py")
        ]
    )


def test_import_bavq_is_light():
    heavy = (
        "pandas matplotlib seaborn sklearn skimage accelerate torchvision torchmetrics scipy sympy"
        " torch._dynamo torch.distributed.fsdp fastcore nbdev IPython".split()
    )
    code = f"import sys, json, bavq; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    none(
        [
            f"`import bavq` imports {m}: import it inside the function that uses it"
            for m in json.loads(done.stdout)
        ]
    )


def requirements():
    "The distributions of each set in settings.ini, where `bavq[extra]` stands for those of the extra."
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    texts = {k: v for k, v in ini["DEFAULT"].items() if k.endswith("requirements")}

    def spelled_out(text):
        for requirement in text.split():
            if own := re.match(r"bavq\[(.+)\]$", requirement):
                for extra in own[1].split(","):
                    yield from spelled_out(texts[f"{extra}_requirements"])
            else:
                yield canonical(re.match(r"[\w.-]+", requirement)[0])

    return {k.removesuffix("_requirements"): {*spelled_out(v)} for k, v in texts.items()}


def at_module_level(tree):
    return ast.Module([s for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom))], [])


def reach_of_import_bavq():
    "The modules that `import bavq` loads, as far as their imports say."
    start = ast.parse((ROOT / "bavq/__init__.py").read_text(encoding="utf-8"))
    reached, waiting = set(), [name for name, _ in imports(start)]
    while waiting:
        module = waiting.pop().removeprefix("bavq.")
        if module in MODULES and module not in reached:
            reached.add(module)
            waiting += [name for name, _ in imports(at_module_level(MODULES[module]), module)]
    return reached


def test_requirements_cover_every_import():
    "`import bavq` needs no more than `requirements`, the rest of the package an extra, the notebooks theirs."
    required = requirements()
    owners = packages_distributions()

    def foreign(tree, *sets):
        known = set().union(*(required[s] for s in sets))
        tops = {name.split(".")[0] for name, _ in imports(tree)} - set(sys.stdlib_module_names) - {"bavq"}
        return sorted(t for t in tops if not known & {canonical(d) for d in owners.get(t, [t])})

    extras = ["requirements", "all", "wandb", "ray", "notebooks"]
    wrong = {
        f"bavq/{m}.py imports {t}: add it to requirements or to an extra in settings.ini"
        for m, tree in MODULES.items()
        for t in foreign(tree, *extras)
    }
    wrong |= {
        f"bavq/{m}.py, which `import bavq` loads, imports {t}: import it where it is used, after `needs`"
        for m in reach_of_import_bavq()
        for t in foreign(at_module_level(MODULES[m]), "requirements")
    }
    for n, i, source, _ in code_cells():
        tree = ast.Module(statements(source), [])
        if not exported(source):
            wrong |= {
                f"{n} cell {i} imports {t}: add it to notebooks_requirements in settings.ini"
                for t in foreign(tree, "requirements", "notebooks")
                if t != "IPython"
            }
    none(sorted(wrong))


# The notebooks


def exported_trees():
    "(notebook, position, lines, tree) of every exported cell that is more than imports."
    for n, i, source, _ in code_cells(only_exported=True):
        tree = statements(source)
        if not all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in tree):
            yield n, i, len(body(source)), ast.Module(tree, [])


def count_statements(tree):
    "Statements at any depth; a docstring is none."
    return sum(
        isinstance(node, ast.stmt)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.walk(tree)
    )


def test_exported_cells_are_short():
    cells = list(exported_trees())
    counted = [(n, i, count_statements(tree)) for n, i, _, tree in cells]
    wrong = [f"{n} cell {i}: {k} exported statements; split it, 25 at most" for n, i, k in counted if k > 25]
    median = statistics.median(lines for _, _, lines, _ in cells)
    if median > 12:
        wrong.append(
            f"half of the exported cells have more than {median:g} lines; split the longest, 12 at most"
        )
    none(wrong)


def test_notebooks_export_little():
    total = dict.fromkeys(NOTEBOOKS, 0)
    for n, _, _, tree in exported_trees():
        total[n] += count_statements(tree)
    none(
        f"{n}: {k} exported statements; 400 at most, make two notebooks of one idea each"
        for n, k in total.items()
        if k > 400
    )


def test_exported_code_takes_one_step_at_a_time():
    wrong = []
    for n, i, _, tree in exported_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp) and any(
                isinstance(x, ast.IfExp) for x in (node.body, node.test, node.orelse)
            ):
                wrong.append(f"{n} cell {i}: `{ast.unparse(node)[:60]}` nests conditions; write if and else")
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Tuple)  # one name bound to a tuple is one step
                and isinstance(node.value, ast.Tuple)
                and len(node.value.elts) > 2
                and any(isinstance(x, ast.Call) for x in node.value.elts)
            ):
                wrong.append(f"{n} cell {i}: `{ast.unparse(node)[:60]}` does several things; a line for each")
    none(wrong)


def public():
    "(module, name, object) of everything that a module offers."
    for m in MODULES:
        module = importlib.import_module(f"bavq.{m}")
        for name in getattr(module, "__all__", ()):
            yield m, name, getattr(module, name)


def test_public_names_are_few():
    names = [(m, n) for m, n, _ in public()]
    by_module = Counter(m for m, _ in names).most_common(5)
    none(
        [
            f"{len(names)} public names; 250 at most, mark internal cells with `#| exporti`. Most: "
            + ", ".join(f"{m} {k}" for m, k in by_module)
        ]
        if len(names) > 250
        else []
    )


def own(method, cls):
    "A method that a class defines for its users, with no documented one above it."
    if method.__name__.startswith("_") and method.__name__ != "__init__":
        return False
    above = [getattr(base, method.__name__, None) for base in cls.__mro__[1:]]
    return method.__name__ == "__init__" or not any(f is not None and f.__doc__ for f in above)


def functions_of(name, thing):
    "(what it is called, function) of a public object: itself, or the methods of a class."
    if inspect.isfunction(thing):
        yield name, thing
    elif inspect.isclass(thing):
        for key, value in vars(thing).items():
            method = getattr(value, "__func__", value)
            written = inspect.isfunction(method) and "<string>" not in method.__code__.co_filename
            if written and own(method, thing):
                yield f"{name}.{key}", method


def test_public_code_is_documented_and_annotated():
    wrong = []
    for m, name, thing in public():
        if not callable(thing) or getattr(thing, "__module__", "") != f"bavq.{m}":
            continue
        if not inspect.getdoc(thing):
            wrong.append(f"bavq.{m}.{name}: no docstring; say in one line what it is")
        for called, f in functions_of(name, thing):
            bare = [
                p.name
                for p in inspect.signature(f).parameters.values()
                if p.annotation is p.empty and p.name != "self" and p.name != "cls"
            ]
            if bare:
                wrong.append(f"bavq.{m}.{called}: {', '.join(bare)} without a type; annotate")
    none(wrong)


def test_types():
    "mypy, with the settings of pyproject.toml."
    done = subprocess.run([sys.executable, "-m", "mypy", "bavq"], cwd=ROOT, capture_output=True, text=True)
    none(line for line in (done.stdout + done.stderr).splitlines() if ": error:" in line)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]


def test_imports_stand_alone():
    wrong = []
    for n, i, source, _ in code_cells():
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements(source)}
        if kinds == {True, False} and "nbdev_export" not in source:
            wrong.append(f"{n} cell {i}: imports and other code; make two cells")
    none(wrong)


def test_notebooks_are_executed():
    """As far as it can be seen without running: a last line that is a value has an output, and a notebook
    that runs anything shows something."""
    shows = (
        ast.Name,
        ast.Attribute,
        ast.Subscript,
        ast.BinOp,
        ast.Compare,
        ast.Tuple,
        ast.List,
        ast.Dict,
        ast.Constant,
        ast.JoinedStr,
        ast.ListComp,
    )
    wrong, alive = [], set()
    for n, i, source, cell in code_cells():
        if cell["outputs"]:
            alive.add(n)
        if (
            exported(source)
            or (directive("eval", source) or "").lower() == "false"
            or source.rstrip().endswith(";")
        ):
            continue
        last = (statements(source) or [None])[-1]
        if (
            isinstance(last, ast.Expr)
            and isinstance(last.value, shows)
            and not cell["outputs"]
            and ast.unparse(last) != "None"
        ):
            wrong.append(f"{n} cell {i}: `{ast.unparse(last)[:60]}` shows nothing; run `make execute NB={n}`")
    wrong += [
        f"{n}: no cell has an output; run `make execute NB={n}`"
        for n in sorted({c[0] for c in code_cells()} - alive)
    ]
    none(wrong)


def test_figures_are_described():
    "For those who cannot see them: the site and the README show the description in the figure's place."
    wrong = []
    for n, i, source, cell in code_cells():
        if not any(kind.startswith("image/") for out in cell["outputs"] for kind in out.get("data", {})):
            continue
        says = (directive("fig-alt", source) or "").strip("\"'")
        if not says:
            wrong.append(
                f"{n} cell {i}: a figure without a description; say what it shows in a line `#| fig-alt: …`"
            )
        elif len(says) < 30:
            wrong.append(
                f"{n} cell {i}: `{says}` describes little; say what is drawn and what there is to see"
            )
    none(wrong)


def test_readme_shows_every_notebook():
    """As far as it is not the gate's part, which compares bytes: a new title or idea reaches the map only by
    running the index."""
    text, wrong = (ROOT / "README.md").read_text(encoding="utf-8"), []
    for n, nb in NOTEBOOKS.items():
        head = "".join(nb["cells"][0]["source"])
        if not (found := re.search(r"^# (.+)\n+> (.+)", head)):
            wrong.append(f"{n}: begin with `# Title`, an empty line, and `> its one idea`")
        elif n != "index" and not (f"(nbs/{n}.ipynb)" in text and found[2] in text):
            wrong.append(
                f"{n} is not in README.md under this title and idea: run `make execute NB=index`, then `make"
                " readme`"
            )
    none(wrong)


def test_ruff_finds_nothing():
    "Rules in pyproject.toml, over notebooks, tools and tests."
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "--output-format", "concise"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    none(
        f"{line}; `.venv/bin/ruff check` says more"
        for line in (done.stdout + done.stderr).splitlines()
        if ":" in line
    )


def test_outputs_are_fit_to_store():
    wrong = [
        f"{n}: widget state is stored; run `make execute NB={n}`"
        for n, nb in NOTEBOOKS.items()
        if "widgets" in nb["metadata"]
    ]
    for n, i, _, cell in code_cells():
        for out in cell["outputs"]:
            if out["output_type"] == "error":
                wrong.append(
                    f"{n} cell {i}: a stored {out['ename']}; mend the cell, show an error with test_fail"
                )
            if any("widget-view" in kind for kind in out.get("data", {})):
                wrong.append(f"{n} cell {i}: a stored widget; show a figure, or pass progress=False")
    none(wrong)


def stored_kb(nb):
    "Kilobytes of all outputs of a notebook, as they are stored."
    outputs = [c["outputs"] for c in nb["cells"] if c["cell_type"] == "code"]
    return len(json.dumps(outputs, ensure_ascii=False, indent=1).encode()) / 1024


def test_notebooks_are_small():
    size = {n: p.stat().st_size / 1024 for n, p in PATHS.items()}
    wrong = [
        f"{n}: {kb:.0f} KB; fewer or smaller figures, 150 KB at most" for n, kb in size.items() if kb > 150
    ]
    outputs = sum(map(stored_kb, NOTEBOOKS.values()))
    none(wrong + [f"all stored outputs: {outputs:.0f} KB, 3072 KB at most"] * (outputs > 3072))


def test_no_paths_of_one_machine():
    path = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|Users|var/folders)/[\w.-]+")
    wrong = []
    for n, nb in NOTEBOOKS.items():
        for i, c in enumerate(nb["cells"]):
            texts = ["".join(c["source"])]
            for out in c.get("outputs", []):
                texts += ["".join(out.get("text", ""))] + [
                    "".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/")
                ]
            wrong += [
                f"{n} cell {i}: {m[0]}; show a relative path or a file's name"
                for t in texts
                for m in path.finditer(t)
            ]
    none(wrong)


# What is in git


def tracked():
    "The files that are in git or would be with `git add .`; none outside a repository."
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return sorted(p for name in set(done.stdout.split("\0")) if name and (p := ROOT / name).is_file())


STUDY_KB = 4096  # of a study's records: 1.4 KB a run, 3.6 MB for the 2,640 runs of the largest


def test_no_checkpoints_in_git():
    model = {".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".onnx"}
    none(
        [
            f"{p.relative_to(ROOT)}: keep weights out of git, in experiments/"
            for p in tracked()
            if p.suffix in model
        ]
        + [
            f"{p.relative_to(ROOT)}: {p.stat().st_size / 2**20:.1f} MB; nothing in git over 1 MB"
            for p in tracked()
            if p.stat().st_size > 2**20 and p.suffix != ".jsonl"
        ]
    )


def test_results_are_small_json():
    wrong = []
    for p in tracked():
        name, kb = p.relative_to(ROOT), p.stat().st_size / 1024
        if name.parts[0] != "results" or p.name == "README.md":
            continue
        if p.suffix not in (".json", ".jsonl"):
            wrong.append(f"{name}: results/ holds .json and .jsonl files only")
        elif kb > (STUDY_KB if p.suffix == ".jsonl" else 100):
            wrong.append(f"{name}: {kb:.0f} KB; too large, thin out the curve")
        else:
            text = p.read_text(encoding="utf-8")
            try:
                found = [json.loads(line) for line in (text.splitlines() if p.suffix == ".jsonl" else [text])]
            except ValueError as e:
                wrong.append(f"{name}: not JSON ({e}); record the run again")
                continue
            names = [record["run"] for record in found] if p.suffix == ".jsonl" else []
            if names != sorted(set(names)):
                wrong.append(f"{name}: one line a run, in the order of their names; record a run again")
    none(wrong)
