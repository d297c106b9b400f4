"""The parts of scripts/gpu_evidence.py."""
