"""Writing a checkpoint to disk."""

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from postlocal.checkpoint import folder as folders
from postlocal.checkpoint import tensors
from postlocal.checkpoint.folder import Place
from postlocal.checkpoint.packing import digest
from postlocal.checkpoint.ranks import on_all_ranks
from postlocal.comm.agreement import ranks_named
from postlocal.comm.group import Alone, Group
from postlocal.errors import CheckpointError
from postlocal.version import __version__


class Writing:
    """Writes one checkpoint to disk.

    Args:
        place: its folders.
        group: all ranks.
        token: a name that no other attempt has, the same on all ranks.
    """

    def __init__(self, place: Place, group: Group, token: str) -> None:
        self.place = place
        self.group = group
        self.token = token
        self.final = place.folder(group.rank)
        self.partial = place.partial(group.rank, token)
        self.makes = group.rank == 0 or place.layout == "per-rank"  # whether it makes the folder

    def write(self, packed: Mapping[str, Any], strategy: str, keep: int) -> None:
        """Write all parts, rename them to their final names, then remove old checkpoints."""
        together = self.group if self.place.layout == "shared" else Alone()
        state = {part: plain for part, (plain, _) in packed.items()}
        stored = {key: tensor for _, found in packed.values() for key, tensor in found.items()}
        own = self.partial / f"{folders.rank_name(self.group.rank)}.json"
        self._everywhere(self._prepare)
        self._check_seen()
        self._everywhere(lambda: folders.write_json(own, state))
        self._everywhere(lambda: tensors.write(self.partial / folders.TENSORS, stored, together))
        self._everywhere(lambda: self._write_index(strategy))
        self._everywhere(self._publish)
        homes = {self.place.base / folders.rank_name(self.group.rank)}
        for home in homes | ({self.place.base} if self.group.rank == 0 else set()):
            folders.tidy(home, self.place.step, keep)

    def _everywhere(self, part: Callable[[], None]) -> None:
        on_all_ranks(self.group, part, f"cannot write checkpoint {self.place}:", self.final)

    def _prepare(self) -> None:
        if self.makes:
            folders.prepare(self.final, self.partial)

    def _check_seen(self) -> None:
        """Check that all ranks see the folder that rank 0 made."""
        seen = self.group.all_gather_object(folders.appears(self.partial))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            if self.makes:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise CheckpointError(
                f"folder {self.place.base} is not one that all ranks see: what rank 0 makes there "
                f"is not there for {ranks_named(blind)}; give one on a file system that they "
                'share, or save with layout="per-rank"',
                path=self.place.base,
                ranks=blind,
            )

    def _write_index(self, strategy: str) -> None:
        if not self.makes:
            return
        files = self.partial.glob("rank-*.json")
        index = {
            "format": folders.FORMAT,
            "id": self.token,
            "step": self.place.step,
            "world": self.group.size,
            "layout": self.place.layout,
            "strategy": strategy,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"postlocal": __version__, "torch": torch.__version__},
            "files": {file.name: digest(file.read_bytes()) for file in files},
        }
        folders.write_json(self.partial / folders.INDEX, index)

    def _publish(self) -> None:
        if self.makes:
            folders.publish(self.partial, self.final)
