"""Stage ``evaluate``: students on held-out documents, episodes and pairs -> a report."""
