"""Programs for the maintainers; no part of what is installed."""
