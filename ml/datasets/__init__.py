"""Datasets: where images come from, whether they can be used, how they are split, stored and looked at."""
