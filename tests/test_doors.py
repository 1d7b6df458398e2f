"Where people come in: container, Binder, Codespaces, Colab, citation, releases; from the same locks, names"

import ast
import configparser
import functools
import importlib.util
import json
import re
import subprocess
from datetime import date
from pathlib import Path

import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TUTORIALS = sorted(p for part in ("tutorials", "figures") for p in (ROOT / "nbs" / part).glob("*.ipynb"))
GUIDES = sorted((ROOT / "nbs" / "guides").glob("*.ipynb"))
COLAB = "nbs/tutorials/quickstart.ipynb"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def settings():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read_string(text("settings.ini"))
    return ini["DEFAULT"]


@pytest.fixture(scope="module")
def citation():
    return yaml.safe_load(text("CITATION.cff"))


# ---- one name, one version, one licence


def test_citation_package_and_archive_agree(settings, citation):
    archive = json.loads(text(".zenodo.json"))
    assert citation["version"] == settings["version"]
    assert citation["title"] == archive["title"]
    assert (
        [a["name"] for a in citation["authors"]]
        == [a["name"] for a in archive["creators"]]
        == [settings["author"]]
    )
    assert citation["license"].lower() == archive["license"] == "apache-2.0"
    assert citation["keywords"] == archive["keywords"]
    assert isinstance(citation["date-released"], date)
    said = re.sub("<[^>]*>", "", archive["description"])
    assert citation["abstract"].strip() == said
    address = f"https://github.com/{settings['user']}/{settings['repo']}"
    assert citation["repository-code"] == address and address in text(".ci/badges.md")


def test_citation_has_what_the_format_requires(citation):
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation[
        "cff-version"
    ] == "1.2.0"
    [paper] = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and "2503.01307" in paper["url"]


def test_readme_begins_with_badges_that_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)$", text(".ci/badges.md"), re.M)
    assert len(links) == 6 and text(".ci/badges.md") in text("README.md")[:2000]
    for link in links:
        if found := re.search(r"actions/workflows/(\S+)$", link):
            assert (ROOT / ".github" / "workflows" / found[1]).is_file()
        elif COLAB.split("/")[-1] in link:
            assert COLAB in link and (ROOT / COLAB).is_file()
        elif not link.startswith("https://"):
            assert (ROOT / link).is_file()


# ---- the same locks


def test_container_copies_what_there_is_and_runs_what_make_knows():
    known = set(re.findall(r"^([\w./-]+):", text("Makefile"), re.M))
    for line in text("Dockerfile").splitlines():
        if line.startswith("COPY"):
            *sources, _ = [part for part in line.split()[1:] if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line
        for target in re.findall(r"\bmake ([\w./-]+)", line if line.startswith(("RUN", "CMD")) else ""):
            assert target in known, target


def test_the_container_leaves_out_nothing_that_git_tracks():
    "Else manifests would speak of uncommitted changes"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = [line for line in text(".dockerignore").splitlines() if line and line[0] != "#"]
    patterns = [f":(glob){p}" for p in ignored] + [f":(glob){p}/**" for p in ignored]
    tracked = subprocess.run(
        ["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ".venv*" in ignored and tracked.stdout == ""


def pins(name):
    "What pip reads from a file of requirements"
    from pip._internal.network.session import PipSession
    from pip._internal.req.req_file import parse_requirements

    return {r.requirement for r in parse_requirements(str(ROOT / name), PipSession())}


def test_every_place_has_the_tested_versions():
    cpu, lab, dev = (pins(f"requirements/{name}.lock") for name in ("cpu", "lab", "dev"))
    [widgets] = pins(".binder/requirements.txt") - cpu
    assert widgets.startswith("ipywidgets==") and cpu <= pins(".binder/requirements.txt")
    assert widgets in lab and lab <= dev and not lab & cpu and cpu <= dev
    assert any(pin.startswith("jupyterlab==") for pin in lab)
    assert (ROOT / ".binder" / "postBuild").stat().st_mode & 0o100
    assert text(".binder/runtime.txt").strip() == "python-3.11"


def test_codespaces_begin_as_a_checkout_does():
    container = json.loads(text(".devcontainer/devcontainer.json"))
    assert container["postCreateCommand"] == "make setup"
    assert all((ROOT / name).is_file() for name in container["customizations"]["codespaces"]["openFiles"])


@pytest.mark.parametrize("index", ["", "https://example.org/cpu"])
def test_pytorch_comes_from_another_index_where_one_is_named(index):
    "The default build brings 4 GB of libraries for GPUs"
    command = ["make", "-n", "-B", "setup", f"TORCH_INDEX={index}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "pip install" in line]
    if index:
        first = lines.pop(0)
        assert f"--index-url {index}" in first and "torch==" in first
    assert lines[0].endswith("-r requirements/cpu.lock")


# ---- workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_run_what_is_there(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = set(re.findall(r"^([\w./-]+):", text("Makefile"), re.M))
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            run = step.get("run", "")
            assert all(target in known for target in re.findall(r"\bmake ([a-z-]+)", run)), run
            for name in re.findall(r"(?<![\w/])((?:tests|\.ci)/[\w./]+)", run):
                assert (ROOT / name).exists(), name
            assert subprocess.run(["bash", "-n"], input=run, text=True).returncode == 0


def parses(line):
    "Does the parser of the named command, and no other, accept a command line?"
    import shlex

    import tyro

    from stars.cli import main as cli

    def stub(name, command):
        @functools.wraps(command)
        def called(*args, **kwargs):
            seen.append(name)

        return called

    seen, args = [], shlex.split(line)[1:]
    stubs = {name: stub(name, command) for name, command in cli.COMMANDS.items()}
    tyro.extras.subcommand_cli_from_dict(stubs, prog="stars", args=cli.checked(args))
    return seen == args[:1]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "Dockerfile"], ids=lambda p: p.name)
def test_commands_that_machines_run_parse(path):
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"\b(stars (?:export|figure|data|reproduce) [^\n&]*)", lines):
        assert parses(line), line


# ---- Colab


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_begins_by_installing_the_package_where_it_is_absent(path, monkeypatch):
    source = code_cells(path)[0]
    code = compile(ast.parse(TransformerManager().transform_cell(source)), "cell", "exec")
    ran = []

    class Shell:
        def run_line_magic(self, name, line, **_):
            ran.append((name, line))

        def system(self, line):
            ran.append(("!", line))

    def run():
        ran.clear()
        exec(code, dict(get_ipython=Shell))
        return list(ran)

    assert run() == []  # it is there: nothing happens
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "stars" else found(n, *a))
    *before, (how, what) = run()
    assert how == "pip" and "https://github.com/stars-contributors/stars" in " ".join(
        line for _, line in run()
    )
    where = str(path.parent.relative_to(ROOT))
    assert not before or (before[1] == ("cd", f"-q stars/{where}") and what.startswith('install -q "../..'))
    reads_files = any("../data/" in source for source in code_cells(path))
    assert bool(before) >= reads_files  # what lies beside the notebook comes along


