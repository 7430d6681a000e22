"""How good a model is and whether it may take over: metrics, plots, corruptions, the gate. Pure; no TensorFlow."""
