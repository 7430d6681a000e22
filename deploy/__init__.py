"""What runs beside the library: the Flask server, PostgreSQL migrations, container files."""
