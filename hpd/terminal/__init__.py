"""Everything that prints. With `hpd.cli`, the only place that knows about terminals."""
