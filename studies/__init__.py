"""Studies of questions that the published work leaves open: one program for each question."""
