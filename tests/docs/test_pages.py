"""The README is short and shows images first; links and named files exist; the citation is of this version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 800
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:docs|configs|scripts|tests|benchmarks|examples|hypersd_jax)/[\w./-]+)`")


def test_the_readme_is_short_and_begins_with_images() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    (image,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text.partition("\n## ")[0])
    width, height = Image.open(ROOT / image).size
    assert width < 900
    assert height < 400


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {target for target in LINK.findall(README.read_text(encoding="utf-8")) if target.startswith("docs/")}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name == "docs"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {target.partition("#")[0] for target in LINK.findall(text) if "://" not in target}
    missing = [target for target in links if target and not (page.parent / target).exists()]
    missing += [target for target in FILE.findall(text) if not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_lines_fit(page: Path) -> None:
    """Tables and blocks of code, which cannot be broken, may be wider."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]
    assert not wide


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
