"""Compares variants of one run: the same rows in the same order, learning rates searched by one rule, a verdict on other rows.

``arms`` says which variants there are, ``rates`` which learning rates each of them tries, ``protocol`` which runs may start next,
``request`` is all that was asked for, ``rehearsal`` refuses what cannot run before anything does, ``campaign`` starts the runs
(``process`` is one of them, ``pace`` how long they take), ``results`` reads what they wrote, and ``collect`` gathers it in one file.
"""
