"""Tables and figures of a comparison, from its records alone: ``read``, ``table`` and ``figures``."""
