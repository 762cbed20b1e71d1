"""`groundwork export`: a thin front to `pretrain/weights/export.py`."""

from dataclasses import dataclass, replace
from pathlib import Path

from groundwork.launch.errors import reporting, require_folder


@dataclass(frozen=True)
class ExportArguments:
    """checkpoint: a run's folder, one of its checkpoints, or with `variant` a file of official
    weights. size: of the pictures, for such a file. labels: a file of one class name per line."""

    checkpoint: Path
    out: Path
    kind: str = "hf"
    ema: bool = False
    tower: str | None = None
    variant: str | None = None
    num_classes: int | None = None
    size: int | None = None
    labels: Path | None = None
    licence: str | None = None
    pth: bool = False
    features: bool = False
    opset: int = 18


def start(arguments: ExportArguments) -> int:
    """Export a run, a checkpoint or official weights. Returns the exit status."""

    def run() -> int:
        from groundwork.pretrain.weights.export import export
        from groundwork.pretrain.weights.exportable import ExportOptions
        from groundwork.pretrain.weights.exportable_sources import find_exportable, read_labels

        require_folder(arguments.out)
        options = ExportOptions(arguments.pth, arguments.features, arguments.opset)
        subject = find_exportable(
            arguments.checkpoint,
            ema=arguments.ema,
            tower=arguments.tower,  # type: ignore[arg-type]  # checked there
            variant=arguments.variant,
            num_classes=arguments.num_classes,
            size=arguments.size,
        )
        if arguments.labels is not None:
            subject = replace(subject, labels=read_labels(arguments.labels))
        if arguments.licence is not None:
            subject = replace(subject, licence=arguments.licence)
        differences = export(subject, arguments.out, arguments.kind, options)
        found = ", ".join(f"{value:.1e} {way}" for way, value in differences.items())
        print(
            f"wrote {arguments.out} (format {arguments.kind}); reloaded in a fresh process, its "
            f"outputs differ by at most {found}"
        )
        return 0

    return reporting(run)
