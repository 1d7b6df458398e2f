"Limits on work, not on the time that passes: a busy machine does not use them up"

import signal
from contextlib import contextmanager


@contextmanager
def ends(
    seconds=60,  # of this process's CPU time, a hundred times what is needed
    what="this",  # for the message
):
    "Stop what never ends, or ends only after a time that grows with the square of its input"

    def stop(*_):
        raise AssertionError(f"{what}: no end after {seconds:g} seconds of computing")

    was = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # regular expressions look for signals while they search
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)


@contextmanager
def tuples_at_most(
    n,  # tuples of numbers
):
    "Raise an error where the search for problems looks at more"
    from stars.task import problems

    left, look = [n], problems._accepted

    def counted(space, seed, k, targets, positions):
        left[0] -= len(positions)
        assert left[0] >= 0, f"more than {n:,} tuples were tried"
        return look(space, seed, k, targets, positions)

    problems._accepted = counted
    try:
        yield
    finally:
        problems._accepted = look
