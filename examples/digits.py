"""Train one network twice, with torch's AdamW and with fusedopt's, and compare.

    python examples/digits.py --plot demo.png

The data are scikit-learn's 1797 hand-written digits of 8 x 8 pixels; the network is a residual
MLP of 126 parameter tensors. Both trainings start from the same weights and see the same batches
and learning rates, so that all that differs is whose ``step()`` updates the weights. Needs
scikit-learn and tqdm, and matplotlib for the plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import fusedopt

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"digits.py needs scikit-learn and tqdm (pip install scikit-learn tqdm): {error}.")

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # needed for the plot alone

BATCH = 64
EARLY = 10  # steps after which the weights are compared for the first time
OURS = "fusedopt"
CONTENDERS: dict[str, Callable[..., Optimizer]] = {
    "torch for-loop": partial(torch.optim.AdamW, foreach=False),
    "torch foreach": partial(torch.optim.AdamW, foreach=True),
    "torch fused": partial(torch.optim.AdamW, fused=True),
    OURS: fusedopt.AdamW,
}


@dataclass
class Data:
    """Images (one row of 64 pixels each, standardized) and their digits."""

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor


@dataclass
class Run:
    """What one training leaves behind."""

    train_loss: list[float]  # one per epoch, as the next
    valid_loss: list[float]
    predictions: Tensor  # of the validation images
    early: Tensor  # all parameters after EARLY steps
    final: Tensor

    def accuracy(self, data: Data) -> float:
        """The share of validation images that are recognized."""
        return (self.predictions == data.valid_y).double().mean().item()


def load_data() -> Data:
    """The digits, a fifth of each held out for validation: the same fifth in every run."""
    images, digits = load_digits(return_X_y=True)
    train_x, valid_x, train_y, valid_y = train_test_split(
        torch.tensor(images, dtype=torch.float32),
        torch.tensor(digits),
        test_size=0.2,
        stratify=digits,
        random_state=0,
    )
    mean, std = train_x.mean(), train_x.std()
    return Data((train_x - mean) / std, train_y, (valid_x - mean) / std, valid_y)


class Block(nn.Module):
    """A residual block: normalize, widen, narrow, add. Six parameter tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        nn.init.zeros_(self.narrow.weight)  # starts as the identity: depth costs no stability

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus what the block adds to it."""
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(x))))


def build_model(seed: int, width: int = 96, depth: int = 20) -> nn.Module:
    """A residual MLP from pixels to ten logits; the same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, width),
        *(Block(width) for _ in range(depth)),
        nn.LayerNorm(width),
        nn.Linear(width, 10),
    )


