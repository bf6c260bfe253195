"""Results of runs, kept on disk once they are there."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar


class Keyed(Protocol):
    """The result of a run: a dataclass of plain values."""

    @property
    def key(self) -> str:
        """Everything that decides the result."""
        ...


Outcome = TypeVar("Outcome", bound=Keyed)


@dataclass(frozen=True)
class Cache(Generic[Outcome]):
    """Results on disk, one JSON object a line; of several with one key the last counts.

    Args:
        path: the file.
        kind: the dataclass of a result.
    """

    path: Path
    kind: Callable[..., Outcome]

    def read(self) -> dict[str, Outcome]:
        """Results by key."""
        if not self.path.exists():
            return {}
        rows = [self.kind(**json.loads(line)) for line in self.path.read_text().splitlines()]
        return {row.key: row for row in rows}

    def add(self, result: Outcome) -> None:
        """Append a result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fields: Any = result
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(fields)) + "\n")
