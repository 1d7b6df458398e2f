"""The documentation site in a real browser: every page opens without an error, every link and fragment
leads somewhere, search finds, a phone shows it, and Python runs in it (two minutes)"""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import websocket
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nbdev.config import get_config
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

LOOK = """(async () => {
    const pictures = [...document.images];
    for (const i of pictures) i.loading = 'eager';
    await Promise.all(pictures.map(i => i.decode().catch(() => 0)));
    return {
        links: [...document.links].map(a => a.href),
        ids: [...document.querySelectorAll('[id]')].map(e => e.id),
        pictures: pictures.length,
        blank: pictures.filter(i => !i.naturalWidth).map(i => i.src.slice(0, 200)),
        title: document.title,
        text: document.body.innerText,
        card: document.querySelector('meta[property="og:image"]')?.content,
    }
})()"""
WIDE = """(() => {
    const width = document.documentElement.clientWidth, page = document.documentElement.scrollWidth;
    const scrolls = e => {
        for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return true;
        return false;
    };
    const seen = e => {
        const r = e.getBoundingClientRect();
        const visible = r.width && r.height && getComputedStyle(e).visibility === 'visible';
        return visible && r.right > width + 1 && r.left < width;
    };
    const all = [...document.querySelectorAll('body *')];
    const lost = all.filter(e => seen(e) && !scrolls(e)); // past the edge, and no way to scroll there
    // what a clipped box hides and no one can scroll to
    const clips = e => ['hidden', 'clip'].includes(getComputedStyle(e).overflowX) && e.clientWidth;
    lost.push(...document.querySelectorAll('main *').values().filter(
        e => clips(e) && e.scrollWidth > e.clientWidth + 1));
    const over = lost.slice(0, 3).map(e => e.outerHTML.slice(0, 120));
    return over.concat(page > width ? [`the page is ${page} px wide`] : [])
})()"""


