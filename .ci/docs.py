"""Builds the site into _docs: by Quarto where it is installed, elsewhere by smalldocs, which reads the same
project files.

Nothing is executed. A notebook's page holds its prose, its outputs as they were saved and, for each
exported function, class or constant, a heading, the signature with its comments and the source behind a
fold. Under its title stand the ways out: its source, the notebook to keep, Colab, Binder. Pages without a
notebook are written here: the book, the index of all symbols, the gallery, how to draw the figures.
"""

import ast
import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import browser
import yaml
from matplotlib import get_data_path
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from PIL import Image, ImageDraw, ImageFont

from stars.show.gallery import message, place_name

ROOT = Path(__file__).resolve().parent.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
NOISE = re.compile(r"Warning\b|\d+%\||\bit/s\b")  # of libraries: warnings, bars of progress
THUMB = 560  # pixels of a thumbnail's longer side, for screens of two pixels per point
TRY = "try.ipynb"  # the notebook that also runs in the reader's browser
HEADLINE = "fig_controls"  # the figure of the first page
NEXT = (
    ("gallery.html", "See every figure"),
    ("tutorials/quickstart.html", "Run it: quickstart"),
    ("explain/argument.html", "Read the argument"),
    ("book.html", "Open the book"),
)
LIVE = ("tutorials/try.html", "Try it in your browser")  # goes before them where something runs there
BEST = ("cpu", "cpu+published")  # where a figure's picture comes from, first choice first


@dataclass
class Symbol:
    "Something that a chapter exports"

    module: str
    page: str  # of its chapter
    name: str
    stub: str  # its source without what it does
    about: str  # one line
    kind: str  # function, class or constant

    @property
    def id(self):
        return f"stars.{self.module}.{self.name}"


def source(cell):
    return "".join(cell["source"])


def directives(text):
    return {m[1] for m in re.finditer(r"^#\|\s*(\w+)(?=\s|$)", text, re.M)}


def markdown(text):
    return dict(cell_type="markdown", metadata={}, source=text)


# ---- symbols


def first_line(text):
    return text.strip().split("\n")[0].strip()


def header(lines, node):
    "A def or class up to its body, decorators included"
    start, body = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.body[0]
    rest = lines[start : body.lineno - 1] + [lines[body.lineno - 1].encode()[: body.col_offset].decode()]
    return "\n".join(rest).rstrip()


def trailing(lines, node):
    "The comment behind a statement"
    after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
    return after[1:].strip() if after.startswith("#") else ""


def class_stub(lines, node):
    "Header, fields, and methods with what they say about themselves"
    out = [header(lines, node)]
    for n in node.body:
        if isinstance(n, ast.AnnAssign):
            out += lines[n.lineno - 1 : n.end_lineno]
        elif isinstance(n, ast.FunctionDef) and (
            not n.name.startswith("_") or n.name in ("__init__", "__call__")
        ):
            doc = ast.get_docstring(n)
            out += [header(lines, n)] + ([f'{" " * (n.col_offset + 4)}"{first_line(doc)}"'] if doc else [])
    return "\n".join(out)


def names_of(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [
        n.id
        for t in targets
        for n in (t.elts if isinstance(t, ast.Tuple) else [t])
        if isinstance(n, ast.Name)
    ]


def full_name(node):
    "A name as it is called; a method that `@patch` adds, behind its class"
    decorators = [ast.unparse(d).partition("(")[0] for d in node.decorator_list]
    return f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if "patch" in decorators else node.name


def symbols(module, page, text):
    "What an exported cell defines, in order"
    lines = text.split("\n")
    for n in ast.parse(text).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_"):
            stub, kind = (
                (class_stub(lines, n), "class")
                if isinstance(n, ast.ClassDef)
                else (header(lines, n), "function")
            )
            yield Symbol(
                module,
                page,
                full_name(n),
                stub,
                first_line(ast.get_docstring(n) or trailing(lines, n) or trailing(lines, n.body[-1])),
                kind,
            )
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            body = lines[n.lineno - 1 : n.end_lineno]
            stub = "\n".join(body if len(body) < 16 else body[:12] + ["    …"])
            for name in names_of(n):
                if not name.startswith("_"):
                    yield Symbol(module, page, name, stub, trailing(lines, n), "constant")


def subtitle(nb):
    return next(m[1] for c in nb["cells"] for m in [re.search(r"^#\s.*\n+>\s*(.+)", source(c))] if m)


def heading(nb):
    return re.search(r"^#\s+(.+)", "\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown"))[
        1
    ]


