"""One HTML file of a run, made to be looked at."""