class Browser:
    "A headless Chromium, spoken to in its DevTools protocol"

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--no-first-run",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no other host is there
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port, deadline = Path(folder) / "DevToolsActivePort", time.time() + 600
        while not (port.exists() and len(port.read_text().split()) == 2):
            if self.process.poll() is not None or time.time() > deadline:
                raise RuntimeError(f"{CHROMIUM} does not start")
            time.sleep(0.05)
        self.n, self.events, self.session = 0, [], None
        self.socket = websocket.create_connection(
            "ws://127.0.0.1:{}{}".format(*port.read_text().split()), suppress_origin=True, timeout=600
        )
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def _next(self):
        message = json.loads(self.socket.recv())
        if message.get("method") == "Page.javascriptDialogOpening":  # "leave this page?"
            self._send(id=0, method="Page.handleJavaScriptDialog", params=dict(accept=True))
        if "method" in message:
            self.events.append(message)
        return message

    def _send(self, **message):
        self.socket.send(json.dumps(message | (dict(sessionId=self.session) if self.session else {})))

    def __call__(self, method, **params):
        self.n += 1
        self._send(id=self.n, method=method, params=params)
        while (message := self._next()).get("id") != self.n:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def js(self, code):
        result = self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def dark(self, is_dark):
        features = [dict(name="prefers-color-scheme", value="dark" if is_dark else "light")]
        self("Emulation.setEmulatedMedia", features=features)

    def click(self, selector):
        "As a finger does it: where the middle of an element is"
        at = f"""(() => {{
            const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const r = e.getBoundingClientRect();
            return [r.left + r.width / 2, r.top + r.height / 2];
        }})()"""
        x, y = self.js(at)
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, code, modifiers=0, text=None):
        key = dict(key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)
        self("Input.dispatchKeyEvent", type="keyDown", **key, **(dict(text=text) if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **key)

    def until(self, code, seconds=300):
        "Wait until an expression is true, and return it"
        deadline = time.time() + seconds
        while time.time() < deadline:
            try:
                if value := self.js(code):
                    return value
            except RuntimeError as e:  # between two pages there is nothing to ask
                if "navigated" not in str(e) and "context" not in str(e):
                    raise
            time.sleep(0.05)
        raise TimeoutError(f"{code} does not become true")

    def width(self, pixels):
        self(
            "Emulation.setDeviceMetricsOverride",
            width=pixels,
            height=800,
            deviceScaleFactor=1,
            mobile=pixels < 600,
        )

    def open(self, url):
        self.events.clear()
        self("Page.navigate", url=url)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._next()

    def faults(self, host):
        "What went wrong since the page was opened, and what was asked of other hosts"
        out = []
        for e in self.events:
            p = e["params"]
            match e["method"]:
                case "Runtime.exceptionThrown":
                    out.append(
                        p["exceptionDetails"]
                        .get("exception", {})
                        .get("description", p["exceptionDetails"]["text"])
                    )
                case "Runtime.consoleAPICalled" if p["type"] in ("error", "assert"):
                    out.append(
                        "console: " + " ".join(str(a.get("value", a.get("description"))) for a in p["args"])
                    )
                case "Log.entryAdded" if p["entry"]["level"] == "error":
                    out.append(f"log: {p['entry']['text']} {p['entry'].get('url', '')}")
                case "Network.loadingFailed" if not p.get("canceled"):
                    out.append(f"request failed: {p['errorText']}")
                case "Network.responseReceived" if p["response"]["status"] >= 400:
                    out.append(f"{p['response']['status']}: {p['response']['url']}")
                case "Network.requestWillBeSent" if urlparse(u := p["request"]["url"]).scheme.startswith(
                    "http"
                ) and not u.startswith(host):
                    out.append(f"asks another host: {u}")
        return out

    def visit(self, url, host):
        "A page at the width of a desk and of a phone"
        self.width(1280)
        self.open(url)
        seen = self.js(LOOK)
        self.width(360)
        return seen | dict(wide=self.js(WIDE), faults=self.faults(host))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def served(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    b = Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built site: below a path, as on Pages"
    out = tmp_path_factory.mktemp("web") / "stars"
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "docs.py", out], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def home(site):
    server, url = served(site.parent)
    yield url + "stars/"
    server.shutdown()


@pytest.fixture(scope="module")
def pages(site, home, browser):
    "Everything seen on every page, by its path on the site"
    return {
        str(p.relative_to(site)): browser.visit(home + str(p.relative_to(site)), home)
        for p in sorted(site.rglob("*.html"))
        if p.relative_to(site).parts[0] != "lite"  # JupyterLite's own pages
    }


def dead_links(pages, site, home):
    "Links of the site to where there is nothing"
    out = []
    for name, page in pages.items():
        for url in set(page["links"]):
            path, fragment = urldefrag(url)
            if not path.startswith(home):
                continue
            file = site / unquote(urlparse(path[len(home) :]).path)
            if file.is_dir():
                file = file / "index.html"
            there = str(file.relative_to(site)) if file.is_file() else None
            if there is None:
                out.append(f"{name} → {path[len(home) :]}")
            elif fragment and there in pages and not {fragment, unquote(fragment)} & set(pages[there]["ids"]):
                out.append(f"{name} → {there}#{unquote(fragment)}")
    return out


def of_all(pages, key):
    return {name: page[key] for name, page in pages.items() if page[key]}


def test_pages_open_without_errors_and_ask_no_other_host(pages):
    assert len(pages) > 55
    assert not of_all(pages, "faults")


def test_links_and_fragments_lead_somewhere(pages, site, home):
    assert sum(len(p["links"]) for p in pages.values()) > 2000
    assert not dead_links(pages, site, home)


def test_ids_are_unique(pages):
    assert not {
        name: twice for name, p in pages.items() if (twice := {i for i in p["ids"] if p["ids"].count(i) > 1})
    }


def test_pictures_load(pages):
    assert sum(p["pictures"] for p in pages.values()) > 30 and pages["index.html"]["pictures"] >= 1
    assert not of_all(pages, "blank")


def test_a_phone_scrolls_no_page_sideways(pages):
    assert not of_all(pages, "wide")


def test_every_page_is_in_the_navigation(pages, home):
    linked = {urldefrag(u)[0][len(home) :] for u in pages["index.html"]["links"]}
    assert set(pages) <= linked
    assert {home + "figures/index.html"} <= set(pages["gallery.html"]["links"])
    assert {home + "gallery.html"} <= set(pages["figures/index.html"]["links"])  # and the way back


def test_sections(browser, home):
    browser.width(1280)
    browser.open(home + "index.html")
    assert browser.js(
        "[...document.querySelectorAll('.navbar-nav .nav-link')].map(e => e.innerText.trim()).filter(Boolean)"
    )[:7] == ["Start", "Try it", "Explain", "Figures", "Guides", "Book", "API"]


# ---- search


def search(browser, home, what):
    browser.width(1280)
    browser.open(home + "index.html")
    browser.js("document.querySelector('.smalldocs-search input').focus()")
    browser("Input.insertText", text=what)
    return browser.until(
        "document.querySelector('.smalldocs-search-results.show') && "
        "[...document.querySelectorAll('.smalldocs-search-results a')].map(a => a.href)"
    )


def test_search_finds_the_chapter_and_opens_it(pages, site, home, browser):
    if not (site / "site_libs" / "smalldocs.js").exists() and not list(site.rglob("smalldocs*.js")):
        pytest.skip("built by Quarto, whose search is another")
    found = search(browser, home, "verifier")
    assert found[0].startswith(home + "task/countdown.html"), found[:5]
    browser.press("Enter", 13, text="\r")
    browser.until(f"location.href === {json.dumps(found[0])} && document.readyState === 'complete'")
    assert search(browser, home, "explained_variance") and any(
        "ppo.html" in u or "metrics.html" in u for u in search(browser, home, "explained_variance")
    )


# ---- what the pages hold


def exports():
    "Module → exported names, from the modules themselves"
    out = {}
    for p in sorted((ROOT / "stars").glob("*/[a-z]*.py")):
        for n in ast.parse(p.read_text()).body:
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__":
                out[f"{p.parent.name}.{p.stem}"] = ast.literal_eval(n.value)
    assert len(out) > 40
    return out


def passed_on(tree, part):
    "Names that a module imports from others of the package, and their modules"
    found = {}
    for n in tree.body:
        if isinstance(n, ast.ImportFrom) and n.level:
            module = n.module if n.level > 1 else f"{part}.{n.module}"
            found |= {a.name: module for a in n.names}
    return found


def test_every_exported_symbol_is_documented(pages):
    anchors = {i: name for name, p in pages.items() for i in p["ids"]}
    index, missing = pages["api.html"]["links"], []
    for module, names in exports().items():
        part, name = module.split(".")
        tree = ast.parse((ROOT / "stars" / part / f"{name}.py").read_text())
        defined = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        others = passed_on(tree, part)
        for name in names:
            anchor = f"stars.{others.get(name, module)}.{name}"
            if anchor not in anchors or not any(u.endswith(f"/{anchors[anchor]}#{anchor}") for u in index):
                missing.append(anchor)
            elif name in defined and not re.search(
                rf"^(class|def) {name}\b", pages[anchors[anchor]]["text"], re.M
            ):
                missing.append(f"signature of {anchor}")
    assert not missing


def test_the_index_of_symbols_goes_through_the_book(browser, home):
    browser.open(home + "api.html")
    parts = browser.js("[...document.querySelectorAll('main h2')].map(e => e.innerText.split('.')[1])")
    order = ["util", "task", "llm", "habits", "models", "rl", "text", "measure", "lab", "show", "cli"]
    assert list(dict.fromkeys(parts)) == order


def test_signatures_carry_their_comments(pages):
    text = pages["rl/ppo.html"]["text"]
    for said in (
        "GAE λ (Schulman et al. 2016, eq. 16)",
        "advantages, returns [batch, time], 0 where masked",
        "optimiser step",
    ):
        assert said in text


def test_figure_pages_say_how_to_run_them(pages):
    figures = {p.stem for p in (ROOT / "nbs" / "figures").glob("fig_*.ipynb")}
    for name in figures:
        assert f"stars figure {name}" in pages[f"figures/{name}.html"]["text"]
        assert f"figures/{name}.html" in " ".join(pages["reproduce.html"]["links"])
        if list((ROOT / "figures").glob(f"*/{name}.png")):
            assert pages[f"figures/{name}.html"]["pictures"], name


def test_figure_pages_open_with_the_picture_and_what_it_says(pages, home, browser):
    menu = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    titles = next(
        {x["href"]: x["text"] for x in part["contents"]} for part in menu if part["section"] == "Figures"
    )
    first = """(() => {
        const main = document.querySelector('main'), all = [...main.querySelectorAll('h1, h2, img, pre')];
        return [main.querySelector('h1').innerText, all.find(e => e.matches('img, h2, pre')).tagName];
    })()"""
    for path, title in titles.items():
        if path.startswith("figures/fig_"):
            name = Path(path).stem
            browser.open(f"{home}figures/{name}.html")
            assert browser.js(first) == [title, "IMG"], name
            manifest = json.loads(next((ROOT / "figures").glob(f"cpu/{name}.json")).read_text())
            for said in manifest["title"].splitlines():
                assert said in pages[f"figures/{name}.html"]["text"]
                assert said in pages["gallery.html"]["text"]
            assert home + f"figures/{name}.html" in pages["gallery.html"]["links"]


def test_figure_pages_show_each_picture_once(pages, browser, home):
    "The notebooks hold it for code hosts, too"
    shown = "[...document.querySelectorAll('main img')].map(i => i.src)"
    for p in (ROOT / "nbs" / "figures").glob("fig_*.ipynb"):
        browser.open(f"{home}figures/{p.stem}.html")
        pictures = browser.js(shown)
        assert len(pictures) == len(set(pictures)), p.stem
        assert sum(u.endswith(f"/cpu/{p.stem}.png") for u in pictures) <= 1
        assert "opens this notebook as it was run" not in pages[f"figures/{p.stem}.html"]["text"]


def page_of(notebook):
    "Path of a notebook's page on the site"
    inside = notebook.relative_to(ROOT / "nbs")
    return str(inside.with_name(re.sub(r"^\d\d_", "", inside.name)).with_suffix(".html"))


def test_the_book_lists_its_chapters_in_order(browser, home):
    chapters = [*(ROOT / "nbs").glob("*/[0-9]*_*.ipynb")]
    chapters.sort(key=lambda p: int(p.stem.partition("_")[0]))
    browser.open(home + "book.html")
    links = browser.js("[...document.querySelectorAll('main section ol a')].map(a => a.href)")
    assert links == [home + page_of(p) for p in chapters]


def test_every_notebook_can_be_seen_kept_and_run_elsewhere(pages, site, home):
    cfg, repo = get_config(path=ROOT), f"{get_config(path=ROOT).user}/{get_config(path=ROOT).repo}"
    for p in (ROOT / "nbs").rglob("*.ipynb"):
        inside = p.relative_to(ROOT / "nbs")
        links, copy = pages[page_of(p)]["links"], f"notebooks/{inside}"
        assert {
            f"{cfg.git_url}/blob/{cfg.branch}/nbs/{inside}",
            f"https://colab.research.google.com/github/{repo}/blob/{cfg.branch}/nbs/{inside}",
            f"https://mybinder.org/v2/gh/{repo}/{cfg.branch}?labpath=nbs/{inside}",
            home + copy,
        } <= set(links), inside
        assert (site / copy).read_bytes() == p.read_bytes()
        code = [c["source"] for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code"]
        installs = "%pip install" in "".join(map("".join, code))
        told = f"in Colab, first run %pip install git+{cfg.git_url}" in pages[page_of(p)]["text"]
        assert told == (bool(code) and not installs), inside
    assert all(any(f"{repo}/blob/" in u for u in p["links"]) for p in pages.values())


def test_pages_hold_no_warnings_of_libraries(pages):
    seen = {n: found for n, p in pages.items() if (found := re.findall(r"\w+Warning: .{,80}", p["text"]))}
    assert not seen


def test_the_viewer_shows_a_trace_though_no_widget_runs(pages):
    for page in ("show/viewer.html", "habits/behaviors.html", "tutorials/quickstart.html"):
        text = pages[page]["text"]
        assert "VBox(children=(HTML(value=" not in text and re.search(r"· seed 0 · step \d+ · problem", text)


# ---- light and dark

COLORS = """(() => {
    const rgb = s => s.match(/[\\d.]+/g).map((v, i) => v * (s.startsWith('color(srgb') && i < 3 ? 255 : 1));
    const linear = v => v <= 10 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
    const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
    const ground = e => {
        for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3] > .5) return c;
        }
        return [255, 255, 255];
    };
    const contrast = e => {
        const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
        return (a + .05) / (b + .05);
    };
    const texts = 'main p, main a, main h2, main li, pre, #quarto-sidebar a, .navbar a';
    const seen = [...document.querySelectorAll(texts)]
        .filter(e => e.innerText.trim() && e.offsetParent);
    const weak = seen.filter(e => contrast(e) < 3).map(e => e.outerHTML.slice(0, 100));
    return {ground: light(ground(document.body)), n: seen.length, weak: weak.slice(0, 3)};
})()"""


@pytest.mark.parametrize(
    "page", ["index.html", "task/countdown.html", "show/viewer.html", "figures/fig_gap.html"]
)
def test_dark_mode_can_be_read(browser, home, page):
    try:
        for dark in (False, True):
            browser.dark(dark)
            browser.width(1280)
            browser.open(home + page)
            seen = browser.js(COLORS)
            assert (seen["ground"] < 0.1) is dark and seen["n"] > 20 and not seen["weak"]
    finally:
        browser.dark(False)


def test_a_switch_turns_the_lights_off_and_the_next_page_knows(browser, home):
    try:
        browser.width(1280)
        browser.open(home + "index.html")
        browser.click(".quarto-color-scheme-toggle")
        browser.open(home + "task/countdown.html")
        assert browser.js(COLORS)["ground"] < 0.1
    finally:
        browser.js("localStorage.clear()")


# ---- what other sites and programs read


def test_a_shared_link_has_a_picture(pages, site):
    address = get_config(path=ROOT).doc_host + get_config(path=ROOT).doc_baseurl + "/"
    for name, page in pages.items():
        if name != "figures/index.html":
            assert page["card"] and (site / page["card"].removeprefix(address)).is_file(), name
    assert Image.open(site / "card.png").size == (1200, 630)
    assert pages["figures/fig_gap.html"]["card"].endswith("/fig_gap.png")


def test_sitemap_and_llms_txt_name_every_page(pages, site):
    sitemap, llms = ((site / name).read_text() for name in ("sitemap.xml", "llms.txt"))
    for name in set(pages) - {"figures/index.html"}:
        assert f"/{name}<" in sitemap or name == "index.html", name
        assert f"/{name.removesuffix('.html')}.llms.md" in llms, name
    said = (site / "task" / "countdown.llms.md").read_text()
    assert "def explain(" in said and "what the model wrote after the prompt" in said


# ---- Python in the reader's browser, which can reach no other host


@pytest.fixture
def lite(site):
    if not (site / "lite").is_dir():
        assert not os.environ.get("CI"), "the site was built without JupyterLite"
        pytest.skip("the site was built without JupyterLite: make .venv-browser/.done fetches what it needs")


def typed(browser, name, text):
    browser.js(f"document.querySelector('#demo [name={name}]').select()")
    browser("Input.insertText", text=text)


def test_the_page_grades_an_answer_and_finds_habits(lite, browser, home):
    browser.width(390)
    browser.open(home + "tutorials/try.html")
    verdict, marked = (
        "document.querySelector('#demo .verdict').innerText",
        "document.querySelector('#demo .marked').innerText",
    )
    for answer, said in (("10 * 3 + 4", "1: correct"), ("10 + 4 * 3", "0.1: wrong value: 22 instead of 34")):
        typed(browser, "answer", answer)
        browser.click("#demo .puzzle .btn-primary")
        assert browser.until(f"{verdict}.includes({json.dumps(said)}) && {verdict}") == said
    browser.click("#demo [name=solve]")
    assert browser.until(f"{verdict}.endsWith('= 34') && {verdict}") == "4 + (3 * 10) = 34"
    typed(browser, "trace", "𝟛: 7 * 3 = 21. That's too low, let me try another way. <b> First get 12.")
    browser.click("#demo .trace .btn-primary")
    assert "verification 1 backtracking 1 subgoal 1" in browser.until(
        f"{marked}.includes('too low') && {marked}"
    )
    marks = browser.js(
        "[...document.querySelectorAll('#demo .marked p:last-child mark')].map(e => e.innerText)"
    )
    assert marks == ["That's too low", "let me try another way.", "<b> First get 12."]  # as text
    typed(browser, "numbers", "none")
    browser.click("#demo [name=solve]")
    assert "whole numbers" in browser.until(f"{verdict}.includes('whole') && {verdict}")
    assert not browser.js(WIDE) and not browser.faults(home)


def test_the_notebook_runs_in_jupyterlite(lite, browser, home):
    browser.width(1280)
    browser.open(home + "lite/notebooks/index.html?path=try.ipynb")
    browser.until(
        "!!document.querySelector('.jp-CodeCell .cm-line') && /Pyodide/.test(document.body.innerText)"
    )
    browser.until("!!document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]')")
    browser.click(".jp-CodeCell .cm-line:nth-child(4)")  # answer = "10 + 4 * 3"
    browser.press("End", 35)
    browser.press("Enter", 13, text="\r")
    browser("Input.insertText", text="answer = '3 * 10 + 4'")
    browser.press("Enter", 13, modifiers=8, text="\r")  # with shift
    browser.until("document.querySelector('.jp-CodeCell .jp-InputPrompt').innerText.includes('[1]')")
    assert (
        browser.js("document.querySelector('.jp-CodeCell .jp-OutputArea').innerText").strip() == "1: correct"
    )
    server = home.removesuffix("stars/")
    assert not [f for f in browser.faults(server) if "asks another host" in f]


# ---- the same without a browser


@pytest.fixture
def docs(monkeypatch):
    "The module that builds the site"
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    return importlib.import_module("docs")


def fields():
    "The functions behind the fields of the page"
    [program] = re.findall(r"String\.raw`(.*?)`", (ROOT / "nbs" / "try.js").read_text(), re.S)
    exec(program, found := {})
    return found


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.sampled_from([" ", ",", ", ", "  "]))
def test_numbers_are_read_as_they_are_typed(numbers, between):
    assert fields()["ints"](f" {between.join(map(str, numbers))} ") == numbers


@pytest.mark.parametrize("target", ["34.5", "-34", "10*3+4", "34 35", "", ",", "thirty"])
def test_what_is_no_whole_number_is_no_target(target):
    "A half of it would be graded as if it were all"
    page = fields()
    for ask in (
        lambda: page["verdict"]("3 4 10", target, "10 * 3 + 4"),
        lambda: page["solution"]("3 4 10", target),
        lambda: page["habits"]("3 + 4 = 7", "3 4 10", target),
    ):
        with pytest.raises(ValueError, match="whole numbers|one number"):
            ask()
    with pytest.raises(ValueError, match="whole numbers"):
        page["verdict"]("3 4 -10", "34", "10 * 3 + 4")


def test_the_first_page_offers_python_only_where_it_runs(docs, monkeypatch):
    nb = json.loads((ROOT / "nbs" / "index.ipynb").read_text())
    for ready in (True, False):
        monkeypatch.setattr(docs.browser, "ready", lambda: ready)
        hero = docs.source(docs.front(nb, docs.pictures(docs.HEADLINE))["cells"][1])
        assert ("Try it in your browser" in hero) == ready and "See every figure" in hero


def test_a_failed_build_of_jupyterlite_shows_its_log(docs, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "begun", "no such extension")
    monkeypatch.setattr(docs.browser, "runtime", lambda folder: None)
    monkeypatch.setattr(docs.browser, "kernel", lambda: tmp_path)
    monkeypatch.setattr(docs.browser.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="not built:\nbegun\nno such extension"):
        docs.browser.build(tmp_path / "lite", {})


def test_links_of_the_notebook_in_jupyterlite_lead_to_pages_of_the_site(lite, site):
    "No other notebook is there"
    nb = json.loads((site / "lite" / "files" / "try.ipynb").read_text())
    links = [u for c in nb["cells"] for u in re.findall(r"\]\(([^)\s]+)\)", c["source"])]
    address = get_config(path=ROOT).doc_host + get_config(path=ROOT).doc_baseurl + "/"
    assert len(links) > 3 and all(u.startswith(address) for u in links)
    assert all((site / u.removeprefix(address)).is_file() for u in links)


# ---- the examination itself


def test_a_broken_site_is_seen(browser, tmp_path):
    (tmp_path / "a.html").write_text(
        "<meta name=viewport content='width=device-width'><body><h1 id=x>A</h1><a href='b.html#y'>1</a><a "
        "href='c.html'>2</a><a href='#x'>3</a><img src='none.png'><main style='overflow-x:clip'><pre "
        "style='width:500px'>wide</pre></main><script>console.error('no')</script>"
        "<script src='https://elsewhere.invalid/x.js'></script></body>"
    )
    (tmp_path / "b.html").write_text(
        "<meta name=viewport content='width=device-width'><body><p id=z>B</p><div "
        "style='overflow-x:auto'><pre style='width:900px'>scrolls inside</pre></div></body>"
    )
    server, host = served(tmp_path)
    try:
        seen = {n: browser.visit(host + n, host) for n in ("a.html", "b.html")}
    finally:
        server.shutdown()
    faults = " ".join(seen["a.html"]["faults"])
    assert "console: no" in faults and "404" in faults and "asks another host" in faults
    assert sorted(dead_links(seen, tmp_path, host)) == ["a.html → b.html#y", "a.html → c.html"]
    assert seen["a.html"]["blank"] and "500px" in seen["a.html"]["wide"][0]
    assert (
        not seen["b.html"]["blank"]
        and not seen["b.html"]["wide"]
        and [f for f in seen["b.html"]["faults"] if "favicon" not in f] == []
    )
