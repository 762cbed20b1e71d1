"""Where exports come from: runs of pretraining and fine-tuning, and files of official weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundwork.data.dataset import open_dataset
from groundwork.data.text import train_tokenizer
from groundwork.launch.cli import main
from groundwork.pretrain.engine.checkpoint import (
    FORMAT,
    CheckpointError,
    RunState,
    file_crc32c,
)
from groundwork.pretrain.kinds import build_objective, with_vocabulary
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.recipe import Recipe, load_recipe
from groundwork.pretrain.recipe_file import recipe_to_dict
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.exportable_sources import (
    exportable,
    find_exportable,
    read_labels,
)
from groundwork.pretrain.weights.trained import Trained, load_full_buffers

SIZES = ("channels=16", "depths=[1,1,1,1]", "groups=[1,2,4,8]")
NAMES = ("red disc", "green disc", "blue disc", "red bar", "green bar", "blue bar")


def trained(recipe: Recipe, shards: Path) -> Trained:
    """As `load_trained` gives it, without a run."""
    dataset = open_dataset(str(shards), "train")
    tokenizer = None
    if recipe.model.kind == "klite":
        tokenizer = train_tokenizer(NAMES, 600, recipe.model.text.context_length)
    state = RunState(7, 112, 1, recipe_to_dict(recipe), dataset.digest, "c0ffee", "", 0)
    objective = build_objective(recipe, tokenizer).eval()
    return Trained(shards, state, with_vocabulary(recipe, tokenizer), tokenizer, objective)


def classification(shards: Path, *settings: str) -> Recipe:
    given = [f"data.shards={shards}", "data.image.size=32", "model.num_classes=6"]
    return load_recipe(
        "internimage_emoji", [*given, *(f"model.{size}" for size in SIZES), *settings]
    )


def test_a_classification_run_brings_its_labels_licence_and_manifest(tiny_shards: Path) -> None:
    run = trained(classification(tiny_shards), tiny_shards)
    subject = exportable(run, ema=True)
    assert isinstance(subject.model, InternImage)
    assert subject.labels == NAMES
    assert subject.image.size == 32
    for part in (run.state.dataset, "c0ffee", "7 steps", "112 samples", "CC0", "averages"):
        assert part in subject.origin, part


def test_classes_without_a_name_keep_their_number(tiny_shards: Path) -> None:
    subject = exportable(trained(classification(tiny_shards, "model.num_classes=8"), tiny_shards))
    assert subject.labels == (*NAMES, "LABEL_6", "LABEL_7")


def test_a_data_set_that_has_changed_names_nothing(tiny_shards: Path) -> None:
    run = trained(classification(tiny_shards), tiny_shards)
    state = RunState(**{**vars(run.state), "dataset": "0123/train"})
    other = Trained(run.checkpoint, state, run.recipe, None, run.objective)
    assert exportable(other).labels == ()
    assert "CC0" not in exportable(other).origin


def test_the_towers_of_a_joint_run_are_models_of_their_own(tiny_shards: Path) -> None:
    settings = [f"data.shards={tiny_shards}"]
    run = trained(load_recipe("internimage_emoji_m3i", settings), tiny_shards)
    with torch.no_grad():
        run.objective.teacher.fc_norm[0].bias.add_(1.0)  # type: ignore[union-attr, index, operator]
    whole, image, teacher = (exportable(run, tower=t) for t in (None, "image", "teacher"))
    assert whole.config.kind == "klite"
    assert image.model is run.model.visual
    assert teacher.model is run.objective.teacher
    for tower in (image, teacher):
        assert isinstance(tower.config, InternImageConfig)
        assert tower.tokenizer is None
        tower.model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ExportError, match="unknown; choose image or teacher"):
        exportable(run, tower="text")  # type: ignore[arg-type]


def test_a_tower_that_is_not_there_is_named(tiny_shards: Path) -> None:
    run = trained(classification(tiny_shards), tiny_shards)
    with pytest.raises(ExportError, match="is an image model as a whole; leave the option out"):
        exportable(run, tower="image")
    swin = trained(load_recipe("klite_emoji", [f"data.shards={tiny_shards}"]), tiny_shards)
    with pytest.raises(ExportError, match="the tower is swin"):
        exportable(swin, tower="image")


def test_batch_statistics_are_part_of_a_checkpoint() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    buffers = {
        "1.running_mean": torch.tensor([1.0, 2.0]),
        "1.running_var": torch.tensor([3.0, 4.0]),
        "1.num_batches_tracked": torch.tensor(5),
    }
    load_full_buffers(module, buffers, Path("run"))
    assert module.state_dict()["1.running_var"].tolist() == [3.0, 4.0]
    assert module.state_dict()["1.num_batches_tracked"] == 5
    del buffers["1.running_mean"]
    with pytest.raises(CheckpointError, match=r"1.running_mean missing"):
        load_full_buffers(module, buffers, Path("run"))


# ---- fine-tuned ----

BACKBONE = InternImageConfig(
    num_classes=0, channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path=0.0
)


def finetuned(out: Path, task: dict[str, Any], classes: int | None, model: InternImage) -> Path:
    """A checkpoint as fine-tuning writes it, with an average that is twice the weights."""
    folder = out / "checkpoints" / "step-00000009"
    folder.mkdir(parents=True)
    weights = {f"backbone.{n}": v.clone() for n, v in model.state_dict().items()}
    weights["neck.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors")
    average = {n: 2 * v for n, v in weights.items()}
    save_file(average, folder / "ema.safetensors")
    record = {
        "format": FORMAT,
        "kind": "finetune",
        "step": 9,
        "world_size": 1,
        "spread": "plain",
        "recipe": {
            "task": task,
            "backbone": recipe_to_dict(BACKBONE),
            "data": {"shards": "somewhere"},
            "weights": {"path": "pretrained"},
        },
        "classes": classes,
        "dataset": "abc/train",
        "bad_samples": 0,
        "best": None,
        "ema_updates": 9,
        "files": {p.name: [p.stat().st_size, file_crc32c(p)] for p in folder.iterdir()},
    }
    (folder / "checkpoint.json").write_text(json.dumps(record))
    (out / "checkpoints" / "latest").write_text(folder.name)
    return out


def test_a_fine_tuned_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    model = InternImage(InternImageConfig(**{**vars(BACKBONE), "num_classes": 5})).eval()
    task = {"kind": "classification", "image": {"size": 96, "resample": "bilinear"}}
    run = finetuned(tmp_path, task, 5, model)
    subject = find_exportable(run)
    assert (subject.image.size, subject.image.resample) == (96, "bilinear")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(subject.model(x), model(x))
    averaged = find_exportable(run, ema=True)
    assert torch.equal(averaged.model.head.bias, 2 * model.head.bias)  # type: ignore[union-attr]
    assert "`pretrained`" in subject.origin
    (tmp_path / "checkpoints/step-00000009/ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no averages of the weights in it"):
        find_exportable(run, ema=True)


def test_of_a_detector_the_backbone_is_exported(tmp_path: Path) -> None:
    model = InternImage(BACKBONE).eval()
    subject = find_exportable(finetuned(tmp_path, {"kind": "dino_detection"}, None, model))
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        maps = subject.model.features(x)  # type: ignore[operator]
        assert all(torch.equal(*pair) for pair in zip(maps, model.features(x), strict=True))
    assert "backbone alone" in subject.origin
    with pytest.raises(ExportError, match="of image-text models only"):
        find_exportable(tmp_path, tower="image")


# ---- official files, and the command ----


def tiny_variant(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Path, InternImage]:
    """A file of official weights, of a size for tests that stands for T."""
    config = InternImageConfig(**{**vars(BACKBONE), "num_classes": 1000})
    monkeypatch.setattr(InternImageConfig, "variant", staticmethod(lambda name: config))
    torch.manual_seed(0)
    model = InternImage(config).eval()
    torch.save({"model": model.state_dict()}, folder / "internimage.pth")
    return folder / "internimage.pth", model


def test_official_weights_become_a_folder_for_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tiny_variant(monkeypatch, tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {i}" for i in range(1000)))
    out = tmp_path / "out"
    command = ["export", "--checkpoint", str(path), "--variant", "t", "--out", str(out)]
    command += ["--format", "official", "--labels", str(names), "--licence", "mit", "--pth"]
    assert main(command) == 0
    assert "reloaded in a fresh process" in capsys.readouterr().out
    written = load_file(out / "model.safetensors")
    expected: dict[str, Tensor] = model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert json.loads((out / "config.json").read_text())["labels"][999] == "class 999"
    assert 'license: "mit"' in (out / "README.md").read_text()


def message_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["export", *arguments]) != 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-classes", "5"], "--num-classes: of official weights only"),
        (["--size", "384"], "--size: of official weights only"),
        (["--variant", "huge"], "there is no variant 'huge'"),
        (["--variant", "t", "--ema"], "--ema: of runs only"),
        (["--variant", "t", "--tower", "image"], "--tower: of runs only"),
        (["--variant", "t", "--size", "0"], "size is 0"),
        (["--variant", "t"], "no such file"),
        (["--opset", "9"], "choose 16 to 23"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert message in message_of([*places, *arguments], capsys)
    assert not (tmp_path / "out").exists()


def test_labels_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tench\n goldfish \n")
    assert read_labels(path) == ("tench", "goldfish")
    path.write_text("tench\n\ngoldfish\n")
    with pytest.raises(ExportError, match=r"names.txt:2: an empty line"):
        read_labels(path)
    with pytest.raises(ExportError, match="cannot be read"):
        read_labels(tmp_path / "none")


# ---- a run, from its start to its export ----


@pytest.mark.slow
@pytest.mark.multirank
def test_a_run_is_exported_with_its_averages(
    tiny_shards: Path, tmp_path: Path, start_job: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    settings = [f"data.shards={tiny_shards}", "data.image.size=32", "model.num_classes=6"]
    settings += [f"model.{size}" for size in SIZES]
    settings += ["train.steps=4", "train.global_batch=16", "schedule.warmup_steps=1"]
    settings += ["monitor.tensorboard=false"]
    given = [part for setting in settings for part in ("--set", setting)]
    job = start_job(
        "pretrain", "internimage_emoji", "--out", str(run), *given, launcher="groundwork"
    )
    assert job.wait() == 0, job.text()
    for ema in ("--ema", "--no-ema"):
        out = tmp_path / ema
        assert main(["export", "--checkpoint", str(run), "--out", str(out), ema]) == 0
    weights = [load_file(tmp_path / ema / "model.safetensors") for ema in ("--ema", "--no-ema")]
    for name in ("head.weight", "conv_head.1.0.running_mean"):
        assert not torch.equal(weights[0][name], weights[1][name]), name
    config = json.loads((tmp_path / "--ema" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(NAMES)
