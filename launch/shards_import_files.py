"""`groundwork shards build KIND ...` for tars, tables and videos of other people."""

from pathlib import Path
from typing import Annotated

import typer

from groundwork.data.sources import (
    energon,
    git_tsv,
    huggingface,
    imagenet,
    img2dataset,
    video,
    webdataset_tars,
)
from groundwork.data.sources.tar_fields import TarFields
from groundwork.launch.errors import reporting
from groundwork.launch.shards_build import Overwrite
from groundwork.launch.shards_import_run import (
    DEFAULTS,
    Check,
    Destination,
    ImageField,
    LabelField,
    Licence,
    Out,
    Parts,
    Root,
    Seed,
    SkipBad,
    Split,
    Splits,
    TextField,
    ValFraction,
    Workers,
    run_import,
    with_splits,
)


def build_webdataset(
    root: Root,
    out: Out = None,
    split: Split = "train",
    image: ImageField = DEFAULTS.image,
    text: TextField = DEFAULTS.text,
    label: LabelField = DEFAULTS.label,
    check_sha256: Annotated[
        bool, typer.Option(help="Compare images with the sha256 of their JSON.")
    ] = False,
    uids: Annotated[
        Path | None, typer.Option(help="Subset of DataComp: a .npy file of uids.")
    ] = None,
    workers: Workers = 2,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Tars of open_clip, LAION, DataComp and the like: KEY.jpg, KEY.txt, KEY.json."""

    def run() -> int:
        config = webdataset_tars.WebdatasetConfig(
            root, split, TarFields(image, text, label), check_sha256, uids, skip_bad
        )
        destination = Destination(out, check, licence, overwrite)
        parts = Parts(
            webdataset_tars.webdataset_units, webdataset_tars.read_webdataset_unit, workers
        )
        return run_import(
            "webdataset",
            config,
            webdataset_tars.webdataset_samples,
            destination,
            [root],
            parts=parts,
        )

    raise typer.Exit(reporting(run))


def build_img2dataset(
    root: Root,
    out: Out = None,
    split: Split = "train",
    check_tables: Annotated[
        bool, typer.Option(help="Compare each tar with its Parquet table.")
    ] = True,
    workers: Workers = 2,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Output of img2dataset: NNNNN.tar, NNNNN.parquet, NNNNN_stats.json."""

    def run() -> int:
        config = img2dataset.Img2datasetConfig(
            root, split, check_tables=check_tables, skip_bad=skip_bad
        )
        destination = Destination(out, check, licence, overwrite)
        parts = Parts(img2dataset.img2dataset_units, img2dataset.read_img2dataset_unit, workers)
        return run_import(
            "img2dataset", config, img2dataset.img2dataset_samples, destination, [root], parts=parts
        )

    raise typer.Exit(reporting(run))


def build_energon(
    root: Root,
    out: Out = None,
    image: Annotated[
        str, typer.Option(help="Member that holds the image, instead of field_map.")
    ] = "",
    text: Annotated[str, typer.Option(help="Member that holds the caption, with --image.")] = "",
    workers: Workers = 2,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Data sets of Megatron Energon: tars with a folder .nv-meta."""

    def run() -> int:
        fields = TarFields(image, text) if image else None
        config = energon.EnergonConfig(root, fields, skip_bad)
        destination = Destination(out, check, licence, overwrite)
        parts = Parts(energon.energon_units, energon.read_energon_unit, workers)
        return run_import(
            "energon", config, energon.energon_samples, destination, [root], parts=parts
        )

    raise typer.Exit(reporting(run))


def build_huggingface(
    root: Root,
    out: Out = None,
    config_name: Annotated[str, typer.Option(help="Of README.md, if not the default one.")] = "",
    image: ImageField = DEFAULTS.image,
    text: TextField = DEFAULTS.text,
    label: LabelField = DEFAULTS.label,
    workers: Workers = 2,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Annotated[str, typer.Option(help="Taken from README.md if not given.")] = "",
    overwrite: Overwrite = False,
) -> None:
    """A WebDataset repository of the Hugging Face hub, fetched to disk."""

    def run() -> int:
        config = huggingface.HuggingfaceConfig(
            root, config_name, TarFields(image, text, label), skip_bad
        )
        known = licence or str(huggingface.huggingface_card(root).get("license", "unknown"))
        destination = Destination(out, check, known, overwrite)
        parts = Parts(huggingface.huggingface_units, huggingface.read_huggingface_unit, workers)
        return run_import(
            "huggingface", config, huggingface.huggingface_samples, destination, [root], parts=parts
        )

    raise typer.Exit(reporting(run))


def build_imagenet(
    root: Root,
    out: Out = None,
    split: Splits = None,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "ImageNet terms of access (research, no redistribution)",
    overwrite: Overwrite = False,
) -> None:
    """ImageNet-1k from ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit."""

    def run() -> int:
        config = with_splits(imagenet.ImagenetConfig(root, skip_bad=skip_bad), split)
        return run_import(
            "imagenet",
            config,
            imagenet.imagenet_samples,
            Destination(out, check, licence, overwrite),
            [root],
            imagenet.imagenet_concepts,
        )

    raise typer.Exit(reporting(run))


def build_git_tsv(
    images: Annotated[Path, typer.Argument(help="Table of keys and images in base64.")],
    texts: Annotated[
        Path | None, typer.Argument(help="Table of the same keys with captions or questions.")
    ] = None,
    out: Out = None,
    split: Split = "train",
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Tables (TSV) of images and texts, as GIT keeps them."""

    def run() -> int:
        config = git_tsv.GitTsvConfig(images, texts, split, skip_bad)
        destination = Destination(out, check, licence, overwrite)
        inputs = [images, *([texts] if texts else [])]
        return run_import("git_tsv", config, git_tsv.git_tsv_samples, destination, inputs)

    raise typer.Exit(reporting(run))


def build_video(
    root: Root,
    out: Out = None,
    clip_s: Annotated[
        float, typer.Option(help="Least length of clips; shorter files pass unchanged.")
    ] = 10.0,
    val_fraction: ValFraction = 0.0,
    seed: Seed = 0,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Videos, cut at key frames without loss; captions from .txt files beside them."""

    def run() -> int:
        config = video.VideoConfig(
            root, clip_s, val_fraction=val_fraction, seed=seed, skip_bad=skip_bad
        )
        destination = Destination(out, check, licence, overwrite)
        return run_import("video", config, video.video_samples, destination, [root])

    raise typer.Exit(reporting(run))
