"""The gate finds what it is there to find, and the README is made as promised."""

import base64
import io
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import docs
import gate
import readme

PNG = base64.b64encode(b"a picture").decode()


@pytest.fixture
def project(tmp_path):
    "A project of one clean notebook and its module."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "bavq").mkdir()
    (tmp_path / "settings.ini").write_text(
        (ROOT / "settings.ini").read_text(encoding="utf-8"), encoding="utf-8"
    )
    cells = [
        new_markdown_cell("# Toy", id="a"),
        new_code_cell("#| default_exp toy", id="b"),
        new_code_cell("#| export\nx = 1", id="c"),
    ]
    write(tmp_path, "00_toy", cells)
    for command in "nbdev_clean", "nbdev_export":
        gate.subprocess.run([gate.BIN / command], cwd=tmp_path, env=gate.ENV, check=True)
    return tmp_path


def write(project, name, cells):
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), project / "nbs" / f"{name}.ipynb")


def test_clean_and_export_are_no_ops(project):
    before = gate.contents(project, "**/*.*")
    assert gate.changes("nbdev_clean", "nbs/**/*.ipynb", project) == ([], "")
    assert gate.changes("nbdev_export", "bavq/**/*.py", project) == ([], "")
    assert gate.contents(project, "**/*.*") == before


def test_an_edit_on_one_side_only_is_found(project):
    module, notebook = project / "bavq/toy.py", project / "nbs/00_toy.ipynb"
    module.write_text(module.read_text().replace("x = 1", "x = 2"))
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7'))
    before = gate.contents(project, "**/*.*")
    assert gate.changes("nbdev_clean", "nbs/**/*.ipynb", project)[0] == ["nbs/00_toy.ipynb"]
    assert gate.changes("nbdev_export", "bavq/**/*.py", project)[0] == ["bavq/toy.py"]
    assert gate.contents(project, "**/*.*") == before


def index(project):
    picture, table = (
        {"image/png": PNG, "text/plain": "<Figure>"},
        {"text/html": "<style scoped>b</style><table></table>", "text/plain": "t"},
    )
    links = (
        "[first](00_toy.ipynb#a) [web](https://x.org) `[no](link)`"
        " [page](../bavq/toy.py)\n\n```\n[no](link)\n```"
    )
    cells = [
        new_markdown_cell(f"# Toy\n\n{links}", id="a"),
        new_code_cell("#| hide\nhidden = 1", id="b"),
        new_code_cell(
            "#| echo: false\n#| fig-alt: two lines that meet\nplot()",
            id="c",
            outputs=[new_output("display_data", data=picture)],
        ),
        new_code_cell("table", id="d", outputs=[new_output("execute_result", data=table)]),
        new_code_cell(
            "#| output: false\nnoise()",
            id="e",
            outputs=[new_output("stream", name="stdout", text="noise made")],
        ),
    ]
    write(project, "index", cells)


def test_readme_is_what_the_index_shows(project):
    index(project)
    files = readme.build(project)
    text = files["README.md"].decode()
    assert files["nbs/images/readme-1.png"] == b"a picture"
    assert "![two lines that meet](nbs/images/readme-1.png)" in text
    for shown in "(nbs/00_toy.ipynb#a)", "(https://x.org)", "(bavq/toy.py)", "<table>", "```python\nnoise()":
        assert shown in text
    for hidden in "hidden", "plot()", "echo", "<style", "noise made", "<Figure", "nbs/link":
        assert hidden not in text
    assert readme.build(project) == files


def test_stale_readme_is_found(project, monkeypatch):
    assert "not there" in gate.readme(project)
    index(project)
    files = readme.build(project)
    (project / "nbs/images").mkdir()
    for name, content in files.items():
        (project / name).write_bytes(content)
    assert gate.readme(project) == ""
    (project / "nbs/images/readme-2.png").write_bytes(b"left over")
    (project / "bavq/toy.py").unlink()
    stale, dead = gate.readme(project).splitlines()
    assert stale == "nbs/images/readme-2.png is not what nbs/index.ipynb gives: run `make readme`"
    assert dead.startswith("dead link in nbs/index.ipynb: bavq/toy.py;")


def picture(shade):
    out = io.BytesIO()
    Image.new("RGB", (640, 300), (shade, 80, 80)).save(out, "PNG")
    return out.getvalue()


def test_small_pictures_follow_their_notebooks(project):
    index(project)

    def plot(shade):
        return new_output("display_data", data={"image/png": base64.b64encode(picture(shade)).decode()})

    write(
        project,
        "00_toy",
        [new_markdown_cell("# Toy", id="a"), new_code_cell("plot()", id="b", outputs=[plot(10)])],
    )
    files, (name, figure) = readme.build(project), *readme.first_figures(project).items()
    (project / "nbs/images").mkdir()
    for path, content in {**files, name: readme.thumbnail(figure)}.items():
        (project / path).write_bytes(content)
    assert name == "nbs/images/00_toy.png" and Image.open(project / name).size == (200, 112)
    assert gate.readme(project) == ""
    write(
        project,
        "00_toy",
        [new_markdown_cell("# Toy", id="a"), new_code_cell("plot()", id="b", outputs=[plot(90)])],
    )
    assert gate.readme(project) == f"{name} is not the first figure of its notebook: run `make readme`"


def test_broken_pages_are_found(tmp_path):
    (tmp_path / "api").mkdir()
    good = (
        '<h1 id="top">A</h1><a href="api/b.html#here">b</a><a href="https://x.org/no">web</a><img src="p.png"'
        ' alt="two lines that meet">'
    )
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "p.png").write_bytes(picture(0))
    (tmp_path / "api/b.html").write_text('<p id="here"><a href="../a.html#top">a</a></p>')
    assert list(docs.broken(tmp_path)) == []
    (tmp_path / "a.html").write_text(
        good + '<a href="c.html">c</a><a href="api/b.html#there">b</a><img src="q.png" alt="a curve"><img'
        ' src="p.png" alt="Figure">'
    )
    found = list(docs.broken(tmp_path))
    assert [f.split(": ")[0] for f in found] == ["a.html"] * 4
    for f, part in zip(
        found,
        [
            "c.html is not there",
            "api/b.html#there: the page has no",
            "q.png is not there",
            "p.png is not described",
        ],
    ):
        assert part in f


def test_names_become_links_but_not_everywhere():
    table = {"fit": "{py:obj}`fit <bavq.toy.fit>`"}
    text = docs.prose(
        "## The `fit`\n\nCall `fit`, [not `fit`](a.md), `fitted` and $$`fit`$$.\n\n```\n`fit`\n```\nSee"
        " [tests](../tests).",
        table,
        docs.settings(),
        docs.ROOT / "nbs",
    )
    assert text.count("{py:obj}") == 1 and "Call {py:obj}`fit" in text
    assert f"({docs.settings()['git_url']}/tree/main/tests)" in text
