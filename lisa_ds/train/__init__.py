"""Runs a :class:`~lisa_ds.RunConfig`: data, model, training, export and a summary.

``command`` is the command line and loads nothing heavy, ``arguments`` turns the ``training`` and ``deepspeed`` sections
into transformers' arguments, ``checks`` refuses a run before data is read (with ``packages``, ``effects``,
``preflight``), ``fit`` compares model and data, ``run`` is the run itself, ``summary`` its report at the end.
"""
