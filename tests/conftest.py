"What all tests share"
import gc

def pytest_collection_finish():
    "Imported modules never become garbage; without this, a full collection walks through torch in the middle of a timed line"
    gc.collect()
    gc.freeze()
