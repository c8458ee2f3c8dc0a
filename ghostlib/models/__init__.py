"""Models: where a causal language model keeps its layers, norms and projections.

In come a name, a folder or a model; out come its parts, found by structure, the streams of a pass,
and a model of fewer layers whose configuration agrees. No other room knows a path in a model.
"""
