"""The work: one stage a file, its maths as pure functions, and what the stages share."""
