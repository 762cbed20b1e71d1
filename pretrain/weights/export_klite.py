"""`--format hf` of image-text models, whose two towers transformers has itself."""

from pathlib import Path
from typing import Final

import torch

from groundwork.data.text import ClipTokenizer, load_tokenizer
from groundwork.pretrain.models.klite import Klite, KliteConfig
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_groundwork import write_groundwork
from groundwork.pretrain.weights.exportable import Exportable, ExportOptions
from groundwork.pretrain.weights.huggingface import image_processor, to_huggingface

PROBE_TEXTS: Final = (
    "a photo of a dog.",
    "red apple ; apple , fruit with red or yellow or green skin",
    "{}",
)


def write_klite(subject: Exportable, folder: Path, _: ExportOptions) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    assert isinstance(subject.model, Klite)
    assert isinstance(subject.config, KliteConfig)
    tokenizer = _tokenizer(subject)
    to_huggingface(subject.model, subject.config, tokenizer).save_pretrained(folder)
    image_processor(subject.image).save_pretrained(folder)
    _copy_tokenizer(tokenizer, folder)


def write_klite_groundwork(subject: Exportable, folder: Path, options: ExportOptions) -> None:
    write_groundwork(subject, folder, options)
    _copy_tokenizer(_tokenizer(subject), folder)


def klite_probe(subject: Exportable) -> dict[str, torch.Tensor]:
    size = subject.image.size
    generator = torch.Generator().manual_seed(0)
    return {
        "pixels": torch.randn(4, 3, size, size, generator=generator),
        "ids": _tokenizer(subject).encode(PROBE_TEXTS),
    }


@torch.no_grad()
def klite_outputs(subject: Exportable, probe: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Normalised embeddings of the probe."""
    model = subject.model
    return {"image": model(image=probe["pixels"]), "text": model(ids=probe["ids"])}


def _tokenizer(subject: Exportable) -> ClipTokenizer:
    assert subject.tokenizer is not None
    return subject.tokenizer


def _copy_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> None:
    temporary = folder / "tokenizer"
    tokenizer.save(temporary)
    for file in temporary.iterdir():
        file.rename(folder / file.name)
    temporary.rmdir()
    # the written files must give the ids the model was trained on
    written = load_tokenizer(folder, tokenizer.context_length)
    if not torch.equal(written.encode(PROBE_TEXTS), tokenizer.encode(PROBE_TEXTS)):
        raise ExportError(
            "the exported tokenizer gives other ids; this is a defect: please report it"
        )
