"""A run from start to finish: search, finalists, the written front; resume, export, clean.

Puts the rooms below together and holds the order of the stages: `run` starts and resumes,
`finish` makes finalists, `rows` writes the front, `backend` chooses this process or a cluster,
`compatibility` refuses what cannot be resumed, `export` writes one student.

May know: every room below; no command line.
Begin with `run.start_run`.
"""
