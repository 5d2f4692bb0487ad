"""The layering of docs/layout.md, held by parsing imports: kernels know torch only, and nothing heavy loads unasked."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The parts of the repository, lowest first; each may import itself and what stands before it.
LAYERS = ("prx_kernels", "prx_model", "train", "benchmarks")
UPPER = {"benchmarks", "examples", "tests"}
# What stands on which floor of a package, lowest first. An entry is a module, a folder or a pattern; of those that fit,
# the longest counts. A module imports lower floors and its own entry, so nothing climbs.
FLOORS = {
    "prx_model": (
        ("ranges", "wrappers"),
        ("captions", "config", "convert", "ema", "flow", "packed_text", "teacher_constants", "teacher_weights", "text"),
        ("attention", "flops", "teachers"),
        ("layers",),
        ("transformer",),
        ("sampler",),
    ),
    "train": (
        ("randomness", "shown", "side_files", "data.settings"),
        ("errors", "recipes"),
        ("commandline", "run.folder", "run.lock", "run.stopwatch", "evaluation.pictures"),
        ("ranks",),
        ("data",),
        ("checkpoint", "learner"),
        ("evaluation", "ranks.faults"),
        ("run",),
        ("loop",),
        ("ablate", "doctor", "export", "generate", "precompute_text", "prepare", "speedrun"),
    ),
    "benchmarks": (
        ("clock", "learning", "peers", "photographs", "plain_prx", "roofline"),
        ("collectives", "flop_table", "machine", "passes", "sizes", "tiles", "traffic"),
        ("absent_gpu", "denoisers", "measure", "replay"),
        ("summary", "training_step"),
        ("project", "trainer_step"),
        ("conftest", "figures", "first_step", "load", "profile_step", "test_*", "tune"),
        ("dry_step", "report"),
        ("step_table",),
    ),
}
# The ops of prx_kernels, each with the ops below it; all of them stand on launch.py, and reference.py hands on the
# names of all. Taken home, an op needs launch.py and these folders.
OPS: dict[str, set[str]] = {
    "blocks": set(),
    "noise": set(),
    "newton_schulz": set(),
    "routing": {"noise"},
    "pixel_loss": {"noise"},
    "muon": {"newton_schulz"},
    "patch_embed": {"noise", "pixel_loss"},
}
# Nine to twelve seconds each (docs/layout.md, "Choices"): only inside the functions that need them.
HEAVY = {"diffusers", "lpips", "timm", "torchvision", "transformers", "matplotlib", "tensorboard"}
HEAVY |= {"torch_fidelity", "torchmetrics"}
# Where the name of a distribution is not that of its module.
DISTRIBUTION = {"PIL": "pillow", "flash_attn": "flash-attn", "torch_fidelity": "torch-fidelity"}


@dataclass(frozen=True)
class Import:
    """One import: where, its first name ("." for one's own package), and whether importing the file loads it."""

    where: str
    top: str
    at_module_level: bool


def imports_of(path: Path, package: Path) -> list[Import]:
    """All imports of a file, in functions and classes too; those for type checkers only are left out."""
    found: list[Import] = []
    depth = len(path.relative_to(package).parts)

    def visit(node: ast.AST, at_module_level: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, at_module_level)
            return
        where = f"{path.relative_to(package.parent)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            found.extend(Import(where, alias.name.split(".")[0], at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append(Import(where, "." if node.level <= depth else "..", at_module_level))
        elif isinstance(node, ast.ImportFrom):
            found.append(Import(where, str(node.module).split(".")[0], at_module_level))
        inside = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def imports_below(package: Path) -> list[Import]:
    return [found for path in sorted(package.rglob("*.py")) for found in imports_of(path, package)]


def modules_of(package: Path) -> dict[str, Path]:
    """Files by the names that they have inside the package, "" for the package itself."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imported_modules(package: Path) -> dict[str, set[str]]:
    """Of each module of a package, the others that it imports, in functions too; `from x import y` is of y if a module.

    Where a folder's own file hands on names, that file is what is imported. Type checkers' imports count as well.
    """
    modules = modules_of(package)
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        home = [package.name, *path.relative_to(package).parts[:-1]]
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = home[: len(home) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = f"{source}.{alias.name}".removeprefix(f"{package.name}.")
                    names.add(f"{source}.{alias.name}" if inner in modules else source)
        own = {name.partition(".")[2] for name in names if name.split(".")[0] == package.name}
        found[module] = {name for name in own if name in modules} - {module}
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring; none if there is no such ring."""
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports[module]):
            if ring := visit(other, [*above, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(imports) if (ring := visit(module, []))), [])


