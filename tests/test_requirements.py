"""The environment is the one that requirements.txt pins."""

import importlib.metadata
import re
import tomllib

from conftest import ROOT


def normalize(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lines():
    return [line for path in ("requirements.txt", "tests/requirements.txt") for line in (ROOT / path).read_text().splitlines()]


def read_pins():
    lines = read_lines()
    return {normalize(line.split("==")[0]): line.split("==")[1] for line in lines if line and not line.startswith("#")}


def test_every_line_is_a_pin_and_nothing_else():
    for line in read_lines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+!]+", line), line
        assert "://" not in line


def test_every_direct_dependency_is_pinned():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = read_pins()
    for dependency in dependencies:
        name, _, version = dependency.partition("==")
        assert normalize(name) in pins, name
        assert not version or pins[normalize(name)] == version, name


def test_the_installed_versions_are_the_pinned_ones():
    installed = {name: importlib.metadata.version(name) for name in read_pins()}
    assert {name: version.split("+")[0] for name, version in installed.items()} == read_pins()
