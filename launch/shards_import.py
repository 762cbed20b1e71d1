"""`groundwork shards build KIND ...` for the published layouts of other people's data."""

import typer

from groundwork.launch.shards_import_annotated import (
    build_coco,
    build_coco_captions,
    build_flickr30k,
    build_lvis,
    build_mdetr,
    build_objects365,
    build_rgbd_sod,
    build_soba,
    build_visha,
    build_visual_genome,
    build_vqa,
)
from groundwork.launch.shards_import_files import (
    build_energon,
    build_git_tsv,
    build_huggingface,
    build_imagenet,
    build_img2dataset,
    build_video,
    build_webdataset,
)


def register(build_app: typer.Typer) -> None:
    """Add a command for each kind to `groundwork shards build`."""
    for name, command in (
        ("webdataset", build_webdataset),
        ("img2dataset", build_img2dataset),
        ("energon", build_energon),
        ("huggingface", build_huggingface),
        ("imagenet", build_imagenet),
        ("coco", build_coco),
        ("lvis", build_lvis),
        ("objects365", build_objects365),
        ("flickr30k", build_flickr30k),
        ("mdetr", build_mdetr),
        ("visual-genome", build_visual_genome),
        ("coco-captions", build_coco_captions),
        ("vqa", build_vqa),
        ("git-tsv", build_git_tsv),
        ("video", build_video),
        ("soba", build_soba),
        ("visha", build_visha),
        ("rgbd-sod", build_rgbd_sod),
    ):
        build_app.command(name)(command)
