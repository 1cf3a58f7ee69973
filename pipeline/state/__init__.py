"""What lies in a step's folder."""
