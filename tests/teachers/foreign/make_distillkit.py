"""Makes distillkit.json with DistillKit's own compressor (arcee-ai/DistillKit, commit a61c2e7):

    PYTHONPATH=DistillKit python tests/teachers/foreign/make_distillkit.py

Each entry: a configuration, what its compressor makes of the same 5 places of 61 tokens, and what its reader
makes of that again.
"""

import itertools
import json
from pathlib import Path

import torch

BINS = ([], [("float16", 8, 3), ("float32", 3, 4)], [("bfloat16", 1, 8)])


def main() -> None:
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    torch.manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(1, 5, 61) * 3, -1)
    choices = itertools.product(
        ("float32", "bfloat16", "float16"),
        (True, False),
        (True, False),
        ([], [0, 1, 2, "sqrt"]),
        BINS,
        (3, 12),
    )
    found = []
    for exact, delta, normalized, terms, bins, exact_k in choices:
        if exact_k < 12 and not terms and not bins:
            continue
        if (exact_k == 12 and (terms or bins)) or (normalized and not terms):
            continue
        named = ("scale_dtype", "element_bits", "num_elements")
        config = {
            "d": 61,
            "k": 12,
            "exact_k": exact_k,
            "exact_dtype": exact,
            "polynomial_terms": terms,
            "term_dtype": "bfloat16" if exact == "float16" else "float32",
            "residual_bins": [dict(zip(named, one, strict=True)) for one in bins],
            "delta_encoding": delta,
            "normalize_t": normalized,
        }
        compressor = LogprobCompressor(config=DistributionQuantizationConfig.model_validate(config))
        row = compressor.compress(logprobs)
        tokens, values = compressor.decompress_to_sparse(row)
        found.append(
            {
                "config": config,
                "compressed_logprobs": row["compressed_logprobs"][0].tolist(),
                "bytepacked_indices": row["bytepacked_indices"][0].tolist(),
                "tokens": tokens[0].tolist(),
                "dtype": str(values.dtype).removeprefix("torch."),
                "values": values[0].double().tolist(),
            }
        )
    Path(__file__).with_name("distillkit.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
