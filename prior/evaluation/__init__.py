"""Both stages measured, and the sampling modes compared."""

from contextlib import chdir
from importlib import import_module
from pathlib import Path

# matplotlib obeys a file `matplotlibrc` in the folder that it is imported from, which may be anybody's. It is imported
# here, before torchmetrics imports it.
with chdir(Path(__file__).parent):
    import_module("matplotlib")
