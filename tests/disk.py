"""Every call by which a process changes files: counted, and made to fail at a chosen one

Python, safetensors and tokenizers (Rust), pyarrow (C++) and SQLite (C) all write through a few functions of
the C library. `watch` puts functions of ours into the tables by which every loaded library finds those, so
that nothing that is written slips by, whoever writes it. Linux on 64 bits; nothing needs to be compiled.
"""

import ctypes
import errno
import fcntl
import os
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

KINDS = dict(
    error="the call fails, once, as on a damaged disk",
    full="half of what is written finds room; from then on nothing does",
    ends="the process is killed there, with half of the write on the disk",
    power="the power fails there: so is everybody killed, and what was not flushed is lost",
)

INT, SIZE, OFFSET = ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
TEXT, POINTER = ctypes.c_char_p, ctypes.c_void_p
CALLS = {  # of the C library: what they do, and their arguments
    "write": ("write", INT, POINTER, SIZE),
    "writev": ("write", INT, POINTER, INT),
    "pwrite": ("write", INT, POINTER, SIZE, OFFSET),
    "pwrite64": ("write", INT, POINTER, SIZE, OFFSET),
    "ftruncate": ("cut", INT, OFFSET),
    "ftruncate64": ("cut", INT, OFFSET),
    "fsync": ("flush", INT),
    "fdatasync": ("flush", INT),
    "open": ("create", TEXT, INT, INT),
    "open64": ("create", TEXT, INT, INT),
    "openat": ("create", INT, TEXT, INT, INT),
    "openat64": ("create", INT, TEXT, INT, INT),
    "mkdir": ("create", TEXT, INT),
    "mkdirat": ("create", INT, TEXT, INT),
    "rename": ("rename", TEXT, TEXT),
    "renameat": ("rename", INT, TEXT, INT, TEXT),
    "renameat2": ("rename", INT, TEXT, INT, TEXT, INT),
    "unlink": ("unlink", TEXT),
    "unlinkat": ("unlink", INT, TEXT, INT),
    "rmdir": ("unlink", TEXT),
}
SIZED = ("write", "pwrite", "pwrite64", "writev")  # they return a number of bytes
AT_PRESENT = -100  # instead of a folder: the present one (AT_FDCWD)


# Tables of functions


class _Library(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("name", TEXT),
        ("headers", POINTER),
        ("n_headers", ctypes.c_uint16),
    ]


HEADER = np.dtype(
    [
        ("type", "u4"),
        ("flags", "u4"),
        ("offset", "u8"),
        ("at", "u8"),
        ("_", "u8"),
        ("file_size", "u8"),
        ("size", "u8"),
        ("align", "u8"),
    ]
)
ENTRY = np.dtype([("tag", "i8"), ("value", "u8")])
SYMBOL = np.dtype(
    [("name", "u4"), ("info", "u1"), ("other", "u1"), ("section", "u2"), ("at", "u8"), ("size", "u8")]
)
SLOT = np.dtype([("at", "u8"), ("info", "u8"), ("plus", "i8")])


def memory(address, dtype, n):
    "What lies there, in place"
    return np.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(address), dtype)


def libraries() -> list[tuple[str, int, np.ndarray]]:  # name, where it lies, its headers
    "What this process has loaded"
    found = []

    @ctypes.CFUNCTYPE(INT, ctypes.POINTER(_Library), SIZE, POINTER)
    def note(lib, size, _):
        found.append((lib[0].name.decode(), lib[0].base, memory(lib[0].headers, HEADER, lib[0].n_headers)))
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(note, None)
    return found


DYNAMIC, STRINGS, SYMBOLS, STRINGS_SIZE = 2, 5, 6, 10  # a kind of header, and entries of its table
SLOTS = ((7, 8), (23, 2))  # entries: slots filled when a library is loaded, or when needed; their sizes


