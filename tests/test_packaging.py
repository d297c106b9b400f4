"""What a wheel holds: the package with its data files, under the distribution's own name."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # setuptools leaves build/ behind where it builds, and takes what an earlier build left there.
    for name in ("pyproject.toml", "README.md", "LICENSE", "hpd"):
        (source / name).symlink_to(ROOT / name)
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as archive:
        yield archive


def test_a_wheel_holds_every_file_of_the_package(wheel):
    files = subprocess.run(
        ["git", "ls-files", "hpd"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(files) > 150
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert set(files) - {name for name in files if name.endswith("README.md")} <= held
    assert all(name.startswith("hpd/") for name in held)


def test_the_distribution_has_a_name_of_its_own(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_string(wheel.read(name).decode())
    assert metadata["Name"] == "hybrid-policy-distillation"
    assert "vllm" in metadata.get_all("Provides-Extra")
    entries = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "hpd = hpd.cli:main" in wheel.read(entries).decode()


def test_every_page_and_message_names_the_distribution_in_its_extras():
    """On the index `hpd` is another project's, so its extras must not be asked of it."""
    shown = ["README.md", "CONTRIBUTING.md", *map(str, ROOT.glob("docs/**/*.md"))]
    shown += [str(path) for name in ("hpd", "recipes", "experiments") for path in ROOT.glob(f"{name}/**/*")]
    wrong = [
        path
        for path in shown
        if (ROOT / path).suffix in (".py", ".md", ".yaml") and "hpd[" in (ROOT / path).read_text("utf-8")
    ]
    assert wrong == []
