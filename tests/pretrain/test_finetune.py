"""Fine-tuning in one process: what it learns, what it saves, how it goes on, what it refuses."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

from groundwork.data.samples import Sample
from groundwork.data.shards import ShardError, write_shards
from groundwork.data.stream import BadDataError, UnreadableDataError
from groundwork.pretrain.downstream.classification import ClassificationTask, TopK
from groundwork.pretrain.downstream.evaluation.image_models import load_image_model
from groundwork.pretrain.downstream.finetuning.engine import start_accelerator
from groundwork.pretrain.downstream.finetuning.recipe import (
    FinetuneRecipe,
    RecipeError,
    available_finetune_recipes,
    load_finetune_recipe,
)
from groundwork.pretrain.downstream.finetuning.run import (
    TASKS,
    build_task,
    check_finetune_inputs,
    finetune,
    finetune_plan,
    open_finetune_data,
)
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    complete_checkpoints,
    require_checkpoint,
)
from groundwork.pretrain.engine.optimizer import build_optimizer
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

STEPS = 24
RECIPE = """
task: {{kind: classification, image: {{size: 32, scale: [0.7, 1.0]}}}}
backbone: {{channels: 16, depths: [1, 1, 1, 1], groups: [1, 2, 4, 8], drop_path: 0.1}}
data: {{shards: {shards}, evaluation_split: heldout_renderings, workers: 0}}
train: {{steps: {steps}, global_batch: 16, micro_batch: 8, precision: fp32, gradient_clipping: 5.0}}
optimizer: {{lr: 3.0e-3, weight_decay: 0.05, layer_decay: 0.9}}
schedule: {{kind: timm_cosine, warmup_steps: 3}}
ema: {{decay: 0.8}}
evaluation: {{every_steps: 8, batch: 5}}
checkpoint: {{every_steps: 5}}
monitor: {{log_every: 1, tensorboard: false}}
"""


class StopAfter:
    """Asks for a polite stop when it has been asked that often."""

    def __init__(self, steps: int = 10**9) -> None:
        self.left = steps

    def agreed(self) -> bool:
        self.left -= 1
        return self.left < 0


def forget_the_job() -> None:
    """Accelerate keeps its state for the life of a process, and so does the process group."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def recipe_file(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny_finetune.yaml"
    path.write_text(RECIPE.format(shards=tiny_shards, steps=STEPS))
    return path


def run(recipe: FinetuneRecipe, out: Path, stop: StopAfter | None = None) -> int:
    """One process, as `groundwork finetune` runs it."""
    data = check_finetune_inputs(recipe, out)
    accelerator, world = start_accelerator(recipe.train, finetune_plan(recipe, 1, 0), 60)
    asked: Any = stop or StopAfter()
    try:
        return finetune(recipe, out, accelerator, world, asked, data)
    finally:
        forget_the_job()


@pytest.fixture(scope="module")
def trained(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained")
    assert run(load_finetune_recipe(str(recipe_file)), out) == STEPS
    return out


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(out)]


def assert_same_checkpoint(a: Path, b: Path) -> None:
    assert a.name == b.name
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys() and len(one) > 100
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=0)


