"""Compiles the arithmetic of blocks once a machine, and loads it in every process after.

A process of its own compiles (torch's compiler switches global state that training in other threads
would see), ahead of time, into a cache folder: ``$XDG_CACHE_HOME/postlocal/kernels``. What is there
is used by all processes, whatever their tensors' sizes. A compiler that fails is noted there too,
so that no other process waits for the next one.

The key of an entry is what its kernels are made of: the codec and its arguments, the syntax trees
of its arithmetic, torch, the compiler and the processor. Comments and docstrings are no part of it.
"""

import ast
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from postlocal.torch_versions import compile_ahead, load_compiled

if TYPE_CHECKING:
    from postlocal.codec.blockwise import Blockwise

_SECONDS = 900  # a compiler that takes longer has failed
_EXAMPLE = 2**16  # elements of the example; the number of blocks is left open


class CompileError(RuntimeError):
    """Why nothing is compiled.

    Attributes:
        remedy: what makes it work.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True)
class Kernels:
    """Compiled functions; blocks have shape ``(n, block)``, codes ``(n, block / packed)``.

    Attributes:
        encode: ``blocks, codes`` to ``[parameters]``, of shape ``(n, parameters)``; writes codes.
        decode: ``parameters, codes, *sections of blocks``; writes blocks.
        accumulate: the same and a weight, fp32, shape ``()``; adds to blocks.
    """

    encode: Callable[..., list[Tensor]]
    decode: Callable[..., list[Tensor]]
    accumulate: Callable[..., list[Tensor]]


def compiled(codec: "Blockwise", dtype: torch.dtype, device: str) -> Kernels:
    """The functions of a codec for values of a dtype on a device, compiled if they are not yet.

    Raises:
        CompileError: if there is no compiler, or it fails, now or earlier on this machine, or the
            cache folder cannot be written.
    """
    request = _request(codec, dtype, device)
    key = f"{_machine()} {made_of(type(codec))} {request}"
    folder = _cache() / hashlib.sha256(key.encode()).hexdigest()[:24]
    failure = folder.with_suffix(".failed")
    if not folder.exists():
        with _alone(folder.with_suffix(".lock")):
            if failure.exists():
                raise CompileError(failure.read_text(), f"mend that, and delete {failure}")
            if not folder.exists():
                _build(request, folder, failure)
    return Kernels(*(_load(folder / f"{field.name}.pt2") for field in fields(Kernels)))


def _request(codec: "Blockwise", dtype: torch.dtype, device: str) -> str:
    """What the compiling process is told, as text."""
    recipe = {"codec": type(codec).__name__, "arguments": asdict(codec)}  # type: ignore[call-overload]
    return json.dumps(recipe | {"dtype": str(dtype).removeprefix("torch."), "device": device})


def _cache() -> Path:
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "postlocal" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        raise CompileError(
            f"no folder for what is compiled: {error}", "set XDG_CACHE_HOME to one"
        ) from error
    return folder


@cache
def _machine() -> str:
    """What compiled code depends on beside its source: torch, compiler and processor."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        raise CompileError(
            "there is no C++ compiler", "install one, such as g++, or set CXX to one"
        )
    version = subprocess.run([path, "--version"], capture_output=True, check=False)  # noqa: S603
    flags = [line for line in _processor().splitlines() if line.startswith(("flags", "Features"))]
    return f"{torch.__version__} {path} {version!r} {flags[:1]}"


@cache
def made_of(codec: type) -> str:
    """The source that the kernels of a class of codecs are compiled from, as syntax trees.

    These are `compile_to`, and all functions and constants of the codecs that it reaches by name.
    """
    found: dict[str, str] = {}
    waiting: list[tuple[str, object]] = [(compile_to.__qualname__, compile_to)]
    while waiting:
        name, value = waiting.pop()
        if name in found:
            continue
        if isinstance(value, FunctionType):
            tree = _tree(value)
            found[name] = ast.dump(tree)
            waiting += _reached(tree, value, codec)
        else:
            found[name] = repr(value)
    return " ".join(f"{name}: {found[name]}" for name in sorted(found))


