"""Experiments: grids of runs under one budget, statistics over seeds, reports. Every run is a run folder."""
