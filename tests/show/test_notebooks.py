"Figure notebooks: what a reader meets on a code host, and what the executed copies hold"

import json
import re
from pathlib import Path

import pytest

from stars.cli.drawing import for_readers
from stars.lab.notebooks import notebook_defaults, parameter_cell

NOTEBOOKS = sorted(Path("nbs/figures").glob("fig_*.ipynb"))
EXECUTED = sorted(Path("figures/cpu").glob("fig_*.ipynb"))


def cells(path):
    return [c | dict(source="".join(c["source"])) for c in json.loads(path.read_text("utf-8"))["cells"]]


def tagged(path, tag):
    return [c for c in cells(path) if tag in c["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_picture_and_says_what_became_of_the_claim(path):
    (picture,) = tagged(path, "committed")
    for linked in re.findall(r"\]\((\S+?)\)", picture["source"]):
        assert (path.parent / linked).is_file()
    found = cells(path)
    assert found[1]["source"] == picture["source"]
    order = [c["source"].split("\n")[0] for c in found if c["source"].startswith("## ")]
    assert order.index("## Picture") + 1 == order.index("## In words")
    assert "refute" in next(c["source"] for c in found if c["source"].startswith("## In words"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_explain_themselves(path):
    source, defaults = parameter_cell(path), notebook_defaults(path)
    assert 0 not in [x for x in defaults.values() if not isinstance(x, bool | list)]  # None means "all"
    for condition in defaults.get("conditions", []):
        assert re.search(rf'"{condition}",  # \w', source)
    assert re.search(r"overrides = \{\}  # .*e\.g\. \{", source)


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_outputs_hold_no_warnings(path):
    for c in cells(path):
        for output in c.get("outputs", []):
            text = "".join(output.get("text", []))
            assert output.get("name") != "stderr" and "Warning" not in text and "/site-packages/" not in text


def test_an_executed_copy_shows_its_own_picture_only(tmp_path):
    done = tmp_path / "fig_gap.ipynb"
    for_readers(Path("nbs/figures/fig_gap.ipynb"), done)
    assert not tagged(done, "committed") and tagged(done, "parameters")
    assert len(cells(done)) == len(cells(Path("nbs/figures/fig_gap.ipynb"))) - 1
