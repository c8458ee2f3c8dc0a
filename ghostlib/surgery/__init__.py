"""Surgery: remove layers, and put operators in modules at the boundary or into existing weights.

In come the dense model and solved operators; out comes an ordinary `PreTrainedModel` that shares
the dense model's weights, generates with its cache, and is saved and loaded like any other.
"""
