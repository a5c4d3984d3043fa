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

    def difference(a: Tensor, b: Tensor) -> str:
        return f"{(a - b).abs().max().item():.1e}"

    same = (stock.predictions == ours.predictions).double().mean().item()
    print(f"\n{'':30}{'torch AdamW':>14}{'fusedopt AdamW':>18}")
    print(f"{'validation accuracy':30}{stock.accuracy(data):14.2%}{ours.accuracy(data):18.2%}")
    print(f"{'validation loss':30}{stock.valid_loss[-1]:14.4f}{ours.valid_loss[-1]:18.4f}")
    print(f"{'training loss':30}{stock.train_loss[-1]:14.4f}{ours.train_loss[-1]:18.4f}")
    print(f"\n{'equal validation predictions':46}{same:16.2%}")
    # They round differently in the last bit, and training amplifies that, hence two figures.
    print(f"{f'largest parameter difference, {EARLY} steps':46}", end="")
    print(f"{difference(stock.early, ours.early):>16}")
    print(f"{'largest parameter difference, at the end':46}", end="")
    print(f"{difference(stock.final, ours.final):>16}")

    print(f"\n{'milliseconds per step()':24}{'median':>10}{'quartiles':>16}{'ratio to ours':>16}")
    base = statistics.median(times[OURS])
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:24}{median:10.3f}{f'{low:.3f} - {high:.3f}':>16}{median / base:15.1f}x")


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
        sys.exit(f"digits.py: cannot write the plot: {error}.")


def draw(path: Path, stock: Run, ours: Run, times: dict[str, list[float]]) -> None:
    """Write a PNG: the loss curves of both trainings, and the time per step."""
    # No pyplot: a Figure by itself needs no display and no configured backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey, red, ink = "#a8adb5", "#c8352b", "#2b2d33"
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.95])

    epochs = range(1, len(stock.train_loss) + 1)
    for axes, title, theirs, mine in (
        (left, "Training loss", stock.train_loss, ours.train_loss),
        (middle, "Validation loss", stock.valid_loss, ours.valid_loss),
    ):
        # The curves all but coincide: ours is dashed on top of a broad line.
        axes.plot(epochs, theirs, color=grey, linewidth=6, label="torch.optim.AdamW")
        axes.plot(epochs, mine, color=red, linewidth=1.8, dashes=(4, 2), label="fusedopt.AdamW")
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.grid(alpha=0.25, which="both")
    left.set_ylabel("cross-entropy (log scale)")
    left.legend(frameon=False)

    medians = {name: statistics.median(values) for name, values in times.items()}
    colors = [red if name == OURS else grey for name in medians]
    bars = right.barh(list(medians), list(medians.values()), color=colors, height=0.62)
    labels = [f"{ms:.2f} ms  ({ms / medians[OURS]:.1f}x)" for ms in medians.values()]
    right.bar_label(bars, labels, padding=5, color=ink)
    right.invert_yaxis()
    right.set(title="Time per optimizer step (median)", xlabel="milliseconds")
    right.set_xlim(0, 1.5 * max(medians.values()))  # room for the labels
    right.tick_params(axis="y", length=0)

    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(axes.get_title(), loc="left", fontweight="bold", color=ink)
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
    stock = train("torch AdamW", torch.optim.AdamW, data, epochs, seed)
    ours = train("fusedopt AdamW", fusedopt.AdamW, data, epochs, seed)
    times = time_steps(data, 4 if arguments.quick else 20, seed)
    report(data, stock, ours, times)
    if arguments.plot is not None:
        draw(arguments.plot, stock, ours, times)
        print(f"\nwrote {arguments.plot}")


if __name__ == "__main__":
    main()
