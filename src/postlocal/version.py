"""The version of postlocal."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("postlocal")
except PackageNotFoundError:  # the sources are on the path, and nothing is installed
    __version__ = "unknown"
