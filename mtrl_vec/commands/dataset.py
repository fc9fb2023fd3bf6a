"""Demonstrations as a dataset of LeRobot, format v3.0: Parquet tables, MP4 videos, and JSON.

Source of the format: the documentation and the package ``lerobot`` 0.4. There is a file of frames and a film for each
task, and one table of all episodes.

Shapes: ``N`` frames of an episode.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrl_vec.errors import InputError
from mtrl_vec.sim.world import STEP_SECONDS
from mtrl_vec.tasks.layout import ACTION_SIZE, OBSERVATION_SIZE

FPS = round(1 / STEP_SECONDS)
"""Environment steps in a second of simulated time."""
IMAGE = "observation.image"
_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_HAND_SIZE = 4
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_HAND = ("x", "y", "z", "gripper")
_FRAME = [
    *(f"hand_{axis}" for axis in _HAND[:3]),
    "gripper",
    *(f"object{i}_{entry}" for i in (1, 2) for entry in ("x", "y", "z", *(f"rotation{j}" for j in range(4)))),
]
_OBSERVATION = [*_FRAME, *(f"previous_{name}" for name in _FRAME), *(f"goal_{axis}" for axis in _HAND[:3])]
_NAMES: dict[str, tuple[str, Sequence[str] | None]] = {
    "observation.state": ("float32", _HAND),
    "observation.environment_state": ("float32", _OBSERVATION),
    "action": ("float32", _HAND),
    "next.reward": ("float32", None),
    "next.success": ("bool", None),
    "next.done": ("bool", None),
    "timestamp": ("float32", None),
    "frame_index": ("int64", None),
    "episode_index": ("int64", None),
    "index": ("int64", None),
    "task_index": ("int64", None),
}
"""Features of a frame, besides its picture: data type, and names of the entries where there are several."""


class Episode(NamedTuple):
    """What was seen, done and got in an episode. Actions were taken at the observation of the same row."""

    observation: NDArray[np.float32]  # [N, 39]
    action: NDArray[np.float32]  # [N, 4]
    reward: NDArray[np.float32]  # [N]
    success: NDArray[np.bool_]  # [N] after the action


def require_libraries() -> None:
    """Raises InputError where a library is missing."""
    try:
        import av  # noqa: F401
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(f"datasets need {error.name}: pip install 'mtrl_vec[dataset]'") from error


class Dataset:
    """Writes a dataset task by task; `close` completes it.

    Args:
        folder: where it goes; a new one, or empty.
        image_size: width and height of the pictures in pixels, even; 0 for none.

    Raises:
        InputError: a library is missing.
    """

    def __init__(self, folder: Path, image_size: int) -> None:
        require_libraries()
        self._folder, self._image_size = folder, image_size
        self._tasks: list[str] = []
        self._episodes: list[dict[str, Any]] = []
        self._frames: list[dict[str, NDArray]] = []
        self._pixels: list[NDArray[np.int64]] = []
        self.num_frames = 0
        """So far."""

    @property
    def num_episodes(self) -> int:
        """So far."""
        return len(self._episodes)

    def add_task(
        self, task: str, episodes: Sequence[Episode], pictures: Iterable[Iterable[NDArray[np.uint8]]] = ()
    ) -> None:
        """Write the episodes of a task, one or more.

        Args:
            task: its name, which becomes LeRobot's description of the task.
            episodes: all of them.
            pictures: [height, width, 3] at each observation, of each episode; unless there are no pictures.
        """
        k = len(self._tasks)
        self._tasks.append(task)
        columns = [self._columns(episode, k, self.num_episodes + i) for i, episode in enumerate(episodes)]
        lengths = [len(episode.action) for episode in episodes]
        ends = self.num_frames + np.cumsum(lengths)
        for frames, end, length in zip(columns, ends.tolist(), lengths, strict=True):
            frames["index"] = np.arange(end - length, end)
            about = {"episode_index": self.num_episodes, "tasks": [task], "length": length}
            about |= {"dataset_from_index": end - length, "dataset_to_index": end}
            about |= {"data/chunk_index": 0, "data/file_index": k}
            about |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            if self._image_size:
                start = end - length - self.num_frames
                film = {"chunk_index": 0, "file_index": k}
                film |= {"from_timestamp": start / FPS, "to_timestamp": (start + length) / FPS}
                about |= {f"videos/{IMAGE}/{name}": value for name, value in film.items()}
            self._episodes.append(about | _flat({name: _statistics(values) for name, values in frames.items()}))
        self._write_frames(k, columns)
        self._frames += columns
        if self._image_size:
            self._film(k, pictures, len(episodes))
        self.num_frames += sum(lengths)

    def _columns(self, episode: Episode, k: int, index: int) -> dict[str, NDArray]:
        n = len(episode.action)
        last = np.zeros(n, dtype=bool)
        last[-1] = True
        return {
            "observation.state": episode.observation[:, :_HAND_SIZE],
            "observation.environment_state": episode.observation,
            "action": episode.action,
            "next.reward": episode.reward,
            "next.success": episode.success,
            "next.done": last,
            "timestamp": np.arange(n, dtype=np.float32) / np.float32(FPS),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, index),
            "index": np.arange(n),
            "task_index": np.full(n, k),
        }

    def _write_frames(self, k: int, episodes: Sequence[Mapping[str, NDArray]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        arrays = {}
        for name in _NAMES:
            values = np.concatenate([frames[name] for frames in episodes])
            flat = pa.array(values.reshape(-1))
            arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        parquet.write_table(pa.table(arrays), self._place("data", k, "parquet"))

    def _film(self, k: int, pictures: Iterable[Iterable[NDArray[np.uint8]]], num_episodes: int) -> None:
        """All episodes in one film. No frame depends on later ones, and few on one another: they are read singly."""
        import av

        pixels: list[NDArray[np.int64]] = []
        with av.open(str(self._place(f"videos/{IMAGE}", k, "mp4")), "w") as film:
            stream = film.add_stream("libx264", rate=FPS, options={"g": "2", "bf": "0", "crf": "23"})
            stream.width = stream.height = self._image_size
            stream.pix_fmt = "yuv420p"
            for episode in pictures:
                counts = np.zeros((3, 256), dtype=np.int64)
                for picture in episode:
                    film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
                    counts += [np.bincount(picture[..., channel].ravel(), minlength=256) for channel in range(3)]
                pixels.append(counts)
            film.mux(stream.encode())
        for about, counts in zip(self._episodes[-num_episodes:], pixels, strict=True):
            about |= _flat({IMAGE: _picture_statistics(counts, about["length"])})
        self._pixels += pixels

    def close(self) -> None:
        """Write what describes the whole: episodes, tasks, statistics, and the features."""
        import pandas
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(self._episodes), self._place("meta/episodes", 0, "parquet"))
        tasks = pandas.DataFrame({"task_index": range(len(self._tasks))}, index=pandas.Index(self._tasks, name="task"))
        tasks.to_parquet(self._folder / "meta" / "tasks.parquet")
        whole = {name: _statistics(np.concatenate([frames[name] for frames in self._frames])) for name in _NAMES}
        if self._image_size:
            whole[IMAGE] = _picture_statistics(np.sum(self._pixels, axis=0), self.num_frames)
        self._write_json("stats", whole)
        self._write_json("info", self._info())

    def _info(self) -> dict[str, Any]:
        sizes = {"observation.state": _HAND_SIZE, "observation.environment_state": OBSERVATION_SIZE}
        sizes |= {"action": ACTION_SIZE}
        features: dict[str, Any] = {
            name: {"dtype": dtype, "shape": [sizes.get(name, 1)], "names": None if names is None else list(names)}
            for name, (dtype, names) in _NAMES.items()
        }
        if self._image_size:
            size = self._image_size
            features[IMAGE] = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
            features[IMAGE]["info"] = {
                "video.height": size,
                "video.width": size,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": FPS,
                "video.channels": 3,
                "has_audio": False,
            }
        return {
            "codebase_version": "v3.0",
            "robot_type": "sawyer",
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": FPS,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": f"data/{_PATH}.parquet",
            "video_path": f"videos/{{video_key}}/{_PATH}.mp4" if self._image_size else None,
            "features": features,
        }

    def _place(self, kind: str, index: int, ending: str) -> Path:
        """Where a file goes, in a folder that is made."""
        path = self._folder / kind / f"{_PATH.format(chunk_index=0, file_index=index)}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self._folder / "meta" / f"{name}.json").write_text(json.dumps(content, indent=4) + "\n")


def _statistics(values: NDArray) -> dict[str, list]:
    """Of values [n] or [n, ...] over their first dimension, [1] or [...] each."""
    rows = values.astype(np.float64).reshape(len(values), -1)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= {_name_of(q): np.quantile(rows, q, axis=0) for q in _QUANTILES}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def _picture_statistics(counts: NDArray[np.int64], num_pictures: int) -> dict[str, list]:
    """Of pixels in [0, 1], given how many have each of 256 values in each channel, [3, 256]: [3, 1, 1] each."""
    values, share = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
    mean, there = share @ values, counts > 0
    found = {"min": values[there.argmax(1)], "max": values[255 - there[:, ::-1].argmax(1)], "mean": mean}
    found["std"] = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    cumulative = share.cumsum(axis=1)
    for q in _QUANTILES:
        found[_name_of(q)] = values[(cumulative >= q - 1e-9).argmax(1)]
    return {name: [[[x]] for x in value.tolist()] for name, value in found.items()} | {"count": [num_pictures]}


def _name_of(quantile: float) -> str:
    return f"q{100 * quantile:02.0f}"


def _flat(statistics: Mapping[str, Mapping[str, list]]) -> dict[str, list]:
    """As columns of the table of episodes."""
    return {f"stats/{name}/{of}": value for name, values in statistics.items() for of, value in values.items()}