def module_of(nb):
    found = [
        m[1]
        for c in nb["cells"]
        if c["cell_type"] == "code"
        for m in [re.search(r"^#\|\s*default_exp\s+([\w.]+)", source(c), re.M)]
        if m
    ]
    return found[0] if found else None


def exported(nb, page):
    "All symbols of a chapter"
    found = [
        s
        for c in nb["cells"]
        if c["cell_type"] == "code" and "export" in directives(source(c))
        for s in symbols(module_of(nb), page, source(c))
    ]
    return list({s.id: s for s in reversed(found)}.values())[
        ::-1
    ]  # the first of those that are made in several statements


# ---- pages


def reference(module, text, before):
    "Cells in place of an exported one: its symbols, less those before it, then its source behind a fold"
    code, found, out, shown = (
        re.sub(r"^#\|.*\n", "", text, flags=re.M),
        [s for s in {s.id: s for s in symbols(module, "", text)}.values() if s.id not in before],
        [],
        set(),
    )
    before |= {s.id for s in found}
    only_constants = all(isinstance(n, (ast.Assign, ast.AnnAssign)) for n in ast.parse(text).body)
    for s in found:
        anchor = f"### {s.name} {{#{s.id}}}" if s.kind != "constant" else f'<span id="{s.id}"></span>'
        block = f"\n\n```python\n{s.stub}\n```" if s.stub not in shown and not only_constants else ""
        out.append(anchor + block + (f"\n\n*{s.about}*" if s.about and s.kind != "constant" else ""))
        shown.add(s.stub)
    imports = not found and code.startswith(("import ", "from "))
    summary = "Imports" if imports else "Source"
    fold = "" if only_constants else f"#| code-fold: true\n#| code-summary: {summary}\n"
    return [markdown(o) for o in out] + [
        dict(cell_type="code", metadata={}, execution_count=None, outputs=[], source=fold + code)
    ]


def linked(text, module, known):
    """Symbols in backticks become links; a bare name counts in its own chapter, and elsewhere if it cannot
    be a mere word"""

    def link(m):
        name = m[1]
        found = [s for s in known if name in (s.name, s.id, f"{s.module}.{s.name}")]
        here = [s for s in known if s.module == module and (s in found or name == s.name.partition(".")[2])]
        far = [
            s
            for s in found
            if s.kind != "constant" and ("." in name or m[2] or "_" in name or name != name.lower())
        ]
        s = here[0] if here else far[0] if len(far) == 1 else None
        return f"[{m[0]}](/{s.page}.ipynb#{s.id})" if s else m[0]

    parts = re.split(r"(^```.*?^```|\[[^\]]*\]\([^)]*\)|^#.*$)", text, flags=re.M | re.S)
    return "".join(
        p if i % 2 else re.sub(r"`([A-Za-z_][\w.]*)(\(\))?`", link, p) for i, p in enumerate(parts)
    )


def enlargeable(text):
    return re.sub(
        r"^!\[(.*?)\]\((\S*figures/\S+)\.png\)", r"[![\1](\2.png)](\2.svg)", text, flags=re.M
    )  # a picture on a phone: touch it for the large one


def lacks_the_package(nb):
    "Does a notebook run code, and no cell installs the package where it is absent, as in Colab?"
    code = [source(c) for c in nb["cells"] if c["cell_type"] == "code"]
    return bool(code) and not any('find_spec("stars")' in text for text in code)


def doors(path, nb=None):
    """Where else a file of the repository can be seen, kept or run, as a line of links; `nb`: what it holds,
    if it is a notebook"""
    cfg = get_config()
    repo, name = f"{cfg.user}/{cfg.repo}", path.name
    links = [(f"{cfg.git_url}/blob/{cfg.branch}/{path}", "Source", "")]
    if path.suffix == ".ipynb":
        inside = path.relative_to(cfg.nbs_path.name)
        up = "../" * (len(inside.parts) - 1)
        links += [
            (f"{up}notebooks/{inside}", "Download notebook", f' download="{name}"'),
            (
                f"https://colab.research.google.com/github/{repo}/blob/{cfg.branch}/{path}",
                "Open in Colab",
                "",
            ),
            (f"https://mybinder.org/v2/gh/{repo}/{cfg.branch}?labpath={path}", "Open in Binder", ""),
        ]
    ways = [f'<a href="{u}"{how}>{what}</a>' for u, what, how in links]
    if nb and lacks_the_package(nb):
        ways.append(f"<span>(in Colab, first run <code>%pip install git+{cfg.git_url}</code>)</span>")
    return '<p class="doors">' + "\n".join(ways) + "</p>"


