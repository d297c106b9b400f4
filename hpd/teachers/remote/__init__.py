"""Both ends of a teacher behind HTTP: the client in training, and `hpd serve-teacher`."""
