"""The whole loop once, through the doors that a user has: Airflow's REST API and the prediction server."""