def test_it_learns_and_is_evaluated(trained: Path) -> None:
    loss = [value for _, value, _ in losses(trained)]
    assert sum(loss[-4:]) / 4 < 0.75 * sum(loss[:4]) / 4
    evaluations = lines(trained, "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [8, 16, 24]
    assert all(e["samples"] == 12 and e["bad_samples"] == 0 for e in evaluations)
    best = json.loads((trained / "results.json").read_text())["best"]
    assert best["metric"] == "top1" and best["value"] == max(e["top1"] for e in evaluations)
    assert best["value"] > 60  # of six classes


def test_the_last_checkpoints_and_the_best_one_are_kept(trained: Path) -> None:
    best = json.loads((trained / "results.json").read_text())["best"]["step"]
    kept = [c.name for c in complete_checkpoints(trained)]
    assert set(kept) == {f"step-{best:08d}", *kept[-2:]} and kept[-1] == f"step-{STEPS:08d}"
    assert (trained / "checkpoints" / "best").read_text() == f"step-{best:08d}"


def test_a_stopped_run_goes_on_bit_for_bit(
    trained: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe, out = load_finetune_recipe(str(recipe_file)), tmp_path / "run"
    assert run(recipe, out, StopAfter(11)) == 11
    assert require_checkpoint(out).name == "step-00000011"
    # how it is saved and looked at does not change what is trained
    other = replace(recipe, monitor=replace(recipe.monitor, log_every=1))
    assert run(other, out) == STEPS
    assert losses(out) == losses(trained)
    assert lines(out, "evaluations.jsonl") == lines(trained, "evaluations.jsonl")
    assert_same_checkpoint(require_checkpoint(out), require_checkpoint(trained))


def without_batch_norm(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The head of H: attention pooling, nothing that looks over the batch; nothing random."""
    backbone = replace(
        recipe.backbone,
        use_clip_projector=True,
        clip_embed_dim=32,
        clip_num_heads=4,
        clip_dim=24,
        drop_path=0.0,
    )
    return replace(recipe, backbone=backbone, train=replace(recipe.train, steps=4))


def test_accumulation_is_the_whole_batch(recipe_file: Path, tmp_path: Path) -> None:
    recipe = without_batch_norm(load_finetune_recipe(str(recipe_file)))
    whole = replace(recipe, train=replace(recipe.train, micro_batch=16))
    run(recipe, tmp_path / "halves")
    run(whole, tmp_path / "whole")
    for one, other in zip(losses(tmp_path / "halves"), losses(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=2e-4)


def test_weights_of_a_fine_tuned_run_are_taken_up(
    trained: Path, recipe_file: Path, tmp_path: Path
) -> None:
    overrides = [f"weights={{path: {trained}}}", "train.steps=1", "optimizer.lr=1.0e-30"]
    run(load_finetune_recipe(str(recipe_file), overrides), tmp_path / "run")
    started = load_file(require_checkpoint(tmp_path / "run") / "model.safetensors")
    average = load_file(require_checkpoint(trained) / "ema.safetensors")
    for name, value in average.items():
        if name.endswith("num_batches_tracked") or "running" in name:
            continue
        torch.testing.assert_close(started[name], value, rtol=0, atol=1e-20)
    report = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert report["averaged"] and report["copied"] == report["of"]


@pytest.fixture
def official_file(recipe_file: Path, tmp_path: Path) -> Path:
    """Weights in the official naming, with a head of 10 classes."""
    backbone = load_finetune_recipe(str(recipe_file)).backbone
    torch.manual_seed(5)
    model = InternImage(replace(backbone, num_classes=10))
    path = tmp_path / "official.safetensors"
    save_file({n: v.contiguous() for n, v in model.official_state_dict().items()}, path)
    return path


def start(recipe_file: Path, *overrides: str) -> tuple[FinetuneRecipe, Any]:
    """A task with the weights of a recipe, untrained."""
    from groundwork.pretrain.downstream.finetuning.initial_weights import load_initial_weights

    recipe = load_finetune_recipe(str(recipe_file), overrides)
    task = build_task(recipe, open_finetune_data(recipe).train)
    assert recipe.weights is not None
    return recipe, (task, load_initial_weights(task.model.backbone, recipe.weights))  # type: ignore[arg-type]


def test_a_head_is_converted_by_an_index_file(
    recipe_file: Path, official_file: Path, tmp_path: Path
) -> None:
    index = tmp_path / "map.txt"
    index.write_text("9\n0\n3\n3\n7\n1\n")
    weights = f"weights={{path: {official_file}, class_indices: {index}}}"
    _, (task, report) = start(recipe_file, weights)
    head = load_file(official_file)["head.weight"]
    torch.testing.assert_close(task.model.backbone.head.weight, head[[9, 0, 3, 3, 7, 1]])
    assert report.copied == report.of


def test_a_head_of_other_classes_is_refused_or_started_afresh(
    recipe_file: Path, official_file: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"head.*weights\.head"):
        start(recipe_file, f"weights={{path: {official_file}}}")
    _, (task, report) = start(recipe_file, f"weights={{path: {official_file}, head: zeros}}")
    assert report.report.initial == ("head.weight", "head.bias")
    assert not task.model.backbone.head.weight.any()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights={path: nowhere}", "nowhere does not exist"),
        ("data.split=nothing", "no split 'nothing'"),
        ("data.evaluation_split=nothing", "no split 'nothing'"),
    ],
)
def test_what_is_missing_is_told_at_the_start(
    recipe_file: Path, tmp_path: Path, override: str, message: str
) -> None:
    recipe = load_finetune_recipe(str(recipe_file), [override])
    with pytest.raises(ValueError, match=message):
        check_finetune_inputs(recipe, tmp_path / "run")


def test_weights_of_another_architecture_are_refused(
    recipe_file: Path, official_file: Path
) -> None:
    weights = f"weights={{path: {official_file}, head: skip}}"
    with pytest.raises(CheckpointError, match=r"of another model.*of another shape: levels"):
        start(recipe_file, weights, "backbone.channels=32", "backbone.groups=[2, 4, 8, 16]")


def test_labels_beyond_the_classes_end_the_run(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_finetune_recipe(str(recipe_file), ["task.num_classes=3"])
    with pytest.raises(
        (BadDataError, UnreadableDataError), match=r"json\.label is \d; the model has the classes"
    ):
        run(recipe, tmp_path / "run")


def test_bad_pictures_of_the_evaluation_split_are_counted_and_bounded(
    recipe_file: Path, trained: Path
) -> None:
    """Half of the classes are unknown: 6 of 12 pictures cannot be scored."""
    from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading, evaluate_split
    from groundwork.pretrain.engine.deepspeed_config import World

    recipe = load_finetune_recipe(str(recipe_file), ["task.num_classes=3"])
    data = open_finetune_data(recipe)
    task = build_task(recipe, data.train)
    task.model.eval()
    world = World(0, 1, 0, torch.device("cpu"))
    assert data.evaluation is not None

    def evaluate(budget: float) -> dict[str, float]:
        reading = SplitReading(5, budget=budget)
        return evaluate_split(task.model, task, data.evaluation, reading, world, lambda b: b)  # type: ignore[arg-type]

    result = evaluate(0.5)
    assert (result["samples"], result["bad_samples"]) == (6, 6)
    with pytest.raises(BadDataError, match=r"6 of 12 samples.*\n.*json\.label"):
        evaluate(0.4)


def test_evaluation_does_not_move_the_generators(recipe_file: Path) -> None:
    from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading, evaluate_split
    from groundwork.pretrain.engine.deepspeed_config import World

    recipe = load_finetune_recipe(str(recipe_file))
    data = open_finetune_data(recipe)
    task = build_task(recipe, data.train)
    before = torch.get_rng_state()

    def draws(batch: Any) -> Any:
        torch.rand(3)
        return task.model.eval()(batch)

    world = World(0, 1, 0, torch.device("cpu"))
    evaluate_split(draws, task, data.evaluation, SplitReading(5), world, lambda b: b)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_of_another_recipe_is_not_gone_on_with(
    trained: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_finetune_recipe(str(recipe_file), ["optimizer.lr=1.0e-4"])
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.003 -> 0\.0001"):
        check_finetune_inputs(recipe, trained)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors"])
def test_a_damaged_checkpoint_is_refused(
    trained: Path, recipe_file: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    path = require_checkpoint(out) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} fails its checksum"):
        run(load_finetune_recipe(str(recipe_file)), out)


def test_an_unknown_metric_is_told_before_the_first_step(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_finetune_recipe(str(recipe_file), ["evaluation.metric=top2"])
    message = r"evaluation\.metric is 'top2'; the task measures top1, top5; did you mean 'top"
    with pytest.raises(RecipeError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_split_that_cannot_be_evaluated_is_told_before_the_first_step(
    recipe_file: Path, tmp_path: Path
) -> None:
    """Pictures without classes."""
    bare = [("val", Sample(f"k{n}", _png(n), "png", "no class", {})) for n in range(20)]
    write_shards(bare, tmp_path / "bare", name="bare", source={}, licence="")
    overrides = [f"data.evaluation_shards={tmp_path / 'bare'}", "data.evaluation_split=val"]
    recipe = load_finetune_recipe(str(recipe_file), overrides)
    with pytest.raises(BadDataError, match="none of the first 16 samples of the evaluation split"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_evaluation_that_fails_costs_no_training_and_is_made_up_for(
    trained: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = load_finetune_recipe(str(recipe_file)), tmp_path / "run"

    def fail(*_: object) -> None:
        raise BadDataError("the disk of the evaluation split is gone")

    with monkeypatch.context() as broken, pytest.raises(BadDataError, match="is gone"):
        broken.setattr(TopK, "result", fail)
        run(recipe, out)
    assert require_checkpoint(out).name == "step-00000008"
    assert run(recipe, out) == STEPS
    assert lines(out, "evaluations.jsonl") == lines(trained, "evaluations.jsonl")
    assert_same_checkpoint(require_checkpoint(out), require_checkpoint(trained))


def test_plain_tars_have_no_split_to_evaluate_on(
    recipe_file: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    for tar in tiny_shards.rglob("*.tar"):
        shutil.copy(tar, tmp_path / tar.name)
    recipe = load_finetune_recipe(str(recipe_file), [f"data.shards={tmp_path}"])
    message = "no splits, 'train' and 'heldout_renderings' are the same 108 samples"
    with pytest.raises(ShardError, match=message):
        open_finetune_data(recipe)
    patterns = [f"data.shards={tmp_path}/train*.tar"]
    patterns += [f"data.evaluation_shards={tmp_path}/heldout*.tar", "task.num_classes=6"]
    data = open_finetune_data(load_finetune_recipe(str(recipe_file), patterns))
    assert data.evaluation is not None and (len(data.train), len(data.evaluation)) == (96, 12)


def test_a_file_that_names_a_checkpoint_stands_for_it(trained: Path) -> None:
    best = (trained / "checkpoints" / "best").read_text()
    assert require_checkpoint(trained / "checkpoints" / "best").name == best
    assert load_image_model(trained / "checkpoints" / "best").source.endswith(best)


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_accelerate_config_without_its_launcher_is_refused(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from groundwork.pretrain.downstream.finetuning.engine import EngineError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = load_finetune_recipe(str(recipe_file))
    with pytest.raises(EngineError, match="asks for fsdp, but no launcher"):
        start_accelerator(recipe.train, finetune_plan(recipe, 1, 0), 60)


@pytest.mark.parametrize("variant", ["t", "l"])
def test_parameter_groups_are_the_official_ones(
    variant: str, shared_golden: Path, recipe_file: Path
) -> None:
    """The classifier as fine-tuning trains it, against groups of the official optimiser builder."""
    golden = json.loads(
        (shared_golden / f"internimage/param_groups/cls_internimage_{variant}.json").read_text()
    )
    rule = golden["rule"]
    recipe = load_finetune_recipe(str(recipe_file))
    dcn = {} if rule["dcn_lr_mul"] in (None, 1.0) else {"offset": rule["dcn_lr_mul"]}
    decay = rule["lr_layer_decay_ratio"]
    config = replace(
        recipe.optimizer, weight_decay=0.05, layer_decay=decay, lr_multipliers=dcn if decay else {}
    )
    backbone = InternImageConfig.variant(variant)
    task_config = ClassificationTask(num_classes=1000)
    with torch.device("meta"):
        task = TASKS["classification"](task_config, backbone, None)
    names = {id(p): n.removeprefix("backbone.") for n, p in task.model.named_parameters()}
    got = {
        (names[id(p)], float(f"{group['lr_scale']:.6g}"), group["weight_decay"])
        for group in build_optimizer(task.model, config).param_groups
        for p in group["params"]
    }
    expected = {
        (name, float(f"{float(key.split('|')[0]):.6g}"), float(key.split("|")[1]))
        for key, members in golden["groups"].items()
        for name in members
    }
    assert got == expected


@pytest.mark.parametrize(
    "name", [n for n in available_finetune_recipes() if load_finetune_recipe(n).weights is not None]
)
def test_recipes_with_weights_name_a_head_rule_that_fits(name: str) -> None:
    recipe = load_finetune_recipe(name)
    assert recipe.weights is not None
    if recipe.task.kind != "classification":
        assert recipe.weights.class_indices is None


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("internimage_l_22kto1k_384", "l"),
        ("internimage_xl_22kto1k_384", "xl"),
        ("internimage_h_22kto1k_640", "h"),
        ("internimage_g_22kto1k_512", "g"),
        ("internimage_h_inat18", "h"),
    ],
)
def test_recipes_are_of_the_published_models(name: str, variant: str) -> None:
    recipe = load_finetune_recipe(name)
    own = replace(recipe.backbone, drop_path=0.0, activation_checkpointing=False)
    published = InternImageConfig.variant(variant)
    assert own == replace(published, drop_path=0.0)
    assert recipe.optimizer.lr_for_batch == recipe.train.global_batch == 512
    epochs = recipe.train.steps * 512 / (437_513 if "inat" in name else 1_281_167)
    assert round(epochs, 2) == (100 if "inat" in name else 20)
