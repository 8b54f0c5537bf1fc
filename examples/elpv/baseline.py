"""The baseline on pixels alone: logistic regression on the labels that the fine-tuned model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.v2 import functional as TF

from dsmim.data.decode import decode
from dsmim.data.reader import ShardReader
from dsmim.shards.opening import open_shards

SIDE = 48  # pixels: larger images do not help with so few labels


def pixels(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the grey values (samples, SIDE²) and labels (samples,) in the shards of a part, such as `test`."""
    shards = open_shards(f"{folder}/{name}-*.tar", None, name)
    reader = ShardReader(shards)
    samples = [reader.read(s, row)[1] for s, index in enumerate(shards) for row in range(index.samples)]
    grey = [decode(members["png"])[:1] for members in samples]
    small = [TF.resize(image, [SIDE, SIDE], antialias=True).flatten().numpy() for image in grey]
    return np.stack(small).astype(np.float64), np.array([int(bytes(members["cls"])) for members in samples])


def accuracies(folder: Path) -> dict[str, float]:
    """Return the test accuracy of logistic regression trained on `labelled`: with the penalty chosen by
    cross-validation there ("accuracy"), and with scikit-learn's default ("default_penalty_accuracy").

    The pixels are first replaced by all their principal components. The L2 penalty does not change under this rotation,
    and there are fewer components than pixels, which saves minutes.
    """
    train, test = pixels(folder, "labelled"), pixels(folder, "test")
    default = LogisticRegression(max_iter=2000)
    tuned = GridSearchCV(default, {"C": np.logspace(-5, -1, 9)}, cv=4, scoring="accuracy")
    scores = {}
    for name, regression in (("accuracy", tuned), ("default_penalty_accuracy", default)):
        model = make_pipeline(StandardScaler(), PCA(n_components=len(train[1]) - 1), regression).fit(*train)
        scores[name] = float(model.score(*test))
    return scores
