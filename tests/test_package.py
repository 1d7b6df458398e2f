"""What `pip install` gets: a wheel that brings the bases, the figure notebooks and the prices, and works
away from the checkout"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A wheel and a source archive, from a copy of what git tracks"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs into a package is not known")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = (
        subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, tracked):
        if not (ROOT / name).is_file():
            continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    r = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_holds_what_runs_need(built):
    assert built[0].name.startswith("stars_habits-")  # the distribution; the module in it is `stars`
    names = set(zipfile.ZipFile(built[0]).namelist())
    wanted = {
        "stars/prices.json",
        *(
            f"stars/bases/{b}/{f}"
            for b in ("plain", "rich")
            for f in ("model.safetensors", "config.json", "tokenizer.json", "recipe.json")
        ),
        *(str(p.relative_to(ROOT)) for p in (ROOT / "stars").rglob("*.py")),
        *(f"stars/figures/{p.name}" for p in (ROOT / "nbs" / "figures").glob("fig_*.ipynb")),
    }
    assert wanted <= names, wanted - names
    assert not [n for n in names if n.startswith(("tests", "nbs", "benchmarks", "figures"))]
    assert built[0].stat().st_size < 20e6
    with tarfile.open(built[1]) as source:  # without its settings it could not be built again
        assert any(n.endswith("/settings.ini") for n in source.getnames())


@pytest.mark.slow
def test_wheel_draws_a_figure_away_from_the_checkout(built, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-compile",
            "--target",
            str(site),
            str(built[0]),
        ],
        check=True,
    )
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def stars(*args):
        return subprocess.run(
            [
                sys.executable,
                "-P",
                "-c",
                "import stars,sys; print(stars.__file__, file=sys.stderr); from stars.cli.main import "
                "main; main()",
                *args,
            ],
            cwd=work,
            env=env,
            capture_output=True,
            text=True,
        )

    r = stars("reproduce", "--preset", "smoke", "--only", "fig_gap,fig_controls")
    assert r.returncode == 0, r.stderr[-3000:]
    assert str(site) in r.stderr
    for name in ("fig_gap", "fig_controls"):
        assert (work / "figures" / "smoke" / f"{name}.png").stat().st_size > 10_000
        kept = json.loads((work / "figures" / "smoke" / f"{name}.ipynb").read_text())
        outputs = [o for c in kept["cells"] for o in c.get("outputs", [])]
        assert any("image/png" in o.get("data", {}) for o in outputs) and not any(
            o.get("name") == "stderr" for o in outputs
        )
        assert "papermill" not in kept["metadata"] and str(tmp_path) not in json.dumps(kept)
    assert stars("--version").stdout.startswith("stars ")
    shown = stars("inspect", "runs/smoke", "--json")
    assert shown.returncode == 0 and {r["model"] for r in json.loads(shown.stdout)} == {"plain", "rich"}


def test_messages_name_the_distribution_and_extras_that_exist():
    extras = re.findall(r"^(\w+)_requirements", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)
    named = [
        found
        for path in (ROOT / "stars").rglob("*.py")
        for found in re.findall(r"pip install '?(stars[\w-]*)\[([\w-]+)\]", path.read_text(encoding="utf-8"))
    ]
    assert len(named) > 5
    for distribution, extra in named:
        assert distribution == "stars-habits" and extra.replace("-", "_") in extras, (distribution, extra)


def number(path):
    return int(path.name.split("_")[0])


def chapters():
    """Part, number and module of each chapter, and the modules of the package that it imports, in the order
    of reading"""
    for path in sorted((ROOT / "nbs").glob("[a-z]*/[0-9][0-9]*_*.ipynb"), key=number):
        code = "\n".join(
            "".join(c["source"])
            for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code" and re.search(r"^#\|\s*(export|default_exp)", "".join(c["source"]))
        )
        module = re.search(r"default_exp ([\w.]+)", code)
        if module:
            yield path, module[1], set(re.findall(r"from stars\.(\w+\.\w+) import", code))


def test_a_chapter_imports_only_what_was_read_before():
    read = []
    for path, module, imported in chapters():
        assert path.parent.name == module.split(".")[0], f"{path.name} exports {module}: another part's"
        assert imported <= set(read), f"{path.name} imports {imported - set(read)}, which come later"
        read.append(module)
    assert len(read) > 40


@pytest.mark.parametrize(
    "figures,said", [("", ""), ("fig_gap,fig_dose", '--only "fig_gap,fig_dose" --set eval.draws=8')]
)
def test_make_draws_all_figures_or_those_that_are_named(figures, said):
    done = subprocess.run(
        ["make", "-n", "reproduce", f"FIGURES={figures}"], cwd=ROOT, capture_output=True, text=True
    )
    line = next(text for text in done.stdout.split("\n") if "stars reproduce" in text)
    assert line.strip().endswith(f"stars reproduce --preset cpu {said}".strip())
