"""What pixels alone tell: logistic regression on the labels that the fine-tuned model sees."""

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

SIDE = 48  # pixels: more do not help so few labels


def pixels(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, SIDE²) grey values and (n,) labels of a part's shards."""
    shards = open_shards(f"{folder}/{name}-*.tar", None, name)
    reader = ShardReader(shards)
    samples = [reader.read(s, row)[1] for s, index in enumerate(shards) for row in range(index.samples)]
    grey = [decode(members["png"])[:1] for members in samples]
    small = [TF.resize(image, [SIDE, SIDE], antialias=True).flatten().numpy() for image in grey]
    return np.stack(small).astype(np.float64), np.array([int(bytes(members["cls"])) for members in samples])


def accuracies(folder: Path) -> dict[str, float]:
    """Test accuracy of logistic regression trained on `labelled`: its penalty chosen by cross-validation there
    ("accuracy"), and left at scikit-learn's default ("default_penalty_accuracy").

    The pixels are turned into all their principal components first: the L2 penalty does not see the rotation, and there
    are fewer of them than pixels, which saves minutes.
    """
    train, test = pixels(folder, "labelled"), pixels(folder, "test")
    default = LogisticRegression(max_iter=2000)
    tuned = GridSearchCV(default, {"C": np.logspace(-5, -1, 9)}, cv=4, scoring="accuracy")
    scores = {}
    for name, regression in (("accuracy", tuned), ("default_penalty_accuracy", default)):
        model = make_pipeline(StandardScaler(), PCA(n_components=len(train[1]) - 1), regression).fit(*train)
        scores[name] = float(model.score(*test))
    return scores
