"""Code from a folder is run: never. What is loaded from a folder or the hub is read by the libraries' own classes."""

import ast
import builtins
import contextlib
import json
from pathlib import Path

import pytest
import torch

from prx_model.text import T5GemmaTower, load_tokenizer
from tests.model.tiny_t5gemma import save_t5gemma

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("prx_kernels", "prx_model", "train", "benchmarks")


def calls(source: str) -> list[tuple[int, str, dict[str, str]]]:
    """Line, name and keywords of each call of a method or function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            whole = ast.unparse(node.func)
            name = whole if whole in NEEDED else whole.rpartition(".")[2]
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            found.append((node.lineno, name, keywords))
    return found


NEEDED = {
    "from_pretrained": ("trust_remote_code", "False"),
    "from_config": ("trust_remote_code", "False"),
    "load_state_dict_from_url": ("weights_only", "True"),
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
}
"""Calls that read what others wrote, and what each must say."""


def unsafe(source: str) -> list[str]:
    """Loading calls of a file that do not say that no code is run."""
    found = []
    for line, name, keywords in calls(source):
        needed = NEEDED.get(name)
        if needed is not None and keywords.get(needed[0]) != needed[1]:
            found.append(f"line {line}: {name} without {needed[0]}={needed[1]}")
    return found


def test_the_search_for_loading_calls_finds_one_that_is_unsafe() -> None:
    assert unsafe("A.from_pretrained(x, trust_remote_code=False)\ntorch.load(f, weights_only=True)") == []
    assert unsafe("A.from_pretrained(x)") == ["line 1: from_pretrained without trust_remote_code=False"]
    assert unsafe("\nnp.load(f, allow_pickle=True)") == ["line 2: np.load without allow_pickle=False"]
    assert unsafe("torch.load(f, map_location=0)") == ["line 1: torch.load without weights_only=True"]


def test_no_loading_call_of_ours_may_run_code() -> None:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    found = {file: unsafe(file.read_text(encoding="utf-8")) for file in files}
    assert sum("from_pretrained(" in file.read_text(encoding="utf-8") for file in files) >= 1, "were files read?"
    assert {str(file.relative_to(ROOT)): odd for file, odd in found.items() if odd} == {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions that were put on the terminal; each is answered "y"."""
    questions: list[str] = []

    def answer(prompt: str = "") -> str:
        questions.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return questions


def plant(folder: Path, marker: Path, **fields: object) -> None:
    """Put code into a folder that writes `marker` when it runs, and fields into its config.json."""
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').write('ran')\n"
        "from transformers import PreTrainedConfig as EvilConfig, PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_text_encoder_s_own_code_is_not_run_where_it_is_of_a_known_kind(tmp_path: Path, asked: list[str]) -> None:
    save_t5gemma(tmp_path, 32)
    plant(tmp_path, tmp_path / "ran", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"})
    tower = T5GemmaTower(str(tmp_path), max_tokens=12, dtype=torch.float32)
    assert tower.encode(["a red circle"])[0].isfinite().all()
    assert not (tmp_path / "ran").exists()
    assert asked == []


def test_a_text_encoder_that_needs_its_own_code_is_refused_in_a_sentence(tmp_path: Path, asked: list[str]) -> None:
    save_t5gemma(tmp_path, 32)
    plant(tmp_path, tmp_path / "ran", auto_map={"AutoConfig": "evil.EvilConfig"}, model_type="evil")
    with pytest.raises(ValueError, match=r"needs code of its own \(auto_map\), which is never run") as refused:
        T5GemmaTower(str(tmp_path), max_tokens=12)
    assert "trust_remote_code" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
    assert asked == []


def test_a_tokenizer_s_own_code_is_not_run(tmp_path: Path, asked: list[str]) -> None:
    save_t5gemma(tmp_path, 32)
    plant(tmp_path, tmp_path / "ran")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(ValueError):  # transformers may know a class of its own for the file, or may not
        load_tokenizer(str(tmp_path), local_files_only=True)
    assert not (tmp_path / "ran").exists()
    assert asked == []


def test_a_config_that_names_a_kernel_of_the_hub_gets_the_usual_attention(tmp_path: Path) -> None:
    save_t5gemma(tmp_path, 32)
    plant(tmp_path, tmp_path / "ran", attn_implementation="somebody/kernel")
    tower = T5GemmaTower(str(tmp_path), max_tokens=12, dtype=torch.float32)
    kinds = {module.config._attn_implementation for module in tower.encoder.modules() if hasattr(module, "config")}
    assert kinds == {"eager"}


def test_a_text_encoder_s_pickle_is_not_read(tmp_path: Path) -> None:
    save_t5gemma(tmp_path, 32)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="T5Gemma could not be loaded from the folder"):
        T5GemmaTower(str(tmp_path), max_tokens=12)
