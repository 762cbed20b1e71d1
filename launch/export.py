"""`groundwork export`: a thin front to `pretrain/weights/export.py`."""

from pathlib import Path

from groundwork.launch.errors import reporting, require_folder


def start(checkpoint: Path, out: Path, kind: str) -> int:
    """Export a run or checkpoint. Returns the exit status."""

    def run() -> int:
        from groundwork.pretrain.weights.export import TOLERANCE, export
        from groundwork.pretrain.weights.trained import load_trained

        require_folder(out)
        difference = export(load_trained(checkpoint), out, kind)
        print(
            f"wrote {out} (format {kind}); reloaded in a fresh process: largest difference of an "
            f"embedding {difference:.1e}, at most {TOLERANCE:.0e} allowed"
        )
        return 0

    return reporting(run)