# ---- what the paper's authors released


def test_the_guide_turns_their_sets_into_files_that_stages_read(tmp_path, monkeypatch):
    "Its own lines, with rows of the columns that their sets have, up to the set that SFT would train on"
    datasets = pytest.importorskip("datasets")
    from stars.habits.priming import read_rows
    from stars.lab import experiments as ex
    from stars.lab.configs import preset
    from stars.lab.stages import Job

    guide = json.loads(text("nbs/guides/own_model.ipynb"))["cells"]
    [lines] = re.findall(r"```python\n(.*?)```", "\n".join("".join(c["source"]) for c in guide), re.S)
    asked = []

    def load_dataset(name, split):
        asked.append(name)
        row = dict(query="using 3 , 4 , 10 make 34 : <think>", completion=" 10 * 3 = 30 , 30 + 4 = 34 .")
        rows = [row] * 40 + [row | dict(completion="")]
        return datasets.Dataset.from_list([row | dict(id=str(i)) for i, row in enumerate(rows)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert asked == ["obiwan96/owm-cog-behaviors", "obiwan96/owm-no-behaviors"]
    for condition in ("curated", "negated"):
        job = Job(preset("smoke", **{"curation.file": "theirs"}), "plain", condition, progress=False)
        folder = ex.prime_stage(job)
        rows = [read_rows(folder / f"{part}.parquet") for part in ("train", "val")]
        assert [len(r) for r in rows] == [38, 2] and {r["mix"] for part in rows for r in part} == {condition}


def blocks_of(path):
    "What a guide tells to type"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return re.findall(r"```sh\n(.*?)```", "\n".join("".join(c["source"]) for c in cells), re.S)


def test_containers_run_an_image_that_the_guide_makes():
    "Built or fetched: under the name that is run"
    lines = "\n".join(blocks_of(ROOT / "nbs" / "guides" / "commands.ipynb"))
    built, pulled = re.findall(r"docker build -t (\S+)", lines), re.findall(r"docker pull (\S+)", lines)
    tagged = dict(re.findall(r"docker tag (\S+) (\S+)", lines))
    ran = re.findall(r"docker run (?:--?\S+ |\"[^\"]*\" )*([\w./:-]+) ", lines)
    assert ran and set(ran) == set(built) == {tagged[name] for name in pulled}


def test_what_a_container_computes_is_in_no_commit_and_no_image():
    "`docker run` fills a folder of the checkout"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folders = re.findall(
        r'-v "\$PWD/(\w+)/', "\n".join(blocks_of(ROOT / "nbs" / "guides" / "commands.ipynb"))
    )
    assert folders and set(folders) <= set(text(".dockerignore").split())
    for folder in folders:
        asked = ["git", "check-ignore", "-q", f"{folder}/runs/x"]
        assert subprocess.run(asked, cwd=ROOT).returncode == 0, folder


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_commands_of_the_guides_parse(path):
    for line in "\n".join(blocks_of(path)).replace("\\\n", " ").splitlines():
        for command in re.findall(r"(?:^|&& )(?:\w+=\S+ )*(stars [a-z]\w* ?[^#&]*)", line):
            assert parses(command), command


def test_a_kernel_without_widgets_is_quiet(tmp_path):
    "`make setup` installs none, and each figure would say so"
    import nbformat

    from stars.lab.notebooks import run_notebook

    hide = "import sys\nsys.modules['ipywidgets'] = None\n"
    look = "import warnings\nwith warnings.catch_warnings(record=True) as seen:\n    import stars.rl.sft\n"
    cells = [nbformat.v4.new_code_cell("", metadata=dict(tags=["parameters"]))]
    cells.append(nbformat.v4.new_code_cell(hide + look + "[str(w.message) for w in seen]"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    done = nbformat.read(run_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb"), as_version=4)
    [result] = done.cells[-1].outputs
    assert result.data["text/plain"] == "[]"
