"""Zero-shot evaluation of a trained two-tower model over the splits of a data set."""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.samples import Concept
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import read_manifest
from groundwork.pretrain.downstream.evaluation.picture_grid import Tile, picture_grid
from groundwork.pretrain.downstream.evaluation.zeroshot import (
    CONTROLS,
    Control,
    Pictures,
    class_features,
    knowledge_texts,
    picture_features,
    rank_of_truth,
    scores,
)
from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.image_text import ImageTextConfig
from groundwork.pretrain.weights.trained import load_trained

#: Hits and misses shown per split.
TILES = 12


def evaluate_zeroshot(
    checkpoint: Path,
    shards: str | None = None,
    knowledge: Path | None = None,
    splits: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Results as JSON values, and a function that writes the picture grid.

    Pictures of trained classes choose among the trained names; those of held-out classes among the
    held-out names, and once more among all names.
    """
    trained = load_trained(checkpoint)
    tokenizer, data = trained.tokenizer, trained.recipe.data
    if tokenizer is None or not isinstance(data, ImageTextConfig):
        raise CheckpointError(
            f"{checkpoint}: model {trained.recipe.model.kind!r} reads no texts, so it has no "
            "zero-shot classes; use `groundwork evaluate classification`"
        )
    directory = shards or data.shards
    if directory is None:
        raise ShardError(
            f"{checkpoint} was trained on several data sets ({data.where}); name "
            "the one to evaluate on"
        )
    concepts = open_dataset(directory, _any_split(directory)).concepts
    if not concepts:
        raise ShardError(
            f"{directory}: no concepts.json in it, so there are no names to choose among; build "
            "it with `groundwork shards build`"
        )
    source = knowledge or data.knowledge.index
    index = None if source is None else KnowledgeIndex(Path(source))
    controls: tuple[Control, ...] = CONTROLS if index is not None else ("plain",)
    features = {
        control: class_features(
            trained.model,
            tokenizer,
            concepts,
            [[] for _ in concepts]
            if index is None
            else knowledge_texts(concepts, index, control, seed),
        )
        for control in controls
    }
    results: dict[str, Any] = {}
    tiles: list[Tile] = []
    for split in splits or [s for s in read_manifest(Path(directory)).splits if s != "train"]:
        dataset = open_dataset(directory, split)
        pictures = picture_features(trained.objective, dataset, data.image)
        for name, chosen in _candidates(split, pictures, concepts).items():
            labels = [concepts[i].label for i in chosen]
            ranks = {
                control: rank_of_truth(pictures, features[control][chosen], labels)
                for control in controls
            }
            results[name] = {
                "pictures": len(dataset),
                "candidates": len(chosen),
                "controls": {
                    control: {metric: asdict(score) for metric, score in part.items()}
                    for control, part in scores(ranks, pictures.labels).items()
                },
            }
            if name == split:
                best = controls[1] if len(controls) > 1 else controls[0]
                tiles += _tiles(dataset, pictures, features[best][chosen], concepts, chosen)
    record = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.state.step,
        "shards": str(directory),
        "knowledge": None if source is None else str(source),
        "names_with_knowledge": None
        if index is None
        else sum(bool(items) for items in knowledge_texts(concepts, index, "knowledge")),
        "names": len(concepts),
        "seed": seed,
        "results": results,
    }
    return record, lambda path: picture_grid(tiles, TILES, path)


def _candidates(
    split: str, pictures: Pictures, concepts: Sequence[Concept]
) -> dict[str, list[int]]:
    """Result name -> numbers of the concepts to choose among."""
    shown = set(pictures.labels.tolist())
    heldout = any(c.heldout for c in concepts if c.label in shown)
    own = [i for i, c in enumerate(concepts) if c.heldout == heldout]
    if not heldout:
        return {split: own}
    return {split: own, f"{split}, among all names": list(range(len(concepts)))}


def _tiles(
    dataset: Dataset,
    pictures: Pictures,
    classes: Any,
    concepts: Sequence[Concept],
    chosen: Sequence[int],
) -> list[Tile]:
    """Evenly spaced hits and misses of a split."""
    best = (pictures.features @ classes.T).topk(min(5, len(chosen))).indices.numpy()
    labels = np.array([concepts[i].label for i in chosen])
    is_hit = labels[best[:, 0]] == pictures.labels
    by_label = {concept.label: concept.name for concept in concepts}
    tiles = []
    for rows in (np.flatnonzero(is_hit), np.flatnonzero(~is_hit)):
        for row in rows[np.linspace(0, len(rows) - 1, min(TILES, len(rows))).astype(int)]:
            sample = dataset.read(int(pictures.numbers[row]))
            guesses = tuple(concepts[chosen[i]].name for i in best[row])
            truth = by_label[int(pictures.labels[row])]
            tiles.append(Tile(Image.open(io.BytesIO(sample.image)), truth, guesses))
    return tiles


def _any_split(directory: str) -> str:
    splits = read_manifest(Path(directory)).splits
    return next(iter(splits))
