"""Evaluation: the quality and the cost of a model, dense or recovered.

Takes a model, its tokenizer and held-out text or questions; returns perplexities, continuations,
zero-shot scores, counts of parameters and operations, and times. No model is changed.
"""
