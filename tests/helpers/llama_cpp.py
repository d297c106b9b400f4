"""Run by tests/engines/test_gguf.py in a process of its own: llama.cpp's server, out of the wheel xllamacpp.

Usage: llama_cpp.py PORT GGUF [ADAPTER]. It prints its address when it listens, and ends with its input.
"""

from __future__ import annotations

import sys

import xllamacpp  # pyright: ignore[reportMissingImports]


def main(port: str, model: str, *adapters: str) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.port = int(port)
    parameters.n_ctx = 512
    parameters.cpuparams.n_threads = 1
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
