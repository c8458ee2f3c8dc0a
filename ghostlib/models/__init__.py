"""Models: the layers, norms and projections of a causal language model.

Input: a name, a folder or a model. Output: its parts, located by structure, the streams of a pass,
and a model of fewer layers with a configuration that agrees. No other room uses paths of modules.
"""
