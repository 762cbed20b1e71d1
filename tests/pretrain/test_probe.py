"""k-NN and linear probe against slow or foreign implementations, and the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from groundwork.data.dataset import open_dataset
from groundwork.launch.cli import main
from groundwork.pretrain.downstream.evaluation.frozen import split_features
from groundwork.pretrain.downstream.evaluation.image_models import ImageModel, load_image_model
from groundwork.pretrain.downstream.evaluation.probe import (
    fit_logistic_regression,
    knn_accuracy,
    linear_probe,
)
from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading
from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_config import InternImageConfig as Config

SPLIT = "heldout_renderings"


def clouds(seed: int, classes: int = 7, each: int = 30, width: int = 5) -> tuple[Tensor, Tensor]:
    """Points around a centre per class, with labels that are no row numbers."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat(each)
    points = centres[labels] + 0.9 * torch.randn(len(labels), width, generator=generator)
    return points, labels * 3 + 2


def slow_knn(
    train: np.ndarray, labels: np.ndarray, point: np.ndarray, k: int, temperature: float
) -> list[int]:
    """Classes of one point, best first, by the formula."""
    similarity = [float(point @ row / np.linalg.norm(point) / np.linalg.norm(row)) for row in train]
    nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
    votes: dict[int, float] = {}
    for i in nearest:
        votes[int(labels[i])] = votes.get(int(labels[i]), 0) + np.exp(similarity[i] / temperature)
    return sorted(votes, key=lambda c: -votes[c])


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_is_the_weighted_vote(temperature: float) -> None:
    (train, labels), (test, truth) = clouds(0), clouds(1, each=9)
    got = knn_accuracy(train, labels, test, truth, (1, 5, 20), temperature)
    for k in (1, 5, 20):
        orders = [
            slow_knn(train.double().numpy(), labels.numpy(), p.double().numpy(), k, temperature)
            for p in test
        ]
        top1 = np.mean([o[0] == t for o, t in zip(orders, truth.tolist(), strict=True)])
        assert got[k]["top1"] == pytest.approx(100 * top1)
    assert 20 < got[20]["top1"] < 95  # neither trivial nor hopeless


def test_a_neighbourhood_larger_than_the_split_is_left_out() -> None:
    train, labels = clouds(0)
    assert list(knn_accuracy(train, labels, train, labels, (10, 20, 10_000))) == [10, 20]
    with pytest.raises(ValueError, match="210 samples, fewer than any of 500"):
        knn_accuracy(train, labels, train, labels, (500,))


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    features, labels = clouds(3)
    index = (labels - 2) // 3
    ours = fit_logistic_regression(features, index, 7, penalty)
    theirs = linear.LogisticRegression(C=1 / (penalty * len(features)), tol=1e-10, max_iter=10_000)
    theirs.fit(features.double().numpy(), index.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=2e-4)
    # the biases are free up to a constant over the classes
    np.testing.assert_allclose(
        ours.bias.numpy() - ours.bias.numpy().mean(),
        theirs.intercept_ - theirs.intercept_.mean(),
        atol=2e-4,
    )


def test_the_fit_is_a_minimum_wherever_it_begins() -> None:
    features, labels = clouds(3)
    index = (labels - 2) // 3
    far = fit_logistic_regression(features, index, 7, 1e-6)
    again = fit_logistic_regression(features, index, 7, 0.01, start=far)
    torch.testing.assert_close(
        again.weight, fit_logistic_regression(features, index, 7, 0.01).weight, rtol=0, atol=1e-4
    )