def titled(cells, ways, title=None, picture=None):
    "Title and subtitle as front matter, the ways out, and the rest"
    m = re.match(r"#\s+(.+?)\s*(?:\n+>\s*(.+?)\s*)?(\n.*)?$", source(cells[0]), re.S)
    if not m:
        raise ValueError(
            f"a notebook must open with `# title` and `> subtitle`, not with {source(cells[0])[:60]!r}"
        )
    front = dict(title=title or m[1], subtitle=m[2] or "", description=m[2] or "")
    if picture:
        front["image"] = picture
    front = yaml.safe_dump(front, allow_unicode=True, width=10_000)
    return [
        dict(cell_type="raw", metadata={}, source=f"---\n{front}---"),
        markdown(ways),
        *([markdown(m[3])] if (m[3] or "").strip() else []),
        *cells[1:],
    ]


def at_rest(output):
    "What an output shows where no widget runs: its HTML, if it brings one; nothing, if it is noise"
    if output.get("name") == "stderr" and NOISE.search("".join(output["text"])):
        return None
    data = output.get("data", {})
    if WIDGET not in data:
        return output
    return output | dict(data={"text/html": data["text/html"]}) if "text/html" in data else None


def page(nb, known, ways, title=None, picture=None):
    "A notebook as it is shown"
    module, cells, before = module_of(nb), [], set()
    for c in nb["cells"]:
        text = source(c)
        d = directives(text) if c["cell_type"] == "code" else set()
        if d & {"hide", "default_exp"} or not text.strip():
            continue
        if "export" in d:
            cells += reference(module, text, before)
        elif c["cell_type"] == "markdown":
            cells.append(c | dict(source=linked(enlargeable(text), module, known)))
        else:
            cells.append(
                c
                | dict(
                    source=re.sub(r"^#\|\s*\w+\s*\n", "", text, flags=re.M),
                    outputs=[o for o in map(at_rest, c["outputs"]) if o],
                )
            )
    return nb | dict(cells=titled(cells, ways, title, picture))


# ---- figures


def pictures(name):
    "Where a figure has been drawn: place → manifest"
    return {
        p.parent.name: json.loads(p.with_suffix(".json").read_text())
        for p in sorted((ROOT / "figures").glob(f"*/{name}.png"))
    }


def defaults(nb):
    cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(source(cell)).body}


def commands(name, params):
    "How to draw a figure, from the parameters of its notebook"
    lines = [
        (f"stars figure {name}", f"preset {params['preset']}; builds missing runs"),
        (f"stars figure {name} --preset smoke", "tiny: a few minutes"),
    ]
    if "source" in params:
        lines.append((f"stars figure {name} -p source=published", "the published results"))
    if len(params.get("seeds", ())) == 1:
        lines.append((f"stars figure {name} -p 'seeds=[0,1,2]'", "intervals over seeds"))
    wide = max(len(c) for c, _ in lines)
    return "\n".join(["```sh", *(f"{c:{wide}}  # {about}" for c, about in lines), "```"])


def in_one_line(name, manifest):
    "What a picture says: its titles, one per panel"
    return ". ".join(message(manifest) or [name])


def caption(manifest):
    "What to see; then the particulars of the runs, smaller"
    first, *more = manifest.get("caption", "").splitlines() or [""]
    return first, " ".join(more)


def drawn(name, place, manifest, folder=""):
    """A picture of the repository with what belongs to it; `folder`: where the pictures are, seen from the
    page"""
    path = f"{folder}{place}/{name}"
    links = [
        f"[{ext.upper()}]({path}.{ext})"
        for ext in ("svg", "csv", "json")
        if (ROOT / f"figures/{place}/{name}.{ext}").is_file() and not (ext == "csv" and "published" in place)
    ]
    if (ROOT / f"figures/{place}/{name}.ipynb").is_file():
        links.append(f'<a href="{path}.ipynb" download>Notebook with results</a>')
    see, more = caption(manifest)
    return (
        f"[![{in_one_line(name, manifest)}]({path}.png)]({path}.svg)\n\n::: {{.caption}}\n{see}\n\n"
        f"{more} {' · '.join(links)}\n:::\n"
    )


