"""Scores of normal and anomalous images for experiments/anomalies.py, and how well they separate them.

Higher is more normal. Shapes: N images, M reference images, D latent width, P pixels.
"""

import time

import torch
from anomaly_cases import BASELINES, ORACLE, Case  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

from jebm.campaign.rows import Row
from jebm.core.by_class import named_modules
from jebm.core.distributions import standard_log_density
from jebm.core.model import JointModel
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import to_float
from jebm.data.manifest import read_manifest
from jebm.evaluate.aggregate import AggregatePosterior, fit_aggregate
from jebm.evaluate.ood import average_precision, detection, scores
from jebm.evaluate.restore import restored
from jebm.evaluate.share import ALONE
from jebm.rng import gaussian_noise
from jebm.store.storage import open_store
from jebm.untrusted import JsonObject

SCORE = "log p(x, z)"
FISHER = "Fisher's sum"
"""log p-value of log p(x|z) plus log p-value of log prior, among reference images (Fisher 1925)."""
ONE_IN_TEN = "auprc at one in ten"
_NEIGHBOURS = 3
_MOST_TRAINING_IMAGES = 20_000
_BLOCK = 500


class Scores:
    """How well scores detect the anomalies of a case."""

    def identity(self, case: Case) -> JsonObject:
        """Return what a row depends on besides the run: the case, and the pixels of all sets it reads."""
        sets = {kind: getattr(case, kind) for kind in ("normal", "anomalous", "reference")}
        if case.arm in (ORACLE, *BASELINES):
            sets["train"] = case.config.data.train
        return {
            **{key: getattr(case, key) for key in ("arm", "anomaly", "seed", "given", "images")},
            **{kind: read_manifest(open_store(uri)).sha256 for kind, uri in sets.items() if uri},
        }

    def measure(self, case: Case) -> Row:
        """Return numbers of images, and {score: {measure: value}} as measures."""
        began = time.monotonic()
        kinds = {"normal": case.normal, "anomalous": case.anomalous, "reference": case.reference}
        sets = {kind: load_images(open_store(uri)) for kind, uri in kinds.items() if uri}
        step = 0
        if case.arm in BASELINES:
            found = _baseline(case, sets)
        else:
            trusted = () if case.given else named_modules(case.config)
            origin = restored(case.given or case.uri, trusted=trusted)
            step = origin.manifest.step
            found = {kind: _scored(origin.model, case, images, kind) for kind, images in sets.items()}
            if case.arm == ORACLE:
                found = _with_oracle(origin.model, case, sets, found)
            if "reference" in found:
                found = {kind: {**each, FISHER: _fisher(each, found)} for kind, each in found.items()}
        normal, anomalous = found["normal"], found["anomalous"]
        measures = {}
        for name in normal:
            values = detection(normal[name], anomalous[name])._asdict()
            values[ONE_IN_TEN] = average_precision(-anomalous[name], -normal[name], share=0.1)
            measures[name] = values
        return {
            "step": step,
            "normal images": len(next(iter(normal.values()))),
            "anomalous images": len(next(iter(anomalous.values()))),
            "seconds": round(time.monotonic() - began, 1),
            "measures": measures,
        }


@torch.no_grad()
def _scored(model: JointModel, case: Case, images: ImageSet, kind: str) -> dict[str, Tensor]:
    """Return the scores of the images, (N,) each."""
    images_NHWC = images.images_NHWC[: case.images]
    noise = gaussian_noise(case.seed, 0)
    batches = [
        scores(
            model,
            to_float(images_NHWC[rows].copy(), "cpu"),
            noise(position, f"scores of {kind} images"),
            case.config.langevin,
            log_z=0.0,
        )
        for position, rows in ALONE.batches(len(images_NHWC))
    ]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# -------------------------------------------------------------------------------------------- the oracle


