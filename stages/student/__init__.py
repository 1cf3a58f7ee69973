"""All those tables -> a student, trained and measured; no engine is ever imported."""
