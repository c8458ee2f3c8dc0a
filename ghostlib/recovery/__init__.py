"""Recovery: calibrate, solve and install in one call, sequentially, or as a recipe chooses.

Takes the dense model, calibration windows and the layers to remove; returns the repaired model,
whose ``config.recovery`` records what was done.
"""
