"""`groundwork recipe ...`"""

from typing import Annotated

import typer
import yaml

from groundwork.launch.errors import reporting

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command("list")
def list_recipes() -> None:
    """The recipes that come with groundwork, with the first line of each."""
    from groundwork.pretrain.recipe import RECIPES, available

    for name in available():
        first = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()[0]
        print(f"{name:20} {first.lstrip('# ')}")


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: key.path=value.")
    ] = None,
) -> None:
    """Check a recipe and print it resolved: every key, defaults included."""

    def run() -> int:
        from groundwork.pretrain.recipe import load_recipe, recipe_to_dict

        resolved = recipe_to_dict(load_recipe(recipe, set_ or []))
        print(yaml.safe_dump(resolved, sort_keys=False), end="")
        return 0

    raise typer.Exit(reporting(run))
