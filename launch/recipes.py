"""`groundwork recipe ...`"""

from typing import Annotated

import typer
import yaml

from groundwork.launch.errors import reporting

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command("list")
def list_recipes() -> None:
    """The recipes that come with groundwork, with the first line of each."""
    from groundwork.pretrain.downstream.finetuning.recipe import FINETUNE_RECIPES
    from groundwork.pretrain.recipe import RECIPES
    from groundwork.pretrain.recipe_file import available_recipes

    for title, folder in (
        ("groundwork pretrain", RECIPES),
        ("groundwork finetune", FINETUNE_RECIPES),
    ):
        names = available_recipes(folder)
        print(f"{title}:")
        width = max(map(len, names), default=0)
        for name in names:
            first = (folder / f"{name}.yaml").read_text("utf-8").splitlines()[0]
            print(f"  {name:{width}}  {first.lstrip('# ')}")


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: key.path=value.")
    ] = None,
) -> None:
    """Check a recipe and print it resolved: every key, defaults included.

    A file with a section `task` is one of fine-tuning.
    """

    def run() -> int:
        from groundwork.pretrain.recipe_file import recipe_to_dict

        resolved = recipe_to_dict(_load(recipe, set_ or []))
        print(yaml.safe_dump(resolved, sort_keys=False), end="")
        return 0

    raise typer.Exit(reporting(run))


def _load(name: str, overrides: list[str]) -> object:
    """A recipe of either kind."""
    from groundwork.pretrain.downstream.finetuning.recipe import (
        FINETUNE_RECIPES,
        load_finetune_recipe,
    )
    from groundwork.pretrain.recipe import RECIPES, load_recipe
    from groundwork.pretrain.recipe_file import find_recipe, is_recipe_of

    path = find_recipe(name, RECIPES, FINETUNE_RECIPES)
    if is_recipe_of("task", path):
        return load_finetune_recipe(str(path), overrides)
    return load_recipe(str(path), overrides)
