"""Rules that keep the house in order: who imports whom, how long things are, what is pinned."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70

# A room imports from its own line and from the lines below it; modules never in a circle.
FLOORS = (
    {"tools", "pretrain", "slurm"},
    {"training"},
    {"benchmarks", "checkpoint", "data", "evaluation", "planning", "tracking"},
    {"model"},
    {"ops"},
    {"platform"},
)
# Imported by every room; needs nothing but the standard library, and this to report mistakes with.
CONFIG, CONFIG_MAY_IMPORT = "config", "samba_megatron.platform.errors"
SLOW_TO_IMPORT = {"megatron", "torch", "transformers", "mlflow", "matplotlib", "datatrove"}
# What a machine may lack: looked for, never required.
OPTIONAL = {
    "apex",
    "causal_conv1d",
    "flash_attn",
    "mamba_ssm",
    "transformer_engine",
    "transformer_engine_torch",
}

# Copied as it is into each Hugging Face export, whose loader wants one file and relative imports.
SHIPPED = ROOT / "samba_megatron" / "checkpoint" / "huggingface" / "shipped"


def _python_files(*folders: str) -> list[Path]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in paths if SHIPPED not in path.parents]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


SOURCES = _python_files("samba_megatron", "tools", "pretrain", "slurm")
TESTS = _python_files("tests")
TREES = {path: ast.parse(path.read_text(), filename=str(path)) for path in SOURCES + TESTS}


def _module(path: Path) -> str:
    """The dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in SOURCES}


def _room(module: str) -> str:
    """``model`` for samba_megatron.model.samba, ``tools`` for tools.quickstart."""
    parts = module.split(".")
    return parts[1] if parts[0] == "samba_megatron" and len(parts) > 1 else parts[0]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what a tree imports, in functions too, but not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield from _imports(node)


def _imports_at_start(tree: ast.Module) -> Iterator[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    body = [node for node in tree.body if not isinstance(node, functions)]
    return _imports(ast.Module(body=body, type_ignores=[]))


def _floor(room: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{room} has no place in FLOORS"
    return floors[0]


def test_imports_run_downward_only() -> None:
    upward = []
    for path in SOURCES:
        room = _room(_module(path))
        if room in ("samba_megatron", CONFIG):
            continue
        for imported in _imports(TREES[path]):
            target = _room(imported)
            if imported.startswith("samba_megatron.") and target != CONFIG:
                upward += [f"{_name(path)}: {imported}"] * (_floor(target) < _floor(room))
            elif imported.startswith("slurm.") and room == "slurm":
                continue  # its commands share modules
            elif imported.split(".")[0] in FLOORS[0]:
                upward.append(f"{_name(path)}: {imported} (a command is run, not imported)")
    assert not upward


def test_config_needs_nothing_heavy_and_no_other_room() -> None:
    wrong = [
        f"{_name(path)}: {imported}"
        for path in SOURCES
        if _room(_module(path)) == CONFIG
        for imported in _imports(TREES[path])
        if imported.split(".")[0] in SLOW_TO_IMPORT
        or (
            imported.startswith("samba_megatron.")
            and _room(imported) != CONFIG
            and imported != CONFIG_MAY_IMPORT
        )
    ]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {name for name in _imports_at_start(TREES[path]) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", _python_files("tools"), ids=_name)
def test_help_is_quick(path: Path) -> None:
    """A command says how it is used without importing what takes seconds."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"print('SLOW', sorted({SLOW_TO_IMPORT!r} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "SLOW []"


def test_files_and_functions_are_short() -> None:
    long_files = {
        _name(path): lines
        for path in [*SOURCES, *sorted(SHIPPED.glob("*.py"))]
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    long_functions = {
        f"{_name(path)}: {node.name}": lines
        for path in SOURCES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long_files
    assert not long_functions


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"common", "helpers", "misc", "util", "utils"}
    assert not [_name(path) for path in SOURCES if drawers & {path.stem, path.parent.name}]


def test_test_folders_mirror_the_package() -> None:
    """But for those of the whole: runs of several processes, and of the whole on a GPU."""
    counterparts = [ROOT / "samba_megatron", ROOT]
    orphans = {
        str(folder)
        for path in TESTS
        if (folder := path.parent.relative_to(ROOT / "tests")) != Path()
        and folder.parts[0] not in ("distributed", "gpu")
        and not any((root / folder).is_dir() for root in counterparts)
    }
    assert not orphans


def _normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>~! ]", requirement)[0]).lower()


def _direct_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]


def _locked(name: str) -> dict[str, str]:
    """Versions by package; fails on a line that is anything but ``name==version``."""
    locked = {}
    for line in (ROOT / name).read_text().splitlines():
        match = re.fullmatch(r"([a-z0-9-]+)==([A-Za-z0-9.+]+)", line)
        assert match, f"{name}: {line!r} is not just name==version"
        locked[match[1]] = match[2]
    return locked


def test_locks_hold_exact_versions_and_no_addresses() -> None:
    base, gpu = _locked("requirements.lock"), _locked("requirements-gpu.lock")
    assert base.items() <= gpu.items(), "the GPU lock is the base lock and more"
    for requirement in _direct_requirements():
        name, version = _normalised(requirement), requirement.partition("==")[2]
        assert gpu.get(name) == version, f"{requirement}: not what the lock files hold: make lock"
    for name in ("pyproject.toml", "Makefile", ".ci/run", "tools/setup_environment.sh"):
        assert "://" not in (ROOT / name).read_text(), f"{name} names an address"


def test_every_imported_package_is_declared() -> None:
    declared = {_normalised(requirement) for requirement in _direct_requirements()}
    providers = packages_distributions()
    own = {"samba_megatron", "tools", "pretrain", "slurm", "tests"}
    undeclared = set()
    for path, tree in TREES.items():
        for name in {imported.split(".")[0] for imported in _imports(tree)}:
            if name in sys.stdlib_module_names or name in own or name in OPTIONAL:
                continue
            if not declared & {_normalised(provider) for provider in providers.get(name, [])}:
                undeclared.add(f"{_name(path)}: {name}")
    assert not undeclared


def test_links_between_the_pages_lead_somewhere() -> None:
    broken = [
        f"{_name(page)}: {link}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken
