"What all tests share"

import gc
import os
import sys

import pytest

os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15, workers on a busy machine wait for hours


@pytest.fixture(autouse=True, scope="module")
def at_home(request):
    "A file of tests begins where pytest was started, wherever the one before it has gone"
    os.chdir(request.config.invocation_params.dir)


def pytest_collection_finish():
    """Imported modules never become garbage; without this, a full collection walks through torch in the
    middle of a timed line"""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


STATUS = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Everything is reported: leave without tearing the interpreter down under the native threads of Ray,
    gRPC and vLLM, which has crashed after the last test had passed"""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    if STATUS not in config.stash:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash[STATUS])
