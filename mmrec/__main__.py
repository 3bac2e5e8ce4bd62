"""``python -m mmrec``."""

from importlib import import_module

# By name, because the library knows nothing of its command line.
import_module("mmrec.cli.main").run()
