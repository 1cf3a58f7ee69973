"""Stage ``evaluate_preferences``: students side by side on held-out pairs -> a report."""
