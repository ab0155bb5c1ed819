"""Runs a :class:`~lisa_ds.RunConfig`: data, model, training, export and the numbers of it all.

``command`` is the command line and loads nothing heavy, ``arguments`` the ``training`` and ``deepspeed`` sections, ``checks``
all that is asked before data is read (``packages``, ``effects``, ``preflight``), ``fit`` model and data held against each other,
``run`` the run itself, ``summary`` what it says at the end.
"""