def floor_of(module: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str]:
    """Number and entry of a module's floor."""
    fitting = [
        (len(entry), number, entry)
        for number, floor in enumerate(floors)
        for entry in floor
        if fnmatch(module, entry) or module.startswith(f"{entry}.")
    ]
    assert fitting, f"{module} stands on no floor: list it in FLOORS of tests/test_imports.py"
    return max(fitting)[1:]


def climbing(imports: dict[str, set[str]], floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """Imports of a floor that is not below, and not of the same entry. A folder's `__init__` stands where it does."""
    found = []
    for module, others in imports.items():
        for other in sorted(others - {""} if module else ()):
            (mine, entry), (theirs, their_entry) = floor_of(module, floors), floor_of(other, floors)
            if theirs > mine or (theirs == mine and entry != their_entry):
                found.append(f"{module} (floor {mine}) imports {other} (floor {theirs})")
    return found


def third_party(package: str) -> set[str]:
    """Modules from outside the repository and the standard library."""
    own = {".", *LAYERS, *UPPER}
    return {found.top for found in imports_below(ROOT / package)} - own - set(sys.stdlib_module_names)


def declared(*extras: str) -> set[str]:
    """Names of the base dependencies and of these extras in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.split(r"[\s<>=!~;\[]", line)[0].lower() for line in lines}


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter in the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the parser itself --------------------------------------------------------------------------------------------


def test_the_parser_sees_every_way_to_import(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "sub").mkdir(parents=True)
    (package / "sub" / "file.py").write_text(
        "import a.b, c\nfrom d.e import f\nfrom . import g\nfrom ..x import h\nfrom ...y import i\n"
        "if TYPE_CHECKING:\n    import typed\nelse:\n    import real\n"
        "try:\n    import tried\nexcept ImportError:\n    import other\n"
        "class A:\n    import inclass\n    def f(self):\n        import lazy\n"
    )
    found = imports_below(package)
    loaded = [i.top for i in found if i.at_module_level]
    assert loaded == ["a", "c", "d", ".", ".", "..", "real", "tried", "other", "inclass"]
    assert [i.top for i in found if not i.at_module_level] == ["lazy"]


def test_floors_see_a_climb_and_a_ring(tmp_path: Path) -> None:
    package = tmp_path / "house"
    (package / "room").mkdir(parents=True)
    files = {"__init__": "", "room/__init__": "from .low import a", "room/low": "from ..ground import b"}
    files |= {"ground": "import os", "top": "from house.room import low\ndef f():\n    import house.ground"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    imports = imported_modules(package)
    assert imports["room.low"] == {"ground"}
    assert imports["top"] == {"room.low", "ground"}
    floors = (("ground",), ("room",), ("top",))
    assert climbing(imports, floors) == []
    assert circle(imports) == []
    (package / "ground.py").write_text("def late():\n    from .room.low import a")
    imports = imported_modules(package)
    assert climbing(imports, floors) == ["ground (floor 0) imports room.low (floor 1)"]
    assert circle(imports) == ["ground", "room.low", "ground"]
    with pytest.raises(AssertionError, match="cellar stands on no floor"):
        floor_of("cellar", floors)


# --- floors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", LAYERS)
def test_no_modules_import_one_another_in_a_ring(package: str) -> None:
    assert circle(imported_modules(ROOT / package)) == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_climbs(package: str) -> None:
    imports = imported_modules(ROOT / package)
    assert sum(map(len, imports.values())) > 5, "was anything parsed?"
    assert climbing(imports, FLOORS[package]) == []
    standing = {floor_of(module, FLOORS[package])[1] for module in imports if module}
    assert {entry for floor in FLOORS[package] for entry in floor} == standing, "an entry of FLOORS has no module"


def test_an_op_imports_the_ground_and_the_ops_below_it() -> None:
    imports = imported_modules(ROOT / "prx_kernels")
    assert {module.split(".")[0] for module in imports} == {"", "launch", "reference", *OPS}
    assert imports["launch"] == set()
    for op, below in OPS.items():
        needed = {other.split(".")[0] for module in imports if module.split(".")[0] == op for other in imports[module]}
        assert needed <= {op, "launch", *below}, op
    assert all(other == "launch" or other.endswith(".reference") for other in imports["reference"])


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [layer for layer in LAYERS if (ROOT / layer).is_dir()])
def test_a_layer_imports_no_layer_above_it(package: str) -> None:
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | (UPPER - {package})
    found = imports_below(ROOT / package)
    assert found or package == "benchmarks", f"{package} has no imports at all: was anything parsed?"
    assert [f"{i.where} imports {i.top}" for i in found if i.top in above | {".."}] == []


@pytest.mark.parametrize("package", ["prx_kernels", "prx_model"])
def test_a_package_of_the_wheel_imports_itself_relatively(package: str) -> None:
    """So that a copy under another name works beside the installed one (docs/kernels.md, "How an op is built")."""
    assert [i.where for i in imports_below(ROOT / package) if i.top == package] == []


def test_kernels_import_torch_and_triton_only() -> None:
    assert {"torch"} <= third_party("prx_kernels") <= {"torch", "triton"}


def test_everything_the_wheel_imports_is_declared_in_its_metadata() -> None:
    assert third_party("prx_kernels") <= declared()
    assert {DISTRIBUTION.get(name, name) for name in third_party("prx_model")} <= declared("model", "flash")


def test_everything_the_trainer_imports_is_declared() -> None:
    # diffusers, only to write folders for it, comes with the group `dev`.
    needed = {DISTRIBUTION.get(name, name) for name in third_party("train")}
    assert needed <= declared("model", "train") | {"diffusers"}


@pytest.mark.parametrize("package", ["prx_kernels", "prx_model", "train"])
def test_heavy_packages_are_imported_inside_functions_only(package: str) -> None:
    found = imports_below(ROOT / package)
    assert [f"{i.where} imports {i.top}" for i in found if i.at_module_level and i.top in HEAVY] == []


def test_heavy_imports_that_are_lazy_exist_so_that_the_rule_above_says_something() -> None:
    assert "transformers" in third_party("prx_model")


# --- what an import loads -----------------------------------------------------------------------------------------


def test_importing_the_kernels_loads_nothing_beyond_torch_and_triton() -> None:
    code = (
        "import sys, json, torch; before = {m.split('.')[0] for m in sys.modules}; import prx_kernels; "
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules} - before)))"
    )
    loaded = set(json.loads(run_python(code)))
    assert "prx_kernels" in loaded
    assert loaded - {"prx_kernels", "triton"} - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("module", ["prx_model", "prx_model.config"])
def test_sizes_and_settings_are_read_without_torch(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    loaded = set(json.loads(run_python(code)))
    assert "prx_model" in loaded
    assert loaded & {"torch", "numpy", "triton", "prx_kernels", *HEAVY} == set()


def test_every_public_name_of_the_model_loads_without_transformers() -> None:
    code = (
        "import sys, prx_model; [getattr(prx_model, name) for name in prx_model.__all__]; "
        "print(sorted({'torch', 'transformers', 'timm', 'lpips', 'diffusers'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "['torch']"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import prx_model

    with pytest.raises(AttributeError, match="module 'prx_model' has no attribute 'Transformer'"):
        prx_model.Transformer  # noqa: B018