def as_drawn(nb, name):
    """A figure's notebook as it was executed for the picture of the repository, if it was; cells that have
    changed since come without results"""
    made = ROOT / "figures" / defaults(nb)["preset"] / f"{name}.ipynb" if "preset" in defaults(nb) else ROOT
    if not made.is_file():
        return nb
    done = json.loads(made.read_text(encoding="utf-8"))["cells"]
    results = {source(c): c["outputs"] for c in done if c["cell_type"] == "code"}
    given = [
        x
        for c in done
        if "injected-parameters" in c["metadata"].get("tags", [])
        for x in (
            markdown("What follows was run with"),
            c | dict(source=source(c).removeprefix("# Parameters\n")),
        )
    ]
    cells = []
    for c in nb["cells"]:
        cells.append(c | dict(outputs=results.get(source(c), [])) if c["cell_type"] == "code" else c)
        if "parameters" in c["metadata"].get("tags", []):
            cells += given
    return nb | dict(cells=cells)


def has_picture(output):
    return "image/png" in output.get("data", {})


def best_of(places):
    "The place whose picture stands for a figure"
    return next((p for p in (*BEST, *places) if p in places), None)


def said(nb):
    "What a figure's notebook says of its picture in words: the printed texts below *In words*"
    words, out = False, []
    for c in nb["cells"]:
        if c["cell_type"] == "markdown":
            words = source(c).startswith("## In words") or (words and not source(c).startswith("#"))
        elif words:
            out += ["".join(o["text"]) for o in c["outputs"] if o.get("name") == "stdout"]
    return "\n".join(out).strip()


def opening(nb, name, place, manifest):
    "The message of a figure, its picture, what it says"
    text = [f"**{in_one_line(name, manifest)}.**", drawn(name, place, manifest)]
    if words := said(nb):
        text.append("\n".join(f"- {line}" for line in words.splitlines() if line.strip()))
    return markdown("\n\n".join(text))


def without_picture(cell):
    "A cell that drew the picture which the page begins with"
    if cell["cell_type"] != "code" or not any(map(has_picture, cell["outputs"])):
        return [cell]
    left = [o for o in cell["outputs"] if not has_picture(o)]
    return [cell | dict(outputs=left), markdown("*This draws the picture that the page begins with.*")]


def figure(nb, name):
    """A figure's notebook as a page: the picture and what it says, the question, pictures from elsewhere, how
    to draw it, the code"""
    at = next(i for i, c in enumerate(nb["cells"]) if "parameters" in c["metadata"].get("tags", []))
    title, *about, code = [*nb["cells"][:at], nb["cells"][at:]]
    about = [
        c for c in about if "committed" not in c["metadata"].get("tags", [])
    ]  # the picture, for code hosts
    params, places = defaults(nb), pictures(name)
    how = markdown(
        f"## How to draw it\n\n{commands(name, params)}\n\nThe notebook below does the work. These are its "
        f"parameters; `-p` sets each of them, `--set` any field of the preset."
    )
    best = best_of(places)
    if best is None:
        return nb | dict(cells=[title, *about, how, *code])
    if best == params.get("preset"):
        code = [part for c in code for part in without_picture(c)]
    first, rest = opening(nb, name, best, places.pop(best)), []
    if places:
        others = (f"### {place_name(p)}\n\n{drawn(name, p, m)}" for p, m in places.items())
        rest = [markdown("\n".join(["## Drawn from elsewhere\n", *others]))]
    asked = [c for c in about if c["cell_type"] == "markdown"]
    heading = [markdown("## What is asked")] if asked else []
    return nb | dict(cells=[title, first, *heading, *about, *rest, how, *code])


def headline(name, places):
    "Place and message of a figure's picture"
    best = best_of(places)
    return best, in_one_line(name, places[best]) if best else ""


