"""`--format hf` of InternImage: a folder that transformers loads with the code beside the weights.

The code is the module `hf_internimage`, copied as it is: it needs torch and transformers, and takes
groundwork's kernels where they are installed. Parameters have the official names, without prefix.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel

from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_groundwork import CONFIG, WEIGHTS, save_weights
from groundwork.pretrain.weights.exportable import Exportable, ExportOptions
from groundwork.pretrain.weights.hf_internimage import (
    configuration_internimage,
    layers_internimage,
    modeling_internimage,
)
from groundwork.pretrain.weights.huggingface import image_processor

CODE: Final = (configuration_internimage, layers_internimage, modeling_internimage)

#: Fields of our config that say how to train or run here, not what the model is.
OURS_ALONE: Final = ("kind", "frozen_stages", "activation_checkpointing", "kernel_backend")


def write_internimage(subject: Exportable, folder: Path, _: ExportOptions) -> None:
    save_weights(subject.model.state_dict(), folder / WEIGHTS)
    config = {**huggingface_config(subject).to_dict(), "dtype": "float32"}
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), "utf-8")
    for module in CODE:
        source = Path(str(module.__file__))
        shutil.copyfile(source, folder / source.name)
    image_processor(subject.image).save_pretrained(folder)


def huggingface_config(subject: Exportable) -> configuration_internimage.InternImageConfig:
    """The model's configuration in transformers' terms."""
    ours = subject.config
    assert isinstance(ours, InternImageConfig)
    values: dict[str, Any] = {field.name: getattr(ours, field.name) for field in fields(ours)}
    values.pop("image_size", None)  # of an image tower; the pictures' size counts
    classes = values.pop("num_classes")
    for name in OURS_ALONE:
        values.pop(name)
    names = subject.labels or [f"LABEL_{i}" for i in range(classes)]
    id2label = dict(enumerate(names))
    config = configuration_internimage.InternImageConfig(
        **values,
        image_size=subject.image.size,
        out_features=list(configuration_internimage.STAGES[1:]),
        id2label=id2label,
        label2id={name: i for i, name in id2label.items()},
    )
    unknown = [name for name in values if name not in _known_arguments()]
    if unknown:
        raise ExportError(
            f"--format hf: the code in hf_internimage does not know {', '.join(unknown)}; this is "
            "a defect: please report it. --format groundwork keeps everything"
        )
    package, name = "modeling_internimage", "InternImage"
    config.auto_map = {
        "AutoConfig": "configuration_internimage.InternImageConfig",
        "AutoModel": f"{package}.{name}Model",
        "AutoBackbone": f"{package}.{name}Backbone",
    }
    config.architectures = [f"{name}Model"]
    if classes > 0:
        # a new head can be asked for by num_labels where there is none
        config.architectures = [f"{name}ForImageClassification"]
    config.auto_map["AutoModelForImageClassification"] = f"{package}.{name}ForImageClassification"
    return config


def to_huggingface_internimage(subject: Exportable, *, sampling: str = "auto") -> PreTrainedModel:
    """The same model in transformers' terms, in this process. sampling: see its configuration."""
    config = huggingface_config(subject)
    config.sampling = sampling
    model = modeling_internimage.InternImageModel(config)
    model.load_state_dict(subject.model.state_dict(), strict=True)
    model.train(False)
    return model


def _known_arguments() -> tuple[str, ...]:
    code = configuration_internimage.InternImageConfig.__init__.__code__
    return code.co_varnames[: code.co_argcount]
