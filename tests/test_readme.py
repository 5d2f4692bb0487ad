"""What the README and docs/ promise: commands that parse, links and cited headings that exist, a snippet that runs.

Commands are read, not run: files and modules are looked up, options too; the recipe's are parsed as speedrun.py does.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from train.commandline import DryRun, parse, read_options
from train.data.preparing.settings import Prepare
from train.errors import UserError
from train.recipes import prx_512, prx_1024
from train.run.plan import project

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "train/README.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]
# Options of torchrun, which stand before the script.
TORCHRUN = {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
TORCHRUN |= {"--max-restarts"}
# Scripts that take the recipe's words.
RECIPE = {"train/speedrun.py", "train/doctor.py", "train/precompute_text.py"}
OWN = {"train/doctor.py": {"--sample", "--all", "--json"}}


def commands(page: str) -> list[list[str]]:
    """The words of every command of a page, in fenced blocks without a language and in the text, without comments."""
    text, fence, found = (ROOT / page).read_text().replace("\\\n", " "), None, []
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
            continue
        for code in [line] if fence == "" else re.findall(r"`([^`]+)`", line) if fence is None else []:
            for part in re.split(r"\s&&\s", code):
                if re.match(r"(pip|uv|python|torchrun|srun|bash) ", part):
                    found.append(shlex.split(part, comments=True))
    return found


def wrong(words: list[str]) -> str:
    """What is wrong with a command, "" if nothing that can be seen without running it."""
    while words[:2] == ["uv", "run"] or words[:1] == ["srun"]:
        words = words[2:] if words[0] == "uv" else words[1:]
    if not words or words[0] in ("pip", "uv", "pre-commit", "--isolated"):
        return ""
    script = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh", "/run")) or word == "-m"), None)
    if words[0] == "torchrun":
        unknown = {word for word in words[1:script] if word.startswith("--")} - TORCHRUN
        if unknown or script is None:
            return f"torchrun without a script or with {sorted(unknown)}"
    if script is None:
        paths = [word.partition("::")[0] for word in words[1:] if not word.startswith("-")]
        return "" if words[0] == "pytest" and all((ROOT / path).exists() for path in paths) else "no script"
    if words[script] == "-m":
        path, rest = Path(*words[script + 1].split(".")).with_suffix(".py"), words[script + 2 :]
    else:
        path, rest = Path(words[script]), words[script + 1 :]
    return _wrong_options(path, rest) if (ROOT / path).is_file() else f"{path} does not exist"


def _wrong_options(path: Path, rest: list[str]) -> str:
    """Options that the script does not know; those of the recipe are parsed as speedrun.py parses them."""
    if path.as_posix() in RECIPE and rest != ["--help"]:
        own = OWN.get(path.as_posix(), set())
        parse(["--dry-run" if word in own else word for word in rest if word != "--dry-run"] + ["--dry-run"])
        return ""
    if path.as_posix() == "train/prepare.py":
        first = next(n for n, word in enumerate(rest) if word.startswith("-"))
        read_options(Prepare, args=rest[first:], prog="prepare.py", description="")
        return ""
    source = (ROOT / path).read_text()
    options = {
        word.partition("=")[0] for word in rest[: rest.index("--") if "--" in rest else None] if word[:2] == "--"
    }
    names = {option for option in options if not re.search(rf"{option}\b|\b{option[2:].replace('-', '_')}:", source)}
    return f"{path} does not know {sorted(names - {'--help'})}" if names - {"--help"} else ""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_a_file_and_options_that_exist(page: str) -> None:
    found = commands(page)
    assert found or page in ("docs/recipe.md", "docs/kernels.md", "docs/layout.md", "docs/security.md"), (
        "was anything parsed?"
    )
    assert {shlex.join(words): said for words in found if (said := wrong(list(words)))} == {}


def test_wrong_commands_are_seen() -> None:
    said = [
        wrong(shlex.split(command))
        for command in (
            "python train/absent.py",
            "uv run python -m benchmarks.absent",
            "python -m benchmarks.step_table 512.json --wite README.md",
            "torchrun --standalon train/speedrun.py",
            "uv run pytest tests/absent",
        )
    ]
    assert said == [
        "train/absent.py does not exist",
        "benchmarks/absent.py does not exist",
        "benchmarks/step_table.py does not know ['--wite']",
        "torchrun without a script or with ['--standalon']",
        "no script",
    ]
    with pytest.raises(UserError, match="stp"):
        wrong(shlex.split("uv run torchrun --standalone train/speedrun.py prx-512 --train.stp 3"))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_or_heading_is_alive(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", (ROOT / page).read_text()):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {path}"
        assert not anchor or anchor in {_anchor(title) for title in headings(file)}, f"{page}: {target}"


def test_every_page_and_heading_that_the_code_cites_exists() -> None:
    cited = 0
    for folder in ("prx_kernels", "prx_model", "train", "benchmarks", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for page, title in re.findall(r"(docs/\w+\.md)(?:,\s+\"([^\"]+)\")?", path.read_text()):
                titles = headings(ROOT / page)
                assert not title or title in titles, f"{path.relative_to(ROOT)} cites {page}, {title!r}"
                cited += 1
    assert cited > 30, "was anything read?"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_hours_of_the_readme_are_those_of_the_function() -> None:
    stages = [project(recipe, DryRun()).expected for recipe in (prx_512(), prx_1024())]
    whole, dollars = sum(stage.hours for stage in stages), sum(stage.dollars for stage in stages)
    sentence = f"for the whole recipe on 32 H200: {whole:.2f} h and ${dollars:,.0f} at $2 a GPU-hour."
    assert sentence in (ROOT / "README.md").read_text()


def test_the_snippet_of_the_readme_routes_and_trains_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(16))
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    model = Model()
    names = {"model": model}
    exec(snippet, names)
    optimizer = names["optimizer"]
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 64, 8)).square().mean().backward()
    optimizer.step()
    assert names["route"].keep.shape == (2, 32)
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]


def headings(path: Path) -> list[str]:
    """Titles of a page, blocks of code left out."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def _anchor(title: str) -> str:
    """As GitHub forms it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
