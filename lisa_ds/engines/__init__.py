"""Engines: the only packages that use the private names of a training framework."""
