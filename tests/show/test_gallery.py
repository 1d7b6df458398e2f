"The page of all figures: its links lead somewhere, what comes from files is escaped, failures hide nothing"

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from stars.show.gallery import facts, gallery, place_order
from stars.show.plots import save_figure

VOID = {"meta", "img", "link", "br", "hr", "input"}
ABOUT = dict(config=dict(preset="cpu"), seeds=[0, 1, 2], commit="0123456789abcdef", minutes=3.25)


class Page(HTMLParser):
    "Elements, texts and nesting of a page; raises where a tag is not closed, or closes another"

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(Path(path).read_text("utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} comes twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [a for t, a in self.elements if t == tag]

    def targets(self):
        return [a[k] for _, a in self.elements for k in ("href", "src") if k in a]


def article(path, name):
    "The part of the page about one figure"
    return next(
        a for a in Path(path).read_text("utf-8").split("<article ")[1:] if a.startswith(f'id="{name}"')
    ).split("</article>")[0]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Figures of three places, written as the package writes them"
    d = tmp_path_factory.mktemp("drawn")
    for place, name, title in (
        ("cpu", "fig_a", "a & b: .2 < .4"),
        ("cpu", "fig_b", "b"),
        ("published", "fig_a", "theirs"),
        ("cpu+published", "fig_a", "both"),
    ):
        fig = plt.figure(figsize=(2, 1))
        fig.text(0, 0.8, title, gid="title")
        fig.text(0, 0.1, f"n of {title}", gid="caption")
        save_figure(fig, name, pd.DataFrame(dict(x=[1, 2])), d / place, ABOUT, dpi=50)
        plt.close(fig)
    return d


@pytest.fixture
def folder(drawn, tmp_path):
    return Path(shutil.copytree(drawn, tmp_path / "figures"))


def change(path, **what):
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


# ---- a page that works anywhere


def test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(folder):
    page = Page(gallery(folder, {"cpu/fig_b": "x", "gpu/fig_c": "y"}))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for t in page.targets():
        if t.startswith("#"):
            assert t[1:] in ids or unquote(t[1:]) in ids
        else:
            assert not t.startswith(("/", "http", "file:")) and (folder / unquote(t)).is_file(), t
    files = {unquote(t) for t in page.targets() if not t.startswith("#")}
    theirs = {"published/fig_a.csv", "cpu+published/fig_a.csv"}  # not kept with the project
    assert files == {p.relative_to(folder).as_posix() for p in folder.glob("*/*.*")} - theirs
    assert (
        not page.all("script") and not page.all("link") and "url(" not in (folder / "index.html").read_text()
    )


def test_page_can_be_heard(folder):
    page = Page(gallery(folder, {"cpu/fig_b": "x"}))
    assert page.all("html") == [dict(lang="en")] and (folder / "index.html").read_text().startswith(
        "<!DOCTYPE html>\n"
    )
    levels = [int(t[1]) for t, _ in page.elements if t in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert [a["alt"] for a in page.all("img")] == ["a & b: .2 < .4", "b", "both", "theirs"]
    assert all(a["loading"] == "lazy" for a in page.all("img"))
    named = [a["aria-label"] for a in page.all("a") if "aria-label" in a]
    assert {"SVG of fig_a", "Data of fig_b", "Manifest of fig_b"} <= set(named)


def test_picture_reserves_its_room(folder):
    from PIL import Image

    for img in Page(gallery(folder)).all("img"):
        assert (int(img["width"]), int(img["height"])) == Image.open(folder / unquote(img["src"])).size


def test_same_figures_same_bytes(folder, tmp_path):
    once = gallery(folder, {"cpu/fig_b": "x", "cpu/fig_c": "y"}).read_bytes()
    other = shutil.copytree(folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("index.html"))
    assert (
        gallery(other, {"cpu/fig_c": "y", "cpu/fig_b": "x"}).read_bytes() == once
    )  # neither place nor order
    assert (
        gallery(folder, {"cpu/fig_b": "x", "cpu/fig_c": "y"}).read_bytes() == once
    )  # nor the page that is there


# ---- the same for code hosts


def readme_of(folder, failed=None):
    gallery(folder, failed)
    return Path(folder / "README.md").read_text("utf-8")


def targets(readme):
    return [unescape(t) for t in re.findall(r'(?:href|src)="([^"]*)"', readme)]


def test_code_hosts_get_a_thumbnail_the_message_and_the_next_click(folder):
    readme = readme_of(folder)
    assert readme.count("<tr>") == readme.count("<img ") == 4
    assert "<b>a &amp; b: .2 &lt; .4</b>" in readme and "seeds 0, 1, 2 · commit 0123456" in readme
    (folder / "cpu" / "fig_a.ipynb").write_text("{}")
    found = set(targets(readme_of(folder)))
    assert {f"cpu/fig_a.{kind}" for kind in ("png", "csv", "json", "ipynb")} <= found
    assert all((folder / unquote(t)).is_file() for t in found)


def test_published_rows_are_not_linked_where_they_are_not_kept(folder):
    "`.gitignore` keeps tables and notebooks with published numbers out, so a link would lead nowhere"
    (folder / "published" / "fig_a.ipynb").write_text("{}")
    theirs = [t for t in targets(readme_of(folder)) if "published" in t]
    assert theirs and all(t.endswith((".png", ".json")) for t in theirs)
    there = [
        t for t in Page(folder / "index.html").targets() if "published" in t and "/" in t and t[0] != "#"
    ]
    assert there and all(t.endswith((".png", ".svg", ".json")) for t in there)


@pytest.mark.parametrize("name", ["index.html", "README.md"])
def test_the_committed_pages_link_only_what_is_committed(name):
    figures = Path(__file__).parents[2] / "figures"
    if not (figures.parent / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=figures, capture_output=True, text=True, check=True)
    links = {unquote(t) for t in targets((figures / name).read_text("utf-8"))}
    files = {t for t in links if not t.startswith(("#", "http"))}
    assert len(files) > 60 and files <= set(done.stdout.split("\0"))


def test_every_part_of_a_title_is_a_line_of_its_own(folder):
    change(folder / "cpu" / "fig_b.json", title="plain | *b*\n\n rich – b_c ")
    readme = readme_of(folder)
    assert "<b>plain | *b*</b><br><b>rich – b_c</b><br>" in readme
    assert 'alt="plain | *b*. rich – b_c"' in readme  # heard, they do not run into each other
    assert "plain | *b*. rich – b_c" in [a["alt"] for a in Page(folder / "index.html").all("img")]


def test_code_hosts_are_told_what_failed_and_what_is_wrong(folder):
    (folder / "published" / "fig_a.json").write_text("{")
    readme = readme_of(folder, {"cpu/fig_b": "ValueError: <x>\nmore", "gpu/fig_c": "y"})
    assert "<b>Could not be drawn:</b> ValueError: &lt;x&gt;<br>Older picture: <b>b</b>" in readme
    assert "no picture" in readme and "fig_a.json cannot be read" in readme and "more" not in readme


def test_a_readme_of_ones_own_stays(folder):
    (folder / "README.md").write_text("mine")
    assert readme_of(folder) == "mine"
    (folder / "README.md").unlink()
    assert readme_of(folder) == readme_of(folder) != "mine"


# ---- what is told


def test_places_in_order():
    places = [
        "published",
        "smoke+published",
        "cpu+published",
        "zoo",
        "smoke",
        "paper",
        "smollm2",
        "gpu",
        "cpu",
    ]
    assert sorted(places, key=place_order) == [
        "cpu",
        "gpu",
        "smollm2",
        "paper",
        "zoo",
        "smoke",
        "cpu+published",
        "smoke+published",
        "published",
    ]


def test_origin_as_far_as_it_is_known():
    assert facts(ABOUT) == "preset cpu · seeds 0, 1, 2 · commit 0123456 · 3.2 minutes"
    later = [dict(commit="fedcba9876", what=what) for what in ("adds", "pays")]
    assert "commit 0123456 · later rows: commit fedcba9 · 3.2" in facts(ABOUT | dict(added=later))
    assert (
        facts(ABOUT | dict(seeds=[4], uncommitted_changes=True, minutes=80.4, date="2030-01-02T03:04:05"))
        == "preset cpu · seed 4 · commit 0123456 with uncommitted changes · 2030-01-02 · 80 minutes"
    )
    for odd in (
        {},
        dict(config=None, seeds=None, commit=None),
        dict(config=[], seeds=3, minutes="long"),
        dict(seeds=[]),
    ):
        assert facts(odd) == ""


def test_title_caption_and_published_data(folder):
    change(
        folder / "published" / "fig_a.json",
        published=dict(
            files={
                "t.csv": dict(url="https://example.org/t.csv?a=1&b=2", sha256="0" * 64),
                "local.csv": dict(url="javascript:alert(1)"),
                "odd.csv": None,
            }
        ),
    )
    (folder / "published" / "fig_a.csv").unlink()
    page = Page(gallery(folder))
    assert "a & b: .2 < .4" in page.text and "n of theirs" in page.text
    assert "https://example.org/t.csv?a=1&b=2" in page.targets() and "Published data: local.csv" in page.text
    assert not any("javascript" in t or t == "published/fig_a.csv" for t in page.targets())


def test_everything_is_escaped(folder):
    nasty = """</p><script>alert("1")</script>' onload='x"""
    change(
        folder / "cpu" / "fig_a.json",
        title=nasty,
        caption=nasty,
        commit="<b>x",
        seeds=[nasty],
        date="<i>",
        config=dict(preset=nasty),
        published=dict(files={nasty: dict(url=f"https://e.org/{nasty}")}),
    )
    for kind in ("png", "svg", "csv", "json"):
        (folder / "cpu" / f"fig_b.{kind}").rename(folder / "cpu" / f"fig <b> & 'b' #1?.{kind}")
    page = Page(gallery(folder, {"cpu/fig_z": nasty, "a <place>/fig_y": nasty}))
    assert (
        not page.all("script")
        and not page.all("b")
        and not page.all("i")
        and not any("onload" in a for _, a in page.elements)
    )
    assert page.text.count(nasty) >= 5 and "a <place>" in page.text
    assert all((folder / unquote(t)).is_file() for t in page.targets() if not t.startswith(("#", "https:")))


# ---- what went wrong


def test_failure_stands_where_its_picture_would(folder):
    page = gallery(
        folder, {"cpu/fig_b": "ValueError: lr=0\nsee runs/x.ipynb", "cpu/fig_c": "KeyError: 'steps'"}
    )
    older, none, fine = (article(page, f"cpu/fig_{x}") for x in "bca")
    assert (
        "ValueError: lr=0\nsee runs/x.ipynb" in older
        and "Older picture" in older
        and "cpu/fig_b.png" in older
    )
    assert (
        "KeyError: 'steps'" in unescape(none)
        and "<img" not in none
        and "Older picture" not in none
        and "missing" not in none
    )
    assert "Could not be drawn" not in fine and "Older" not in fine
    assert "2 of 5 could not be drawn" in Page(page).text
    assert "could not be drawn" not in Page(gallery(folder)).text.lower()


def test_failure_elsewhere_does_not_mark_the_same_figure(folder):
    page = gallery(folder, {"cpu/fig_a": "boom"})
    assert (
        "boom" in article(page, "cpu/fig_a")
        and "boom" not in article(page, "published/fig_a")
        and "Older" not in article(page, "published/fig_a")
    )


def test_page_of_failures_alone(tmp_path):
    page = Page(gallery(tmp_path / "new", {"cpu/fig_a": "boom"}))
    assert "1 of 1 could not be drawn" in page.text and not page.all("img")


@pytest.mark.parametrize(
    "content,told",
    (
        (b"{", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "holds a list"),
        (None, "is missing"),
    ),
)
def test_broken_manifest_is_named_and_hides_nothing(folder, content, told):
    path = folder / "cpu" / "fig_a.json"
    path.unlink() if content is None else path.write_bytes(content)
    page = gallery(folder)
    mine = article(page, "cpu/fig_a")
    assert (
        "fig_a.json" in mine
        and told in mine
        and "cpu/fig_a.png" in mine
        and str(folder) not in page.read_text()
    )
    assert len(Page(page).all("article")) == 4


def test_keys_of_other_types_do_not_stop_the_page(folder):
    change(
        folder / "cpu" / "fig_a.json",
        title=["x"],
        caption=3,
        config="cpu",
        seeds=0,
        commit=5,
        published=[1],
        csv_sha256=None,
    )
    assert len(Page(gallery(folder)).all("article")) == 4


def test_rows_of_another_run_and_a_lost_picture_are_told(folder):
    (folder / "cpu" / "fig_a.csv").write_text("x\n9\n")
    (folder / "cpu" / "fig_b.png").unlink()
    page = gallery(folder)
    assert "fig_a.csv is not what fig_a.json describes" in article(page, "cpu/fig_a")
    assert "fig_b.png is missing" in article(page, "cpu/fig_b") and "<img" not in article(page, "cpu/fig_b")
    assert "describes" not in article(page, "published/fig_a")


def test_unfinished_and_hidden_files_are_no_figures(folder):
    (folder / "cpu" / ".fig_x.json.1.tmp").write_text("")
    (folder / "cpu" / "._fig_a.png").write_bytes(b"x")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "fig_q.png").write_bytes(b"x")
    assert len(Page(gallery(folder)).all("article")) == 4


def test_nothing_to_show_and_wrong_names(tmp_path):
    with pytest.raises(ValueError, match="stars reproduce"):
        gallery(tmp_path)
    with pytest.raises(ValueError, match="'fig_a' is not of the form PLACE/NAME"):
        gallery(tmp_path, {"fig_a": "x"})
    assert not (tmp_path / "index.html").exists()
