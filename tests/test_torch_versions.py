"""What postlocal does on a version of torch that lacks one of its private names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

import postlocal
from postlocal import strategies, torch_versions
from tests.models import batches, equal, mlp, sgd, train_step, values

Ranks = Callable[..., list[Any]]


def streamed_twice(rank: int, by_name: bool) -> list[list[Tensor]]:
    """The ends of two attachments, the second after the first was closed."""
    if not by_name:
        torch_versions._makes_groups_by_name = lambda: False
    ends = []
    for _ in range(2):
        model = mlp()
        optimizer = sgd(model)
        sync = postlocal.attach(
            model, optimizer, strategies.streaming_diloco(4, fragments=2, delay=1)
        )
        for x, y in batches(rank, 8):
            train_step(model, optimizer, x, y)
            sync.step()
        sync.finish()
        sync.close()
        ends.append(values(model))
    return ends


def test_groups_that_torch_names_train_as_groups_with_our_names(ranks: Ranks) -> None:
    for ours, theirs in zip(
        ranks(2, streamed_twice, True), ranks(2, streamed_twice, False), strict=True
    ):
        assert all(map(equal, ours, theirs))


def gathered(rank: int) -> list[float]:
    """An all-gather as torch 2.11 calls it."""
    newer = getattr(dist, "all_gather_single", None)
    older, called = dist.all_gather_into_tensor, []

    def gather(*arguments: Any, **options: Any) -> Any:
        called.append(arguments)
        return (newer or older)(*arguments, **options)

    dist.all_gather_single = None  # type: ignore[assignment]
    dist.all_gather_into_tensor = gather
    output = torch.empty(2)
    work = torch_versions.all_gather_single(
        output, torch.tensor([float(rank)]), torch_versions.default_group()
    )
    assert work is not None
    work.wait()
    assert called
    return output.tolist()


def test_an_all_gather_goes_by_its_older_name(ranks: Ranks) -> None:
    assert ranks(2, gathered) == [[0.0, 1.0]] * 2


def kept_hook(rank: int) -> str:
    model = DistributedDataParallel(mlp())
    sync = postlocal.attach(model, sgd(model), strategies.ddp())
    torch_versions.remove_hook = lambda model: False
    sync.close()
    x, y = next(batches(rank, 1))
    with pytest.raises(RuntimeError) as error:
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    return str(error.value)


def test_a_wrapper_whose_hook_cannot_be_taken_away_raises_after_close(ranks: Ranks) -> None:
    assert all("build it anew" in said for said in ranks(2, kept_hook))


def test_tensors_are_copied_and_measured_one_by_one_where_there_is_no_call_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = [torch.randn(3), torch.randn(2, 2)]
    norms = [float(norm) for norm in torch_versions.norms_of(sources, torch.float32)]
    monkeypatch.delattr(torch, "_foreach_copy_")
    monkeypatch.delattr(torch, "_foreach_norm")
    targets = [torch.zeros(3), torch.zeros(2, 2)]
    torch_versions.copy_all_(targets, sources)
    assert equal(targets, sources)
    assert [float(n) for n in torch_versions.norms_of(sources, torch.float32)] == norms


def test_a_write_that_torch_does_not_count_is_taken_for_one() -> None:
    class Uncounted:
        """As a tensor of a torch without the counter."""

    tensor: Any = Uncounted()
    assert torch_versions.version_of(tensor) != torch_versions.version_of(tensor)
    counted = torch.zeros(2)
    before = torch_versions.version_of(counted)
    assert torch_versions.version_of(counted) == before
    counted.add_(1)
    assert torch_versions.version_of(counted) != before


def test_tensors_of_a_layer_are_found_by_name_too() -> None:
    class Hidden(nn.Linear):
        """Keeps torch's dictionaries from view."""

        def __getattribute__(self, name: str) -> Any:
            if hide and name in ("_parameters", "_buffers"):
                raise AttributeError(name)
            return super().__getattribute__(name)

        def named_parameters(self, *_: Any, **__: Any) -> Any:
            return known

        def named_buffers(self, *_: Any, **__: Any) -> Any:
            return []

    hide = False
    layer = Hidden(2, 1)
    known = list(nn.Linear.named_parameters(layer))
    expected = torch_versions.tensors_of(layer)
    hide = True
    found = torch_versions.tensors_of(layer)
    assert [id(tensor) for tensor in found] == [id(tensor) for tensor in expected]


@pytest.mark.usefixtures("alone")
def test_optimizers_in_backward_are_refused_where_torch_cannot_run_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from postlocal.ddp_comm_hooks.optimizer_overlap_hooks import apply_optimizer_in_backward

    model = DistributedDataParallel(mlp())
    monkeypatch.delattr(DistributedDataParallel, "_lazy_init")
    with pytest.raises(RuntimeError, match=r"lacks _lazy_init, .* call optimizer.step\(\)"):
        apply_optimizer_in_backward(model, torch.optim.SGD, {"lr": 0.1})


@pytest.mark.usefixtures("alone")
def test_what_torch_does_not_tell_of_a_wrapper_is_taken_as_absent() -> None:
    bare: Any = object()
    assert not torch_versions.joins(bare)
    assert not torch_versions.delays_parameters(bare)
    assert not torch_versions.reduces_in_python(bare)
    assert torch_versions.own_hook(bare) is None
    assert torch_versions.buffers_option(bare) == "broadcast_buffers"
    assert torch_versions.timeout_of(bare) is None
    assert torch_versions.hooks_of(bare, "state_dict_pre") == []
    assert torch_versions.own_connection(bare) is bare


def test_a_missing_loader_of_kernels_is_an_error_that_codecs_expect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "_inductor", object(), raising=False)
    with pytest.raises(RuntimeError, match="loads no compiled package"):
        torch_versions.load_compiled("encode.pt2")


def test_this_torch_has_every_private_name() -> None:
    """A version of torch that lacks one shows here first."""
    assert torch_versions._makes_groups_by_name()
    names = ("_foreach_copy_", "_foreach_norm")
    assert all(hasattr(torch, name) for name in names)
    assert all(hasattr(distributed_c10d, name) for name in ("_world", "GroupName"))