def test_the_penalty_is_chosen_where_features_are_many() -> None:
    """40 samples in 200 dimensions of noise and one of signal: no penalty would overfit."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n) % 2
        noise = torch.randn(n, 60, generator=generator)
        return torch.cat([noise, (labels * 2.0 - 1)[:, None] + 0.2 * noise[:, :1]], 1), labels

    (train, labels), (test, truth) = split(200), split(400)
    result = linear_probe(train, labels, test, truth)
    assert result.top1 > 95 and result.top5 == 100
    assert result.held_out[result.penalty] == max(result.held_out.values())
    with pytest.raises(ValueError, match="one class only"):
        linear_probe(train, torch.zeros(200), test, truth)


@pytest.fixture(scope="module")
def official_t(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official file of InternImage-T, untrained, with 22 classes."""
    torch.manual_seed(0)
    model = InternImage(InternImageConfig(num_classes=22))
    path = tmp_path_factory.mktemp("official") / "t.safetensors"
    save_file({n: v.contiguous() for n, v in model.official_state_dict().items()}, path)
    return path


def test_features_are_the_pooled_ones_of_the_model(official_t: Path, tiny_shards: Path) -> None:
    model: ImageModel = load_image_model(official_t, variant="t")
    assert model.num_classes == 22 and model.image.size == 224
    from dataclasses import replace

    image = replace(model.image, size=32)
    dataset = open_dataset(str(tiny_shards), SPLIT)
    found = split_features(model, dataset, image, SplitReading(5))
    whole = split_features(model, dataset, image, SplitReading(12))
    assert found.features.shape == (12, Config(num_classes=22).out_dim)
    torch.testing.assert_close(found.features, whole.features, rtol=1e-4, atol=1e-4)
    assert found.labels.tolist() == [dataset.read(i).info["label"] for i in range(12)]


def test_a_file_without_its_architecture_is_refused(official_t: Path) -> None:
    with pytest.raises(CheckpointError, match="name it with --variant"):
        load_image_model(official_t)
    with pytest.raises(CheckpointError, match="of another model"):
        load_image_model(official_t, variant="s")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_image_model(official_t.with_name("none.pth"), variant="t")


def test_a_run_that_saved_nothing_yet_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_image_model(tmp_path)


def test_the_commands_write_results(official_t: Path, tiny_shards: Path, tmp_path: Path) -> None:
    index = tmp_path / "map.txt"
    index.write_text("".join(f"{row}\n" for row in (20, 0, 3, 4, 7, 11)))
    common = ["--checkpoint", str(official_t), "--variant", "t", "--shards", str(tiny_shards)]
    common += ["--size", "32", "--workers", "0"]

    def results(command: str, *more: str) -> dict[str, float]:
        out = tmp_path / f"{command}.json"
        assert main(["evaluate", command, *common, *more, "--out", str(out)]) == 0
        found: dict[str, float] = json.loads(out.read_text())
        return found

    scored = results("classification", "--split", SPLIT, "--class-indices", str(index))
    assert scored["samples"] == 12 and 0 <= scored["top1"] <= scored["top5"] <= 100
    probed = results("linear-probe", "--test", SPLIT)
    assert probed["train_samples"] == 96 and probed["top1"] > 30  # colours survive random features
    near = results("knn", "--test", SPLIT, "-k", "5")
    assert near["top1, k=5"] > 30 and near["top5, k=5"] >= near["top1, k=5"]


def test_a_classifier_of_fewer_classes_than_the_data_is_told(
    official_t: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "map.txt"
    index.write_text("1\n2\n")
    command = ["evaluate", "classification", "--checkpoint", str(official_t), "--variant", "t"]
    command += ["--shards", str(tiny_shards), "--split", SPLIT, "--size", "32", "--workers", "0"]
    assert main([*command, "--class-indices", str(index)]) == 1
    error = capsys.readouterr().err
    assert "8 of 12 samples" in error and "the model has the classes 0 to 1" in error


def test_too_many_neighbours_are_told(
    official_t: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "knn", "--checkpoint", str(official_t), "--variant", "t", "-k", "500"]
    command += ["--shards", str(tiny_shards), "--test", SPLIT, "--size", "32", "--workers", "0"]
    assert main(command) == 2
    assert "96 samples, fewer than any of 500" in capsys.readouterr().err
