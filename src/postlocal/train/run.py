"""The training run itself, on one rank."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from postlocal.comm import agreement, group
from postlocal.comm.group import Group
from postlocal.sync.attach import attach
from postlocal.sync.supported_wrappers import unwrap
from postlocal.train import progress
from postlocal.train.config import TrainConfig
from postlocal.train.config_file import CONFIG, SavedRun, Text, merge_settings
from postlocal.train.data import open_data
from postlocal.train.link import Link, linked
from postlocal.train.metrics import PLOT, SUMMARY, Metrics, Summary
from postlocal.train.model import SIZES, Transformer
from postlocal.train.plots import plot
from postlocal.train.preparation import CHECKPOINTS, WEIGHTS, Prepared, prepare_folder, prepare_run
from postlocal.train.stop import Stop
from postlocal.train.tables import print_table
from postlocal.train.world import announced, joined, restarted, store
from postlocal.version import __version__

if TYPE_CHECKING:
    from postlocal.checkpoint import Restored


class Interrupted(Exception):
    """A signal ended the run; all ranks have saved a checkpoint of the same step."""

    def __init__(self, step: int, signal: int, folder: Path) -> None:
        super().__init__(
            f"stopped after step {step}; checkpoint in {folder}; continue with --resume"
        )
        self.signal = signal


def train(config: TrainConfig, announce: bool = True) -> Summary:
    """Train as configured, in the world that the launcher prepared, or alone.

    Args:
        config: the settings, the same on all ranks. A resumed run takes them from its folder. Those
            that are given (``model_fields_set``) must be equal or changeable.
        announce: whether rank 0 first prints what is run.

    Returns:
        The results, on every rank.

    Raises:
        ValueError: if data or the output folder cannot be used.
        DisagreementError: if ranks got different settings or text, or one of them cannot continue.
        PeerError: if a rank is lost.
        Interrupted: after SIGINT or SIGTERM to any rank, when a checkpoint is saved.
    """
    with joined(config.timeout) as device:
        everyone = group.resolve(None, None)
        agreement.check(everyone, {"arguments": config.describe()})
        with Stop(everyone.rank, everyone.size, store()) as stop:
            prepared = _open(config, everyone)
            runs = prepared.config.runs()
            with agreement.together(everyone):
                if everyone.rank == 0:
                    _prepare(prepared, everyone.size)
            if announce and everyone.rank == 0 and not announced():
                _announce(prepared, everyone.size)
            summaries = {
                label: _Run(label, run, everyone, device, stop, prepared.text).run()
                for label, run in runs.items()
            }
        if everyone.rank == 0:
            _present(prepared.config, summaries)
    return summaries[list(runs)[-1]]


def _open(config: TrainConfig, everyone: Group) -> Prepared:
    """The prepared run of rank 0, on all ranks; each reads the text from its own data."""
    found = None
    with agreement.together(everyone):
        if everyone.rank == 0:
            found = prepare_run(_resumed_by_launcher(config), everyone.size)
    prepared = everyone.all_gather_object(found)[0]
    assert prepared is not None
    if everyone.rank:
        own = {"out": config.out} | ({"data": config.data} if config.data else {})
        prepared = replace(prepared, config=prepared.config.model_copy(update=own))
    with agreement.together(everyone):
        text = Text.of(prepared.config.data) if everyone.rank else prepared.text
    agreement.check(everyone, {"data": [text.identity]})
    return prepared


def _resumed_by_launcher(config: TrainConfig) -> TrainConfig:
    """The same; resumed if torchrun restarted the workers and the run had begun."""
    begun = restarted() and (config.out / CONFIG).exists()
    return config.model_copy(update={"resume": True}) if begun else config


def _prepare(prepared: Prepared, workers: int) -> None:
    runs = list(prepared.config.runs().values())
    for run in reversed(runs):  # the outer folder first: it contains the other one
        prepare_folder(run.out, run.resume, run.overwrite)
    for run in runs:
        if run.resume and (kept := SavedRun.read(run.out)) is not None:
            merge_settings(run, kept, workers)  # a compared run has saved settings of its own
        else:
            SavedRun.of(run, prepared.text, workers).write(run.out)


def _announce(prepared: Prepared, workers: int) -> None:
    for line in prepared.lines(workers):
        _print_line(Console(), line)


def _present(config: TrainConfig, summaries: dict[str, Summary]) -> None:
    console = Console()
    named = {label: replace(each, strategy=label) for label, each in summaries.items()}
    print_table(console, progress.results(named))
    sentences = [f"Plot: {_draw(config)}", f"Summary: {config.out / SUMMARY}"]
    if config.compare is not None:
        other, own = named.values()
        sentences += _compare(config, own, other)
    for sentence in sentences:
        _print_line(console, sentence)


def _print_line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _compare(config: TrainConfig, run: Summary, other: Summary) -> list[str]:
    """Sentences about two runs: their final losses, and when they reached the same loss."""
    loss = max(run.final_val_loss, other.final_val_loss)
    seconds = Metrics(config.out).seconds_to(loss)
    others = Metrics(config.compared().out).seconds_to(loss)
    if seconds is None or others is None:  # a loss is not finite
        return [progress.verdict(run, other)]
    return [progress.verdict(run, other), progress.race(run, other, loss, seconds, others)]


def _draw(config: TrainConfig) -> str:
    """The path of the plot, or why there is none: a run does not fail because of its plot."""
    to = config.out / PLOT
    try:
        plot({label: run.out for label, run in config.runs().items()}, to)
    except ImportError as error:
        return f"none, {error}"
    return str(to)


class _Run:
    """One run: model, data, clock and metrics."""

    def __init__(
        self,
        label: str,
        config: TrainConfig,
        everyone: Group,
        device: torch.device,
        stop: Stop,
        text: Text,
    ) -> None:
        self.label = label
        self.config = config
        self.text = text
        self.everyone = everyone
        self.device = device
        self.stop = stop
        with agreement.together(everyone):
            self.windows, self.share = open_data(config, everyone.rank, everyone.size)
            self.link = None if config.link is None else Link(config.link)
            process_group = linked(self.link, config.timeout, device)
        self.model = self._make_model()
        self.optimizer = make_optimizer(self.model, config)
        self.sync = attach(
            self.model,
            self.optimizer,
            config.make_strategy(),
            topology=config.make_topology(),
            process_group=process_group,
            timeout=config.timeout,
        )
        self.metrics = Metrics(config.out)
        self.train_seconds = 0.0
        self.losses: list[float] = []
        self.logged_syncs = 0
        self.next_eval = 0

    def run(self) -> Summary:
        """Train to the end, from the newest checkpoint if the run is resumed."""
        console = Console()
        with progress.ProgressDisplay(
            console, self.label, self.config.steps, self.everyone.rank == 0
        ) as self.progress:
            self._restore()
            while self.sync.steps < self.config.steps:
                self._step()
                self._log()
                self._evaluate_if_due()
                self._save_if_due()
            return self._finish()

    def _make_model(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model = Transformer(SIZES[self.config.model]).to(self.device)
        return DistributedDataParallel(model) if dist.is_initialized() else model

    def _restore(self) -> None:
        restored = None
        if self.config.resume:
            from postlocal import checkpoint  # a slow import, which the command does without

            restored = checkpoint.restore(self.config.out / CHECKPOINTS, self.sync)
        if restored is None:
            if self.config.resume:
                self.progress.note(
                    f"{self.label}: no checkpoint to resume from: starting at step 0"
                )
        else:
            self._take_over(restored)
        self.logged_syncs = self.sync.meter.syncs
        self.progress.start(self.sync.steps)
        if self.everyone.rank == 0:
            SavedRun.of(self.config, self.text, self.everyone.size).write(self.config.out)
            self.metrics.start(self.sync.steps)

    def _take_over(self, restored: "Restored") -> None:
        if restored.step > self.config.steps:
            raise ValueError(
                f"steps must be at least the {restored.step} that {restored.path} has done, got "
                f"{self.config.steps}"
            )
        self.train_seconds = restored.extra["train_seconds"]
        self.losses = restored.extra["losses"]
        self.next_eval = restored.extra["next_eval"]
        self.progress.note(f"{self.label}: resumed after step {restored.step} from {restored.path}")
        if restored.step == self.config.steps:
            self.progress.note(
                f"{self.label}: all {restored.step} steps are done: nothing to train"
            )

    def _step(self) -> None:
        start = time.perf_counter()
        step = self.sync.steps
        for group_of_parameters in self.optimizer.param_groups:
            group_of_parameters["lr"] = self.config.lr_at(step)
        inputs, targets = self.share.batch(step)
        count = self.config.accumulate
        micro = zip(inputs.chunk(count), targets.chunk(count), strict=True)
        loss = sum(
            self._backward(x, y, last=index == count - 1) for index, (x, y) in enumerate(micro)
        )
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sync.step()
        self.losses.append(loss / count)
        self.train_seconds += time.perf_counter() - start

    def _backward(self, inputs: Tensor, targets: Tensor, last: bool) -> float:
        with nullcontext() if last else self._no_sync():
            loss = cross_entropy(self.model, inputs.to(self.device), targets.to(self.device))
            (loss / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _no_sync(self) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _log(self) -> None:
        step, meter = self.sync.steps, self.sync.meter
        self.progress.advance(step)
        self._log_syncs()
        if step % self.config.log_every and step != self.config.steps:
            return
        tokens = step * self._tokens_a_step()
        entry = {
            "loss": float(np.mean(self.losses)),
            "lr": self.config.lr_at(step - 1),
            "tokens": tokens,
            "tokens_per_second": tokens / self.train_seconds,
            "payload_bytes": meter.total_bytes,
            "ddp_payload_bytes": self.sync.ddp_payload_bytes,
            "train_seconds": self.train_seconds,
            "wait_seconds": meter.wait_seconds,
        }
        self.losses = []
        if self.everyone.rank == 0:
            self.metrics.add("step", step, **entry)
        self.progress.step(step, entry)

    def _log_syncs(self) -> None:
        records = self.sync.meter.records
        new = self.sync.meter.syncs - self.logged_syncs
        self.logged_syncs = self.sync.meter.syncs
        for record in list(records)[len(records) - new :]:
            if self.everyone.rank == 0:
                self.metrics.add_sync(record)

    def _evaluate_if_due(self) -> None:
        # Replicas are equal only at some steps, which are the same on all ranks.
        can = self.sync.agreed or self.sync.strategy.streams
        if can and self.next_eval <= self.sync.steps < self.config.steps:
            self._evaluate()
            interval = self.config.eval_interval
            self.next_eval = self.sync.steps - self.sync.steps % interval + interval

    def _evaluate(self) -> float:
        with self.sync.agreed_parameters():
            loss = self._held_out_loss()
        self.progress.evaluated(loss)
        if self.everyone.rank == 0:
            self.metrics.add(
                "eval",
                self.sync.steps,
                val_loss=loss,
                payload_bytes=self.sync.meter.total_bytes,
                train_seconds=self.train_seconds,
            )
        return loss

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean over evenly spaced held-out windows; each rank takes some of them."""
        held_out = self.windows.held_out
        count = min(self.config.eval_sequences, len(held_out))
        chosen = held_out[np.linspace(0, len(held_out) - 1, count).astype(int)]
        own = chosen[self.everyone.rank :: self.everyone.size]
        model = unwrap(self.model)
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        for start in range(0, len(own), self.config.batch_size):
            inputs, targets = self.windows.batch(own[start : start + self.config.batch_size])
            loss = cross_entropy(model, inputs.to(self.device), targets.to(self.device))
            total += torch.tensor([float(loss) * len(inputs), len(inputs)], device=self.device)
        self.everyone.all_reduce(total).wait()
        return float(total[0] / total[1])

    def _save_if_due(self) -> None:
        step = self.sync.steps
        stopping = self.stop.due(step) and step < self.config.steps
        if stopping or (step % self.config.checkpoint_every == 0 and step < self.config.steps):
            path = self._save()
            if stopping:
                assert self.stop.signal is not None
                raise Interrupted(step, self.stop.signal, path)

    def _save(self) -> Path:
        extra = {
            "train_seconds": self.train_seconds,
            "losses": self.losses,
            "next_eval": self.next_eval,
        }
        from postlocal import checkpoint

        return checkpoint.save(self.config.out / CHECKPOINTS, self.sync, extra, self.config.keep)

    def _finish(self) -> Summary:
        start = time.perf_counter()
        self.sync.finish()
        self.train_seconds += time.perf_counter() - start
        self._log_syncs()
        loss = self._evaluate()
        self._save()
        summary = self._summarize(loss)
        self.sync.close()
        if self.link is not None:
            self.link.close()
        if self.everyone.rank == 0:
            save_weights(unwrap(self.model), self.config, self.config.out / WEIGHTS)
            summary.write(self.config.out)
        return summary

    def _summarize(self, loss: float) -> Summary:
        meter = self.sync.meter
        digests = self.everyone.all_gather_object(list(self._digests()))
        return Summary(
            strategy=self.sync.strategy.name,
            strategy_details=str(self.sync.strategy),
            workers=self.everyone.size,
            model=self.config.model,
            parameters=self._parameters(),
            steps=self.sync.steps,
            tokens=self.sync.steps * self._tokens_a_step(),
            seed=self.config.seed,
            train_seconds=self.train_seconds,
            wait_seconds=meter.wait_seconds,
            payload_bytes=meter.total_bytes,
            payload_bytes_by_purpose=dict(meter.payload_bytes),
            ddp_payload_bytes=self.sync.ddp_payload_bytes,
            syncs=meter.syncs,
            final_val_loss=loss,
            replicas_equal=all(theirs == digests[0] for theirs in digests),
            versions={
                "postlocal": __version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
            },
            link=self.config.link,
        )

    def _digests(self) -> Iterator[str]:
        from postlocal.checkpoint.packing import key_of

        for parameter in self.model.parameters():
            yield key_of(parameter)

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _tokens_a_step(self) -> int:
        return self.everyone.size * self.config.batch_size * self.config.sequence_length


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW for a model's parameters, without weight decay of vectors."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.lr_at(0),
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats a byte, a 0-d tensor; inputs and targets are ``(batch, length)``."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def save_weights(model: nn.Module, config: TrainConfig, path: Path) -> None:
    """Write parameters as safetensors, completely or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    aside.touch()
    mode = aside.stat().st_mode & 0o777  # mode by the umask, which safetensors ignores
    save_file(
        tensors,
        aside,
        {"model": config.model, "sequence_length": str(config.sequence_length)},
    )
    aside.chmod(mode)
    aside.rename(path)
