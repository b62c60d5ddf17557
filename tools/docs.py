"""Build the documentation site: python tools/docs.py [_docs]

The notebooks are its chapters, in their order and as they are stored: nothing is run, and the code of the
package stands where it is explained. Signatures, docstrings and the comments beside arguments give the
reference. Links, anchors and pictures of the built pages are checked; links to other sites are not."""

import importlib
import inspect
import io
import json
import re
import shutil
import sys
import time
from configparser import ConfigParser
from dataclasses import is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
SITE, WORK = ROOT / "_docs", ROOT / "build/docs"
CODE = re.compile(
    r"(^```.*?^```[^\n]*$|\$\$.*?\$\$|^#+ [^\n]*|\[[^\]\n]*\]\([^)\n]*\)|``[^`\n]+``)", re.M | re.S
)  # where no link is put
NAMED, LINK = re.compile(r"`(\w[\w.]*)`"), re.compile(r"(\]\(|(?:src|href)=\")([^)\s\"]+)")


def settings():
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def notebooks():
    "Page of the site → notebook, `2_quantizers/01_base` → its file, in the order of the book."
    paths = [
        p
        for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if not any(q[0] in "_." for q in p.relative_to(ROOT).parts)
    ]
    return {p.relative_to(ROOT / "nbs").with_suffix("").as_posix(): p for p in paths}


def module_of(nb):
    "The module that a notebook makes, `quantizers.base`; nothing where it exports none."
    found = re.search(
        r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in nb.cells if c.cell_type == "code"), re.M
    )
    return found and found[1]


def title(nb):
    return re.search(r"^# (.+)$", nb.cells[0].source, re.M)[1]


def summary(nb):
    return (re.search(r"^> (.+)$", nb.cells[0].source, re.M) or ["", ""])[1]


# The reference


def public(module):
    "(name, object) of what a module defines for others to use, in the order of its notebook."
    for name in module.__all__:
        thing = getattr(module, name)
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__:
            yield name, thing


def signature(thing):
    "Names and defaults; types stand in the table of arguments."
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return "()"
    plain = [
        p.replace(annotation=p.empty, default=Default(p.default) if p.default is not p.empty else p.empty)
        for p in found.parameters.values()
        if p.name != "self"
    ]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


class Default:
    "A default value, shown in a word where it is long or an address in memory."

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        text = (
            self.value.__name__
            if callable(self.value) and hasattr(self.value, "__name__")
            else repr(self.value)
        )
        return "..." if len(text) > 40 or "<" in text else text


def table(thing):
    "What is written beside each argument, in the words of fastcore's docments."
    from fastcore.docments import DocmentTbl

    try:
        text = str(DocmentTbl(thing))
    except Exception:
        return ""
    return re.sub(r"^\| (?=[^-* ])([^|]+?) \|", r"| `\1` |", text, flags=re.M)


def entry(kind, name, thing, home=""):
    "One object as a directive of Sphinx's Python domain; the methods of a class inside it."
    doc = inspect.getdoc(thing) or ""
    if is_dataclass(thing) and doc.startswith(f"{thing.__name__}("):
        doc = ""  # written by dataclasses themselves
    parts = [doc, table(thing), home]
    if inspect.isclass(thing):
        for called, method in vars(thing).items():
            plain = getattr(method, "__func__", method)
            if inspect.isfunction(plain) and called[0] != "_" and (inspect.getdoc(plain) or table(plain)):
                parts.append(entry("method", called, plain))
    fence = "`" * (4 if inspect.isclass(thing) else 3)
    return (
        f"{fence}{{py:{kind}}} {name}{signature(thing)}\n\n"
        + "\n\n".join(p for p in parts if p)
        + f"\n{fence}\n"
    )


def reference(chapters, places):
    "Page → text: one page for each module, and a list of them."
    pages, rows = {}, []
    for stem, nb in chapters.items():
        if not (made := module_of(nb)):
            continue
        name = f"bavq.{made}"
        entries = []
        for n, thing in public(importlib.import_module(name)):
            place = label(name, n)
            home = f"{{ref}}`Its place in the chapter {title(nb)} <{place}>`" if place in places else ""
            entries.append(entry("class" if inspect.isclass(thing) else "function", n, thing, home))
        if not entries:
            continue
        says = summary(nb)[:1].upper() + summary(nb)[1:]
        intro = (
            f"# {name}\n\n{says}. Explained, pictured and tested in"
            f" [{title(nb)}](../{stem}.ipynb).\n\n```{{py:module}} {name}\n```\n\n"
        )
        pages[f"api/{made}.md"] = intro + "\n".join(entries)
        rows.append(f"| [{name}]({made}.md) | {summary(nb)} |")
    toc = "```{toctree}\n:hidden:\n\n" + "\n".join(Path(p).name.removesuffix(".md") for p in pages) + "\n```"
    head = (
        "# Reference\n\nEvery public class and function of the package, module by module; each links to the"
        " place where it is built.\n"
    )
    pages["api/index.md"] = "\n".join([head, "| module | what it holds |", "|---|---|", *rows, "", toc, ""])
    return pages


