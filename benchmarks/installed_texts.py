"""A real text corpus for `stars label`, wherever one happens to be: the documentation of the installed
packages.

    python benchmarks/installed_texts.py OUT.parquet [FOLDER ...]

Docstrings of modules, classes and functions, blocks of comments in Python, C and C++ files, and .md, .rst
and .txt files, each text once; columns `text` and `source`. Folders: site-packages and the standard library
unless given. A file that cannot be read or parsed is left out and counted.
"""

import argparse
import ast
import hashlib
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stars.util.files import replacing

C_COMMENT = re.compile(r"/\*+(.*?)\*/|((?:^[ \t]*//[^\n]*\n){2,})", re.S | re.M)
LARGEST = 3_000_000  # bytes of a file; larger ones are data


def docstrings(code: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            doc := ast.get_docstring(node)
        ):
            yield doc


def comments(path: Path) -> Iterator[str]:
    "Blocks of neighbouring comment lines in a Python file"
    block, last = [], -1
    with tokenize.open(path) as f:
        for t in tokenize.generate_tokens(f.readline):
            if t.type != tokenize.COMMENT:
                continue
            if t.start[0] != last + 1 and block:
                yield "\n".join(block)
                block = []
            block.append(t.string.lstrip("# "))
            last = t.start[0]
    if block:
        yield "\n".join(block)


def texts_of(path: Path) -> Iterator[str]:
    "Everything in a file that was written for people"
    kind = path.suffix.lower()
    if kind == ".py":
        yield from docstrings(path.read_bytes())
        yield from comments(path)
    elif kind in (".h", ".hpp", ".cuh", ".c", ".cpp", ".cu", ".pyx"):
        for m in C_COMMENT.finditer(path.read_text("utf-8")):
            yield re.sub(r"^[ \t]*(?://+|\*+) ?", "", m[1] or m[2], flags=re.M).strip()
    elif kind in (".md", ".rst", ".txt") or path.name == "METADATA":
        yield path.read_text("utf-8")


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("out", type=Path)
    args.add_argument(
        "folders", type=Path, nargs="*", default=[Path(sysconfig.get_path(p)) for p in ("purelib", "stdlib")]
    )
    a = args.parse_args()
    warnings.simplefilter("ignore")  # of other people's code
    seen, rows, size, failed = set(), [], 0, 0
    schema = pa.schema([("text", pa.string()), ("source", pa.string())])
    files = sorted(
        {
            p
            for folder in a.folders
            for p in folder.rglob("*")
            if p.is_file() and not p.is_symlink() and p.stat().st_size < LARGEST
        }
    )
    with replacing(a.out) as tmp, pq.ParquetWriter(tmp, schema) as out:
        for path in tqdm(files, unit=" files"):
            try:
                found = list(texts_of(path))
            except (
                SyntaxError,
                ValueError,
                RecursionError,
                OSError,
                tokenize.TokenError,
            ):  # UnicodeDecodeError is a ValueError
                failed += 1
                continue
            for text in found:
                key = hashlib.sha256(text.encode("utf-8", "replace")).digest()
                if len(text) < 80 or key in seen:
                    continue
                seen.add(key)
                size += len(text)
                rows.append(dict(text=text.encode("utf-8", "replace").decode(), source=path.name))
            if len(rows) >= 5_000:
                out.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        out.write_table(pa.Table.from_pylist(rows, schema))
    print(
        f"{a.out}: {len(seen):,} texts, {size / 1e6:.1f} million characters; {failed:,} files could not be "
        f"read",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
