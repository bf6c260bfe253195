"""Tensors of a checkpoint, in files of torch.distributed.checkpoint."""

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from postlocal.checkpoint.folder import Damaged
from postlocal.checkpoint.packing import empty, key_of
from postlocal.comm.group import Group, Processes


def write(folder: Path, tensors: dict[str, Tensor], group: Group) -> None:
    """Write tensors by key, shared ones once; collective.

    Args:
        folder: to write to.
        tensors: those of this rank.
        group: the ranks that write together; `Alone`: this rank.
    """
    if isinstance(group, Processes):
        save_tensors(tensors, checkpoint_id=folder, process_group=group.process_group)
        return
    with _alone():
        save_tensors(tensors, checkpoint_id=folder, no_dist=True)


def read(folder: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by key, on CPU.

    Raises:
        Damaged: if one is missing, or differs from what was written.
    """
    tensors = {key: empty(key) for key in keys}
    try:
        reader = _Reader(folder)
        reader.read_metadata()  # torch logs a traceback where this fails; here it is one line
        with _alone():
            load_tensors(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"its tensors cannot be read: {reason}") from error
    for key, tensor in tensors.items():
        if key_of(tensor) != key:
            raise Damaged(f"tensor {key} is damaged")
    return tensors


@contextmanager
def _alone() -> Iterator[None]:
    """Suppresses torch's warning about a single process, which ``no_dist`` does not suppress."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Reader(FileSystemReader):
    """torch's reader, with an index that can contain only torch's plain classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _PlainUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    _PLAIN: Mapping[str, Sequence[str]] = {
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "pathlib": ("PosixPath", "WindowsPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self._PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of tensors refers to {module}.{name}")