def _with_oracle(
    model: JointModel, case: Case, sets: dict[str, ImageSet], found: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return the scores with the aggregate posterior of the training images as prior.

    Its bandwidth is chosen on the reference images. L>k is left out: it would need conditional samples.
    """
    train = load_images(open_store(case.config.data.train))
    _, mean_ND, log_variance_ND = _codes(model, case, train, "training")
    codes = {kind: _codes(model, case, images, kind)[0] for kind, images in sets.items()}
    prior: AggregatePosterior = fit_aggregate(mean_ND, log_variance_ND, codes["reference"])
    result = {}
    for kind, each in found.items():
        log_prior_N = prior.log_density(codes[kind])
        log_likelihood_N = each["log p(x|z)"]
        result[kind] = {
            SCORE: log_likelihood_N + log_prior_N,
            "log p(x|z)": log_likelihood_N,
            "f": log_prior_N - standard_log_density(codes[kind]),
            "log prior": log_prior_N,
        }
    return result


@torch.no_grad()
def _codes(model: JointModel, case: Case, images: ImageSet, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return one code, the mean and the log-variance of q(z|x), (N, D) each, with the noise of `_scored`."""
    images_NHWC = images.images_NHWC[:_MOST_TRAINING_IMAGES] if kind == "training" else images.images_NHWC
    noise, parts = gaussian_noise(case.seed, 0), []
    for position, rows in ALONE.batches(len(images_NHWC)):
        x_BCHW = to_float(images_NHWC[rows].copy(), "cpu")
        normal = noise(position, f"scores of {kind} images")
        parts.append(model.posterior(x_BCHW, normal(len(x_BCHW), model.latent_dim)))
    code, mean, log_variance = (torch.cat(columns).double() for columns in zip(*parts, strict=True))
    return code, mean, log_variance


def _fisher(scores_: dict[str, Tensor], found: dict[str, dict[str, Tensor]]) -> Tensor:
    """Return the sum of the log p-values of reconstruction and log prior, (N,): no anomaly is used."""
    total = torch.zeros(len(scores_["log prior"]), dtype=torch.float64)
    for name in ("log p(x|z)", "log prior"):
        reference_M = found["reference"][name].sort().values
        below_N = torch.searchsorted(reference_M, scores_[name], right=True)
        total += torch.log((1 + below_N.double()) / (1 + len(reference_M)))
    return total


# ---------------------------------------------------------------------------------------------- baselines


def _baseline(case: Case, sets: dict[str, ImageSet]) -> dict[str, dict[str, Tensor]]:
    """Return the score of an arm without a model, fitted on the training images."""
    train_NP = _pixels(load_images(open_store(case.config.data.train)))[:_MOST_TRAINING_IMAGES]
    components = sum(case.config.model.latent_dims)
    score = _Nearest(train_NP) if case.arm == "knn" else _PrincipalComponents(train_NP, components)
    tested = {kind: sets[kind] for kind in ("normal", "anomalous")}
    return {kind: {SCORE: score(_pixels(images)[: case.images])} for kind, images in tested.items()}


def _pixels(images: ImageSet) -> Tensor:
    return torch.from_numpy(images.images_NHWC.copy()).flatten(1).float() / 127.5 - 1


class _Nearest:
    """Minus the mean distance in pixels to the three nearest training images."""

    def __init__(self, train_NP: Tensor) -> None:
        self.train_NP = train_NP

    def __call__(self, x_NP: Tensor) -> Tensor:
        blocks = [
            torch.cdist(block, self.train_NP).topk(_NEIGHBOURS, largest=False).values.mean(1)
            for block in torch.split(x_NP, _BLOCK)
        ]
        return -torch.cat(blocks).double()


class _PrincipalComponents:
    """Minus the squared error of a reconstruction from as many principal components as there are latents."""

    def __init__(self, train_NP: Tensor, components: int) -> None:
        self.mean_P = train_NP.mean(0)
        covariance_PP = (train_NP - self.mean_P).T @ (train_NP - self.mean_P)
        self.basis_PD = torch.linalg.eigh(covariance_PP).eigenvectors[:, -components:]

    def __call__(self, x_NP: Tensor) -> Tensor:
        centred_NP = x_NP - self.mean_P
        error_NP = centred_NP - centred_NP @ self.basis_PD @ self.basis_PD.T
        score_N: Tensor = -error_NP.double().square().sum(1)
        return score_N
