"""``python -m postlocal`` is the ``postlocal`` command."""

from postlocal.cli import main

main()
