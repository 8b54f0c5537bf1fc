"""Nearest neighbours and their votes against NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from dsmim.tasks import nearest
from dsmim.tasks.nearest import Neighbours, right_votes, votes

QUERIES, BANK, WIDTH, CLASSES = 70, 300, 16, 9


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and labels of queries and bank, in clusters by class, so that neighbours say something."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (QUERIES + BANK,), generator=generator)
    features = centres[labels] + 1.2 * torch.randn(len(labels), WIDTH, generator=generator)
    return features[:QUERIES], features[QUERIES:], labels[:QUERIES], labels[QUERIES:]


def found(queries, bank, k, sizes=(BANK,)):
    neighbours = Neighbours(queries, k)
    for block in bank.split(list(sizes)):
        neighbours.add(block)
    return neighbours.found()


def test_the_neighbours_are_scikit_learns(data, monkeypatch):
    queries, bank, *_ = data
    monkeypatch.setattr(nearest, "QUERIES", 32)  # three chunks
    similarity, numbers = found(queries, bank, 25, (7, 100, 1, 192))
    theirs = NearestNeighbors(n_neighbors=25, metric="cosine", algorithm="brute").fit(bank.double().numpy())
    distances, expected = theirs.kneighbors(queries.double().numpy())
    assert np.array_equal(numbers.numpy(), expected)
    assert similarity.numpy() == pytest.approx(1 - distances, abs=1e-6)


def test_equal_similarities_are_in_the_order_of_the_bank(data):
    queries, bank, *_ = data
    twice = torch.cat([bank, bank])
    _, numbers = found(queries, twice, 10, (BANK, BANK))
    _, once = found(queries, bank, 5)
    assert torch.equal(numbers[:, ::2], once) and torch.equal(numbers[:, 1::2], once + BANK)
    _, numbers = found(torch.eye(3), -torch.eye(3)[[0, 0, 0, 1]], 4, (4,))  # -1, and 0 with either sign
    assert numbers.tolist() == [[3, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_more_neighbours_than_samples(data):
    similarity, numbers = found(data[0], data[1][:3], 20, (2, 1))
    assert similarity.shape == numbers.shape == (QUERIES, 3)
    assert found(data[0][:0], data[1], 5)[1].shape == (0, 5)  # a rank without queries


@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("temperature", [0.07, 1e-3, 10.0])
def test_votes_and_figures_are_dinos(data, k, temperature):
    """eval_knn.py written again in NumPy, one query at a time."""
    queries, bank, labels, bank_labels = data
    similarity, numbers = found(queries, bank, k)
    scores = votes(similarity, bank_labels[numbers], CLASSES, temperature)
    right = np.zeros(2)
    normalised = [(x / x.norm(dim=1, keepdim=True)).double().numpy() for x in (queries, bank)]
    for row, (query, label) in enumerate(zip(normalised[0], labels.tolist(), strict=True)):
        similar = normalised[1] @ query
        near = np.argsort(-similar)[:k]
        summed = {}
        for number in near:
            vote = np.exp((similar[number] - similar[near[0]]) / temperature)
            summed[bank_labels[number].item()] = summed.get(bank_labels[number].item(), 0) + vote
        order = sorted(summed, key=lambda one: (-summed[one], one))  # classes without a vote never count
        right += [label in order[:1], label in order[:5]]
        assert order == scores[row].argsort(descending=True, stable=True)[: len(order)].tolist()
    assert right_votes(scores, labels).tolist() == right.tolist()
    assert 0.3 * QUERIES < right[0] <= right[1] and (k == 1 or right[0] < right[1])
