"""`trainyard verify`: which kind of folder this is, and that kind's full check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]


def verify(place: Path | str, progress: Progress | None = None) -> dict[str, Any]:
    """Read everything in a folder that Trainyard wrote and compare it with the checksums.

    Args:
        place: folder or URL of prepared data or one split of it; folder of a checkpoint, a run (all its checkpoints)
            or an export.
        progress: called with (bytes done, bytes in all).

    Returns:
        ``kind``, and what was found whole.

    Raises:
        FileNotFoundError, ValueError: no such folder, none of these kinds, or the first damaged file and its block.
    """
    from data_pipeline.remote_blocks import is_url
    from data_pipeline.verify import holds_prepared_data, verify_data

    if is_url(place):
        return verify_data(place, progress)
    directory = Path(place)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    if holds_prepared_data(directory):
        return verify_data(directory, progress)
    if (directory / "checksums.json").is_file():
        return {"kind": "export", "files": _verify_export(directory, progress)}
    if (directory / "checkpoints").is_dir():
        return {"kind": "run", "checkpoints": _verify_run(directory, progress)}
    if any(directory.glob("rank_*.safetensors")) or (directory / "manifest.json").is_file():
        from gpt.checkpoint.read import CheckpointReader

        reader = CheckpointReader(directory)
        reader.verify(progress)
        return {"kind": "checkpoint", "files": len(reader.manifest.files)}
    raise ValueError(f"{directory} is neither prepared data nor a checkpoint, a run or an export: nothing to verify")


def _verify_run(run: Path, progress: Progress | None) -> list[int]:
    """Check all checkpoints, also behind a damaged one; their steps."""
    from gpt.checkpoint.format import checkpoint_directory, list_step_folders
    from gpt.checkpoint.read import CheckpointReader

    steps = list_step_folders(run)
    if not steps:
        raise ValueError(f"{run} is a run without a committed checkpoint: there is nothing to verify")
    folders = {step: checkpoint_directory(run, step) for step in steps}
    sizes = {step: sum(file.stat().st_size for file in folder.iterdir()) for step, folder in folders.items()}
    damages: dict[int, str] = {}
    for index, step in enumerate(steps):
        try:
            CheckpointReader(folders[step]).verify()
        except (ValueError, OSError) as error:
            damages[step] = str(error)
        if progress is not None:
            progress(sum(sizes[done] for done in steps[: index + 1]), sum(sizes.values()))
    if damages:
        whole = [step for step in steps if step not in damages]
        raise ValueError(
            f"{len(damages)} of {len(steps)} checkpoints cannot be loaded: {' '.join(damages.values())} "
            + (f"Whole are those of steps {', '.join(map(str, whole))}." if whole else "None is whole.")
        )
    return steps


def _verify_export(directory: Path, progress: Progress | None) -> int:
    from gpt.checkpoint.files import VerifiedFile
    from gpt.checkpoint.format import FileEntry

    path = directory / "checksums.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = {name: FileEntry.model_validate(entry) for name, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: export the run again into another folder") from None
    unlisted = sorted({file.name for file in directory.glob("*.safetensors")} - entries.keys())
    if unlisted or not entries:
        raise ValueError(
            f"{path} has no checksum of {', '.join(unlisted) or 'any file'}: export the run again into another folder"
        )
    done = 0
    for name, entry in entries.items():
        VerifiedFile(directory / name, entry).verify()
        done += entry.size_bytes
        if progress is not None:
            progress(done, sum(entry.size_bytes for entry in entries.values()))
    return len(entries)
