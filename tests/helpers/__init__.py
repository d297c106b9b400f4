"""What several tests build on: tiny models, servers, grids, faults."""
