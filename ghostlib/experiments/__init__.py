"""Experiments: a specification, a runner of independent cells that resumes, and tables.

In comes a `Specification`; one JSON line for each finished cell goes to a file that any number of
processes share; out come data frames and text.
"""
