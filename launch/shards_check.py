"""`groundwork shards verify`, `repair` and `index`."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from groundwork.launch.errors import reporting

if TYPE_CHECKING:
    from groundwork.data.shard_check import Finding
    from groundwork.data.verify import Report, ShardSet

#: Bytes below which starting processes takes longer than checking in one.
SMALL: Final = 64 * 2**20
#: Exit status where something is bad, and where there is nothing to check.
BAD: Final = 1
UNREADABLE: Final = 2

console = Console(stderr=True, highlight=False)

Where = Annotated[str, typer.Argument(help="Folder of a data set or of tars, a tar, or a pattern.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; 1 for small data sets, else one per core.")
]
Require = Annotated[
    list[str] | None,
    typer.Option(help="Field that every sample must have (txt, json, ...; `image` for any)."),
]


def verify(
    where: Where,
    decode: Annotated[bool, typer.Option(help="Decode every image to its end.")] = False,
    require: Require = None,
    workers: Workers = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead of lines.")
    ] = False,
    notes: Annotated[
        bool, typer.Option(help="List what is unusual too, such as CMYK images.")
    ] = False,
) -> None:
    """Check every byte of a data set: manifest, tars, side-cars, checksums, keys, fields.

    One line per finding on stdout: shard, key, offset, diagnosis, detail, with tabs between. Ends
    with status 1 if something is bad, 2 if there is nothing that can be checked.
    """
    from groundwork.data.shard_check import Checks
    from groundwork.data.shard_index import ShardError
    from groundwork.data.verify import find_shards, verify_shards

    def run() -> int:
        try:
            shards = find_shards(where)
        except (ShardError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return UNREADABLE
        checks = Checks(decode, tuple(require or ()))
        with _bar("checking", len(shards.shards)) as advance:
            report = verify_shards(
                shards,
                checks,
                workers=workers or _processes(shards),
                on_progress=lambda _: advance(),
            )
        if as_json:
            typer.echo(json.dumps(_record(report)))
        else:
            for finding in report.findings:
                if notes or finding.diagnosis.is_bad:
                    typer.echo(_line(finding))
            _show(report)
        return 0 if report.is_good else BAD

    raise typer.Exit(reporting(run))


def repair(
    where: Where,
    out: Annotated[Path, typer.Option(help="Folder of the clean copy.")],
    decode: Annotated[bool, typer.Option(help="Leave out what does not decode.")] = True,
    require: Require = None,
    workers: Workers = None,
) -> None:
    """Write a clean copy of a damaged data set; the original stays as it is.

    Good samples are copied byte for byte; repair.json lists the others with their diagnosis.
    """
    from groundwork.data.repair import repair as repaired_copy
    from groundwork.data.shard_check import Checks
    from groundwork.data.shards import REPAIR
    from groundwork.data.verify import find_shards

    def run() -> int:
        checks = Checks(decode, tuple(require or ()))
        shards = find_shards(where)
        with _bar("checking and copying", 2 * len(shards.shards)) as advance:
            result = repaired_copy(
                where,
                out,
                checks,
                workers=workers or _processes(shards),
                on_progress=lambda _: advance(),
                on_shard=advance,
            )
        _show(result.report)
        kept = sum(result.manifest.samples(split) for split in result.manifest.splits)
        of_all = "" if result.expected is None else f" of {result.expected:,}"
        left_out = f"{REPAIR} lists the {result.left_out:,} that were found and left out"
        typer.echo(f"{out}: {kept:,} samples{of_all}; {left_out}")
        return 0

    raise typer.Exit(reporting(run))


def index(
    where: Where,
    rebuild: Annotated[bool, typer.Option(help="Write all of them anew.")] = False,
) -> None:
    """Write the side-cars that tars lack, or that do not fit them.

    Ends with status 1 if a tar cannot be indexed.
    """
    from groundwork.data.side_cars import write_side_cars
    from groundwork.data.verify import find_shards

    def run() -> int:
        counts = {"written": 0, "kept": 0, "refused": 0}
        refused = []
        with _bar("indexing", len(find_shards(where).shards)) as advance:
            for side_car in write_side_cars(where, rebuild=rebuild):
                counts[side_car.outcome] += 1
                if side_car.outcome == "refused":
                    refused.append(f"{printable(side_car.file)}: {printable(side_car.reason)}")
                advance()
        for line in refused:
            typer.echo(line, err=True)
        typer.echo(", ".join(f"{outcome}: {count:,}" for outcome, count in counts.items()))
        return BAD if refused else 0

    raise typer.Exit(reporting(run))


def _processes(shards: "ShardSet") -> int:
    size = sum(shard.path.stat().st_size for shard in shards.shards if shard.path.is_file())
    return 1 if size < SMALL else len(os.sched_getaffinity(0))


def printable(text: str) -> str:
    """Text of a file on a terminal: control characters, which could move the cursor, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _line(finding: "Finding") -> str:
    columns = (finding.file, finding.key, str(finding.offset), finding.diagnosis, finding.detail)
    return "\t".join(printable(column) or "-" for column in columns)


def _record(report: "Report") -> dict[str, Any]:
    return {
        "is_good": report.is_good,
        "shards": report.shards,
        "samples": report.samples,
        "bytes": report.bytes,
        "counts": {name.value: findings for name, (findings, _) in report.counts().items()},
        "findings": [
            {
                "shard": finding.file,
                "key": finding.key,
                "offset": finding.offset,
                "diagnosis": finding.diagnosis.value,
                "policy": finding.diagnosis.policy.value,
                "detail": finding.detail,
            }
            for finding in report.findings
        ],
    }


def _show(report: "Report") -> None:
    counts = report.counts()
    if counts:
        table = Table("diagnosis", "found", "in shards", "training", "meaning")
        for diagnosis, (findings, shards) in counts.items():
            policy = diagnosis.policy.value
            table.add_row(
                diagnosis.value, f"{findings:,}", f"{shards:,}", policy, diagnosis.meaning
            )
        console.print(table)
    verdict = "all good" if report.is_good else "something is bad"
    size = f"{report.bytes / 2**20:,.1f} MiB"
    console.print(f"{report.shards:,} shards, {report.samples:,} samples, {size}: {verdict}")


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
