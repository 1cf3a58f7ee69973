"""Where and when: recipes, fingerprints, plans, executors and the command line."""
