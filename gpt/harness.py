"""Tasks of lm-evaluation-harness, read from local files (extra `eval`)."""

from pathlib import Path
from typing import Any

ROWS_PER_FORWARD = 8


def evaluate_with_harness(model: Any, tokenizer: Any, tasks: Path) -> dict[str, Any]:
    """What the harness finds for a task file of its own, or for all in a folder: its `results`, `n-shot`, `n-samples`.

    Its built-in tasks are not offered, since their data would come from the hub.

    Raises:
        FileNotFoundError, ValueError: the harness is not installed, there is no such file, or it refuses the tasks.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--lm-eval needs lm-evaluation-harness, but {error.name} is not installed: install the extra eval"
        ) from None
    if not tasks.exists():
        raise FileNotFoundError(
            f"{tasks} does not exist: give a task file of lm-evaluation-harness or a folder of them"
        )
    folder = tasks if tasks.is_dir() else tasks.parent
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        names = manager.all_subtasks if tasks.is_dir() else [str(tasks)]
        loaded = list(manager.load(names)["tasks"].values())
    except Exception as error:  # of every kind, as the tasks' YAML and the readers of their data happen to raise it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"lm-evaluation-harness cannot load the tasks of {tasks} ({reason})") from error
    if not loaded:
        raise ValueError(f"{tasks} holds no task of lm-evaluation-harness: a YAML file with the key task")
    runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=ROWS_PER_FORWARD)
    try:
        found = lm_eval.simple_evaluate(model=runner, tasks=loaded, task_manager=manager, log_samples=False)
    except Exception as error:  # a later document may lack what the first one has
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"lm-evaluation-harness cannot evaluate the tasks of {tasks} ({reason})") from error
    assert found is not None, "None comes on ranks above 0 only"
    kept = {name: found[name] for name in ("results", "n-shot", "n-samples") if name in found}
    return {"lm_eval": lm_eval.__version__, **kept}
