"""SaveMemory: memories in the checkpoints of `transformers.Trainer`, where PEFT would leave them out."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from memlayers.distributed.whole import has_columns
from memlayers.models.add import save_memory, trainable_base
from memlayers.models.folder import lacks_memory
from memlayers.models.modules import memory_names, placed_memories, unwrap
from memlayers.models.storage import refill_memory, savable_base

MEMORY_FOLDER = "memory"  # in a checkpoint


class SaveMemory(TrainerCallback):
    """Saves memories in the folder ``memory`` of every checkpoint, and takes them from there when a run is resumed.

        Trainer(peft_model, ..., callbacks=[SaveMemory()])

    For models with adapters of PEFT, which saves those and nothing else: a run that is resumed would begin with
    untrained memories, and say nothing. With ``load_best_model_at_end`` those of the best checkpoint come back at the
    end. Memories are filled in place: the optimizer goes on with the parameters that it has. Where a model has memories
    of several names each has a callback: ``SaveMemory("news")`` saves those in ``memory-news``. Without adapters
    `Trainer` saves the whole model, which one with memories of several names refuses.

    Resume from a checkpoint in the ``output_dir`` of the run; a callback is not told of any other. Raises `ValueError`
    when training begins with a model that `save_memory` could not save afterwards, or from a checkpoint without
    memories.
    """

    def __init__(self, name: str | None = None):
        self.name = name
        self.folder = MEMORY_FOLDER if name is None else f"{MEMORY_FOLDER}-{name}"

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        inner = unwrap(model)
        savable_base(inner, placed_memories(inner, self.name))
        if trained := trainable_base(model):
            raise ValueError(
                f"model must have a frozen base for SaveMemory, which saves the memories alone, got {len(trained)} "
                f"parameters of the base that are trained, the first is {trained[0]!r}: use freeze_base"
            )
        is_saved_whole = isinstance(inner, PreTrainedModel) and not hasattr(model, "peft_config")
        if is_saved_whole and len(names := memory_names(inner)) > 1 and args.save_strategy != "no":
            raise ValueError(
                f"model must have adapters of PEFT, or memories of one name, to be saved by Trainer, which saves any "
                f"other one whole, got one with {', '.join(map(repr, names))}: use save_strategy='no', and "
                f"save_memory(model, folder, name=...) after training"
            )
        if state.is_hyper_param_search:
            raise ValueError("SaveMemory must be in a training of one run, got a search of hyperparameters")
        if state.global_step > 0:
            self._fill(model, checkpoint_of(args, state))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.should_save or has_columns(model):  # in one process, or in all
            save_memory(model, checkpoint_of(args, state) / self.folder, name=self.name)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._fill(model, Path(state.best_model_checkpoint))

    def _fill(self, model: nn.Module, checkpoint: Path) -> None:
        folder = checkpoint / self.folder
        if lacks_memory(folder):
            raise ValueError(
                f"checkpoint must hold the memories in {str(folder)!r}, which is not there: resume from a checkpoint "
                f"in output_dir that was written with SaveMemory, or load_memory into the base and train anew"
            )
        refill_memory(unwrap(model), folder, self.name)


def checkpoint_of(args: Any, state: Any) -> Path:
    """Where `Trainer` saves the step that it is at, and where it finds it again."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def holds_adapters_alone(checkpoint: Path) -> bool:
    """Whether a checkpoint has adapters of PEFT and no memory, of whatever name."""
    is_of_adapters = checkpoint.is_dir() and any(checkpoint.glob("**/adapter_config.json"))
    return is_of_adapters and all(map(lacks_memory, checkpoint.glob(f"{MEMORY_FOLDER}*")))
