"""Write a model for others: a folder with weights, configuration and model card.

Every export is loaded again in a fresh process and must compute the same. A new format is a
function that writes one, a function in `reload_export.py` that loads it as a stranger would, and an
entry of `FORMATS`.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.data.atomic import directory_written_atomically, umask
from groundwork.pretrain.weights import reload_export
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_groundwork import image_model_outputs, write_groundwork
from groundwork.pretrain.weights.export_internimage import write_internimage
from groundwork.pretrain.weights.export_klite import (
    klite_outputs,
    klite_probe,
    write_klite,
    write_klite_groundwork,
)
from groundwork.pretrain.weights.export_official import write_official
from groundwork.pretrain.weights.export_onnx import TOLERANCE as ONNX_TOLERANCE
from groundwork.pretrain.weights.export_onnx import write_onnx
from groundwork.pretrain.weights.exportable import Exportable, ExportOptions, relative_difference
from groundwork.pretrain.weights.model_card import CARD, SIGN, model_card

#: Largest difference of an output after the export, as a part of the largest output above 1.
TOLERANCE: Final = 1e-5
#: Of grid_sample, whose coordinates are rounded to a millionth of the picture, deep in a network.
SAMPLING_TOLERANCE: Final = 1e-4
#: The files that an export of ours may have; large weights of transformers' are cut.
WRITTEN: Final = re.compile(
    r"README\.md|merges\.txt|vocab\.json|((tokenizer|preprocessor)_)?config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|model\.onnx(\.data)?|model\.pth"
    r"|(configuration|layers|modeling)_internimage\.py"
)
#: Largest side of the pictures on which an image model is compared.
PROBE_SIDE: Final = 256


@dataclass(frozen=True)
class Check:
    """A way to load an export in a fresh process; how: a function of `reload_export.py`."""

    how: str
    tolerance: float = TOLERANCE
    with_groundwork: bool = True


@dataclass(frozen=True)
class Format:
    """library, how, remarks: of the model card; how is the code that loads the export from DIR."""

    write: Callable[[Exportable, Path, ExportOptions], None]
    checks: tuple[Check, ...]
    library: str
    how: str
    remarks: str = ""


GROUNDWORK_HOW: Final = (
    "from pathlib import Path\n"
    "from groundwork.pretrain.weights.export_groundwork import load_groundwork\n"
    "model = load_groundwork(Path(DIR))"
)

#: kind of model -> name of the format.
FORMATS: Final[Mapping[str, Mapping[str, Format]]] = {
    "klite": {
        "hf": Format(
            write_klite,
            (Check("transformers_dual_encoder"),),
            "transformers",
            "from transformers import AutoModel\nmodel = AutoModel.from_pretrained(DIR)",
        ),
        "groundwork": Format(
            write_klite_groundwork,
            (Check("groundwork_dual_encoder"),),
            "groundwork",
            GROUNDWORK_HOW,
        ),
    },
    "internimage": {
        "hf": Format(
            write_internimage,
            (
                Check("transformers_image_model"),
                Check("transformers_image_model", SAMPLING_TOLERANCE, with_groundwork=False),
            ),
            "transformers",
            "from transformers import AutoImageProcessor, AutoModel\n"
            'processor = AutoImageProcessor.from_pretrained(DIR, backend="pil")\n'
            "model = AutoModel.from_pretrained(DIR, trust_remote_code=True)\n"
            'output = model(**processor(images=picture, return_tensors="pt"))\n'
            "output.hidden_states, output.pooler_output, output.logits",
            "`trust_remote_code` runs the three Python files of this folder: read them first. The "
            "weights are safetensors, of which nothing is executed. `model.sampling` says whether "
            "groundwork's kernels run (`pip install groundwork-pretrain`) or the slower operations "
            "of PyTorch. Parameters have the names of the official code, without prefix.",
        ),
        "groundwork": Format(
            write_groundwork, (Check("groundwork_image_model"),), "groundwork", GROUNDWORK_HOW
        ),
        "official": Format(
            write_official,
            (Check("official_image_model"),),
            "groundwork",
            "from pathlib import Path\n"
            "from groundwork.pretrain.weights.export_official import load_official_folder\n"
            "model = load_official_folder(Path(DIR))",
            "Names and shapes are those of the official code, and `arguments` in config.json are "
            "its constructor's: `model.load_state_dict(safetensors.torch.load_file("
            '"model.safetensors"))` fills its model.',
        ),
        "onnx": Format(
            write_onnx,
            (Check("onnx_image_model", ONNX_TOLERANCE),),
            "onnx",
            "import onnxruntime\n"
            'session = onnxruntime.InferenceSession(DIR + "/model.onnx")\n'
            'outputs = session.run(None, {"pixel_values": pixels})  # (B, 3, H, W) float32',
        ),
    },
}


def export(
    subject: Exportable, out: Path, kind: str, options: ExportOptions | None = None
) -> dict[str, float]:
    """Write format `kind` to folder `out`. Returns the differences after reloading, by the way.

    An earlier export is replaced. Raises ExportError where `out` holds anything else, for a format
    that cannot express the model, and if the reloaded model differs by more than it may; nothing
    is written to `out` then.
    """
    chosen = _format(subject, kind, options or ExportOptions())
    try:
        with directory_written_atomically(out, is_ours=_is_export) as folder:
            chosen.write(subject, folder, options or ExportOptions())
            card = model_card(subject, chosen.library, chosen.how, chosen.remarks)
            (folder / CARD).write_text(card, "utf-8")
            # safetensors keeps its files from everyone else
            for file in folder.iterdir():
                file.chmod(0o666 & ~umask())
            return _compare_elsewhere(subject, folder, kind, chosen)
    except (NotADirectoryError, FileExistsError, BlockingIOError) as error:
        raise ExportError(f"--out {out}: {error.strerror}; choose another folder") from error
    except SafetensorError as error:
        raise ExportError(f"--out {out}: the weights cannot be written: {error}") from error


def _format(subject: Exportable, kind: str, options: ExportOptions) -> Format:
    formats = FORMATS[subject.config.kind]
    if kind not in formats:
        known = dict.fromkeys(name for named in FORMATS.values() for name in named)
        if kind not in known:
            raise ExportError(f"--format {kind}: unknown; choose among {', '.join(known)}")
        raise ExportError(
            f"--format {kind}: not for the model {subject.config.kind}, which has "
            f"{', '.join(formats)}; --tower image exports the image model in it alone"
        )
    for option, given, needed in (
        ("--pth", options.pth, "official"),
        ("--features", options.features, "onnx"),
    ):
        if given and kind != needed:
            raise ExportError(f"{option}: of --format {needed} only, not of {kind}; leave it out")
    return formats[kind]


def _is_export(folder: Path) -> bool:
    """Whether `export` made this folder, and nobody has put anything of theirs into it."""
    try:
        card = (folder / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    # the second is in the cards of older versions
    signed = SIGN in card or "Pretrained with groundwork" in card
    return signed and all(WRITTEN.fullmatch(entry.name) for entry in folder.iterdir())


def _compare_elsewhere(
    subject: Exportable, folder: Path, kind: str, chosen: Format
) -> dict[str, float]:
    if subject.config.kind == "klite":
        probe = klite_probe(subject)
        expected = klite_outputs(subject, probe)
    else:
        probe = _image_probe(subject)
        expected = image_model_outputs(subject.model, probe)
    differences = {}
    for check in chosen.checks:
        got = _reloaded(folder, kind, check, probe)
        # a format may give less than everything
        difference = max(relative_difference(got[name], expected[name]) for name in got)
        name = "with groundwork" if check.with_groundwork else "without groundwork"
        if not difference <= check.tolerance:
            raise ExportError(
                f"--format {kind}: the exported model differs by {difference:.1e} after reloading "
                f"{name}, more than {check.tolerance:.0e}; nothing was written. Please report this "
                "defect"
            )
        differences[name] = difference
    return differences


def _image_probe(subject: Exportable) -> dict[str, Tensor]:
    """A picture of the size trained on, up to a limit, and two small ones that are not square."""
    side = max(32, min(subject.image.size, PROBE_SIDE) // 32 * 32)
    generator = torch.Generator().manual_seed(0)
    return {
        "whole": torch.randn(1, 3, side, side, generator=generator),
        "oblong": torch.randn(2, 3, 64, 96, generator=generator),
    }


def _reloaded(
    folder: Path, kind: str, check: Check, probe: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        save_file({k: v.contiguous() for k, v in probe.items()}, place / "probe")
        command = [sys.executable, str(reload_export.__file__), check.how, str(folder)]
        command += [str(place / "probe"), str(place / "result")]
        command += [] if check.with_groundwork else ["--without-groundwork"]
        environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "HF_HUB_OFFLINE": "1",
            # transformers copies the code of a folder there to run it
            "HF_MODULES_CACHE": str(place / "modules"),
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ExportError(
                f"--format {kind}: the export cannot be loaded:\n{done.stderr[-2000:]}"
            )
        return load_file(place / "result")
