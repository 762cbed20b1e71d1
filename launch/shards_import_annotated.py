"""`groundwork shards build KIND ...` for pictures with boxes, phrases, questions, masks, depth."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from groundwork.data.sources import (
    coco,
    coco_captions,
    flickr30k,
    lvis,
    mdetr,
    objects365,
    rgbd_sod,
    soba,
    visha,
    visual_genome,
    vqa,
)
from groundwork.launch.errors import reporting
from groundwork.launch.shards_build import Overwrite
from groundwork.launch.shards_import_run import (
    Annotation,
    Check,
    Destination,
    Images,
    Licence,
    Out,
    Root,
    Seed,
    SkipBad,
    Split,
    Splits,
    ValFraction,
    run_import,
    with_splits,
)


def build_coco(
    root: Root,
    out: Out = None,
    split: Splits = None,
    annotations: Annotation = coco.CocoConfig.annotations,
    images: Images = coco.CocoConfig.images,
    segmentations: Annotated[bool, typer.Option(help="Keep masks, not boxes alone.")] = True,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Boxes and masks of COCO, and of every data set in its format."""

    def run() -> int:
        config = coco.CocoConfig(
            root,
            annotations=annotations,
            images=images,
            segmentations=segmentations,
            skip_bad=skip_bad,
        )
        return run_import(
            "coco",
            with_splits(config, split),
            coco.coco_samples,
            Destination(out, check, licence, overwrite),
            [root],
            coco.coco_concepts,
        )

    raise typer.Exit(reporting(run))


def build_lvis(
    root: Root,
    out: Out = None,
    split: Splits = None,
    segmentations: Annotated[bool, typer.Option(help="Keep masks, not boxes alone.")] = True,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "annotations: CC BY 4.0; pictures: see COCO",
    overwrite: Overwrite = False,
) -> None:
    """LVIS v1 on the pictures of COCO, with the classes known to be absent."""

    def run() -> int:
        config = lvis.LvisConfig(root, segmentations=segmentations, skip_bad=skip_bad)
        return run_import(
            "lvis",
            with_splits(config, split),
            lvis.lvis_samples,
            Destination(out, check, licence, overwrite),
            [root],
            lvis.lvis_concepts,
        )

    raise typer.Exit(reporting(run))


def build_objects365(
    root: Root,
    out: Out = None,
    split: Splits = None,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "annotations: CC BY 4.0; pictures: unknown",
    overwrite: Overwrite = False,
) -> None:
    """Objects365 v2: zhiyuan_objv2_*.json and the folders of patches."""

    def run() -> int:
        config = objects365.Objects365Config(root, skip_bad=skip_bad)
        return run_import(
            "objects365",
            with_splits(config, split),
            objects365.objects365_samples,
            Destination(out, check, licence, overwrite),
            [root],
            objects365.objects365_concepts,
        )

    raise typer.Exit(reporting(run))


def build_flickr30k(
    root: Root,
    out: Out = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; ROOT/flickr30k-images.")
    ] = None,
    split: Splits = None,
    one_per: Annotated[
        Literal["caption", "image"], typer.Option(help="What a sample is made of.")
    ] = "caption",
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Flickr30k Entities: phrases of captions tied to boxes."""

    def run() -> int:
        config = flickr30k.Flickr30kConfig(root, images, one_per=one_per, skip_bad=skip_bad)
        return run_import(
            "flickr30k",
            with_splits(config, split),
            flickr30k.flickr30k_samples,
            Destination(out, check, licence, overwrite),
            [root, *([images] if images else [])],
        )

    raise typer.Exit(reporting(run))


def build_mdetr(
    annotations: Annotated[Path, typer.Argument(help="JSON file in the format of MDETR.")],
    images: Annotated[list[Path], typer.Option(help="Folder of pictures; several are searched.")],
    out: Out = None,
    split: Split = "train",
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Grounding data of MDETR and GLIP (GoldG): captions whose words have boxes."""

    def run() -> int:
        config = mdetr.MdetrConfig({split: annotations}, tuple(images), skip_bad)
        destination = Destination(out, check, licence, overwrite)
        return run_import("mdetr", config, mdetr.mdetr_samples, destination, [annotations, *images])

    raise typer.Exit(reporting(run))


