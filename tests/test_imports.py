"""The layering of DESIGN.md, held by parsing imports: kernels know torch only, and nothing heavy loads unasked."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The parts of the repository, lowest first; each may import itself and what stands before it.
LAYERS = ("prx_kernels", "prx_model", "train", "benchmarks")
UPPER = {"benchmarks", "examples", "tests"}
# Nine to twelve seconds each (STYLE.md, rule 10): only inside the functions that need them.
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


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [layer for layer in LAYERS if (ROOT / layer).is_dir()])
def test_a_layer_imports_no_layer_above_it(package: str) -> None:
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | (UPPER - {package})
    found = imports_below(ROOT / package)
    assert found or package == "benchmarks", f"{package} has no imports at all: was anything parsed?"
    assert [f"{i.where} imports {i.top}" for i in found if i.top in above | {".."}] == []


@pytest.mark.parametrize("package", ["prx_kernels", "prx_model"])
def test_a_package_of_the_wheel_imports_itself_relatively(package: str) -> None:
    """So that a copy under another name works beside the installed one (KERNELS.md, "How an op is built")."""
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
