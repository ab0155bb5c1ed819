"""Runs a :class:`~lisa_ds.RunConfig`: data, model, training, export and the numbers of it all.

``command`` is the command line and loads nothing heavy, ``arguments`` the ``training`` and ``deepspeed`` sections, ``run``
the run itself, ``summary`` what it says at the end.
"""
