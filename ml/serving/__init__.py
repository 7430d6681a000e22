"""Turns bytes into predictions: decoding, inference, and following the champion. Knows no HTTP and no registry."""
