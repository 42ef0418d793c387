"""Probes against implementations we did not write."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict as lightly_knn_predict
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from blto.errors import ConfigError, Diverged
from blto.evaluation import neighbours
from blto.evaluation.features import Features
from blto.evaluation.probes import PROBES, LinearProbe, fit_logistic, fit_probe, knn_predict

CLASSES = 5


def blobs(n: int, *, dim: int = 24, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes with correlated, rectified dimensions of very different scale, as a backbone's are."""
    g = torch.Generator().manual_seed(99)
    centers, mix = torch.randn(CLASSES, 8, generator=g), torch.randn(8, dim, generator=g)
    scales = torch.logspace(-2, 2, dim)
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    latent = centers[labels] + spread * torch.randn(n, 8, generator=g)
    return torch.relu(latent @ mix + torch.randn(n, dim, generator=g)) * scales + 0.5 * scales, labels


@pytest.mark.parametrize(("k", "temperature"), [(200, 0.1), (20, 0.5), (1, 0.1), (600, 0.07)])
def test_knn_equals_lightly(k: int, temperature: float) -> None:
    bank, labels = blobs(600)
    queries, _ = blobs(300, seed=1)
    expected = lightly_knn_predict(
        F.normalize(queries, dim=1), F.normalize(bank, dim=1).T, labels, CLASSES, knn_k=k, knn_t=temperature
    )[:, 0]
    found = knn_predict(bank, labels, queries, num_classes=CLASSES, k=k, temperature=temperature)
    assert found.tolist() == expected.tolist()


def test_knn_weights_near_neighbours_more() -> None:
    # One neighbour of class 1 at cosine 1 against two of class 0 at cosine 0: e^10 against 2.
    bank = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    query = np.array([[2.0, 0.0]])
    assert knn_predict(bank, np.array([1, 0, 0]), query, num_classes=2).tolist() == [1]
    # At temperature 2 the weights are e^0.5 < 2.
    assert knn_predict(bank, np.array([1, 0, 0]), query, num_classes=2, temperature=2.0).tolist() == [0]


def test_knn_caps_k_by_the_bank_and_survives_low_temperatures() -> None:
    bank, labels = blobs(50)
    assert (knn_predict(bank, labels, bank, num_classes=CLASSES, temperature=1e-4) == labels.numpy()).all()
    whole = knn_predict(bank, labels, bank, num_classes=CLASSES, k=50)
    assert knn_predict(bank, labels, bank, num_classes=CLASSES, k=10**6).tolist() == whole.tolist()


def test_knn_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = blobs(100)
    queries, _ = blobs(31, seed=1)
    whole = knn_predict(bank, labels, queries, num_classes=CLASSES, k=7)
    monkeypatch.setattr(neighbours, "QUERIES", 10)
    monkeypatch.setattr(neighbours, "KEYS", 32)
    assert knn_predict(bank, labels, queries, num_classes=CLASSES, k=7).tolist() == whole.tolist()
    assert len(whole) == 31


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_linear_equals_scikit_learn(l2: float) -> None:
    features, labels = blobs(2000)
    queries, _ = blobs(2000, seed=1)
    model = LinearProbe(l2=l2, tolerance=1e-7).fit(features, labels, CLASSES)
    scaler = StandardScaler().fit(features.double().numpy())
    oracle = LogisticRegression(C=1 / (l2 * 2000), tol=1e-8, max_iter=10_000)
    oracle.fit(scaler.transform(features.double().numpy()), labels.numpy())
    agreement = np.mean(model(queries) == oracle.predict(scaler.transform(queries.double().numpy())))
    assert agreement >= 0.999
    standardised = model.weight.numpy() * scaler.scale_
    assert np.abs(standardised - oracle.coef_).max() < 1e-3 * np.abs(oracle.coef_).max()


def test_linear_default_tolerance_is_converged_for_predictions() -> None:
    features, labels = blobs(2000)
    queries, _ = blobs(2000, seed=1)
    default, exact = (p.fit(features, labels, CLASSES) for p in (LinearProbe(), LinearProbe(tolerance=1e-8)))
    assert np.mean(default(queries) == exact(queries)) >= 0.999


