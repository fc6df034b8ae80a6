"""A run from start to finish: search, finalists, the written front; resume, export, clean.

Puts the rooms below together and holds the order of the stages: `run` starts and resumes,
`session` is what the stages share, `search` searches, `finish` makes finalists, `results` and
`rows` write the front, `backend` chooses this process or a cluster, `compatibility` refuses what
cannot be resumed, `export` writes one student.

May know: every room below; no command line.
Begin with `run.execute`.
"""
