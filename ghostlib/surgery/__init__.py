"""Surgery: remove layers, and install operators as modules or in existing weights.

From the dense model and solved operators to an ordinary `PreTrainedModel` that shares the dense
model's weights, generates with its cache, and is saved and loaded like any other.
"""
