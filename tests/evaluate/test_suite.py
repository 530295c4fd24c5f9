"""The suite on models whose figures are known, and on real images: what each section says and shows.

Shapes: B batch, P pixels, D latent width.
"""

import io
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_toy import (
    PIXELS,
    LinearInference,
    QuadraticEnergy,
    image_set,
    make_linear,
    transparent_model,
)
from PIL import Image

from jebm.config import Config, Data, Energy, Generator, Inference, Langevin, config_to_dict
from jebm.core.model import JointModel, build_model
from jebm.data.dataset import ImageSet
from jebm.errors import ConfigError
from jebm.evaluate import section_chains, section_hierarchy, section_likelihood
from jebm.evaluate.features.classifier import ClassifierFeatures
from jebm.evaluate.latents import latent_samples
from jebm.evaluate.restore import Restored
from jebm.evaluate.section_chains import chains_section
from jebm.evaluate.section_hierarchy import hierarchy_section
from jebm.evaluate.section_likelihood import likelihood_section
from jebm.evaluate.section_ood import ood_section
from jebm.evaluate.section_samples import samples_section
from jebm.evaluate.subject import Sizes, Subject
from jebm.evaluate.suite import evaluate, measures_of
from jebm.report.findings import Section
from jebm.store.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]


def subject_of(model: JointModel, images: ImageSet, config: Config | None = None, **keywords) -> Subject:
    return Subject(model.eval(), config or Config(), images, **keywords)


def origin_of(subject: Subject) -> Restored:
    manifest = Manifest(
        run="toy",
        step=3,
        attempt=1,
        world_size=1,
        config=config_to_dict(subject.config),
        provenance={},
        metrics={},
        state={},
        parent=None,
        created=datetime.now(UTC),
        objects=(),
    )
    return Restored(subject.model, subject.config, manifest, "memory://toy", "model")


def figures(section: Section) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in section.figures}


