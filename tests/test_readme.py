"""What README.md and docs/ say of the code must be so."""

import dataclasses
import importlib
import re

from conftest import ROOT
import pytest

import evaluate
from support import cli

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NAMES = re.findall(r"`((?:prompts|data|model|train|metrics|evaluate)\.(?!py|jsonl)\w+)", "".join(PAGES.values()))
COMMANDS = re.findall(
    r"python (?:-m )?(train|evaluate|tiny|analysis\.\w+)(?:\.py)?([^\n#`(]*(?:\\\n.*)*)",
    "\n".join([*PAGES.values(), (ROOT / "Makefile").read_text()]),
)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_every_function_the_pages_name_exists(name):
    module, attribute = name.split(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("page, number", [("README.md", 1), ("scores.md", 5)])
def test_the_papers_rows_in_the_pages_are_those_the_code_compares_with(page, number):
    rows = re.findall(r"^\| paper, (unmodified model|LoRA, epoch (\d)) \| (.*) \|$", PAGES[page], re.MULTILINE)
    typed = {
        f"lora, epoch {epoch}" if epoch else "unmodified": tuple(map(float, cells.split("|")))
        for _, epoch, cells in rows
    }
    assert len(typed) == number and typed == {key: evaluate.PAPER[key] for key in typed}


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_every_flag_the_pages_show_is_one_of_the_script(script):
    known = {cli.flag(field.name) for field in dataclasses.fields(importlib.import_module(script).Settings)}
    shown = {flag for name, rest in COMMANDS if name == script for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", rest)}
    assert shown <= known


def test_the_pages_show_every_command_and_the_files_they_link_to_exist():
    files = (ROOT / "analysis").glob("[a-z]*.py")
    analysis = {f"analysis.{path.stem}" for path in files if "\ndef main" in path.read_text()}
    assert {script for script, _ in COMMANDS} == {"train", "evaluate", "tiny", *analysis}
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
            assert (folder / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("recipe", ["speech_detection", "gold_transcripts", "sign_language"])
def test_every_flag_that_a_recipes_section_shows_is_one_of_its_script(recipe):
    source = (ROOT / "recipes" / f"{recipe}.py").read_text()
    sections = re.split(r"^## ", (ROOT / "recipes" / "README.md").read_text(), flags=re.MULTILINE)
    (section,) = (section for section in sections if section.startswith(f"{recipe}.py"))
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", section))
    fields = {cli.flag(name) for name in re.findall(r"^    (\w+): ", source, flags=re.MULTILINE)}
    assert len(flags) > 5 and flags <= fields


def test_ruff_has_one_version_before_a_commit_and_in_the_check():
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "tests" / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
