"""Training in three lines, with a world of 1 in a plain process, or as a rank of a launcher's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal, overload

from vembed_ds.api import factory, session
from vembed_ds.api.config import TrainConfig
from vembed_ds.api.tables import FOLDER, TrainData, is_paths, store_records
from vembed_ds.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vembed_ds.config.schema import Config
    from vembed_ds.inference import Encoder

logger = logging.getLogger(__name__)

DS_CONFIG: dict[str, Any] = {
    "zero_optimization": {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": 50000000,
        "reduce_scatter": True,
        "allgather_bucket_size": 50000000,
    }
}
"""DeepSpeed's configuration where none is given: that of ``ds_configs/zero2.json``."""

Metrics = dict[str, float]
OnLog = Callable[[Mapping[str, float], int], object]
GO_ON = 'call train(resume="auto")'
_YAML = (".yaml", ".yml")
_KEYS = {"train_data": "data_path", "eval_data": "val_data_path"}


class Trainer:
    """Trains as the command ``vembed_ds.train`` does, from Python.

    In a plain process or a notebook it trains on one device, and leaves the process as it was. In a
    script that ``deepspeed`` or ``torchrun`` starts on every rank it trains on all of them: every
    rank makes it and calls the same methods.

    Args:
        config: The settings, or a YAML file of them. A model's name in their place, or ``model_name=``, is
            vembed-factory's call, see :meth:`train`.
        ds_config: DeepSpeed's configuration: a JSON file, or what stands in one; ``None``:
            :data:`DS_CONFIG`, ZeRO-2.
        output_dir: Of vembed-factory's call; else it is a setting.
        use_gpu: Of vembed-factory's call; ``False`` asks for a process that was started with
            ``DS_ACCELERATOR=cpu``.
        train_data: In place of ``data_path``: a path, a list of them, a ``datasets.Dataset`` or a list of
            dicts (PIL images among the values), of which rank 0's counts. Tables are written to
            ``output_dir/data``.
        eval_data: The same in place of ``val_data_path``.
        on_log: Called on rank 0 with the metrics, by name, and the step whenever some are logged. Its errors
            are warned of, and end no run.
        model_name: Of vembed-factory's call.
        mode: Of vembed-factory's call; only checked.

    Attributes:
        metrics: Of the last :meth:`train`.

    Raises:
        ConfigError: Listing every problem of the settings.
    """

    @overload
    def __init__(
        self,
        config: TrainConfig | str | os.PathLike[str],
        ds_config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        train_data: TrainData | None = None,
        eval_data: TrainData | None = None,
        on_log: OnLog | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        model_name: str = factory.MODEL,
        mode: str = "auto",
        output_dir: str | os.PathLike[str] = "output",
        use_gpu: bool = True,
    ) -> None: ...

    @overload
    def __init__(
        self,
        model_name: str,
        mode: str = "auto",
        /,
        output_dir: str | os.PathLike[str] = "output",
        use_gpu: bool = True,
    ) -> None: ...

    def __init__(
        self,
        config: Any = None,
        ds_config: Any = None,
        output_dir: Any = None,
        use_gpu: bool | None = None,
        *,
        train_data: TrainData | None = None,
        eval_data: TrainData | None = None,
        on_log: OnLog | None = None,
        model_name: Any = None,
        mode: Any = None,
    ) -> None:
        self.metrics: Metrics = {}
        self._on_log, self._data = on_log, {"train_data": train_data, "eval_data": eval_data}
        self._model: factory.FactoryModel | None = None
        self._config: TrainConfig | None = None
        if isinstance(config, TrainConfig) or _is_yaml(config):
            _refuse_old(output_dir=output_dir, use_gpu=use_gpu, model_name=model_name, mode=mode)
            known = config if isinstance(config, TrainConfig) else TrainConfig.from_yaml(config)
            self._config, self._ds_config = known, ds_config
            self._check_data(known)
            return
        name = _either("model_name", config, model_name)
        self._model = factory.factory_model(
            name, _either("mode", ds_config, mode), output_dir, use_gpu
        )
        self._ds_config = None
        if given := [key for key, value in self._data.items() if value is not None]:
            raise ConfigError(f"{given[0]}: give settings by TrainConfig, or data to train()")

    @property
    def config(self) -> TrainConfig:
        """The settings.

        Raises:
            ConfigError: They come with the call of :meth:`train` that has not been made yet.
        """
        if self._config is None:
            raise ConfigError(
                "this Trainer has a model's name only; call train(data_path, ...) first, or make it "
                "from a TrainConfig"
            )
        return self._config

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config["output_dir"])

    @overload
    def train(
        self, *, resume: str | os.PathLike[str] | None = None, allow_change: Sequence[str] = ()
    ) -> Metrics: ...

    @overload
    def train(self, data_path: Any, *arguments: Any, **settings: Any) -> Literal[0]: ...

    def train(
        self,
        *arguments: Any,
        resume: str | os.PathLike[str] | None = None,
        allow_change: Sequence[str] = (),
        **settings: Any,
    ) -> Metrics | Literal[0]:
        """Train to the end. Every rank of a launcher's world calls it.

        Ctrl-C, or a notebook's stop button, ends it after the step that runs, with a checkpoint. In vembed-factory's call,
        which gives the data here, the trained model is also written to ``output_dir/checkpoint-epoch-<epochs>``,
        where its scripts look for it.

        Args:
            arguments: Of vembed-factory's call only, in its order: ``data_path``, ``val_data_path``, ``epochs``, ...
            resume: A checkpoint, a run's folder, ``"auto"`` for the newest checkpoint of ``output_dir``,
                or ``None`` for a fresh start, which moves an earlier run aside.
            allow_change: Settings that may differ from the checkpoint's, by name.
            settings: Of vembed-factory's call only.

        Returns:
            The last evaluation's metrics; empty without validation data, or when nothing was left to train. In
            vembed-factory's call 0, its exit code: what fails raises.

        Raises:
            StoppedError: A signal stopped it; its checkpoint is written.
            VembedError: What is wrong, and what mends it; the same on every rank.
        """
        if self._model is None:
            if arguments or settings:
                first = next(iter(settings), "data_path")
                raise ConfigError(
                    f"train: {first} belongs to the TrainConfig that this Trainer was made from"
                )
            self.metrics = self._train(resume, allow_change)
            return self.metrics
        self._config = factory.factory_config(self._model, arguments, settings)
        target = factory.epoch_folder(self._config)
        self.metrics = self._train(resume, allow_change)
        self.export(target)
        return 0

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        adapter: bool = False,
        best: bool = False,
    ) -> Path:
        """Write the trained model as a plain Hugging Face folder. Every rank calls it.

        It comes from the newest checkpoint in ``output_dir``, so that a later process can write it too.

        Args:
            folder: New or empty.
            dtype: Of the weights: ``float32``, ``bfloat16`` or ``float16``.
            adapter: Write the adapters of ``use_lora`` alone.
            best: The checkpoint of the best evaluation, of a run with ``best_metric``.

        Returns:
            The folder.

        Raises:
            CheckpointError: There is no checkpoint, it cannot be written so, or the folder holds something.
        """
        with self._together():
            return self._export(Path(folder), dtype=dtype, adapter=adapter, best=best)

    def encoder(
        self, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Encoder:
        """The trained model, ready to embed, from the newest checkpoint. Every rank calls it.

        Args:
            device: As of :class:`Encoder`.
            dtype: Of the weights; ``None``: float32.

        Raises:
            CheckpointError: There is no checkpoint.
        """
        import torch

        from vembed_ds.distributed import comm
        from vembed_ds.inference import Encoder

        with self._together():
            place = comm.run_on_main(
                lambda: mkdtemp(prefix=".encoder-", dir=self.output_dir),
                doing=f"output_dir={str(self.output_dir)!r}",
            )
            try:
                folder = self._export(Path(place) / "model")
                return Encoder(
                    folder,
                    device=device,
                    dtype=dtype or torch.float32,
                    trust_remote_code=self.config["trust_remote_code"],
                )
            finally:
                comm.barrier()
                if comm.is_main():
                    _remove(Path(place))

    def _train(self, resume: str | os.PathLike[str] | None, allow_change: Sequence[str]) -> Metrics:
        run = self.config.resolved.run
        chosen = None if resume is None else os.fspath(resume)
        with (
            session.alone_in_process(),
            session.memory_freed(),
            session.joined(timeout_minutes=run.timeout_minutes),
            session.logs_shown(),
        ):
            return self._train_joined(chosen, allow_change)

    def _train_joined(self, resume: str | None, allow_change: Sequence[str]) -> Metrics:
        from vembed_ds.distributed import comm
        from vembed_ds.engine.ds_config import load_ds_config
        from vembed_ds.engine.release import engines_released
        from vembed_ds.training.run import train

        for notice in self.config.notices:
            logger.warning("%s", notice)
        with session.explained():
            given = self._ds_config
            if given is None:
                ds_config, ds_origin = DS_CONFIG, "the default of Trainer"
            elif isinstance(given, Mapping):
                ds_config, ds_origin = dict(given), "ds_config"
            else:
                ds_config, ds_origin = load_ds_config(given), os.fspath(given)
            config, origins = self._complete()
            comm.require_equal(config.model_dump(mode="json"), what="the configuration")
            with engines_released():
                return train(
                    config,
                    ds_config,
                    ds_origin=ds_origin,
                    resume=resume,
                    origins=origins,
                    allow_change=allow_change,
                    on_log=self._on_log,
                    how_to_go_on=GO_ON,
                )

    def _complete(self) -> tuple[Config, dict[str, str]]:
        """The configuration with the data's files, which are written if need be. Collective."""
        data = {
            key: value if is_paths(value) else self._stored(value, name=name)
            for name, key in _KEYS.items()
            if (value := self._data[name]) is not None
        }
        return self.config.complete(data, origin="Trainer")

    def _stored(self, records: Any, *, name: str) -> str:
        """The file of a table. Collective."""
        from vembed_ds.checkpointing.disks import this_disk
        from vembed_ds.distributed import comm

        folder = self.output_dir / FOLDER
        leads = this_disk(node_local=self.config["node_local_output"]).leads
        stored = comm.run_together(
            lambda: store_records(records, folder, name=name) if leads else None,
            doing=f"writing {name} to {folder}",
        )
        first = comm.all_gather_objects(stored)[0]
        file = stored or str(first)
        comm.require_equal(file, what=f"the content of {name}")
        return str(folder / file)

    def _check_data(self, config: TrainConfig) -> None:
        """See that every kind of data is given once, and training data at all."""
        for name, key in _KEYS.items():
            if self._data[name] is not None and config[key] is not None:
                raise ConfigError(
                    f"{name}: stands beside {key}={config[key]!r}; keep one of the two"
                )
        if self._data["train_data"] is None and not (config["data_path"] or config["datasets"]):
            raise ConfigError(
                "no training data: set data_path in TrainConfig, or give train_data to Trainer"
            )
        stand_ins = {
            key: value if is_paths(value) else "."
            for name, key in _KEYS.items()
            if (value := self._data[name]) is not None
        }
        config.complete(stand_ins, origin="Trainer")

    def _export(self, folder: Path, *, best: bool = False, **options: Any) -> Path:
        from vembed_ds.checkpointing.companions import describe_readers
        from vembed_ds.checkpointing.export import export_model
        from vembed_ds.checkpointing.names import best_checkpoint
        from vembed_ds.distributed import comm

        def write() -> None:
            export_model(
                best_checkpoint(self.output_dir) if best else self.output_dir,
                folder,
                trust_remote_code=self.config["trust_remote_code"],
                show_progress=True,
                **options,
            )
            for line in describe_readers(folder):
                logger.info("%s", line)

        comm.run_on_main(write, doing=f"writing {folder}")
        return folder

    @contextmanager
    def _together(self) -> Iterator[None]:
        """The ranks of a launcher's world meet; a plain process needs nobody."""
        from vembed_ds.distributed import comm

        if not comm.is_launched():
            yield
            return
        with session.joined(timeout_minutes=self.config.resolved.run.timeout_minutes):
            yield


def _is_yaml(config: Any) -> bool:
    return isinstance(config, (str, os.PathLike)) and Path(config).suffix.lower() in _YAML


def _refuse_old(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r}: an argument of vembed-factory's Trainer, beside a configuration; set "
                "it there"
            )


def _either(name: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None:
        raise TypeError(f"Trainer() got several values for {name!r}")
    return second if first is None else first


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