def thumbnail(proc, name, place):
    "A small copy of a picture, and its width and height"
    to = proc / "thumbnails" / f"{name}.png"
    to.parent.mkdir(exist_ok=True)
    with Image.open(ROOT / "figures" / place / f"{name}.png") as im:
        im = im.convert("RGB")
        im.thumbnail((THUMB, THUMB))
        im.quantize(128).save(to, optimize=True)
        return im.size


def write_gallery(proc, figures):
    "gallery.qmd: a small picture of every figure and what it says"
    cards = []
    for name, (title, _) in figures.items():
        place, says = headline(name, pictures(name))
        if not place:
            continue
        w, h = thumbnail(proc, name, place)
        cards.append(
            f'<a class="card" href="figures/{name}.html"><img src="thumbnails/{name}.png" width="{w}" '
            f'height="{h}" loading="lazy" alt="{html.escape(title)}"><b>{html.escape(title)}</b>'
            f"<small>{html.escape(says)}</small></a>"
        )
    text = [
        '---\ntitle: Gallery\nsubtitle: "Every figure and what it says."\ntoc: false\n---\n',
        doors(Path(".ci/docs.py")) + "\n",
        '<div class="gallery">',
        *cards,
        "</div>\n",
        "The larger pictures, with commands, are under [How to draw them](reproduce.qmd); all of them with "
        "their numbers and manifests on [one plain page](figures/index.html).\n",
    ]
    (proc / "gallery.qmd").write_text("\n".join(text), encoding="utf-8")


def write_figures(proc, figures):
    "reproduce.qmd: all figures, the question that each asks, the newest picture of it"
    out = [
        '---\ntitle: How to draw them\nsubtitle: "Every figure: what it asks, how to draw it, what came '
        'out."\n---\n',
        doors(Path(".ci/docs.py")) + "\n",
        "```sh\nmake reproduce                    # the headline figures from nothing: ten minutes on "
        "two cores\nstars reproduce --preset smoke    # every figure, tiny: a few minutes\n"
        "stars reproduce                   # every figure of the preset cpu: an evening on two cores\n```\n",
        "A figure is a notebook with parameters, run by papermill; what it needs and does not find in "
        "`runs/` is built first.\n",
    ]
    for name, (title, nb) in figures.items():
        out.append(f"## {title} {{#{name}}}\n\n{subtitle(nb)} [{name}](figures/{name}.ipynb)\n")
        place, _ = headline(name, places := pictures(name))
        if place:
            out.append(drawn(name, place, places[place], "figures/"))
    (proc / "reproduce.qmd").write_text("\n".join(out), encoding="utf-8")


