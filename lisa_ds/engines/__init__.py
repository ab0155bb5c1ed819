"""Engines: the only rooms that know the private names of a training framework."""
