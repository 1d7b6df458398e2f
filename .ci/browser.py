"""JupyterLite for the site: Python in the reader's browser, with this package in it, from no other host.

The interpreter is Pyodide, whose npm package holds CPython without any package. What JupyterLite's kernel
needs besides comes as wheels. `make docs` puts both into `.venv-browser`, at the versions of `requirements/`.
The wheel of this package is built here, less the weights of small models, which no browser runs.
"""

import email.parser
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
BROWSER = ROOT / ".venv-browser"
PYODIDE = BROWSER / "node_modules" / "pyodide"
RUNTIME = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip")
EMSCRIPTEN = dict(sys_platform="emscripten", platform_system="Emscripten", os_name="posix", extra="")


def ready():
    "Is everything here that a browser needs? `make` fetches it"
    return (BROWSER / ".done").is_file() and all(
        map(find_spec, ("jupyterlite_core", "jupyterlite_pyodide_kernel"))
    )


def own_wheel(to):
    "Build the wheel of this package, as it is in this tree"
    with tempfile.TemporaryDirectory() as tree:
        for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, tree)
        for name in ("stars", "nbs/figures"):
            unwanted = shutil.ignore_patterns("bases", "__pycache__")
            shutil.copytree(ROOT / name, Path(tree) / name, ignore=unwanted)
        command = "wheel --quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check"
        subprocess.run([sys.executable, "-m", "pip", *command.split(), "-w", to, tree], check=True)


def metadata(wheel):
    "What a wheel says of itself, and the names that can be imported from it"
    with zipfile.ZipFile(wheel) as z:
        said = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        tops = {n.split("/")[0] for n in z.namelist() if n.endswith(".py") or "/" in n}
        found = email.parser.Parser().parsestr(z.read(said).decode())
    tops = {t.removesuffix(".py") for t in tops if not re.search(r"\.(dist-info|data)$", t)}
    return found, sorted(t for t in tops if t.isidentifier())


def entry(wheel, known):
    "A wheel as Pyodide's lock file lists it; `known`: the packages that are there"
    about, imports = metadata(wheel)
    name, version, *_ = parse_wheel_filename(wheel.name)
    needed = map(Requirement, about.get_all("Requires-Dist", []))
    wanted = {canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate(EMSCRIPTEN)}
    return dict(
        name=name,
        version=str(version),
        file_name=wheel.name,
        install_dir="site",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        package_type="package",
        imports=imports,
        depends=sorted(wanted & known),
        unvendored_tests=False,
    )


def lock(folder):
    "Pyodide's lock file for the wheels of a folder: an `import` in a notebook loads them, from beside it"
    there = {parse_wheel_filename(w.name)[0]: w for w in sorted(folder.glob("*.whl"))}
    info = json.loads((PYODIDE / "pyodide-lock.json").read_text())["info"]
    packages = {name: entry(wheel, set(there)) for name, wheel in there.items()}
    (folder / "pyodide-lock.json").write_text(json.dumps(dict(info=info, packages=packages)))


def runtime(folder):
    "Pyodide, the kernel's wheels and ours"
    folder.mkdir(parents=True)
    for p in [*(PYODIDE / name for name in RUNTIME), *(BROWSER / "wheels").glob("*.whl")]:
        shutil.copy2(p, folder)
    own_wheel(folder)
    lock(folder)


SETTINGS = {
    "jupyter-lite-schema-version": 0,
    "jupyter-config-data": {
        "appName": "stars",
        "litePluginSettings": {
            "@jupyterlite/pyodide-kernel-extension:kernel": {
                "disablePyPIFallback": True,  # what is not on the site is asked of nobody
            }
        },
    },
}


def kernel():
    "The folder of the kernel's extension of JupyterLab, which a package installs beside its own"
    where = Path("share/jupyter/labextensions/@jupyterlite/pyodide-kernel-extension")
    roots = Path(sys.prefix), Path(find_spec("jupyterlite_pyodide_kernel").origin).parents[1]
    return next(root / where for root in roots if (root / where).is_dir())


def one_piece(lines):
    return "".join(lines) if isinstance(lines, list) else lines


def at_home(nb):
    """A notebook for JupyterLite: it starts the kernel that is there without asking which and installs
    nothing; its texts are in one piece each, since lists of lines would be shown with commas between them"""
    cells = [c for c in nb["cells"] if not one_piece(c["source"]).startswith("#| hide")]
    for c in cells:
        c["source"] = one_piece(c["source"])
        for o in c.get("outputs", []):
            if "text" in o:
                o["text"] = one_piece(o["text"])
            o |= {"data": {k: one_piece(v) for k, v in o["data"].items()}} if "data" in o else {}
    spec = dict(name="python", display_name="Python (Pyodide)", language="python")
    return nb | dict(cells=cells, metadata=nb["metadata"] | dict(kernelspec=spec))


def build(out, notebooks):
    "JupyterLite in a folder of the site, with notebooks to open: name → notebook"
    with tempfile.TemporaryDirectory() as tree:
        tree = Path(tree)
        runtime(tree / "static" / "pyodide")
        (tree / "jupyter-lite.json").write_text(json.dumps(SETTINGS))
        dark = {
            "@jupyterlab/apputils-extension:themes": {"adaptive-theme": True}
        }  # as the reader's system is
        (tree / "overrides.json").write_text(json.dumps(dark))
        (tree / "contents").mkdir()
        for name, nb in notebooks.items():
            (tree / "contents" / name).write_text(json.dumps(at_home(nb)), encoding="utf-8")
        apps = [x for app in ("lab", "notebooks", "repl", "tree") for x in ("--apps", app)]
        command = [
            sys.executable,
            "-m",
            "jupyterlite_core.app",
            "build",
            "--lite-dir",
            tree,
            "--output-dir",
            out,
        ]
        command += ["--contents", tree / "contents", "--no-sourcemaps", *apps]
        command += ["--ignore-sys-prefix", f"--LiteBuildConfig.federated_extensions={kernel()}"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode or not (out / "static" / "pyodide" / "pyodide.mjs").is_file():
        raise RuntimeError(f"JupyterLite was not built:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    for name in ("notebook", "busy-1", "busy-2", "busy-3", "file", "console", "terminal"):
        to = out / "static" / "favicons" / f"favicon-{name}.ico"  # asked for, and in no package
        to.parent.mkdir(exist_ok=True)
        shutil.copy2(out / "lab" / "favicon.ico", to)
