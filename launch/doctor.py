"""`groundwork kernels build` and `groundwork doctor`."""

from typing import Annotated

import typer

app = typer.Typer(help="Compiled kernels.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Compiled kernels."""


@app.command()
def build(
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Also measure on each GPU which launch choices are fastest."),
    ] = False,
) -> None:
    """Compile every kernel for this machine now instead of at its first use."""
    status = _report(required=True)
    if tune:
        _tune()
    raise typer.Exit(status)


def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Only the kernels: which backend runs, and why.")
    ] = False,
) -> None:
    """Say what groundwork finds on this machine."""
    if not kernels:
        _versions()
    raise typer.Exit(_report(required=False))


def _tune() -> None:
    import torch

    from groundwork.kernels import autotune, dcnv3_cuda

    if not torch.cuda.is_available():
        print("no GPU: nothing to tune")
        return
    for device in range(torch.cuda.device_count()):
        reason = dcnv3_cuda.unavailable(device)
        if reason is not None:
            print(f"cuda:{device} is not tuned: {reason}")
            continue
        kinds = dcnv3_cuda.tune(device)
        table = autotune.table_of(device, (dcnv3_cuda.SOURCE, dcnv3_cuda.TILE_SOURCE))
        print(f"cuda:{device}: {len(kinds)} kinds of calls are tuned, in {table.path}")


def _report(*, required: bool) -> int:
    """Print a table of the kernels. With `required` it is a failure if a reference stands in."""
    from rich.console import Console
    from rich.table import Table

    from groundwork.kernels.doctor import kernel_statuses

    statuses = kernel_statuses()
    table = Table("op", "device", "backend")
    table.add_column("why", overflow="fold")
    for status in statuses:
        table.add_row(status.op, status.device, status.backend, status.reason)
    Console().print(table)
    return int(required and any(status.backend == "reference" for status in statuses))


def _versions() -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("groundwork-pretrain", "torch", "deepspeed", "webdataset", "transformers"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    devices = range(torch.cuda.device_count())
    print("GPUs: " + (", ".join(map(torch.cuda.get_device_name, devices)) or "none"))
