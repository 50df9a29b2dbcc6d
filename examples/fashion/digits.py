"""The cheapest example: two perceptrons of different initialisations, five digits each, merged every way there is.

    python examples/fashion/digits.py

scikit-learn's 8 × 8 digits, three hidden layers of 128 units; half a minute, nothing is downloaded or written.
"""

from __future__ import annotations

import sys
from statistics import mean, stdev

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from weld import Pair, Results, Rows, compare

CLASSES = 5


class Perceptron(nn.Module):
    """Three hidden layers and a head."""

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = pixel_values
        for layer in (self.one, self.two, self.three):
            hidden = torch.relu(layer(hidden))
        return self.head(hidden)


def train(inputs: Tensor, labels: Tensor, seed: int, epochs: int = 60) -> Perceptron:
    """A perceptron for these five classes, from the initialisation of `seed`."""
    torch.manual_seed(seed)
    model = Perceptron(CLASSES)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def run(seed: int) -> Results:
    """All systems for one pair of experts."""
    data = load_digits()
    inputs = torch.from_numpy((data.data / 16).astype(np.float32))
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = np.arange(len(labels))
    rest, held = train_test_split(order, test_size=0.3, random_state=0, stratify=labels)
    own, tuning = train_test_split(rest, test_size=0.2, random_state=0, stratify=labels[rest])
    experts = []
    for task in (0, 1):
        rows = [row for row in own if labels[row] // CLASSES == task]
        experts.append(train(inputs[rows], labels[rows] - CLASSES * task, seed=10 * seed + task))
    pair = Pair.of((experts[0], experts[1]), lambda: Perceptron(2 * CLASSES), inputs)
    parts = [Rows(inputs[rows], labels[rows]) for rows in (own, tuning, held)]
    alphas = [step / 10 for step in range(1, 11)]
    return compare(pair, *parts, alphas=alphas, observed=len(own), seed=seed)[0]


def main(seeds: range) -> None:
    results = [run(seed) for seed in seeds]
    for name in results[0].scores:
        within = [one.scores[name].per_task for one in results]
        joint = [one.scores[name].joint for one in results]
        print(f"{name:<24} {mean(within):.3f} ± {stdev(within):.3f}   {mean(joint):.3f} ± {stdev(joint):.3f}")


if __name__ == "__main__":
    main(range(1, 1 + int(sys.argv[1]) if len(sys.argv) > 1 else 6))
