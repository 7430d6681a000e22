"""Alembic's entry point: runs the migrations of the predictions database on the connection that the caller opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
