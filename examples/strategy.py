"""A whole training, from the first look at the loss to the diagnosis of the curves, twice.

    python examples/strategy.py --plot strategy.png

Once with fusedopt, in whose step clipping, accumulation, L1 and the average of the weights happen;
once with what a user of torch writes around ``torch.optim.AdamW`` for the same. Same data (the
digits of digits.py), same weights, same batches, same dropout, same learning rates. The steps are
those of docs/training/search.md: look at the first loss, overfit a few samples, find a learning
rate, train (warm-up and cosine, early stopping, best weights restored), look at the curves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from digits import Block, Data, check_plot, load_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt.averaging import FusedEMA
from fusedopt.checks import check_initial_loss, overfit_batch
from fusedopt.history import History, diagnose
from fusedopt.range_test import LRFinderResult, lr_range_test
from fusedopt.schedule import WarmupCosineLR
from fusedopt.stopping import BestWeights, EarlyStopping

MICRO_BATCH = 32
MICRO_BATCHES = 2  # to a step
MAX_NORM = 1.0
L1 = 1e-6
EMA_DECAY = 0.98
DEPTH = 6


def build_model(seed: int) -> nn.Module:
    """Residual blocks with dropout that grows with the depth: later layers overfit first."""
    torch.manual_seed(seed)
    width = 96
    blocks = [nn.Sequential(Block(width), nn.Dropout(0.2 * (i + 1) / DEPTH)) for i in range(DEPTH)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 10))


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Decay for matrices; none for biases and norms, whose size nothing has to hold down."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def micro_batches(data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's, in the generator's next order; whole windows of them."""
    order = torch.randperm(len(data.train_x), generator=generator)
    window = MICRO_BATCH * MICRO_BATCHES
    for chosen in order[: len(order) // window * window].split(MICRO_BATCH):
        yield data.train_x[chosen], data.train_y[chosen]


class Ours:
    """The step, and what is around it, in one pass."""

    name = "fusedopt"

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.optimizer = fusedopt.AdamW(
            groups(model), lr=lr, max_grad_norm=MAX_NORM, l1=L1, ema_decay=EMA_DECAY
        )
        self.average = FusedEMA(self.optimizer, model)
        self.kept = {"optimizer": self.optimizer}  # whose state the average is

    def micro_batch(self) -> None:
        """After a backward pass."""
        self.optimizer.accumulate()

    def step(self) -> float:
        """After a window of them; returns the gradients' norm."""
        self.optimizer.step()
        return float(self.optimizer.grad_norm)


class Stock:
    """The same by torch, with its fused step; every line of ``step`` is a pass or two more."""

    name = "torch"

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(groups(model), lr=lr, fused=True)
        self.params = list(model.parameters())
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.kept = {"optimizer": self.optimizer, "average": self.average}

    def micro_batch(self) -> None:
        """Gradients are summed by autograd."""

    def step(self) -> float:
        """Mean, clip, step, L1, average."""
        torch._foreach_div_([p.grad for p in self.params], MICRO_BATCHES)
        norm = nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            for group in self.optimizer.param_groups:  # towards zero, but not beyond
                params, most = group["params"], group["lr"] * L1
                torch._foreach_sub_(params, [p.clamp(-most, most) for p in params])
        self.average.update_parameters(self.model)
        self.optimizer.zero_grad()
        return float(norm)


@dataclass
class Run:
    """What a training leaves behind."""

    name: str
    history: History
    stopped: str
    best_epoch: int
    accuracy: float  # of the best average
    step_ms: list[float]  # of optimizer and what is around it


def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Loss and accuracy on the validation images."""
    model.eval()
    with torch.no_grad():
        logits = model(data.valid_x)
    loss = cross_entropy(logits, data.valid_y).item()
    return loss, (logits.argmax(1) == data.valid_y).double().mean().item()


def averaged(way: Ours | Stock, model: nn.Module, data: Data) -> tuple[float, float]:
    """The same with the average of the weights."""
    if isinstance(way, Stock):
        return evaluate(way.average, data)
    with way.average.swap(model):
        return evaluate(model, data)


def train(kind: type[Ours] | type[Stock], data: Data, lr: float, epochs: int, seed: int) -> Run:
    """Train a new model until it no longer improves."""
    model = build_model(seed)
    way = kind(model, lr)
    per_epoch = len(data.train_x) // (MICRO_BATCH * MICRO_BATCHES)
    scheduler: LRScheduler = WarmupCosineLR(way.optimizer, epochs * per_epoch, 2 * per_epoch)
    history, step_ms = History(), []
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    with BestWeights({"model": model, **way.kept}) as best:
        stopper = EarlyStopping("ema_loss", patience=8, min_delta=1e-4, best=best)
        for epoch in range(1, epochs + 1):
            model.train()
            losses, norms = [], []
            for i, (x, y) in enumerate(micro_batches(data, generator), 1):
                loss = cross_entropy(model(x), y)
                loss.backward()
                losses.append(loss.item())
                start = time.perf_counter()
                way.micro_batch()
                if i % MICRO_BATCHES == 0:
                    norms.append(way.step())
                    scheduler.step()
                step_ms.append(1e3 * (time.perf_counter() - start))
            val_loss, accuracy = evaluate(model, data)
            ema_loss, _ = averaged(way, model, data)
            history.append(
                epoch,
                train_loss=statistics.mean(losses),
                val_loss=val_loss,
                val_accuracy=accuracy,
                ema_loss=ema_loss,
                grad_norm=statistics.mean(norms),
                lr=scheduler.get_last_lr()[0],
            )
            if stopper.step({"ema_loss": ema_loss}):
                break
    # Leaving the block has restored the best weights.
    assert stopper.best_step is not None
    return Run(
        kind.name,
        history,
        stopper.reason.message,
        stopper.best_step + 1,  # it counts from 0
        averaged(way, model, data)[1],
        step_ms[2 * MICRO_BATCHES :],  # the first make the state
    )


def find_rate(data: Data, seed: int) -> tuple[float, LRFinderResult]:
    """Steps one to three of the recipe."""
    model = build_model(seed)
    optimizer = fusedopt.AdamW(groups(model))

    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    few = data.train_x[:8], data.train_y[:8]
    model.eval()  # without dropout
    print("1.", check_initial_loss(closure((data.train_x, data.train_y)), num_classes=10).message)
    print("2.", overfit_batch(closure, few, optimizer, stateful=(model,)).message)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    batches = list(micro_batches(data, generator))
    result = lr_range_test(
        closure, batches, optimizer, stateful=(model,), start_lr=1e-6, end_lr=1.0, num_iter=80
    )
    rate = result.suggest()
    print("3.", result.explain())
    if rate is None:
        sys.exit("strategy.py: no learning rate to be seen; nothing to train with.")
    return rate, result


def report(runs: list[Run]) -> None:
    """Print what came of it."""
    print(f"\n{'':34}" + "".join(f"{run.name:>14}" for run in runs))

    def row(label: str, *cells: str) -> None:
        print(f"{label:34}" + "".join(f"{cell:>14}" for cell in cells))

    row("epochs", *(str(len(run.history.steps)) for run in runs))
    row("best epoch, restored", *(str(run.best_epoch) for run in runs))
    row("accuracy of its average", *(f"{run.accuracy:.2%}" for run in runs))
    for label, name in (
        ("loss of its average", "ema_loss"),
        ("best loss without averaging", "val_loss"),
    ):
        row(label, *(f"{min(run.history.points(name)[1]):.4f}" for run in runs))
    # Without the backward passes, in which torch sums the micro-batches.
    row("ms for a micro-batch's update", *(f"{statistics.mean(run.step_ms):.3f}" for run in runs))
    for run in runs:
        print(f"\n{run.name}: {run.stopped}; the curves:")
        findings = diagnose(run.history)
        for finding in findings:
            print(f"  {finding.code}: {finding.advice} {finding.evidence}")
        if not findings:
            print("  nothing to find fault with")


def draw(path: Path, result: LRFinderResult, runs: list[Run]) -> None:
    """The range test, the losses, the learning rate and the gradients' norm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    result.plot(left)
    for run, style in zip(runs, ("-", "--"), strict=True):
        for name, color in (("train_loss", "C0"), ("val_loss", "C1"), ("ema_loss", "C2")):
            middle.plot(*run.history.points(name), style, color=color, label=f"{name}, {run.name}")
        right.plot(*run.history.points("grad_norm"), style, color="C3", label=f"norm, {run.name}")
    middle.set(xlabel="epoch", ylabel="cross-entropy", yscale="log", title="Losses")
    rate = right.twinx()
    rate.plot(*runs[0].history.points("lr"), color="C7", label="learning rate")
    rate.set_ylabel("learning rate")
    right.set(xlabel="epoch", ylabel="gradient norm", title="Norm and learning rate")
    for axes in (middle, right):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=150)


def main() -> None:
    """All steps, in order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30, help="at most (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the pictures to this PNG")
    arguments = parser.parse_args()
    if arguments.epochs < 3:
        parser.error(f"argument --epochs: at least 3, of which two warm up: {arguments.epochs}")
    if arguments.plot is not None:
        check_plot(arguments.plot)
    torch.set_num_threads(1)  # for matrices this small
    data = load_data()
    rate, result = find_rate(data, arguments.seed)
    print(f"4. training with a peak of {rate:.2g}, by torch and by fusedopt", flush=True)
    runs = [train(kind, data, rate, arguments.epochs, arguments.seed) for kind in (Stock, Ours)]
    report(runs)
    if arguments.plot is not None:
        draw(arguments.plot, result, runs)
        print(f"\nwrote {arguments.plot}")


if __name__ == "__main__":
    main()
