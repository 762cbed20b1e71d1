"""Write a trained model for others: folder with safetensors, config, tokenizer and model card.

Every export is loaded again in a fresh process and must give the same embeddings.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.data.atomic import directory_written_atomically, umask
from groundwork.data.text import load_tokenizer
from groundwork.pretrain.kinds import MODELS
from groundwork.pretrain.models.klite import Klite
from groundwork.pretrain.recipe import recipe_from_dict, recipe_to_dict
from groundwork.pretrain.weights.huggingface import (
    ExportError,
    embed,
    image_processor,
    to_huggingface,
)
from groundwork.pretrain.weights.trained import Trained

#: Largest difference of an embedding after the export, in absolute value.
TOLERANCE = 1e-5
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
#: How a model card tells an export of ours, and the files one may have (large weights are cut).
MADE_BY = "Pretrained with groundwork"
WRITTEN = re.compile(
    r"README\.md|merges\.txt|vocab\.json|((tokenizer|preprocessor)_)?config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
PROBE_TEXTS = (
    "a photo of a dog.",
    "red apple ; apple , fruit with red or yellow or green skin",
    "{}",
)


def export(trained: Trained, out: Path, kind: str) -> float:
    """Write format `kind` to folder `out`. Returns the largest difference after reloading.

    An earlier export is replaced. Raises ExportError where `out` holds anything else, for a format
    that cannot express the model, and if the reloaded model differs by more than TOLERANCE; nothing
    is written to `out` then.
    """
    if kind not in FORMATS:
        raise ExportError(f"--format {kind}: unknown; choose among {', '.join(FORMATS)}")
    try:
        with directory_written_atomically(out, is_ours=_is_export) as folder:
            FORMATS[kind](trained, folder)
            (folder / CARD).write_text(_model_card(trained, kind), "utf-8")
            # safetensors keeps its files from everyone else
            for file in folder.iterdir():
                file.chmod(0o666 & ~umask())
            difference = _reload_elsewhere(trained, folder, kind)
            if difference > TOLERANCE:
                raise ExportError(
                    f"--format {kind}: the exported model differs by {difference:.1e} after "
                    f"reloading, more than {TOLERANCE:.0e}; nothing was written. Please report "
                    "this defect"
                )
    except (NotADirectoryError, FileExistsError, BlockingIOError) as error:
        raise ExportError(f"--out {out}: {error.strerror}; choose another folder") from error
    except SafetensorError as error:
        raise ExportError(f"--out {out}: the weights cannot be written: {error}") from error
    return difference


def _is_export(folder: Path) -> bool:
    """Whether `export` made this folder, and nobody has put anything of theirs into it."""
    try:
        card = (folder / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return MADE_BY in card and all(WRITTEN.fullmatch(entry.name) for entry in folder.iterdir())


def _write_huggingface(trained: Trained, folder: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = cast(Klite, trained.model)
    to_huggingface(model, trained.recipe.model, trained.tokenizer).save_pretrained(folder)
    image_processor(trained.recipe.data.image).save_pretrained(folder)
    _copy_tokenizer(trained, folder)


def _write_groundwork(trained: Trained, folder: Path) -> None:
    weights = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(
        json.dumps({"format": "groundwork", "recipe": recipe_to_dict(trained.recipe)}, indent=1)
    )
    _copy_tokenizer(trained, folder)


FORMATS: Final[Mapping[str, Callable[[Trained, Path], None]]] = {
    "hf": _write_huggingface,
    "groundwork": _write_groundwork,
}


def load_groundwork(folder: Path) -> torch.nn.Module:
    """Load what `--format groundwork` wrote."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    recipe = recipe_from_dict(config["recipe"], str(folder / CONFIG))
    model = MODELS[recipe.model.kind](recipe.model)
    model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return model.eval()


def reloaded_embeddings(folder: Path, kind: str, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load an export as a stranger would, and embed the probe."""
    if kind == "hf":
        from transformers import AutoModel

        image, text = embed(AutoModel.from_pretrained(folder).eval(), probe["pixels"], probe["ids"])
    else:
        model = load_groundwork(folder)
        with torch.no_grad():
            image, text = model(image=probe["pixels"]), model(ids=probe["ids"])
    return {"image": image, "text": text}


def main(argv: list[str]) -> int:
    """The fresh process: FOLDER KIND PROBE RESULT."""
    folder, kind, probe, result = argv
    embeddings = reloaded_embeddings(Path(folder), kind, load_file(probe))
    save_file({k: v.contiguous() for k, v in embeddings.items()}, result)
    return 0


def _reload_elsewhere(trained: Trained, folder: Path, kind: str) -> float:
    size = trained.recipe.data.image.size
    generator = torch.Generator().manual_seed(0)
    probe = {
        "pixels": torch.randn(4, 3, size, size, generator=generator),
        "ids": trained.tokenizer.encode(PROBE_TEXTS),
    }
    with torch.no_grad():
        expected = {
            "image": trained.model(image=probe["pixels"]),
            "text": trained.model(ids=probe["ids"]),
        }
    with tempfile.TemporaryDirectory() as temporary:
        files = [str(Path(temporary) / name) for name in ("probe", "result")]
        save_file(probe, files[0])
        command = [sys.executable, "-m", "groundwork.pretrain.weights.export"]
        done = subprocess.run(
            ["env", "PYTHONSAFEPATH=1", *command, str(folder), kind, *files],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ExportError(
                f"--format {kind}: the export cannot be loaded:\n{done.stderr[-2000:]}"
            )
        got = load_file(files[1])
    return max(float((got[name] - value).abs().max()) for name, value in expected.items())


def _copy_tokenizer(trained: Trained, folder: Path) -> None:
    temporary = folder / "tokenizer"
    trained.tokenizer.save(temporary)
    for file in temporary.iterdir():
        file.rename(folder / file.name)
    temporary.rmdir()
    # the written files must give the ids the model was trained on
    written = load_tokenizer(folder, trained.tokenizer.context_length)
    if not torch.equal(written.encode(PROBE_TEXTS), trained.tokenizer.encode(PROBE_TEXTS)):
        raise ExportError(
            "the exported tokenizer gives other ids; this is a defect: please report it"
        )


def _model_card(trained: Trained, kind: str) -> str:
    recipe = trained.recipe
    how = {
        "hf": "from transformers import AutoModel\nmodel = AutoModel.from_pretrained(DIR)",
        "groundwork": "from pathlib import Path\n"
        "from groundwork.pretrain.weights.export import load_groundwork\n"
        "model = load_groundwork(Path(DIR))",
    }[kind]
    settings = json.dumps(asdict(recipe.train), indent=1)
    return f"""---
library_name: {"transformers" if kind == "hf" else "groundwork"}
---
# {recipe.model.kind}, step {trained.state.step}

{MADE_BY} {version("groundwork-pretrain")} on `{recipe.data.where}`
(manifest `{trained.state.dataset}`), {trained.state.position:,} samples seen.

```python
{how}
```

Images: shorter side to {recipe.data.image.size} pixels, centre crop, ImageNet mean and deviation.
Texts: the tokenizer beside this file, {recipe.model.text.context_length} tokens.

```json
{settings}
```
"""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