def pixels(x_BP: torch.Tensor) -> np.ndarray:
    """Return rows of 16 values in [-1, 1] as images of 4 x 4."""
    return ((x_BP.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).view(-1, 4, 4, 1).numpy()


def known_images(count: int, latents: int) -> np.ndarray:
    """Return images that `transparent_model` reconstructs: grey but for the first pixels."""
    x_BP = torch.zeros(count, PIXELS)
    x_BP[:, :latents] = torch.rand(count, latents, generator=torch.Generator().manual_seed(1)) - 0.5
    return pixels(x_BP)


# --- names


def test_suites_are_named_measures_and_a_slip_is_understood() -> None:
    assert measures_of(["quick"]) == {
        "likelihood": False,
        "samples": False,
        "hierarchy": False,
        "chains": False,
    }
    assert list(measures_of(["paper"])) == ["likelihood", "samples", "hierarchy", "ood", "chains"]
    assert all(measures_of(["paper"]).values())
    assert measures_of(["chains", "quick"])["chains"] is True
    assert list(measures_of(["ood", "likelihood"])) == ["likelihood", "ood"]
    with pytest.raises(ConfigError, match="unknown name likelyhood; did you mean likelihood"):
        measures_of(["likelyhood"])
    with pytest.raises(ConfigError, match="there are quick, paper, likelihood"):
        measures_of(["x"])


# --- likelihood


def test_log_z_is_found_from_both_sides_and_the_elbo_counts_it() -> None:
    """f = -z M z / 2 has log Z = -log det(I + M) / 2; q sees z without noise but for a variance of 1e-12."""
    matrix_DD = torch.diag(torch.tensor([3.0, 0.5, 0.0]))
    model = transparent_model((2, 1))
    model.energy = QuadraticEnergy(matrix_DD)
    images = image_set(known_images(300, 3))
    section = likelihood_section(subject_of(model, images, sizes=Sizes(temperatures=60)), full=True)
    assert section.warnings == ()
    found = figures(section)
    log_z = -0.5 * math.log(4 * 1.5)
    for way in ("from below", "from above", "from inside", "by importance sampling"):
        assert found[f"log Z {way}"] == pytest.approx(log_z, abs=0.03)
    x_BP = torch.from_numpy(images.images_NHWC).flatten(1).double() / 127.5 - 1
    f_B = -0.5 * (x_BP[:, :3] @ matrix_DD.double() * x_BP[:, :3]).sum(1)
    assert found["E_q[f]"] == pytest.approx(float(f_B.mean()), rel=1e-4)
    assert found["gain of the tilt"] == pytest.approx(float(f_B.mean()) - log_z, abs=0.03)
    # Grey is between two bytes: what is left of each pixel that the code does not know is half a level.
    assert found["reconstruction MSE"] == pytest.approx((PIXELS - 3) / PIXELS * (0.5 / 127.5) ** 2, rel=1e-3)
    weighted = found[f"importance-weighted bound, K = {section_likelihood._IWAE_SAMPLES}"]
    assert weighted > found["ELBO of the same images"]


def test_the_gaussian_prior_gains_nothing_and_needs_no_chain() -> None:
    subject = subject_of(transparent_model((2, 2)), image_set(known_images(20, 4)))
    found = figures(likelihood_section(subject))
    assert found["gain of the tilt"] == 0
    assert "log Z from below" not in found
    section = chains_section(subject, full=True)
    assert section.figures == ()
    assert "exact" in section.meaning


# --- out of distribution


def test_images_that_the_decoder_cannot_write_are_told_by_their_likelihood_alone() -> None:
    """Anomalies differ in the last pixels, which no latent reaches: neither f nor the prior sees that."""
    model = transparent_model((2, 2))
    model.energy = QuadraticEnergy(torch.eye(4))
    known, strange = known_images(300, 4), known_images(260, 4)
    strange[:, 3, :, :] = 255
    out, sizes = {"strange": image_set(strange)}, Sizes(temperatures=10)
    subject = subject_of(model, image_set(known), out=out, sizes=sizes)
    section = ood_section(subject)
    (table,) = section.tables
    assert table.title == "Against strange"
    auroc = {row[0]: row[1] for row in table.rows}
    assert auroc["log p(x|z)"] == auroc["log p(x, z)"] == auroc["ELBO"] == 1
    assert auroc["f"] == pytest.approx(0.5, abs=0.07)
    assert auroc["log prior"] == pytest.approx(0.5, abs=0.07)
    assert set(auroc) >= {"L>1", "-LLR>1"}
    assert figures(section)["AUROC of log p(x, z), strange"] == 1


def test_one_class_of_labelled_images_may_be_the_anomaly() -> None:
    known, labels_N = known_images(200, 4), np.repeat([7, 2], [190, 10]).astype(np.int32)
    known[190:, 3, :, :] = 255
    section = ood_section(subject_of(transparent_model((2, 2)), image_set(known, labels_N)))
    (table,) = section.tables
    assert table.columns[:3] == ("class", "log p(x, z)", "log p(x|z)")
    of_class = {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
    assert list(of_class) == [2, 7]
    assert of_class[2]["log p(x, z)"] == 1
    assert of_class[7]["log p(x, z)"] < of_class[2]["log p(x, z)"]
    assert "f" not in table.columns  # the Gaussian prior has none
    nothing = ood_section(subject_of(transparent_model((2, 2)), image_set(known)))
    assert "--out-of-distribution" in nothing.warnings[0]


# --- chains


def small_model(config: Config) -> JointModel:
    return build_model(config)


TINY = Config(
    data=Data(str(ROOT / "jobs/data/fashion_mnist_2000/train")),
    inference=Inference((2, 4), 8),
    generator=Generator((2, 4), 8),
    energy=Energy(8),
    langevin=Langevin(30, 0.5),
)


def test_a_step_size_that_is_too_large_is_warned_of_and_a_good_one_is_not(fashion_test: ImageSet) -> None:
    good = chains_section(subject_of(small_model(TINY), fashion_test, TINY))
    assert good.warnings == ()
    assert figures(good)["acceptance"] > 0.9
    rough = replace(TINY, langevin=Langevin(30, 1.6))
    bad = chains_section(subject_of(small_model(rough), fashion_test, rough))
    assert any("langevin.step_size 1.6" in line and "reduce it" in line for line in bad.warnings)
    f, norm, gradient = good.curves
    assert set(f.lines) == {"from N(0, I)", "from posterior samples"}
    assert f.x[0] == 0
    assert f.x[-1] == TINY.evaluation.chain_factor * 30
    assert len(norm.x) == len(gradient.lines["from N(0, I)"])


# --- samples


class Inception:
    """A net of that name, whose features are the pixels."""

    name = "inceptionv3"

    def __init__(self, sha256: str, dimension: int) -> None:
        self.sha256, self.dimension = sha256, dimension

    def __call__(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.flatten(1).repeat(1, self.dimension // PIXELS)


def test_a_distance_is_called_fid_in_inception_with_the_known_weights_alone() -> None:
    for known in (True, False):
        subject = subject_of(transparent_model((2, 2)), image_set(known_images(110, 4)), samples=110)
        vars(subject)["net"] = Inception(("6726825d" if known else "6726825e") + 56 * "0", PIXELS)
        section = samples_section(subject)
        assert ("FID, long chains" in figures(section)) == known
        assert ("Fréchet distance, long chains" in figures(section)) != known
        assert section.tables[0].columns[1] == ("FID" if known else "Fréchet")
        assert ("so no FID" in section.tables[0].meaning) != known
        assert [("6726825e…) are not the known" in line) for line in section.warnings] == [True] * (not known)


def test_fewer_images_than_features_are_warned_of() -> None:
    subject = subject_of(transparent_model((2, 2)), image_set(known_images(110, 4)), samples=120)
    vars(subject)["net"] = Inception("6726825d" + 56 * "0", 112)
    (line,) = samples_section(subject).warnings
    assert "110 images are fewer than the 112 features of inceptionv3" in line


def test_images_that_do_not_differ_are_not_praised_for_their_precision() -> None:
    """All grey, in the middle of the real ones: precision 1, recall 0."""
    model = transparent_model((2, 2))
    make_linear(model, torch.zeros(PIXELS, 4))
    subject = subject_of(model, image_set(known_images(110, 4)), samples=110)
    vars(subject)["net"] = Inception("6726825d" + 56 * "0", PIXELS)
    section = samples_section(subject)
    (note,) = section.notes
    assert "precision 1.00 with recall 0.00 means images that hardly differ" in note
    vars(subject)["model"] = transparent_model((2, 2))
    assert samples_section(subject).notes == ()


def test_each_layer_is_compared_by_itself() -> None:
    """q(z|x) = N((2, 0, 0), I) of each image against N(0, I): the first layer's AUC is Phi(2 / sqrt 2)."""
    model = transparent_model((2, 1))
    mean_D = torch.tensor([2.0, 0.0, 0.0])
    model.inference = LinearInference(torch.zeros(3, PIXELS), mean_D, torch.ones(3))
    subject = subject_of(model, image_set(known_images(1000, 3)))
    latents = latent_samples(subject, factor=1)
    best = 0.5 + 0.5 * math.erf(1.0)
    assert latents.auc() == pytest.approx(best, abs=0.03)
    bottom, top = map(latents.auc, subject.layer_columns)
    assert bottom == pytest.approx(best, abs=0.03)
    assert top == pytest.approx(0.5, abs=0.05)


# --- the whole, on real images


def test_everything_in_full_on_real_images(
    fashion_test: ImageSet,
    fashion_classifier: ClassifierFeatures,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an untrained model; what costs time is cut, what is shown is not."""
    monkeypatch.setenv("JEBM_CACHE", str(cache))
    for room, name, less in (
        (section_hierarchy, "_CLASSIFIER_UPDATES", 40),
        (section_hierarchy, "_CHANGED_IMAGES", 50),
        (section_hierarchy, "_DRAWS", 100),
        (section_likelihood, "_IWAE_IMAGES", 20),
        (section_chains, "_CHAINS", 20),
    ):
        monkeypatch.setattr(room, name, less)
    subject = subject_of(small_model(TINY), fashion_test, TINY, samples=110, sizes=Sizes(100, 20))
    found = evaluate(subject, origin_of(subject), measures_of(["paper"]), {"git_revision": "abc"})
    sections = {section.name: section for section in found.sections}
    assert list(sections) == ["likelihood", "samples", "hierarchy", "ood", "chains"]
    assert all(section.seconds > 0 for section in found.sections)
    assert found.provenance["features_sha256"] == fashion_classifier.sha256
    assert found.provenance["git_revision"] == "abc"
    assert found.provenance["step"] == "3"
    assert found.config["energy"]["width"] == 8
    assert found.title == "toy, joint EBM prior, at step 3 on fashion-mnist-2000 (test)"
    samples = sections["samples"]
    rows = {row[0]: row for row in samples.tables[0].rows}
    assert rows["prior samples, 600 Langevin steps"][1] == figures(samples)["Fréchet distance, long chains"]
    assert rows["real against real (halves)"][1] < rows["reconstructions"][1]
    assert [row[0] for row in samples.tables[1].rows][-1] == "the same generator, z ~ N(0, I)"
    assert 0.4 < figures(samples)["two-sample AUC, z3, long chains"] <= 1
    hierarchy = sections["hierarchy"]
    layers = hierarchy.tables[0]
    assert [row[0] for row in layers.rows] == ["z1", "z2", "z3"]
    assert all(0 <= share.value <= 1 for row in layers.rows for share in row[1:4])
    assert [table.title for table in hierarchy.tables[1:]] == [
        "Effect of each layer on f, z from N(0, I)",
        "Effect of each layer on f, z from the prior",
    ]
    pictures = {picture.file: picture.png for section in found.sections for picture in section.pictures}
    assert len(pictures) == sum(len(section.pictures) for section in found.sections)
    assert {"hierarchy-z3.png", "hierarchy-z1-marginal.png", "traversal-z2.png", "plane-z1.png"} <= set(
        pictures
    )
    sizes = {file: Image.open(io.BytesIO(png)).size for file, png in pictures.items()}
    assert sizes["hierarchy-z3.png"] == (10 * 29 * 2, 10 * 29 * 2)
    assert sizes["traversal-z2.png"] == (11 * 29 * 2, 2 * 29 * 2)
    assert sizes["chains-long.png"] == (26 * 29 * 2, 8 * 29 * 2)
    assert sizes["interpolation.png"] == (10 * 29 * 2, 8 * 29 * 2)
    long_chain = sections["chains"].curves[-1]
    assert (long_chain.x[-1], len(long_chain.lines)) == (2500, 8)
    assert "2,040 steps" in sections["chains"].meaning  # K and at least 2,000 more


def test_quick_shows_grids_and_asks_for_no_labels(fashion_test: ImageSet) -> None:
    unlabelled = ImageSet(fashion_test.images_NHWC, None, fashion_test.manifest)
    section = hierarchy_section(subject_of(small_model(TINY), unlabelled, TINY))
    assert [picture.file for picture in section.pictures] == [
        "hierarchy-z3.png",
        "hierarchy-z2.png",
        "hierarchy-z1.png",
    ]
    assert section.tables == ()
