"""Kernels: the same bits compiled and tile by tile, and never silently the slow way."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlocal.codec import Codec, compiling, exact, fp4, fp8, int4, int8, kernels, sign

COMPILED: dict[str, Codec] = {
    "int8": int8(),
    "int4, stochastic": int4(stochastic=True),
    "sign": sign(),
    "fp8": fp8(),
    "fp4": fp4(),
}

# A machine that meets a codec for the first time compiles for a minute or so.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing chosen by an earlier test."""
    monkeypatch.setattr(kernels, "_mode", None)
    monkeypatch.setenv("POSTLOCAL_KERNELS", "auto")


@pytest.fixture(scope="module")
def at_once() -> None:
    """All codecs compiled, as many at a time as there are processors."""
    compiled = partial(compiling.compiled, dtype=torch.float32, device="cpu")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, COMPILED.values()))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has loaded nothing, on a machine that has compiled nothing."""
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setattr(kernels, "_warned", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling._machine.cache_clear()
    return tmp_path / "postlocal" / "kernels"


def results(codec: Codec, values: Tensor, mode: kernels.Mode) -> tuple[Tensor, Tensor, Tensor]:
    """Payload, what it decodes to, and values with it added."""
    kernels.use(mode)
    payload = torch.zeros(codec.nbytes(len(values), values.dtype), dtype=torch.uint8)
    decoded, added = torch.empty_like(values), values.clone()
    codec.encode(values, payload)
    codec.decode(payload, decoded)
    codec.accumulate(payload, added, alpha=0.3)
    return payload, decoded, added


def bits(values: Tensor) -> Tensor:
    """As integers, all NaN alike."""
    return torch.where(values.isnan(), torch.nan, values).view(torch.int32)


def assert_same(codec: Codec, values: Tensor) -> None:
    fast, slow = (results(codec, values, mode) for mode in ("compiled", "eager"))
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(bits(fast[1]), bits(slow[1]))
    assert torch.equal(bits(fast[2]), bits(slow[2]))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_gives_the_bits_of_eager(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1_000_003, generator=generator)
    values *= torch.exp2(torch.randint(-140, 120, (1_000_003,), generator=generator))
    values[5000], values[70_000], values[900_000] = torch.inf, torch.nan, -torch.inf
    values[10_240:20_000] = 0
    values[30_000:32_000] = 1e-42
    assert_same(COMPILED[name], values)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", COMPILED)
@settings(deadline=None, max_examples=25)
@given(
    some=st.lists(st.floats(width=32), min_size=1, max_size=300),
    numel=st.integers(2**16 + 256, 2**17),
    shift=st.integers(0, 255),
)
def test_compiled_gives_the_bits_of_eager_for_any_values(
    name: str, some: list[float], numel: int, shift: int
) -> None:
    pattern = torch.tensor(some)
    values = pattern.repeat(-(-(numel + shift) // len(pattern)))[shift : shift + numel].contiguous()
    assert_same(COMPILED[name], values)


@pytest.fixture
def compiled_before(at_once: None) -> Path:
    """Where this machine keeps what it has compiled."""
    return compiling._cache()


def test_threads_that_call_at_once_share_one_compilation(
    compiled_before: Path, unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def counted(request: str, folder: Path, failure: Path) -> None:
        built.append(folder)
        time.sleep(0.2)  # for the other threads to come
        shutil.copytree(compiled_before / folder.name, folder)

    monkeypatch.setattr(compiling, "_build", counted)
    values = torch.randn(2**17)
    payloads: list[Tensor] = []

    def work() -> None:
        payload = torch.zeros(int8().nbytes(2**17), dtype=torch.uint8)
        int8().encode(values, payload)
        payloads.append(payload)

    kernels.use("compiled")
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(payloads) == 3
    assert all(torch.equal(payload, payloads[0]) for payload in payloads)
    assert len(built) == 1
    assert sorted(file.name for file in built[0].iterdir()) == [
        "accumulate.pt2", "decode.pt2", "encode.pt2",
    ]  # fmt: skip


def test_without_a_compiler_one_warning_says_what_that_costs(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(
        RuntimeWarning, match=r"2 to 5 times the time: there is no C\+\+ compiler.*g\+\+"
    ):
        kernels.warm_up(int8())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.warm_up(int8())
        kernels.warm_up(int4())
    compiling._machine.cache_clear()


def test_a_compiler_that_fails_is_not_tried_again_by_the_next_process(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        calls.append(args)
        return subprocess.CompletedProcess([], 1, "", "out of disk")

    compiling._machine()
    monkeypatch.setattr(subprocess, "run", fails)
    kernels.use("compiled")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="compiling failed: out of disk"):
            kernels.warm_up(int8())
    assert len(calls) == 1
    assert len(list(unloaded.glob("*.failed"))) == 1


def test_a_compiler_that_was_killed_is_tried_again(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def killed(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        calls.append(args)
        return subprocess.CompletedProcess([], -9, "", "")

    compiling._machine()
    monkeypatch.setattr(subprocess, "run", killed)
    kernels.use("compiled")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="compiling failed: exit code -9"):
            kernels.warm_up(int8())
    assert len(calls) == 2
    assert not list(unloaded.glob("*.failed"))


def test_a_damaged_package_is_one_warning(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(request: str, folder: Path, failure: Path) -> None:
        folder.mkdir()
        (folder / "encode.pt2").write_bytes(b"no archive")

    monkeypatch.setattr(compiling, "_build", built)
    with pytest.warns(RuntimeWarning, match=r"For the fast way delete postlocal/kernels"):
        kernels.warm_up(int8())


def test_what_failed_unasked_fails_aloud_where_it_is_asked_for(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler"):
        kernels.warm_up(int8())
    kernels.use("compiled")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        kernels.warm_up(int8())
    compiling._machine.cache_clear()


class Halved(int8):
    """A codec of a user's own, which no compiling process would find."""

    def restore(self, parameters: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        numbers, scales = super().restore(parameters, codes)
        return numbers, scales / 2


HALVED = """
from postlocal.codec import int8

SHARE = 2  # of a scale

def share(scales):
    return scales / SHARE

def unused():
    return 1

class halved(int8):
    def restore(self, parameters, codes):
        'Half of what int8 restores.'
        numbers, scales = super().restore(parameters, codes)
        return numbers, share(scales)
"""


def key_of(folder: Path, source: str) -> str:
    """What the kernels of the codec ``halved`` are made of."""
    folder.mkdir()
    (folder / "halved.py").write_text(source)
    spec = importlib.util.spec_from_file_location("halved", folder / "halved.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return compiling.made_of(module.halved)


REWORDED = {
    "comment": ("# of a scale", "# by which scales are divided"),
    "docstring": ("Half of what int8", "Halves of what int8"),
    "no docstring": ("'Half of what int8 restores.'", ""),
    "blank lines": ("SHARE = 2", "\n\n\nSHARE = 2"),
    "what is not used": ("return 1", "return 2"),
}
RECKONED = {
    "constant": ("SHARE = 2", "SHARE = 4"),
    "function": ("scales / SHARE", "scales * SHARE"),
    "method": ("return numbers, share(scales)", "return numbers, share(share(scales))"),
}


@pytest.mark.parametrize("name", [*REWORDED, *RECKONED])
def test_kernels_are_compiled_anew_for_other_arithmetic_and_for_no_other_words(
    name: str, tmp_path: Path
) -> None:
    old, new = (REWORDED | RECKONED)[name]
    assert old in HALVED
    before = key_of(tmp_path / "before", HALVED)
    after = key_of(tmp_path / "after", HALVED.replace(old, new))
    assert (before == after) == (name in REWORDED)


def test_the_key_of_kernels_holds_all_that_their_arithmetic_reaches() -> None:
    key = compiling.made_of(int4)
    for name in ("int4.quantise", "_symmetric", "noise", "mixed", "scales_of", "_Encode.forward"):
        assert f".{name}: " in key
    assert "Half" not in key
    assert "int8.quantise" not in key


def test_codecs_of_others_run_by_their_own_arithmetic(unloaded: Path) -> None:
    kernels.use("compiled")
    kernels.warm_up(Halved())
    values, halved = torch.randn(2**17), torch.empty(2**17)
    payload = torch.zeros(Halved().nbytes(2**17), dtype=torch.uint8)
    Halved().encode(values, payload)
    Halved().decode(payload, halved)
    assert torch.allclose(halved, values / 2, atol=0.02)
    assert not unloaded.exists()


def test_small_tensors_do_not_wait_for_a_compiler(unloaded: Path) -> None:
    kernels.use("compiled")
    int8().encode(torch.randn(8_000), torch.zeros(int8().nbytes(8_000), dtype=torch.uint8))
    assert not unloaded.exists()


def test_nothing_is_compiled_unasked_and_lost_time_is_warned_of_once(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_slowly", Counter())
    monkeypatch.setattr(kernels, "_PATIENCE", 3 * 2**18)
    values, payload = torch.randn(2**18), torch.zeros(int8().nbytes(2**18), dtype=torch.uint8)
    for _ in range(3):
        int8().encode(values, payload)
    with pytest.warns(RuntimeWarning, match="was not warmed up.* call .*kernels.warm_up before"):
        int8().encode(values, payload)
    int8().encode(values, payload)
    assert not unloaded.exists()


def test_codecs_that_are_not_compiled_need_no_warming_up(unloaded: Path) -> None:
    kernels.use("compiled")
    kernels.warm_up(exact())
    assert not unloaded.exists()


def test_a_choice_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="must be one of auto, compiled, eager, got 'quick'"):
        kernels.use("quick")  # type: ignore[arg-type]
    monkeypatch.setenv("POSTLOCAL_KERNELS", "quick")
    with pytest.raises(ValueError, match="POSTLOCAL_KERNELS must be one of auto, compiled, eager"):
        kernels.warm_up(int8())


def test_the_environment_chooses() -> None:
    code = "from postlocal.codec import int8, kernels; kernels.warm_up(int8()); print('done')"
    environment = os.environ | {"POSTLOCAL_KERNELS": "eager", "CXX": "no-such-compiler"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