def batches(data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches, in the generator's next order."""
    for chosen in torch.randperm(len(data.train_x), generator=generator).split(BATCH):
        yield data.train_x[chosen], data.train_y[chosen]


def backward(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Fill the gradients; returns the loss."""
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def train(name: str, make: Callable[..., Optimizer], data: Data, epochs: int, seed: int) -> Run:
    """Train a new model; the seed settles its weights and the order of the batches."""
    model = build_model(seed)
    optimizer = make(model.parameters(), weight_decay=0.1)
    # Warms the rate up, anneals it, and moves beta1 the other way: both change at every step.
    total = epochs * math.ceil(len(data.train_x) / BATCH)
    scheduler = OneCycleLR(optimizer, max_lr=5e-4, total_steps=total)
    generator = torch.Generator().manual_seed(seed)

    train_loss, valid_loss, step = [], [], 0
    for _ in (bar := tqdm(range(epochs), desc=f"{name:14}", unit="epoch")):
        losses = []
        for x, y in batches(data, generator):
            losses.append(backward(model, x, y))
            optimizer.step()
            scheduler.step()
            step += 1
            if step == EARLY:
                early = parameters_to_vector(model.parameters()).detach()
        with torch.no_grad():
            logits = model(data.valid_x)
        train_loss.append(statistics.mean(losses))
        valid_loss.append(cross_entropy(logits, data.valid_y).item())
        bar.set_postfix(train=f"{train_loss[-1]:.3f}", valid=f"{valid_loss[-1]:.3f}")
    final = parameters_to_vector(model.parameters()).detach()
    return Run(train_loss, valid_loss, logits.argmax(1), early, final)


def time_steps(data: Data, rounds: int, seed: int, steps: int = 5) -> dict[str, list[float]]:
    """Milliseconds of every ``optimizer.step()`` in a short training by each contender.

    The contenders take turns, a few steps each, so that whatever slows the machine down for a
    while slows all of them. Gradients are real, from a forward and backward pass before each step.
    """
    runs = {}
    for name, make in CONTENDERS.items():
        model = build_model(seed)
        runs[name] = model, make(model.parameters()), torch.Generator().manual_seed(seed)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), desc=f"{'timing':14}", unit="round"):
        for name, (model, optimizer, generator) in runs.items():
            for x, y in islice(batches(data, generator), steps):
                backward(model, x, y)
                start = time.perf_counter()
                optimizer.step()
                elapsed = time.perf_counter() - start
                if turn > 0:  # the first turn creates the optimizer's state
                    times[name].append(1e3 * elapsed)
    return times


def report(data: Data, stock: Run, ours: Run, times: dict[str, list[float]]) -> None:
    """Print the tables."""

    def row(label: str, *cells: str) -> None:
        print(f"{label:42}" + "".join(f"{cell:>16}" for cell in cells))

    def difference(a: Tensor, b: Tensor) -> str:
        return f"{(a - b).abs().max().item():.1e}"

    runs = stock, ours
    same = (stock.predictions == ours.predictions).double().mean().item()
    print()
    row("", "torch AdamW", "fusedopt AdamW")
    row("validation accuracy", *(f"{run.accuracy(data):.2%}" for run in runs))
    row("validation loss", *(f"{run.valid_loss[-1]:.4f}" for run in runs))
    row("training loss", *(f"{run.train_loss[-1]:.4f}" for run in runs))
    print()
    row("equal validation predictions", f"{same:.2%}")
    # The two may round a last bit differently, and training amplifies that: hence two figures.
    row(f"largest parameter difference, {EARLY} steps", difference(stock.early, ours.early))
    row("largest parameter difference, at the end", difference(stock.final, ours.final))
    print()
    row("milliseconds per optimizer.step()", "median", "quartiles", "ratio to ours")
    base = statistics.median(times[OURS])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        row(name, f"{median:.3f}", f"{low:.3f} - {high:.3f}", f"{median / base:.1f}x")


def check_plot(path: Path) -> None:
    """Exit unless the plot can be drawn and written: better now than after the training."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("digits.py: --plot needs matplotlib (pip install matplotlib).")
    try:
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        sys.exit(f"digits.py: cannot write {path}: {error.strerror}.")


def draw(path: Path, stock: Run, ours: Run, times: dict[str, list[float]]) -> None:
    """Write a PNG: the loss curves of both trainings, and the time per step."""
    # No pyplot: a Figure by itself needs no display and no configured backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey, red = "#b4b8bf", "#c8352b"
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)

    def title(axes: Axes, text: str) -> None:
        axes.set_title(text, loc="left", fontweight="bold", pad=12)
        axes.spines[["top", "right"]].set_visible(False)

    middle.sharey(left)
    epochs = range(1, len(stock.train_loss) + 1)
    for axes, text, theirs, mine in (
        (left, "Training loss", stock.train_loss, ours.train_loss),
        (middle, "Validation loss", stock.valid_loss, ours.valid_loss),
    ):
        # The curves all but coincide: ours is thin, on top of a broad one.
        axes.plot(epochs, theirs, "o-", color=grey, lw=7, ms=7, mew=0, label="torch.optim.AdamW")
        axes.plot(epochs, mine, "o--", color=red, lw=1.3, ms=3.5, label="fusedopt.AdamW")
        axes.set(xlabel="epoch", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        title(axes, text)
    left.set_ylabel("cross-entropy, log scale")

    medians = {name: statistics.median(values) for name, values in times.items()}
    colors = [red if name == OURS else grey for name in medians]
    bars = right.barh(list(medians), list(medians.values()), color=colors, height=0.6)
    labels = [f"{ms:.2f} ms  ({ms / medians[OURS]:.1f}x)" for ms in medians.values()]
    right.bar_label(bars, labels, padding=5)
    right.invert_yaxis()
    right.set_xlabel("milliseconds (less is better)")
    right.set_xlim(0, 1.5 * max(medians.values()))  # room for the labels
    right.tick_params(axis="y", length=0)
    title(right, "Time per optimizer.step(), median")
    figure.savefig(path, format="png", dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
        return value

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=positive, help="default: 20, with --quick 2")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves to this PNG")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    return parser.parse_args()


def main() -> None:
    """Train, time, report, draw."""
    arguments = parse_arguments()
    if arguments.plot is not None:
        check_plot(arguments.plot)
    epochs = arguments.epochs or (2 if arguments.quick else 20)
    seed = arguments.seed

    data = load_data()
    sizes = [parameter.numel() for parameter in build_model(seed).parameters()]
    print(
        f"{len(data.train_x)} training and {len(data.valid_x)} validation images; "
        f"{len(sizes)} parameter tensors, {sum(sizes):,} parameters; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        flush=True,  # before the progress bars, which go to stderr
    )
    # Matrices this small gain next to nothing from threads, and on a busy machine they wait for
    # them much longer than they compute. The steps are timed with all threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stock = train("torch AdamW", torch.optim.AdamW, data, epochs, seed)
    ours = train("fusedopt AdamW", fusedopt.AdamW, data, epochs, seed)
    torch.set_num_threads(threads)
    times = time_steps(data, 4 if arguments.quick else 20, seed)
    report(data, stock, ours, times)
    if arguments.plot is not None:
        draw(arguments.plot, stock, ours, times)
        print(f"\nwrote {arguments.plot}")


if __name__ == "__main__":
    main()
