"""How good a model is and whether it may take over: metrics, robustness, plots, the gate. Pure; no TensorFlow."""