def label(module, name):
    return f"{module}.{name}-{'class' if name[0].isupper() else 'def'}".lower()


# The chapters


def links(chapters):
    "What a word in backticks links to, where it is the name of one public object or of one chapter."
    found = {}
    for stem, nb in chapters.items():
        found[Path(stem).name] = f"[{title(nb)}](/{stem}.ipynb)"
        if not (made := module_of(nb)):
            continue
        module = importlib.import_module(f"bavq.{made}")
        for name, _ in public(module):
            link = f"{{py:obj}}`{name} <{module.__name__}.{name}>`"
            found[name] = None if name in found else link
            found[f"{made.split('.')[-1]}.{name}"] = found[f"bavq.{made}.{name}"] = link
    return {k: v for k, v in found.items() if v}


def prose(text, table, cfg, home):
    "Markdown in which names are links, and links out of nbs/ lead to the repository."

    def named(part):
        seen = set()

        def one(m):
            if m[1] in seen or m[1] not in table:
                return m[0]
            seen.add(m[1])
            return table[m[1]]

        return NAMED.sub(one, part)

    def outward(m):
        if ".ipynb#" in m[2]:
            return m[1] + m[2].lower()  # Jupyter keeps the capitals of a heading, MyST does not
        if re.match(r"[a-z][a-z+.-]*:|#|/", m[2], re.I):
            return m[0]
        target = (home / m[2]).resolve()
        if not target.is_relative_to(ROOT) or target.is_relative_to(ROOT / "nbs"):
            return m[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{m[1]}{cfg['git_url']}/{kind}/{cfg['branch']}/{target.relative_to(ROOT).as_posix()}"

    text = re.sub(r"^%", "&#37;", text, flags=re.M)  # to MyST a line that begins with % is a comment
    parts = CODE.split(text)
    return "".join(
        LINK.sub(outward, p) if i % 2 else LINK.sub(outward, named(p)) for i, p in enumerate(parts)
    )


def is_imports(source):
    lines = [line for line in source.splitlines() if line.strip()]
    return len(lines) > 2 and all(re.match(r"(from|import)\s|[\s)#]", line) for line in lines)


def chapter(path, table, cfg):
    """A notebook as the site shows it: what is marked hidden left out, imports folded, exported code marked,
    pictures described."""
    from execnb.nbio import nb2str
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, hide_, hide_line, populate_language
    from readme import obey

    exported = {
        c["id"]
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code" and re.search(r"^#\|\s*exporti?s?\b", "".join(c["source"]), re.M)
    }
    raw = nb2str(
        NBProcessor(path, procs=[populate_language, hide_line, clean_magics, hide_, obey], process=True).nb
    )
    nb, cells = nbformat.reads(raw, as_version=4), []
    module, home = f"bavq.{module_of(nb)}", path.parent
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = prose(cell.source, table, cfg, home)
        if cell.cell_type == "code":
            told = [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
            cell.outputs = [o for o in cell.outputs if "text/markdown" not in o.get("data", {})]
            if not (cell.source.strip() or cell.outputs or told):
                continue
            meta = cell.metadata
            tags = ["remove-input"] if "hide-input" in meta.pop("tags", []) else []
            alt = meta.pop("alt", "")
            if is_imports(cell.source) and not cell.outputs:
                tags.append("hide-input")
            elif cell.id in exported:
                tags.append("exported")
                defined = re.findall(r"^(?:class |def |)([A-Za-z]\w*)(?=[(:]| =)", cell.source, re.M)
                targets = [
                    f"({label(module, n)})=" for n in defined if n in table or f"{module}.{n}" in table
                ]
                if targets:
                    cells.append(new_markdown_cell("\n".join(targets), id=f"at-{cell.id}"))
            cell.metadata = {"tags": tags} | ({"mystnb": {"image": {"alt": alt}}} if alt else {})
            if cell.outputs or "remove-input" not in tags:
                cells.append(cell)
            cells += [
                new_markdown_cell(prose(t, table, cfg, home), id=f"told-{i}-{cell.id}")
                for i, t in enumerate(told)
            ]
        else:
            cells.append(cell)
    nb.cells = cells
    nb.metadata = {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return nb


def contents(chapters):
    "The site's table of contents, for the end of its first page."
    parts = json.loads((ROOT / "nbs/parts.json").read_text(encoding="utf-8"))

    def tree(caption, pages):
        return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"

    book = [
        tree(
            name, [f"{title(nb)} <{stem}>" for stem, nb in chapters.items() if stem.startswith(f"{folder}/")]
        )
        for folder, (name, _) in parts.items()
    ]
    return "\n\n".join([*book, tree("The package", ["api/index"])])


def write_source(folder, cfg):
    "Everything Sphinx reads, written into a folder of its own."
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "api").mkdir(parents=True)
    stored = {stem: nbformat.read(p, as_version=4) for stem, p in notebooks().items()}
    chapters = {k: v for k, v in stored.items() if k != "index"}
    table, places = links(chapters), set()
    for stem in stored:
        nb = chapter(ROOT / f"nbs/{stem}.ipynb", table, cfg)
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        places |= {m for c in nb.cells for m in re.findall(r"^\((\S+)\)=$", c.source, re.M)}
        if stem == "index":
            nb.cells.append(new_markdown_cell(contents(chapters), id="contents"))
        nbformat.write(nb, folder / f"{stem}.ipynb")
    for name, text in reference(chapters, places).items():
        (folder / name).write_text(text, encoding="utf-8")
    if (ROOT / "nbs/images").exists():
        shutil.copytree(ROOT / "nbs/images", folder / "images")
    (folder / "_static").mkdir()
    shutil.copy(Path(__file__).with_name("docs.css"), folder / "_static")


# Sphinx


def config(cfg):
    return dict(
        project=cfg["title"],
        author=cfg["author"],
        copyright=cfg["copyright"],
        version=cfg["version"],
        release=cfg["version"],
        extensions=["myst_nb", "sphinx.ext.linkcode", "docs"],
        root_doc="index",
        exclude_patterns=["_build"],
        language="en",
        html_theme="furo",
        html_title=cfg["title"],
        html_static_path=["_static"],
        html_css_files=["docs.css"],
        html_copy_source=False,
        html_show_sourcelink=False,
        html_math_renderer="mathml",
        html_baseurl=f"{cfg['doc_host']}{cfg['doc_baseurl']}/",
        html_theme_options={"top_of_page_buttons": [], "navigation_with_keys": True},
        pygments_style="xcode",
        add_module_names=False,
        python_maximum_signature_line_length=72,
        toc_object_entries_show_parents="hide",
        linkcode_resolve=source_of,
        suppress_warnings=["config.cache"],
        nb_execution_mode="off",
        nb_merge_streams=True,
        nb_code_prompt_show="imports",
        nb_code_prompt_hide="imports",
        myst_enable_extensions=["dollarmath", "amsmath"],
        myst_heading_anchors=3,
        myst_dmath_double_inline=True,
    )


def source_of(domain, info):
    "The address of an object's lines in the repository."
    cfg, thing = settings(), sys.modules.get(info["module"])
    for part in info["fullname"].split("."):
        thing = getattr(thing, part, None)
    try:
        lines, start = inspect.getsourcelines(inspect.unwrap(thing))
    except (TypeError, OSError):
        return None
    name = Path(inspect.getsourcefile(inspect.unwrap(thing))).relative_to(ROOT).as_posix()
    return f"{cfg['git_url']}/blob/{cfg['branch']}/{name}#L{start}-L{start + len(lines) - 1}"


def setup(app):
    "Sphinx calls this: formulas become MathML, which browsers draw and screen readers read without a script."
    from docutils import nodes
    from latex2mathml.converter import convert

    def formula(block):
        def visit(self, node):
            mathml = convert(
                node.astext().replace(r"\arg", r"\operatorname{arg}"), "block" if block else "inline"
            )
            self.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
            raise nodes.SkipNode

        return visit

    app.add_html_math_renderer("mathml", (formula(False), None), (formula(True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def run_sphinx(source, out, cfg):
    "The lines of warning that Sphinx had."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    said = io.StringIO()
    with patch_docutils(None), docutils_namespace():
        Sphinx(source, None, out, WORK / "doctrees", "html", config(cfg), status=None, warning=said).build()
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in said.getvalue().splitlines() if line.strip()]


# The built pages


class Page(HTMLParser):
    "The places of a page, what it links to, and its pictures."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.pictures = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        has = dict(attrs)
        if "id" in has:
            self.ids.add(has["id"])
        self.links += [has[k] for k in ("href", "src") if has.get(k)]
        if tag == "img":
            self.pictures.append((has.get("src", ""), (has.get("alt") or "").strip()))


def broken(site):
    """One line for each link, anchor or picture that leads nowhere, and for each picture that is not
    described."""
    pages = {p.resolve(): Page(p) for p in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                yield f"{name}: {link} is not there"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                yield f"{name}: {link}: the page has no such place"
        for source, alt in page.pictures:
            if not alt or alt == "Figure" or alt.endswith((".png", ".svg")):
                yield f"{name}: {source} is not described; give its cell a line `#| fig-alt: …`"


def build(out=SITE):
    "Build the site; the problems found."
    cfg, source, html = settings(), WORK / "source", WORK / "html"
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    for folder in (html, WORK / "doctrees", out):
        shutil.rmtree(folder, ignore_errors=True)
    write_source(source, cfg)
    warnings = run_sphinx(source, html, cfg)
    shutil.copytree(html, out)
    return [w.replace(f"{source}/", "") for w in warnings] + list(broken(out))


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else SITE
    start, problems = time.monotonic(), build(out)
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    for problem in problems:
        print(problem)
    print(
        f"{len(list(out.rglob('*.html')))} pages in {time.monotonic() - start:.0f} s: open {shown}/index.html"
    )
    return f"{len(problems)} problems, listed above" if problems else 0


if __name__ == "__main__":
    sys.exit(main())
