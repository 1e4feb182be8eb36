"""unwrap: the model itself, whatever was put around it for compilation, adapters or several processes."""

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """`model` without the modules that `torch.compile`, `DistributedDataParallel` and PEFT put around it."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and callable(get_base_model := getattr(model, "get_base_model", None)):
            model = get_base_model()
        else:
            return model
