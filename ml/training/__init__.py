"""Training: recipes, the fit itself, and the export of what it yields."""
