"""Figures by matplotlib; the extra ``postlocal[plot]`` installs it.

matplotlib is imported when a figure is drawn, so `import postlocal` and runs without plots do not
load it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require() -> None:
    """Check that figures can be drawn.

    Raises:
        ImportError: if matplotlib cannot be imported.
    """
    new_figure(1, 1)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure with constrained layout, which `savefig` writes without a display.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ImportError: if matplotlib cannot be imported.

    Example:
        >>> figure = new_figure(8, 4.5)
        >>> figure.subplots().set_xlabel("bandwidth (bit/s)")
        Text(0.5, 0, 'bandwidth (bit/s)')
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"plots need matplotlib ({error}): pip install 'postlocal[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