def build_visual_genome(
    root: Root,
    out: Out = None,
    annotate: Annotated[
        Literal["regions", "objects"], typer.Option(help="Phrases of regions, or named objects.")
    ] = "regions",
    val_fraction: ValFraction = 0.0,
    seed: Seed = 0,
    without_coco: Annotated[
        bool, typer.Option(help="Leave out pictures that COCO has, too.")
    ] = False,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "CC BY 4.0",
    overwrite: Overwrite = False,
) -> None:
    """Visual Genome: regions with phrases, or objects with names."""

    def run() -> int:
        config = visual_genome.VisualGenomeConfig(
            root, annotate, val_fraction, seed, without_coco, skip_bad
        )
        destination = Destination(out, check, licence, overwrite)
        samples = visual_genome.visual_genome_samples
        return run_import("visual_genome", config, samples, destination, [root])

    raise typer.Exit(reporting(run))


def build_coco_captions(
    root: Root,
    out: Out = None,
    split: Splits = None,
    annotations: Annotation = coco_captions.CocoCaptionsConfig.annotations,
    images: Images = coco_captions.CocoCaptionsConfig.images,
    karpathy: Annotated[
        bool, typer.Option(help="Take splits and captions from ROOT/dataset_coco.json.")
    ] = False,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """Captions of COCO: one sample for a picture with all of its captions."""

    def run() -> int:
        config = coco_captions.CocoCaptionsConfig(
            root, annotations=annotations, images=images, karpathy=karpathy, skip_bad=skip_bad
        )
        if karpathy:
            config = replace(config, splits=("train", "val", "test"))
        destination = Destination(out, check, licence, overwrite)
        samples = coco_captions.coco_captions_samples
        return run_import("coco_captions", with_splits(config, split), samples, destination, [root])

    raise typer.Exit(reporting(run))


def build_vqa(
    root: Root,
    out: Out = None,
    split: Splits = None,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "annotations: CC BY 4.0; pictures: see COCO",
    overwrite: Overwrite = False,
) -> None:
    """VQA v2: one sample for a picture with all of its questions."""

    def run() -> int:
        config = with_splits(vqa.VqaConfig(root, skip_bad=skip_bad), split)
        destination = Destination(out, check, licence, overwrite)
        return run_import("vqa", config, vqa.vqa_samples, destination, [root])

    raise typer.Exit(reporting(run))


def build_soba(
    root: Root,
    out: Out = None,
    split: Splits = None,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """SOBA: objects and their shadows."""

    def run() -> int:
        config = with_splits(soba.SobaConfig(root, skip_bad=skip_bad), split)
        destination = Destination(out, check, licence, overwrite)
        return run_import(
            "soba", config, soba.soba_samples, destination, [root], soba.soba_concepts
        )

    raise typer.Exit(reporting(run))


def build_visha(
    root: Root,
    out: Out = None,
    split: Splits = None,
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """ViSha: frames of videos with masks of their shadows."""

    def run() -> int:
        config = with_splits(visha.VishaConfig(root, skip_bad=skip_bad), split)
        destination = Destination(out, check, licence, overwrite)
        return run_import("visha", config, visha.visha_samples, destination, [root])

    raise typer.Exit(reporting(run))


def build_rgbd_sod(
    root: Root,
    near: Annotated[
        Literal["dark", "bright"], typer.Option(help="How the depth maps show what is near.")
    ],
    out: Out = None,
    split: Split = "train",
    listing: Annotated[
        str, typer.Option(help="File below ROOT with lines `rgb depth gt`, instead of folders.")
    ] = "",
    check: Check = False,
    skip_bad: SkipBad = False,
    licence: Licence = "unknown",
    overwrite: Overwrite = False,
) -> None:
    """RGB-D sets of salient objects: NJU2K, NLPR, STERE, SIP, ..."""

    def run() -> int:
        config = rgbd_sod.RgbdSodConfig(root, near, split, root.name, listing, skip_bad)
        destination = Destination(out, check, licence, overwrite)
        return run_import("rgbd_sod", config, rgbd_sod.rgbd_sod_samples, destination, [root])

    raise typer.Exit(reporting(run))