def _tree(function: FunctionType) -> ast.AST:
    """The syntax of a function, without comments and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def _reached(tree: ast.AST, function: FunctionType, codec: type) -> Iterator[tuple[str, object]]:
    """Functions and constants that a function names: of its module, and of a class of codecs."""
    for node in ast.walk(tree):
        values: list[object] = []
        if isinstance(node, ast.Name):
            values = [function.__globals__.get(node.id)]
        elif isinstance(node, ast.Attribute):
            values = [vars(base).get(node.attr) for base in codec.__mro__]
        for value in values:
            if isinstance(value, int | float):
                yield f"{ast.unparse(node)} in {function.__qualname__}", value
            yield from _functions(value, (__package__ or "", codec.__module__))


def _functions(value: object, modules: tuple[str, str]) -> Iterator[tuple[str, object]]:
    """A function, or those of a class, if some module of ours has its source."""
    if (getattr(value, "__module__", None) or "").startswith(modules):
        for each in vars(value).values() if isinstance(value, type) else [value]:
            if isinstance(each, FunctionType) and not each.__code__.co_filename.startswith("<"):
                yield f"{each.__module__}.{each.__qualname__}", each


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; what others made while this one waited is there after."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(request: str, folder: Path, failure: Path) -> None:
    command = [sys.executable, "-c", "from postlocal.codec import compiling; compiling.main()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        try:
            done = subprocess.run(  # noqa: S603
                [*command, request, str(made)],
                env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CompileError(
                f"compiling took more than {_SECONDS} s", "try again on a quieter machine"
            ) from None
        if not done.returncode:
            made.rename(folder)
            return
        text = f"compiling failed: {done.stderr.strip()[-2000:] or f'exit code {done.returncode}'}"
        if done.returncode < 0:  # it was killed, for lack of memory or by somebody
            raise CompileError(text, "try again")
        (Path(scratch) / "failure").write_text(text)
        (Path(scratch) / "failure").rename(failure)
    raise CompileError(text, f"mend that, and delete {failure}")


def _load(package: Path) -> Callable[..., list[Tensor]]:
    # What is loaded can be called too, but takes longer to sort its arguments than to run.
    boxed_run = load_compiled(str(package))

    def run(*tensors: Tensor) -> list[Tensor]:
        done: list[Tensor] = boxed_run(list(tensors))
        return done

    return run


class _Encode(nn.Module):
    def __init__(self, codec: "Blockwise") -> None:
        super().__init__()
        self.codec = codec

    def forward(self, blocks: Tensor, codes: Tensor) -> Tensor:
        parameters, written = self.codec.quantise(blocks.float(), 0, self.codec.block)
        codes.copy_(written)
        return parameters


class _Decode(nn.Module):
    def __init__(self, codec: "Blockwise") -> None:
        super().__init__()
        self.codec = codec

    def forward(self, parameters: Tensor, codes: Tensor, parts: tuple[Tensor, ...]) -> None:
        numbers, scales = self.codec.restore(parameters, codes)
        for part, number in zip(parts, numbers, strict=True):
            part.copy_(number.float() * scales)


class _Accumulate(nn.Module):
    def __init__(self, codec: "Blockwise") -> None:
        super().__init__()
        self.codec = codec

    def forward(
        self, parameters: Tensor, codes: Tensor, parts: tuple[Tensor, ...], weight: Tensor
    ) -> None:
        numbers, scales = self.codec.restore(parameters, codes)
        for part, number in zip(parts, numbers, strict=True):
            part.add_(number.float() * (scales * weight))


def main() -> None:
    """Compile what the command line asks for: a request, and the folder that takes the packages."""
    request, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    codecs = sys.modules["postlocal.codec"]
    codec: Blockwise = getattr(codecs, request["codec"])(**request["arguments"])
    compile_to(folder, codec, getattr(torch, request["dtype"]), request["device"])


def compile_to(folder: Path, codec: "Blockwise", dtype: torch.dtype, device: str) -> None:
    """Compile the functions of a codec into packages in a folder."""
    numel = max(2, _EXAMPLE // codec.block) * codec.block
    blocks = torch.zeros(numel, dtype=dtype, device=device).view(-1, codec.block)
    with torch.no_grad():
        parameters, codes = codec.quantise(blocks.float(), 0, codec.block)
        parts, weight = codec.sections(blocks), blocks.new_ones((), dtype=torch.float32)
        _package(_Encode(codec), (blocks, codes), folder / "encode.pt2")
        _package(_Decode(codec), (parameters, codes, parts), folder / "decode.pt2")
        accumulated = (parameters, codes, parts, weight)
        _package(_Accumulate(codec), accumulated, folder / "accumulate.pt2")


def _package(module: nn.Module, arguments: tuple[Any, ...], path: Path) -> None:
    """Compile for any number of rows of all arguments."""
    rows = torch.export.Dim("rows", min=2)
    shapes = _with_rows(arguments, rows)
    program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
    # As many threads as torch uses when it runs, not as it used here.
    compile_ahead(program, str(path), {"cpp.dynamic_threads": True})


def _with_rows(argument: Any, rows: Any) -> Any:
    """The dynamic shape of each tensor in nested tuples: any number of rows, but for scalars."""
    if isinstance(argument, tuple):
        return tuple(_with_rows(one, rows) for one in argument)
    return {0: rows} if argument.dim() else None
