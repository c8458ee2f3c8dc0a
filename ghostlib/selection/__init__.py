"""Selection: which layers to remove. A criterion is one record in one table.

From the dense model, calibration windows and the number of layers to remove to a `Selection` with
its scores.
"""
