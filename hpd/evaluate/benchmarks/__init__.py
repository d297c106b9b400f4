"""One file per family of benchmarks: how its examples are read, asked and graded."""