def write_book(proc, about):
    "book.qmd: the parts and chapters in order, a line each"
    bar = yaml.safe_load((proc / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    parts = next(p["contents"] for p in bar if p.get("section") == "Book")
    out = [
        '---\ntitle: Book\nsubtitle: "Every part and chapter, in the order in which they build on each '
        'other."\ntoc-depth: 2\n---\n',
        doors(Path(".ci/docs.py")) + "\n",
        "A chapter is a notebook, and exports a module of the same name. It uses only chapters before it.\n",
    ]
    for n, part in enumerate((p for p in parts if "section" in p), 1):
        out.append(f"## {n}. {part['section']}\n")
        for path in part["contents"]:
            if path not in about:
                continue
            title, line = about[path]
            out.append(f"{number(path)}. [{title}]({final_name(Path(path))}): {line}")
        out.append("")
    out.append("Every function, class and constant, one line each: [all symbols](api.qmd).\n")
    (proc / "book.qmd").write_text("\n".join(out), encoding="utf-8")


def write_symbols(proc, chapters):
    "api.qmd: every exported symbol, what it is, and where"
    n = sum(len(s) for _, s in chapters.values())
    out = [
        '---\ntitle: API\nsubtitle: "Every exported symbol, one line each."\n'
        "toc-depth: 2\nsearch: false\n---\n",
        f"{n} functions, classes and constants in {len(chapters)} modules. A module is a chapter: the "
        f"links lead to signature, comments, source and the checks below it.\n",
    ]
    out.insert(1, doors(Path(".ci/docs.py")) + "\n")
    for module, (about, found) in chapters.items():
        rows = [
            f"| [`{s.name}`]({s.page}.ipynb#{s.id}) | {(s.about or s.kind).replace('|', chr(92) + '|')} |"
            for s in found
        ]
        out.append(
            "\n".join(
                [
                    f"## stars.{module} {{#{module}}}\n",
                    f"[{about}]({found[0].page}.ipynb)\n",
                    "::: {.symbols}",
                    "| name | |",
                    "|:--|:--|",
                    *rows,
                    ":::\n",
                ]
            )
        )
    (proc / "api.qmd").write_text("\n".join(out), encoding="utf-8")


# ---- the first page, and what other sites show of it


def front(nb, places):
    "The first page opens with the question, where to go next and what was found; the rest is the README's"
    place, says = headline(HEADLINE, places)
    if not place:
        return nb
    title, intro, *rest = nb["cells"]
    question, _, more = source(intro).partition("\n\n")
    buttons = (LIVE, *NEXT) if browser.ready() else NEXT
    ways = "\n".join(f'<a href="{u}">{what}</a>' for u, what in buttons)
    hero = [
        f'<div class="hero">\n<div>\n\n{question}\n\n</div>',
        f'<a href="figures/{HEADLINE}.html"><img src="figures/{place}/{HEADLINE}.png" '
        f'alt="{html.escape(says)}"></a>',
        f'<p class="next">{ways}</p>\n</div>',
    ]
    return nb | dict(cells=[title, markdown("\n".join(hero)), markdown(more), *rest])


def card(to, title, line):
    "What a chat or a feed shows of a link: name, question and picture on 1200 × 630 pixels"
    place = best_of(pictures(HEADLINE))
    image = Image.new("RGB", (1200, 630), "white")
    if place:
        with Image.open(ROOT / "figures" / place / f"{HEADLINE}.png") as im:
            im = im.convert("RGB")
            im.thumbnail((660, 590))
            image.paste(im, (1180 - im.width, (630 - im.height) // 2))
    draw, folder = ImageDraw.Draw(image), Path(get_data_path()) / "fonts" / "ttf"
    large, small = (
        ImageFont.truetype(folder / f"DejaVuSans{kind}.ttf", size) for kind, size in (("-Bold", 76), ("", 33))
    )
    draw.text((50, 60), title, "#117733", large)
    draw.multiline_text((50, 180), textwrap.fill(line, 24), "#222222", small, spacing=14)
    image.save(to, optimize=True)


# The fields of nbs/try.js
DEMO = """<div id="demo" data-pyodide="../lite/static/pyodide/">
<form class="puzzle">
<label>numbers <input name="numbers" value="3 4 10" size="12" autocomplete="off"></label>
<label>target <input name="target" value="34" size="4" autocomplete="off"></label>
<label class="wide">your answer <input name="answer" placeholder="10 + 4 * 3" autocomplete="off"></label>
<button class="btn btn-primary">Check it</button>
<button class="btn btn-outline-primary" type="button" name="another">Another puzzle</button>
<button class="btn btn-outline-primary" type="button" name="solve">Show an answer</button>
<output class="verdict" aria-live="polite"></output>
</form>
<form class="trace">
<label class="wide">a trace: what somebody wrote on the way to the answer
<textarea name="trace" rows="4">10 + 4 = 14, 14 * 3 = 42. That is too high. \
Let me try something else: 10 * 3 = 30, 30 + 4 = 34. That matches the target.</textarea></label>
<button class="btn btn-primary">Find its habits</button>
<div class="marked" aria-live="polite"></div>
</form>
<p class="status" aria-live="polite">\
Python starts in this page when you click into a field. Nothing that you type leaves it.</p>
</div>
<script type="module" src="../try.js"></script>

<p class="next"><a href="../lite/notebooks/index.html?path=try.ipynb">\
Open what follows as a notebook in your browser</a></p>"""


def from_outside(nb, folder):
    "A notebook whose links to others lead to their pages, for where it is without the others"
    home = get_config().doc_host + get_config().doc_baseurl

    def address(m):
        path = Path(posixpath.normpath(f"{folder}/{m[1]}"))
        return f"]({home}/{final_name(path).with_suffix('.html')}{m[2] or ''})"

    link = r"\]\((?!\w+:)([^()\s#]+\.ipynb)(#[^()\s]*)?\)"
    cells = [c | dict(source=re.sub(link, address, source(c))) for c in nb["cells"]]
    return nb | dict(cells=cells)


def live(nb):
    "The page to try things on: fields that answer, before the notebook that does the same with code"
    title, about, *rest = nb["cells"]
    return nb | dict(cells=[title, markdown(DEMO), about, *rest])


# ---- navigation and names


def menu(root):
    "Names of pages in the sidebar: path → text"
    found = {}

    def read(items):
        for i in items:
            if isinstance(i, dict) and "contents" in i:
                read(i["contents"])
            elif isinstance(i, dict):
                found[i["href"]] = i["text"]

    read(yaml.safe_load((root / "sidebar.yml").read_text())["website"]["sidebar"]["contents"])
    return found


def existing(item, root):
    "The part of a navigation entry whose pages exist; `*` is written out"
    if isinstance(item, list):
        return [o for i in item for o in existing(i, root)]
    if isinstance(item, str):
        return [str(p.relative_to(root)) for p in sorted(root.glob(item))]
    if "contents" not in item:
        return [item] if (root / item["href"]).is_file() else []
    contents = existing(item["contents"], root)
    return [item | {"contents": contents}] if contents else []


def trim_navigation(root):
    "Leave out of navbar and sidebar what is not there to link to"
    for name, bar, key in (("_quarto.yml", "navbar", "left"), ("sidebar.yml", "sidebar", "contents")):
        cfg = yaml.safe_load((root / name).read_text())
        part = cfg["website"][bar]
        part[key] = existing(part[key], root)
        (root / name).write_text(yaml.safe_dump(cfg, sort_keys=False))


def number(path):
    "Of a chapter, by which the book is ordered; 0 for other pages"
    return int(m[0]) if (m := re.match(r"\d+", Path(path).name)) else 0


def final_name(path):
    return path.with_name(re.sub(r"^\d\d[a-z]?_", "", path.name))


def final_names(root):
    """Give pages their names on the site, 00_countdown.ipynb -> countdown.ipynb, and point links and
    pictures there"""
    pages = [*root.rglob("*.ipynb")]
    for p in [*pages, *root.glob("*.yml")]:
        link = (
            r'\]\((?:[^()\s"]*/)?' if p.suffix == ".ipynb" else r"\b"
        )  # elsewhere a name is that of a file in the repository
        text = re.sub(rf"({link})\d\d[a-z]?_(\w+\.ipynb)", r"\1\2", p.read_text(encoding="utf-8"))
        p.write_text(
            text.replace("../figures/", "figures/")
            if p.parent == root
            else text.replace("../../figures/", "../figures/"),
            encoding="utf-8",
        )
    for p in pages:
        p.rename(final_name(p))


# ---- the build


def kept_back(folder, names):
    """Files of `figures` that are no part of the project to render: executed notebooks, which are copied
    afterwards, the page for code hosts, and published rows, which are not ours to publish"""
    return [
        n
        for n in names
        if n.endswith((".ipynb", ".md")) or (n.endswith(".csv") and "published" in Path(folder).name)
    ]


def plain_page(path):
    "The page of all figures, with the site's icon, its source and the way back"
    text = path.read_text(encoding="utf-8")
    ways = doors(Path("figures/index.html")).replace("</p>", '\n<a href="../gallery.html">Gallery</a></p>')
    for mark, more in (("</head>", '<link rel="icon" href="../favicon.svg">\n'), ("</header>", ways + "\n")):
        text = text.replace(mark, more + mark, 1)
    path.write_text(text, encoding="utf-8")


def prepare(proc):
    "The project that Quarto or smalldocs renders; returns the subtitle of each page"
    nbs = get_config().nbs_path
    notebooks = {
        p: json.loads(p.read_text(encoding="utf-8"))
        for p in sorted(nbs.rglob("*.ipynb"))
        if not any(part[0] in "._" for part in p.relative_to(nbs).parts)
    }
    chapters = {
        module_of(nb): (subtitle(nb), exported(nb, str(final_name(p).relative_to(nbs).with_suffix(""))))
        for p, nb in sorted(notebooks.items(), key=lambda x: number(x[0]))
        if module_of(nb)
    }
    known = [s for _, found in chapters.values() for s in found]
    for p in [*nbs.glob("*.yml"), *nbs.glob("*.css"), *nbs.glob("*.svg"), *nbs.glob("*.js")]:
        shutil.copy2(p, proc)
    names = menu(proc)
    for p, nb in notebooks.items():
        inside, picture = p.relative_to(nbs), None
        if p.parent.name == "figures":
            nb = figure(as_drawn(nb, p.stem), p.stem)
            picture = f"/figures/{place}/{p.stem}.png" if (place := best_of(pictures(p.stem))) else None
        elif p.name == TRY and browser.ready():
            nb = live(nb)
        elif p.name == "index.ipynb":
            card(proc / "card.png", heading(nb), subtitle(nb))
            nb = front(nb, pictures(HEADLINE))
        shown = page(nb, known, doors(p.relative_to(ROOT), nb), names.get(str(inside)), picture)
        (proc / inside).parent.mkdir(parents=True, exist_ok=True)
        (proc / inside).write_text(json.dumps(shown, ensure_ascii=False), encoding="utf-8")
    shutil.copytree(ROOT / "figures", proc / "figures", dirs_exist_ok=True, ignore=kept_back)
    plain_page(proc / "figures" / "index.html")
    by_path = {str(p.relative_to(nbs)): nb for p, nb in notebooks.items()}
    figures = {Path(p).stem: (text, by_path[p]) for p, text in names.items() if p in by_path}
    write_gallery(proc, figures)
    write_figures(proc, figures)
    write_book(proc, {p: (heading(nb), subtitle(nb)) for p, nb in by_path.items()})
    write_symbols(proc, chapters)
    trim_navigation(proc)
    final_names(proc)
    return {
        str(final_name(p).relative_to(nbs).with_suffix(".html")): subtitle(nb) for p, nb in notebooks.items()
    }


def dark_theme(site):
    "In the dark, the light theme with its own dark colours: both modes differ in nothing else"
    light, dark = site / "site_libs/themes/cosmo.min.css", site / "site_libs/themes/darkly.min.css"
    dark.write_text(
        light.read_text(encoding="utf-8").replace("[data-bs-theme=dark]", ":root"), encoding="utf-8"
    )


def polish(site, subtitles):
    """What smalldocs has no setting for: no fonts from another host, a search that does not take
    *verification* for *verifier*, and one that knows subtitles"""
    dark_theme(site)
    for path, what, instead in (
        ("*.css", r'@import\s*url\(["\']?https?:[^)]*\);?', ""),
        ("smalldocs*.js", r"threshold: 0\.3\b", "threshold: 0.1"),
    ):
        for p in site.rglob(path):
            p.write_text(re.sub(what, instead, p.read_text(encoding="utf-8")), encoding="utf-8")
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for e in index:
        if about := subtitles.get(e["href"]):
            e["title"] += f": {about}"
    (site / "search.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")


def main(out):
    refresh_quarto_yml()
    quarto = shutil.which("quarto")
    with tempfile.TemporaryDirectory() as proc:
        subtitles = prepare(proc := Path(proc))
        if quarto:  # which otherwise is light until somebody turns the switch; smalldocs knows no such option
            cfg = yaml.safe_load((proc / "_quarto.yml").read_text())
            cfg["format"]["html"]["respect-user-color-scheme"] = True
            (proc / "_quarto.yml").write_text(yaml.safe_dump(cfg, sort_keys=False))
        subprocess.run(
            [quarto, "render"]
            if quarto
            else [Path(sys.executable).parent / "smalldocs", "render", "--strict"],
            cwd=proc,
            check=True,
        )
        for p in (ROOT / "figures").glob("*/*.ipynb"):
            if "published" not in p.parent.name:
                shutil.copy2(p, proc / get_config().doc_path.name / "figures" / p.parent.name)
        for p in get_config().nbs_path.rglob("*.ipynb"):
            keep = proc / get_config().doc_path.name / "notebooks" / p.relative_to(get_config().nbs_path)
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(p, keep)
        if browser.ready():
            nb = json.loads((get_config().nbs_path / "tutorials" / TRY).read_text(encoding="utf-8"))
            lite = proc / get_config().doc_path.name / "lite"
            browser.build(lite, {TRY: from_outside(nb, "tutorials")})
        else:
            print("without the part that runs in the browser: `make docs` fetches it where there is npm")
        if not quarto:
            polish(proc / get_config().doc_path.name, subtitles)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(proc / get_config().doc_path.name, out)
    print(f"{out.name}/index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else get_config().doc_path)
