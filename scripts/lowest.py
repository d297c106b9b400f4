"""A part of the tests with the lowest direct dependencies of pyproject.toml, in an environment of their own.

torch is taken from the environment that runs this: its lowest version is a download of gigabytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/config/test_config.py",
    "tests/data/test_data.py",
    "tests/losses/test_losses.py",
    "tests/training/test_trainer.py",
    "tests/test_generate.py",
]
_KEPT = ("torch",)


def lowest(requirements: list[str]) -> list[str]:
    """`name>=1.2,<2` as `name==1.2`."""
    found: dict[str, str] = {}
    for text in requirements:
        match = re.fullmatch(r"([\w.\-]+)(?:\[[\w,\-]+\])?>=([\w.]+)(?:,.*)?", text.replace(" ", ""))
        assert match, f"{text}: every dependency needs a lower bound"
        if match[1] not in _KEPT:
            found[match[1]] = max(found.get(match[1], ""), match[2], key=_key)
    return [f"{name}=={version}" for name, version in found.items()]


def _key(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def layered(folder: Path) -> str:
    """Make an environment with this one's packages behind its own on the path; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "zz_behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return str(folder / "bin" / "python")


def main(folder: str) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = lowest(
        project["dependencies"] + [r for r in project["optional-dependencies"]["dev"] if "selenium" not in r]
    )
    python = layered(ROOT / folder)
    print("\n".join(pins), flush=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins], check=True)
    return subprocess.run([python, "-m", "pytest", "-q", "-x", *TESTS], cwd=ROOT).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="Of the environment, below the repository; made where it is missing.")
    sys.exit(main(parser.parse_args().folder))
