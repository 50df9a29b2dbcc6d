"""Images as files keep them, and a short training of an image classifier."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def train(model: Any, inputs: torch.Tensor, labels: torch.Tensor, epochs: int = 60) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(64):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=inputs[rows]).logits, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
