"""README and docs: short, links that lead somewhere, commands with flags that exist."""

import dataclasses
import re
import shlex

import pytest
from conftest import ROOT

import ablate
import data
import infer
import train

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "samples" / "README.md"]
CONFIGS = {
    "data.py": data.DataConfig,
    "infer.py": infer.InferConfig,
    "train.py": train.TrainConfig,
    "ablate.py": ablate.AblateConfig,
}


def list_flags(config):
    return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)} | {
        "--no-surprisal",
        "--help",
    }


def test_the_readme_and_the_report_are_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000
    assert len((ROOT / "docs" / "ablation" / "ablation.md").read_bytes()) <= 30_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_has_flags_that_exist(page):
    for script, line in re.findall(
        r"(?m)^.*?\b(data\.py|infer\.py|train\.py|ablate\.py)\b([^\n`|;&]*)", page.read_text()
    ):
        words = shlex.split(line.split("#")[0].replace("'", ""))
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= list_flags(CONFIGS[script]), (script, line)


def test_every_flag_of_the_readme_exists():
    known = set().union(*map(list_flags, CONFIGS.values())) | {"--no-deps"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "README.md").read_text())) <= known
