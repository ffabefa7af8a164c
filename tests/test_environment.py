"""pyproject.toml, requirements.lock and environment.yml say the same thing."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement):
    return requirement.name.lower().replace("_", "-")


def locked():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {name_of(pin): str(pin.specifier) for pin in pins}, len(pins)


def test_the_lock_pins_every_package_once_and_exactly():
    pins, count = locked()
    assert len(pins) == count > 50
    assert all(pin.startswith("==") and "*" not in pin and "+" not in pin for pin in pins.values())


def test_the_lock_satisfies_every_range_of_pyproject():
    pins, _ = locked()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    for requirement in map(Requirement, wanted):
        version = pins[name_of(requirement)].removeprefix("==")
        assert requirement.specifier.contains(version), requirement


def test_environment_yml_repeats_the_lock_pin_by_pin():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip" and python.startswith("python=")
    assert PROJECT["requires-python"] == ">=" + python.removeprefix("python=")
    repeated = {name_of(pin): str(pin.specifier) for pin in map(Requirement, by_pip["pip"])}
    assert repeated == locked()[0]
