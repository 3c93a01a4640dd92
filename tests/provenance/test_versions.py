"""Whoever reads a result can install what made it."""

import pytest

from llava_cmoe.provenance import versions


def test_versions_name_what_is_installed():
    found = versions.versions()
    assert set(found) == {"python", *versions.PACKAGES}
    assert {name for name, value in found.items() if not value[0].isdigit()} <= {"torchvision"}  # which nobody needs


def test_a_package_that_is_absent_is_said_to_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "PACKAGES", ("no-such-package",))
    assert versions.versions()["no-such-package"] == "not installed"


def test_a_record_of_older_or_fewer_packages_is_told_apart():
    here = versions.versions()
    assert versions.installed({"torch": here["torch"]})
    assert not versions.installed(here | {"torch": "0.1"})
    assert not versions.installed({"gone": "1"})
