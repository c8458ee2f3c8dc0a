"""Evaluation: what a model, dense or recovered, is worth and what it costs.

In come a model, its tokenizer and held-out text or questions; out come perplexities, continuations,
zero-shot scores, counts of parameters and operations, and times. Nothing here changes a model.
"""
