__version__ = "0.1.0"

import os

# PyTorch's threads wait for each other by spinning. For as long as they do by default, they starve whatever else runs, themselves included;
# for this long, nothing is lost on an idle machine. It counts before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ: os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# tqdm warns wherever there is Jupyter's kernel without its widgets, as when `stars` draws a figure: text will do.
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")
