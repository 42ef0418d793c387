"""Probes: classifiers fitted on frozen features, the readout through which an encoder's backdoor is measured.

`linear` is the headline, `knn` stands beside it. A probe's features must be those of clean, labeled images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor

from blto.errors import ConfigError, Diverged
from blto.evaluation.features import Features, is_finite
from blto.evaluation.neighbours import nearest
from blto.registry import Card, Registry

FeatureMatrix = Tensor | npt.NDArray[Any]
Predict = Callable[[FeatureMatrix], npt.NDArray[np.int64]]

PROBES = ("linear", "knn")  # the headline first


class Probe(Protocol):
    """A recipe for a classifier on frozen features."""

    card: Card

    def fit(self, features: FeatureMatrix, labels: FeatureMatrix, num_classes: int) -> Predict:
        """Fit on (N, D) features and (N,) integer labels; returns a function (M, D) -> predicted classes (M,)."""
        ...


def fit_probe(name: str, bank: Features, num_classes: int, **options: Any) -> Predict:
    """Fit the probe called `name` on a bank of labeled features.

    Raises:
        ConfigError: unknown name or option, or a bank without labels.
    """
    probe = _REGISTRY.build({"name": name, **options})
    if bank.labels is None:
        raise ConfigError(f"the {name} probe was given features without labels; extract them with their labels.")
    return probe.fit(bank.vectors, bank.labels, num_classes)


def check_probe(name: str, where: str, **options: Any) -> None:
    """Raises ConfigError, with the key under `where`, for an unknown probe or option, or a value out of range."""
    _REGISTRY.resolve({"name": name, **options}, where)


class KNNProbe:
    """Weighted k-nearest-neighbour vote, see `knn_predict`.

    Args:
        k: number of neighbours, capped by the size of the bank.
        temperature: of the weights.
    """

    card = Card(
        title="Weighted kNN",
        summary="k = 200 cosine neighbours vote with weight exp(similarity / 0.1).",
        paper="Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018",
        year=2018,
    )

    def __init__(
        self, *, k: Annotated[int, Field(ge=1)] = 200, temperature: Annotated[float, Field(gt=0)] = 0.1
    ) -> None:
        self.k = k
        self.temperature = temperature

    def fit(self, features: FeatureMatrix, labels: FeatureMatrix, num_classes: int) -> Predict:
        """Keep the bank; prediction does the work."""
        bank, bank_labels = _labeled(features, labels, num_classes)

        def predict(queries: FeatureMatrix) -> npt.NDArray[np.int64]:
            return knn_predict(
                bank, bank_labels, queries, num_classes=num_classes, k=self.k, temperature=self.temperature
            )

        return predict


def knn_predict(
    bank: FeatureMatrix,
    bank_labels: FeatureMatrix,
    queries: FeatureMatrix,
    *,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> npt.NDArray[np.int64]:
    """The class with the largest weighted vote among the k most similar features of the bank (Wu et al. 2018, 3.4).

    Similarity is the cosine, the weight exp(similarity / temperature); k and temperature as in CTRL's readout. Of equal
    similarities at the border of the k, the lower index of the bank votes. Memory does not grow with the queries.

    Args:
        bank: (N, D) features, of any scale.
        bank_labels: (N,) integers in [0, num_classes).
        queries: (M, D) features.
        num_classes: number of classes.
        k: neighbours; a bank smaller than k votes as a whole.
        temperature: greater than 0.

    Returns:
        Predicted classes (M,); of classes with equal votes the lowest.

    Raises:
        ConfigError: shapes, labels or options that do not fit.
        Diverged: a feature is not finite.
    """
    keys, labels = _labeled(bank, bank_labels, num_classes)
    if k < 1 or temperature <= 0:
        raise ConfigError(f"kNN with k = {k} and temperature = {temperature}; give k of at least 1, temperature > 0.")
    keys = F.normalize(keys, dim=1)
    queries = F.normalize(_matrix(queries, keys.shape[1]), dim=1)
    answers = []
    for similarities, neighbours in nearest(keys, queries, min(k, len(keys))):
        # Relative to the nearest neighbour: the same vote, and no overflow at a low temperature.
        weights = ((similarities - similarities.amax(dim=1, keepdim=True)) / temperature).exp()
        votes = torch.zeros(len(weights), num_classes).scatter_add_(1, labels[neighbours], weights)
        answers.append(votes.argmax(dim=1))
    return torch.cat(answers).numpy()


@dataclass(frozen=True, eq=False)
class LinearModel:
    """A fitted linear classifier on features as the encoder yields them: standardisation is folded in.

    Args:
        weight: float64 (C, D).
        bias: float64 (C,).
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(M, D) -> (M, C), float64, differentiable with respect to the features."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def __call__(self, features: FeatureMatrix) -> npt.NDArray[np.int64]:
        """Predicted classes (M,). Raises Diverged where a feature is not finite."""
        with torch.inference_mode():
            return self.logits(_matrix(features, self.weight.shape[1])).argmax(dim=1).numpy()


