"""Experiments: a specification, a runner of independent cells that resumes, and tables.

Takes a `Specification`; writes one JSON line for each finished cell to a file that any number of
processes share; returns data frames and text.
"""
