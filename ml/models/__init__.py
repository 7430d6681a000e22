"""Models: what they are made of (`specs`) and how they are built. A model takes raw 0-255 RGB."""
