"""One short module per search task; `TASK` is what moodistill loads."""
