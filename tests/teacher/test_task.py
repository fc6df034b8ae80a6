"""Tasks are found by name and by file."""

import pytest

from moodistill.errors import UserError
from moodistill.teacher.task import Task, load_task


def test_unknown_task_and_bad_problem_files(tmp_path):
    with pytest.raises(UserError, match="unknown model 'vgg17'; expected one of .*vgg16"):
        load_task("vgg17")
    with pytest.raises(UserError, match="does not exist"):
        load_task(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no TASK"):
        load_task(str(tmp_path / "mine.py"))
    (tmp_path / "own.py").write_text(
        "from problems.digits import TASK as OTHER\nfrom dataclasses import replace\n"
        "TASK = replace(OTHER, name='own')\n"
    )
    assert isinstance(load_task(str(tmp_path / "own.py")), Task)
