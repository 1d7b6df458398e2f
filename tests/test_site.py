"""The documentation site in a real browser: every page opens without an error, every link and fragment
leads somewhere, search finds, a phone shows it (a minute)"""

import ast
import json
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
        if "method" in message:
            self.events.append(message)
        return message

    def __call__(self, method, **params):
        self.n += 1
        self.socket.send(
            json.dumps(
                dict(id=self.n, method=method, params=params)
                | (dict(sessionId=self.session) if self.session else {})
            )
        )
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
    assert set(pages) - linked <= {"figures/index.html"}  # all pictures on one page, which the gallery links
    assert home + "figures/index.html" in pages["gallery.html"]["links"]


def test_sections(browser, home):
    browser.width(1280)
    browser.open(home + "index.html")
    assert browser.js(
        "[...document.querySelectorAll('.navbar-nav .nav-link')].map(e => e.innerText.trim()).filter(Boolean)"
    )[:6] == ["Start", "Explain", "Figures", "Guides", "Book", "API"]


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
    browser(
        "Input.dispatchKeyEvent",
        type="keyDown",
        key="Enter",
        code="Enter",
        windowsVirtualKeyCode=13,
        text="\r",
    )
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
