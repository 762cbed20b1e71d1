"""`groundwork knowledge ...`"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from groundwork.data.knowledge.augment import augment_prompt
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.senses import find_knowledge
from groundwork.data.knowledge.wordnet import build_wordnet, find_wordnet
from groundwork.launch.errors import reporting, require_file

app = typer.Typer(help="Build and query knowledge indices.", no_args_is_help=True)
build_app = typer.Typer(help="Build an index from a source.", no_args_is_help=True)
app.add_typer(build_app, name="build")


@build_app.command("wordnet")
def wordnet(
    out: Annotated[Path, typer.Option(help="The .gkb file to write.")],
    dictionary: Annotated[
        Path | None, typer.Option(help="Folder with data.noun, index.noun, ...; found by default.")
    ] = None,
) -> None:
    """WordNet 3.0, from its dictionary files."""

    def run() -> int:
        require_file(out)
        folder = find_wordnet(dictionary)
        counts = build_wordnet(folder, out)
        shown = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        Console().print(f"{out}: {shown} (from {folder})", markup=False, soft_wrap=True)
        return 0

    raise typer.Exit(reporting(run))


@app.command("show")
def show(
    index: Annotated[Path, typer.Argument(help="A .gkb file.")],
    names: Annotated[list[str], typer.Argument(help="Names to look up.")],
) -> None:
    """Show what an index knows about names, as prompts."""

    def run() -> int:
        opened = KnowledgeIndex(index)
        for name in names:
            found = find_knowledge(opened, name)
            text = None if found is None else found.gloss
            print(augment_prompt("{}", name, text) if text else f"{name}: nothing found")
            if found is not None:
                print(f"  {found.sense_id} ({found.matched_term}): {', '.join(found.path)}")
        return 0

    raise typer.Exit(reporting(run))
