"""Classifies the sky and ground of a picture by trees trained on rendered scenes, and parses them from a prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ringmark.data.scenes import GROUNDS, SIZE, SKIES, scene

if TYPE_CHECKING:
    from sklearn.ensemble import ExtraTreesClassifier

__all__ = ["ATTRIBUTES", "CELLS", "asked", "features", "train_classifiers"]

ATTRIBUTES = ("sky", "ground")
CELLS = 8
FIRST = 3_000_000  # first scene of the classifier; no model was trained on these scenes


def asked(prompt: str) -> dict[str, str] | None:
    """The sky and ground of a caption of `data.scenes`; None for any other prompt."""
    words = rf"(?P<ground>{'|'.join(GROUNDS)}) (?:at|in) (?:a )?(?P<sky>{'|'.join(SKIES)})(?: with .*|,.*|)"
    match = re.fullmatch(words, prompt)
    return match and match.groupdict()


def features(pixels: np.ndarray) -> np.ndarray:
    """Means, deviations and gradients of a uint8 picture (H, W, 3), in each cell of a grid."""
    x = pixels.astype(np.float32) / 255
    grey = x.mean(-1)
    gradients = np.stack([np.abs(np.diff(grey, axis=a, append=grey.take([-1], a))) for a in (0, 1)], -1)
    side = len(x) // CELLS
    cells = np.concatenate([x, gradients], -1).reshape(CELLS, side, CELLS, side, 5)
    return np.concatenate([cells.mean((1, 3)).ravel(), cells[..., :3].std((1, 3)).ravel()])


def train_classifiers(
    n_train: int, n_test: int, size: int = SIZE
) -> tuple[dict[str, ExtraTreesClassifier], dict[str, float]]:
    """A classifier for each attribute of pictures of `size`, and its accuracy on held-out rendered scenes."""
    from sklearn.ensemble import ExtraTreesClassifier

    scenes = [scene(FIRST + i, size) for i in tqdm(range(n_train + n_test), "scenes", disable=None)]
    x = np.stack([features(s.pixels) for s in scenes])
    trees, accuracy = {}, {}
    for name in ATTRIBUTES:
        y = np.array([getattr(s.attributes, name) for s in scenes])
        trees[name] = ExtraTreesClassifier(400, random_state=0, n_jobs=-1).fit(x[:n_train], y[:n_train])
        accuracy[name] = float(trees[name].score(x[n_train:], y[n_train:]))
    return trees, accuracy