def slots(
    base: int, headers: np.ndarray, names: set[str]
) -> list[tuple[str, int]]:  # name, where its address is
    "Where a library keeps the addresses of functions that it takes from others"
    found = headers[headers["type"] == DYNAMIC]
    if not len(found):
        return []
    table = memory(base + int(found[0]["at"]), ENTRY, int(found[0]["size"]) // ENTRY.itemsize)
    entries = {int(e["tag"]): int(e["value"]) for e in table[: int(np.argmax(table["tag"] == 0))]}
    if not {STRINGS, SYMBOLS, STRINGS_SIZE} <= entries.keys():
        return []

    def at(tag):
        return entries[tag] + (base if entries[tag] < base else 0)  # some systems have added it

    strings, starts = ctypes.string_at(at(STRINGS), entries[STRINGS_SIZE]), {}
    for name in names:
        i, wanted = -1, name.encode() + b"\0"
        while (i := strings.find(wanted, i + 1)) >= 0:
            starts[i] = name  # "write" may be the end of "pwrite"
    out = []
    for tag, size in SLOTS:
        if tag not in entries:
            continue
        every = memory(at(tag), SLOT, entries[size] // SLOT.itemsize)
        index = (every["info"] >> np.uint64(32)).astype(int)
        used = (index > 0) & (every["plus"] == 0)
        symbols = memory(at(SYMBOLS), SYMBOL, int(index.max(initial=0)) + 1)[index[used]]
        out += [
            (starts[int(s["name"])], base + int(slot["at"]))
            for s, slot in zip(symbols, every[used])
            if s["section"] == 0 and int(s["name"]) in starts
        ]  # section 0: it comes from another library
    return out


def replace(functions: dict[str, int]) -> int:  # how many pointers were changed
    "Put other functions into the tables of all libraries"
    libc, page, n = ctypes.CDLL(None, use_errno=True), os.sysconf("SC_PAGESIZE"), 0
    for name, base, headers in libraries():
        for function, at in slots(base, headers, set(functions)):
            if libc.mprotect(POINTER(at // page * page), SIZE(page), 3):  # to be read and written
                raise OSError(ctypes.get_errno(), "its table of functions cannot be changed", name)
            ctypes.c_uint64.from_address(at).value = functions[function]
            n += 1
    return n


# One folder


def size_of(name: str, args: tuple) -> int:
    "Bytes that a call would write"
    if name != "writev":
        return args[2]
    pieces = (ctypes.c_size_t * (2 * args[2])).from_address(args[1])  # where, how many, where, how many …
    return sum(pieces[1::2])


def some_of(name: str, args: tuple, n: int) -> int:
    "Write the first bytes only"
    if name != "writev":
        return REAL[name](*args[:2], n, *args[3:])
    pieces = (ctypes.c_size_t * (2 * args[2])).from_address(args[1])
    return os.write(args[0], b"".join(map(ctypes.string_at, pieces[::2], pieces[1::2]))[:n])


def paths_of(name: str, args: tuple) -> list[str]:
    "The files that a call is about"
    if CALLS[name][0] in ("write", "cut", "flush"):
        return [os.readlink(f"/proc/self/fd/{args[0]}")]
    out, types = [], CALLS[name][1:]
    for i, a in enumerate(args):
        if types[i] is not TEXT:
            continue
        folder = args[i - 1] if i and types[i - 1] is INT else AT_PRESENT
        where = os.getcwd() if folder == AT_PRESENT else os.readlink(f"/proc/self/fd/{folder}")
        out.append(os.path.join(where, os.fsdecode(a)))
    return [os.path.join(os.path.realpath(os.path.dirname(p)), os.path.basename(p)) for p in out]


def creates(name: str, args: tuple) -> bool:
    "Does `open` make a file, or empty one?"
    path, flags = (a := args[isinstance(args[0], int) :])[0], a[1]
    return bool(flags & os.O_TRUNC or flags & os.O_CREAT and not os.path.lexists(path))


def changes(name: str, path: str) -> bool:
    "Is there what is to be removed, and not yet what is to be made?"
    if name.startswith("mkdir"):
        return not os.path.lexists(path)
    return CALLS[name][0] != "unlink" or os.path.lexists(path)


@dataclass
class Disk:
    "The disk under one folder, as a process sees it"

    root: str = ""  # the folder, by its true path; "": nothing is watched
    kind: str = ""  # one of `KINDS`
    at: int = 0  # number of the call that meets the fault, from 1; 0: none does
    calls: list = field(default_factory=list)  # (what, path in the folder, bytes) of each so far
    unflushed: dict = field(default_factory=dict)  # file → what it held: (offset, bytes, size), oldest first
    written: Counter = field(default_factory=Counter)  # file → bytes that were written to it
    full: bool = False  # nothing finds room any more
    busy: int = 0  # thread that is in one of our own functions
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, name: str, args: tuple) -> int:
        "What the process gets instead of the C library's function"
        what, real = CALLS[name][0], REAL[name]
        if name.startswith("open") and not creates(name, args):
            return real(*args)
        paths = [p for p in paths_of(name, args) if p.startswith(self.root + os.sep)]
        if not paths or not changes(name, paths[0]):
            return real(*args)
        size = size_of(name, args) if what == "write" else 0
        self.calls.append((what, " → ".join(os.path.relpath(p, self.root) for p in paths), size))
        if len(self.calls) == self.at:
            if self.kind == "error":
                return failed(errno.EIO)
            if self.kind in ("ends", "power"):
                self.end(name, args, size)
            self.full = True
            if what == "write" and size > 1:
                return some_of(name, args, size // 2)
            if what != "unlink":
                return failed(errno.ENOSPC)
        if self.full and what in ("write", "create"):
            return failed(errno.ENOSPC)
        if what in ("write", "cut", "create"):
            self.remember(name, args, paths[0], size)
        if what == "write":
            self.written[key(os.fstat(args[0]))] += size
        if what != "flush":
            return real(*args)
        self.unflushed.pop(key(os.fstat(args[0])), None)  # that is all: the machine's own disk need not wait
        return 0

    def remember(self, name: str, args: tuple, path: str, size: int):
        "Keep what a file holds where it is about to be changed"
        if CALLS[name][0] != "create":
            path = f"/proc/self/fd/{args[0]}"
        elif not os.path.isfile(path):
            return
        now = os.stat(path)
        if name.startswith("pwrite"):
            start = args[3]
        elif name.startswith("ftruncate"):
            start, size = args[1], now.st_size
        elif name.startswith("open"):
            start, size = 0, now.st_size
        elif fcntl.fcntl(args[0], fcntl.F_GETFL) & os.O_APPEND:
            start = now.st_size
        else:
            start = os.lseek(args[0], 0, os.SEEK_CUR)
        with open(path, "rb") as f:
            f.seek(start)
            self.unflushed.setdefault(key(now), []).append((start, f.read(size), now.st_size))

    def end(self, name: str, args: tuple, size: int):
        "Half of a write, and no more"
        if self.kind == "ends" and size > 1:
            some_of(name, args, size // 2)
        if self.kind == "power":
            self.lose()
        os._exit(KILLED)

    def lose(self):
        "What was not flushed goes, as if it had never been written. (Names are taken to be there at once)"
        for path in (os.path.join(folder, n) for folder, _, names in os.walk(self.root) for n in names):
            for start, old, size in reversed(self.unflushed.get(key(os.stat(path)), ())):
                with open(path, "r+b") as f:
                    f.seek(start)
                    f.write(old)
                    f.truncate(size)


def key(s: os.stat_result) -> tuple[int, int]:
    return s.st_dev, s.st_ino


def failed(error: int) -> int:
    ctypes.set_errno(error)
    return -1


def ours(disk: Disk, name: str):
    "A C function that asks the disk first"
    _, *types = CALLS[name]

    @ctypes.CFUNCTYPE(ctypes.c_ssize_t if name in SIZED else INT, *types, use_errno=True)
    def call(*args):
        if not disk.root or disk.busy == threading.get_ident():
            return REAL[name](*args)
        with disk.lock:
            disk.busy = threading.get_ident()
            try:
                return disk.call(name, args)
            except BaseException:
                traceback.print_exc()
                os._exit(BROKEN)
            finally:
                disk.busy = 0

    return call


KILLED, BROKEN = 9, 99  # exit statuses: by a fault, by a mistake in this file
REAL = {name: getattr(ctypes.CDLL(None, use_errno=True), name) for name in CALLS}
for _name, (_, *_types) in CALLS.items():
    REAL[_name].argtypes, REAL[_name].restype = _types, ctypes.c_ssize_t if _name in SIZED else INT


def watch(
    disk: Disk,  # given a root later, in the process that is to meet a fault
) -> Callable[[], None]:  # to be called when more libraries were loaded
    "Let a disk stand between this process and its files"
    functions = {name: ours(disk, name) for name in CALLS}

    def again():
        replace({name: ctypes.cast(f, POINTER).value for name, f in functions.items()})

    again()
    return again
