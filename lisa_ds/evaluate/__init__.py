"""Measures an exported model or adapter.

``subject`` says which model that is, what its run was, and loads it; ``loss`` is its exact held-out loss; ``harness`` runs
tasks of lm-evaluation-harness, of which those in ``tasks/`` are our own and read local files (``rows``); ``answers`` has it
answer the questions of a benchmark for a judge; ``samples`` puts its answers beside those of the model it was trained
from; ``results`` writes what was measured as records.
"""
