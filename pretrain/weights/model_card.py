"""The `README.md` of an export: how to load it, and what it was trained by."""

import json
from typing import Final

from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.weights.exportable import Exportable

CARD: Final = "README.md"
SIGN: Final = "<!-- exported by groundwork -->"
UNSTATED: Final = (
    "Not stated. The weights belong to whoever trained them, and the terms of the data they were "
    "trained on may bind them; state a licence with `groundwork export --licence NAME`."
)


def model_card(subject: Exportable, library: str, how: str, remarks: str) -> str:
    """how: the code that loads it, with DIR for the folder. remarks: more of the format."""
    config = subject.config
    header = [f"library_name: {library}"]
    if isinstance(config, InternImageConfig):
        task = "image-classification" if config.num_classes > 0 else "image-feature-extraction"
        header.append(f"pipeline_tag: {task}")
    if subject.licence is not None:
        header.append(f"license: {json.dumps(subject.licence)}")
    sections = [
        "---\n" + "\n".join(header) + f"\n---\n{SIGN}\n# {config.kind}",
        subject.origin,
        f"```python\n{how}\n```",
    ]
    if remarks:
        sections.append(remarks)
    images = (
        f"Images: shorter side to {subject.image.size} pixels ({subject.image.resample}), centre "
        f"crop of {subject.image.size} x {subject.image.size}, ImageNet mean and deviation."
    )
    if isinstance(config, InternImageConfig):
        images += " Other sizes work, in multiples of 32."
    sections.append(images)
    if subject.tokenizer is not None:
        length = subject.tokenizer.context_length
        sections.append(f"Texts: the tokenizer beside this file, {length} tokens.")
    sections.append(f"## Licence\n\n{subject.licence or UNSTATED}")
    if subject.recipe is not None:
        recipe = json.dumps(subject.recipe, indent=1)
        sections.append(f"## Recipe\n\n```json\n{recipe}\n```")
    return "\n\n".join(sections) + "\n"
