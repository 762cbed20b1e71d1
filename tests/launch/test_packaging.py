"""The layout keeps its promises: packages, imports, names, and what is committed."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "kernels", "launch", "pretrain")

#: Folder -> folders of the same repository that its files may not import.
FORBIDDEN = {
    "data": ("kernels", "pretrain", "launch"),
    "kernels": ("data", "pretrain", "launch"),
    "pretrain": ("launch",),
    "pretrain/models": ("pretrain.objectives", "pretrain.engine", "pretrain.downstream"),
    "pretrain/objectives": ("pretrain.engine", "pretrain.downstream"),
}

#: Modules that are used where they are there: cuda.bindings comes with torch for CUDA.
OPTIONAL = {"apex", "cuda"}

#: Its files are copied into exports, where they know each other by relative imports only.
COPIED = "hf_internimage"

#: Modules that others import by a bare name, whether or not they are installed here.
TAKEN_NAMES = {"data", "datasets", "evaluate", "kernels", "models", "tokenizers", "utils"}


def setuptools_options() -> dict[str, object]:
    options: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
        "tool"
    ]["setuptools"]
    return options


def python_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent.name == COPIED:
                continue
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def committed_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name]


def test_every_code_folder_is_listed_as_a_package() -> None:
    found = {
        "groundwork." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in python_files(ROOT / room)
    }
    assert set(setuptools_options()["packages"]) == found  # type: ignore[call-overload]


def test_every_other_file_of_a_package_is_in_package_data() -> None:
    options = setuptools_options()
    data: dict[str, list[str]] = options["package-data"]  # type: ignore[assignment]
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.removeprefix("groundwork.").replace(".", "/")).glob(pattern)
    }
    wanted = {*(ROOT / "pretrain/recipes").glob("*.yaml"), *(ROOT / r / "py.typed" for r in ROOMS)}
    assert wanted <= shipped
    assert options["include-package-data"] is False


def test_no_package_has_an_init_file() -> None:
    assert [str(path) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")] == []


def test_the_symlink_tree_leads_to_the_four_folders() -> None:
    links = ROOT / "tests" / "namespace" / "groundwork"
    assert {link.name: link.resolve() for link in links.iterdir()} == {
        room: ROOT / room for room in ROOMS
    }


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_downwards_only(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(ROOT / folder)
        for module in imported_modules(path)
        for forbidden in FORBIDDEN[folder]
        if f"{module}.".startswith(f"groundwork.{forbidden}.")
    ]
    assert wrong == []


def test_no_file_imports_a_room_by_its_bare_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for room in ROOMS
        for path in python_files(ROOT / room)
        for module in imported_modules(path)
        if module.split(".")[0] in ROOMS
    ]
    assert wrong == []


def test_what_is_imported_is_a_dependency_and_no_dependency_is_idle() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!~\[ ]", line)[0].lower() for line in requirements}

    extras = project["optional-dependencies"]
    optional = names([line for kind in FEATURES for line in extras[kind]])
    imported = _distributions(imported_modules)
    expected = names(project["dependencies"]) - BY_OTHERS | optional - BY_OTHERS
    assert imported == expected
    # what is optional is imported where it is used
    assert _distributions(modules_imported_at_once) & optional == set()


#: Extras that add features; the others are for developing.
FEATURES = ("annotations", "finetune", "parquet", "video", "onnx", "s3", "gs")
#: What other packages import: torch.utils.tensorboard, torch.onnx, and fsspec by a URL's protocol.
BY_OTHERS = {"tensorboard", "s3fs", "gcsfs", "onnx", "onnxscript"}


def _distributions(modules_of: Callable[[Path], Iterable[str]]) -> set[str]:
    """Names of the packages that the four rooms import."""
    distributions = packages_distributions()
    modules = {
        module.split(".")[0]
        for room in ROOMS
        for path in python_files(ROOT / room)
        for module in modules_of(path)
    } - {*sys.stdlib_module_names, *OPTIONAL, "groundwork"}
    return {distributions.get(m, [m])[0].lower().replace("_", "-") for m in modules}


def modules_imported_at_once(path: Path) -> Iterator[str]:
    """Those that importing the file imports."""
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            waiting += ast.iter_child_nodes(node)


def test_no_launch_file_hides_a_top_level_module() -> None:
    names = {path.stem for path in python_files(ROOT / "launch")}
    taken = {*sys.stdlib_module_names, *packages_distributions(), *TAKEN_NAMES} - {"groundwork"}
    assert names & taken == set()


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    """A multi-node launcher puts the repository's root on the path of every rank."""
    program = (
        "import sys\n"
        "from importlib.metadata import packages_distributions\n"
        "import transformers.modeling_utils\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available() or 'kernels' in packages_distributions()\n"
        "files = [str(getattr(module, '__file__', None)) for module in [*sys.modules.values()]]\n"
        f"assert [file for file in files if file.startswith({str(ROOT / 'kernels')!r})] == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_no_committed_text_names_a_folder_of_a_workplace() -> None:
    pattern = re.compile(rb"(?<![\w.])/(?:" + b"|".join((b"home", b"work", b"root")) + b")/")
    wrong = []
    for path in committed_files():
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" not in content and pattern.search(content):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []
