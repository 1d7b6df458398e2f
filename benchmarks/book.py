"""How the book reads: sizes of exported cells, prose beside code, density, names, parameters. A table per
part and over all.

python benchmarks/book.py [--worst 20] [--only rl/] [--check]
"""

import argparse
import ast
import io
import json
import re
import statistics
import tokenize
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = 40  # lines: no exported cell is longer, but for data
WIDE = 110  # characters of a line
MANY = 8  # parameters of a function
README_WORDS = 900


def source(cell):
    return "".join(cell["source"])


def exported_code(text):
    "A cell's code without its directives, or None if it is not exported"
    if not re.search(r"^#\|\s*export\b", text, re.M):
        return None
    return "\n".join(line for line in text.split("\n") if not line.startswith("#|")).strip()


def code_lines(code):
    return [line for line in code.split("\n") if line.strip()]


def is_data(tree):
    "Nothing but assignments of literals: a table, not code"
    return all(isinstance(n, ast.Assign | ast.AnnAssign) for n in tree.body) and not any(
        isinstance(n, ast.Lambda | ast.comprehension) for n in ast.walk(tree)
    )


def is_imports(tree):
    return all(isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body)


def parameters(function):
    "Named parameters, without self and cls"
    names = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [a.arg for a in names if a.arg not in ("self", "cls")]


def nodes(tree):
    "Syntax nodes that a reader has to take in: no contexts, no docstrings"
    skipped = (ast.Load, ast.Store, ast.Del, ast.Module)
    return sum(not isinstance(n, skipped) for n in ast.walk(tree))


def tokens_only(code):
    "Lines that hold more than comments"
    seen = set()
    for t in tokenize.generate_tokens(io.StringIO(code).readline):
        if t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            seen.update(range(t.start[0], t.end[0] + 1))
    return len(seen)


def measures(path):
    "What one chapter holds"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = sum(len(re.findall(r"\w+", source(c))) for c in cells if c["cell_type"] == "markdown")
    found = []
    for c in cells:
        code = exported_code(source(c)) if c["cell_type"] == "code" else None
        if code:
            tree = ast.parse(code)
            if not is_imports(tree):
                found.append(dict(path=path, id=c.get("id"), code=code, tree=tree, data=is_data(tree)))
    return prose, found


def chapters(folder):
    "Notebooks that export a module"
    for path in sorted(folder.rglob("*.ipynb")):
        hidden = any(p.startswith((".", "_")) for p in path.relative_to(folder).parts)
        if not hidden and "default_exp" in path.read_text(encoding="utf-8"):
            yield path


def row(paths):
    "The measures of several chapters together"
    prose, cells = 0, []
    for p in paths:
        words, found = measures(p)
        prose, cells = prose + words, cells + found
    lines = [line for c in cells for line in code_lines(c["code"])]
    code = [c for c in cells if not c["data"]]
    sizes = [len(code_lines(c["code"])) for c in code]
    defs = (ast.FunctionDef, ast.ClassDef)
    functions = [n for c in cells for n in ast.walk(c["tree"]) if isinstance(n, ast.FunctionDef)]
    lambdas = [
        n
        for c in cells
        for n in ast.walk(c["tree"])
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)
    ]
    return {
        "chapters": len(paths),
        "exported lines": len(lines),
        "cells": len(cells),
        "median lines": statistics.median(sizes),
        "longest": max(sizes),
        f"over {LONG}": sum(s > LONG for s in sizes),
        "definitions per cell": sum(isinstance(n, defs) for c in code for n in c["tree"].body) / len(code),
        "prose per line": prose / len(lines),
        "nodes per line": sum(nodes(c["tree"]) for c in code) / sum(tokens_only(c["code"]) for c in code),
        f"over {WIDE} wide": sum(len(line) > WIDE for line in lines) / len(lines),
        "letters of a name": statistics.median(len(n.name.strip("_")) for n in functions) if functions else 0,
        f"over {MANY} parameters": sum(len(parameters(n)) > MANY for n in functions),
        "named lambdas": len(lambdas),
    }


def table(rows):
    names = list(next(iter(rows.values())))
    text = [f"| part | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for part, values in rows.items():
        shown = (f"{v:.1f}" if isinstance(v, float) and v >= 1 else f"{v:.3g}" for v in values.values())
        text.append(f"| {part} | {' | '.join(shown)} |")
    return "\n".join(text)


def worst(paths, count):
    "The longest cells"
    cells = [c for p in paths for c in measures(p)[1] if not c["data"]]
    ranked = sorted(cells, key=lambda c: -len(code_lines(c["code"])))[:count]
    return [f"{len(code_lines(c['code'])):4} {c['path'].relative_to(ROOT)} {c['id']}" for c in ranked]


def too_much(everything, readme):
    "What a reader should be spared, in words"
    measured = row(everything)
    limits = (f"over {LONG}", f"over {MANY} parameters", "named lambdas")
    found = [f"{measured[name]} × {name}" for name in limits if measured[name]]
    if len(readme.split()) > README_WORDS:
        found.append(f"README.md has more than {README_WORDS} words")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worst", type=int, default=0, help="also the longest cells, this many")
    parser.add_argument("--only", default="", help="only chapters whose path holds this")
    parser.add_argument("--check", action="store_true", help="fail where a limit is passed")
    args = parser.parse_args()
    parts = defaultdict(list)
    for path in chapters(ROOT / "nbs"):
        if args.only in str(path):
            parts[str(path.relative_to(ROOT / "nbs").parent)].append(path)
    everything = [p for paths in parts.values() for p in paths]
    rows = {part: row(paths) for part, paths in parts.items()} | {"all": row(everything)}
    print(table(rows))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    print(f"\nREADME: {len(readme.split())} words")
    print(*worst(everything, args.worst), sep="\n")
    if args.check and (found := too_much(everything, readme)):
        raise SystemExit("; ".join(found) + ": cut it, or see --worst")


if __name__ == "__main__":
    main()