def test_logistic_ends_where_autograd_finds_no_slope() -> None:
    features, labels = blobs(500, dim=12)
    x = features.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    weight, bias = fit_logistic(x, labels, CLASSES, l2=1e-3, tolerance=1e-8, max_iterations=1000)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    loss = F.cross_entropy(x @ weight.T + bias, labels) + 0.5e-3 * weight.square().sum()
    slopes = torch.autograd.grad(loss, [weight, bias])
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-7
    assert loss.item() < 0.9 * float(torch.log(torch.tensor(float(CLASSES))))


def test_linear_is_deterministic_and_blind_to_scale_and_shift() -> None:
    features, labels = blobs(400)
    first, again = (LinearProbe().fit(features, labels, CLASSES) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    moved = LinearProbe().fit(features * 1000 - 7, labels, CLASSES)
    assert np.mean(moved(features * 1000 - 7) == first(features)) >= 0.995


def test_linear_survives_dead_dimensions_and_separable_classes() -> None:
    features, labels = blobs(300, spread=0.05)
    rounding = 0.1 + 1e-8 * (labels % 2 == 0)[:, None]  # as kernels of different batch sizes leave it
    dead = torch.cat([features, torch.zeros(300, 1), rounding], dim=1)
    assert dead[:, -1].min() < dead[:, -1].max()
    model = LinearProbe().fit(dead, labels, CLASSES)
    assert (model(dead) == labels.numpy()).all()
    assert not model.weight[:, -2:].any()
    dead[:, -2:] = 1e6  # a dimension that was constant in training says nothing, whatever it does later
    assert (model(dead) == labels.numpy()).all()


def test_linear_handles_a_class_without_images() -> None:
    features, labels = blobs(300)
    model = LinearProbe().fit(features, labels, CLASSES + 1)
    assert model.weight.shape == (CLASSES + 1, 24)
    assert CLASSES not in model(features)


def test_linear_says_when_it_did_not_converge() -> None:
    features, labels = blobs(300)
    with pytest.raises(Diverged, match="max_iterations"):
        LinearProbe(max_iterations=2).fit(features, labels, CLASSES)


def test_linear_logits_are_differentiable() -> None:
    features, labels = blobs(300)
    model = LinearProbe().fit(features, labels, CLASSES)
    leaf = features[:3].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.logits(leaf)[:, 2].sum(), leaf)
    assert torch.allclose(slope, model.weight[2].float().expand(3, -1))


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_reads_easy_classes(name: str) -> None:
    features, labels = blobs(500, spread=0.2)
    queries, truth = blobs(500, spread=0.2, seed=1)
    predict = fit_probe(name, Features(features, labels, torch.arange(500)), CLASSES)
    found = predict(queries)
    assert found.dtype == np.int64
    assert np.mean(found == truth.numpy()) > 0.8
    assert predict(queries.numpy()).tolist() == found.tolist()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert predict(queries[order]).tolist() == found[order].tolist()


@pytest.mark.parametrize("name", PROBES)
def test_no_probe_takes_nan_for_a_class(name: str) -> None:
    features, labels = blobs(100)
    predict = fit_probe(name, Features(features, labels, torch.arange(100)), CLASSES)
    features[3, 0] = torch.nan
    with pytest.raises(Diverged):
        predict(features)


@pytest.mark.parametrize("name", PROBES)
def test_probes_refuse_what_does_not_fit(name: str) -> None:
    features, labels = blobs(100)
    bank = Features(features, labels, torch.arange(100))
    with pytest.raises(ConfigError, match="labels span"):
        fit_probe(name, bank, CLASSES - 1)
    with pytest.raises(ConfigError, match="without labels"):
        fit_probe(name, Features(features, None, torch.arange(100)), CLASSES)
    with pytest.raises(ConfigError, match="unknown key"):
        fit_probe(name, bank, CLASSES, neighbours=3)
    with pytest.raises(ConfigError):
        fit_probe(name, bank, CLASSES)(features[:, :5])
    with pytest.raises(ConfigError):
        fit_probe(name, bank, CLASSES)(features[:0])


def test_unknown_probe_is_answered_with_the_known_ones() -> None:
    features, labels = blobs(10)
    with pytest.raises(ConfigError, match="knn, linear"):
        fit_probe("linnear", Features(features, labels, torch.arange(10)), CLASSES)
    for labels_given in (labels.float(), labels[:-1]):
        with pytest.raises(ConfigError):
            knn_predict(features, labels_given, features, num_classes=CLASSES)
    with pytest.raises(ConfigError):
        knn_predict(features, labels, features, num_classes=CLASSES, k=0)
