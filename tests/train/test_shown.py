"""Secrets and terminal: passwords and signatures of addresses stand nowhere, and nobody's data steer a terminal."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.commands import TINY, run_program
from train import shown
from train.commandline import parse, precompute_command
from train.data.formats.storage import Storage, expand
from train.data.index import open_images
from train.errors import UserError
from train.recipes import Recipe
from train.run.folder import check_same_data, check_same_run, read_config, write_config

SECRETS = ("PASSWORD", "SIGNATURE")
SIGNED = "http://user:PASSWORD@127.0.0.1:9/shard-{0..1}.tar?X-Amz-Signature=SIGNATURE&x=1"
SHOWN = "http://127.0.0.1:9/shard-{0..1}.tar"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (SIGNED, SHOWN),
        ("https://host/a.tar", "https://host/a.tar"),
        ("https://host:8080/a.tar#SIGNATURE", "https://host:8080/a.tar"),
        ("HTTPS://PASSWORD@host/a.tar", "HTTPS://host/a.tar"),
        ("https://user:PASS/WORD@host/a", "https://host/a"),
        ("https://user:PASS?WORD@host/a?SIGNATURE", "https://host/a"),
        ("https://user:PASSWORD@PASSWORD@host/a", "https://host/a"),
        ("https://host/@scope/a.tar", "https://host/@scope/a.tar"),
        ("s3://KEY:PASSWORD@bucket/a", "s3://bucket/a"),
        ("http:/u:PASSWORD@host/a", "http:/host/a"),
        ("https://host/a?SIGNATURE could not be read", "https://host/a could not be read"),
        ("(https://u:PASSWORD@host/a?SIGNATURE); https://host/b?SIGNATURE, c", "(https://host/a); https://host/b, c"),
        ("{'path': 'https://h/a?SIGNATURE'}", "{'path': 'https://h/a'}"),
        ("/data/what?/a b@c.tar", "/data/what?/a b@c.tar"),
        ("mail me@home: 3 of 5", "mail me@home: 3 of 5"),
    ],
)
def test_an_address_is_shown_without_password_and_signature(given: str, wanted: str) -> None:
    assert shown.address(given) == wanted


def recipe_of(*words: str) -> Recipe:
    recipe = parse(["prx-512", "--data.path", SIGNED, "--data.tries", "1", "--data.timeout", "0.1", *words]).recipe
    assert isinstance(recipe, Recipe)
    return recipe


def told(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


FAST = Storage(timeout=0.1, tries=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: open_images(SIGNED, storage=FAST),
        lambda: open_images(SIGNED.replace(".tar", ".parquet"), storage=FAST),
        lambda: open_images(SIGNED.replace("{0..1}", "0"), storage=FAST),
        lambda: open_images(SIGNED.replace(".tar", ".zip"), storage=FAST),
        lambda: open_images(SIGNED.replace("{0..1}", "{5..1}"), storage=FAST),
        lambda: open_images(SIGNED.replace("{0..1}", "{x}"), storage=FAST),
        lambda: open_images(SIGNED.replace("{0..1}", "{0..99999999999}"), storage=FAST),
        lambda: open_images(SIGNED.replace("http:", "HTTP:"), storage=FAST),
        lambda: open_images(SIGNED.replace("http:", "s3:"), storage=FAST),
        lambda: open_images(SIGNED.replace("user:PASSWORD", "user:PASS{WORD}PASSWORD"), storage=FAST),
        lambda: open_images(SIGNED.replace("127.0.0.1:9", "[::1"), storage=FAST),
        lambda: FAST.read(SIGNED, 0, 10),
        lambda: FAST.open(SIGNED),
        lambda: check_same_data(Path("run"), SIGNED, "a", "b"),
    ],
)
def test_no_message_about_an_address_holds_its_secrets(call: Callable[[], object]) -> None:
    message = told(call)
    assert not [secret for secret in SECRETS if secret in message], message


def test_braces_of_a_signature_or_a_password_are_no_pattern() -> None:
    assert expand("https://u:{a}@h/x-{0..1}.tar?sig={z}") == [
        "https://u:{a}@h/x-0.tar?sig={z}",
        "https://u:{a}@h/x-1.tar?sig={z}",
    ]
    assert expand("what?-{a,b}.tar") == ["what?-a.tar", "what?-b.tar"]


def test_a_run_s_config_keeps_no_secret_and_is_read_back(tmp_path: Path) -> None:
    recipe = recipe_of("--repa.weights", "https://u:PASSWORD@h/w?SIGNATURE", "--text.name", "https://u:PASSWORD@h/t")
    write_config(tmp_path, recipe)
    text = (tmp_path / "config.json").read_text()
    assert not [secret for secret in SECRETS if secret in text]
    assert read_config(tmp_path).data.path == SHOWN
    check_same_run(tmp_path, recipe)  # the same command goes on
    other = recipe_of("--repa.weights", "https://u:PASSWORD@h/other?SIGNATURE")
    difference = told(lambda: check_same_run(tmp_path, other))
    assert "repa.weights 'https://h/w' -> 'https://h/other'" in difference
    assert not [secret for secret in SECRETS if secret in difference]
    assert "PASSWORD" not in precompute_command(recipe)


@pytest.mark.parametrize("program", ["speedrun", "doctor"])
def test_dry_run_and_doctor_show_no_secret(program: str) -> None:
    words = ["--data.path", SIGNED, "--data.tries", "1", "--data.timeout", "0.1", "--text.kind", "bytes"]
    done = run_program(program, "pictograms", *TINY, *words, "--dry-run")
    assert "127.0.0.1:9" in done.stdout + done.stderr
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]


def test_a_run_that_cannot_read_its_address_tells_no_secret_and_keeps_none(tmp_path: Path) -> None:
    words = ["--data.path", SIGNED, "--data.tries", "1", "--data.timeout", "0.1", "--output.folder", str(tmp_path)]
    done = run_program("speedrun", "pictograms", *TINY, *words)
    assert done.returncode == 2
    assert "127.0.0.1:9" in done.stderr
    kept = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr + kept]


# --- terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a red circle, größer, 圆", "a red circle, größer, 圆"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\x9b31m", r"\x9b31m"),
        ("evil\u202etxt.exe", r"evil\u202etxt.exe"),
        ("file\udcff.png", r"file\udcff.png"),
        ("two\nlines", r"two\nlines"),
    ],
)
def test_what_a_terminal_obeys_is_printed_as_an_escape(given: str, wanted: str) -> None:
    assert shown.printable(given) == wanted
    out = io.StringIO()
    shown.tell(given, file=out)
    assert out.getvalue() == f"{wanted}\n"
    wanted.encode()


def test_escape_codes_in_data_reach_no_terminal_through_a_message(tmp_path: Path) -> None:
    from tests.train.data.picture_files import write_parquet

    write_parquet(tmp_path / "a.parquet", 8, key=["\x1b[31mred\x1b]0;owned\x07"] * 8, image=[b"no picture"] * 8)
    words = ["--data.path", str(tmp_path), "--data.style-column=", "--data.image-column", "image"]
    for program in ("speedrun", "doctor"):
        done = run_program(program, "pictograms", *TINY, *words, "--output.folder", str(tmp_path / "runs"))
        assert done.returncode != 0
        assert "\x1b" not in done.stdout + done.stderr
    assert "\\x1b[31mred" in json.dumps(done.stdout) or "cannot be read" in done.stdout
