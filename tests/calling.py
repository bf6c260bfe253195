"""Commands of `postlocal`, called in this process."""

import sys
from collections.abc import Callable

import pytest

from postlocal.cli import main

Called = tuple[int, str, str]
"""Exit code, what it printed, and its errors."""


def calling(*first: str) -> Callable[..., Called]:
    """A function that calls a command with these words, and more."""

    def command(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
    ) -> Called:
        monkeypatch.setattr(sys, "argv", ["postlocal", *first, *words])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert isinstance(exit_.value.code, int)
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return command
