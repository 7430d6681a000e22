"""The prediction server: HTTP over `ml.serving`. `wsgi.py` composes it; everything else is handed what it needs."""