class LinearProbe:
    """Multinomial logistic regression on standardised features, converged, so that no schedule decides a result.

    Minimises mean cross-entropy + l2 / 2 * ||W||^2 over W and an unpenalised bias, on features standardised with the
    training mean and deviation. scikit-learn's `LogisticRegression(C=1 / (l2 * N))` is the same problem. Public SSL
    backdoor code runs 40 epochs of SGD with weight decay 1e-4 here; this is the optimum that it approaches. Unlike that
    code, features are not divided by their norm first.

    Args:
        l2: penalty; the default is the customary weight decay.
        tolerance: largest entry of the gradient at the end, in the white basis (see `fit_logistic`), where it bounds
            the distance to the optimum whatever the features' scale. Below 1e-8 float64 cannot see a descent.
        max_iterations: of L-BFGS.
    """

    card = Card(
        title="Linear probe",
        summary="Standardised features, L2-penalised multinomial logistic regression, converged by L-BFGS.",
    )

    def __init__(
        self,
        *,
        l2: Annotated[float, Field(gt=0)] = 1e-4,
        tolerance: Annotated[float, Field(ge=1e-8)] = 1e-5,
        max_iterations: Annotated[int, Field(ge=1)] = 2000,
    ) -> None:
        self.l2 = l2
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def fit(self, features: FeatureMatrix, labels: FeatureMatrix, num_classes: int) -> LinearModel:
        """Fit. Deterministic. Raises Diverged where the tolerance is not reached in `max_iterations`."""
        matrix, classes = _labeled(features, labels, num_classes)
        x = matrix.double()
        mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
        # A dimension that is constant up to float32 rounding is taken out: divided by infinity, its weight is 0.
        scale = torch.where(scale > 1e-6 * mean.abs(), scale, torch.inf)
        weight, bias = fit_logistic(
            x.sub_(mean).div_(scale),
            classes,
            num_classes,
            l2=self.l2,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        weight = weight / scale
        return LinearModel(weight, bias - weight @ mean)


def fit_logistic(
    x: Tensor, labels: Tensor, num_classes: int, *, l2: float, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """The minimum of mean cross-entropy + l2 / 2 * ||W||^2: weights (C, D) and bias (C,).

    L-BFGS in a basis where the features are white. Near W = 0 the Hessian is S / C + l2 per class (S the second moment
    of the features), so in the basis W = V diag(s) Q^T, with S = Q diag(e) Q^T and s = (e / C + l2)^(-1/2), it is about
    the identity. The optimum is the same; correlated features need tens of steps instead of thousands.

    Args:
        x: float64 (N, D), centred.
        labels: int64 (N,) in [0, num_classes).
        l2, tolerance, max_iterations: see `LinearProbe`.

    Raises:
        Diverged: the tolerance is not reached.
    """
    n, dim = x.shape
    eigenvalues, basis = torch.linalg.eigh(x.T @ x / n)
    to_white = basis * (eigenvalues.clamp_min(0) / num_classes + l2).rsqrt()  # Q diag(s), (D, D)
    penalty = l2 * to_white.square().sum(dim=0)  # l2 s^2, (D,)
    rows = torch.arange(n)

    def objective(flat: npt.NDArray[np.float64], z: Tensor) -> tuple[float, npt.NDArray[np.float64]]:
        parameters = torch.from_numpy(flat).view(num_classes, dim + 1)
        v, bias = parameters[:, :dim], parameters[:, dim]
        log_probabilities = torch.addmm(bias.to(z), z, v.T.to(z)).log_softmax(dim=1)
        loss = -log_probabilities[rows, labels].double().mean() + 0.5 * (penalty * v.square()).sum()
        residual = log_probabilities.exp_()  # softmax - one-hot, (N, C)
        residual[rows, labels] -= 1
        gradient = torch.cat([residual.T @ z / n + penalty * v, residual.mean(dim=0).unsqueeze(1)], dim=1)
        return float(loss), gradient.flatten().numpy()

    # ftol = 0: only the gradient decides that it has converged.
    options = {"gtol": tolerance, "ftol": 0.0, "maxiter": max_iterations, "maxfun": 4 * max_iterations, "maxcor": 20}
    solution, z = np.zeros(num_classes * (dim + 1)), x @ to_white
    # float32 products are three times as fast; float64 takes over in the rare case that they are too coarse.
    for dtype in (torch.float32, torch.float64):
        found = minimize(objective, solution, (z.to(dtype),), jac=True, method="L-BFGS-B", options=options)
        solution, largest = found.x, float(np.abs(found.jac).max())
        if largest <= tolerance:
            break
    else:
        raise Diverged(
            f"linear probe: gradient {largest:.1e} after {found.nit} iterations, tolerance {tolerance:.1e}; "
            "raise l2, max_iterations or tolerance."
        )
    parameters = torch.from_numpy(solution).view(num_classes, dim + 1)
    return parameters[:, :dim] @ to_white.T, parameters[:, dim]


def _matrix(features: FeatureMatrix, dim: int | None = None) -> Tensor:
    """The features as float32 (N, D) on the CPU, all finite."""
    tensor = features if isinstance(features, Tensor) else torch.from_numpy(np.array(features))
    if (
        tensor.ndim != 2
        or not len(tensor)
        or not tensor.is_floating_point()
        or tensor.shape[1] != (dim or tensor.shape[1])
    ):
        raise ConfigError(f"features are {tensor.dtype} {tuple(tensor.shape)}; give floats (N, {dim or 'D'}), N >= 1.")
    if not is_finite(tensor):
        raise Diverged("features hold NaN or infinity; a prediction from them would be some arbitrary class.")
    return tensor.detach().float().cpu()


def _labeled(features: FeatureMatrix, labels: FeatureMatrix, num_classes: int) -> tuple[Tensor, Tensor]:
    """Features as `_matrix` makes them, and labels as int64 (N,) in [0, num_classes)."""
    matrix = _matrix(features)
    classes = labels if isinstance(labels, Tensor) else torch.from_numpy(np.array(labels))
    if classes.shape != (len(matrix),) or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ConfigError(f"labels are {classes.dtype} {tuple(classes.shape)}; give integers ({len(matrix)},).")
    if int(classes.min()) < 0 or int(classes.max()) >= num_classes:
        raise ConfigError(
            f"labels span [{int(classes.min())}, {int(classes.max())}]; give 0 to {num_classes - 1}, or more classes."
        )
    return matrix, classes.long().cpu()


_REGISTRY: Registry[Probe] = Registry(
    "probe", {"linear": "blto.evaluation.probes:LinearProbe", "knn": "blto.evaluation.probes:KNNProbe"}
)
