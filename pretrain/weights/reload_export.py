"""Load an export in a fresh process, as a stranger would, and run it on a probe.

A script of its own, so that it runs without groundwork:

    python reload_export.py HOW FOLDER PROBE RESULT [--without-groundwork]

PROBE and RESULT are safetensors files. HOW names a function of `RELOADS`.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Probe = Mapping[str, Tensor]


def transformers_image_model(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """`AutoModel` with the code that lies in the folder. Every entry of the probe is images."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    results: dict[str, Tensor] = {}
    for name, images in probe.items():
        with torch.no_grad():
            output = model(images)
        results |= {f"{name}.map{i}": m for i, m in enumerate(output.hidden_states)}
        results[f"{name}.pooled"] = output.pooler_output
        if output.logits is not None:
            results[f"{name}.logits"] = output.logits
    return results


def transformers_dual_encoder(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """Normalised embeddings of the probe's pixels and ids by transformers' own two towers."""
    from transformers import AutoModel

    from groundwork.pretrain.weights.huggingface import embed

    model = AutoModel.from_pretrained(folder).eval()
    image, text = embed(model, probe["pixels"], probe["ids"])
    return {"image": image, "text": text}


def groundwork_dual_encoder(folder: Path, probe: Probe) -> dict[str, Tensor]:
    from groundwork.pretrain.weights.export_groundwork import load_groundwork

    model = load_groundwork(folder)
    with torch.no_grad():
        return {"image": model(image=probe["pixels"]), "text": model(ids=probe["ids"])}


def groundwork_image_model(folder: Path, probe: Probe) -> dict[str, Tensor]:
    from groundwork.pretrain.weights.export_groundwork import image_model_outputs, load_groundwork

    return image_model_outputs(load_groundwork(folder), probe)


def official_image_model(folder: Path, probe: Probe) -> dict[str, Tensor]:
    """Through the official argument names, and the strict loader of official weights."""
    from groundwork.pretrain.weights.export_groundwork import image_model_outputs
    from groundwork.pretrain.weights.export_official import load_official_folder

    return image_model_outputs(load_official_folder(folder), probe)


def onnx_image_model(folder: Path, probe: Probe) -> dict[str, Tensor]:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    results = {}
    for name, images in probe.items():
        outputs = session.run(None, {"pixel_values": images.numpy()})
        for output, value in zip(session.get_outputs(), outputs, strict=True):
            results[f"{name}.{output.name}"] = torch.from_numpy(value)
    return results


RELOADS: Final[Mapping[str, Callable[[Path, Probe], dict[str, Tensor]]]] = {
    function.__name__: function
    for function in (
        transformers_image_model,
        transformers_dual_encoder,
        groundwork_dual_encoder,
        groundwork_image_model,
        official_image_model,
        onnx_image_model,
    )
}


def main(argv: list[str]) -> int:
    how, folder, probe, result, *options = argv
    if "--without-groundwork" in options:
        sys.modules["groundwork"] = None  # type: ignore[assignment]  # makes its import fail
    results = RELOADS[how](Path(folder), load_file(probe))
    save_file({name: value.contiguous() for name, value in results.items()}, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
