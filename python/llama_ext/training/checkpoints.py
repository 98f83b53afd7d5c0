"""Checkpoints of a training run: directories that are whole or absent, from which a run goes on bit for bit.

A checkpoint is `step-00000010/` in the run's folder: the weights as `Weights.save` writes them (of a model: a directory that
`from_pretrained` loads), `training.safetensors` with the optimiser's moments and the history, `training.json` with the rest. There is
no state of a random generator: every draw is a function of the seed and the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.errors import CheckpointError, FormatError, LimitError, OptionError
from llama_ext.io.atomic import atomic_write, exchange, folder_for, sync_folder
from llama_ext.io.checkpoint import TensorSource, write_safetensors
from llama_ext.io.folder_lock import held_by_this_process
from llama_ext.io.json_file import read_json_object
from llama_ext.io.safetensors_file import SafetensorsFile
from llama_ext.training.driver import Trainer, Weights
from llama_ext.training.json_numbers import packed, unpacked

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Arrays",
    "Checkpoint",
    "check_same",
    "check_whole",
    "checkpoint_path",
    "find_checkpoint",
    "finish_checkpoint",
    "has_checkpoints",
    "load_checkpoint",
    "locked",
    "of_other_runs",
    "restore",
    "save_best",
    "save_checkpoint",
    "tables",
]

# Tables that would be too long for JSON, by name.
Arrays = Mapping[str, npt.NDArray[np.float64]]

_STATE_FILE = "training.json"
_MOMENTS_FILE = "training.safetensors"
_FORMAT = 2
_ARRAY = "array/"
# Bytes of a file that are read at a time.
_BLOCK = 1 << 22
_NAME = re.compile(r"(step|best)-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step|best)-\d{8,}\.[0-9a-f]{16}\.tmp")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What training.json says.

    Attributes:
        path: The directory.
        step: Steps of the run that are done.
        optimizer_steps: Steps of the optimiser, fewer where outliers were skipped.
        run: Tells this run from others; a resumed run keeps it.
        settings: What has to be the same for the run to go on, by topic.
        state: The rest: history, callbacks.
        crc32: Of the other files, by name, as eight hexadecimal digits.
    """

    path: Path
    step: int
    optimizer_steps: int
    run: str
    settings: dict[str, Any]
    state: dict[str, Any]
    crc32: dict[str, str]


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block of code that alone saves into a folder, which is made for it, and goes again where nothing was saved.

    A kill ends the lock. Where the system or the file system has none (Windows, some network file systems), there is none.

    Raises:
        OptionError: Another run has it.
        OSError: The folder cannot be made.
    """
    with folder_for(folder):
        if sys.platform == "win32":
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OptionError(
                    f"checkpoint_dir {folder}: another run is saving there now. Wait for its end, or name another directory"
                ) from None
            except OSError:
                pass
            with held_by_this_process(descriptor):
                yield
        finally:
            # Not by closing alone: a process that was forked meanwhile has it open, too.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


# -- writing ----------------------------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where `save_checkpoint` puts a step."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    trainer: Trainer,
    weights: Weights,
    *,
    step: int,
    run: str,
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    arrays: Arrays,
    keep_last: int,
) -> Path:
    """Writes a checkpoint, and removes the run's own before the last `keep_last` up to this step.

    Everything goes into a temporary directory beside it, is synced and renamed in one step: a kill at any moment leaves every
    older checkpoint as it was, and the new one whole or not at all. One of this step that is there already, because the run
    went back to before it, is exchanged for it: it may be damaged, which can be why. Those of later steps stay, and so do those of
    other runs and those that cannot be read. The one that a run has just gone on from is for `finish_checkpoint`: there may be
    no older one.

    Returns:
        Its directory.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    _remove_leftovers(folder)
    with _whole_directory(path) as temporary:
        weights.save(temporary)
        write_safetensors(temporary / _MOMENTS_FILE, [*_moments(trainer), *_tables(arrays)], {"format": "llama_ext"})
        _write_state(
            Checkpoint(temporary, step, trainer.steps, run, dict(settings), dict(state), _checksums(temporary))
        )
    _remove_old(folder, run, step, keep_last)
    return path


def finish_checkpoint(checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Gives a checkpoint another state, where nothing but that has changed: what its run had left undone after the step is done.

    training.json alone is replaced, in one step: weights and moments are never without it, nor it without them.

    Raises:
        OSError: It cannot be written.
    """
    _write_state(dataclasses.replace(checkpoint, state=dict(state)))


def save_best(folder: Path, weights: Weights, step: int) -> Path:
    """Writes the weights alone, as `best-00000010/`, and removes the one before; as `save_checkpoint`, whole or not at all.

    One of this step that is there already is replaced: nothing says of which run it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"best-{step:08d}"
    with _whole_directory(path) as temporary:
        weights.save(temporary)
    for _, old in _checkpoints(folder, "best"):
        if old != path:
            _remove_directory(old)
    return path


def _write_state(checkpoint: Checkpoint) -> None:
    values = {name: value for name, value in vars(checkpoint).items() if name != "path"}
    text = json.dumps({"format": _FORMAT, **values, "state": packed(checkpoint.state)}, allow_nan=False, sort_keys=True)
    with atomic_write(checkpoint.path / _STATE_FILE) as file:
        file.write((text + "\n").encode("utf-8"))


def _checksums(folder: Path) -> dict[str, str]:
    """Of all files but the one that says them."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != _STATE_FILE and path.is_file():
            value = 0
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    value = zlib.crc32(block, value)
            found[path.name] = f"{value:08x}"
    return found


def _moments(trainer: Trainer) -> Iterator[TensorSource]:
    for slot, shape in trainer.parameters():
        for name in trainer.moments(slot):
            yield f"{name}/{slot}", "float32", shape, _moment(trainer, name, slot)


def _tables(arrays: Arrays) -> Iterator[TensorSource]:
    for name, array in arrays.items():
        yield _ARRAY + name, "float64", array.shape, _constant(array)


def _constant(array: npt.NDArray[np.float64]) -> Any:
    return lambda: [np.ascontiguousarray(array)]


def _moment(trainer: Trainer, name: str, slot: str) -> Any:
    return lambda: [trainer.read_moment(name, slot)]


@contextlib.contextmanager
def _whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends, or goes when it raises."""
    temporary, replaced = _leftover(path), _leftover(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        # A directory cannot be renamed over another one.
        if not (path.exists() and exchange(temporary, path)):
            if path.exists():
                # A file system without exchange: a kill right here leaves neither of the two, and the older ones.
                os.rename(path, replaced)
            os.rename(temporary, path)
    except BaseException:
        if replaced.exists() and not path.exists():
            with contextlib.suppress(OSError):
                os.rename(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    for old in (temporary, replaced):
        shutil.rmtree(old, ignore_errors=True)


def _leftover(path: Path) -> Path:
    """A name beside a checkpoint's that the next save removes, if this process cannot."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _remove_directory(path: Path) -> None:
    """Under another name first, so that a kill never leaves half of a checkpoint that looks like one."""
    doomed = _leftover(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_old(folder: Path, run: str, step: int, keep_last: int) -> None:
    """Removes a run's checkpoints up to a step, but for the last ones."""
    found = [path for done, path in _checkpoints(folder) if done <= step]
    if len(found) > keep_last:
        for old in [path for path in found if _run_of(path) == run][:-keep_last]:
            _remove_directory(old)


def _remove_leftovers(folder: Path) -> None:
    for name in os.listdir(folder):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(folder / name, ignore_errors=True)


def _run_of(path: Path) -> str | None:
    """The run that a checkpoint is of; None where that cannot be read."""
    try:
        return _read_state(path).run
    except (FormatError, LimitError):
        return None


# -- finding and reading ----------------------------------------------------------------------------------------------


def _checkpoints(folder: Path, kind: str = "step") -> list[tuple[int, Path]]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            match = _NAME.fullmatch(name)
            if match and match[1] == kind and (folder / name).is_dir():
                found.append((int(match[2]), folder / name))
    return sorted(found)


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has left checkpoints in a folder."""
    return bool(_checkpoints(folder))


def of_other_runs(folder: Path, run: str, *, unreadable: bool) -> list[Path]:
    """The checkpoints in a folder that are not of a run.

    Args:
        folder: It need not exist.
        run: As in `Checkpoint`.
        unreadable: Whether those count whose run cannot be read.
    """
    found = [(path, _run_of(path)) for _, path in _checkpoints(folder)]
    return [path for path, name in found if name != run and (unreadable or name is not None)]


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the last one in it; None when there is none.

    Raises:
        FormatError: It is a file.
    """
    if path.is_file():
        raise FormatError("expected a checkpoint, or a folder of checkpoints, found a file.", path=str(path))
    if (path / _STATE_FILE).is_file():
        return path
    found = _checkpoints(path)
    return found[-1][1] if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads what a checkpoint says of its run; the tensors are for `restore`.

    Raises:
        CheckpointError: There is no checkpoint, or it is malformed.
        FormatError, LimitError: It is no JSON, or too large.
    """
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(
            "there is no checkpoint here: expected step-..., as `fit` with checkpoint_dir writes them.", path=str(path)
        )
    return _read_state(found)


def _read_state(path: Path) -> Checkpoint:
    file = path / _STATE_FILE
    # A history grows by a line a step.
    values = read_json_object(file, what="the state of a training run", limit="tokenizer_json_bytes")
    if values.get("format") != _FORMAT:
        raise CheckpointError(
            f"format must be {_FORMAT}, got {values.get('format')!r}. Was it written by another version?",
            path=str(file),
            field="format",
            expected=_FORMAT,
            got=values.get("format"),
        )
    kinds = {"step": int, "optimizer_steps": int, "run": str, "settings": dict, "state": dict, "crc32": dict}
    for name, kind in kinds.items():
        value = values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{name} is missing or malformed.", path=str(file), field=name, expected=kind)
    return Checkpoint(path, **{**{name: values[name] for name in kinds}, "state": unpacked(values["state"])})


def check_same(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Checks that a run may go on from a checkpoint.

    Raises:
        CheckpointError: A setting differs; the message names each one that does.
    """
    # As JSON has them: a tuple there is a list, and numbers compare as numbers.
    now = json.loads(json.dumps(dict(settings)))
    different = [
        f"{name} was {_shown(was)} and is {_shown(value)}"
        for topic in sorted({*checkpoint.settings, *now})
        for name, was, value in _differences(topic, checkpoint.settings.get(topic), now.get(topic))
    ]
    if different:
        raise CheckpointError(
            f"this run cannot go on as it began: {'; '.join(different[:8])}. Give the settings and the data it began with, "
            "or load the checkpoint's weights with from_pretrained and begin a new run.",
            path=str(checkpoint.path),
            field=different[0].split(" ")[0],
        )


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            yield from _differences(f"{name}.{key}", was.get(key), now.get(key))
    elif was != now:
        yield name, was, now


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_whole(checkpoint: Checkpoint) -> None:
    """Checks that the files of a checkpoint are those that were saved.

    Raises:
        CheckpointError: A byte has changed; what is missing is for others to tell.
    """
    found = _checksums(checkpoint.path)
    damaged = [name for name, value in checkpoint.crc32.items() if found.get(name, value) != value]
    if damaged:
        raise CheckpointError(
            f"{damaged[0]} is damaged: its checksum is {found[damaged[0]]}. Remove this checkpoint, and the "
            "run goes on from the one before it.",
            path=str(checkpoint.path / damaged[0]),
            field=damaged[0],
            expected=checkpoint.crc32[damaged[0]],
            got=found[damaged[0]],
        )


def tables(checkpoint: Checkpoint) -> dict[str, npt.NDArray[np.float64]]:
    """The tables that were saved, by name.

    Raises:
        FormatError: The file is missing, truncated or malformed.
    """
    with SafetensorsFile(checkpoint.path / _MOMENTS_FILE) as file:
        names = [name for name in file.tensors if name.startswith(_ARRAY)]
        return {name.removeprefix(_ARRAY): np.array(file.read(name), dtype=np.float64) for name in names}


def restore(checkpoint: Checkpoint, trainer: Trainer, weights: Weights) -> None:
    """Sets weights, moments and the optimiser's count to the checkpoint's.

    The moments are compared before anything is set.

    Raises:
        CheckpointError: A tensor is missing, unexpected or wrongly shaped.
        FormatError: A file is missing, truncated or malformed.
    """
    wanted = {
        f"{name}/{slot}": (name, slot, shape) for slot, shape in trainer.parameters() for name in trainer.moments(slot)
    }
    path = checkpoint.path / _MOMENTS_FILE
    with SafetensorsFile(path) as file:
        different = sorted(set(wanted) ^ {name for name in file.tensors if not name.startswith(_ARRAY)})
        if different:
            problem = "is missing" if different[0] in wanted else "is not one of this optimiser's"
            raise CheckpointError(f"the state {different[0][:120]} {problem}.", path=str(path), field=different[0])
        for key, (_, _, shape) in wanted.items():
            info = file.tensors[key]
            if info.shape != tuple(shape) or info.dtype != "F32":
                raise CheckpointError(
                    f"{key} must be F32 {tuple(shape)}, got {info.dtype} {info.shape}.",
                    path=str(path),
                    field=key,
                    expected=tuple(shape),
                    got=info.shape,
                )
        weights.load(checkpoint.path)
        for key, (name, slot, _) in wanted.items():
            trainer.write_moment(name, slot, np.array(file.read(key), dtype=np.float32))
    trainer.steps = checkpoint.optimizer_steps
